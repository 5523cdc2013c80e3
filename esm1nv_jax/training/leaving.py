"""Leaving in good order: Ctrl-C and SIGTERM end a run after the update in hand, saved."""

from __future__ import annotations

import signal
from types import FrameType

from esm1nv_jax.console import console
from esm1nv_jax.errors import EXIT_INTERRUPTED, EXIT_SAVED


class Leaving:
    """While open, the first SIGINT or SIGTERM is noted; a second SIGINT interrupts at once."""

    def __init__(self):
        self.signal: int | None = None

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.signal is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.signal = number
        name = signal.Signals(number).name
        console.print(f"{name}: saving after this update (Ctrl-C again: leave at once, unsaved)")

    @property
    def status(self) -> int:
        """The exit status that the signal asks for."""
        return EXIT_INTERRUPTED if self.signal == signal.SIGINT else EXIT_SAVED

    def __enter__(self) -> Leaving:
        self.old = {n: signal.signal(n, self._note) for n in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *_) -> None:
        for number, handler in self.old.items():
            signal.signal(number, handler)
