"""Masked language modelling, apart from the model: which residues are predicted, what stands in
their place, and the sums of loss and accuracy.

In each sequence exactly max(1, round(rate x maskable)) residues become targets, those of smallest
hash (BERT's own rule of a fixed count), so that the number of predictions has a static bound.
Specials, padding and `<unk>` are never targets. Everything is drawn from `mask_bits`, one hash a
token that the input stream keys by (seed, epoch, example, index in the uncropped sequence), in
evaluation by the sequence itself: an example is masked alike in any row, batch or device count.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from esm1nv_jax.common import hashing
from esm1nv_jax.common.errors import UserError
from esm1nv_jax.data import tokenizer
from esm1nv_jax.data.packing import StreamConfig

_KIND, _LETTER = (np.uint32(hashing.purpose(p)) for p in ("mask kind", "mask letter"))


@dataclasses.dataclass(frozen=True)
class MaskingConfig:
    """How a recipe corrupts its input. Of the targets, a share of `mask` become `<mask>`, `random`
    another letter, the rest stay as they are."""

    rate: float
    mask: float
    random: float
    letters: int  # replacements are the first so many residues of the vocabulary
    may_repeat: bool  # whether a replacement may equal the original
    final_rate: float = 0.0  # in training the rate goes there linearly; 0: it stays

    @property
    def highest_rate(self) -> float:
        return max(self.rate, self.final_rate)

    def __post_init__(self):
        if not 0 < self.rate <= 1:
            raise UserError(f"masking rate {self.rate} is not in (0, 1]; the card's is 0.15")
        if not 0 <= self.final_rate <= 1:
            raise UserError(
                f"masking final_rate {self.final_rate} is not in [0, 1]; 0: the rate stays"
            )
        if self.mask < 0 or self.random < 0 or self.mask + self.random > 1 + 1e-9:
            raise UserError(
                f"masking fractions mask={self.mask}, random={self.random} must be at least 0 and "
                "sum to at most 1"
            )


RECIPES = {
    # The model card: 15 %, as BERT.
    "card": MaskingConfig(0.15, 0.8, 0.1, letters=tokenizer.STANDARD, may_repeat=True),
    # The configuration shipped from 2022 to May 2024.
    "shipped": MaskingConfig(0.10, 0.5, 0.5, letters=len(tokenizer.RESIDUES), may_repeat=False),
}


def recipe(name: str, rate: float | None = None, final_rate: float = 0.0) -> MaskingConfig:
    """A named recipe, at another rate if one is given."""
    if name not in RECIPES:
        raise UserError(f"masking recipe {name!r} is unknown; there are {', '.join(RECIPES)}")
    rate = RECIPES[name].rate if rate is None else rate
    return dataclasses.replace(RECIPES[name], rate=rate, final_rate=final_rate)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Masked:
    """A corrupted batch. M is a static bound, so that not every entry is a target."""

    inputs_BT: jax.Array  # int32: tokens with replacements
    prediction_positions_BM: jax.Array  # int32: columns of the targets in their row, ascending
    targets_BM: jax.Array  # int32: the original tokens there
    is_target_BM: jax.Array  # bool: whether this entry is predicted
    is_masked_BM: jax.Array  # bool: whether `<mask>` stands there in the input


def target_counts(rate: float, longest: int) -> np.ndarray:
    """int32 [longest + 1]: how many of n maskable residues are targets."""
    return np.array([0, *(max(1, round(rate * n)) for n in range(1, longest + 1))], np.int32)


def max_targets_of_any(rate: float, row_length: int) -> int:
    """The most targets that a row of sequences of any lengths can hold: M."""
    n = np.arange(1, max(2, row_length - 1))
    return int(np.max(np.int64(row_length) * target_counts(rate, n[-1])[1:] // (n + 2)))


def max_targets(rate: float, stream: StreamConfig, lengths: np.ndarray) -> int:
    """A bound on the targets of a row of sequences of these lengths, each at most once in a row.

    The sequences with most targets a token fill the row, the last of them in part. Few proteins
    have a handful of residues, of which one is a target always: this is about half as much as
    `max_targets_of_any`.

    Args:
      rate: the highest share of targets.
      stream: how the sequences are cropped and laid into rows.
      lengths: residues, uncropped: [sequences].
    """
    T, sequences = stream.row_length, np.zeros(stream.max_residues + 1, np.int64)
    for some in np.array_split(lengths, -(-len(lengths) // 2**20) or 1):  # bincount copies to int64
        cropped = np.minimum(some, np.int64(stream.max_residues))
        sequences += np.bincount(cropped, minlength=len(sequences))
    n = np.flatnonzero(sequences[1:]) + 1
    # A rate that changes is computed in fp32, which may round a half up.
    counts = np.maximum(1, np.floor(rate * n + 0.51))
    if not stream.packed:
        return int(np.max(counts, initial=1))
    densest = np.argsort(-counts / (n + 2), kind="stable")
    n, counts = n[densest], counts[densest]
    tokens = (n + 2) * sequences[n]
    taken = np.clip(T - (np.cumsum(tokens) - tokens), 0, tokens)
    most = int(np.sum(taken * counts / (n + 2)) + 1e-6)
    return min(max(8, -(-most // 8) * 8), T)  # a multiple of 8, as accelerators lay out arrays


def mask(
    config: MaskingConfig,
    tokens_BT,
    segment_ids_BT,
    mask_bits_BT,
    progress=None,
    most: int | None = None,
) -> Masked:
    """Corrupts packed rows.

    Args:
      config: the recipe.
      tokens_BT: int32 token ids.
      segment_ids_BT: int32; 0 is padding.
      mask_bits_BT: the uint32 hash that the stream gives each token.
      progress: how far a rate that changes has come, a scalar in 0..1; by default to its end.
      most: a bound on the targets of a row, M; by default that of sequences of any lengths.
    """
    B, T = tokens_BT.shape
    is_maskable_BT = tokens_BT >= tokenizer.FIRST_RESIDUE
    # Sort each row by (segment, hash), with what may not be masked last; equal hashes by position.
    group_BT = jnp.where(is_maskable_BT & (segment_ids_BT > 0), segment_ids_BT, T + 1)
    rank_BT = jnp.broadcast_to(jnp.arange(T, dtype=jnp.int32), (B, T))
    group_BT, _, position_BT = jax.lax.sort((group_BT, mask_bits_BT, rank_BT), num_keys=3)
    is_first_BT = group_BT != jnp.pad(group_BT, ((0, 0), (1, 0)), constant_values=-1)[:, :-1]
    start_BT = jax.lax.cummax(jnp.where(is_first_BT, rank_BT, 0), axis=1)
    is_last_BT = group_BT != jnp.pad(group_BT, ((0, 0), (0, 1)), constant_values=-1)[:, 1:]
    end_BT = jax.lax.cummin(jnp.where(is_last_BT, rank_BT + 1, T), axis=1, reverse=True)
    if config.final_rate and progress is not None:
        rate = config.rate + (config.final_rate - config.rate) * progress
        counts = jnp.maximum(jnp.round(rate * jnp.arange(T + 1)), 1).astype(jnp.int32)
        highest = config.highest_rate
    else:
        highest = config.final_rate or config.rate
        counts = jnp.asarray(target_counts(highest, T))
    quota_BT = counts[end_BT - start_BT]
    is_chosen_BT = (rank_BT - start_BT < quota_BT) & (group_BT <= T)
    M = most or max_targets_of_any(highest, T)
    position_BM = jnp.sort(jnp.where(is_chosen_BT, position_BT, T), axis=1)[:, :M]
    is_target_BM = position_BM < T
    position_BM = jnp.minimum(position_BM, T - 1)

    targets_BM = jnp.take_along_axis(tokens_BT, position_BM, axis=1)
    bits_BM = jnp.take_along_axis(mask_bits_BT, position_BM, axis=1)
    kind_BM = hashing.fold(bits_BM, _KIND)
    is_masked_BM = is_target_BM & (kind_BM < _threshold(config.mask))
    is_random_BM = is_target_BM & (kind_BM < _threshold(config.mask + config.random))
    is_random_BM &= ~is_masked_BM
    replaced_BM = jnp.where(is_masked_BM, tokenizer.MASK, targets_BM)
    replaced_BM = jnp.where(is_random_BM, _random_letter(config, bits_BM, targets_BM), replaced_BM)
    # Entries that are no targets write to column T, which is then cut off.
    rows_B1 = jnp.arange(B, dtype=jnp.int32)[:, None]
    inputs_BT = jnp.pad(tokens_BT, ((0, 0), (0, 1)))
    column_BM = jnp.where(is_target_BM, position_BM, T)
    inputs_BT = inputs_BT.at[rows_B1, column_BM].set(replaced_BM)[:, :T]
    return Masked(inputs_BT, position_BM, targets_BM, is_target_BM, is_masked_BM)


def _random_letter(config: MaskingConfig, bits, original):
    """A residue drawn from 16 bits of the hash: uniform to 4e-4."""
    draw = hashing.fold(bits, _LETTER) >> np.uint32(16)
    choices = config.letters if config.may_repeat else config.letters - 1
    letter = ((draw * np.uint32(choices)) >> np.uint32(16)).astype(jnp.int32)
    letter = letter + tokenizer.FIRST_RESIDUE
    return letter if config.may_repeat else letter + (letter >= original)


def _threshold(fraction: float) -> np.uint32:
    return np.uint32(min(round(fraction * 2**32), 2**32 - 1))


def cross_entropy(logits_BMV, targets_BM):
    """-log p(target) in nats: fp32 [B, M]."""
    logits_BMV = logits_BMV.astype(jnp.float32)
    target_logits_BM = jnp.take_along_axis(logits_BMV, targets_BM[..., None], axis=-1)[..., 0]
    return jax.nn.logsumexp(logits_BMV, axis=-1) - target_logits_BM


def cross_entropy_sums(logits_BMV, masked: Masked) -> dict[str, jax.Array]:
    """fp32 scalars from which perplexity and accuracy are computed; they add up over rows, devices
    and hosts. Over all targets, and over `<mask>` positions only (`_mask`, `_masked`)."""
    loss_BM = jnp.where(masked.is_target_BM, cross_entropy(logits_BMV, masked.targets_BM), 0)
    is_correct_BM = jnp.argmax(logits_BMV, axis=-1) == masked.targets_BM
    return {
        "loss": jnp.sum(loss_BM),
        "num_targets": jnp.sum(masked.is_target_BM, dtype=jnp.float32),
        "loss_mask": jnp.sum(jnp.where(masked.is_masked_BM, loss_BM, 0)),
        "num_masked": jnp.sum(masked.is_masked_BM, dtype=jnp.float32),
        "num_correct_masked": jnp.sum(is_correct_BM & masked.is_masked_BM, dtype=jnp.float32),
    }
