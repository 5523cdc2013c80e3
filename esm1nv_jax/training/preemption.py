"""Stopping in good order: SIGINT, SIGTERM and SIGHUP end a run after the current step, saved.

With one process a signal is recorded by a plain handler. With several, a SIGTERM to any of them
goes through JAX's preemption service, which makes all of them stop after the same step.
"""

from __future__ import annotations

import os
import signal
from types import FrameType

from jax.experimental import multihost_utils

from esm1nv_jax.common.console import console
from esm1nv_jax.common.errors import EXIT_INTERRUPTED, EXIT_SAVED

NOTICE = "saving after this step (Ctrl-C again: exit at once, unsaved)"


class PreemptionHandler:
    """While entered, records the first signal; a second SIGINT interrupts at once.

    SIGHUP, the signal of a lost terminal, is handled unless it is ignored, as under `nohup`.
    """

    def __init__(self, num_processes: int = 1):
        self.num_processes = num_processes
        self.signal: int | None = None
        self.stopping = False

    def should_stop(self, step: int) -> bool:
        """Return whether to stop after `step`: the same on every process. Call it every step."""
        if self.num_processes > 1:
            self.stopping = multihost_utils.reached_preemption_sync_point(step)
        else:
            self.stopping = self.signal is not None
        return self.stopping

    @property
    def exit_status(self) -> int:
        return EXIT_INTERRUPTED if self.signal == signal.SIGINT else EXIT_SAVED

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.signal is not None:
            if number == signal.SIGINT:
                raise KeyboardInterrupt
            return  # after a Ctrl-C, launch/local.sh sends a SIGTERM, too
        self.signal = number
        console.print(f"{signal.Signals(number).name}: {NOTICE}")
        if self.num_processes > 1:
            os.kill(os.getpid(), signal.SIGTERM)  # the preemption service tells all processes

    def __enter__(self) -> PreemptionHandler:
        # The preemption service has a handler of its own for SIGTERM, which must stay.
        handled = [signal.SIGINT] if self.num_processes > 1 else [signal.SIGINT, signal.SIGTERM]
        if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:
            handled.append(signal.SIGHUP)
        self._previous = {number: signal.signal(number, self._handle) for number in handled}
        return self

    def __exit__(self, *_) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
