"""Residual sum, dropout of the branch and LayerNorm in one kernel, forward and backward.

All three are bound by memory, and XLA makes several kernels of them, for a sum over a row ends
before its result is used. Here each row of the residual stream is read once and stays in registers,
or in the on-chip memory of a TPU. The backward computes mean, deviation and dropout mask of the row
again, and sums up the gradients of scale and biases on its way. By Pallas, which lowers to Triton
on GPUs and to Mosaic on TPUs. Bytes and estimated times: docs/performance.md.

Shapes as in `encoder`.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jax.experimental.pallas import triton

from esm1nv_jax.model.dropout import dropout_mask

_GPU_TOKENS = (8, 64)  # that a program of the forward, and of the backward, takes in turn
_TPU_TOKENS = 128  # of a block
_TPU_MEMORY = 48 * 2**20  # on-chip, that a kernel may take; a v7 has 64 MiB


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
    and the LayerNorm of that sum by `scale_D` and `bias_D`, in `config.dtype`.

    `row_keys_B` is as of `DropoutKey.rows`; any uint32 where the rate is 0.
    """
    return _forward(config, x_BTD, branch_BTD, branch_bias_D, scale_D, bias_D, row_keys_B)[0]


def _forward(config, x_BTD, branch_BTD, branch_bias_D, scale_D, bias_D, row_keys_B):
    arrays, vectors = (x_BTD, branch_BTD), (branch_bias_D, scale_D, bias_D)
    call = _on_gpu if config.backend == "pallas" else _on_tpu
    dtypes = (x_BTD.dtype, config.dtype)
    sum_BTD, normalized_BTD = call(config, _forward_tokens, row_keys_B, arrays, vectors, dtypes)
    residuals = (sum_BTD, scale_D, row_keys_B, jnp.zeros((0,), branch_BTD.dtype))
    return (sum_BTD, normalized_BTD), residuals


def _backward(config, residuals, gradients):
    sum_BTD, scale_D, row_keys_B, like_branch = residuals
    arrays, dtypes = (sum_BTD, *gradients), (sum_BTD.dtype, like_branch.dtype)
    call = _on_gpu if config.backend == "pallas" else _on_tpu
    dx_BTD, dbranch_BTD, sums = call(
        config, _backward_tokens, row_keys_B, arrays, (scale_D,), dtypes
    )
    return dx_BTD, dbranch_BTD, *jnp.sum(sums, axis=(0, 1)), None


residual_norm.defvjp(_forward, _backward)


def _forward_tokens(config, D, dropped, x, branch, branch_bias, scale, bias):
    """(sum, normalized) of tokens [*, D or more] in fp32, and nothing to sum up over tokens."""
    x = x + dropped((branch + branch_bias) * config.branch_factor)
    return (x, _normalize(config, D, x)[0] * scale + bias), ()


def _backward_tokens(config, D, dropped, x, dsum, dnormalized, scale):
    """Gradients of x and of the branch, and those of branch bias, scale and bias by each token."""
    normalized, inverse_std = _normalize(config, D, x)
    scaled = dnormalized * scale
    projection = jnp.sum(scaled * normalized, axis=1, keepdims=True) / D
    if config.centered:
        scaled = scaled - jnp.sum(scaled, axis=1, keepdims=True) / D
    dx = dsum + inverse_std * (scaled - normalized * projection)
    dbranch = dropped(dx * config.branch_factor)
    return (dx, dbranch), (dbranch, dnormalized * normalized, dnormalized)


def _normalize(config, D, x):
    """x less its mean over its deviation, 0 beyond column D; and the inverse of the deviation."""
    if config.centered:
        x = x - jnp.sum(x, axis=1, keepdims=True) / D
        if x.shape[1] > D:
            x = jnp.where(_iota(x.shape, 1) < D, x, 0.0)
    inverse_std = jax.lax.rsqrt(jnp.sum(x * x, axis=1, keepdims=True) / D + config.epsilon)
    return x * inverse_std, inverse_std


def _dropped(config, D, row_key, first, x):
    """x of tokens from `first` on, with the mask of `dropout.dropout`."""
    if not config.rate:
        return x
    token, column = (_iota(x.shape, axis).astype(jnp.uint32) for axis in (0, 1))
    element = (first.astype(jnp.uint32) + token) * np.uint32(D) + column
    return jnp.where(dropout_mask(row_key, element, config.rate), x, 0.0)


def _iota(shape, axis: int):
    return jax.lax.broadcasted_iota(jnp.int32, shape, axis)


def _name(tokens) -> str:
    """By which `planning` recognises the kernel."""
    return f"residual_norm{tokens.__name__.removesuffix('_tokens')}"


def _on_gpu(config, compute, row_keys_B, arrays_BTD, vectors_D, dtypes):
    """Two arrays [B, T, D] by `compute`, and its sums over some tokens each, [B, parts, 3, D]."""
    B, T, D = arrays_BTD[0].shape
    is_backward = compute is _backward_tokens
    tokens = _GPU_TOKENS[is_backward]
    parts = -(-T // tokens)
    of_row = pl.BlockSpec((None, T, D), lambda i, b: (b, 0, 0))
    out_specs, shapes = [of_row] * 2, [jax.ShapeDtypeStruct((B, T, D), dtype) for dtype in dtypes]
    if is_backward:
        out_specs.append(pl.BlockSpec((None, None, 3, D), lambda i, b: (b, i, 0, 0)))
        shapes.append(jax.ShapeDtypeStruct((B, parts, 3, D), jnp.float32))
    return pl.pallas_call(
        functools.partial(_gpu_kernel, config, compute, tokens, len(arrays_BTD), len(vectors_D)),
        grid=(parts, B),
        in_specs=[
            pl.BlockSpec((None,), lambda i, b: (b,)),
            *[of_row] * len(arrays_BTD),
            *[pl.BlockSpec((D,), lambda i, b: (0,))] * len(vectors_D),
        ],
        out_specs=out_specs,
        out_shape=shapes,
        name=_name(compute),
        compiler_params=triton.CompilerParams(num_warps=4, num_stages=1),
    )(row_keys_B, *arrays_BTD, *vectors_D)


def _gpu_kernel(config, compute, tokens, num_arrays, num_vectors, key_ref, *refs):
    """Some tokens of a row, one after another; Triton wants a power of two of columns."""
    arrays, refs = refs[:num_arrays], refs[num_arrays:]
    vectors, outputs, sums_ref = refs[:num_vectors], refs[num_vectors:][:2], refs[num_vectors + 2 :]
    T, D = arrays[0].shape
    columns = jnp.arange(pl.next_power_of_2(D))  # a slice beyond the end would be refused
    is_column, shape = columns < D, (1, columns.size)
    row_key, first = key_ref[...], pl.program_id(0) * tokens

    def load(ref, *at, mask):
        return triton.load(ref.at[*at, columns], mask=mask, other=0.0).astype(jnp.float32)[None]

    of_all_tokens = [load(ref, mask=is_column) for ref in vectors]

    def visit(i, sums):
        token = first + i
        mask = is_column & (token < T)
        values = [load(ref, token, mask=mask) for ref in arrays]
        dropped = functools.partial(_dropped, config, D, row_key, token)
        results, terms = compute(config, D, dropped, *values, *of_all_tokens)
        for ref, result in zip(outputs, results, strict=True):
            triton.store(ref.at[token, columns], result[0].astype(ref.dtype), mask=mask)
        return tuple(total + term for total, term in zip(sums, terms, strict=True))

    zero = jnp.zeros(shape, jnp.float32)
    sums = jax.lax.fori_loop(0, tokens, visit, (zero,) * (3 * len(sums_ref)))
    for k, total in enumerate(sums):
        triton.store(sums_ref[0].at[k, columns], total[0], mask=is_column)


def _on_tpu(config, compute, row_keys_B, arrays_BTD, vectors_D, dtypes):
    """As `_on_gpu`, with one part: the blocks of a row follow each other on one core."""
    B, T, D = arrays_BTD[0].shape
    tokens = min(_TPU_TOKENS, T)
    of_block = pl.BlockSpec((None, tokens, D), lambda b, i, _: (b, i, 0))
    out_specs, shapes = [of_block] * 2, [jax.ShapeDtypeStruct((B, T, D), dtype) for dtype in dtypes]
    if compute is _backward_tokens:
        out_specs.append(pl.BlockSpec((None, None, 3, D), lambda b, i, _: (b, 0, 0, 0)))
        shapes.append(jax.ShapeDtypeStruct((B, 1, 3, D), jnp.float32))
    return pl.pallas_call(
        functools.partial(_tpu_kernel, config, compute, T, len(arrays_BTD), len(vectors_D)),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(B, -(-T // tokens)),
            in_specs=[
                *[of_block] * len(arrays_BTD),
                *[pl.BlockSpec((1, D), lambda b, i, _: (0, 0))] * len(vectors_D),
            ],
            out_specs=out_specs,
        ),
        out_shape=shapes,
        name=_name(compute),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary"), vmem_limit_bytes=_TPU_MEMORY
        ),
    )(
        jax.lax.bitcast_convert_type(row_keys_B, jnp.int32),
        *arrays_BTD,
        *(vector[None] for vector in vectors_D),
    )


def _tpu_kernel(config, compute, T, num_arrays, num_vectors, keys_ref, *refs):
    """A block of tokens of a row."""
    arrays, refs = refs[:num_arrays], refs[num_arrays:]
    vectors, outputs, sums_ref = refs[:num_vectors], refs[num_vectors:][:2], refs[num_vectors + 2 :]
    tokens, D = arrays[0].shape
    b, i = pl.program_id(0), pl.program_id(1)
    values = [ref[...].astype(jnp.float32) for ref in arrays]
    if T % tokens:  # beyond the end of a row is anything
        is_token = i * tokens + _iota((tokens, D), 0) < T
        values = [jnp.where(is_token, value, 0.0) for value in values]
    row_key = keys_ref[b].astype(jnp.uint32)
    dropped = functools.partial(_dropped, config, D, row_key, i * tokens)
    results, terms = compute(config, D, dropped, *values, *(ref[...] for ref in vectors))
    for ref, result in zip(outputs, results, strict=True):
        ref[...] = result.astype(ref.dtype)
    for (ref,) in [sums_ref] if terms else []:

        @pl.when(i == 0)
        def _(ref=ref):
            ref[...] = jnp.zeros(ref.shape, jnp.float32)

        for k, term in enumerate(terms):
            ref[k : k + 1, :] += jnp.sum(term, axis=0, keepdims=True)
