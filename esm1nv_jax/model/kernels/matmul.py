"""The matrix product of a linear layer, with fp32 results in all three directions.

Its gradients are written out because plain autodiff would round where it hurts: with bf16 operands
JAX's own transpose returns the gradient of a bf16 kernel in bf16, and gradients would then be
reduced across devices in bf16 whatever the config says.

The layouts are for XLA's CPU backend: with queries, keys, values and their gradients in row-major
order, a step of a small model took 1.02 CPU-seconds instead of 1.40 in bf16, 1.66 instead of 1.91
in fp32 (docs/performance.md).
"""

from __future__ import annotations

import functools
from pathlib import Path

import jax
import jax.numpy as jnp

from esm1nv_jax.model.kernels import is_plain, with_gradient

# In the place of a dtype: operands rounded to bf16 but multiplied as fp32, which has the same
# products. It is faster on a CPU without instructions for bf16.
EMULATED_BFLOAT16 = "bfloat16 emulated in float32"


@functools.cache
def cpu_features() -> frozenset[str]:
    """What the CPU can do, in the words of Linux; nothing where there is no Linux."""
    try:
        return frozenset(Path("/proc/cpuinfo").read_text(encoding="utf-8").split())
    except OSError:
        return frozenset()


def multiplies_bf16(platform: str) -> bool:
    """Whether devices of this platform have instructions for products of bf16."""
    return platform != "cpu" or not {"avx512_bf16", "amx_bf16", "bf16"}.isdisjoint(cpu_features())


def cast_operand(x, dtype):
    """x as an operand: of `dtype`, or fp32 rounded to bf16 where that is EMULATED_BFLOAT16."""
    if dtype == EMULATED_BFLOAT16:
        is_rounded = x.dtype == jnp.bfloat16
        return x.astype(jnp.float32) if is_rounded else jax.lax.reduce_precision(x, 8, 7)
    return x.astype(dtype)


def precision(dtype) -> jax.lax.Precision:
    """fp32 means fp32: without HIGHEST an A100 would use TF32 and a TPU bf16."""
    exact = dtype in (EMULATED_BFLOAT16, jnp.float32)
    return jax.lax.Precision.HIGHEST if exact else jax.lax.Precision.DEFAULT


def force_row_major(x):
    """x, on a CPU laid out in memory in the order of its axes; elsewhere as the compiler likes it.

    XLA's CPU backend folds a transpose into the product that reads or makes it. Its library takes
    neither operand nor result transposed, and the product is then two to five times slower, in bf16
    as in fp32. It does not fold what has been flat in between.
    """
    if is_plain("matmul"):
        return x

    def through_flat(x):
        return jax.lax.optimization_barrier(x.reshape(-1)).reshape(x.shape)

    return jax.lax.platform_dependent(x, cpu=through_flat, default=lambda x: x)


def transpose_materialized(x):
    """x with its last two axes swapped, row-major before and after."""
    return force_row_major(jnp.swapaxes(force_row_major(x), -1, -2))


def _dot(a, b, a_axes: tuple[int, ...], b_axes: tuple[int, ...], dtype):
    """Sums over `a_axes` of a and `b_axes` of b; the other axes follow in order."""
    return jax.lax.dot_general(
        cast_operand(a, dtype),
        cast_operand(b, dtype),
        ((a_axes, b_axes), ((), ())),
        precision=precision(dtype),
        preferred_element_type=jnp.float32,
    )


def _backward(dtype, transposed, residuals, g):
    x, w, like_x = residuals
    batch_axes = tuple(range(x.ndim - 1))
    dx = _dot(g, w, (g.ndim - 1,), (0 if transposed else 1,), dtype)
    if transposed:
        dw = _dot(g, x, batch_axes, batch_axes, dtype)
    else:
        dw = _kernel_gradient(x, g, batch_axes, dtype)
    return dx.astype(like_x.dtype), dw.astype(w.dtype)


def _kernel_gradient(x, g, batch_axes, dtype):
    """x.T g [K, N], the sum over `batch_axes`."""

    def product(x, g):
        return _dot(x, g, batch_axes, batch_axes, dtype)

    def on_cpu(x, g):
        # XLA's CPU backend writes the first operand transposed: the narrower one is cheaper.
        wide = x.shape[-1] > g.shape[-1]
        return transpose_materialized(product(g, x)) if wide else product(x, g)

    return jax.lax.platform_dependent(x, g, cpu=on_cpu, default=product)


@with_gradient("matmul", _backward, nondiff_argnums=(2, 3))
def matmul(x, w, dtype, transposed):
    """x [..., K] times w [K, N], or w [N, K] where `transposed`: fp32 [..., N].

    Operands are cast to `dtype` (`cast_operand`); sums and both gradients are fp32. The transpose
    is an argument since folding one into the product is what XLA's CPU backend cannot do in bf16.
    """
    # The backward needs x only as an operand: keep the rounded copy, not the fp32 one.
    operand = cast_operand(x, dtype)
    y = _dot(operand, w, (x.ndim - 1,), (1 if transposed else 0,), dtype)
    return y, (operand, w, jnp.zeros((0,), x.dtype))
