"""The proteins of a FASTA file, checked to its end before the first of them is computed.

Reading a file twice costs seconds. In return a fault in the last record does not come to light
after hours, the work ahead is known, and no list of everything need be held in memory.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from esm1nv_jax.common.errors import UserError
from esm1nv_jax.data import clusters, duplicates, fasta
from esm1nv_jax.data.compression import Archive


@dataclasses.dataclass(frozen=True)
class Proteins:
    """The records to compute, in the order of the file.

    `lengths`: residues of each, uint32 [n]. `digest`: of ids and sequences. `left_out`: indices of
    records that repeat an earlier one. `skipped` and `mended` are counts by reason.
    """

    path: Path
    lengths: np.ndarray
    digest: str
    left_out: frozenset[int]
    skipped: Counter
    mended: Counter

    def __iter__(self) -> Iterator[tuple[str, bytes]]:
        """(id, sequence): the first word of the header, and upper-case letters."""
        seen = 0
        for records in _chunks(self.path, lambda *_: None, Counter()):
            for name, sequence in zip(records.ids, records.sequences, strict=True):
                if seen not in self.left_out:
                    yield name.decode("utf-8", "replace"), sequence
                seen += 1

    def __str__(self) -> str:
        n = len(self.lengths)
        parts = [
            f"{n:,} protein{'s' * (n != 1)}, {self.lengths.sum():,} residues, the longest has "
            f"{self.lengths.max():,}"
        ]
        for what, counts in (("mended", self.mended), ("left out", self.skipped)):
            if counts:
                shown = ", ".join(f"{reason} {n:,}" for reason, n in sorted(counts.items()))
                parts.append(f"{what}: {shown}")
        return "; ".join(parts)


def scan(path: str, skip: bool = False, advice: str = "mend it") -> Proteins:
    """Reads the whole of a FASTA file, plain or compressed by gzip, zstd or xz.

    Raises UserError at the first fault, naming its line, and the next thing to do as the caller
    advises; with `skip` faults are counted instead. A record that repeats another is left out; an
    id that stands for two sequences is a fault.
    """
    source = Path(path)
    if path == "-":
        raise UserError("standard input can be read only once; give --fasta a file")
    if source.is_dir():
        raise UserError(f"{path} is a folder; give --fasta a file")
    skipped, mended = Counter(), Counter()

    def report(line: int, kind: str, fault: str) -> None:
        if not skip:
            raise UserError(f"{source}, line {line}: {fault}; {advice}")
        skipped[kind] += 1

    # 20 bytes a record: a list of every length would take twice that.
    columns = [np.zeros(0, np.uint64)], [np.zeros(0, np.uint64)], [np.zeros(0, np.uint32)]
    for records in _chunks(source, report, mended):
        columns[0].append(clusters.digests(records.ids))
        columns[1].append(clusters.digests(records.sequences))
        columns[2].append(np.fromiter(map(len, records.sequences), np.uint32))
    ids, contents, lengths = map(_joined, columns)
    same, other = duplicates.find(ids, contents)
    if other.size and not skip:
        raise duplicates.report((source,), (str(source),), ids[other[0]])
    skipped.update(Counter({duplicates.SAME: same.size, duplicates.OTHER: other.size}))
    kept = np.ones(len(ids), bool)
    kept[same] = kept[other] = False
    if not kept.any():
        raise UserError(f"{source} holds no protein; is it FASTA?")
    digest = hashlib.sha256(ids[kept])
    digest.update(contents[kept])
    return Proteins(
        source,
        lengths[kept],
        digest.hexdigest(),
        frozenset(np.flatnonzero(~kept).tolist()),
        +skipped,
        mended,
    )


def _joined(parts: list[np.ndarray]) -> np.ndarray:
    whole = np.concatenate(parts)
    parts.clear()
    return whole


def _chunks(path: Path, report: fasta.Report, mended: Counter) -> Iterator[fasta.Records]:
    for line, text in fasta.chunks(Archive(path), report, mended):
        yield fasta.parse(text, line, report, mended)
