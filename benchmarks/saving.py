"""What a save costs a run: how long the loop stands still, and how long the writing goes on behind.

    python benchmarks/saving.py --folder /tmp/saving --json out.json

Saves the whole state of the 44M-parameter model (parameters and AdamW, 523 MB) while a
loop of matrix products stands for the updates, in alternation with the same loop undisturbed.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from esm1nv_jax.checkpoints import manager
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
    checkpoints = manager.Checkpoints(options.folder, keep=1)

    def loop() -> int:
        """Products in so many seconds."""
        count, began = 0, time.perf_counter()
        while time.perf_counter() - began < LOOP_SECONDS:
            product(square).block_until_ready()
            count += 1
        return count

    blocked, behind, slowed = [], [], []
    for number in range(options.rounds):
        alone = loop()
        began = time.perf_counter()
        checkpoints.save(int(time.time()) + number, params, rest, {}, {})
        blocked.append(time.perf_counter() - began)
        beside = loop()
        checkpoints.wait()
        behind.append(checkpoints.seconds)
        slowed.append((alone - beside) / alone * LOOP_SECONDS)
    found = {
        "megabytes": sum(x.nbytes for x in jax.tree.leaves((params, rest))) / 1e6,
        "blocked_seconds": float(np.median(blocked)),
        "seconds_behind": float(np.median(behind)),
        "seconds_lost_by_the_loop_beside_it": float(np.median(slowed)),
    }
    found["seconds_lost_in_all"] = found["blocked_seconds"] + max(
        0.0, found["seconds_lost_by_the_loop_beside_it"]
    )
    found["shortest_interval_for_5_percent"] = found["seconds_lost_in_all"] / 0.05
    for name, value in found.items():
        print(f"{name:<36} {value:.3g}")
    if options.json:
        Path(options.json).write_text(json.dumps(found))


if __name__ == "__main__":
    main()
