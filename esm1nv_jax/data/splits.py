"""Which sequences are held out: those with the smallest keys, whole clusters together.

A key is a hash of the seed and of the cluster, or of the sequence itself where there are no
clusters; so the choice depends on the seed and the input alone, and the same sequence under two
names does not come to lie on both sides.
"""

from __future__ import annotations

import numpy as np

from esm1nv_jax.common.errors import UserError
from esm1nv_jax.common.hashing import fold, fold_all, purpose

TRAIN, VALIDATION, TEST, DROPPED = range(4)
NAMES = ("train", "validation", "test")


def keys(digests: np.ndarray, seed: int) -> np.ndarray:
    """Random keys, uint64 [n], for digests, uint64 [n]."""
    low, high = digests.astype(np.uint32), (digests >> np.uint64(32)).astype(np.uint32)
    words = [
        fold(fold(fold_all(seed, purpose("split"), half), high), low).astype(np.uint64)
        for half in range(2)
    ]
    return words[0] << np.uint64(32) | words[1]


def check_sizes(kept: int, validation: int, test: int) -> None:
    """Raises UserError, with sizes that fit, where nothing would be left to train on."""
    if kept == 0:
        raise UserError("no sequence was kept; see --min_length, --max_length and the input")
    if validation + test >= kept:
        held_out = max(kept // 10, min(kept - 1, (validation > 0) + (test > 0)))
        smaller = held_out * validation // (validation + test)
        if validation and held_out:
            smaller = max(1, smaller)
        raise UserError(
            f"--validation {validation} --test {test} leave nothing of {kept:,} sequences to train"
            f" on; for instance --validation {smaller} --test {held_out - smaller} fit"
        )


def choose(key: np.ndarray, validation: int, test: int, whole: bool) -> np.ndarray:
    """The split of each of the sequences with these keys: int8 [n].

    Sequences of one key stay together. If `whole`, without exception, so that a split may be a
    little off its size; else a last cluster is divided where that alone makes the size exact.
    """
    order = np.argsort(key, kind="stable")
    ordered = key[order]
    starts = np.flatnonzero(np.concatenate(([True], ordered[1:] != ordered[:-1])))
    sizes = np.diff(np.append(starts, len(key)))
    split = np.full(len(key), TRAIN, np.int8)
    free = np.ones(len(sizes), bool)
    for name, wanted in ((VALIDATION, validation), (TEST, test)):
        taken, left = _fill(sizes, free, wanted, whole)
        free[taken] = False
        # Positions, in the order of keys, of all members of the clusters taken.
        total = int(sizes[taken].sum())
        ends = np.cumsum(sizes[taken])
        offsets = np.arange(total) - np.repeat(ends - sizes[taken], sizes[taken])
        split[order[np.repeat(starts[taken], sizes[taken]) + offsets]] = name
        if left and not whole:
            split[order[split[order] == TRAIN][:left]] = name
    return split


def _fill(sizes: np.ndarray, free: np.ndarray, wanted: int, whole: bool) -> tuple[np.ndarray, int]:
    """(clusters that together come nearest to `wanted`, how many sequences are still wanted)."""
    candidates = np.flatnonzero(free)
    total = np.cumsum(sizes[candidates])
    n = int(np.searchsorted(total, wanted, side="right"))  # the first n fit as a whole
    taken = candidates[:n].tolist()
    left = wanted - (int(total[n - 1]) if n else 0)
    passed = []
    for cluster in candidates[n:].tolist():
        if not left:
            break
        if sizes[cluster] <= left:
            taken.append(cluster)
            left -= int(sizes[cluster])
        else:
            passed.append(cluster)
    if whole and left and passed:
        smallest = min(passed, key=lambda cluster: sizes[cluster])
        if sizes[smallest] - left < left:  # a little too many is nearer than too few
            taken.append(smallest)
            left = 0
    return np.array(taken, np.int64), left
