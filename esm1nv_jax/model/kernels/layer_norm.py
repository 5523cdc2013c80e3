"""LayerNorm and RMSNorm with a backward pass that moves few bytes.

On an accelerator it is bound by memory. Plain autodiff writes every intermediate of the forward for
the backward to read; here the backward reads x and two numbers a token, and computes the rest
again. In two layers at full width, compiled for an A100, this and recomputed GELU and dropout, in
bf16, took the kernels of a step from 752,900 bytes a token to 561,900; sums over columns apart from
those over rows, and no fp32 copies of bf16 gradients, to 507,900 (docs/performance.md).
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from esm1nv_jax.model.kernels import with_gradient


def _backward(epsilon, dtype, centered, residuals, g):
    x, mean, inverse_std, scale = residuals
    normalized = (x.astype(jnp.float32) - mean) * inverse_std
    scaled_g = g.astype(jnp.float32) * scale
    projection = jnp.mean(scaled_g * normalized, axis=-1, keepdims=True)
    if centered:
        scaled_g = scaled_g - jnp.mean(scaled_g, axis=-1, keepdims=True)
    dx = inverse_std * (scaled_g - normalized * projection)
    batch_axes = tuple(range(x.ndim - 1))
    # Apart from dx, or XLA writes g * normalized to memory between the sums over rows and columns.
    x, g, mean, inverse_std = jax.lax.optimization_barrier((x, g, mean, inverse_std))
    normalized = (x.astype(jnp.float32) - mean) * inverse_std
    g = g.astype(jnp.float32)
    dscale, dbias = jnp.sum(g * normalized, axis=batch_axes), jnp.sum(g, axis=batch_axes)
    return dx.astype(x.dtype), dscale, dbias


@with_gradient("layer_norm", _backward, nondiff_argnums=(3, 4, 5))
def layer_norm(x, scale, bias, epsilon: float, dtype, centered: bool):
    """LayerNorm over the last axis of x, computed in fp32 and returned in `dtype`; where it is not
    `centered`, RMSNorm (Zhang & Sennrich 2019), which subtracts no mean."""
    x32 = x.astype(jnp.float32)
    mean = jnp.mean(x32, axis=-1, keepdims=True) if centered else jnp.zeros((), jnp.float32)
    x32 = x32 - mean
    inverse_std = jax.lax.rsqrt(jnp.mean(jnp.square(x32), axis=-1, keepdims=True) + epsilon)
    y = (x32 * inverse_std * scale + bias).astype(dtype)
    return y, (x, mean, inverse_std, scale)
