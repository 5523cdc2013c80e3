"""From typing the quickstart to its first step, and where the time goes.

    python benchmarks/startup.py [--config configs/quickstart.py] [--json OUT.json]

Starts a process with an empty cache of compiled programs, and another that finds the first one's.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path


def start(path: str) -> dict[str, float]:
    """Seconds of each phase of a run's start, through the functions that `train.run` calls."""
    began = float(os.environ["BEGAN"])
    phases = {}

    def phase(name: str) -> None:
        nonlocal began
        phases[name], began = time.time() - began, time.time()

    from esm1nv_jax.common import command

    command.set_up()
    import jax

    from esm1nv_jax.common import config_file
    from esm1nv_jax.data.packing import stream_config
    from esm1nv_jax.training import sharding, step, train
    from esm1nv_jax.training.run_config import RunConfig

    phase("Python and imports")
    config = RunConfig.from_config_dict(config_file.load(path))
    mesh = sharding.make_mesh(sharding.devices_of(config.platform))
    settings = config.step_config(mesh.devices.flat[0])
    source = train.open_data(config).train
    stream = stream_config(config, config.global_rows(source.lengths, mesh.size))
    phase("config, devices, data")
    layout = sharding.sharding(mesh, "state")
    create = jax.jit(step.create_state, static_argnums=0, out_shardings=layout)
    state = jax.block_until_ready(create(settings))
    phase("first parameters")
    train_step, _ = step.compile_steps(settings, mesh, stream.rows, stream.row_length)
    phase("compilation")
    batches = train.training_batches(source, stream, settings.objective, mesh)
    _, arrays = next(batches)
    jax.block_until_ready(train_step(state, arrays))
    batches.close()
    phase("first batch and step")
    return phases


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--config", default="configs/quickstart.py")
    parser.add_argument("--json")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        print(json.dumps(start(options.config)))
        return
    found = {}
    with tempfile.TemporaryDirectory() as cache:
        for name in ("first start", "second start"):
            done = subprocess.run(
                [sys.executable, __file__, "--child", "--config", options.config],
                env=os.environ | {"JAX_COMPILATION_CACHE_DIR": cache, "BEGAN": str(time.time())},
                stdout=subprocess.PIPE,
                text=True,
                check=True,
            )
            found[name] = json.loads(done.stdout.splitlines()[-1])
    for phase in found["first start"]:
        print(f"{phase:<24}" + "".join(f"{found[name][phase]:8.1f} s" for name in found))
    print(f"{'in all':<24}" + "".join(f"{sum(found[name].values()):8.1f} s" for name in found))
    if options.json:
        Path(options.json).write_text(json.dumps(found), encoding="utf-8")


if __name__ == "__main__":
    main()
