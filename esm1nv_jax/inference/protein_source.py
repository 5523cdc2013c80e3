"""The proteins that a command is asked to look at: a data set's split, or a FASTA file."""

from __future__ import annotations

from pathlib import Path

from esm1nv_jax.common.console import console
from esm1nv_jax.common.errors import UserError
from esm1nv_jax.data import manifest
from esm1nv_jax.data.source import SAMPLE, SPLITS, MemorySource, Source, open_split
from esm1nv_jax.inference.proteins import scan

_ENDINGS = tuple(f":{split}" for split in SPLITS)


def open_source(data: str | None, path: str | None) -> tuple[Source, str]:
    """The source behind `--data DIR[:split]` or `--fasta FILE`, of which exactly one is given, and
    its name. The split is `validation` where none is said.

    Raises UserError where there is none, or nothing in it can be used.
    """
    if (data is None) == (path is None):
        raise UserError("give the proteins by --data DIR[:split] or by --fasta FILE, one of them")
    if path is not None:
        return read_fasta(path), path
    folder, colon, split = data.rpartition(":")
    if not data.endswith(_ENDINGS):
        if colon and (folder == SAMPLE or Path(folder, manifest.FILE).exists()):
            raise UserError(f"--data {data}: no split {split!r}; there are {', '.join(SPLITS)}")
        folder, split = data, "validation"
    return open_split(folder, split), f"{folder}:{split}"


def read_fasta(path: str) -> MemorySource:
    """All records of a FASTA file, plain or compressed. Faulty ones are told of and left out."""
    found = scan(path, skip=True)
    if found.skipped:
        console.print(f"{path}: {found}", markup=False)
    return MemorySource(list(found))
