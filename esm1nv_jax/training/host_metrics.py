"""Figures for each process, to find a straggler: step times themselves are the same everywhere,
because every update waits for the slowest."""

from __future__ import annotations

import contextlib
import io
import json
import os
import sys
import time
from collections.abc import Iterator
from typing import TextIO

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath

from esm1nv_jax.common.console import console
from esm1nv_jax.training import workdir
from esm1nv_jax.training.process_group import Team
from esm1nv_jax.training.watchdog import Watchdog

PROBE_SIZE = 1024  # two products of so many squared: 4 GFLOP
NOTES = "hosts/"


class HostClock:
    """Where the main thread of this process spends its time between two lines of the log.

    Shares of the wall time: `data_wait` for batches, `device_wait` for the device (a straggler
    waits less than its peers), `host_time` the rest. `probe_seconds` is the time of a fixed matrix
    product on this process's first device alone, taken when nothing else runs on it.
    """

    def __init__(self, team: Team, device: jax.Device):
        self.team = team
        with jax.default_device(device):
            self.square = jnp.asarray(np.full((PROBE_SIZE, PROBE_SIZE), 1e-3, np.float32))
            self.product = jax.jit(lambda x: jnp.sum(x @ x @ x)).lower(self.square).compile()
        self.probe_seconds = 0.0
        self.start(0.0)

    def start(self, waited: float) -> None:
        self.began, self.data_waited, self.device_waited = time.perf_counter(), waited, 0.0

    @contextlib.contextmanager
    def waiting(self):
        """Time spent inside is the device's."""
        began = time.perf_counter()
        yield
        self.device_waited += time.perf_counter() - began

    def probe(self) -> None:
        """Times the product, twice: the first may still find the device busy."""
        for _ in range(2):
            began = time.perf_counter()
            self.product(self.square).block_until_ready()
            self.probe_seconds = time.perf_counter() - began

    def take(self, waited: float) -> dict[str, float]:
        """Figures of all processes, `name/process`, on process 0; elsewhere this one's.

        `waited` is all the time that batches were ever waited for. Process 0 waits for nobody: it
        takes what the others said last, which may be one line of the log old.
        """
        wall = time.perf_counter() - self.began
        data, device = (waited - self.data_waited) / wall, self.device_waited / wall
        mine = {"data_wait": data, "device_wait": device, "host_time": max(0, 1 - data - device)}
        if self.probe_seconds:
            mine["probe_seconds"] = self.probe_seconds
        self.start(waited)
        notes = {self.team.process: mine}
        if self.team.client is not None:
            me = str(self.team.process)
            self.team.client.key_value_set(NOTES + me, json.dumps(mine), allow_overwrite=True)
            if self.team.process == 0:
                for key, note in self.team.client.key_value_dir_get(NOTES):
                    notes[int(key.rpartition("/")[2])] = json.loads(note)
        return {
            f"{name}/{process}": value
            for process, figures in sorted(notes.items())
            for name, value in figures.items()
        }


class Log(io.TextIOWrapper):
    """A file that cannot end the run: lines for which the disk has no room are lost."""

    def write(self, text: str) -> int:
        with contextlib.suppress(OSError):
            super().write(text)
        return len(text)


@contextlib.contextmanager
def log(run_folder: epath.Path, team: Team, watchdog: Watchdog) -> Iterator[TextIO]:
    """The log of this host, `logs/HOST.log`, to which all its processes append.

    Stacks go there, and a line of figures from each process; what processes other than 0 would
    print goes there too, for one of them is enough on a terminal.
    """
    folder = run_folder / "logs"
    folder.mkdir(parents=True, exist_ok=True)
    with Log(workdir.appending(folder / f"{team.host}.log"), write_through=True) as file:
        note(file, 0, {}, f"process {team.process} of {team.processes} starts, pid {os.getpid()}")
        watchdog.log_to(file)
        if team.process:
            console.file = file
        try:
            yield file
        finally:
            watchdog.log_to(sys.stderr)
            console.file = None  # sys.stderr, whatever it is by then


def note(file: TextIO, number: int, figures: dict[str, float], text: str = "") -> None:
    """A line of the log of a host."""
    shown = "  ".join(f"{name} {value:.3g}" for name, value in figures.items())
    now = time.strftime("%Y-%m-%d %H:%M:%S")
    print(f"{now} {text or f'update {number}  {shown}'}", file=file, flush=True)
