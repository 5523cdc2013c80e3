"""Runs the workers of a preparation and gathers what they found."""

from __future__ import annotations

import dataclasses
import multiprocessing
import os
import queue
import sys

import numpy as np

from esm1nv_jax.common.console import bar
from esm1nv_jax.common.errors import UserError
from esm1nv_jax.data import first_pass

ALL = (1 << 64) - 1  # `held_below` where anything may be held out
_NEVER = (1 << 63) - 1


@dataclasses.dataclass
class Scanned:
    """All units in the order of the input, and what concerns whole files."""

    units: list[first_pass.Unit]
    of_files: first_pass.Unit
    checksums: list[str]
    sizes: list[int]

    def take(self, name: str) -> np.ndarray:
        """One array of all units, [kept]; the units give theirs up, to hold it only once."""
        joined = np.concatenate([getattr(unit, name) for unit in self.units] or [np.zeros(0)])
        for unit in self.units:
            setattr(unit, name, None)
        return joined


def run(job: first_pass.Job, lock: int, size: int) -> Scanned:
    """Starts the workers, shows how far they are, and waits for them.

    Raises UserError. Of several faults the first in the input is told, whichever worker met it.
    """
    # A fork starts at once. JAX, where it is loaded, has threads that a fork would break.
    forks = sys.platform == "linux" and "jax" not in sys.modules
    context = multiprocessing.get_context("fork" if forks else "spawn")
    done = context.Array("Q", job.workers, lock=False)
    stop = context.Value("q", _NEVER)
    results = context.Queue()
    leave = (lock,) if forks else ()
    processes = [
        context.Process(
            target=first_pass.work,
            args=(job, i, done, stop, results, os.getpid(), leave),
            daemon=True,
        )
        for i in range(job.workers)
    ]
    units: list[first_pass.Unit] = []
    errors: list[tuple[tuple[int, int], str]] = []
    of_files, checksums = first_pass.Unit(-1), []
    waiting = set(range(job.workers))
    try:
        for process in processes:
            process.start()
        with bar("read", size / 1e6, "MB") as shown:
            while waiting:
                try:
                    kind, *found = results.get(timeout=0.25)
                except queue.Empty:
                    _check_alive(processes, waiting)
                    shown.update(sum(done) / job.workers / 1e6)
                    continue
                if kind == "unit":
                    units.append(found[0])
                elif kind == "files":
                    of_files, checksums = found
                elif kind == "error":
                    errors.append(tuple(found))
                else:
                    waiting.discard(found[0])
        for process in processes:
            process.join()
    finally:
        for process in processes:
            if process.pid is not None:
                process.kill()
                process.join()
    if errors:
        raise UserError(min(errors)[1])
    units.sort(key=lambda unit: unit.number)
    sizes = [path.stat().st_size for path in job.sources]
    return Scanned(units, of_files, checksums, sizes)


def _check_alive(processes: list, waiting: set[int]) -> None:
    """A worker that ended without a word has failed, or was killed, often for want of memory."""
    for i in sorted(waiting):
        status = processes[i].exitcode
        if status is not None and status < 0:
            raise UserError(
                f"a worker was killed by signal {-status}; if memory ran out, try fewer --workers"
            )
        if status:
            raise RuntimeError("a worker failed; its error stands above")
