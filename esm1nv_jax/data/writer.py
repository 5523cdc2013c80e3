"""Writes a prepared data set: shards, lengths and clusters of each split, and TFDS's metadata."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from esm1nv_jax.common.errors import UserError
from esm1nv_jax.data import records, splits
from esm1nv_jax.data.first_pass import Chunk
from esm1nv_jax.data.splits import Groups, SplitAssignment
from esm1nv_jax.data.tokenizer import LETTERS

DATASET = "proteins"  # TFDS wants a name in the name of every file
_READ = 512  # records read together


def lengths_file(split: str) -> str:
    return f"lengths-{split}.npy"


def groups_files(split: str) -> tuple[str, str]:
    return f"clusters-{split}-first.npy", f"clusters-{split}-member.npy"


@dataclasses.dataclass
class Shard:
    path: Path
    examples: int
    sha256: str


class SplitWriter:
    """Collects what belongs to a split: shards, lengths (uint32), keys (uint64), composition."""

    def __init__(self, name: str, folder: Path):
        self.name, self.folder = name, folder
        self.shards: list[Shard] = []
        self.lengths: list[np.ndarray] = []
        self.keys: list[np.ndarray] = []
        self.letters = np.zeros(len(LETTERS), np.int64)
        self._open: records.ShardWriter | None = None
        self._bytes = 0

    def add_shard(self, path: Path, examples: int, sha256: str) -> None:
        """Makes a written file the next shard."""
        own = self.folder / f"{self.name}-shard-{len(self.shards):05d}"
        self.shards.append(Shard(path.rename(own), examples, sha256))

    def add_columns(self, lengths: np.ndarray, keys: np.ndarray) -> None:
        self.lengths.append(lengths)
        self.keys.append(keys)

    def write(self, encoded: list[bytes]) -> None:
        """Appends records to the shard being written."""
        if self._open is None:
            self._open = records.ShardWriter(self.folder / f"{self.name}-open")
            self._bytes = 0
        self._open.write_all(encoded)
        self._bytes += sum(map(len, encoded))

    def end_shard(self, at_least: int = 0) -> None:
        """Closes the shard being written, if it holds at least `at_least` bytes."""
        if self._open is not None and self._bytes >= at_least:
            self._open.close()
            path, count, self._open = self._open.path, self._open.count, None
            records.check_shard(path, count)
            self.add_shard(path, count, records.file_checksum(path))


def write_splits(
    folder: Path,
    chunks: list[Chunk],
    assigned: SplitAssignment,
    shard_bytes: int,
    on_progress: Callable[[int], None],
) -> dict[str, SplitWriter]:
    """Turns the files of the first pass into the shards of three splits.

    The training shard of a chunk stays as it is, unless duplicates must be dropped from it. Its
    holdout candidates follow the training shards, or go into their split; `on_progress` is called
    with the number of candidates that were written.
    """
    writers = {name: SplitWriter(name, folder) for name in splits.NAMES}
    train = writers["train"]
    train.letters += sum(chunk.letters for chunk in chunks)  # less what is dropped or held out
    ends = np.cumsum([chunk.sequences for chunk in chunks], dtype=np.int64)
    for chunk, end in zip(chunks, ends, strict=True):
        every = np.arange(end - chunk.sequences, end)
        index = every[~assigned.candidate[every]]
        if (assigned.split[index] == splits.DROPPED).any():
            for _ in _distribute(chunk.train_file(folder), index, assigned, writers):
                pass
            train.end_shard()
        elif index.size:
            train.add_columns(assigned.lengths[index], assigned.keys[index])
            train.add_shard(chunk.train_file(folder), len(index), chunk.sha256)
    for chunk, end in zip(chunks, ends, strict=True):
        every = np.arange(end - chunk.sequences, end)
        index = every[assigned.candidate[every]]
        if index.size:
            for written in _distribute(chunk.candidate_file(folder), index, assigned, writers):
                on_progress(written)
                for writer in writers.values():
                    writer.end_shard(at_least=shard_bytes)
    for writer in writers.values():
        writer.end_shard()
    return writers


def _distribute(
    path: Path, index: np.ndarray, assigned: SplitAssignment, writers: dict[str, SplitWriter]
) -> Iterator[int]:
    """Moves the records of a file into their splits; yields after every few hundred.

    `index`: the indices of all records of the file.
    """
    reader = records.open_shard(path)
    if reader.num_records() != len(index):
        raise UserError(f"{path} holds {reader.num_records()} of {len(index)} records")
    for start in range(0, len(index), _READ):
        here = index[start : start + _READ]
        encoded, split = reader.read(start, start + len(here)), assigned.split[here]
        for number in np.unique(split).tolist():
            chosen = np.flatnonzero(split == number)
            own, lengths = [encoded[i] for i in chosen.tolist()], assigned.lengths[here[chosen]]
            if number != splits.TRAIN:
                letters = _composition(own, lengths)
                writers["train"].letters -= letters
            if number != splits.DROPPED:
                writer = writers[splits.NAMES[number]]
                writer.add_columns(lengths, assigned.keys[here[chosen]])
                writer.write(own)
                if number != splits.TRAIN:
                    writer.letters += letters
        yield len(here)
    path.unlink()


def _composition(encoded: list[bytes], lengths: np.ndarray) -> np.ndarray:
    sequences = [
        records.sequence_of(e, n) or b"" for e, n in zip(encoded, lengths.tolist(), strict=True)
    ]
    return records.composition(b"".join(sequences))


def finalize(folder: Path, writers: dict[str, SplitWriter], with_clusters: bool) -> None:
    """Gives the shards their final names and writes lengths, clusters and TFDS's metadata.

    This comes last, so that no unfinished folder holds names that TFDS would read.
    """
    import tensorflow_datasets as tfds  # 0.3 s to import

    infos = []
    with records.disk_errors(folder):
        for writer in writers.values():
            for i, shard in enumerate(writer.shards):
                name = f"{DATASET}-{writer.name}.array_record-{i:05d}-of-{len(writer.shards):05d}"
                shard.path = shard.path.rename(folder / name)
            lengths = np.concatenate([*writer.lengths, np.zeros(0, np.uint32)])
            narrow = np.uint16 if lengths.max(initial=0) < 1 << 16 else np.uint32
            np.save(folder / lengths_file(writer.name), lengths.astype(narrow))
            if writer.shards:
                counts = [shard.examples for shard in writer.shards]
                size = sum(shard.path.stat().st_size for shard in writer.shards)
                infos.append(tfds.core.SplitInfo(writer.name, counts, size))
        if with_clusters:
            groups = Groups.of(np.concatenate(writers["train"].keys))
            first, member = groups_files("train")
            np.save(folder / first, groups.first)
            np.save(folder / member, groups.member)
        tfds.folder_dataset.write_metadata(
            data_dir=folder,
            features=tfds.features.FeaturesDict(
                {name: tfds.features.Text() for name in records.FEATURES}
            ),
            split_infos=infos,
            check_data=False,
            description="Protein sequences, prepared by `esm1nv prepare`.",
        )
