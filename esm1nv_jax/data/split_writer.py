"""From the units that the workers wrote to the shards, lengths and clusters of three splits."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from esm1nv_jax.common.errors import UserError
from esm1nv_jax.data import first_pass, splits, tfds_metadata
from esm1nv_jax.data.clusters import Groups
from esm1nv_jax.data.records import Writer, disk_error, open_shard, sequence_of

_READ = 512  # records read together


@dataclasses.dataclass
class Split:
    """A split as it lies in the folder. `letters` counts LETTERS; lists hold one entry a shard."""

    name: str
    lengths: list[np.ndarray] = dataclasses.field(default_factory=list)
    keys: list[np.ndarray] = dataclasses.field(default_factory=list)
    shards: list[Path] = dataclasses.field(default_factory=list)
    checksums: list[str] = dataclasses.field(default_factory=list)
    letters: np.ndarray = dataclasses.field(
        default_factory=lambda: np.zeros(len(first_pass.LETTERS), np.int64)
    )


def lengths_file(split: str) -> str:
    return f"lengths-{split}.npy"


def groups_files(split: str) -> tuple[str, str]:
    return f"clusters-{split}-first.npy", f"clusters-{split}-member.npy"


class _Roll:
    """Writes records of a split into shards of about `shard_bytes`."""

    def __init__(self, split: Split, folder: Path, shard_bytes: int):
        self.split, self.folder, self.shard_bytes = split, folder, shard_bytes
        self.writer: Writer | None = None
        self.bytes = 0

    def write(self, records: list[bytes], lengths: np.ndarray, keys: np.ndarray) -> None:
        if not records:
            return
        if self.writer is None:
            self.writer, self.bytes = Writer(self.folder / f"{self.split.name}-rolled"), 0
        self.writer.write_all(records)
        self.split.lengths.append(lengths)
        self.split.keys.append(keys)
        if self.split.name != "train":
            self.split.letters += letters_of(records, lengths)
        self.bytes += sum(map(len, records))
        if self.bytes >= self.shard_bytes:
            self.end()

    def end(self) -> None:
        if self.writer is not None:
            self.writer.close()
            add_shard(self.split, self.writer.path)
            self.writer = None


def add_shard(split: Split, path: Path, checksum: str = "") -> None:
    """Makes `path` the next shard of a split, under a name that says so."""
    own = path.with_name(f"{split.name}-shard-{len(split.shards):05d}")
    path.rename(own)
    split.shards.append(own)
    split.checksums.append(checksum or first_pass.checksum(own))


def letters_of(records: list[bytes], lengths: np.ndarray) -> np.ndarray:
    """Composition of records whose lengths are known: int64 [27]."""
    sequences = [sequence_of(r, n) for r, n in zip(records, lengths.tolist(), strict=True)]
    return first_pass.composition(b"".join(sequences))


def lay_out(
    folder: Path,
    units: list[first_pass.Unit],
    split_of: np.ndarray,
    maybe: np.ndarray,
    lengths: np.ndarray,
    keys: np.ndarray,
    shard_bytes: int,
    advance: Callable[[int], None],
) -> dict[str, Split]:
    """Turns the files of the units into shards. Arrays are [kept], in the order of the input.

    The shards that the workers wrote for training stay as they are, but for dropped duplicates.
    What may have been held out follows them, or goes into its split; `advance` is called with the
    number of such sequences as they are written.
    """
    out = {name: Split(name) for name in splits.NAMES}
    rolls = {name: _Roll(out[name], folder, shard_bytes) for name in splits.NAMES}
    train, end = out["train"], 0
    train.letters += sum(unit.letters for unit in units)  # less what goes elsewhere
    spans = []
    for unit in units:
        start, end = end, end + sum(unit.sources.values())
        spans.append((unit, start, end))
        chosen = np.flatnonzero(~maybe[start:end]) + start
        path = first_pass.shard(folder, unit.number)
        if not chosen.size:
            continue
        dropped = split_of[chosen] == splits.DROPPED
        if dropped.any():
            roll = _Roll(train, folder, 1 << 62)
            for records, here in _read(path, chosen):
                keep = split_of[here] != splits.DROPPED
                train.letters -= letters_of(_pick(records, ~keep), lengths[here[~keep]])
                roll.write(_pick(records, keep), lengths[here[keep]], keys[here[keep]])
            roll.end()
            path.unlink()
        else:
            train.lengths.append(lengths[chosen])
            train.keys.append(keys[chosen])
            add_shard(train, path, unit.checksum)
    for unit, start, end in spans:
        chosen = np.flatnonzero(maybe[start:end]) + start
        if not chosen.size:
            continue
        path = first_pass.maybe_shard(folder, unit.number)
        for records, here in _read(path, chosen):
            advance(len(here))
            gone = split_of[here] == splits.DROPPED
            train.letters -= letters_of(_pick(records, gone), lengths[here[gone]])
            for number, name in enumerate(splits.NAMES):
                keep = split_of[here] == number
                rolls[name].write(_pick(records, keep), lengths[here[keep]], keys[here[keep]])
        path.unlink()
    for roll in rolls.values():
        roll.end()
    train.letters -= out["validation"].letters + out["test"].letters
    return out


def _read(path: Path, index: np.ndarray) -> Iterator[tuple[list[bytes], np.ndarray]]:
    """(records, their `index`) of a whole file, a few hundred at a time."""
    reader = open_shard(path)
    if reader.num_records() != len(index):
        raise UserError(f"{path} holds {reader.num_records()} of {len(index)} records")
    for start in range(0, len(index), _READ):
        here = index[start : start + _READ]
        yield reader.read(start, start + len(here)), here


def _pick(records: list[bytes], keep: np.ndarray) -> list[bytes]:
    return [records[i] for i in np.flatnonzero(keep).tolist()]


def save(folder: Path, out: dict[str, Split], with_clusters: bool) -> None:
    """Gives the shards their final names and writes the lengths, the clusters and TFDS's metadata.

    In a moment of its own, so that no half-made folder bears a name that TFDS would read.
    """
    try:
        for split in out.values():
            for i, path in enumerate(split.shards):
                name = tfds_metadata.shard_name(split.name, i, len(split.shards))
                split.shards[i] = path.rename(folder / name)
            lengths = np.concatenate([*split.lengths, np.zeros(0, np.uint32)])
            split.lengths = [lengths]
            narrow = np.uint16 if lengths.max(initial=0) < 1 << 16 else np.uint32
            np.save(folder / lengths_file(split.name), lengths.astype(narrow))
        if with_clusters:
            train = out["train"]
            groups = Groups.of(np.concatenate(train.keys))
            for name, values in zip(
                groups_files("train"), (groups.first, groups.member), strict=True
            ):
                np.save(folder / name, values)
        filled = [split for split in out.values() if split.shards]
        sizes = {s.name: sum(path.stat().st_size for path in s.shards) for s in filled}
        tfds_metadata.write(
            folder,
            "Protein sequences, prepared by `esm1nv prepare`.",
            {split.name: (shard_counts(split), sizes[split.name]) for split in filled},
        )
    except OSError as failure:
        raise disk_error(folder, failure) from failure


def shard_counts(split: Split) -> list[int]:
    return [open_shard(path).num_records() for path in split.shards]
