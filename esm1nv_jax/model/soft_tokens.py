"""Sequences of probabilities instead of tokens: what gradients of a sequence are taken of.

Axes: B rows, T tokens, V the tokens of `tokenizer.TOKENS`, A the 20 standard amino acids in the
order of `tokenizer.RESIDUES`, D width. Everything is pure and works in `jit`, `grad` and `vmap`.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from esm1nv_jax.common.errors import UserError
from esm1nv_jax.data.tokenizer import (
    BOS,
    EOS,
    FIRST_RESIDUE,
    MASK,
    PAD,
    STANDARD,
    UNK,
    VOCABULARY,
    vocabulary,
)

POSITIONS_AT_ONCE = 64  # of a pseudo-log-likelihood, a copy of the sequence each


def from_residues(probabilities_LA):
    """fp32 [L + 2, V]: `<s>`, a distribution over amino acids for each of L residues, `</s>`."""
    inner_LV = jnp.pad(
        probabilities_LA, ((0, 0), (FIRST_RESIDUE, VOCABULARY - FIRST_RESIDUE - STANDARD))
    )
    start, end = (jax.nn.one_hot(jnp.array([token]), VOCABULARY) for token in (BOS, EOS))
    return jnp.concatenate([start, inner_LV, end])


def check(tokens_BT) -> None:
    """Raises UserError where tokens are neither ids [B, T] nor probabilities [B, T, V]."""
    integers = jnp.issubdtype(tokens_BT.dtype, jnp.integer)
    if tokens_BT.ndim == 2 and integers:
        return
    if tokens_BT.ndim != 3 or integers or tokens_BT.shape[-1] != VOCABULARY:
        raise UserError(
            f"tokens are {tokens_BT.dtype} {tokens_BT.shape}; give integer ids (rows, tokens), or "
            f"probabilities (rows, tokens, {VOCABULARY}) in the order of tokenizer.TOKENS"
        )


def is_real(tokens_BT):
    """bool [B, T]: where there is no padding, of ids or of probabilities [B, T, V]."""
    return tokens_BT != PAD if tokens_BT.ndim == 2 else tokens_BT[..., PAD] < 0.5


def embed(vocabulary_text: str, table_VD, probabilities_BTV, token_dropout: bool):
    """(mean embedding [B, T, D] of the tokens of each position, probability [B, T] of `<mask>`).

    A token that the model lacks is `<unk>`; with token dropout `<mask>` has no embedding. One-hot
    vectors give the embeddings of the ids to the bit.
    """
    missing = np.isin(np.arange(VOCABULARY), vocabulary(vocabulary_text).missing)
    missing_BT = jnp.sum(probabilities_BTV * missing, axis=-1)
    embedded = ~missing & ~(token_dropout & (np.arange(VOCABULARY) == MASK))
    weights_BTV = (probabilities_BTV * embedded).at[..., UNK].add(missing_BT)
    table_VD = table_VD[:VOCABULARY]
    x_BTD = jnp.matmul(weights_BTV, table_VD, precision=jax.lax.Precision.HIGHEST)
    return x_BTD, probabilities_BTV[..., MASK]


def pseudo_log_likelihood(
    logits_of: Callable, probabilities_TV, vocabulary_text: str, at_once: int = POSITIONS_AT_ONCE
):
    """sum_i sum_v p_i(v) log q(v | the sequence with `<mask>` at i), in nats: a scalar.

    It sums over the residues between `<s>` and `</s>` and over the amino-acid tokens that the model
    has; of one-hot vectors it is the pseudo-log-likelihood of the sequence (Salazar et al. 2020).
    A pass for each residue; in the backward, `at_once` copies of the sequence are in memory.

    Args:
      logits_of: probabilities [B, T, V] to logits [B, T, at least V], such as those of a `Model`.
      probabilities_TV: of one sequence, with `<s>` and `</s>`, without padding.
    """
    T, _ = probabilities_TV.shape
    known = np.arange(VOCABULARY) >= FIRST_RESIDUE
    known &= ~np.isin(np.arange(VOCABULARY), vocabulary(vocabulary_text).missing)

    @jax.checkpoint
    def term(position):
        is_masked_T1 = (jnp.arange(T) == position)[:, None]
        masked_TV = jnp.where(is_masked_T1, jax.nn.one_hot(MASK, VOCABULARY), probabilities_TV)
        log_q_V = jax.nn.log_softmax(logits_of(masked_TV[None])[0, position])[:VOCABULARY]
        return jnp.sum(probabilities_TV[position] * jnp.where(known, log_q_V, 0))

    return jnp.sum(jax.lax.map(term, jnp.arange(1, T - 1), batch_size=min(at_once, T - 2)))
