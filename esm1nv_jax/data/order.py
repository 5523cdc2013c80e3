"""The order of an epoch: a random permutation that is computed where it is looked at.

`np.random.permutation(52e6)` takes seconds and 416 MB in every process, and must be made anew to
resume. Here the example at any place of any epoch costs a tenth of a microsecond and no memory: a
Feistel network over the bits of the index, keyed by (seed, purpose, epoch), walked until it falls
inside the range (Black and Rogaway, "Ciphers with arbitrary finite domains", 2002).
"""

from __future__ import annotations

import numpy as np

from esm1nv_jax.common.hashing import fold, fold_all, purpose

_ROUNDS = 4  # of two half-rounds each; two would already pass the tests of this file


def permute(index: np.ndarray, n: int, key: np.uint32) -> np.ndarray:
    """Where a random permutation of 0..n-1, chosen by `key`, sends each `index`: int64, same shape.

    `index` may hold any part of 0..n-1, in any order; n is at most 2**31.
    """
    if not 0 < n <= 2**31:
        raise ValueError(f"a permutation is of 1..2**31 things, found {n}")
    bits = max(2, (n - 1).bit_length())  # the network permutes 0..2**bits - 1, less than 2n
    low, high = bits // 2, bits - bits // 2
    keys = [(fold(key, np.uint32(2 * r)), fold(key, np.uint32(2 * r + 1))) for r in range(_ROUNDS)]
    shift_low, shift_high = np.uint32(32 - low), np.uint32(32 - high)
    low_mask, low_bits = np.uint32((1 << low) - 1), np.uint32(low)

    def network(x: np.ndarray) -> np.ndarray:
        left, right = x >> low_bits, x & low_mask
        for key_left, key_right in keys:
            left = left ^ (fold(key_left, right) >> shift_high)
            right = right ^ (fold(key_right, left) >> shift_low)
        return (left << low_bits) | right

    out = network(np.asarray(index).astype(np.uint32))
    while (outside := out >= n).any():
        out[outside] = network(out[outside])
    return out.astype(np.int64)


class Order:
    """The order in which an epoch visits `n` things.

    With `block` 1 each thing moves by itself. A larger `block` is for disks where reading at random
    is dear: blocks of consecutive records are permuted, and within each stretch of `near` places
    the records are shuffled, so that a stretch touches `near / block` places on the disk.
    """

    def __init__(self, n: int, seed: int, epoch: int, block: int = 1, near: int = 65_536):
        self.n, self.block, self.near = n, block, near
        self.key = fold_all(seed, purpose("order"), epoch)
        if block > 1:
            self.near_key = fold_all(seed, purpose("order within a stretch"), epoch)
            blocks = -(-n // block)
            self.first = permute(np.arange(blocks), blocks, self.key) * block
            sizes = np.minimum(self.first + block, n) - self.first  # one of them may be shorter
            self.ends = np.cumsum(sizes)

    def __call__(self, start: int, stop: int) -> np.ndarray:
        """The things at places start..stop-1 (cut at n): int64 [stop - start]."""
        places = np.arange(start, min(stop, self.n))
        if self.block == 1:
            return permute(places, self.n, self.key) if places.size else places
        for stretch in np.unique(places // self.near):
            here = places // self.near == stretch
            base = stretch * self.near
            size = min(self.near, self.n - base)
            key = fold(self.near_key, np.uint32(stretch))
            places[here] = base + permute(places[here] - base, int(size), key)
        which = np.searchsorted(self.ends, places, side="right")
        before = np.concatenate(([0], self.ends))[which]
        return self.first[which] + places - before
