"""Attention over packed rows: no query sees a key of another segment."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from esm1nv_jax.model import dropout as dropout_lib
from esm1nv_jax.model.products import precision

_NEVER = -1e30  # exp(_NEVER - anything seen) is exactly 0 in fp32


def attention(q_BTNH, k_BTNH, v_BTNH, segment_ids_BT, dtype, rate=0.0, row_keys_B=None):
    """Softmax(q k / sqrt(H)) v within each segment.

    Args:
      q_BTNH, k_BTNH, v_BTNH: queries, keys and values.
      segment_ids_BT: int32; padding is a segment of its own, 0.
      dtype: of the operands of both products; scores and softmax are fp32.
      rate: dropout of the attention probabilities, with `row_keys_B` (uint32, one a row).

    Returns:
      [B, T, N, H] in fp32.
    """
    _, T, N, H = q_BTNH.shape
    kwargs = {"preferred_element_type": jnp.float32, "precision": precision(dtype)}
    scores_BNTS = jnp.einsum(
        "BTNH,BSNH->BNTS", (q_BTNH * H**-0.5).astype(dtype), k_BTNH.astype(dtype), **kwargs
    )
    same_BTS = segment_ids_BT[:, :, None] == segment_ids_BT[:, None, :]
    probabilities_BNTS = jax.nn.softmax(jnp.where(same_BTS[:, None], scores_BNTS, _NEVER), axis=-1)
    if rate and row_keys_B is not None:
        kept_BNTS = dropout_lib.keep(row_keys_B[:, None, None, None], _element_NTS(N, T), rate)
        probabilities_BNTS = jnp.where(kept_BNTS, probabilities_BNTS / (1 - rate), 0)
    return jnp.einsum(
        "BNTS,BSNH->BTNH", probabilities_BNTS.astype(dtype), v_BTNH.astype(dtype), **kwargs
    )


def _element_NTS(N: int, T: int):
    """uint32: the index of a probability in its row, the dropout element of every backend."""
    n, t, s = (jax.lax.broadcasted_iota(jnp.uint32, (N, T, T), axis) for axis in range(3))
    return (n * np.uint32(T) + t) * np.uint32(T) + s
