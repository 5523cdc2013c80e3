"""Flash attention on packed rows for GPUs, with dropout drawn inside the kernel.

A Pallas kernel that lowers to Triton (compute capability 8.0 and up), after Dao,
"FlashAttention-2", 2023. It started from the example in `jax.experimental.pallas.ops.gpu`, which
has no dropout, takes q, k and v apart and visits every block of a row. Here they are read where the
one QKV product wrote them, their gradients are written as one array, and blocks that share no
segment are never visited. Compiled for an A100, a step with XLA's attention needs 35.9 GiB of
temporary memory, with this kernel 12.6 (two layers at full width; docs/performance.md).

`compute.attention=xla` turns it off. Shapes as in `encoder`.
"""

from __future__ import annotations

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton

from esm1nv_jax.model.dropout import attention_mask, attention_rate
from esm1nv_jax.model.kernels.matmul import precision
from esm1nv_jax.model.kernels.remat import FUSED_ATTENTION

_MASKED_SCORE = -1e30  # finite: a query that has met no key yet must not become NaN
_MIN_SCORE = -1e20  # no score is lower, and exp2(_MASKED_SCORE - _MIN_SCORE) is 0


@dataclasses.dataclass(frozen=True)
class Blocks:
    """Queries and keys in a tile. The defaults were not tuned on a chip: the tiles of an A100 fit
    its registers at four warps, as the compiler reports. MEASURED has chips that were."""

    queries: int = 128
    keys: int = 64
    backward: int = 64  # both, in the backward
    warps: int = 4
    stages: int = 2
    backward_warps: int = 4
    backward_stages: int = 2

    @property
    def step(self) -> int:
        return math.lcm(self.queries, self.keys, self.backward)

    @classmethod
    def of(cls, chip: str) -> Blocks:
        """The fastest that were measured on a GPU of this `device_kind`, or the defaults."""
        return MEASURED.get(chip, cls())


# By `jax.Device.device_kind`: the line `best` of `benchmarks/gpu.py --parts blocks`, rows and
# dropout of the card, heads of 64. Forward and backward of 32 rows, defaults and these, in ms:
MEASURED = {"NVIDIA H200": Blocks(64, 64, 64, backward_stages=3)}  # 1.063, 0.959


@dataclasses.dataclass(frozen=True)
class _Static:
    length: int  # of a row before it was padded to whole blocks: dropout counts in it
    head_size: int  # before it was padded
    rate: float
    blocks: Blocks
    interpret: bool


def flash_attention(
    qkv_BTCNH, segment_ids_BT, rate=0.0, row_keys_B=None, blocks=Blocks(), interpret=False
):
    """As `attention.attention`: [B, T, N, H] in the dtype of `qkv_BTCNH`; 0 in padding.

    Args:
      qkv_BTCNH: bfloat16, float16 or float32; zeros fill H up to a power of two.
      segment_ids_BT: int32, 0 in padding.
      rate, row_keys_B: dropout of the probabilities, by `dropout.attention_mask`.
      blocks: tile sizes.
      interpret: run the kernels as plain JAX, on any platform: for tests.
    """
    B, T, _, _, H = qkv_BTCNH.shape
    padding, more_H = -T % blocks.step, padded_head_size(H) - H
    if padding or more_H:
        qkv_BTCNH = jnp.pad(qkv_BTCNH, ((0, 0), (0, padding), (0, 0), (0, 0), (0, more_H)))
        segment_ids_BT = jnp.pad(segment_ids_BT, ((0, 0), (0, padding)))
    if row_keys_B is None:
        rate, row_keys_B = 0.0, jnp.zeros(B, jnp.uint32)
    static = _Static(T, H, attention_rate(rate), blocks, interpret)
    return _flash(static, qkv_BTCNH, segment_ids_BT, row_keys_B)[:, :T, :, :H]


def padded_head_size(H: int) -> int:
    """The next power of two, at least 16: what both kernels compute with."""
    return max(16, 1 << (H - 1).bit_length())


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _flash(static: _Static, qkv_BTCNH, segment_ids_BT, row_keys_B):
    return _forward(static, qkv_BTCNH, segment_ids_BT, row_keys_B)[0]


def _forward(static, qkv_BTCNH, segment_ids_BT, row_keys_B):
    B, T, _, N, H = qkv_BTCNH.shape
    blocks = static.blocks
    low, high = visited_blocks(segment_ids_BT, blocks.queries, blocks.keys)
    out_BTNH, lse_BNT = pl.pallas_call(
        functools.partial(_forward_kernel, static=static),
        grid=(T // blocks.queries, N, B),
        in_specs=[
            pl.BlockSpec((None, blocks.queries, None, None, H), lambda i, n, b: (b, i, 0, n, 0)),
            pl.BlockSpec((None, T, None, None, H), lambda i, n, b: (b, 0, 1, n, 0)),
            pl.BlockSpec((None, T, None, None, H), lambda i, n, b: (b, 0, 2, n, 0)),
            *_row_specs(T),
        ],
        out_specs=[
            pl.BlockSpec((None, blocks.queries, None, H), lambda i, n, b: (b, i, n, 0)),
            pl.BlockSpec((None, None, blocks.queries), lambda i, n, b: (b, n, i)),
        ],
        out_shape=[
            jax.ShapeDtypeStruct((B, T, N, H), qkv_BTCNH.dtype),
            jax.ShapeDtypeStruct((B, N, T), jnp.float32),
        ],
        interpret=static.interpret,
        name="flash_forward",
        compiler_params=triton.CompilerParams(num_warps=blocks.warps, num_stages=blocks.stages),
    )(qkv_BTCNH, qkv_BTCNH, qkv_BTCNH, segment_ids_BT, low, high, row_keys_B)
    out_BTNH, lse_BNT = (checkpoint_name(x, FUSED_ATTENTION) for x in (out_BTNH, lse_BNT))
    return out_BTNH, (qkv_BTCNH, segment_ids_BT, row_keys_B, out_BTNH, lse_BNT)


def _backward(static, residuals, g_BTNH):
    qkv_BTCNH, segment_ids_BT, row_keys_B, out_BTNH, lse_BNT = residuals
    B, T, C, N, H = qkv_BTCNH.shape
    g_BTNH = g_BTNH.astype(qkv_BTCNH.dtype)
    # sum_j p_ij dp_ij of the softmax's backward, which is the output times its gradient. The kernel
    # multiplies its sums by the factor of dropout, so here it is divided out.
    out_BTNH = out_BTNH.astype(jnp.float32) * (1 - static.rate)
    exact = jax.lax.Precision.HIGHEST
    delta_BNT = jnp.einsum("BTNH,BTNH->BNT", out_BTNH, g_BTNH.astype(jnp.float32), precision=exact)
    blocks = static.blocks
    low, high = visited_blocks(segment_ids_BT, blocks.backward, blocks.backward)
    qkv_specs = [
        pl.BlockSpec((None, T, None, None, H), lambda i, n, b, c=c: (b, 0, c, n, 0))
        for c in range(C)
    ]
    dqkv_BTCNH = pl.pallas_call(
        functools.partial(_backward_kernel, static=static),
        grid=(T // blocks.backward, N, B),
        in_specs=[
            *qkv_specs,
            *_row_specs(T),
            pl.BlockSpec((None, T, None, H), lambda i, n, b: (b, 0, n, 0)),
            pl.BlockSpec((None, None, T), lambda i, n, b: (b, n, 0)),
            pl.BlockSpec((None, None, T), lambda i, n, b: (b, n, 0)),
        ],
        out_specs=pl.BlockSpec(
            (None, blocks.backward, C, None, H), lambda i, n, b: (b, i, 0, n, 0)
        ),
        out_shape=jax.ShapeDtypeStruct(qkv_BTCNH.shape, qkv_BTCNH.dtype),
        interpret=static.interpret,
        name="flash_backward",
        compiler_params=triton.CompilerParams(
            num_warps=blocks.backward_warps, num_stages=blocks.backward_stages
        ),
    )(*[qkv_BTCNH] * 3, segment_ids_BT, low, high, row_keys_B, g_BTNH, lse_BNT, delta_BNT)
    return dqkv_BTCNH, None, None


_flash.defvjp(_forward, _backward)


def visited_blocks(segment_ids_BT, rows: int, columns: int):
    """Which blocks of columns each block of rows must visit: first and end, int32 [B, T / rows].

    A pair of blocks is skipped only where the ranges of their segment ids are disjoint, so that
    any order of ids is right, and ids that ascend along the row, as packing makes them, are fast.
    Padding counts as the last segment. A block of padding visits nothing.
    """
    B, T = segment_ids_BT.shape
    last = jnp.iinfo(jnp.int32).max
    ids_BT = jnp.where(segment_ids_BT > 0, segment_ids_BT, last)
    r, c = ids_BT.reshape(B, -1, rows), ids_BT.reshape(B, -1, columns)
    meet = (r.min(-1)[:, :, None] <= c.max(-1)[:, None]) & (
        c.min(-1)[:, None] <= r.max(-1)[:, :, None]
    )
    meet &= (r.min(-1) < last)[:, :, None] & (c.min(-1) < last)[:, None]
    at = jnp.arange(T // columns, dtype=jnp.int32)
    low = jnp.min(jnp.where(meet, at, T // columns), axis=-1)
    high = jnp.max(jnp.where(meet, at + 1, 0), axis=-1)
    return jnp.minimum(low, high), high


def _row_specs(T: int) -> list[pl.BlockSpec]:
    """Of segment ids, the first and the last block to visit, and the dropout key."""
    return [
        pl.BlockSpec((None, T), lambda i, n, b: (b, 0)),
        pl.BlockSpec((None, None), lambda i, n, b: (b, i)),
        pl.BlockSpec((None, None), lambda i, n, b: (b, i)),
        pl.BlockSpec((None,), lambda i, n, b: (b,)),
    ]


def _dropout_mask(static: _Static, row_key, head, first_query, first_key, shape, axis: int):
    """bool [shape]: which probabilities of a tile are kept; queries lie along `axis`."""
    q, k = (jax.lax.broadcasted_iota(jnp.uint32, shape, a) for a in (axis, 1 - axis))
    head, *first = (x.astype(jnp.uint32) for x in (head, first_query, first_key))
    return attention_mask(row_key, head, q, k, static.length, static.rate, first)


def _dot(a, b):
    return jax.lax.dot(a, b, precision=precision(a.dtype), preferred_element_type=jnp.float32)


def _multiply_add(static: _Static, a, b, c):
    """a * b + c of a tile `a`, by one instruction: the compiler does not merge two, for it keeps
    the rounding of each."""
    if static.interpret:
        return a * b + c
    (y,) = triton.elementwise_inline_asm(
        "fma.rn.f32 $0, $1, $2, $3;",
        args=[jnp.broadcast_to(x, a.shape) for x in (a, b, c)],
        constraints="=f,f,f,f",
        pack=1,
        result_shape_dtypes=[jax.ShapeDtypeStruct(a.shape, jnp.float32)],
    )
    return y


def _own_ids(segment_ids):
    """Of queries, or of keys: padding attends to nothing, for the other side has no id -1."""
    return jnp.where(segment_ids == 0, -1, segment_ids)


def _forward_kernel(
    q_ref, k_ref, v_ref, segment_ids_ref, low_ref, high_ref, key_ref, out_ref, lse_ref, *, static
):
    """One block of queries of one head against the keys of its segments."""
    blocks = static.blocks
    Q, K, H = blocks.queries, blocks.keys, q_ref.shape[-1]
    start, head, row_key = pl.program_id(0) * Q, pl.program_id(1), key_ref[...]
    q = q_ref[...]
    q_ids = _own_ids(segment_ids_ref[pl.ds(start, Q)])
    scale = math.log2(math.e) / static.head_size**0.5  # powers of two are what the chip computes

    def visit(j, carry):
        acc, top, total = carry
        at = pl.ds(j * K, K)
        is_same = q_ids[:, None] == segment_ids_ref[at][None, :]
        scores = jnp.where(is_same, _dot(q, k_ref[at, :].T), _MASKED_SCORE)
        new_top = jnp.maximum(top, jnp.max(scores, axis=1))
        shrink = jnp.exp2((top - new_top) * scale)
        p = jnp.exp2(_multiply_add(static, scores, scale, -scale * new_top[:, None]))
        total = total * shrink + jnp.sum(p, axis=1)
        if static.rate:
            p = jnp.where(_dropout_mask(static, row_key, head, start, j * K, (Q, K), 0), p, 0.0)
        v = v_ref[at, :]
        return acc * shrink[:, None] + _dot(p.astype(v.dtype), v), new_top, total

    none = (
        jnp.zeros((Q, H), jnp.float32),
        jnp.full(Q, _MIN_SCORE, jnp.float32),
        jnp.zeros(Q, jnp.float32),
    )
    acc, top, total = jax.lax.fori_loop(low_ref[...], high_ref[...], visit, none)
    total = jnp.where(total > 0, total, 1.0)  # padding
    out_ref[...] = (acc / (total * (1 - static.rate))[:, None]).astype(out_ref.dtype)
    lse_ref[...] = top * scale + jnp.log2(total)


def _backward_kernel(
    q_ref,
    k_ref,
    v_ref,
    segment_ids_ref,
    low_ref,
    high_ref,
    key_ref,
    g_ref,
    lse_ref,
    delta_ref,
    out_ref,
    *,
    static,
):
    """One block of one head, first as keys and values, then as queries.

    Blocks meet each other or do not, so one range serves both. Probabilities are computed twice:
    the other way, one pass that adds dq up atomically, would depend on the order of the blocks.
    """
    size, H = static.blocks.backward, q_ref.shape[-1]
    start, head = pl.program_id(0) * size, pl.program_id(1)
    own = pl.ds(start, size)
    ids = _own_ids(segment_ids_ref[own])
    q, k, v = q_ref[own, :], k_ref[own, :], v_ref[own, :]
    low, high, row_key = low_ref[...], high_ref[...], key_ref[...]
    scale, keep_scale = static.head_size**-0.5, 1 / (1 - static.rate)
    zero = jnp.zeros((size, H), jnp.float32)

    def probabilities(scores, is_same, minus_lse):
        powers = _multiply_add(static, scores, scale * math.log2(math.e), minus_lse)
        return jnp.where(is_same, jnp.exp2(powers), 0.0)

    def as_keys(j, carry):
        dk, dv = carry
        at = pl.ds(j * size, size)
        other_q, g = q_ref[at, :], g_ref[at, :]
        is_same = ids[:, None] == segment_ids_ref[at][None, :]
        p = probabilities(_dot(k, other_q.T), is_same, -lse_ref[at][None, :])
        dp = _dot(v, g.T)
        if static.rate:
            mask = _dropout_mask(static, row_key, head, j * size, start, (size, size), 1)
            dropped = jnp.where(mask, p, 0.0)
            # One selection serves both products.
            ds = _multiply_add(static, dropped, dp, p * -delta_ref[at][None, :])
        else:
            dropped, ds = p, p * (dp - delta_ref[at][None, :])
        dv += _dot(dropped.astype(g.dtype), g)
        return dk + _dot(ds.astype(q.dtype), other_q), dv

    dk, dv = jax.lax.fori_loop(low, high, as_keys, (zero, zero))
    out_ref[:, 1, :] = (dk * (scale * keep_scale)).astype(out_ref.dtype)
    out_ref[:, 2, :] = (dv * keep_scale).astype(out_ref.dtype)

    g, minus_lse, delta = g_ref[own, :], -lse_ref[own][:, None], delta_ref[own][:, None]

    def as_queries(j, dq):
        at = pl.ds(j * size, size)
        other_k = k_ref[at, :]
        is_same = ids[:, None] == segment_ids_ref[at][None, :]
        p = probabilities(_dot(q, other_k.T), is_same, minus_lse)
        dp = _dot(g, v_ref[at, :].T)
        if static.rate:
            mask = _dropout_mask(static, row_key, head, start, j * size, (size, size), 0)
            dp = jnp.where(mask, dp, 0.0)
        ds = p * (dp - delta)
        return dq + _dot(ds.astype(k.dtype), other_k)

    dq = jax.lax.fori_loop(low, high, as_queries, zero)
    out_ref[:, 0, :] = (dq * (scale * keep_scale)).astype(out_ref.dtype)
