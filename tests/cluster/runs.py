"""Real runs of several processes, through the launcher that a user has."""

import json
import os
import re
import signal
import subprocess
import time
from pathlib import Path

import numpy as np

from esm1nv_jax.checkpoints import step_folder
from tests.training import processes

LOCAL = processes.ROOT / "launch" / "local.sh"
SAME = ("--config.log.every=1", "--config.evaluation.every=1000")


class Run:
    """A run under launch/local.sh, its output in a file; `with` kills what is left of it."""

    def __init__(self, workdir: Path, n: int, *options: str, restarts=0, python=None, **env):
        self.workdir, self.n = workdir, n
        self.output = workdir.parent / f"{workdir.name}.out"
        self.began = time.monotonic()
        launcher = [str(LOCAL), "-n", str(n), "--restarts", str(restarts)]
        run = processes.command(
            f"--workdir={workdir}", f"--config.batch.rows={24 if n == 3 else 8}", *SAME, *options
        )
        run[0] = python or run[0]
        with self.output.open("a") as out:
            self.process = subprocess.Popen(
                [*launcher, *run],
                env=processes.environment(**env),
                cwd=processes.ROOT,
                stdout=out,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    @property
    def text(self) -> str:
        return self.output.read_text()

    def pids(self) -> dict[int, int]:
        """Process number to pid of those that live now, from their environment."""
        found = {}
        for entry in Path("/proc").iterdir():
            try:
                if f"--workdir={self.workdir}\0" not in (entry / "cmdline").read_text():
                    continue
                said = (entry / "environ").read_text()
            except (OSError, UnicodeDecodeError):
                continue
            if number := re.search(r"JAX_PROCESS_ID=(\d+)", said):
                found[int(number[1])] = int(entry.name)
        return found

    def steps(self) -> int:
        """The newest step in the metrics."""
        path = self.workdir / "metrics.jsonl"
        if not path.exists():
            return 0
        with path.open("rb") as file:
            file.seek(max(0, path.stat().st_size - 4096))
            found = re.findall(rb'^{"step": (\d+)', file.read(), re.MULTILINE)
        return int(found[-1]) if found else 0

    def until(self, ready, seconds: float = 600) -> None:
        end = time.monotonic() + seconds
        while not ready():
            if self.process.poll() is not None:
                raise AssertionError(f"ended with {self.process.returncode}: {self.text}")
            if time.monotonic() > end:
                raise AssertionError(f"not ready after {seconds} s: {self.text}")
            time.sleep(0.05)

    def signal(self, process: int, number: signal.Signals) -> None:
        os.kill(self.pids()[process], number)

    def wait(self, seconds: float = 900) -> int:
        try:
            return self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"still running after {seconds} s: {self.text}") from None

    def __enter__(self):
        return self

    def __exit__(self, *_):
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()
        for pid in self.pids().values():
            os.kill(pid, signal.SIGKILL)


def losses(workdir: Path) -> dict[int, float]:
    """Training loss by step."""
    lines = map(json.loads, (workdir / "metrics.jsonl").read_text().splitlines())
    return {line["step"]: line["loss"] for line in lines if line["kind"] == "train"}


def parameters(workdir: Path, step: int) -> dict[str, np.ndarray]:
    from esm1nv_jax.checkpoints.model_folder import flatten

    return flatten(step_folder.read_params(workdir, step))


def same_bits(a: dict[str, np.ndarray], b: dict[str, np.ndarray]) -> bool:
    return a.keys() == b.keys() and all(a[k].tobytes() == b[k].tobytes() for k in a)
