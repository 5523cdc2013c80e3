"""The proteins of a FASTA file, which is checked to its end before the first one is computed.

Reading a file twice costs seconds. In return a fault in the last record does not appear after hours
of computing, the amount of work is known, and no list of all proteins is held in memory.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from esm1nv_jax.common.errors import UserError
from esm1nv_jax.data import fasta
from esm1nv_jax.data.compression import DecompressedFile, TemporaryCopy, regular_file
from esm1nv_jax.data.splits import digests

DUPLICATE, CONFLICT = "duplicate record", "duplicate id, other sequence"


@dataclasses.dataclass(frozen=True)
class Proteins:
    """The records of a FASTA file without duplicates, in the order of the file.

    lengths: residues of each, uint32 [n]. digest: SHA-256 of ids and sequences. duplicates: indices
    of records that repeat an earlier one. skipped, normalized: counts by reason.
    """

    path: Path
    lengths: np.ndarray
    digest: str
    duplicates: frozenset[int]
    skipped: Counter
    normalized: Counter
    copy: TemporaryCopy | None

    def __iter__(self) -> Iterator[tuple[str, bytes]]:
        """Yields (id, sequence): the first word of the header, and a normalized sequence."""
        index = 0
        for records in _read(self.path, "", lambda *_: None, Counter()):
            for name, sequence in zip(records.ids, records.sequences, strict=True):
                if index not in self.duplicates:
                    yield name.decode(), sequence
                index += 1

    def __str__(self) -> str:
        n = len(self.lengths)
        parts = [
            f"{n:,} protein{'s' * (n != 1)}, {self.lengths.sum():,} residues, the longest has "
            f"{self.lengths.max():,}"
        ]
        for title, counts in (("normalized", self.normalized), ("skipped", self.skipped)):
            if counts:
                reasons = ", ".join(f"{reason} {n:,}" for reason, n in sorted(counts.items()))
                parts.append(f"{title}: {reasons}")
        return "; ".join(parts)


def scan(path: str, skip: bool = False, advice: str = "fix it") -> Proteins:
    """Reads the whole of a FASTA file, plain or compressed by gzip, zstd or xz; or a pipe.

    Raises UserError at the first fault, with its line and `advice`; with `skip` faults are counted
    instead. A record that repeats an earlier one is left out; one id for two sequences is a fault.
    """
    source, copy = regular_file(path)
    name = "standard input" if path == "-" else path
    skipped: Counter[str] = Counter()
    normalized: Counter[str] = Counter()

    def on_fault(line: int, kind: str, message: str) -> None:
        if not skip:
            raise UserError(f"{name}, line {line}: {message}; {advice}")
        skipped[kind] += 1

    columns: tuple[list, list, list] = [], [], []  # 20 bytes a record
    for records in _read(source, name, on_fault, normalized):
        columns[0].append(digests(records.ids))
        columns[1].append(digests(records.sequences))
        columns[2].append(np.fromiter(map(len, records.sequences), np.uint32))
    ids, sequences, lengths = map(concatenate, columns, (np.uint64, np.uint64, np.uint32))
    same, other = find_duplicates(ids, sequences)
    if other.size and not skip:
        raise conflict_error([(source, name)], ids[other[0]], advice)
    skipped.update({DUPLICATE: same.size, CONFLICT: other.size})
    kept = np.ones(len(ids), bool)
    kept[same] = kept[other] = False
    if not kept.any():
        raise UserError(f"{name} holds no protein; is it FASTA?")
    digest = hashlib.sha256(ids[kept].tobytes())
    digest.update(sequences[kept].tobytes())
    return Proteins(
        source,
        lengths[kept],
        digest.hexdigest(),
        frozenset(np.flatnonzero(~kept).tolist()),
        +skipped,
        normalized,
        copy,
    )


def _read(
    path: Path, name: str, on_fault: fasta.OnFault, normalized: Counter
) -> Iterator[fasta.Records]:
    file = DecompressedFile(path, name=name)
    for line, text in fasta.whole_records(file, on_fault, normalized):
        yield fasta.parse(text, line, on_fault, normalized)


def concatenate(parts: list[np.ndarray], dtype: type) -> np.ndarray:
    """Joins `parts` and clears them, so that no more than one column is held twice at a time."""
    joined = np.concatenate([*parts, np.zeros(0, dtype)])
    parts.clear()
    return joined


def find_duplicates(ids: np.ndarray, sequences: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Indices of records whose id occurred before: (with the same sequence, with another one).

    Takes digests of ids and of sequences, uint64 [n]; returns ascending indices, int64.
    """
    ordered = np.sort(ids)
    if not np.any(ordered[1:] == ordered[:-1]):
        return np.zeros(0, np.int64), np.zeros(0, np.int64)
    order = np.argsort(ids, kind="stable")
    is_first = np.concatenate(([True], ordered[1:] != ordered[:-1]))
    first = order[np.flatnonzero(is_first)][np.cumsum(is_first) - 1]
    repeated = order[~is_first]
    same = sequences[repeated] == sequences[first[~is_first]]
    return np.sort(repeated[same]), np.sort(repeated[~same])


def conflict_error(sources: list[tuple[Path, str]], digest: np.uint64, advice: str) -> UserError:
    """The error for an id, given by its digest, that two sequences have; names both lines.

    Reads the input again, given as (path, name in messages), as only digests were kept.
    """
    first = None
    for path, name in sources:
        for line, text in fasta.whole_records(DecompressedFile(path), lambda *_: None, Counter()):
            parts = [record.partition(b"\n") for record in text[1:].split(b"\n>")]
            ids = [(header.split(None, 1) or [b""])[0] for header, _, _ in parts]
            for i in np.flatnonzero(digests(ids) == digest).tolist():
                before = sum(len(sep) + body.count(b"\n") + 1 for _, sep, body in parts[:i])
                # A record that was skipped for a fault of its own gets no id and no sequence.
                records = fasta.parse(b">" + b"".join(parts[i]), 0, lambda *_: None, Counter())
                if not records.ids:
                    continue
                here = f"{name}, line {line + before}"
                if first is None:
                    first = here, records.sequences[0]
                elif records.sequences[0] != first[1]:
                    return UserError(
                        f"{here}: id {ids[i].decode()!a} occurred before, with another sequence "
                        f"({first[0]}); {advice}"
                    )
    raise RuntimeError("an id was found twice and then not again: did the input change?")
