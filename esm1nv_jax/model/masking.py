"""Which residues are predicted, and what stands in their place.

In each sequence exactly max(1, round(rate x maskable)) residues are selected, those of smallest
hash (BERT's own rule of a fixed count), so that the number of predictions has a static bound.
Specials, padding and `<unk>` are never selected. Everything is drawn from `mask_bits`, one hash a
token that the input stream keys by (seed, epoch, example, index in the uncropped sequence), in
evaluation by the sequence itself: an example is masked alike in any row, batch or device count.
"""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from esm1nv_jax.common import hashing
from esm1nv_jax.common.errors import UserError
from esm1nv_jax.data import tokenizer

_KIND, _LETTER = (np.uint32(hashing.purpose(p)) for p in ("mask kind", "mask letter"))


@dataclasses.dataclass(frozen=True)
class MaskingConfig:
    """How a recipe corrupts its input. Of the selected residues, `mask` become `<mask>`, `random`
    another letter, the rest stay as they are."""

    rate: float
    mask: float
    random: float
    letters: int  # replacements are the first so many residues of the vocabulary
    may_repeat: bool  # whether a replacement may equal the original

    def __post_init__(self):
        if not 0 < self.rate <= 1:
            raise UserError(f"masking rate {self.rate} is not in (0, 1]; the card's is 0.15")
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


def recipe(name: str, rate: float | None = None) -> MaskingConfig:
    """A named recipe, at another rate if one is given."""
    if name not in RECIPES:
        raise UserError(f"masking recipe {name!r} is unknown; there are {', '.join(RECIPES)}")
    return RECIPES[name] if rate is None else dataclasses.replace(RECIPES[name], rate=rate)


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["inputs_BT", "index_BM", "targets_BM", "selected_BM", "masked_BM"],
    meta_fields=[],
)
@dataclasses.dataclass(frozen=True)
class Masked:
    """A corrupted batch. M is a static bound; entries beyond a row's own count are not selected."""

    inputs_BT: jax.Array  # int32: tokens with replacements
    index_BM: jax.Array  # int32: where the predictions stand in the row, ascending
    targets_BM: jax.Array  # int32: the original tokens there
    selected_BM: jax.Array  # bool: whether this entry is a prediction
    masked_BM: jax.Array  # bool: whether `<mask>` stands there in the input


def counts(rate: float, longest: int) -> np.ndarray:
    """int32 [longest + 1]: how many of n maskable residues are selected."""
    return np.array([0, *(max(1, round(rate * n)) for n in range(1, longest + 1))], np.int32)


def bound(rate: float, row_length: int) -> int:
    """The most predictions that a row can hold: M."""
    n = np.arange(1, max(2, row_length - 1))
    return int(row_length * np.max(counts(rate, n[-1])[1:] / (n + 2)))


def mask(config: MaskingConfig, tokens_BT, segment_ids_BT, mask_bits_BT) -> Masked:
    """Corrupts packed rows; `mask_bits_BT` is the uint32 hash that the stream gives each token."""
    B, T = tokens_BT.shape
    maskable_BT = tokens_BT >= tokenizer.FIRST_RESIDUE
    # Sort each row by (segment, hash), whatever may not be masked last; equal hashes by position.
    group_BT = jnp.where(maskable_BT & (segment_ids_BT > 0), segment_ids_BT, T + 1)
    place_BT = jnp.broadcast_to(jnp.arange(T, dtype=jnp.int32), (B, T))
    group_BT, _, index_BT = jax.lax.sort((group_BT, mask_bits_BT, place_BT), num_keys=3)
    first_BT = group_BT != jnp.pad(group_BT, ((0, 0), (1, 0)), constant_values=-1)[:, :-1]
    start_BT = jax.lax.cummax(jnp.where(first_BT, place_BT, 0), axis=1)
    last_BT = group_BT != jnp.pad(group_BT, ((0, 0), (0, 1)), constant_values=-1)[:, 1:]
    end_BT = jax.lax.cummin(jnp.where(last_BT, place_BT + 1, T), axis=1, reverse=True)
    quota_BT = jnp.asarray(counts(config.rate, T))[end_BT - start_BT]
    chosen_BT = (place_BT - start_BT < quota_BT) & (group_BT <= T)
    M = bound(config.rate, T)
    index_BM = jnp.sort(jnp.where(chosen_BT, index_BT, T), axis=1)[:, :M]
    selected_BM = index_BM < T
    index_BM = jnp.minimum(index_BM, T - 1)

    targets_BM = jnp.take_along_axis(tokens_BT, index_BM, axis=1)
    bits_BM = jnp.take_along_axis(mask_bits_BT, index_BM, axis=1)
    kind_BM = hashing.fold(bits_BM, _KIND)
    masked_BM = selected_BM & (kind_BM < _share(config.mask))
    random_BM = selected_BM & ~masked_BM & (kind_BM < _share(config.mask + config.random))
    replaced_BM = jnp.where(masked_BM, tokenizer.MASK, targets_BM)
    replaced_BM = jnp.where(random_BM, _letter(config, bits_BM, targets_BM), replaced_BM)
    # Entries that are not selected write to column T, which is then cut off.
    rows_B1 = jnp.arange(B, dtype=jnp.int32)[:, None]
    inputs_BT = jnp.pad(tokens_BT, ((0, 0), (0, 1)))
    inputs_BT = inputs_BT.at[rows_B1, jnp.where(selected_BM, index_BM, T)].set(replaced_BM)[:, :T]
    return Masked(inputs_BT, index_BM, targets_BM, selected_BM, masked_BM)


def _letter(config: MaskingConfig, bits, original):
    """A residue drawn from 16 bits of the hash: uniform to 4e-4."""
    draw = hashing.fold(bits, _LETTER) >> np.uint32(16)
    among = config.letters if config.may_repeat else config.letters - 1
    letter = ((draw * np.uint32(among)) >> np.uint32(16)).astype(jnp.int32)
    letter = letter + tokenizer.FIRST_RESIDUE
    return letter if config.may_repeat else letter + (letter >= original)


def _share(fraction: float) -> np.uint32:
    return np.uint32(min(round(fraction * 2**32), 2**32 - 1))
