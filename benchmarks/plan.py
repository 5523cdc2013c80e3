"""Compares `esm1nv plan` with the clock, on a CPU: the time of a step as predicted and as measured.

    python benchmarks/plan.py --json out.json

On one core, by the CPU time of this process, so that whatever else runs on the machine is not
counted. Ends with status 1 where a prediction is wrong by more than a factor of 1.5.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import sys
import time
from pathlib import Path

from esm1nv_jax.common import command

FACTOR = 1.5
SHAPES = {  # arguments of configs/pretrain_small.py, and fields
    "short rows": ("width=256,layers=2,max_length=126,batch=8", []),
    "long rows": ("width=128,layers=2,max_length=1022,batch=2", []),
    "wide": ("width=512,layers=1,max_length=126,batch=8", []),
    "deep": ("width=128,layers=6,max_length=254,batch=4", []),
    "no dropout": (
        "width=256,layers=2,max_length=254,batch=4",
        ["--config.model.dropout=0", "--config.model.attention_dropout=0"],
    ),
    "remat": ("width=256,layers=2,max_length=254,batch=4", ["--config.compute.remat=block"]),
    "bf16": ("width=512,layers=2,max_length=254,batch=4", ["--config.compute.dtype=bfloat16"]),
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--shapes", default=",".join(SHAPES), help="some of the default's")
    parser.add_argument("--json")
    options = parser.parse_args()
    os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    os.environ["JAX_PLATFORMS"] = "cpu"
    command.set_up()
    from esm1nv_jax.planning import chips

    measured = functools.partial(chips.measured_cpu, clock=time.process_time)
    chips.measured_cpu = functools.cache(measured)
    this, bf16 = map(chips.measured_cpu, ("float32", "bfloat16"))
    print(
        f"{this.flops / 1e9:.0f} GFLOP/s in products of fp32, {bf16.flops / 1e9:.0f} of bf16, "
        f"{this.vector / 1e9:.0f} outside of them, {this.bandwidth / 1e9:.1f} GB/s"
    )
    print(f"{'':<12}{'predicted':>12}{'measured':>12}{'ratio':>8}")
    results = {}
    for name in options.shapes.split(","):
        arguments, fields = SHAPES[name]
        predicted, measured = seconds(arguments, fields, options.steps)
        results[name] = {"predicted": predicted, "measured": measured}
        print(
            f"{name:<12}{predicted * 1e3:>9.0f} ms{measured * 1e3:>9.0f} ms"
            f"{measured / predicted:>8.2f}",
            flush=True,
        )
    if options.json:
        Path(options.json).write_text(json.dumps(results), encoding="utf-8")
    ratios = [result["measured"] / result["predicted"] for result in results.values()]
    return int(max(*ratios, *(1 / ratio for ratio in ratios)) > FACTOR)


def seconds(arguments: str, fields: list[str], steps: int) -> tuple[float, float]:
    """Returns the time of a step as planned, and the shortest of `steps` that were run."""
    import jax

    from esm1nv_jax.common import config_file
    from esm1nv_jax.data.packing import stream_config
    from esm1nv_jax.data.pipeline import train_dataset
    from esm1nv_jax.data.source import open_split
    from esm1nv_jax.planning import chips
    from esm1nv_jax.planning.plan import plan
    from esm1nv_jax.training import sharding, step
    from esm1nv_jax.training.run_config import RunConfig

    config = config_file.load("configs/pretrain_small.py", arguments)
    fields = ["--config.data.path=sample", "--config.compute.dtype=float32", *fields]
    config = config_file.override(config, fields)
    planned = plan(config, chips.THIS_CPU)
    device = jax.devices()[0]
    run = RunConfig.from_config_dict(config)
    settings, mesh = run.step_config(device), sharding.make_mesh([device])
    layout = sharding.sharding(mesh, "state")
    state = jax.jit(step.create_state, static_argnums=0, out_shardings=layout)(settings)
    train_step, _ = step.jit_steps(settings, mesh)
    stream = stream_config(run, planned["rows"])
    batches = iter(train_dataset(open_split("sample", "train"), stream))
    times = []
    for _ in range(steps + 1):  # the first one compiles
        batch = sharding.place_on_devices(next(batches), settings.objective.batch_dtypes, mesh)
        jax.block_until_ready(batch)
        start = time.process_time()
        state, values = train_step(state, batch)
        jax.block_until_ready((state, values))
        times.append(time.process_time() - start)
    return planned["seconds"], min(times[1:])


if __name__ == "__main__":
    sys.exit(main())
