"""Cross-entropy of masked residues, as sums that add up over rows, devices and hosts."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from esm1nv_jax.model.masking import Masked


def cross_entropy(logits_BMV, targets_BM):
    """-log p(target) in nats: fp32 [B, M]."""
    logits_BMV = logits_BMV.astype(jnp.float32)
    chosen_BM = jnp.take_along_axis(logits_BMV, targets_BM[..., None], axis=-1)[..., 0]
    return jax.nn.logsumexp(logits_BMV, axis=-1) - chosen_BM


def sums(logits_BMV, masked: Masked) -> dict[str, jax.Array]:
    """fp32 scalars: what perplexity and accuracy are made of, over all selected positions and over
    `<mask>` positions only (`_mask`)."""
    loss_BM = jnp.where(masked.selected_BM, cross_entropy(logits_BMV, masked.targets_BM), 0)
    right_BM = jnp.argmax(logits_BMV, axis=-1) == masked.targets_BM
    return {
        "loss": jnp.sum(loss_BM),
        "selected": jnp.sum(masked.selected_BM, dtype=jnp.float32),
        "loss_mask": jnp.sum(jnp.where(masked.masked_BM, loss_BM, 0)),
        "selected_mask": jnp.sum(masked.masked_BM, dtype=jnp.float32),
        "right_mask": jnp.sum(right_BM & masked.masked_BM, dtype=jnp.float32),
    }
