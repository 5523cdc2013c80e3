"""A trace of a few steps, as JAX's profiler writes it."""

from __future__ import annotations

import re

import jax
from etils import epath

from esm1nv_jax.common.console import console
from esm1nv_jax.common.errors import UserError


def steps_of(text: str) -> tuple[int, int]:
    """Return the first and last step of a range such as `20-24`; (0, 0) where it is empty.

    Raises UserError where it is something else.
    """
    if not text:
        return 0, 0
    match = re.fullmatch(r"(\d+)-(\d+)", text)
    first, last = (int(match[1]), int(match[2])) if match else (0, 0)
    if not 1 <= first <= last:
        raise UserError(
            f"profile={text!r} names no steps; give the first and the last, such as "
            "--config.profile=20-24"
        )
    return first, last


class StepProfiler:
    """While entered, traces the steps that `text` names into a folder."""

    def __init__(self, text: str, folder: epath.Path):
        self.first, self.last = steps_of(text)
        self.folder, self._tracing = folder, False

    def before_step(self, step: int, state) -> None:
        """Start or stop the trace before `step`; `state` is what the step before it returned."""
        if step == self.first:
            jax.block_until_ready(state)  # or the end of the step before would be in the trace
            jax.profiler.start_trace(self.folder)
            self._tracing = True
        elif self._tracing and step == self.last + 1:
            jax.block_until_ready(state)
            self._write()

    def _write(self) -> None:
        self._tracing = False
        jax.profiler.stop_trace()
        console.print(
            f"profile    of steps {self.first} to {self.last} in {self.folder}: open it with "
            "xprof, or its .json.gz at ui.perfetto.dev"
        )

    def __enter__(self) -> StepProfiler:
        return self

    def __exit__(self, *_) -> None:
        if self._tracing:
            self._write()
