"""Time and logs of each process, to find a straggler: the time of a step is the same everywhere,
because every step waits for the slowest process."""

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
from esm1nv_jax.common.errors import UserError
from esm1nv_jax.common.files import open_append
from esm1nv_jax.training.process_group import ProcessGroup
from esm1nv_jax.training.watchdog import Watchdog

PROBE_SIZE = 1024  # the probe is two products of square matrices of this size: 4 GFLOP
KEY = "hosts/"


class HostClock:
    """Where the main thread of this process spends its time between two lines of the log.

    Shares of the wall time: `data_wait` for batches, `device_wait` for the device (a straggler
    waits less than its peers), `host_time` the rest. `probe_seconds` is the time of a fixed matrix
    product on this process's first device alone, taken when nothing else runs on it.
    """

    def __init__(self, group: ProcessGroup, device: jax.Device):
        self.group = group
        with jax.default_device(device):
            self._matrix = jnp.asarray(np.full((PROBE_SIZE, PROBE_SIZE), 1e-3, np.float32))
            self._product = jax.jit(lambda x: jnp.sum(x @ x @ x)).lower(self._matrix).compile()
        self.probe_seconds = 0.0
        self.restart()

    def restart(self) -> None:
        self._start = time.perf_counter()
        self._waited = {"data_wait": 0.0, "device_wait": 0.0}

    @contextlib.contextmanager
    def waiting(self, name: str) -> Iterator[None]:
        """Count the time spent inside as `name`: 'data_wait' or 'device_wait'."""
        start = time.perf_counter()
        yield
        self._waited[name] += time.perf_counter() - start

    def probe(self) -> None:
        """Time the product, twice: the first may still find the device busy."""
        for _ in range(2):
            start = time.perf_counter()
            self._product(self._matrix).block_until_ready()
            self.probe_seconds = time.perf_counter() - start

    def take(self) -> dict[str, float]:
        """Return the metrics of all processes, `name/process`, on process 0; elsewhere this one's.

        Process 0 waits for nobody: it takes what the others published last, which may be one line
        of the log old.
        """
        wall = time.perf_counter() - self._start
        mine = {name: seconds / wall for name, seconds in self._waited.items()}
        mine["host_time"] = max(0.0, 1 - sum(mine.values()))
        if self.probe_seconds:
            mine["probe_seconds"] = self.probe_seconds
        self.restart()
        by_process = {self.group.index: mine}
        if self.group.client is not None:
            key = f"{KEY}{self.group.index}"
            self.group.client.key_value_set(key, json.dumps(mine), allow_overwrite=True)
            if self.group.is_primary:
                for key, message in self.group.client.key_value_dir_get(KEY):
                    by_process[int(key.rpartition("/")[2])] = json.loads(message)
        return {
            f"{name}/{process}": value
            for process, metrics in sorted(by_process.items())
            for name, value in metrics.items()
        }


class LogFile(io.TextIOWrapper):
    """A file that cannot end the run: lines for which the disk has no room are lost."""

    def write(self, text: str) -> int:
        with contextlib.suppress(OSError):
            super().write(text)
        return len(text)


@contextlib.contextmanager
def open_host_log(run_dir: epath.Path, group: ProcessGroup, watchdog: Watchdog) -> Iterator[TextIO]:
    """Open the log of this host, `logs/HOST.log`, to which all its processes append.

    Stacks go there, and a line of metrics from each process; what processes other than 0 would
    print goes there too, for one of them is enough on a terminal.
    """
    folder = run_dir / "logs"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = open_append(folder / f"{group.host}.log")
    except OSError as error:
        raise UserError(
            f"{folder} cannot be written ({error.strerror}); choose another --workdir=DIR"
        ) from None
    with LogFile(file, encoding="utf-8", errors="backslashreplace", write_through=True) as log:
        log_line(log, f"process {group.index} of {group.size} starts, pid {os.getpid()}")
        watchdog.log_to(log)
        if not group.is_primary:
            console.file = log
        try:
            yield log
        finally:
            watchdog.log_to(sys.stderr)
            console._file = None  # sys.stderr, whatever it is by then


def log_line(log: TextIO, text: str) -> None:
    """Append a line with the time to the log of this host."""
    print(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {text}", file=log, flush=True)
