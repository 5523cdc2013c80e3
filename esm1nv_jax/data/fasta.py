"""Reads FASTA: bytes to text of whole records, text to records; and the proteins of a whole file.

Every record is kept, or reported with its line and the reason; none is lost or merged with its
neighbour in silence. What normalization changed is counted.

`scan` checks a file to its end before the first protein is computed. Reading it twice costs
seconds. In return a fault in the last record does not appear after hours of computing, the amount
of work is known, and no list of all proteins is held in memory.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from importlib import resources
from pathlib import Path
from typing import IO, NamedTuple

import numpy as np
from isal import igzip

from esm1nv_jax.common.console import count
from esm1nv_jax.common.errors import UserError
from esm1nv_jax.data import tokenizer
from esm1nv_jax.data.compression import DamagedFileError, DecompressedFile
from esm1nv_jax.data.splits import digests
from esm1nv_jax.data.tables import COLUMNS, input_name, protein_file

TEXT_SIZE = 1 << 20  # bytes of text parsed at a time
MAX_RECORD = 1 << 26  # bytes; the longest known protein, titin, has 4e4 residues
MAX_ID = 1000  # bytes
NO_HEADER = "text before the first header"
DUPLICATE, CONFLICT = "duplicate record", "duplicate id, other sequence"
_RESIDUES = tokenizer.RESIDUES.encode()
_PRINTABLE = bytes(range(0x21, 0x7F)).replace(b";", b"")
_PIR_CODES = (b"P1;", b"F1;", b"DL;", b"DC;", b"RL;", b"RC;", b"N3;", b"N1;", b"XX;")

# Called with (line, kind of fault, message): raises, or returns to skip what is at fault.
OnFault = Callable[[int, str, str], None]


class Records(NamedTuple):
    """Parsed records in the order of the file; the lists are equally long."""

    ids: list[bytes]
    descriptions: list[bytes]
    sequences: list[bytes]


def whole_records(
    blocks: Iterable[bytes], on_fault: OnFault, normalized: Counter, size: int = TEXT_SIZE
) -> Iterator[tuple[int, bytes]]:
    """Yields (line number, text) of pieces of at least `size` bytes that consist of whole records.

    A text starts with `>`; its line ends are `\\n`. Where a compressed file breaks off, that is
    reported, and the record that is cut is left out; those before it are not.
    """
    line, pieces, held = 1, [], 0
    try:
        for first_line, block in _skip_preamble(_unix_lines(blocks, normalized), on_fault):
            line = first_line or line
            pieces.append(block)
            held += len(block)
            if held < size:
                continue
            cut = block.rfind(b"\n>") + 1
            if cut:
                text = b"".join(pieces[:-1]) + block[:cut]
                yield line, text
                line += text.count(b"\n")
                pieces = [block[cut:]]
                held = len(pieces[0])
            elif held > MAX_RECORD:  # treated as a damage: what follows is not whole
                raise DamagedFileError(f"a record of more than {MAX_RECORD:,} bytes")
    except DamagedFileError as error:
        text = b"".join(pieces)
        on_fault(line + text.count(b"\n"), "damaged file", str(error))
        pieces = [text[: text.rfind(b"\n>") + 1]]
    if text := b"".join(pieces):
        yield line, text


def _unix_lines(blocks: Iterable[bytes], normalized: Counter) -> Iterator[bytes]:
    """Converts line ends of Windows and old Macs, removes byte order marks at starts of lines."""
    mark = b"\n\xef\xbb\xbf"  # Windows editors put it at the start of UTF-8 text
    held, first = b"\n", True  # a line end before the text, so that a mark there follows one
    for block in blocks:
        block, held = held + block, b""
        if b"\r" in block:
            if block.endswith(b"\r"):  # a `\n` may follow in the next block
                block, held = block[:-1], b"\r"
            normalized["carriage returns"] += block.count(b"\r")
            block = block.replace(b"\r\n", b"\n").replace(b"\r", b"\n")
        while mark[1] in block and (marks := block.count(mark)):
            normalized["byte order marks"] += marks
            block = block.replace(mark, b"\n")
        for length in (3, 2, 1):
            if not held and block.endswith(mark[:length]):  # a mark may continue
                block, held = block[:-length], mark[:length]
        if block:
            yield block[first:]
            first = False
    if held == b"\r":
        normalized["carriage returns"] += 1
        held = b"\n"
    if held[first:]:
        yield held[first:]


def _skip_preamble(blocks: Iterator[bytes], on_fault: OnFault) -> Iterator[tuple[int, bytes]]:
    """Yields (line number if the block is the first, else 0; block) from the first header on.

    Blank lines before the first header are no fault; other text is reported.
    """
    line, started, reported, last = 1, False, False, b"\n"
    for block in blocks:
        if started:
            yield 0, block
            continue
        if not reported:
            text = block.lstrip()
            line += block[: len(block) - len(text)].count(b"\n")
            if not text:
                continue
            if not text.startswith(b">"):
                on_fault(line, NO_HEADER, f"{NO_HEADER}: {_shown(text[:20])}; is this FASTA?")
                reported = True
            block = text
        at = (last + block).find(b"\n>")
        if at < 0:
            line += block.count(b"\n")
            last = block[-1:] or last
            continue
        line += block[:at].count(b"\n")
        started = True
        yield line, block[at:]
    if not (started or reported):
        on_fault(line, "empty file", "the file is empty")


def parse(text: bytes, line: int, on_fault: OnFault, normalized: Counter) -> Records:
    """Returns the records of a text of whole records whose first line has number `line`."""
    raw = text[1:].removesuffix(b"\n").split(b"\n>")
    parts = [record.partition(b"\n") for record in raw]
    headers = [part[0].split(None, 1) for part in parts]
    bodies = [part[2].replace(b"\n", b"") for part in parts]
    plain = all(headers) and all(bodies) and not b"".join(bodies).translate(None, _RESIDUES)
    if plain:  # else every record is normalized and checked by itself
        ids = [header[0] for header in headers]
        plain = not b"".join(ids).translate(None, _PRINTABLE) and max(map(len, ids)) <= MAX_ID
    if not plain:
        kept = list(_parse_one_by_one(parts, headers, line, on_fault, normalized))
        headers, bodies = [header for header, _ in kept], [body for _, body in kept]
    return Records(
        [header[0] for header in headers],
        [header[1].rstrip() if len(header) > 1 else b"" for header in headers],
        bodies,
    )


def _parse_one_by_one(
    parts: list[tuple[bytes, bytes, bytes]],
    headers: list[list[bytes]],
    line: int,
    on_fault: OnFault,
    normalized: Counter,
) -> Iterator[tuple[list[bytes], bytes]]:
    """Yields (header, sequence) of each record without a fault."""
    for (_, separator, body), header in zip(parts, headers, strict=True):
        here, line = line, line + len(separator) + body.count(b"\n") + 1
        if not header:
            on_fault(here, "header without an id", "a header without an id")
            continue
        if fault := _id_fault(header[0]):
            on_fault(here, *fault)
            continue
        try:
            sequence, changes = tokenizer.normalize(body)
        except tokenizer.InvalidResidueError as error:
            message = f"{error.character!a} in the sequence of {_shown(header[0])}"
            on_fault(here + 1 + body[: error.index].count(b"\n"), "bad character", message)
            continue
        if not sequence:
            on_fault(here, "no sequence", f"no sequence for {_shown(header[0])}")
            continue
        normalized.update(changes)
        yield header, sequence


def _id_fault(name: bytes) -> tuple[str, str] | None:
    """(kind of fault, message) of an id that is no FASTA id, or cannot be stored as text."""
    if len(name) > MAX_ID:
        return "long id", f"an id of {len(name):,} bytes ({_shown(name[:20])}...), over {MAX_ID:,}"
    if name.startswith(_PIR_CODES):
        return "PIR format", f"{_shown(name)} begins a record of PIR; convert the file to FASTA"
    try:
        if name.decode().isprintable():
            return None
        return "bad id", f"the id {_shown(name)} has characters that cannot be printed"
    except UnicodeDecodeError:
        return "bad id", f"the id {_shown(name)} is not UTF-8; convert the file to UTF-8"


def _shown(text: bytes) -> str:
    """`text` in quotes, on one line, in ASCII."""
    return ascii(text.decode("latin-1"))


def sample() -> Iterator[tuple[str, bytes]]:
    """(id, sequence) of the 10,000 proteins that are bundled with the package."""
    packed = resources.files("esm1nv_jax.data") / "sample" / "swissprot_nr50_sample.fasta.gz"
    text = igzip.decompress(packed.read_bytes())

    def on_fault(line: int, _: str, message: str) -> None:
        raise UserError(f"the bundled sample, line {line}: {message}; install the package again")

    records = parse(text, 1, on_fault, Counter())
    return zip((name.decode() for name in records.ids), records.sequences, strict=True)


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
    copy: IO[bytes] | None

    def __iter__(self) -> Iterator[tuple[str, bytes]]:
        """Yields (id, sequence): the first word of the header, and a normalized sequence."""
        index = 0
        for records in _records(self.path, "", lambda *_: None, Counter()):
            for name, sequence in zip(records.ids, records.sequences, strict=True):
                if index not in self.duplicates:
                    yield name.decode(), sequence
                index += 1

    def __str__(self) -> str:
        residues = f"{self.lengths.sum():,} residues, the longest has {self.lengths.max():,}"
        parts = [f"{count(len(self.lengths), 'protein')}, {residues}"]
        for title, counts in (("normalized", self.normalized), ("skipped", self.skipped)):
            if counts:
                reasons = ", ".join(f"{reason} {n:,}" for reason, n in sorted(counts.items()))
                parts.append(f"{title}: {reasons}")
        return "; ".join(parts)


def scan(
    path: str, skip: bool = False, advice: str = "fix it", columns: tuple[str, str] = COLUMNS
) -> Proteins:
    """Reads the whole of a FASTA file, plain or compressed by gzip, zstd or xz; or a pipe; or a
    table with `columns` of ids and sequences.

    Raises UserError at the first fault, with its line and `advice`; with `skip` faults are counted
    instead. A record that repeats an earlier one is left out; one id for two sequences is a fault.
    """
    source, copy = protein_file(path, columns=columns)
    name = input_name(path)
    skipped: Counter[str] = Counter()
    normalized: Counter[str] = Counter()

    def on_fault(line: int, kind: str, message: str) -> None:
        if not skip:
            raise UserError(f"{name}, line {line}: {message}; {advice}")
        skipped[kind] += 1

    none = np.zeros(0, np.uint64)
    pieces = [(none, none, np.zeros(0, np.uint32))]  # 20 bytes a record
    for records in _records(source, name, on_fault, normalized):
        lengths = np.fromiter(map(len, records.sequences), np.uint32)
        pieces.append((digests(records.ids), digests(records.sequences), lengths))
    ids, sequences, lengths = map(np.concatenate, zip(*pieces, strict=True))
    same, other = find_duplicates(ids, sequences)
    if other.size and not skip:
        raise conflict_error([(source, name)], ids[other[0]], advice)
    skipped.update({DUPLICATE: same.size, CONFLICT: other.size})
    kept = np.ones(len(ids), bool)
    kept[same] = kept[other] = False
    if not kept.any():
        raise UserError(f"{name} holds no protein; is it FASTA?")
    digest = hashlib.sha256(ids[kept].tobytes() + sequences[kept].tobytes()).hexdigest()
    duplicates = frozenset(np.flatnonzero(~kept).tolist())
    return Proteins(source, lengths[kept], digest, duplicates, +skipped, normalized, copy)


def _records(path: Path, name: str, on_fault: OnFault, normalized: Counter) -> Iterator[Records]:
    file = DecompressedFile(path, name=name)
    for line, text in whole_records(file, on_fault, normalized):
        yield parse(text, line, on_fault, normalized)


def find_duplicates(ids: np.ndarray, sequences: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Indices of records whose id occurred before: (with the same sequence, with another one).

    Takes digests of ids and of sequences, uint64 [n]; returns ascending indices, int64.
    """
    ordered = np.sort(ids)
    is_first = np.append(True, ordered[1:] != ordered[:-1])
    if is_first.all():
        return np.zeros(0, np.int64), np.zeros(0, np.int64)
    order = np.argsort(ids, kind="stable")
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
        for line, text in whole_records(DecompressedFile(path), lambda *_: None, Counter()):
            parts = [record.partition(b"\n") for record in text[1:].split(b"\n>")]
            ids = [(header.split(None, 1) or [b""])[0] for header, _, _ in parts]
            for i in np.flatnonzero(digests(ids) == digest).tolist():
                before = sum(len(sep) + body.count(b"\n") + 1 for _, sep, body in parts[:i])
                # A record that was skipped for a fault of its own gets no id and no sequence.
                records = parse(b">" + b"".join(parts[i]), 0, lambda *_: None, Counter())
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
