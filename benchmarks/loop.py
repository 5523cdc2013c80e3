"""What a step costs the host, and how long the device stands idle between two of them.

    python benchmarks/loop.py [--config configs/quickstart.py] [--json OUT.json]

Real runs, `train.train` and all, without evaluations and checkpoints on the way. Host time is the
CPU time of the main thread, of a run of 300 steps less one of 100, for a step: cores that the
device's work keeps busy do not count. Idle time is read from the trace that `--config.profile`
writes: from the last operation of a step to the first of the next.
"""

from __future__ import annotations

import json
import statistics
import sys
import tempfile
import time
from itertools import pairwise
from pathlib import Path

import jax

from esm1nv_jax.common import command, config_file
from esm1nv_jax.common.command import Parser
from esm1nv_jax.training.run_config import RunConfig
from esm1nv_jax.training.train import train

SHORT, LONG, TRACED = 100, 300, "41-80"


def cpu_seconds(path: str, steps: int, workdir: Path, profile: str = "") -> float:
    """Of the main thread, in a run of so many steps."""
    config = config_file.load(path, f"steps={steps}")
    with config.unlocked():
        config.evaluation.every = config.checkpoint.every = steps
        config.profile = profile
    began = time.thread_time()
    train(RunConfig.from_config_dict(config), str(workdir))
    return time.thread_time() - began


def steps(folder: Path) -> list[tuple[float, float]]:
    """(first, last) moment of each step in a trace, in seconds and in order."""
    (path,) = folder.rglob("*.xplane.pb")
    spans: dict[int, tuple[float, float]] = {}
    for plane in jax.profiler.ProfileData.from_file(str(path)).planes:
        for line in plane.lines:
            for event in line.events:
                stats = dict(event.stats)
                if stats.get("hlo_module") == "jit_train_step":
                    first, last = spans.get(stats["run_id"], (float("inf"), 0.0))
                    end = event.start_ns + event.duration_ns
                    spans[stats["run_id"]] = min(first, event.start_ns), max(last, end)
    return sorted((first / 1e9, last / 1e9) for first, last in spans.values())


def main(argv: list[str]) -> None:
    parser = Parser("(benchmark)", "Between steps.", "python benchmarks/loop.py")
    parser.add_argument("--config", default="configs/quickstart.py")
    parser.add_argument("--json", help="write the figures here, too")
    args = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        cpu_seconds(args.config, SHORT, folder / "traced", TRACED)  # compiles, too
        short = cpu_seconds(args.config, SHORT, folder / "short")
        host = (cpu_seconds(args.config, LONG, folder / "long") - short) / (LONG - SHORT)
        spans = steps(folder / "traced")
    idle = [after[0] - before[1] for before, after in pairwise(spans)]
    every = statistics.median(after[0] - before[0] for before, after in pairwise(spans))
    found = {"step": every, "host": host, "idle": statistics.median(idle), "longest": max(idle)}
    print(
        f"a step {1e3 * every:.1f} ms; the main thread's CPU time {1e3 * host:.2f} ms; the "
        f"device idle {1e3 * found['idle']:.2f} ms between two of {len(spans)} (longest "
        f"{1e3 * found['longest']:.2f} ms)"
    )
    if args.json:
        Path(args.json).write_text(json.dumps(found), encoding="utf-8")


if __name__ == "__main__":
    command.set_up()
    sys.exit(command.run(main, sys.argv[1:]))
