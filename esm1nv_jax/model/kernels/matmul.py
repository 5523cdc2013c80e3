"""The matrix product of a dense layer, with fp32 results in all three directions.

Written out as a `custom_vjp` because plain autodiff would round where it hurts: with bf16 operands
JAX's own transpose gives the gradient of a bf16 kernel in bf16, and gradients would then be reduced
across devices in bf16 whatever the config says.
"""

from __future__ import annotations

import functools
from pathlib import Path

import jax
import jax.numpy as jnp

# In the place of a dtype: operands rounded to bf16 but multiplied as fp32, which has the same
# products. A CPU without instructions for bf16 is faster so.
ROUNDED = "bfloat16 by float32"


@functools.cache
def multiplies_bf16(platform: str) -> bool:
    """Whether a device of this platform has instructions for products of bf16."""
    if platform != "cpu":
        return True
    try:
        said = Path("/proc/cpuinfo").read_text()
    except OSError:  # not Linux
        return False
    return any(word in said.split() for word in ("avx512_bf16", "amx_bf16", "bf16"))


def operand(x, dtype):
    """x as a product takes it: of `dtype`, or rounded where that is ROUNDED."""
    if dtype == ROUNDED:
        rounded = x.dtype == jnp.bfloat16
        return x.astype(jnp.float32) if rounded else jax.lax.reduce_precision(x, 8, 7)
    return x.astype(dtype)


def precision(dtype) -> jax.lax.Precision:
    """fp32 means fp32: without HIGHEST an A100 would use TF32 and a TPU bf16."""
    exact = dtype in (ROUNDED, jnp.float32)
    return jax.lax.Precision.HIGHEST if exact else jax.lax.Precision.DEFAULT


def laid_out(x):
    """x, on a CPU laid out in memory in the order of its axes; elsewhere as the compiler likes it.

    XLA's CPU backend folds a transpose into the product that reads or makes it. Its library takes
    neither operand nor result transposed, and the product is then two to five times slower, in bf16
    as in fp32. It does not fold what has been flat in between.
    """

    def flat(x):
        return jax.lax.optimization_barrier(x.reshape(-1)).reshape(x.shape)

    return jax.lax.platform_dependent(x, cpu=flat, default=lambda x: x)


def turned(x):
    """x with its last two axes swapped, before and after `laid_out`."""
    return laid_out(jnp.swapaxes(laid_out(x), -1, -2))


def _dot(a, b, a_axes: tuple[int, ...], b_axes: tuple[int, ...], dtype):
    """Sums over `a_axes` of a and `b_axes` of b; the axes that stay follow in order."""
    return jax.lax.dot_general(
        operand(a, dtype),
        operand(b, dtype),
        ((a_axes, b_axes), ((), ())),
        precision=precision(dtype),
        preferred_element_type=jnp.float32,
    )


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def product(x, w, dtype, transposed: bool = False):
    """x [..., K] times w [K, N], or w [N, K] where `transposed`: fp32 [..., N].

    Operands are rounded to `dtype`, sums and both gradients are fp32. The transpose is an argument
    since folding one into the product is what XLA's CPU backend cannot do in bf16.
    """
    return _forward(x, w, dtype, transposed)[0]


def _forward(x, w, dtype, transposed):
    # The backward needs x only as an operand: keep the rounded copy, not the fp32 one.
    kept = operand(x, dtype)
    y = _dot(kept, w, (x.ndim - 1,), (1 if transposed else 0,), dtype)
    return y, (kept, w, jnp.zeros((0,), x.dtype))


def _backward(dtype, transposed, residuals, g):
    x, w, like_x = residuals
    leading = tuple(range(x.ndim - 1))
    dx = _dot(g, w, (g.ndim - 1,), (0 if transposed else 1,), dtype)
    dw = _summed(g, x, leading, dtype) if transposed else _weight_gradient(x, g, leading, dtype)
    return dx.astype(like_x.dtype), dw.astype(w.dtype)


def _weight_gradient(x, g, leading, dtype):
    """x.T g, the sum over all `leading` axes."""

    def on_cpu(x, g):
        # XLA's CPU backend copies the first operand, transposed: the narrower one is cheaper.
        wide = x.shape[-1] > g.shape[-1]
        return turned(_summed(g, x, leading, dtype)) if wide else _summed(x, g, leading, dtype)

    return jax.lax.platform_dependent(
        x, g, cpu=on_cpu, default=lambda x, g: _summed(x, g, leading, dtype)
    )


def _summed(a, b, leading, dtype):
    return _dot(a, b, leading, leading, dtype)


product.defvjp(_forward, _backward)
