"""The matrix product of a dense layer, with fp32 results in all three directions.

Written out as a `custom_vjp` because plain autodiff would round where it hurts: with bf16 operands
JAX's own transpose gives the gradient of a bf16 kernel in bf16, and gradients would then be reduced
across devices in bf16 whatever the config says.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp


def precision(dtype) -> jax.lax.Precision:
    """fp32 means fp32: without HIGHEST an A100 would use TF32 and a TPU bf16."""
    return jax.lax.Precision.HIGHEST if dtype == jnp.float32 else jax.lax.Precision.DEFAULT


def _dot(a, b, a_axes: tuple[int, ...], b_axes: tuple[int, ...], dtype):
    """Sums over `a_axes` of a and `b_axes` of b; the axes that stay follow in order."""
    return jax.lax.dot_general(
        a.astype(dtype),
        b.astype(dtype),
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
    kept = x.astype(dtype)
    y = _dot(kept, w, (x.ndim - 1,), (1 if transposed else 0,), dtype)
    return y, (kept, w, jnp.zeros((0,), x.dtype))


def _backward(dtype, transposed, residuals, g):
    x, w, like_x = residuals
    leading = tuple(range(x.ndim - 1))
    dx = _dot(g, w, (g.ndim - 1,), (0 if transposed else 1,), dtype)
    first, second = (g, x) if transposed else (x, g)
    dw = _dot(first, second, leading, leading, dtype)
    return dx.astype(like_x.dtype), dw.astype(w.dtype)


product.defvjp(_forward, _backward)
