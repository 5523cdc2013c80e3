"""Reads FASTA."""

from __future__ import annotations

from collections.abc import Iterator
from importlib import resources

from isal import igzip

from esm1nv_jax.data.tokenizer import clean


def sample() -> Iterator[tuple[str, bytes]]:
    """(id, cleaned sequence) of the 10,000 proteins that ship with the package."""
    folder = resources.files("esm1nv_jax.data") / "sample"
    packed = (folder / "swissprot_nr50_sample.fasta.gz").read_bytes()
    for record in igzip.decompress(packed).split(b"\n>"):
        header, _, body = record.partition(b"\n")
        yield header.lstrip(b">").split()[0].decode(), clean(body).sequence
