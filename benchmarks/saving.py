"""What a save costs a run: how long the loop is blocked, and how long the writing takes behind it.

    python benchmarks/saving.py --folder /tmp/saving --json out.json

Saves the whole state of the 44M-parameter model (parameters and AdamW, 528 MB) while a loop of
matrix products stands for the training steps, in alternation with the same loop undisturbed.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from esm1nv_jax.checkpoints.manager import CheckpointConfig, RunCheckpoints
from esm1nv_jax.checkpoints.step_folder import steps
from esm1nv_jax.model import encoder
from esm1nv_jax.training.optimizer import OptimizerConfig, optimizer

LOOP_SECONDS = 15.0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--folder", default="/tmp/saving")
    parser.add_argument("--json")
    options = parser.parse_args()

    params = encoder.init(encoder.EncoderConfig(), 0)
    rest = {"step": np.int32(0), "opt_state": optimizer(OptimizerConfig()).init(params)}
    square = jnp.ones((1024, 1024))
    product = jax.jit(lambda x: x @ x / 1024)
    checkpoints = RunCheckpoints(options.folder, CheckpointConfig(1, 0, 1, 0, "stop"))

    def loop(saving: int = -1) -> tuple[int, float]:
        """Products in LOOP_SECONDS, and after how many seconds the step `saving` was on disk."""
        count, written, began = 0, 0.0, time.perf_counter()
        while time.perf_counter() - began < LOOP_SECONDS:
            product(square).block_until_ready()
            count += 1
            if not written and saving in steps(options.folder):
                written = time.perf_counter() - began
        return count, written

    blocked, behind, slowed = [], [], []
    for number in range(options.rounds):
        alone, _ = loop()
        step = int(time.time()) + number
        began = time.perf_counter()
        checkpoints.save(step, params, rest, {}, {})
        blocked.append(time.perf_counter() - began)
        beside, written = loop(step)
        checkpoints.wait()
        behind.append(written)
        slowed.append((alone - beside) / alone * LOOP_SECONDS)
    results = {
        "megabytes": sum(x.nbytes for x in jax.tree.leaves((params, rest))) / 1e6,
        "blocked_seconds": float(np.median(blocked)),
        "writing_seconds": float(np.median(behind)),
        "seconds_lost_while_writing": float(np.median(slowed)),
    }
    results["seconds_lost_in_all"] = results["blocked_seconds"] + max(
        0.0, results["seconds_lost_while_writing"]
    )
    results["shortest_interval_for_5_percent"] = results["seconds_lost_in_all"] / 0.05
    for name, value in results.items():
        print(f"{name:<36} {value:.3g}")
    if options.json:
        Path(options.json).write_text(json.dumps(results), encoding="utf-8")


if __name__ == "__main__":
    main()
