"""Leaving in good order: Ctrl-C and SIGTERM end a run after the update in hand, saved.

With one process a signal is noted by a plain handler. With several, a SIGTERM to any of them goes
through JAX's preemption service, which makes all of them leave after the same update.
"""

from __future__ import annotations

import os
import signal
from types import FrameType

from jax.experimental import multihost_utils

from esm1nv_jax.common.console import console
from esm1nv_jax.common.errors import EXIT_INTERRUPTED, EXIT_SAVED

SAYING = "saving after this update (Ctrl-C again: leave at once, unsaved)"


class Leaving:
    """While open, the first SIGINT or SIGTERM is noted; a second SIGINT interrupts at once."""

    def __init__(self, processes: int = 1):
        self.processes = processes
        self.signal: int | None = None
        self.leaving = False

    def asked(self, number: int) -> bool:
        """Whether to leave after update `number`: the same answer on every process.

        Every process asks once an update.
        """
        if self.processes > 1:
            self.leaving = multihost_utils.reached_preemption_sync_point(number)
        else:
            self.leaving = self.signal is not None
        return self.leaving

    @property
    def status(self) -> int:
        """The exit status that the signal asks for."""
        return EXIT_INTERRUPTED if self.signal == signal.SIGINT else EXIT_SAVED

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.signal is not None:
            if number == signal.SIGINT:
                raise KeyboardInterrupt
            return  # after a Ctrl-C, launch/local.sh sends a SIGTERM, too
        self.signal = number
        console.print(f"{signal.Signals(number).name}: {SAYING}")
        if self.processes > 1:
            os.kill(os.getpid(), signal.SIGTERM)  # which the preemption service tells all

    def __enter__(self) -> Leaving:
        # The preemption service has a handler of its own for SIGTERM, which must stay.
        handled = (signal.SIGINT,) if self.processes > 1 else (signal.SIGINT, signal.SIGTERM)
        self.old = {number: signal.signal(number, self._note) for number in handled}
        return self

    def __exit__(self, *_) -> None:
        for number, handler in self.old.items():
            signal.signal(number, handler)
