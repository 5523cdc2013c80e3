"""The files of a data set: shards, lengths, clusters, TFDS's metadata, and the manifest, which says
what the data set holds, how it was made, and by which checksums it is verified."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from esm1nv_jax.common import files
from esm1nv_jax.common.console import bar
from esm1nv_jax.common.errors import UserError
from esm1nv_jax.data import records
from esm1nv_jax.data.first_pass import Chunk
from esm1nv_jax.data.splits import DROPPED, NAMES, Groups, SplitAssignment, digests
from esm1nv_jax.data.tokenizer import LETTERS

FILE = "manifest.json"
FORMAT = 1
DATASET = "proteins"  # TFDS wants a name in the name of every file
HISTOGRAM_EDGES = (*range(0, 1024, 64), *(1 << i for i in range(10, 17)))  # residues
_READ = 512  # records read together


def lengths_file(split: str) -> str:
    return f"lengths-{split}.npy"


def groups_files(split: str) -> tuple[str, str]:
    return f"clusters-{split}-first.npy", f"clusters-{split}-member.npy"


class SplitWriter:
    """Collects what belongs to a split: shards, lengths (uint32), keys (uint64), composition."""

    def __init__(self, name: str, folder: Path):
        self.name, self.folder = name, folder
        self.shards: list[tuple[Path, dict[str, Any]]] = []  # the entries are the manifest's
        self._lengths, self._keys = [np.zeros(0, np.uint32)], [np.zeros(0, np.uint64)]
        self.letters = np.zeros(len(LETTERS), np.int64)
        self._open: records.ShardWriter | None = None
        self._bytes = 0

    def add_shard(self, path: Path, examples: int, sha256: str) -> None:
        """Makes a written file the next shard."""
        path = path.rename(self.folder / f"{self.name}-shard-{len(self.shards):05d}")
        entry = {"file": "", "examples": examples, "bytes": path.stat().st_size, "sha256": sha256}
        self.shards.append((path, entry))

    def add_columns(self, lengths: np.ndarray, keys: np.ndarray) -> None:
        self._lengths.append(lengths)
        self._keys.append(keys)

    @property
    def lengths(self) -> np.ndarray:
        return np.concatenate(self._lengths)

    @property
    def keys(self) -> np.ndarray:
        return np.concatenate(self._keys)

    def write(self, encoded: list[bytes]) -> None:
        """Appends records to the shard being written."""
        if self._open is None:
            self._open, self._bytes = records.ShardWriter(self.folder / f"{self.name}-open"), 0
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
    writers = {name: SplitWriter(name, folder) for name in NAMES}
    train = writers["train"]
    train.letters += sum(chunk.letters for chunk in chunks)  # less what is dropped or held out
    ends = np.cumsum([chunk.sequences for chunk in chunks], dtype=np.int64)
    for chunk, end in zip(chunks, ends, strict=True):
        every = np.arange(end - chunk.sequences, end)
        index = every[~assigned.candidate[every]]
        if (assigned.split[index] == DROPPED).any():
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
    for start in range(0, len(index), _READ):
        here = index[start : start + _READ]
        encoded, split = reader.read(start, start + len(here)), assigned.split[here]
        for number in np.unique(split).tolist():
            chosen = np.flatnonzero(split == number)
            own, lengths = [encoded[i] for i in chosen.tolist()], assigned.lengths[here[chosen]]
            pairs = zip(own, lengths.tolist(), strict=True)
            sequences = b"".join(records.sequence_of(record, n) or b"" for record, n in pairs)
            letters = records.composition(sequences)
            writers["train"].letters -= letters
            if number != DROPPED:
                writer = writers[NAMES[number]]
                writer.letters += letters
                writer.add_columns(lengths, assigned.keys[here[chosen]])
                writer.write(own)
        yield len(here)
    path.unlink()


def finalize(folder: Path, writers: dict[str, SplitWriter], with_clusters: bool) -> None:
    """Gives the shards their final names and writes lengths, clusters and TFDS's metadata.

    This comes last, so that no unfinished folder holds names that TFDS would read.
    """
    import tensorflow_datasets as tfds  # 0.3 s to import

    infos = []
    with files.writing(folder):
        for name, writer in writers.items():
            entries = [entry for _, entry in writer.shards]
            for i, (path, entry) in enumerate(writer.shards):
                entry["file"] = f"{DATASET}-{name}.array_record-{i:05d}-of-{len(entries):05d}"
                path.rename(folder / entry["file"])
            lengths = writer.lengths
            narrow = np.uint16 if lengths.max(initial=0) < 1 << 16 else np.uint32
            np.save(folder / lengths_file(name), lengths.astype(narrow))
            if entries:
                counts = [entry["examples"] for entry in entries]
                size = sum(entry["bytes"] for entry in entries)
                infos.append(tfds.core.SplitInfo(name, counts, size))
        if with_clusters:
            groups = Groups.of(writers["train"].keys)
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


def describe(split: SplitWriter) -> dict:
    """The manifest's entry for a split whose files are written."""
    lengths, shards = split.lengths, [entry for _, entry in split.shards]
    return {
        "examples": len(lengths),
        "residues": int(lengths.sum(dtype=np.int64)),
        "shortest": int(lengths.min()) if len(lengths) else 0,
        "longest": int(lengths.max(initial=0)),
        "length_histogram": histogram(lengths),
        "composition": _by_letter(split.letters),
        "fingerprint": fingerprint([shard["sha256"] for shard in shards]),
        "shards": shards,
    }


def _by_letter(letters: np.ndarray) -> dict[str, int]:
    return {letter: int(n) for letter, n in zip(LETTERS, letters, strict=True) if n}


def histogram(lengths: np.ndarray) -> dict[str, int]:
    """The number of sequences by length: {"from-to": number}, without empty bins."""
    edges = np.array([*HISTOGRAM_EDGES, 1 << 62])
    counts = np.diff(np.searchsorted(np.sort(lengths), edges))
    return {
        f"{low}-{high - 1}" if high < 1 << 62 else f"{low}-": int(n)
        for low, high, n in zip(edges[:-1].tolist(), edges[1:].tolist(), counts, strict=True)
        if n
    }


def fingerprint(checksums: list[str]) -> str:
    """One digest for the shards of a split in their order."""
    return hashlib.sha256("".join(checksums).encode()).hexdigest()


def write(folder: Path, manifest: dict) -> None:
    """Writes the manifest, with the checksum of every file that is not a shard."""
    shards = {shard["file"] for split in manifest["splits"].values() for shard in split["shards"]}
    with files.writing(folder):
        others = sorted(p for p in folder.iterdir() if p.name not in shards and p.name != FILE)
        manifest["files"] = {path.name: records.file_checksum(path) for path in others}
        text = json.dumps(manifest, indent=1) + "\n"
        (folder / FILE).write_text(text, encoding="utf-8")


def read(folder: Path) -> dict:
    """The manifest of a data set. Raises UserError where the folder holds none."""
    try:
        manifest = json.loads((folder / FILE).read_text(encoding="utf-8"))
    except NotADirectoryError:
        advice = f"make one of it, if it is FASTA: esm1nv prepare --fasta {folder} --out DIR"
        raise UserError(f"{folder} is a file, not a data set; {advice}") from None
    except FileNotFoundError:
        advice = f"make one: esm1nv prepare --fasta FILE --out {folder}"
        raise UserError(f"{folder} is not a data set (it has no {FILE}); {advice}") from None
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read {folder / FILE}: {error}; prepare it again") from error
    version = manifest.get("format") if isinstance(manifest, dict) else None
    if version != FORMAT:
        raise UserError(
            f"{folder / FILE} has format {version}, this program reads {FORMAT}; prepare it again"
        )
    return manifest


def summary(manifest: dict) -> str:
    """A data set in one line."""
    parts = [f"{name} {split['examples']:,}" for name, split in manifest["splits"].items()]
    residues = sum(split["residues"] for split in manifest["splits"].values())
    skipped = sum(manifest["skipped"].values())
    return f"{', '.join(parts)} sequences, {residues:,} residues, {skipped:,} skipped"


def verify(folder: Path) -> dict:
    """Reads a whole data set, compares it with its manifest and returns that.

    Raises UserError that names the first file that differs.
    """
    manifest = read(folder)
    total = sum(s["bytes"] for split in manifest["splits"].values() for s in split["shards"])
    with bar(f"verify {folder}", total / 1e6, "MB") as shown:
        _verify(folder, manifest, lambda read: shown.advance(read / 1e6))
    return manifest


def _verify(folder: Path, manifest: dict, on_progress: Callable[[int], None]) -> None:
    for name, checksum in manifest["files"].items():
        _compare(folder / name, "checksum", _checksum(folder / name), checksum)
    ids: list[np.ndarray] = []
    for name, entry in manifest["splits"].items():
        lengths = np.load(folder / lengths_file(name), mmap_mode="r")
        _compare(folder, f"number of lengths of {name}", len(lengths), entry["examples"])
        letters, start = np.zeros(len(LETTERS), np.int64), 0
        for shard in entry["shards"]:
            path = folder / shard["file"]
            _compare(path, "checksum", _checksum(path), shard["sha256"])
            letters += _read_shard(path, lengths[start : start + shard["examples"]], ids)
            start += shard["examples"]
            on_progress(shard["bytes"])
        _compare(folder, f"examples of {name}", start, len(lengths))
        _compare(folder, f"composition of {name}", _by_letter(letters), entry["composition"])
        _compare(folder, f"residues of {name}", int(letters.sum()), entry["residues"])
        checksums = [shard["sha256"] for shard in entry["shards"]]
        _compare(folder, f"fingerprint of {name}", fingerprint(checksums), entry["fingerprint"])
    joined = np.concatenate([*ids, np.zeros(0, np.uint64)])
    _compare(folder, "number of different ids", len(np.unique(joined)), len(joined))


def _read_shard(path: Path, lengths: np.ndarray, ids: list[np.ndarray]) -> np.ndarray:
    """The composition of a shard; appends digests of its ids."""
    reader = records.open_shard(path)
    _compare(path, "number of records", reader.num_records(), len(lengths))
    letters = np.zeros(len(LETTERS), np.int64)
    for start in range(0, len(lengths), _READ):
        encoded = reader.read(start, min(start + _READ, len(lengths)))
        names, sequences, _ = zip(*map(records.decode, encoded), strict=True)
        expected = lengths[start : start + len(encoded)].tolist()
        _compare(path, f"lengths from record {start} on", [*map(len, sequences)], expected)
        letters += records.composition(b"".join(sequences))
        ids.append(digests(names))
    return letters


def _checksum(path: Path) -> str:
    try:
        return records.file_checksum(path)
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}; prepare it again") from error


def _compare(path: Path, what: str, found: object, expected: object) -> None:
    if found != expected:
        raise UserError(
            f"{path}: {what} is {found}, the manifest says {expected}; the data set is damaged,"
            " prepare it again"
        )
