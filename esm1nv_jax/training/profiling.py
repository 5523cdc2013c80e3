"""A trace of a few updates, as JAX's profiler writes it."""

from __future__ import annotations

import re

import jax
from etils import epath

from esm1nv_jax.common.console import console
from esm1nv_jax.common.errors import UserError


def updates(wanted: str) -> tuple[int, int]:
    """First and last update of a range such as `20-24`; (0, 0) where it is empty.

    Raises UserError where it is something else.
    """
    if not wanted:
        return 0, 0
    found = re.fullmatch(r"(\d+)-(\d+)", wanted)
    first, last = (int(found[1]), int(found[2])) if found else (0, 0)
    if not 1 <= first <= last:
        raise UserError(
            f"profile={wanted!r} names no updates; give the first and the last, such as "
            "--config.profile=20-24"
        )
    return first, last


class Profile:
    """While open, traces the updates that `wanted` names into `folder`."""

    def __init__(self, wanted: str, folder: epath.Path):
        self.first, self.last = updates(wanted)
        self.folder, self.tracing = folder, False

    def before(self, number: int, state) -> None:
        """Call it before update `number`; `state` is what the last update returned."""
        if number == self.first:
            jax.block_until_ready(state)  # or its last moments would be in the trace
            jax.profiler.start_trace(self.folder)
            self.tracing = True
        elif self.tracing and number == self.last + 1:
            jax.block_until_ready(state)
            self._write()

    def _write(self) -> None:
        self.tracing = False
        jax.profiler.stop_trace()
        console.print(
            f"profile    of updates {self.first} to {self.last} in {self.folder}: open "
            "it with xprof, or its .json.gz at ui.perfetto.dev"
        )

    def __enter__(self) -> Profile:
        return self

    def __exit__(self, *_) -> None:
        if self.tracing:
            self._write()
