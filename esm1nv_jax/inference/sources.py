"""The proteins that a command is asked to look at: a data set's split, or a FASTA file."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

from esm1nv_jax.console import console
from esm1nv_jax.data import fasta
from esm1nv_jax.data.archive import Archive
from esm1nv_jax.data.dataset import SPLITS, MemorySource, Source, open_split
from esm1nv_jax.errors import UserError

_SHOWN = 5  # faults told one by one


def open_source(data: str | None, path: str | None) -> tuple[Source, str]:
    """The source behind `--data DIR[:split]` or `--fasta FILE`, of which exactly one is given, and
    its name. The split is `validation` where none is said.

    Raises UserError where there is none, or nothing in it can be used.
    """
    if (data is None) == (path is None):
        raise UserError("give the proteins by --data DIR[:split] or by --fasta FILE, one of them")
    if path is not None:
        return read_fasta(path), path
    folder, _, split = data.rpartition(":") if data.endswith(_ENDINGS) else (data, "", "validation")
    return open_split(folder, split), f"{folder}:{split}"


_ENDINGS = tuple(f":{split}" for split in SPLITS)


def read_fasta(path: str) -> MemorySource:
    """All records of a FASTA file, plain or compressed. Faulty ones are told of and left out."""
    faults = 0

    def tell(line: int, kind: str, fault: str) -> None:
        nonlocal faults
        faults += 1
        if faults <= _SHOWN:
            console.print(f"{path}, line {line}: {fault}; left out", markup=False)

    mended: Counter = Counter()
    records: list[tuple[str, bytes]] = []
    for line, text in fasta.chunks(Archive(Path(path)), tell, mended):
        found = fasta.parse(text, line, tell, mended)
        names = (name.decode("utf-8", "backslashreplace") for name in found.ids)
        records += zip(names, found.sequences, strict=True)
    if faults > _SHOWN:
        console.print(f"{path}: {faults - _SHOWN} more records left out", markup=False)
    if not records:
        raise UserError(f"{path} holds no usable sequence; give FASTA: >id, then residue letters")
    return MemorySource(records)
