"""Residual sum, dropout of the branch and LayerNorm in one kernel, forward and backward.

All three are bound by memory, and XLA makes several kernels of them, for a sum over a row ends
before its result is used. Here each row of the residual stream is read once and stays in registers,
or in the on-chip memory of a TPU. The backward computes mean, deviation and dropout mask of the row
again, and sums up the gradients of scale and biases on its way. Bytes and estimated times:
docs/performance.md.

Shapes as in `encoder`.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from esm1nv_jax.model.dropout import dropout_mask
from esm1nv_jax.model.kernels.token_kernel import token_kernel


@dataclasses.dataclass(frozen=True)
class ResidualNorm:
    """What the kernel computes, apart from its arrays."""

    backend: str  # pallas (GPUs) or pallas_tpu
    dtype: Any  # of the normalized stream
    epsilon: float
    centered: bool  # LayerNorm; else RMSNorm
    rate: float  # of dropout
    branch_scale: float

    @property
    def branch_factor(self) -> float:
        return self.branch_scale / (1 - self.rate)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def residual_norm(
    config: ResidualNorm, x_BTD, branch_BTD, branch_bias_D, scale_D, bias_D, row_keys_B
):
    """Returns the residual stream x plus the branch with its bias under dropout, in the dtype of x,
    and the LayerNorm of that sum, as it is returned, by `scale_D` and `bias_D`, in `config.dtype`.

    `row_keys_B` is as of `DropoutKey.rows`; any uint32 where the rate is 0.
    """
    return _forward(config, x_BTD, branch_BTD, branch_bias_D, scale_D, bias_D, row_keys_B)[0]


def _forward(config, x_BTD, branch_BTD, branch_bias_D, scale_D, bias_D, row_keys_B):
    sum_BTD, normalized_BTD = token_kernel(
        config.backend,
        "residual_norm_forward",
        functools.partial(_forward_tokens, config, x_BTD.dtype, x_BTD.shape[-1]),
        row_keys_B,
        (x_BTD, branch_BTD),
        (branch_bias_D, scale_D, bias_D),
        (x_BTD.dtype, config.dtype),
    )
    residuals = (sum_BTD, scale_D, row_keys_B, jnp.zeros((0,), branch_BTD.dtype))
    return (sum_BTD, normalized_BTD), residuals


def _backward(config, residuals, gradients):
    sum_BTD, scale_D, row_keys_B, like_branch = residuals
    dx_BTD, dbranch_BTD, sums = token_kernel(
        config.backend,
        "residual_norm_backward",
        functools.partial(_backward_tokens, config, sum_BTD.shape[-1]),
        row_keys_B,
        (sum_BTD, *gradients),
        (scale_D,),
        (sum_BTD.dtype, like_branch.dtype),
        num_sums=3,
    )
    return dx_BTD, dbranch_BTD, *jnp.sum(sums, axis=(0, 1)), None


residual_norm.defvjp(_forward, _backward)


def _forward_tokens(config, dtype, D, place, x, branch, branch_bias, scale, bias):
    """(sum, normalized) of tokens [*, D or more] in fp32, and nothing to sum up over tokens."""
    x = x + _dropped(config, D, place, (branch + branch_bias) * config.branch_factor)
    x = x.astype(dtype).astype(jnp.float32)  # the backward normalizes what is stored
    return (x, _normalize(config, D, x)[0] * scale + bias), ()


def _backward_tokens(config, D, place, x, dsum, dnormalized, scale):
    """Gradients of x and of the branch, and those of branch bias, scale and bias by each token."""
    normalized, inverse_std = _normalize(config, D, x)
    scaled = dnormalized * scale
    projection = jnp.sum(scaled * normalized, axis=1, keepdims=True) / D
    if config.centered:
        scaled = scaled - jnp.sum(scaled, axis=1, keepdims=True) / D
    dx = dsum + inverse_std * (scaled - normalized * projection)
    dbranch = _dropped(config, D, place, dx * config.branch_factor)
    return (dx, dbranch), (dbranch, dnormalized * normalized, dnormalized)


def _normalize(config, D, x):
    """x less its mean over its deviation, 0 beyond column D; and the inverse of the deviation."""
    if config.centered:
        x = x - jnp.sum(x, axis=1, keepdims=True) / D
        if x.shape[1] > D:
            x = jnp.where(_iota(x.shape, 1) < D, x, 0.0)
    inverse_std = jax.lax.rsqrt(jnp.sum(x * x, axis=1, keepdims=True) / D + config.epsilon)
    return x * inverse_std, inverse_std


def _dropped(config, D, place, x):
    """x with the mask of `dropout.dropout`."""
    if not config.rate:
        return x
    row_key, first = place
    token, column = (_iota(x.shape, axis).astype(jnp.uint32) for axis in (0, 1))
    element = (first.astype(jnp.uint32) + token) * np.uint32(D) + column
    return jnp.where(dropout_mask(row_key, element, config.rate), x, 0.0)


def _iota(shape, axis: int):
    return jax.lax.broadcasted_iota(jnp.int32, shape, axis)
