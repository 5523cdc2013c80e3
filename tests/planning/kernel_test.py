"""What a probability costs in flash attention, counted in the PTX that is compiled for an A100."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from esm1nv_jax.model.kernels.flash_gpu import Blocks
from esm1nv_jax.planning.roofline import DROPOUT_OPERATIONS, SOFTMAX_OPERATIONS

COMPILE = """
import jax, jax.numpy as jnp, numpy as np
from esm1nv_jax.model.kernels.flash_gpu import flash_attention
from esm1nv_jax.planning import chips
mesh = jax.sharding.Mesh(np.asarray(chips.devices(chips.CHIPS["a100-80gb"], 1, 1)), "x")
whole = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
def both(qkv, ids, keys, g):
    out, pull = jax.vjp(lambda qkv: flash_attention(qkv, ids, {rate}, keys), qkv)
    return out, pull(g)
shapes = [((4, 1152, 3, 12, 64), "bfloat16"), ((4, 1152), "int32"), ((4,), "uint32"),
          ((4, 1152, 12, 64), "bfloat16")]
shapes = [jax.ShapeDtypeStruct(*shape, sharding=whole) for shape in shapes]
jax.jit(both, in_shardings=whole, out_shardings=whole).lower(*shapes).compile()
"""
NO_WORK = ("mma", "ldmatrix", "mov", "cp", "ld", "bar", "bra")  # products, and what feeds them


def loops(ptx: str) -> list[int]:
    """Instructions of each loop, apart from products and moves."""
    lines = ptx.splitlines()
    at = {line[1:-1]: i for i, line in enumerate(lines) if re.match(r"\$\w+:$", line)}
    found = []
    for i, line in enumerate(lines):
        back = re.search(r"bra(?:\.uni)?\s+\$(\w+);", line)
        if back and at.get(back[1], i) < i:
            names = re.findall(r"^\s+(?:@\S+ )?([a-z]\w*)", "\n".join(lines[at[back[1]] : i]), re.M)
            found.append(sum(name not in NO_WORK for name in names))
    return found


@pytest.mark.aot
@pytest.mark.parametrize("rate, stated", [(0.1, DROPOUT_OPERATIONS), (0.0, 0)])
def test_a_probability_takes_the_operations_of_the_estimate(tmp_path, rate, stated):
    ended = subprocess.run(
        [sys.executable, "-c", COMPILE.format(rate=rate)],
        capture_output=True,
        text=True,
        env=os.environ
        | {
            "JAX_PLATFORMS": "cpu",
            "XLA_FLAGS": f"--xla_dump_to={tmp_path}",
            "PYTHONPATH": str(Path(__file__).parents[2]),
        },
        check=False,
    )
    assert ended.returncode == 0, ended.stderr[-3000:]
    texts = [path.read_text() for path in tmp_path.glob("*.ptx")]
    blocks, threads = Blocks(), 32 * Blocks().warps
    forward, backward = blocks.queries * blocks.keys, blocks.backward**2
    for name, tile, times in (("flash_forward", forward, 1), ("flash_backward", backward, 2)):
        (ptx,) = (text for text in texts if f".entry {name}" in text)
        counted = sum(loops(ptx)) * threads / tile / times
        assert counted == pytest.approx(SOFTMAX_OPERATIONS + stated, rel=0.1)
