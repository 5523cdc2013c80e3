"""One self-contained HTML page: headings, tables and plots, readable without a network."""

from __future__ import annotations

import html
import io
import re
import shlex
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any

from esm1nv_jax import __version__

_STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem;
  color: #1a1a1a; background: #fff }
h1 { font-size: 1.6rem } h2 { font-size: 1.2rem; margin-top: 2.5rem }
table { border-collapse: collapse; font-size: .9rem; font-variant-numeric: tabular-nums }
th, td { padding: .25rem .8rem .25rem 0; text-align: right; border-bottom: 1px solid #ddd }
th:first-child, td:first-child { text-align: left }
thead th { border-bottom: 2px solid #888; vertical-align: bottom }
svg { max-width: 100%; height: auto } p.note { color: #555; font-size: .9rem }
"""
BLUE, ORANGE, GREY = "#1f6fb4", "#d9731a", "#777777"


class HtmlReport:
    """A page, filled from top to bottom; `to_html()` is the whole file."""

    def __init__(self, title: str):
        self.title = title
        self.parts = [f"<h1>{html.escape(title)}</h1>"]

    def heading(self, text: str) -> None:
        self.parts.append(f"<h2>{html.escape(text)}</h2>")

    def paragraph(self, text: str) -> None:
        self.parts.append(f"<p>{html.escape(text)}</p>")

    def note(self, text: str) -> None:
        self.parts.append(f'<p class="note">{html.escape(text)}</p>')

    def table(self, head: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
        def line(cells, tag):
            return "<tr>" + "".join(f"<{tag}>{html.escape(c)}</{tag}>" for c in cells) + "</tr>"

        body = "\n".join(line(row, "td") for row in rows)
        self.parts.append(
            f"<table><thead>{line(head, 'th')}</thead>\n<tbody>{body}</tbody></table>"
        )

    def config(self, name: str, fields: Mapping[str, Any]) -> None:
        """The fields of a config by dotted name, folded up; nothing where there are none."""
        if fields:
            self.parts.append(f"<details><summary>Config of {html.escape(name)}</summary>")
            self.table(["field", "value"], [[key, str(fields[key])] for key in sorted(fields)])
            self.parts.append("</details>")

    def plot(self, figure, description: str) -> None:
        """A matplotlib Figure, as SVG within the page; `description` is for who cannot see it."""
        text = io.StringIO()
        figure.savefig(text, format="svg", bbox_inches="tight", metadata={"Date": None})
        svg = text.getvalue()
        svg = re.sub(r"<metadata>.*?</metadata>", "", svg[svg.index("<svg") :], flags=re.DOTALL)
        label = html.escape(description, quote=True)
        self.parts.append(svg.replace("<svg", f'<svg role="img" aria-label="{label}"', 1))

    def to_html(self) -> str:
        """The page, with command, version and date at its foot."""
        made = f"esm1nv_jax {__version__}, {time.strftime('%Y-%m-%d %H:%M')}: "
        foot = html.escape(made + shlex.join(["esm1nv", *sys.argv[1:]]))
        body = "\n".join([*self.parts, f'<p class="note">{foot}</p>'])
        page = (
            '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
            f"<title>{html.escape(self.title)}</title><style>{_STYLE}</style></head>\n"
            f"<body>\n{body}\n</body></html>\n"
        )
        return page.encode("utf-8", "backslashreplace").decode()  # names that are not UTF-8


def new_figure(width: float = 8.0, height: float = 3.6, columns: int = 1):
    """(Figure, axes) that need no display. Sizes in inches. `$` in a text is no formula."""
    import matplotlib  # takes a while, and most commands draw nothing
    from matplotlib.figure import Figure

    matplotlib.rcParams["text.parse_math"] = False
    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.subplots(1, columns)
    for axis in [axes] if columns == 1 else axes:
        axis.spines[["top", "right"]].set_visible(False)
    return figure, axes


def log_scale(axis) -> None:
    """A logarithmic y axis with ticks at 2, 5, 10, 20 rather than at powers of ten."""
    from matplotlib.ticker import LogLocator, NullFormatter, ScalarFormatter

    axis.set_yscale("log")
    axis.yaxis.set_major_locator(LogLocator(subs=(1, 1.2, 1.5, 2, 3, 5, 7)))
    axis.yaxis.set_major_formatter(ScalarFormatter())
    axis.yaxis.set_minor_formatter(NullFormatter())


def plus_minus(value: float, error: float, digits: int = 2, sign: str = "") -> str:
    """`17.06 ± 0.05`, or `-` where there is no value; `1.6e-16 ± 8.8e-17` of what so many decimals
    do not show, such as squares of errors in another unit. `sign` is that of a format, such as
    `+`."""
    if value != value:
        return "-"
    largest = max(abs(value), 0.0 if error != error else error)
    kind = f".{digits}f" if not largest or 10**-digits <= largest < 1e7 else f".{digits}g"
    shown = f"{value:{sign}{kind}}"
    return shown if error != error else f"{shown} ± {error:{kind}}"
