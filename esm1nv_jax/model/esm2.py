"""What ESM-1, ESM-1b, ESM-2 and models of other vocabularies compute otherwise than ESM-1nv.

Rotary positions: Su et al. 2021, in the form that rotates the two halves of a head against each
other. Token dropout: Lin et al. 2023, as in `fair-esm` and `transformers`.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from esm1nv_jax.data.tokenizer import UNK, vocabulary

ROPE_THETA = 10_000.0
TRAINED_MASK_SHARE = 0.15 * 0.8  # of `<mask>` in the training of every ESM with token dropout


def rope_frequencies(head_size: int, theta: float = ROPE_THETA) -> np.ndarray:
    """Radians a position, fp32 [H / 2].

    They are kept among the parameters, not computed: a file may hold them rounded to fp16, as they
    were in training, and at position 1,000 that is another angle.
    """
    exponent = np.arange(0, head_size, 2, dtype=np.float32) / np.float32(head_size)
    return (1 / np.float32(theta) ** exponent).astype(np.float32)


def rope_cos_sin(positions_BT, frequencies):
    """(cos, sin) of every angle, fp32 [B, T, 1, 1, H / 2] each. `frequencies` [H / 2] get no
    gradient."""
    angles = positions_BT[..., None, None, None] * jax.lax.stop_gradient(frequencies)
    return jnp.cos(angles), jnp.sin(angles)


def apply_rope(qkv_BTCNH, cos_sin):
    """Queries and keys rotated by the angles of their positions, in fp32; values as they are."""
    cos, sin = cos_sin
    first, second = jnp.split(qkv_BTCNH[:, :, :2].astype(jnp.float32), 2, axis=-1)
    rotated = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return jnp.concatenate([rotated.astype(qkv_BTCNH.dtype), qkv_BTCNH[:, :, 2:]], axis=2)


def token_dropout(x_BTD, mask_BT, segment_ids_BT):
    """Embeddings [B, T, D]: zero at `<mask>`, and the others of a sequence scaled so that their sum
    is as large as if the share of `<mask>` were that of training.

    `mask_BT` says where `<mask>` is: bool; or its probability, and `x_BTD` is without its part.
    """

    def count(values_T, segment_ids_T):
        segments = jax.ops.segment_sum(values_T, segment_ids_T, num_segments=len(values_T) + 1)
        return segments[segment_ids_T]

    share_BT = jax.vmap(count)(mask_BT.astype(jnp.float32), segment_ids_BT) / jax.vmap(count)(
        jnp.ones(mask_BT.shape, jnp.float32), segment_ids_BT
    )
    # A segment of nothing but `<mask>` has no embedding to scale.
    scale_BT = (1 - TRAINED_MASK_SHARE) / jnp.where(share_BT < 1, 1 - share_BT, 1)
    if mask_BT.dtype == bool:
        return jnp.where(mask_BT[..., None], 0, x_BTD * scale_BT[..., None])
    return x_BTD * scale_BT[..., None]


def replace_end(qkv_BTCD, segment_ids_BT, bias_kv_2D):
    """Queries, keys and values with `bias_kv_2D` for the key and value of each `</s>`.

    ESM-1 reads no `</s>`; every token attends to one more key and value, which are parameters
    (`add_bias_kv` of fairseq). The `</s>` at the end of each segment gives them a place, so that
    every attention backend computes it; what it attends to itself is not read.
    """
    next_BT = jnp.pad(segment_ids_BT[:, 1:], ((0, 0), (0, 1)))
    is_end_BT = (segment_ids_BT > 0) & (segment_ids_BT != next_BT)
    kv_BT2D = jnp.where(is_end_BT[..., None, None], bias_kv_2D, qkv_BTCD[:, :, 1:])
    return jnp.concatenate([qkv_BTCD[:, :, :1], kv_BT2D.astype(qkv_BTCD.dtype)], axis=2)


def map_missing_to_unk(text: str, tokens_BT):
    """Our ids with `<unk>` for letters that a model of the vocabulary `text` does not have.

    For targets, too: what a model has no token for can be neither masked nor predicted.
    """
    missing = vocabulary(text).missing
    if not missing:
        return tokens_BT
    return jnp.where(jnp.isin(tokens_BT, np.array(missing)), UNK, tokens_BT)
