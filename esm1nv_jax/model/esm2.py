"""What ESM-2 does otherwise than ESM-1nv: rotary positions and token dropout.

Rotary: Su et al. 2021, in the form that turns the two halves of a head against each other. Token
dropout: Lin et al. 2023, as in `fair-esm` and `transformers`.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from esm1nv_jax.data.tokenizer import MASK

ROTARY_BASE = 10_000.0
TRAINED_MASKED = 0.15 * 0.8  # the share of `<mask>` that every ESM model with it was trained on


def frequencies(head_size: int, base: float = ROTARY_BASE) -> np.ndarray:
    """Radians a position, fp32 [H / 2].

    They are kept among the parameters, not computed: published files hold ESM-2's as they were in
    training, rounded to fp16, and at position 1,000 that is another angle.
    """
    exponent = np.arange(0, head_size, 2, dtype=np.float32) / np.float32(head_size)
    return (1 / np.float32(base) ** exponent).astype(np.float32)


def rotation(positions_BT, frequency):
    """(cos, sin) of every angle, fp32 [B, T, 1, H / 2] each. No gradient enters `frequency`."""
    angle_BT1F = positions_BT[..., None, None] * jax.lax.stop_gradient(frequency)
    return jnp.cos(angle_BT1F), jnp.sin(angle_BT1F)


def rotate(x_BTNH, turn):
    """Queries or keys, turned by the angle of their position."""
    cos, sin = turn
    first, second = jnp.split(x_BTNH, 2, axis=-1)
    return jnp.concatenate(
        [first * cos - second * sin, second * cos + first * sin], axis=-1
    )


def token_dropout(x_BTD, tokens_BT, segment_ids_BT):
    """Zero embeddings at `<mask>`, and the others of a sequence scaled so that their sum is as
    large as if the share of `<mask>` were that of training."""
    masked_BT = tokens_BT == MASK

    def count(values_T, segment_ids_T):
        segments = jax.ops.segment_sum(values_T, segment_ids_T, num_segments=len(values_T) + 1)
        return segments[segment_ids_T]

    share_BT = jax.vmap(count)(masked_BT.astype(jnp.float32), segment_ids_BT) / jax.vmap(count)(
        jnp.ones(tokens_BT.shape, jnp.float32), segment_ids_BT
    )
    # A segment of nothing but `<mask>` has no embedding to scale.
    scale_BT = (1 - TRAINED_MASKED) / jnp.where(share_BT < 1, 1 - share_BT, 1)
    return jnp.where(masked_BT[..., None], 0, x_BTD * scale_BT[..., None])
