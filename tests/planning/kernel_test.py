"""Instructions of an element in our kernels, counted in the PTX that is compiled for an A100."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from esm1nv_jax.model.kernels.flash_gpu import Blocks
from esm1nv_jax.planning.hlo import TOKEN_KERNEL_OPERATIONS
from esm1nv_jax.planning.roofline import DROPOUT_OPERATIONS, SOFTMAX_OPERATIONS

FLASH = """
from esm1nv_jax.model.kernels.flash_gpu import flash_attention
def both(qkv, ids, keys, g):
    out, pull = jax.vjp(lambda qkv: flash_attention(qkv, ids, {rate}, keys), qkv)
    return out, pull(g)
shapes = [((4, 1152, 3, 12, 64), "bfloat16"), ((4, 1152), "int32"), ((4,), "uint32"),
          ((4, 1152, 12, 64), "bfloat16")]
"""
TOKEN_KERNELS = """
from esm1nv_jax.model.kernels.gelu import gelu_of_biased
from esm1nv_jax.model.kernels.residual_norm import ResidualNorm, residual_norm
config = ResidualNorm("pallas", jnp.bfloat16, 1e-5, True, 0.1, 1.0)
def both(x, branch, *others):
    *vectors, keys, dsum, dnormed = others
    out, pull = jax.vjp(lambda *arrays: residual_norm(config, *arrays, keys), x, branch, *vectors)
    gelu = lambda *arrays: gelu_of_biased("pallas", *arrays)
    return out, pull((dsum, dnormed)), jax.vjp(gelu, branch, vectors[0])[1](dnormed)
x, branch = [((4, 1152, 768), dtype) for dtype in ("float32", "bfloat16")]
shapes = [x, branch, *[((768,), "float32")] * 3, ((4,), "uint32"), x, branch]
"""
COMPILE = """
import jax, jax.numpy as jnp, numpy as np
from esm1nv_jax.planning import chips
mesh = jax.sharding.Mesh(np.asarray(chips.devices(chips.CHIPS["a100-80gb"], 1, 1)), "x")
whole = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
%s
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


def operations(folder: Path, function: str, *names: str) -> list[int]:
    """Of a thread, in the loops of the kernels that `both` of `function` calls."""
    ended = subprocess.run(
        [sys.executable, "-c", COMPILE % function],
        capture_output=True,
        text=True,
        env=os.environ
        | {
            "JAX_PLATFORMS": "cpu",
            "XLA_FLAGS": f"--xla_dump_to={folder}",
            "PYTHONPATH": str(Path(__file__).parents[2]),
        },
        check=False,
    )
    assert ended.returncode == 0, ended.stderr[-3000:]
    texts = [path.read_text() for path in folder.glob("*.ptx")]
    found = []
    for name in names:
        (ptx,) = (text for text in texts if f".entry {name}" in text)
        found.append(sum(loops(ptx)))
    return found


@pytest.mark.aot
@pytest.mark.parametrize("rate, stated", [(0.1, DROPOUT_OPERATIONS), (0.0, 0)])
def test_a_probability_takes_the_operations_of_the_estimate(tmp_path, rate, stated):
    blocks, threads = Blocks(), 32 * Blocks().warps
    forward, backward = blocks.queries * blocks.keys, blocks.backward**2
    found = operations(tmp_path, FLASH.format(rate=rate), "flash_forward", "flash_backward")
    for counted, tile, times in zip(found, (forward, backward), (1, 2), strict=True):
        counted *= threads / tile / times
        assert counted == pytest.approx(SOFTMAX_OPERATIONS + stated, rel=0.1)


@pytest.mark.aot
def test_an_element_of_a_token_takes_the_operations_of_the_estimate(tmp_path):
    counts = operations(tmp_path, TOKEN_KERNELS, *TOKEN_KERNEL_OPERATIONS)
    found = {
        # Of 1,024 columns 768 are used; the width of an FFN is mostly a multiple of 1,024.
        name: count * 128 / (1024 if name == "gelu_backward" else 768)
        for name, count in zip(TOKEN_KERNEL_OPERATIONS, counts, strict=True)
    }
    assert found == pytest.approx(TOKEN_KERNEL_OPERATIONS, rel=0.1)
