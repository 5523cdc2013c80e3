"""What a person sees: a progress bar on a terminal, plain lines in a log, one console for both."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

console = Console(stderr=True, soft_wrap=True, highlight=False)


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
        self.done, self.note = done, note
        if self.progress is not None:
            self.progress.update(self.progress.task_ids[0], completed=done, note=note)
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
                left = spent * (self.total - self.done) / (self.done - self.start)
                left = f", {clock(left)} left"
        console.print(
            f"{self.what} {self.done:,.0f}{of} {self.unit}, {clock(spent)} gone{left}"
            + (f"  {self.note}" if self.note else ""),
            markup=False,
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
        TextColumn("{task.description}"),
        BarColumn(bar_width=24),
        TextColumn("{task.completed:,.0f}/{task.total:,.0f} " + unit),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
    )
    with Progress(*columns, console=console, refresh_per_second=4) as task.progress:
        task.progress.add_task(what, total=total, completed=start, note="")
        yield task


def clock(seconds: float) -> str:
    """Seconds as h:mm:ss or m:ss."""
    minutes, seconds = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"
