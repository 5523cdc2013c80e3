"""Flash attention inside the training step, compiled for TPUs that are not here."""

import importlib.util
import subprocess
import sys

import pytest

from tests.planning.run_plan import plan

pytestmark = [
    pytest.mark.aot,
    pytest.mark.skipif(
        importlib.util.find_spec("libtpu") is None, reason="compiling for TPUs needs libtpu"
    ),
]
SMALL = "--config=configs/pretrain_small.py:width=128,layers=1,max_length=254"
MEMORY = """
from esm1nv_jax.planning import chips
chips.prepare_environment("tpu-v5e")
import jax, numpy as np
from esm1nv_jax.model.attention import attention
mesh = jax.sharding.Mesh(np.asarray(chips.devices(chips.CHIPS["tpu-v5e"], 1, 1)), "x")
whole = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
def gradient(x_BTE, ids, keys, g):
    def f(x_BTE):
        qkv = x_BTE.reshape(*ids.shape, 3, 12, 64)
        out = attention(qkv, ids, x_BTE.dtype, 0.1, keys, "pallas_tpu")
        return out.reshape(g.shape)
    return jax.vjp(f, x_BTE)[1](g)[0]
for T in (1024, 8192):
    B = 2**16 // T
    shapes = [((B, T, 2304), "bfloat16"), ((B, T), "int32"), ((B,), "uint32"),
              ((B, T, 768), "bfloat16")]
    shapes = [jax.ShapeDtypeStruct(*shape, sharding=whole) for shape in shapes]
    compiled = jax.jit(gradient, out_shardings=whole).lower(*shapes).compile()
    print(compiled.memory_analysis().temp_size_in_bytes)
"""


@pytest.mark.parametrize("chip", ["tpu-v5e", "tpu-v6e", "tpu-v7"])
def test_the_step_of_packed_rows_with_dropout_compiles(chip):
    result = plan(SMALL, f"--chip={chip}", "--devices-per-host=8", "--config.batch.rows=64")
    assert result["attention"] == result["token_kernels"] == "pallas_tpu" and result["fits"]
    kernels = {(k["phase"], k["kind"]): k["kernels"] for k in result["kernels"]}
    assert kernels["forward", "attention"] == kernels["backward", "attention"] == 1
    assert {(c["kind"], c["dtype"]) for c in result["collectives"]} == {("all-reduce", "f32")}
    assert 0 < result["mfu"] < 1 and not result["miscounted"]


def test_memory_is_linear_in_the_length_of_rows():
    """Of as many tokens in rows of 1,024 and of 8,192: eight times the scores."""
    ended = subprocess.run(
        [sys.executable, "-c", MEMORY], capture_output=True, text=True, check=False
    )
    assert ended.returncode == 0, ended.stderr[-3000:]
    short, long = map(int, ended.stdout.split())
    assert 0 < long < 1.2 * short
