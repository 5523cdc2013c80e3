"""Clusters of sequences, and which sequences are held out: whole clusters together.

Names are held as 64-bit digests, 16 bytes a line of a table of clusters, so that the table of a
whole UniRef fits in memory. Those sequences are held out that have the smallest keys. A key is a
hash of the seed and of the cluster, or of the sequence itself where there are no clusters. So the
choice depends on the seed and the input alone, and one sequence under two ids does not end up in
two splits.
"""

from __future__ import annotations

import codecs
import dataclasses
import hashlib
import re
from bisect import bisect_right
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
from isal import isal_zlib

from esm1nv_jax.common.errors import UserError
from esm1nv_jax.common.hashing import fold, fold_all, purpose
from esm1nv_jax.data.compression import DamagedFileError, DecompressedFile

TRAIN, VALIDATION, TEST, DROPPED = range(4)
NAMES = ("train", "validation", "test")
DEFAULT_SIZES = (5_000, 1_000_000)  # of validation and test: those of the model card
DEFAULT_SHARE = 0.05  # where the corpus is too small for these

Size = int | float | None  # sequences, a share of them, or the default
_FORMAT = "give lines of accession, tab, cluster"
_MAX_LINE = 1 << 20  # bytes
_VERSION = re.compile(rb"^([A-Z]{1,6}_?\d+)\.\d+$")  # of an NCBI accession


def digests(names: Sequence[bytes]) -> np.ndarray:
    """A 64-bit digest of each name: uint64 [n]."""
    blake2b = hashlib.blake2b
    joined = b"".join([blake2b(name, digest_size=8).digest() for name in names])
    return np.frombuffer(joined, "<u8").astype(np.uint64)


def checksums(sequences: Sequence[bytes]) -> np.ndarray:
    """A 64-bit checksum of each sequence, at a quarter of the cost of a digest: uint64 [n].

    Two different sequences with one checksum only have to share a split; among 52M random ones
    hardly any do.
    """
    words = [
        np.fromiter(map(function, sequences), np.uint64, len(sequences))
        for function in (isal_zlib.crc32, isal_zlib.adler32)
    ]
    return words[0] << np.uint64(32) | words[1]


def load_table(path: Path) -> tuple[np.ndarray, bool]:
    """Reads a table, separated by tabs, of accessions (first column) and clusters (last column).

    A table of MMseqs2 (`*_cluster.tsv`: representative, tab, member) is recognized where it cannot
    be the other order: its first column puts an accession into several clusters, its second does
    not and holds every representative.

    Returns uint64 [2, lines], digests of the accessions, sorted, and of their clusters; and whether
    the order is that of MMseqs2. Raises UserError for a line without a cluster or an accession in
    two clusters.
    """
    pieces: list[np.ndarray] = []
    blank: list[int] = []  # how many entries precede each empty line
    line, two_columns = 0, True
    for rows in _lines(path):
        columns = []
        for row in rows:
            line += 1
            if line == 1:
                row = row.removeprefix(codecs.BOM_UTF8)
            fields = row.rstrip(b"\r").split(b"\t")
            if len(fields) > 1 and fields[-1].strip():
                columns.append((fields[0].strip(), fields[-1].strip()))
                two_columns &= len(fields) == 2
            elif fields[0]:
                what = "one column," if len(fields) == 1 else "no cluster for"
                shown = fields[0][:40].decode("latin-1")
                raise UserError(f"{path}, line {line}: {what} {shown!a}; {_FORMAT}")
            else:
                blank.append(line - 1 - len(blank))
        if columns:
            pieces.append(np.stack([digests(column) for column in zip(*columns, strict=True)]))
    if not pieces:
        raise UserError(f"{path} holds no line; {_FORMAT}")
    pairs = np.concatenate(pieces, axis=1)
    del pieces
    table, conflict = _sort(pairs)
    if conflict is None:
        return table, False
    swapped, other_conflict = _sort(pairs[::-1]) if two_columns else (table, conflict)
    if other_conflict is None and np.isin(pairs[0], pairs[1]).all():
        return swapped, True
    first, second = (i + 1 + bisect_right(blank, i) for i in conflict)
    advice = "are the columns swapped?" if other_conflict is None else "give each one cluster"
    raise UserError(
        f"{path} puts one accession into two clusters, in lines {first} and {second}; {advice}"
    )


def _sort(pairs: np.ndarray) -> tuple[np.ndarray, list[int] | None]:
    """(columns of `pairs` sorted by row 0; two columns that agree in row 0 only, if any)."""
    order = np.argsort(pairs[0], kind="stable")
    table = pairs[:, order]
    conflict = (table[0, 1:] == table[0, :-1]) & (table[1, 1:] != table[1, :-1])
    if not conflict.any():
        return table, None
    at = int(np.argmax(conflict))
    return table, order[at : at + 2].tolist()


def _lines(path: Path) -> Iterable[list[bytes]]:
    rest = b""
    try:
        for block in DecompressedFile(path, expected="a table"):
            *rows, rest = (rest + block).split(b"\n")
            if len(rest) > _MAX_LINE:
                raise UserError(f"{path} has a line of more than {_MAX_LINE:,} bytes; {_FORMAT}")
            yield rows
    except DamagedFileError as error:
        raise UserError(f"{path}: {error}; fetch it again") from error
    if rest:
        yield [rest]


def accessions(name: bytes) -> list[bytes]:
    """The accessions that an id may contain, likely ones first.

    Of UniProt's and NCBI's forms: `UniRef50_P12345`, `sp|P12345|AATM_RABIT`, `gnl|DATABASE|ID`,
    `gi|129295|ref|NP_001.1|`, `pdb|1ABC|A` (as `1ABC_A`), `pir||A12345`; each with its version and
    without.
    """
    database, *fields = name.split(b"|")
    if not fields:
        inner = [name, name.partition(b"_")[2]]
    elif database == b"gi":
        inner = [*(accessions(b"|".join(fields[1:])) if len(fields) > 2 else []), fields[0]]
    elif database in (b"gnl", b"bbs", b"pat"):
        inner = fields[1:]
    elif database == b"pdb":
        inner = [b"_".join(fields[:2]), fields[0]]
    else:
        inner = fields
    return [form for a in inner if a for form in dict.fromkeys((a, _VERSION.sub(rb"\1", a)))]


def look_up(table: np.ndarray, names: Sequence[bytes]) -> tuple[np.ndarray, np.ndarray]:
    """(digest of the cluster, whether there is one) of each id: uint64 [n], bool [n].

    An id is looked up as a whole, then by the accessions that it contains.
    """
    cluster, found = _find(table, digests(names))
    forms = {i: f for i in np.flatnonzero(~found).tolist() if (f := accessions(names[i]))}
    while forms:
        index = np.array(list(forms))
        cluster[index], found[index] = _find(table, digests([f.pop(0) for f in forms.values()]))
        forms = {i: f for i, f in forms.items() if f and not found[i]}
    return cluster, found


def _find(table: np.ndarray, wanted: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    at = np.minimum(np.searchsorted(table[0], wanted), table.shape[1] - 1)
    found = table[0, at] == wanted
    return np.where(found, table[1, at], np.uint64(0)), found


@dataclasses.dataclass(frozen=True)
class Groups:
    """Clusters of a split: the members of cluster c are member[first[c]:first[c + 1]].

    `first` is int64 [clusters + 1]; `member`, example indices, uint32 [examples].
    """

    first: np.ndarray
    member: np.ndarray

    @staticmethod
    def of(cluster: np.ndarray) -> Groups:
        """Groups examples by their clusters, any integers [n], in ascending order of these."""
        member = np.argsort(cluster, kind="stable")
        ordered = cluster[member]
        starts = np.flatnonzero(np.concatenate(([True], ordered[1:] != ordered[:-1])))
        return Groups(np.append(starts, len(cluster)).astype(np.int64), member.astype(np.uint32))

    def draw(self, cluster: np.ndarray, key: np.uint32) -> np.ndarray:
        """One member of each of the clusters, chosen by `key`: int64 [n]."""
        start = np.asarray(self.first[cluster], np.int64)
        size = np.asarray(self.first[cluster + 1], np.int64) - start
        chosen = fold(key, cluster.astype(np.uint32)).astype(np.int64) % size
        return np.asarray(self.member[start + chosen], np.int64)


@dataclasses.dataclass(frozen=True)
class SplitAssignment:
    """The split of every sequence that was read. Arrays are [n], in the order of the input.

    split: TRAIN, VALIDATION, TEST or DROPPED (a duplicate), int8. candidate: whether it was a
    holdout candidate in the first pass, bool. keys: uint64. lengths: residues, uint32.
    """

    split: np.ndarray
    candidate: np.ndarray
    keys: np.ndarray
    lengths: np.ndarray


def keys(digests: np.ndarray, seed: int) -> np.ndarray:
    """Random keys, uint64 [n], for digests, uint64 [n]."""
    low, high = digests.astype(np.uint32), (digests >> np.uint64(32)).astype(np.uint32)
    words = [
        fold(fold(fold_all(seed, purpose("split"), half), high), low).astype(np.uint64)
        for half in range(2)
    ]
    return words[0] << np.uint64(32) | words[1]


def resolve_sizes(sequences: int, validation: Size, test: Size) -> tuple[int, int]:
    """The numbers of sequences to hold out for validation and test, of `sequences` in all.

    The default is the card's size, at most 5 % of the sequences and, from three on, at least one.
    Raises UserError, with sizes that fit, where nothing would be left to train on.
    """
    least = int(sequences > 2)
    default = [min(n, max(int(DEFAULT_SHARE * sequences), least)) for n in DEFAULT_SIZES]
    sizes = [
        default[i] if size is None else round(size * sequences) if 0 < size < 1 else int(size)
        for i, size in enumerate((validation, test))
    ]
    if sum(sizes) < sequences:
        return sizes[0], sizes[1]
    if not sequences:
        raise UserError("no sequence was kept; see --min-length, --max-length and the input")
    raise UserError(
        f"--validation {sizes[0]} --test {sizes[1]} leave nothing of {sequences:,} sequences to "
        f"train on; for instance --validation {default[0]} --test {default[1]} fit"
    )


def assign(key: np.ndarray, validation: int, test: int, whole: bool) -> np.ndarray:
    """The split of each of the sequences with these keys: int8 [n].

    Sequences of one key stay together: without exception if `whole`, so that a split may differ a
    little from its size; else a last cluster is divided where that alone makes the size exact.
    """
    order = np.argsort(key, kind="stable")
    ordered = key[order]
    cluster = np.cumsum(np.append(True, ordered[1:] != ordered[:-1])) - 1  # in the order of keys
    sizes = np.bincount(cluster)
    split = np.full(len(key), TRAIN, np.int8)
    split_of = np.full(len(sizes), TRAIN, np.int8)  # of each cluster
    for name, size in ((VALIDATION, validation), (TEST, test)):
        taken, left = _fill(sizes, split_of == TRAIN, size, whole)
        split_of[taken] = name
        split[order[split_of[cluster] == name]] = name
        if left and not whole:
            at = np.flatnonzero(split[order] == TRAIN)[:left]
            split[order[at]] = name
            split_of[cluster[at]] = DROPPED  # a divided cluster is not taken by the next split
    return split


def _fill(sizes: np.ndarray, free: np.ndarray, wanted: int, whole: bool) -> tuple[np.ndarray, int]:
    """(clusters that together come nearest to `wanted`, how many sequences are still missing)."""
    candidates = np.flatnonzero(free)
    total = np.cumsum(sizes[candidates])
    n = int(np.searchsorted(total, wanted, side="right"))  # the first n fit as a whole
    taken = candidates[:n].tolist()
    left = wanted - (int(total[n - 1]) if n else 0)
    too_large = []
    for cluster in candidates[n:].tolist():
        if not left:
            break
        if sizes[cluster] <= left:
            taken.append(cluster)
            left -= int(sizes[cluster])
        else:
            too_large.append(cluster)
    if whole and left and too_large:
        smallest = min(too_large, key=lambda cluster: sizes[cluster])
        # A little too many is nearer than too few, and one cluster than an empty split.
        if sizes[smallest] - left < left or not taken:
            taken.append(smallest)
            left = 0
    return np.array(taken, np.int64), left
