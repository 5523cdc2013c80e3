"""`esm1nv average`: the mean of checkpoints as a model folder, and whether it was worth it."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import jax
import numpy as np
from etils import epath
from rich.table import Table

from esm1nv_jax.checkpoints import average, manager, model_folder
from esm1nv_jax.checkpoints.average import Member
from esm1nv_jax.common import arguments, files
from esm1nv_jax.common.console import bar, console
from esm1nv_jax.common.errors import UserError
from esm1nv_jax.common.html import BLUE, ORANGE, HtmlReport, new_figure, plus_minus
from esm1nv_jax.data.source import MemorySource
from esm1nv_jax.inference.evaluate import evaluate_model, open_source
from esm1nv_jax.inference.model import Model


def main(argv: list[str]) -> None:
    parser = arguments.Parser(
        "average",
        "The mean of checkpoints, leaf by leaf in fp64, as a model folder.",
        "esm1nv average --workdir runs/first --last 47 --out models/first",
    )
    add = parser.add_argument
    add("--workdir", required=True, nargs="+", metavar="RUN", help="one run or several")
    add("--out", required=True, metavar="DIR", help="the model folder to write")
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--last", type=int, metavar="N", help="the newest N of each run (or all)")
    which.add_argument("--steps", default="", metavar="A,B", help="these updates of each run")
    add("--every", type=int, default=1, metavar="K", help="each Kth only, counted from the newest")
    add("--report", metavar="FILE.html", help="evaluate the average beside its members")
    add("--data", metavar="DIR[:SPLIT]", help="for the report (default: the run's validation)")
    add("--proteins", type=int, default=500, metavar="N", help="of them, for the report")
    options = parser.parse_args(argv)
    out = epath.Path(options.out)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"--out {options.out} is there already; remove it or choose another folder")
    files.check(options.report)
    if options.last == 0:
        raise UserError("--last 0 names no checkpoint; give 1 or more, or leave it out for all")
    if options.steps and options.every != 1:
        raise UserError("--every chooses among --last or all; leave it out beside --steps")
    steps = _steps(options.steps)
    members = average.select(options.workdir, options.last or 0, steps, options.every)
    source = _source(options, members) if options.report else None

    with bar("averaging", len(members), "checkpoints") as task:
        weights = average.average(members, lambda member: task.advance(note=str(member.step)))
    with files.writing(options.out):
        model_folder.write(options.out, weights)
    steps = [member.step for member in members]
    console.print(
        f"averaged {len(members)} checkpoints, updates {min(steps)} to {max(steps)}, "
        f"into {options.out}",
        markup=False,
    )
    if source is not None:
        proteins, name = source
        rows = beside_members(weights, members, proteins)
        provenance = weights.provenance | {"figures": {"data": name, **rows[-1]["figures"]}}
        with files.writing(options.out):
            model_folder.write(options.out, dataclasses.replace(weights, provenance=provenance))
        show(rows, name)
        files.write(options.report, page(rows, name).to_html())
        console.print(f"report   {options.report}", markup=False)


def beside_members(
    weights: model_folder.Weights, members: list[Member], source: MemorySource
) -> list[dict[str, Any]]:
    """{'name', 'run', 'step', 'figures'} of every member and, last, of the average, on the same
    masks."""
    rows = []
    with bar("evaluating", len(members) + 1, "models") as task:
        for member in [*members, None]:
            params = weights.params
            if member is not None:
                params = manager.read_params(member.run, member.step)
            model = Model(weights.model, jax.device_put(params), weights.provenance)
            found = evaluate_model(model, source)["overall"]
            rows.append(
                {
                    "name": str(member) if member else f"average of {len(members)}",
                    "run": member.run if member else "",
                    "step": member.step if member else members[-1].step,
                    "figures": found,
                }
            )
            task.advance()
    return rows


def show(rows: list[dict[str, Any]], data: str) -> None:
    table = Table(title=f"Perplexity on {data}, the same masks", title_justify="left")
    for name, side in (("", "left"), ("all selected", "right"), ("<mask> only", "right")):
        table.add_column(name, justify=side)
    for row in rows:
        cells = (
            plus_minus(row["figures"][n], row["figures"][f"{n}_se"], 3)
            for n in ("perplexity", "perplexity_mask")
        )
        table.add_row(row["name"], *cells, style="bold" if row is rows[-1] else "")
    console.print(table)
    console.print(verdict(rows), markup=False)


def verdict(rows: list[dict[str, Any]]) -> str:
    """Averaging does not always help: says whether it did here."""
    best = min(rows[:-1], key=lambda row: row["figures"]["perplexity_mask"])
    mine, theirs = (r["figures"]["perplexity_mask"] for r in (rows[-1], best))
    if mine < theirs:
        return f"The average is better than every member ({mine:.3f}; the best, {theirs:.3f})."
    why = "old members hold it back while the loss falls fast; average fewer, or train longer"
    if len({row["run"] for row in rows[:-1]}) > 1:
        why = "runs that began from other weights have no common mean; average within each run"
    return f"The average ({mine:.3f}) is not better than {best['name']} ({theirs:.3f}): {why}."


def page(rows: list[dict[str, Any]], data: str) -> HtmlReport:
    made = HtmlReport(f"{rows[-1]['name']} beside its members")
    made.paragraph(f"Perplexity at <mask> on {data}, the same masks for all. {verdict(rows)}")
    plot, axis = new_figure()
    runs = sorted({row["run"] for row in rows[:-1]})
    for run, colour in zip(runs, [BLUE, "#5a9e4b", "#8a5fb0", "#777777"] * len(runs), strict=False):
        mine = [row for row in rows[:-1] if row["run"] == run]
        axis.plot(
            [r["step"] for r in mine],
            [r["figures"]["perplexity_mask"] for r in mine],
            "o-",
            color=colour,
            label=f"members of {Path(run).name}",
            ms=4,
            lw=1.2,
        )
    axis.axhline(rows[-1]["figures"]["perplexity_mask"], color=ORANGE, label=rows[-1]["name"])
    axis.set(xlabel="update", ylabel="perplexity, <mask> only")
    axis.legend(frameon=False)
    made.plot(plot, "perplexity of members against updates, and of their average")
    made.table(
        ["", "all selected", "<mask> only"],
        [
            [
                row["name"],
                *(
                    plus_minus(row["figures"][n], row["figures"][f"{n}_se"], 3)
                    for n in ("perplexity", "perplexity_mask")
                ),
            ]
            for row in rows
        ],
    )
    made.note(
        "± is one standard error by protein. It is of each figure alone: two models on the same "
        "masks differ by much less than it says."
    )
    return made


def _source(options, members: list[Member]) -> tuple[MemorySource, str]:
    """The first proteins of the split asked for, held in memory."""
    config = manager.read_config(members[-1].run, members[-1].step)["config"]
    source, name = open_source(options.data or f"{config['data']['path']}:validation", None)
    if options.proteins < 1:
        raise UserError(f"--proteins {options.proteins} must be 1 or more")
    some = np.arange(min(options.proteins, len(source.lengths)))
    return MemorySource(list(zip(source.ids(some), source.sequences(some), strict=True))), name


def _steps(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(step) for step in text.split(",")) if text else ()
    except ValueError:
        raise UserError(f"--steps {text} is not a list of updates such as 1000,2000") from None
