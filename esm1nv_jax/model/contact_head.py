"""Contacts from attention maps: ESM's head, one logistic regression over all layers and heads.

Rao et al., "Transformer protein language models are unsupervised structure learners", 2021. The
features of a pair of residues are the attention maps, symmetrised and with the average product
correction (APC). Parameters: kernel [L N, 1], heads of the first layer first, and bias [1].

Axes: B rows of one sequence each, L layers, N heads, T tokens, S keys where T are queries.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from esm1nv_jax.model.encoder_config import EncoderConfig

NAME = "contact_head"  # of its parameters beside the encoder's


def abstract(config: EncoderConfig) -> dict:
    """Shapes and dtypes of the parameters, without allocating them."""
    features = config.layers * config.heads
    return {
        name: jax.ShapeDtypeStruct(shape, jnp.float32)
        for name, shape in (("kernel", (features, 1)), ("bias", (1,)))
    }


def features(weights_BNTS, is_residue_BT):
    """Attention maps of one layer, symmetrised and corrected: fp32 [B, N, T, S], 0 but between
    residues."""
    is_pair_BTS = is_residue_BT[:, :, None] & is_residue_BT[:, None, :]
    x_BNTS = jnp.where(is_pair_BTS[:, None], weights_BNTS, 0)
    return average_product_correction(x_BNTS + jnp.swapaxes(x_BNTS, -1, -2))


def average_product_correction(x):
    """x minus the product of its row and column sums over its total, for each [..., T, S] matrix
    (Dunn et al. 2008)."""
    total = jnp.sum(x, axis=(-2, -1), keepdims=True)
    product = jnp.sum(x, axis=-1, keepdims=True) * jnp.sum(x, axis=-2, keepdims=True)
    return x - product / jnp.where(total == 0, 1, total)


def predict(params: dict, attention, is_residue_BT):
    """Probabilities of contact, fp32 [B, T, S]; 0 but between residues.

    `attention` holds the weights [B, N, T, S] of each layer.
    """
    logits_BTS, highest = params["bias"][0], jax.lax.Precision.HIGHEST
    kernel_LN = params["kernel"].reshape(len(attention), -1)
    for weights_BNTS, kernel_N in zip(attention, kernel_LN, strict=True):
        x_BNTS = features(weights_BNTS, is_residue_BT)
        logits_BTS += jnp.einsum("BNTS,N->BTS", x_BNTS, kernel_N, precision=highest)
    is_pair_BTS = is_residue_BT[:, :, None] & is_residue_BT[:, None, :]
    return jnp.where(is_pair_BTS, jax.nn.sigmoid(logits_BTS), 0)
