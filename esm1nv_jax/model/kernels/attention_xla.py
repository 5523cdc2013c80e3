"""Attention by XLA's own operations, with T x T scores in memory: on any device, with dropout.

The gradient is written out, as a kernel's would be: with autodiff's, XLA's CPU backend merges the
softmax into the product and takes more than twice the time. Operands are laid out as its matrix
library takes them (`matmul.force_row_major`).
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from esm1nv_jax.model.dropout import attention_mask, attention_rate
from esm1nv_jax.model.kernels import with_gradient
from esm1nv_jax.model.kernels.matmul import (
    cast_operand,
    force_row_major,
    precision,
    transpose_materialized,
)
from esm1nv_jax.model.kernels.remat import gather_positions, spread_positions

_MASKED_SCORE = np.float32(-1e30)  # exp of it less any real score is exactly 0 in fp32


def xla_attention(qkv_BTCNH, segment_ids_BT, dtype, rate, row_keys_B, queries_BM=None):
    """As `attention.attention`: fp32 [B, T, N, H], 0 in padding."""
    qkv_CBNTH = jnp.transpose(qkv_BTCNH, (2, 0, 3, 1, 4))
    out_BNTH = _attention(qkv_CBNTH, segment_ids_BT, queries_BM, row_keys_B, dtype, rate)
    is_real_BT = _at(segment_ids_BT, queries_BM) > 0
    return jnp.where(is_real_BT[:, :, None, None], jnp.swapaxes(out_BNTH, 1, 2), 0)


def _at(ids_BT, queries_BM):
    return ids_BT if queries_BM is None else jnp.take_along_axis(ids_BT, queries_BM, axis=1)


def _backward(dtype, rate, residuals, g_BNTH):
    operands, like_qkv, queries_BM, row_keys_B, weights_BNTS, total_BNT1, out_BNTH = residuals
    q_BNTH, k_BNSH, v_BNSH = operands
    g_BNTH = g_BNTH / total_BNT1
    # The forward's operand, and nothing else that dropout made: XLA's CPU backend finds it computed
    # there and keeps it, in the operands' dtype, where of masks it would keep fp32 copies.
    dropped_BNTS = cast_operand(_drop(weights_BNTS, queries_BM, rate, row_keys_B), dtype)
    dtotal_BNT1 = jnp.sum(g_BNTH * out_BNTH, axis=-1, keepdims=True)
    g_BNTH = force_row_major(cast_operand(g_BNTH, dtype))
    dv_BNSH = _sum_over_queries(dropped_BNTS, g_BNTH, dtype)
    ddropped_BNTS = _einsum("BNTH,BNSH->BNTS", g_BNTH, v_BNSH, dtype)
    dscores_BNTS = dropped_BNTS * ddropped_BNTS - weights_BNTS * dtotal_BNT1
    dq_BNTH = _einsum("BNTS,BNSH->BNTH", dscores_BNTS, k_BNSH, dtype) * q_BNTH.shape[-1] ** -0.5
    dk_BNSH = _sum_over_queries(dscores_BNTS, q_BNTH, dtype)
    if queries_BM is not None:
        spread = jax.vmap(spread_positions, (1, None, None), 1)  # over heads
        dq_BNTH = spread(dq_BNTH, queries_BM, k_BNSH.shape[2])
    return jnp.stack([dq_BNTH, dk_BNSH, dv_BNSH]).astype(like_qkv.dtype), None, None, None


@with_gradient("attention_xla", _backward, nondiff_argnums=(4, 5))
def _attention(qkv_CBNTH, segment_ids_BT, queries_BM, row_keys_B, dtype, rate):
    """Weights are normalised after their product with the values."""
    q_BNTH, k_BNSH, v_BNSH = qkv_CBNTH
    if queries_BM is not None:
        q_BNTH = jax.vmap(gather_positions, (1, None), 1)(q_BNTH, queries_BM)
    q_BNTH = q_BNTH * q_BNTH.shape[-1] ** -0.5
    operands = [force_row_major(cast_operand(x, dtype)) for x in (q_BNTH, k_BNSH, v_BNSH)]
    q_BNTH, k_BNSH, v_BNSH = operands
    query_ids_BT = _at(segment_ids_BT, queries_BM)
    scores_BNTS = _scores(q_BNTH, k_BNSH, query_ids_BT, segment_ids_BT, dtype)
    weights_BNTS = jnp.exp(scores_BNTS - jnp.max(scores_BNTS, axis=-1, keepdims=True))
    total_BNT1 = jnp.sum(weights_BNTS, axis=-1, keepdims=True)
    dropped_BNTS = _drop(weights_BNTS, queries_BM, rate, row_keys_B)
    out_BNTH = _einsum("BNTS,BNSH->BNTH", dropped_BNTS, v_BNSH, dtype) / total_BNT1
    like_qkv = jnp.zeros((0,), qkv_CBNTH.dtype)
    weights = weights_BNTS, total_BNT1, out_BNTH
    return out_BNTH, (operands, like_qkv, queries_BM, row_keys_B, *weights)


def attention_weights(qkv_BTCNH, segment_ids_BT, dtype):
    """softmax(q k / sqrt(H)) within each segment: fp32 [B, N, T, S], 0 in padding."""
    q_BNTH, k_BNSH = (jnp.swapaxes(qkv_BTCNH[:, :, c], 1, 2) for c in range(2))
    q_BNTH = q_BNTH * q_BNTH.shape[-1] ** -0.5
    scores_BNTS = _scores(q_BNTH, k_BNSH, segment_ids_BT, segment_ids_BT, dtype)
    return jnp.where((segment_ids_BT > 0)[:, None, :, None], jax.nn.softmax(scores_BNTS), 0)


def _scores(q_BNTH, k_BNSH, query_ids_BT, key_ids_BS, dtype):
    """Scores of queries that are already divided by sqrt(H), masked between segments."""
    scores_BNTS = _einsum("BNTH,BNSH->BNTS", q_BNTH, k_BNSH, dtype)
    is_same_BTS = query_ids_BT[:, :, None] == key_ids_BS[:, None, :]
    # The same bits as by `jnp.where` on the scores, but XLA's CPU backend makes both products and
    # the softmax one fusion of a sum: 0.86 of the time (rows of 512, two cores of an AMD EPYC).
    return scores_BNTS + jnp.where(is_same_BTS, 0.0, _MASKED_SCORE)[:, None]


def _sum_over_queries(a_BNTS, b_BNTH, dtype):
    """[B, N, S, H], by transposing the small arrays, not the large one."""
    b_BNHT = transpose_materialized(b_BNTH)
    return transpose_materialized(_einsum("BNHT,BNTS->BNHS", b_BNHT, a_BNTS, dtype))


def _einsum(pattern: str, a, b, dtype):
    return jnp.einsum(
        pattern,
        cast_operand(a, dtype),
        cast_operand(b, dtype),
        preferred_element_type=jnp.float32,
        precision=precision(dtype),
    )


def _drop(weights_BNTS, queries_BM, rate, row_keys_B):
    """The weights under inverted dropout."""
    if not rate:
        return weights_BNTS
    _, N, T, S = weights_BNTS.shape
    n, t, s = (jax.lax.broadcasted_iota(jnp.uint32, (N, T, S), axis) for axis in range(3))
    if queries_BM is not None:
        t = queries_BM.astype(jnp.uint32)[:, None, :, None]
    mask_BNTS = attention_mask(row_keys_B[:, None, None, None], n, t, s, S, rate)
    return weights_BNTS * (mask_BNTS * np.float32(1 / (1 - attention_rate(rate))))
