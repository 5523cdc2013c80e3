"""What only a GPU can tell: `pytest tests/gpu_test.py` on a machine that has one. Skips elsewhere.

Each check runs in a process of its own, because the other tests of this suite hold JAX to a CPU.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from esm1nv_jax.planning.chips import by_device_kind, launch_flags
from tests.planning.run_plan import plan

ROOT = Path(__file__).parents[1]


def on_gpu(code: str, timeout=900) -> str:
    environment = {k: v for k, v in os.environ.items() if k != "JAX_PLATFORMS"}
    ended = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        timeout=timeout,
        cwd=ROOT,
        env=environment
        | {
            "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
            "XLA_PYTHON_CLIENT_PREALLOCATE": "false",
            "XLA_FLAGS": " ".join(launch_flags()),
        },  # as a run and its plan have
        check=False,
    )
    assert ended.returncode == 0, ended.stderr[-4000:]
    return ended.stdout.strip().splitlines()[-1]


@pytest.fixture(scope="module")
def gpu() -> str:
    """The name of the chip."""
    code = "import jax; d = jax.devices()[0]; print(d.platform, d.device_kind)"
    try:
        platform, _, kind = on_gpu(code, timeout=120).partition(" ")
    except (AssertionError, subprocess.TimeoutExpired):
        platform = "none"
    if platform != "gpu":
        pytest.skip(f"no GPU here (platform {platform})")
    return kind


BACKENDS = """
import jax, jax.numpy as jnp, numpy as np
from esm1nv_jax.model.attention import attention
from tests.model import attention_reference as reference
B, T, N, H = 2, 640, 4, 64
random = np.random.default_rng(0)
qkv = np.asarray(jnp.asarray(random.normal(size=(B, T, 3, N, H)), jnp.bfloat16), np.float64)
g = np.asarray(jnp.asarray(random.normal(size=(B, T, N, H)), jnp.bfloat16), np.float64)
keys = np.array([3, 2**31], np.uint32)
packed = np.zeros((B, T), np.int32)
packed[0, :300], packed[0, 300:301], packed[0, 301:600], packed[1] = 1, 2, 3, 1
padded = np.zeros((B, T), np.int32)
padded[0, :401], padded[1, :7] = 1, 1
for name, ids, rate in (
    ("xla", packed, 0.1), ("pallas", packed, 0.0), ("pallas", packed, 0.1),
    ("pallas", padded, 0.1), ("cudnn", padded, 0.0),
):
    def f(x):
        dropout = (rate, jnp.asarray(keys)) if rate else ()
        return attention(x, jnp.asarray(ids), jnp.bfloat16, *dropout, backend=name)
    out, pull = jax.vjp(f, jnp.asarray(qkv, jnp.bfloat16))
    grad = pull(jnp.asarray(g, out.dtype))[0]
    for found, right in zip((out, grad), reference.attention(qkv, ids, g, rate, keys)):
        found = np.asarray(found, np.float64)
        error = np.abs(found - right).max() / np.abs(right).max()
        assert error < 0.02, (name, rate, error)
        assert np.all(found[ids == 0] == 0), name
print("ok")
"""


def test_every_backend_equals_the_reference(gpu):
    assert on_gpu(BACKENDS) == "ok"


STEPS = """
import json, sys, jax
from esm1nv_jax.common import config_file
from esm1nv_jax.data.source import open_split
from esm1nv_jax.data.packing import stream_config
from esm1nv_jax.data.pipeline import train_dataset
from esm1nv_jax.training import sharding, step
from esm1nv_jax.training.run_config import RunConfig
config = RunConfig.from_config_dict(config_file.load("configs/pretrain_small.py"))
device = jax.devices()[0]
source = open_split("sample", "train")
mesh = sharding.make_mesh([device])
settled = config.step_config(device)
stream = stream_config(config, config.global_rows(source.lengths, 1))
update, _ = step.jit_steps(settled, mesh)
layout = sharding.sharding(mesh, "state")
state = jax.jit(step.create_state, static_argnums=0, out_shardings=layout)(settled)
batches, losses = iter(train_dataset(source, stream)), []
place = lambda batch: sharding.place_on_devices(batch, settled.objective.batch_dtypes, mesh)
for _ in range(3):
    state, values = update(state, place(next(batches)))
    values = values.fetch()
    losses.append(values["loss"] / values["num_targets"])
print(json.dumps({"losses": losses, "finite": values["finite"],
                  "peak": device.memory_stats()["peak_bytes_in_use"]}))
"""


def test_three_steps_of_the_card_and_their_memory(gpu):
    """The full packed step: finite, near ln 30 at first, and within 15 % of the planned peak."""
    found = json.loads(on_gpu(STEPS))
    assert found["finite"] == 1
    assert all(2.5 < loss < 4.5 for loss in found["losses"])
    chip = by_device_kind(gpu)
    if chip is None:
        pytest.skip(f"no plan for {gpu}")
    planned = plan("--config=configs/pretrain_small.py", f"--chip={chip.name}")
    assert abs(found["peak"] / planned["peak"] - 1) < 0.15
