"""One Pallas kernel of a function of tokens: it reads and writes each of them once.

Through Triton on GPUs, through Mosaic on TPUs. What the function is to sum up over all tokens, such
as the gradient of a bias, is summed up on the way.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jax.experimental.pallas import triton

_GPU_TOKENS, _GPU_SUMMED_TOKENS = 8, 64  # that a program takes in turn, without and with sums
_GPU_COLUMNS = 1024  # of a program, where it need not have all of them
_TPU_TOKENS = 128  # of a block
_TPU_MEMORY = 48 * 2**20  # on-chip, that a kernel may take; a v7 has 64 MiB


def token_kernel(
    backend: str,
    name: str,
    compute: Callable,
    row_keys_B,
    arrays_BTD: Sequence,
    vectors_D: Sequence,
    dtypes: Sequence,
    num_sums: int = 0,
    split_columns: bool = False,
):
    """The results [B, T, D] of `compute` in `dtypes`, and where it has sums over tokens, these.

    Args:
      backend: pallas (GPUs) or pallas_tpu.
      name: by which `planning` recognises the kernel.
      compute: called as `compute(place, *arrays, *vectors)` with fp32 [tokens, columns] and
        [1, columns]. It returns two tuples: results, and terms of the sums. `place` is the key of
        the row and the number of the first token in it. A GPU fills columns up to a power of two
        with zeros, which make terms of zero.
      row_keys_B: uint32.
      split_columns: whether `compute` may be given a part of the columns.

    Returns:
      A list of the results; then fp32 [B, parts, num_sums, D], to be summed over both first axes.
    """
    B, T, D = arrays_BTD[0].shape
    shapes = [jax.ShapeDtypeStruct((B, T, D), dtype) for dtype in dtypes]
    counts = len(arrays_BTD), len(vectors_D), len(dtypes)
    if backend == "pallas_tpu":
        tokens = min(_TPU_TOKENS, T)
        # The blocks of a row follow each other on one core, and add to one sum.
        shapes += [jax.ShapeDtypeStruct((B, 1, num_sums, D), jnp.float32)] * bool(num_sums)
        block = pl.BlockSpec((None, tokens, D), lambda b, i, _: (b, i, 0))
        vector = pl.BlockSpec((1, D), lambda b, i, _: (0, 0))
        sums = pl.BlockSpec((None, None, num_sums, D), lambda b, i, _: (b, 0, 0, 0))
        return pl.pallas_call(
            functools.partial(_tpu_kernel, compute, counts, T),
            grid_spec=pltpu.PrefetchScalarGridSpec(
                num_scalar_prefetch=1,
                grid=(B, -(-T // tokens)),
                in_specs=[block] * counts[0] + [vector] * counts[1],
                out_specs=[block] * counts[2] + [sums] * bool(num_sums),
            ),
            out_shape=shapes,
            name=name,
            compiler_params=pltpu.CompilerParams(
                dimension_semantics=("parallel", "arbitrary"), vmem_limit_bytes=_TPU_MEMORY
            ),
        )(
            jax.lax.bitcast_convert_type(row_keys_B, jnp.int32),
            *arrays_BTD,
            *(vector[None] for vector in vectors_D),
        )
    tokens = _GPU_SUMMED_TOKENS if num_sums else _GPU_TOKENS
    parts, columns = -(-T // tokens), pl.next_power_of_2(D)
    columns = min(columns, _GPU_COLUMNS) if split_columns else columns
    shapes += [jax.ShapeDtypeStruct((B, parts, num_sums, D), jnp.float32)] * bool(num_sums)
    row = pl.BlockSpec((None, T, D), lambda i, c, b: (b, 0, 0))
    vector = pl.BlockSpec((D,), lambda i, c, b: (0,))
    sums = pl.BlockSpec((None, None, num_sums, D), lambda i, c, b: (b, i, 0, 0))
    return pl.pallas_call(
        functools.partial(_gpu_kernel, compute, counts, tokens, columns),
        grid=(parts, -(-D // columns), B),
        in_specs=[
            pl.BlockSpec((None,), lambda i, c, b: (b,)),
            *[row] * counts[0],
            *[vector] * counts[1],
        ],
        out_specs=[row] * counts[2] + [sums] * bool(num_sums),
        out_shape=shapes,
        name=name,
        compiler_params=triton.CompilerParams(num_warps=4, num_stages=1),
    )(row_keys_B, *arrays_BTD, *vectors_D)


def _split(refs, counts):
    """Refs of arrays, vectors, results, and the rest."""
    first, second, third = counts[0], counts[0] + counts[1], sum(counts)
    return refs[:first], refs[first:second], refs[second:third], refs[third:]


def _gpu_kernel(compute, counts, tokens, columns, key_ref, *refs):
    """Some tokens of a row, one after another."""
    arrays, vectors, outputs, sums_ref = _split(refs, counts)
    T, D = arrays[0].shape
    # By numbers: a slice beyond the end would be refused.
    at_columns = pl.program_id(1) * columns + jnp.arange(columns)
    is_column, first, row_key = at_columns < D, pl.program_id(0) * tokens, key_ref[...]

    def load(ref, *at, mask):
        values = triton.load(ref.at[*at, at_columns], mask=mask, other=0.0)
        return values.astype(jnp.float32)[None]

    of_all_tokens = [load(ref, mask=is_column) for ref in vectors]

    def visit(i, sums):
        token = first + i
        mask = is_column & (token < T)
        values = [load(ref, token, mask=mask) for ref in arrays]
        results, terms = compute((row_key, token), *values, *of_all_tokens)
        for ref, result in zip(outputs, results, strict=True):
            triton.store(ref.at[token, at_columns], result[0].astype(ref.dtype), mask=mask)
        return tuple(total + term for total, term in zip(sums, terms, strict=True))

    num_sums = sums_ref[0].shape[0] if sums_ref else 0
    zeros = (jnp.zeros((1, columns), jnp.float32),) * num_sums
    for k, total in enumerate(jax.lax.fori_loop(0, tokens, visit, zeros)):
        triton.store(sums_ref[0].at[k, at_columns], total[0], mask=is_column)


def _tpu_kernel(compute, counts, T, keys_ref, *refs):
    """A block of tokens of a row."""
    arrays, vectors, outputs, sums_ref = _split(refs, counts)
    tokens, D = arrays[0].shape
    b, i = pl.program_id(0), pl.program_id(1)
    values = [ref[...].astype(jnp.float32) for ref in arrays]
    if T % tokens:  # beyond the end of a row is anything
        is_token = i * tokens + jax.lax.broadcasted_iota(jnp.int32, (tokens, D), 0) < T
        values = [jnp.where(is_token, value, 0.0) for value in values]
    place = keys_ref[b].astype(jnp.uint32), i * tokens
    results, terms = compute(place, *values, *(ref[...] for ref in vectors))
    for ref, result in zip(outputs, results, strict=True):
        ref[...] = result.astype(ref.dtype)
    for (ref,) in [sums_ref] if sums_ref else []:

        @pl.when(i == 0)
        def _(ref=ref):
            ref[...] = jnp.zeros(ref.shape, jnp.float32)

        for k, term in enumerate(terms):
            ref[k : k + 1, :] += jnp.sum(term, axis=0, keepdims=True)
