"""Which sequences belong together: a map from accessions to clusters, kept small.

Names are held as 64-bit digests, 16 bytes a line of the map, so that the map of a whole UniRef fits
beside everything else.
"""

from __future__ import annotations

import dataclasses
import hashlib
from bisect import bisect_right
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
from isal import isal_zlib

from esm1nv_jax.common.errors import UserError
from esm1nv_jax.common.hashing import fold
from esm1nv_jax.data.compression import Archive, BrokenArchive


def digests(names: Sequence[bytes]) -> np.ndarray:
    """A 64-bit digest of each name: uint64 [n]."""
    blake2b = hashlib.blake2b
    joined = b"".join([blake2b(name, digest_size=8).digest() for name in names])
    return np.frombuffer(joined, "<u8").astype(np.uint64)


def checksums(sequences: Sequence[bytes]) -> np.ndarray:
    """64 bits that tell sequences apart, at a quarter of the cost of a digest: uint64 [n].

    Two unlike sequences that agree would only have to share a split, and 52M random ones hardly do.
    """
    words = [
        np.fromiter(map(function, sequences), np.uint64, len(sequences))
        for function in (isal_zlib.crc32, isal_zlib.adler32)
    ]
    return words[0] << np.uint64(32) | words[1]


def load_map(path: Path) -> np.ndarray:
    """Reads a table whose first column is an accession and whose last is its cluster.

    Columns are separated by tabs. Returns uint64 [2, lines]: digests of accessions, sorted, and of
    their clusters. Raises UserError for a line of one column or an accession in two clusters.
    """
    names, clusters, line = [], [], 0
    blank: list[int] = []  # how many entries stand before each empty line
    for rows in _lines(path):
        columns = [row.rstrip(b"\r").split(b"\t") for row in rows]
        for row in columns:
            line += 1
            if len(row) < 2 and row[0]:
                raise UserError(
                    f"{path}, line {line}: one column, {row[0][:40].decode('latin-1')!a};"
                    " give lines of accession, tab, cluster"
                )
            if len(row) < 2:
                blank.append(line - 1 - len(blank))
        columns = [row for row in columns if len(row) > 1]
        names.append(digests([row[0].strip() for row in columns]))
        clusters.append(digests([row[-1].strip() for row in columns]))
    if not any(map(len, names)):
        raise UserError(f"{path} holds no line; give lines of accession, tab, cluster")
    table = np.stack((np.concatenate(names), np.concatenate(clusters)))
    order = np.argsort(table[0], kind="stable")
    table = table[:, order]
    twice = (table[0, 1:] == table[0, :-1]) & (table[1, 1:] != table[1, :-1])
    if twice.any():
        at = int(np.argmax(twice))
        first, second = (i + 1 + bisect_right(blank, i) for i in order[at : at + 2].tolist())
        raise UserError(
            f"{path} puts one accession into two clusters, in lines {first} and {second}; give "
            "each one cluster"
        )
    return table


def _lines(path: Path) -> Iterable[list[bytes]]:
    rest = b""
    try:
        for block in Archive(path):
            *rows, rest = (rest + block).split(b"\n")
            yield rows
    except BrokenArchive as broken:
        raise UserError(f"{path}: {broken}; fetch it again") from broken
    if rest:
        yield [rest]


def accession(name: bytes) -> bytes:
    """The accession within an id: of `sp|P12345|AATM_RABIT` or `UniRef50_P12345`, P12345."""
    if b"|" in name:
        fields = name.split(b"|")
        return fields[3] if fields[0] == b"gi" and len(fields) > 3 else fields[1]
    return name.partition(b"_")[2] or name


def look_up(table: np.ndarray, names: Sequence[bytes]) -> tuple[np.ndarray, np.ndarray]:
    """(digest of the cluster, whether there is one) of each id: uint64 [n], bool [n].

    An id is looked up whole, then by the accession within it.
    """
    cluster, known = _find(table, digests(names))
    missing = np.flatnonzero(~known)
    if missing.size:
        inner = digests([accession(names[i]) for i in missing])
        cluster[missing], known[missing] = _find(table, inner)
    return cluster, known


def _find(table: np.ndarray, wanted: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    at = np.minimum(np.searchsorted(table[0], wanted), table.shape[1] - 1)
    known = table[0, at] == wanted
    return np.where(known, table[1, at], np.uint64(0)), known


@dataclasses.dataclass(frozen=True)
class Groups:
    """Clusters of a split: the members of cluster c are member[first[c]:first[c + 1]].

    `first` is int64 [clusters + 1]; `member`, example indices, uint32 [examples].
    """

    first: np.ndarray
    member: np.ndarray

    @staticmethod
    def of(cluster: np.ndarray) -> Groups:
        """From the cluster of each example, any integers [n]; clusters sorted by that integer."""
        member = np.argsort(cluster, kind="stable")
        ordered = cluster[member]
        starts = np.flatnonzero(np.concatenate(([True], ordered[1:] != ordered[:-1])))
        return Groups(np.append(starts, len(cluster)).astype(np.int64), member.astype(np.uint32))

    def draw(self, cluster: np.ndarray, key: np.uint32) -> np.ndarray:
        """One member of each of `cluster`, chosen by `key`: int64 [n]."""
        start = np.asarray(self.first[cluster], np.int64)
        size = np.asarray(self.first[cluster + 1], np.int64) - start
        chosen = fold(key, cluster.astype(np.uint32)).astype(np.int64) % size
        return np.asarray(self.member[start + chosen], np.int64)
