"""How long averaging takes: full-size checkpoints from warm disk, checksums verified.

    python benchmarks/averaging.py --members 47 --folder /tmp/averaging --json out.json

Writes that many checkpoints of the 44M-parameter model (156 MB of parameters each) once, reads them
into the page cache, and averages them; prints seconds, CPU-seconds and the peak memory above that
of the process before. The members hold fresh parameters of different seeds, which compress as
trained ones do (8 %). `--orbax` times reading each member by Orbax beside it.
"""

from __future__ import annotations

import argparse
import json
import resource
import time
from pathlib import Path

import numpy as np
import orbax.checkpoint as ocp

from esm1nv_jax.checkpoints import step_folder
from esm1nv_jax.checkpoints.manager import CheckpointConfig, RunCheckpoints
from esm1nv_jax.inference import average
from esm1nv_jax.model import encoder


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--members", type=int, default=47)
    parser.add_argument("--folder", default="/tmp/averaging")
    parser.add_argument("--orbax", action="store_true")
    parser.add_argument("--json")
    options = parser.parse_args()

    make(options.folder, options.members)
    members = average.select([options.folder], last=options.members)
    for path in Path(options.folder).rglob("*"):
        if path.is_file():
            path.read_bytes()
    before, began, cpu = peak(), time.perf_counter(), time.process_time()
    average.average(members)
    results = {
        "members": len(members),
        "seconds": time.perf_counter() - began,
        "cpu_seconds": time.process_time() - cpu,
        "peak_gib": peak(),
        "peak_gib_before": before,
    }
    if options.orbax:
        began = time.perf_counter()
        with ocp.StandardCheckpointer() as reader:
            for member in members:
                reader.restore(Path(member.run) / "checkpoints" / str(member.step) / "params")
        results["orbax_reading_alone_seconds"] = time.perf_counter() - began
    for name, value in results.items():
        print(f"{name:<28} {value:.3g}" if isinstance(value, float) else f"{name:<28} {value}")
    if options.json:
        Path(options.json).write_text(json.dumps(results, indent=1), encoding="utf-8")


def make(folder: str, members: int) -> None:
    """Checkpoints 1..members, unless they are there."""
    metadata = {"config": {"model": vars(encoder.EncoderConfig())}, "code": "benchmark"}
    checkpoints = RunCheckpoints(folder, CheckpointConfig(1, 0, members, 0, "stop"))
    params = None
    for step in range(1, members + 1):
        if step not in step_folder.steps(folder):
            if params is None or step % 8 == 1:
                params = encoder.init(encoder.EncoderConfig(), step)
            checkpoints.save(step, params, {"step": np.int32(step)}, {"data": "none"}, metadata)
    checkpoints.wait()


def peak() -> float:
    """GiB of memory that this process held at most."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


if __name__ == "__main__":
    main()
