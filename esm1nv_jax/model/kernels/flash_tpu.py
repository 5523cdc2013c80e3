"""Flash attention on packed rows for TPUs, with dropout drawn inside the kernel.

A Pallas kernel that lowers to Mosaic, after Dao, "FlashAttention-2", 2023; JAX's own kernels for
TPUs have no dropout. As in `flash_gpu`, q, k and v are read where the one QKV product wrote them,
and blocks that share no segment are not visited. Otherwise it follows the chip:

- A block is 128 lanes wide, so it holds 128 / H heads. Products of one head have the lanes of the
  others zeroed in one operand; matrix units of 128 or more columns take no longer for that.
- Scores are transposed, keys x queries: maxima and sums over keys are then of whole registers, and
  what belongs to a query is a row.
- The blocks of a row follow each other on one core, so the backward computes probabilities once and
  adds dQ up in on-chip memory, in an order that does not change.

`compute.attention=xla` turns it off. Shapes as in `encoder`.
"""

from __future__ import annotations

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from esm1nv_jax.model.dropout import attention_hashes, attention_rate, kept_attention
from esm1nv_jax.model.kernels.flash_gpu import padded_head_size, visited_blocks
from esm1nv_jax.model.kernels.matmul import precision
from esm1nv_jax.model.kernels.remat import FUSED_ATTENTION

BLOCK = 128  # queries, keys and lanes
_MEMORY = 48 * 2**20  # on-chip, that a kernel may take; a v7 has 64 MiB
_MASKED_SCORE = -1e30  # finite: a query that has met no key yet must not become NaN
_MIN_SCORE = -1e20  # no score is lower, and exp2(_MASKED_SCORE - _MIN_SCORE) is 0


@dataclasses.dataclass(frozen=True)
class _Static:
    length: int  # of a row before it was padded to whole blocks: dropout counts in it
    head_size: int
    lanes: int  # of a head once it is padded
    rate: float
    interpret: bool

    @property
    def heads(self) -> int:  # in a block
        return BLOCK // self.lanes

    @property
    def scale(self) -> float:  # of scores, whose powers of two are taken
        return math.log2(math.e) / self.head_size**0.5


def flash_attention(qkv_BTCNH, segment_ids_BT, rate=0.0, row_keys_B=None, interpret=False):
    """As `attention.attention`: [B, T, N, H] in the dtype of `qkv_BTCNH`; 0 in padding.

    Args:
      qkv_BTCNH: bfloat16 or float32; H at most 128; zeros fill it up to a power of two.
      segment_ids_BT: int32, 0 in padding.
      rate, row_keys_B: dropout of the probabilities, by `dropout.attention_mask`.
      interpret: run the kernels as plain JAX, on any platform: for tests.
    """
    B, T, C, N, H = qkv_BTCNH.shape
    if row_keys_B is None:
        rate, row_keys_B = 0.0, jnp.zeros(B, jnp.uint32)
    static = _Static(T, H, padded_head_size(H), attention_rate(rate), interpret)
    more_T, more_N, more_H = -T % BLOCK, -N % static.heads, static.lanes - H
    if more_T or more_N or more_H:
        qkv_BTCNH = jnp.pad(qkv_BTCNH, ((0, 0), (0, more_T), (0, 0), (0, more_N), (0, more_H)))
        segment_ids_BT = jnp.pad(segment_ids_BT, ((0, 0), (0, more_T)))
    qkv_BTE = qkv_BTCNH.reshape(B, T + more_T, C * (N + more_N) * static.lanes)
    out_BTD = _flash(static, qkv_BTE, segment_ids_BT, row_keys_B)
    return out_BTD.reshape(B, T + more_T, N + more_N, static.lanes)[:, :T, :N, :H]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _flash(static: _Static, qkv_BTE, segment_ids_BT, row_keys_B):
    return _forward(static, qkv_BTE, segment_ids_BT, row_keys_B)[0]


def _forward(static, qkv_BTE, segment_ids_BT, row_keys_B):
    B, T, E = qkv_BTE.shape
    P, blocks = E // 3 // BLOCK, T // BLOCK  # P groups of heads
    of_rows = (None, blocks, static.heads, BLOCK)
    out_BTD, lse = _call(
        static,
        _forward_kernel,
        "flash_tpu_forward",
        (B, P, blocks),
        segment_ids_BT,
        row_keys_B,
        [(qkv_BTE, _block(0)), (qkv_BTE, _row(T, P)), (qkv_BTE, _row(T, 2 * P))],
        [
            ((B, T, E // 3), qkv_BTE.dtype, _block(0)),
            (
                (B, P, blocks, static.heads, BLOCK),
                jnp.float32,
                pl.BlockSpec((None, None, None, *of_rows[2:]), lambda b, p, i, *_: (b, p, i, 0, 0)),
            ),
        ],
        [pltpu.VMEM((T, BLOCK), jnp.int32), pltpu.VMEM((blocks, BLOCK, BLOCK), qkv_BTE.dtype)],
    )
    out_BTD, lse = (checkpoint_name(x, FUSED_ATTENTION) for x in (out_BTD, lse))
    return out_BTD, (qkv_BTE, segment_ids_BT, row_keys_B, out_BTD, lse)


def _backward(static, residuals, g_BTD):
    qkv_BTE, segment_ids_BT, row_keys_B, out_BTD, lse = residuals
    B, T, E = qkv_BTE.shape
    P, blocks, H = E // 3 // BLOCK, T // BLOCK, static.lanes
    g_BTD = g_BTD.astype(qkv_BTE.dtype)
    # sum_j p_ij dp_ij of the softmax's backward, which is the output times its gradient. The kernel
    # multiplies its sums by the factor of dropout, so here it is divided out.
    delta_BTD = out_BTD.astype(jnp.float32) * (1 - static.rate) * g_BTD.astype(jnp.float32)
    delta = jnp.sum(delta_BTD.reshape(B, blocks, BLOCK, P, static.heads, H), axis=-1)
    delta = jnp.transpose(delta, (0, 3, 1, 4, 2))  # as lse: [B, P, blocks, heads, BLOCK]
    of_row = pl.BlockSpec((None, None, *delta.shape[2:]), lambda b, p, i, *_: (b, p, 0, 0, 0))
    dqkv = _call(
        static,
        _backward_kernel,
        "flash_tpu_backward",
        (B, P, blocks),
        segment_ids_BT,
        row_keys_B,
        [
            *((qkv_BTE, spec) for spec in (_row(T, 0), _block(P), _block(2 * P))),
            (g_BTD, _row(T, 0)),
            (lse, of_row),
            (delta, of_row),
        ],
        [((B, T, E // 3), qkv_BTE.dtype, spec) for spec in (_row(T, 0), _block(0), _block(0))],
        [pltpu.VMEM((T, BLOCK), jnp.float32)],
    )
    return jnp.concatenate(dqkv, axis=-1), None, None


_flash.defvjp(_forward, _backward)


def _block(first: int) -> pl.BlockSpec:
    """One block of tokens of a group of heads; the groups begin at block `first` of the lanes."""
    return pl.BlockSpec((None, BLOCK, BLOCK), lambda b, p, i, *_: (b, i, first + p))


def _row(T: int, first: int) -> pl.BlockSpec:
    """All tokens of a row, likewise."""
    return pl.BlockSpec((None, T, BLOCK), lambda b, p, i, *_: (b, 0, first + p))


def _call(static, kernel, name, grid, segment_ids_BT, row_keys_B, inputs, outputs, scratch):
    """`kernel` over (row, group of heads, block) with the range of blocks to visit, the dropout
    keys and the segment ids before `inputs`: pairs of an array and how it is cut."""
    B, _, blocks = grid
    low, high = visited_blocks(segment_ids_BT, BLOCK, BLOCK)
    scalars = (low.ravel(), high.ravel(), jax.lax.bitcast_convert_type(row_keys_B, jnp.int32))
    ids = segment_ids_BT.reshape(B, blocks, 1, BLOCK)
    of_ids = pl.BlockSpec((None, blocks, 1, BLOCK), lambda b, *_: (b, 0, 0, 0))
    return pl.pallas_call(
        functools.partial(kernel, static=static),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(scalars),
            grid=grid,
            in_specs=[of_ids, *(spec for _, spec in inputs)],
            out_specs=[spec for *_, spec in outputs],
            scratch_shapes=scratch,
        ),
        out_shape=[jax.ShapeDtypeStruct(shape, dtype) for shape, dtype, _ in outputs],
        interpret=static.interpret,
        name=name,
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary"), vmem_limit_bytes=_MEMORY
        ),
    )(*scalars, ids, *(array for array, _ in inputs))


def _dot(a, b, a_axis: int, b_axis: int):
    return jax.lax.dot_general(
        a,
        b,
        (((a_axis,), (b_axis,)), ((), ())),
        precision=precision(a.dtype),
        preferred_element_type=jnp.float32,
    )


def _column(row):
    """[BLOCK, BLOCK] of [1, BLOCK]: its values down the first axis."""
    return jnp.broadcast_to(row, (BLOCK, BLOCK)).T


def _own_ids(segment_ids):
    """Of queries, or of keys: padding attends to nothing, for the other side has no id -1."""
    return jnp.where(segment_ids == 0, -1, segment_ids)


def _of_head(static: _Static, x, n: int):
    """x [*, BLOCK] with the lanes of other heads than the n-th zeroed."""
    if static.heads == 1:
        return x
    lane = jax.lax.broadcasted_iota(jnp.int32, x.shape, 1)
    is_own = (lane >= n * static.lanes) & (lane < (n + 1) * static.lanes)
    return jnp.where(is_own, x, jnp.zeros_like(x))


def _mask(static: _Static, row_key, head, query_block, key_block):
    """bool [keys, queries]: which probabilities are kept.

    Keys that differ in bit 3 lie in the same place of two registers and share the hash.
    """

    def iota(rows, axis):
        return jax.lax.broadcasted_iota(jnp.int32, (rows, BLOCK), axis).astype(jnp.uint32)

    head, *first = (x.astype(jnp.uint32) for x in (head, query_block * BLOCK, key_block * BLOCK))
    half = iota(BLOCK // 2, 0)
    key = half + (half & ~np.uint32(7))  # the keys whose bit 3 is 0
    query = iota(BLOCK // 2, 1)
    hashes = attention_hashes(row_key.astype(jnp.uint32), head, query, key, static.length, first)
    hashes = jnp.broadcast_to(hashes.reshape(-1, 1, 8, BLOCK), (BLOCK // 16, 2, 8, BLOCK))
    return kept_attention(hashes.reshape(BLOCK, BLOCK), iota(BLOCK, 1), iota(BLOCK, 0), static.rate)


def _forward_kernel(
    low_ref,
    high_ref,
    keys_ref,
    ids_ref,
    q_ref,
    k_ref,
    v_ref,
    out_ref,
    lse_ref,
    key_ids_ref,
    v_transposed_ref,
    *,
    static,
):
    """One block of queries of a group of heads against the keys of its segments."""
    b, p, i = (pl.program_id(axis) for axis in range(3))
    blocks, H, heads = pl.num_programs(2), static.lanes, range(static.heads)

    @pl.when(i == 0)
    def _():  # what every block of queries reads
        @pl.loop(0, blocks)
        def _(j):
            at = pl.ds(pl.multiple_of(j * BLOCK, BLOCK), BLOCK)
            key_ids_ref[at, :] = _column(ids_ref[j])
            v_transposed_ref[j] = v_ref[at, :].T

    q, q_ids = q_ref[...], _own_ids(ids_ref[i])
    q_heads = [_of_head(static, q, n) for n in heads]

    def visit(j, carry):
        at = pl.ds(pl.multiple_of(j * BLOCK, BLOCK), BLOCK)
        k, is_same = k_ref[at, :], key_ids_ref[at, :] == q_ids
        found = []
        for n, (acc, top, total) in zip(heads, carry, strict=True):
            scores = jnp.where(is_same, _dot(k, q_heads[n], 1, 1), _MASKED_SCORE)
            new_top = jnp.maximum(top, jnp.max(scores, axis=0, keepdims=True))
            shrink = jnp.exp2((top - new_top) * static.scale)
            weights = jnp.exp2((scores - new_top) * static.scale)
            total = total * shrink + jnp.sum(weights, axis=0, keepdims=True)
            if static.rate:
                head = p * static.heads + n
                weights = jnp.where(_mask(static, keys_ref[b], head, i, j), weights, 0.0)
            v = v_transposed_ref[j, n * H : (n + 1) * H, :]
            found.append((acc * shrink + _dot(v, weights.astype(v.dtype), 1, 0), new_top, total))
        return tuple(found)

    none = (
        jnp.zeros((H, BLOCK), jnp.float32),
        jnp.full((1, BLOCK), _MIN_SCORE, jnp.float32),
        jnp.zeros((1, BLOCK), jnp.float32),
    )
    at = b * blocks + i
    carry = jax.lax.fori_loop(low_ref[at], high_ref[at], visit, (none,) * static.heads)
    outs = []
    for n, (acc, top, total) in zip(heads, carry, strict=True):
        total = jnp.where(total > 0, total, 1.0)  # padding
        outs.append(acc / (total * (1 - static.rate)))
        lse_ref[n : n + 1, :] = top * static.scale + jnp.log(total) * math.log2(math.e)
    out_ref[...] = jnp.concatenate(outs, axis=0).T.astype(out_ref.dtype)


def _backward_kernel(
    low_ref,
    high_ref,
    keys_ref,
    ids_ref,
    q_ref,
    k_ref,
    v_ref,
    g_ref,
    lse_ref,
    delta_ref,
    dq_ref,
    dk_ref,
    dv_ref,
    dq_sum_ref,
    *,
    static,
):
    """One block of keys and values of a group of heads against the queries of its segments."""
    b, p, j = (pl.program_id(axis) for axis in range(3))
    blocks, heads = pl.num_programs(2), range(static.heads)
    scale, keep_scale = static.head_size**-0.5, 1 / (1 - static.rate)

    @pl.when(j == 0)
    def _():
        dq_sum_ref[...] = jnp.zeros(dq_sum_ref.shape, jnp.float32)

    k, v, key_ids = k_ref[...], v_ref[...], _column(_own_ids(ids_ref[j]))
    k_heads = [_of_head(static, k, n) for n in heads]

    def visit(i, carry):
        dk, dv = carry
        at = pl.ds(pl.multiple_of(i * BLOCK, BLOCK), BLOCK)
        q, g, is_same = q_ref[at, :], g_ref[at, :], key_ids == ids_ref[i]
        dq = jnp.zeros((BLOCK, BLOCK), jnp.float32)
        for n in heads:
            q_n, g_n = _of_head(static, q, n), _of_head(static, g, n)
            powers = _dot(k, q_n, 1, 1) * static.scale - lse_ref[i, n : n + 1, :]
            weights = jnp.where(is_same, jnp.exp2(powers), 0.0)
            dweights = _dot(v, g_n, 1, 1)
            dropped, delta = weights, delta_ref[i, n : n + 1, :]
            if static.rate:
                head = p * static.heads + n
                dropped = jnp.where(_mask(static, keys_ref[b], head, i, j), weights, 0.0)
            dv += _dot(dropped.astype(g.dtype), g_n, 1, 0)
            dscores = (dropped * dweights - weights * delta).astype(q.dtype)
            dk += _dot(dscores, q_n, 1, 0)
            dq += _dot(dscores, k_heads[n], 0, 0)
        dq_sum_ref[at, :] += dq
        return dk, dv

    zero, at = jnp.zeros((BLOCK, BLOCK), jnp.float32), b * blocks + j
    dk, dv = jax.lax.fori_loop(low_ref[at], high_ref[at], visit, (zero, zero))
    dk_ref[...] = (dk * (scale * keep_scale)).astype(dk_ref.dtype)
    dv_ref[...] = (dv * keep_scale).astype(dv_ref.dtype)

    @pl.when(j == blocks - 1)
    def _():
        dq_ref[...] = (dq_sum_ref[...] * (scale * keep_scale)).astype(dq_ref.dtype)
