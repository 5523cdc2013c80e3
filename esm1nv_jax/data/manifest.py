"""What a data set says of itself, and whether it is true."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np

from esm1nv_jax.common.errors import UserError
from esm1nv_jax.data import first_pass, split_writer
from esm1nv_jax.data.records import decode, disk_error, open_shard, sequence_of

FILE = "manifest.json"
FORMAT = 1
# Residues; the last is open above.
HISTOGRAM_EDGES = (*range(0, 1024, 64), *(1 << i for i in range(10, 17)))


def describe(folder: Path, split: split_writer.Split) -> dict:
    """The manifest's entry for a split whose files are written."""
    (lengths,) = split.lengths
    shards = [
        {"file": path.name, "examples": count, "bytes": path.stat().st_size, "sha256": checksum}
        for path, count, checksum in zip(
            split.shards, split_writer.shard_counts(split), split.checksums, strict=True
        )
    ]
    return {
        "examples": len(lengths),
        "residues": int(lengths.sum(dtype=np.int64)),
        "shortest": int(lengths.min()) if len(lengths) else 0,
        "longest": int(lengths.max(initial=0)),
        "length_histogram": histogram(lengths),
        "composition": {
            letter: int(n) for letter, n in zip(first_pass.LETTERS, split.letters, strict=True) if n
        },
        "fingerprint": fingerprint([shard["sha256"] for shard in shards]),
        "shards": shards,
    }


def histogram(lengths: np.ndarray) -> dict[str, int]:
    """Sequences by length: {'from-to': number}, empty bins left out."""
    edges = np.array([*HISTOGRAM_EDGES, 1 << 62])
    counts = np.diff(np.searchsorted(np.sort(lengths), edges))
    return {
        f"{low}-{high - 1}" if high < 1 << 62 else f"{low}-": int(n)
        for low, high, n in zip(edges[:-1].tolist(), edges[1:].tolist(), counts, strict=True)
        if n
    }


def fingerprint(checksums: list[str]) -> str:
    return hashlib.sha256("".join(checksums).encode()).hexdigest()


def write(folder: Path, manifest: dict) -> None:
    """Writes the manifest, with the checksum of every other file that is no shard."""
    shards = {shard["file"] for split in manifest["splits"].values() for shard in split["shards"]}
    try:
        others = sorted(p for p in folder.iterdir() if p.name not in shards and p.name != FILE)
        manifest["files"] = {path.name: first_pass.checksum(path) for path in others}
        (folder / FILE).write_text(json.dumps(manifest, indent=1) + "\n")
    except OSError as failure:
        raise disk_error(folder, failure) from failure


def read(folder: Path) -> dict:
    """The manifest of a data set. Raises UserError where the folder holds none."""
    try:
        manifest = json.loads((folder / FILE).read_text())
    except NotADirectoryError:
        raise UserError(
            f"{folder} is a file, not a data set; if it is FASTA, make one of it:"
            f" esm1nv prepare --fasta {folder} --out DIR"
        ) from None
    except FileNotFoundError:
        raise UserError(
            f"{folder} is not a data set (it has no {FILE});"
            f" make one: esm1nv prepare --fasta FILE --out {folder}"
        ) from None
    except (OSError, ValueError) as failure:
        raise UserError(f"cannot read {folder / FILE}: {failure}; prepare it again") from failure
    found = manifest.get("format") if isinstance(manifest, dict) else None
    if found != FORMAT:
        raise UserError(
            f"{folder / FILE} has format {found}, this program reads {FORMAT}; prepare it again"
        )
    return manifest


def verify(folder: Path, advance: Callable[[int], None] = lambda read: None) -> dict:
    """Reads a data set again, all of it, and compares it with its manifest, which it returns.

    `advance` is called with bytes read. Raises UserError naming the first file that differs.
    """
    manifest = read(folder)
    for name, checksum in manifest["files"].items():
        _compare(folder / name, "checksum", _checksum(folder / name), checksum)
    ids: list[np.ndarray] = []
    for name, entry in manifest["splits"].items():
        lengths = np.load(folder / split_writer.lengths_file(name), mmap_mode="r")
        _compare(
            folder / split_writer.lengths_file(name), "number", len(lengths), entry["examples"]
        )
        letters, start = np.zeros(len(first_pass.LETTERS), np.int64), 0
        for shard in entry["shards"]:
            path = folder / shard["file"]
            _compare(path, "checksum", _checksum(path), shard["sha256"])
            here = np.array(lengths[start : start + shard["examples"]])
            letters += _read_shard(path, here, ids)
            start += shard["examples"]
            advance(shard["bytes"])
        _compare(folder / split_writer.lengths_file(name), "number", start, len(lengths))
        composition = {a: int(n) for a, n in zip(first_pass.LETTERS, letters, strict=True) if n}
        _compare(folder, f"composition of {name}", composition, entry["composition"])
        _compare(folder, f"residues of {name}", int(letters.sum()), entry["residues"])
        checksums = [shard["sha256"] for shard in entry["shards"]]
        _compare(folder, f"fingerprint of {name}", fingerprint(checksums), entry["fingerprint"])
    every = np.concatenate([*ids, np.zeros(0, np.uint64)])
    _compare(folder, "number of different ids", len(np.unique(every)), len(every))
    return manifest


def _read_shard(path: Path, lengths: np.ndarray, ids: list[np.ndarray]) -> np.ndarray:
    """Composition of a shard; appends digests of its ids."""
    from esm1nv_jax.data.clusters import digests

    reader = open_shard(path)
    _compare(path, "number of records", reader.num_records(), len(lengths))
    letters = np.zeros(len(first_pass.LETTERS), np.int64)
    for start in range(0, len(lengths), 512):
        records = reader.read(start, min(start + 512, len(lengths)))
        sequences = [
            sequence_of(record, n)
            for record, n in zip(records, lengths[start : start + 512].tolist(), strict=True)
        ]
        for i, sequence in enumerate(sequences):
            if sequence is None:
                raise UserError(
                    f"{path}, record {start + i}: length"
                    f" {len(decode(records[i])[1])}, the lengths file says {lengths[start + i]}"
                )
        letters += first_pass.composition(b"".join(sequences))
        ids.append(digests([decode(record)[0] for record in records]))
    return letters


def _checksum(path: Path) -> str:
    try:
        return first_pass.checksum(path)
    except OSError as failure:
        raise UserError(f"cannot read {path}: {failure.strerror}; prepare it again") from failure


def _compare(path: Path, what: str, found: object, expected: object) -> None:
    if found != expected:
        raise UserError(
            f"{path}: {what} is {found}, the manifest says {expected}; the data set is damaged,"
            " prepare it again"
        )
