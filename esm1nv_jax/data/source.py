"""One split of a data set on disk or in memory: its lengths, and its records at random access."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Protocol

import numpy as np

from esm1nv_jax.common import files
from esm1nv_jax.common.errors import UserError
from esm1nv_jax.common.hashing import fold_all, permute, purpose
from esm1nv_jax.data import fasta, manifest
from esm1nv_jax.data.records import FEATURES, decode, open_shard, sequence_of
from esm1nv_jax.data.splits import NAMES as SPLITS
from esm1nv_jax.data.splits import Groups

SAMPLE = "sample"
_SAMPLE_HELD_OUT = 500  # sequences in each of validation and test of the bundled sample


@dataclasses.dataclass(frozen=True, eq=False)
class Labels:
    """Labels of n examples, int32 classes or float32 values; -1 or NaN where one is not used.

    values: one a residue, those of all examples after each other; or one a protein, [n], or [n, K].
    offsets: int64 [n + 1], where each example's labels begin; None for one a protein.
    """

    values: np.ndarray
    offsets: np.ndarray | None

    @property
    def padding(self) -> float:
        """The value of a label that is not used."""
        return np.nan if self.values.dtype.kind == "f" else -1

    def of(self, example: int) -> np.ndarray:
        """The labels of the residues of one example, [residues]."""
        assert self.offsets is not None
        return self.values[self.offsets[example] : self.offsets[example + 1]]

    def take(self, chosen: np.ndarray) -> Labels:
        """The labels of the examples `chosen`, in that order."""
        if self.offsets is None:
            return Labels(self.values[chosen], None)
        parts = [self.of(i) for i in chosen.tolist()]
        offsets = np.concatenate(([0], np.cumsum([len(part) for part in parts])))
        return Labels(np.concatenate(parts), offsets)


class Source(Protocol):
    """A split of n examples.

    lengths: residues of each example, uncropped: uint16 or uint32 [n].
    fingerprint: hex digest of the records in their order, by which a resumed run knows its data.
    groups: the clusters of the examples, where they are known.
    labels: the labels of the examples, where they have any.
    """

    lengths: np.ndarray
    fingerprint: str
    groups: Groups | None
    labels: Labels | None

    def ids(self, indices: Sequence[int] | np.ndarray) -> list[str]:
        """The ids of the examples `indices`, [len(indices)]."""

    def sequences(self, indices: Sequence[int] | np.ndarray) -> list[bytes]:
        """The whole sequences of the examples `indices`, [len(indices)]."""


class MemorySource:
    """A split that is held in memory: (id, sequence) of each example, and labels if it has any."""

    groups: Groups | None = None

    def __init__(self, records: Sequence[tuple[str, bytes]], labels: Labels | None = None):
        self.labels = labels
        self._ids = [name for name, _ in records]
        self._sequences = [sequence for _, sequence in records]
        self.lengths = np.array([len(s) for s in self._sequences], np.uint32)
        digest = hashlib.sha256()
        for name, sequence in records:
            digest.update(b"%b\n%b\n" % (name.encode(), sequence))
        if labels is not None:
            digest.update(labels.values.tobytes())
        self.fingerprint = digest.hexdigest()

    def ids(self, indices: Sequence[int] | np.ndarray) -> list[str]:
        return [self._ids[i] for i in indices]

    def sequences(self, indices: Sequence[int] | np.ndarray) -> list[bytes]:
        return [self._sequences[i] for i in indices]


class ShardSource:
    """A split of a folder that `esm1nv prepare` made. Threads may read from it at the same time.

    It is a random access source of Grain: it has a length, `[i]` is the record as a dictionary, and
    a process that receives it opens the files anew. So `grain.MapDataset.source(open_split(folder,
    "train"))` works, also with `mp_prefetch` and in a `grain.DataLoader` with workers.

    Raises UserError where the folder is no whole data set or its split is empty.
    """

    labels: Labels | None = None

    def __init__(self, folder: Path, split: str):
        self._folder, self._split = folder, split
        entry = manifest.read(folder)["splits"][split]
        if not entry["examples"]:
            raise UserError(
                f"{folder} was prepared without a sequence in {split}; prepare it again with"
                f" --{split} 500, for instance"
            )
        self.fingerprint = entry["fingerprint"]
        self._ends = np.cumsum([shard["examples"] for shard in entry["shards"]])
        self._readers = []
        # All shards are opened now: a truncated one reads as an empty one, without an error.
        for shard in entry["shards"]:
            path, count = folder / shard["file"], shard["examples"]
            self._readers.append(open_shard(path))
            if (found := self._readers[-1].num_records()) != count:
                raise UserError(
                    f"{path} holds {found:,} records, the manifest says {count:,};"
                    " it is cut short: copy or prepare the data set again"
                )
        lengths = folder / manifest.lengths_file(split)
        self.lengths = _load(lengths)
        if len(self.lengths) != entry["examples"]:
            raise UserError(f"{lengths} belongs to another data set; prepare it again")
        first, member = (folder / name for name in manifest.groups_files(split))
        self.groups = Groups(_load(first), _load(member)) if first.exists() else None

    def __reduce__(self):
        return type(self), (self._folder, self._split)

    def __repr__(self) -> str:
        """Grain's DataLoader compares this with the one in its checkpoint."""
        return f"ShardSource({str(self._folder)!r}, {self._split!r})"

    def _records(self, indices: Sequence[int] | np.ndarray) -> list[bytes]:
        """Records in the order of `indices`, read in the order in which they lie on disk."""
        indices = np.asarray(indices, np.int64)
        out: list[bytes] = [b""] * len(indices)
        order = np.argsort(indices, kind="stable")
        ascending = indices[order]
        shards = np.searchsorted(self._ends, ascending, side="right")
        local = ascending - np.concatenate(([0], self._ends))[shards]
        for i, shard, at in zip(order.tolist(), shards.tolist(), local.tolist(), strict=True):
            # `read([at])` looks at every record of the shard; `read(at, at + 1)` does not.
            out[i] = self._readers[shard].read(at, at + 1)[0]
        return out

    def ids(self, indices: Sequence[int] | np.ndarray) -> list[str]:
        return [decode(r)[0].decode("utf-8", "backslashreplace") for r in self._records(indices)]

    def sequences(self, indices: Sequence[int] | np.ndarray) -> list[bytes]:
        lengths = self.lengths[np.asarray(indices, np.int64)].tolist()
        pairs = zip(self._records(indices), lengths, strict=True)
        out = [sequence_of(record, length) or b"" for record, length in pairs]
        if b"" in out:  # `prepare` writes no empty sequence
            raise UserError(
                f"a record of {self._folder} is not as long as the lengths file says;"
                " run esm1nv prepare --verify"
            )
        return out

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, index: int) -> dict[str, bytes]:
        (record,) = self._records([index])
        return dict(zip(FEATURES, decode(record), strict=True))


def _load(path: Path) -> np.ndarray:
    try:
        return np.load(path, mmap_mode="r")
    except (OSError, ValueError) as failure:
        raise UserError(f"cannot read {path}: {failure}; prepare the data set again") from failure


def subset(source: Source, size: int) -> Source:
    """`size` examples of a split, drawn by a fixed key and held in memory; all where it is 0.

    So many sequences, not batches: the same ones for every batch size and number of devices.
    """
    n = len(source.lengths)
    if not size or size >= n:
        return source
    key = fold_all(0, purpose("evaluation subset"))
    chosen = np.sort(permute(np.arange(size), n, key))
    records = list(zip(source.ids(chosen), source.sequences(chosen), strict=True))
    return MemorySource(records, None if source.labels is None else source.labels.take(chosen))


def open_split(data: str, split: str) -> Source:
    """Opens a split of the folder `data`, or of the bundled sample where `data` is 'sample'.

    Raises UserError where there is no such split or no whole data set.
    """
    if split not in SPLITS:
        raise UserError(f"no split {split!r}; there are {', '.join(SPLITS)}")
    if data == SAMPLE:
        return _sample(split)
    if files.is_remote(data):
        raise UserError(f"{data} is no folder on a disk; copy the data set to one, on every host")
    return ShardSource(Path(data), split)


@cache
def _sample(split: str) -> MemorySource:
    """A split of the bundled sample. Sequences with the smallest digests are held out, so that the
    order of the file does not matter."""
    records = sorted(fasta.sample(), key=lambda record: hashlib.sha256(record[1]).digest())
    n = _SAMPLE_HELD_OUT
    parts = {"validation": slice(n), "test": slice(n, 2 * n), "train": slice(2 * n, None)}
    return MemorySource(records[parts[split]])
