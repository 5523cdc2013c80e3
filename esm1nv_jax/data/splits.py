"""Which sequences are held out: those with the smallest keys, whole clusters together.

A key is a hash of the seed and of the cluster, or of the sequence itself where there are no
clusters. So the choice depends on the seed and the input alone, and one sequence under two ids does
not end up in two splits.
"""

from __future__ import annotations

import dataclasses

import numpy as np

from esm1nv_jax.common.errors import UserError
from esm1nv_jax.common.hashing import fold, fold_all, purpose

TRAIN, VALIDATION, TEST, DROPPED = range(4)
NAMES = ("train", "validation", "test")
DEFAULT_SIZES = (5_000, 1_000_000)  # of validation and test: those of the model card
DEFAULT_SHARE = 0.05  # where the corpus is too small for these

Size = int | float | None  # sequences, a share of them, or the default


@dataclasses.dataclass(frozen=True)
class SplitAssignment:
    """The split of every sequence that was read. Arrays are [n], in the order of the input.

    split: TRAIN, VALIDATION, TEST or DROPPED (a duplicate), int8. candidate: whether it was a
    holdout candidate in the first pass, bool. keys: uint64. lengths: residues, uint32.
    """

    split: np.ndarray
    candidate: np.ndarray
    keys: np.ndarray
    lengths: np.ndarray


def keys(digests: np.ndarray, seed: int) -> np.ndarray:
    """Random keys, uint64 [n], for digests, uint64 [n]."""
    low, high = digests.astype(np.uint32), (digests >> np.uint64(32)).astype(np.uint32)
    words = [
        fold(fold(fold_all(seed, purpose("split"), half), high), low).astype(np.uint64)
        for half in range(2)
    ]
    return words[0] << np.uint64(32) | words[1]


def resolve_sizes(sequences: int, validation: Size, test: Size) -> tuple[int, int]:
    """The numbers of sequences to hold out for validation and test, of `sequences` in all.

    The default is the card's size, at most 5 % of the sequences and, from three on, at least one.
    Raises UserError, with sizes that fit, where nothing would be left to train on.
    """
    least = int(sequences > 2)
    default = [min(n, max(int(DEFAULT_SHARE * sequences), least)) for n in DEFAULT_SIZES]
    sizes = [
        default[i] if size is None else round(size * sequences) if 0 < size < 1 else int(size)
        for i, size in enumerate((validation, test))
    ]
    if sum(sizes) < sequences:
        return sizes[0], sizes[1]
    if not sequences:
        raise UserError("no sequence was kept; see --min-length, --max-length and the input")
    raise UserError(
        f"--validation {sizes[0]} --test {sizes[1]} leave nothing of {sequences:,} sequences to "
        f"train on; for instance --validation {default[0]} --test {default[1]} fit"
    )


def assign(key: np.ndarray, validation: int, test: int, whole: bool) -> np.ndarray:
    """The split of each of the sequences with these keys: int8 [n].

    Sequences of one key stay together: without exception if `whole`, so that a split may differ a
    little from its size; else a last cluster is divided where that alone makes the size exact.
    """
    order = np.argsort(key, kind="stable")
    ordered = key[order]
    starts = np.flatnonzero(np.concatenate(([True], ordered[1:] != ordered[:-1])))
    sizes = np.diff(np.append(starts, len(key)))
    split = np.full(len(key), TRAIN, np.int8)
    free = np.ones(len(sizes), bool)
    for name, size in ((VALIDATION, validation), (TEST, test)):
        taken, left = _fill(sizes, free, size, whole)
        free[taken] = False
        # Positions, in the order of keys, of all members of the clusters taken.
        ends = np.cumsum(sizes[taken])
        offsets = np.arange(sizes[taken].sum()) - np.repeat(ends - sizes[taken], sizes[taken])
        split[order[np.repeat(starts[taken], sizes[taken]) + offsets]] = name
        if left and not whole:
            split[order[split[order] == TRAIN][:left]] = name
    return split


def _fill(sizes: np.ndarray, free: np.ndarray, wanted: int, whole: bool) -> tuple[np.ndarray, int]:
    """(clusters that together come nearest to `wanted`, how many sequences are still missing)."""
    candidates = np.flatnonzero(free)
    total = np.cumsum(sizes[candidates])
    n = int(np.searchsorted(total, wanted, side="right"))  # the first n fit as a whole
    taken = candidates[:n].tolist()
    left = wanted - (int(total[n - 1]) if n else 0)
    too_large = []
    for cluster in candidates[n:].tolist():
        if not left:
            break
        if sizes[cluster] <= left:
            taken.append(cluster)
            left -= int(sizes[cluster])
        else:
            too_large.append(cluster)
    if whole and left and too_large:
        smallest = min(too_large, key=lambda cluster: sizes[cluster])
        # A little too many is nearer than too few, and one cluster than an empty split.
        if sizes[smallest] - left < left or not taken:
            taken.append(smallest)
            left = 0
    return np.array(taken, np.int64), left
