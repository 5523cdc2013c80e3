"""Reads FASTA: blocks of bytes to chunks of whole records, chunks to records.

A record is handled as a person would want, or reported with its line and a reason; it is never lost
or merged with its neighbour in silence. What was mended is counted.
"""

from __future__ import annotations

import string
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from importlib import resources
from typing import NamedTuple

from isal import igzip

from esm1nv_jax.common.errors import UserError
from esm1nv_jax.data.compression import BrokenArchive
from esm1nv_jax.data.tokenizer import RESIDUES

CHUNK = 1 << 20  # bytes of text parsed together
_LONGEST = 1 << 30  # bytes of one record; titin has 4e4
_RESIDUES = RESIDUES.encode()
_GAPS = b"-."
_WHITE_SPACE = b" \t\n\r\v\f"
_ALLOWED = string.ascii_uppercase.encode() + b"*"
NO_HEADER = "text before the first header"
_MARK = b"\xef\xbb\xbf"  # Windows editors begin UTF-8 text with it

# Called with (line, what kind of fault, the fault itself): raises, or returns to pass it over.
Report = Callable[[int, str, str], None]


class Records(NamedTuple):
    """Records of a chunk, in order; the lists are equally long."""

    ids: list[bytes]
    descriptions: list[bytes]
    sequences: list[bytes]


def chunks(
    blocks: Iterable[bytes], report: Report, mended: Counter, size: int = CHUNK
) -> Iterator[tuple[int, bytes]]:
    """(number of its first line, text) of stretches of whole records, each at least `size` long.

    The text starts with `>`; line ends are `\\n`. An archive that breaks off is reported; the
    record that it broke off in is left out, those before it are not.
    """
    line, pieces, held = 1, [], 0
    try:
        for fresh, block in _after_preamble(_newlines(blocks, mended), report):
            if fresh:
                line = fresh
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
            elif held > _LONGEST:
                # Handled as a damaged place is: what came before is whole, what follows is not.
                raise BrokenArchive(f"a record of more than {_LONGEST:,} bytes")
    except BrokenArchive as broken:
        text = b"".join(pieces)
        report(line + text.count(b"\n"), "broken archive", str(broken))
        pieces = [text[: text.rfind(b"\n>") + 1]]
    if text := b"".join(pieces):
        yield line, text


def _newlines(blocks: Iterable[bytes], mended: Counter) -> Iterator[bytes]:
    """Line ends of Windows and of old Macs become `\\n`."""
    held = b""
    for block in blocks:
        block, held = held + block, b""
        if b"\r" in block:
            if block.endswith(b"\r"):  # its `\n` may come with the next block
                block, held = block[:-1], b"\r"
            mended["carriage returns"] += block.count(b"\r")
            block = block.replace(b"\r\n", b"\n").replace(b"\r", b"\n")
        yield block
    if held:
        mended["carriage returns"] += 1
        yield b"\n"


def _after_preamble(blocks: Iterator[bytes], report: Report) -> Iterator[tuple[int, bytes]]:
    """(line number where the block is the first, else 0, block) from the first header on.

    Blank lines before it are no fault; other text is reported.
    """
    line, looking, reported, last = 1, True, False, b"\n"
    for number, block in enumerate(blocks):
        if number == 0:
            block = block.removeprefix(_MARK)
        if not looking:
            yield 0, block
            continue
        if not reported:
            text = block.lstrip()
            line += block[: len(block) - len(text)].count(b"\n")
            if not text:
                continue
            if not text.startswith(b">"):
                shown = _shown(text[:20])
                report(line, NO_HEADER, f"{NO_HEADER}: {shown}; is this FASTA?")
                reported = True
            block = text
        at = (last + block).find(b"\n>")
        if at < 0:
            line += block.count(b"\n")
            last = block[-1:] or last
            continue
        line += block[:at].count(b"\n")
        looking = False
        yield line, block[at:]
    if looking and not reported:
        report(line, "empty file", "the file is empty")


def parse(text: bytes, line: int, report: Report, mended: Counter) -> Records:
    """The records of a chunk whose first line has number `line`."""
    raw = text[1:].removesuffix(b"\n").split(b"\n>")
    parts = [record.partition(b"\n") for record in raw]
    heads = [part[0].split(None, 1) for part in parts]
    bodies = [part[2].replace(b"\n", b"") for part in parts]
    if not (all(heads) and all(bodies)) or b"".join(bodies).translate(None, _RESIDUES):
        kept = list(_mend(raw, heads, bodies, line, report, mended))
        heads, bodies = [head for head, _ in kept], [body for _, body in kept]
    return Records(
        [head[0] for head in heads],
        [head[1].rstrip() if len(head) > 1 else b"" for head in heads],
        bodies,
    )


def _mend(raw, heads, bodies, line, report, mended) -> Iterator[tuple[list[bytes], bytes]]:
    """The slow way, for a chunk in which not every record is plain."""
    for text, head, body in zip(raw, heads, bodies, strict=True):
        here, line = line, line + text.count(b"\n") + 1
        if not head:
            report(here, "header without an id", "a header without an id")
            continue
        if body.translate(None, _RESIDUES):
            plain, changes = tidy(body)
            wrong = plain.translate(None, _ALLOWED)
            if wrong:
                at = text.upper().find(wrong[:1], text.index(b"\n"))
                lines = text[:at].count(b"\n")
                fault = f"{_shown(wrong[:1])} in the sequence of {_shown(head[0])}"
                report(here + lines, "bad character", fault)
                continue
            body = plain
            mended.update(changes)
        if not body:
            report(here, "no sequence", f"no sequence for {_shown(head[0])}")
            continue
        yield head, body


def tidy(body: bytes) -> tuple[bytes, list[str]]:
    """Upper case, no white space, gaps or final stops; and names of what was changed."""
    changes = []
    upper = body.upper()
    if upper != body:
        changes.append("lower case")
    plain = upper.translate(None, _WHITE_SPACE)
    if len(plain) != len(upper):
        changes.append("white space")
    without = plain.translate(None, _GAPS)
    if len(without) != len(plain):
        changes.append("gaps")
    plain = without.rstrip(b"*")
    if len(plain) != len(without):
        changes.append("final stop")
    if b"*" in plain:
        changes.append("inner stop, kept as <unk>")
    if b"J" in plain:
        changes.append("letter J, kept as <unk>")
    return plain, changes


def _shown(text: bytes) -> str:
    """Bytes as a person can read them on one line."""
    return ascii(text.decode("latin-1"))


def sample() -> Iterator[tuple[str, bytes]]:
    """(id, sequence) of the 10,000 proteins that ship with the package."""
    packed = resources.files("esm1nv_jax.data") / "sample" / "swissprot_nr50_sample.fasta.gz"
    text = igzip.decompress(packed.read_bytes())

    def broken(line: int, _: str, fault: str) -> None:
        raise UserError(f"the embedded sample, line {line}: {fault}; install the package again")

    records = parse(text, 1, broken, Counter())
    return zip((name.decode() for name in records.ids), records.sequences, strict=True)
