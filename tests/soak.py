"""Kills one run again and again, at any moment, and compares it with one that nobody disturbed.

    python tests/soak.py --kills 30 --processes 2 --seed 0

Takes minutes to an hour. Each kill is a SIGKILL of one process or of all, in start-up, while a
checkpoint is read, while one is written, or at a random moment. The run must end with the very
parameters of the undisturbed run, and with each line of its figures once.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import random
import signal
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from esm1nv_jax.checkpoints import step_folder
from tests.cluster.runs import Run, losses, parameters, same_bits

MOMENTS = ("start-up", "restore", "save", "any")
STEPS_A_KILL, EVERY = 200, 20  # more steps than a run makes until it is killed


def soak(folder: Path, kills: int, processes: int, seed: int) -> dict[str, int]:
    """Kills by moment. Raises AssertionError where the two runs differ."""
    draw = random.Random(seed)
    steps = STEPS_A_KILL * (kills + 1)
    options = (
        f"--config.steps={steps}",
        f"--config.checkpoint.every={EVERY}",
        "--config.checkpoint.keep=3",
    )
    with Run(folder / "straight", processes, *options) as run:
        assert run.wait(3600) == 0, run.text
    done: dict[str, int] = {}
    for kill in range(kills):
        moment = MOMENTS[kill % len(MOMENTS)]
        with Run(folder / "killed", processes, *options) as run:
            _wait_for(run, moment, draw)
            assert run.process.poll() is None, f"it ended before kill {kill}: {run.text[-3000:]}"
            victims = list(run.pids().values())
            for pid in victims if draw.random() < 0.5 else victims[:1]:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            assert run.wait(90) not in (0, 2, 75), run.text[-3000:]
        done[moment] = done.get(moment, 0) + 1
        steps_now = step_folder.steps(folder / "killed")
        print(f"kill {kill + 1} of {kills}, {moment}: checkpoints {steps_now}", flush=True)
    with Run(folder / "killed", processes, *options) as run:
        assert run.wait(3600) == 0, run.text[-3000:]
    assert same_bits(parameters(folder / "killed", steps), parameters(folder / "straight", steps))
    assert losses(folder / "killed") == losses(folder / "straight")
    return done


def _wait_for(run: Run, moment: str, draw: random.Random) -> None:
    """Until the moment to kill has come."""
    begun = run.text.count("workdir  ")
    if moment == "start-up":
        run.until(lambda: run.pids())
        time.sleep(draw.uniform(0, 4))
        return
    log = run.workdir / "logs"

    def starts() -> int:
        return sum(path.read_text().count(" starts, pid") for path in log.glob("*.log"))

    if moment == "restore":
        before = starts()
        run.until(lambda: starts() > before)
        time.sleep(draw.uniform(0, 0.3))
        return
    run.until(lambda: run.text.count("workdir  ") > begun)
    if moment == "save":
        run.until(lambda: any(_unfinished(run.workdir / step_folder.FOLDER)))
        return
    first = run.steps()
    run.until(lambda: run.steps() >= first + 2)
    time.sleep(draw.uniform(0, 1))


def _unfinished(folder: Path):
    """Folders of steps that are being written, or have no checksums yet."""
    with contextlib.suppress(FileNotFoundError):
        for path in folder.iterdir():
            if not path.name.isdigit() or not (path / step_folder.CHECKSUMS).exists():
                yield path


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=30)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        kinds = soak(Path(folder), options.kills, options.processes, options.seed)
    print(f"survived {sum(kinds.values())} kills, bit for bit: {kinds}")
