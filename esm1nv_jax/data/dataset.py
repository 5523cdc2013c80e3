"""A data set at rest: one split, opened, with its lengths and its content at random access."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from functools import cache
from typing import Protocol

import numpy as np

from esm1nv_jax.data import fasta
from esm1nv_jax.errors import UserError

SPLITS = ("train", "validation", "test")
SAMPLE = "sample"
_SAMPLE_HELD_OUT = 500  # sequences in each of validation and test of the sample


class Source(Protocol):
    """A split. `lengths[i]` is the number of residues of example i, uncropped: uint16/uint32 [n].

    `fingerprint` is a hex digest of the content in its order: equal on every host, equal at resume.
    """

    lengths: np.ndarray
    fingerprint: str

    def ids(self, indices: Sequence[int] | np.ndarray) -> list[str]: ...

    def sequences(self, indices: Sequence[int] | np.ndarray) -> list[bytes]: ...


class MemorySource:
    """A split that fits in memory."""

    def __init__(self, records: Sequence[tuple[str, bytes]]):
        self._ids = [name for name, _ in records]
        self._sequences = [sequence for _, sequence in records]
        self.lengths = np.array([len(s) for s in self._sequences], np.uint32)
        digest = hashlib.sha256()
        for name, sequence in records:
            digest.update(b"%b\n%b\n" % (name.encode(), sequence))
        self.fingerprint = digest.hexdigest()

    def ids(self, indices: Sequence[int] | np.ndarray) -> list[str]:
        return [self._ids[i] for i in indices]

    def sequences(self, indices: Sequence[int] | np.ndarray) -> list[bytes]:
        return [self._sequences[i] for i in indices]


def open_split(data: str, split: str) -> Source:
    """Opens a split of the folder `data`, or of the embedded sample where `data` is 'sample'.

    Raises UserError where there is no such split or no whole data set.
    """
    if split not in SPLITS:
        raise UserError(f"no split {split!r}; there are {', '.join(SPLITS)}")
    if data == SAMPLE:
        return _sample(split)
    raise UserError(f"{data} is not a data set; make one: esm1nv prepare --fasta FILE --out {data}")


@cache
def _sample(split: str) -> MemorySource:
    """Held-out sequences are those with the smallest digests, so no order of the file matters."""
    records = sorted(fasta.sample(), key=lambda record: hashlib.sha256(record[1]).digest())
    held_out = 2 * _SAMPLE_HELD_OUT
    return MemorySource(
        {
            "validation": records[:_SAMPLE_HELD_OUT],
            "test": records[_SAMPLE_HELD_OUT:held_out],
            "train": records[held_out:],
        }[split]
    )
