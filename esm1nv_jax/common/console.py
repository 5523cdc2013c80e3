"""All text for people: results on stdout, log lines and progress on stderr.

Ids, names and paths come from outside. Whatever is printed here as a `str`, also as the title or a
cell of a table, appears as it stands: it is no markup, no emoji code and no escape sequence. Styled
text is asked for, by `style=` or by a `rich.text.Text`.
"""

from __future__ import annotations

import errno
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Column, Table
from rich.text import Text

from esm1nv_jax.common.errors import UserError

# Control characters but for tab and newline, and those that change the direction of text.
_UNPRINTABLE = {*range(32), *range(0x7F, 0xA0), 0x200E, 0x200F, *range(0x202A, 0x202F)}
_UNPRINTABLE |= {*range(0x2066, 0x206A)}
_ESCAPES = {c: ascii(chr(c))[1:-1] for c in _UNPRINTABLE - {ord("\t"), ord("\n")}}


def printable(text: str) -> str:
    """`text` with control characters as `\\x1b` and the like."""
    return text.translate(_ESCAPES)


class PlainConsole(Console):
    """A `rich` console that takes every `str` for plain text."""

    def __init__(self, stderr: bool):
        super().__init__(stderr=stderr, soft_wrap=True, highlight=False, markup=False, emoji=False)

    def render_str(self, text: str, **options) -> Text:
        return super().render_str(printable(text), **options)

    def _check_buffer(self) -> None:
        """Writes what was printed. A log that cannot be written never ends what runs."""
        try:
            super()._check_buffer()
        except OSError as error:
            del self._buffer[:]
            if self.stderr:
                if error.errno in (errno.EPIPE, errno.EIO):  # its reader, or its terminal, is gone
                    os.dup2(os.open(os.devnull, os.O_WRONLY), self.file.fileno())
            elif isinstance(error, BrokenPipeError):
                raise
            else:
                raise UserError(f"standard output cannot be written: {error.strerror}") from None

    def on_broken_pipe(self) -> None:
        raise BrokenPipeError(errno.EPIPE, os.strerror(errno.EPIPE))  # rich would exit with 1


console = PlainConsole(stderr=True)  # logs and progress
stdout = PlainConsole(stderr=False)  # results


class Bar:
    """A task that advances. `note` is free text shown at the end of the line."""

    def __init__(self, what: str, total: float | None, unit: str, every: float, start: float):
        self.what, self.total, self.unit, self.every = what, total, unit, every
        self.start = self.done = start
        self.note = ""
        self.started = self.printed = time.monotonic()
        self.progress: Progress | None = None

    def update(self, done: float, note: str = "") -> None:
        """Sets how far the task is, in units of `total`."""
        self.done, self.note = done, printable(note)
        if self.progress is not None:
            self.progress.update(self.progress.task_ids[0], completed=done, note=self.note)
        elif time.monotonic() - self.printed >= self.every:
            self.printed = time.monotonic()
            self.line()

    def advance(self, by: float = 1, note: str = "") -> None:
        self.update(self.done + by, note)

    def line(self) -> None:
        """Prints one plain line: what a log keeps of a progress bar."""
        spent = time.monotonic() - self.started
        of, left = "", ""
        if self.total:
            of = f"/{self.total:,.0f} ({100 * self.done / self.total:.0f} %)"
            if self.done > self.start:
                remaining = spent * (self.total - self.done) / (self.done - self.start)
                left = f", {clock(remaining)} left"
        console.print(
            f"{self.what} {self.done:,.0f}{of} {self.unit}, {clock(spent)} gone{left}"
            + (f"  {self.note}" if self.note else "")
        )


@contextmanager
def bar(
    what: str,
    total: float | None,
    unit: str = "",
    show: bool = True,
    every: float = 10.0,
    start: float = 0,
) -> Iterator[Bar]:
    """A progress bar where stderr is a terminal, else a line every `every` seconds."""
    task = Bar(what, total, unit, every if show else float("inf"), start)
    if not (show and console.is_terminal):
        yield task
        if show and task.done > task.start:
            task.line()  # how it ended
        return
    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(bar_width=24 if console.width >= 120 else 12),
        TextColumn("{task.completed:,.0f}{task.fields[of]} " + unit, markup=False),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        # Alone cut short where the line is full.
        TextColumn("{task.fields[note]}", markup=False, table_column=Column(ratio=1, no_wrap=True)),
    )
    of = f"/{total:,.0f}" if total else ""
    with Progress(*columns, console=console, refresh_per_second=4, expand=True) as task.progress:
        task.progress.add_task(printable(what), total=total, completed=int(start), note="", of=of)
        yield task


def numbers_table(title: str, *columns: str, names: int = 1) -> Table:
    """A table whose first `names` columns are text, the others numbers. Where the terminal is too
    narrow, or there is none, what is long goes on in the next line; no digit is cut off."""
    table = Table(title=title, title_justify="left")
    for i, column in enumerate(columns):
        table.add_column(column, justify="left" if i < names else "right", overflow="fold")
    return table


def count(n: int, noun: str) -> str:
    """`1 protein`, `2,000 proteins`."""
    return f"{n:,} {noun}{'s' * (n != 1)}"


def clock(seconds: float) -> str:
    """Seconds as h:mm:ss or m:ss."""
    minutes, seconds = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"
