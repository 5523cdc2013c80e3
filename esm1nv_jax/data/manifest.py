"""The manifest of a data set: what it holds, how it was made, and checksums to verify it by."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np

from esm1nv_jax.common.errors import UserError
from esm1nv_jax.data import records, writer
from esm1nv_jax.data.splits import digests
from esm1nv_jax.data.tokenizer import LETTERS

FILE = "manifest.json"
FORMAT = 1
HISTOGRAM_EDGES = (*range(0, 1024, 64), *(1 << i for i in range(10, 17)))  # residues
_READ = 512  # records read together


def describe(split: writer.SplitWriter) -> dict:
    """The manifest's entry for a split whose files are written."""
    lengths = np.concatenate([*split.lengths, np.zeros(0, np.uint32)])
    shards = [
        {
            "file": shard.path.name,
            "examples": shard.examples,
            "bytes": shard.path.stat().st_size,
            "sha256": shard.sha256,
        }
        for shard in split.shards
    ]
    return {
        "examples": len(lengths),
        "residues": int(lengths.sum(dtype=np.int64)),
        "shortest": int(lengths.min()) if len(lengths) else 0,
        "longest": int(lengths.max(initial=0)),
        "length_histogram": histogram(lengths),
        "composition": _by_letter(split.letters),
        "fingerprint": fingerprint([shard.sha256 for shard in split.shards]),
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
    with records.disk_errors(folder):
        others = sorted(p for p in folder.iterdir() if p.name not in shards and p.name != FILE)
        manifest["files"] = {path.name: records.file_checksum(path) for path in others}
        text = json.dumps(manifest, indent=1) + "\n"
        (folder / FILE).write_text(text, encoding="utf-8")


def read(folder: Path) -> dict:
    """The manifest of a data set. Raises UserError where the folder holds none."""
    try:
        manifest = json.loads((folder / FILE).read_text(encoding="utf-8"))
    except NotADirectoryError:
        raise UserError(
            f"{folder} is a file, not a data set; if it is FASTA, make a data set of it:"
            f" esm1nv prepare --fasta {folder} --out DIR"
        ) from None
    except FileNotFoundError:
        raise UserError(
            f"{folder} is not a data set (it has no {FILE});"
            f" make one: esm1nv prepare --fasta FILE --out {folder}"
        ) from None
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


def verify(folder: Path, on_progress: Callable[[int], None] = lambda read: None) -> dict:
    """Reads a whole data set, compares it with its manifest and returns that.

    `on_progress` is called with numbers of bytes read. Raises UserError that names the first file
    that differs.
    """
    manifest = read(folder)
    for name, checksum in manifest["files"].items():
        _compare(folder / name, "checksum", _checksum(folder / name), checksum)
    ids: list[np.ndarray] = []
    for name, entry in manifest["splits"].items():
        lengths_path = folder / writer.lengths_file(name)
        lengths = np.load(lengths_path, mmap_mode="r")
        _compare(lengths_path, "number", len(lengths), entry["examples"])
        letters, start = np.zeros(len(LETTERS), np.int64), 0
        for shard in entry["shards"]:
            path = folder / shard["file"]
            _compare(path, "checksum", _checksum(path), shard["sha256"])
            here = np.array(lengths[start : start + shard["examples"]])
            letters += _read_shard(path, here, ids)
            start += shard["examples"]
            on_progress(shard["bytes"])
        _compare(lengths_path, "number", start, len(lengths))
        _compare(folder, f"composition of {name}", _by_letter(letters), entry["composition"])
        _compare(folder, f"residues of {name}", int(letters.sum()), entry["residues"])
        checksums = [shard["sha256"] for shard in entry["shards"]]
        _compare(folder, f"fingerprint of {name}", fingerprint(checksums), entry["fingerprint"])
    joined = np.concatenate([*ids, np.zeros(0, np.uint64)])
    _compare(folder, "number of different ids", len(np.unique(joined)), len(joined))
    return manifest


def _read_shard(path: Path, lengths: np.ndarray, ids: list[np.ndarray]) -> np.ndarray:
    """The composition of a shard; appends digests of its ids."""
    reader = records.open_shard(path)
    _compare(path, "number of records", reader.num_records(), len(lengths))
    letters = np.zeros(len(LETTERS), np.int64)
    for start in range(0, len(lengths), _READ):
        encoded = reader.read(start, min(start + _READ, len(lengths)))
        decoded = [records.decode(record) for record in encoded]
        sequences = [sequence for _, sequence, _ in decoded]
        for i, sequence in enumerate(sequences, start):
            if len(sequence) != lengths[i]:
                raise UserError(
                    f"{path}, record {i}: length {len(sequence)}, the lengths file says"
                    f" {lengths[i]}; the data set is damaged, prepare it again"
                )
        letters += records.composition(b"".join(sequences))
        ids.append(digests([name for name, _, _ in decoded]))
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
