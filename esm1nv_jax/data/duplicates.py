"""Ids that occur more than once."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np

from esm1nv_jax.common.errors import UserError
from esm1nv_jax.data import clusters, fasta
from esm1nv_jax.data.compression import Archive

SAME, OTHER = "duplicate record", "duplicate id, other sequence"


def find(ids: np.ndarray, contents: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Indices of records whose id came before, in order: (with the same sequence, with another).

    Takes digests of ids and of sequences, uint64 [n].
    """
    ordered = np.sort(ids)
    none = np.zeros(0, np.int64)
    if not np.any(ordered[1:] == ordered[:-1]):
        return none, none
    order = np.argsort(ids, kind="stable")
    starts = np.concatenate(([True], ordered[1:] != ordered[:-1]))
    firsts = order[np.flatnonzero(starts)][np.cumsum(starts) - 1]
    again = order[~starts]
    same = contents[again] == contents[firsts[~starts]]
    return np.sort(again[same]), np.sort(again[~same])


def report(sources: tuple[Path, ...], names: tuple[str, ...], digest: np.uint64) -> UserError:
    """Where an id with this digest stands in the input: it is read again to find the lines."""
    first = None

    def passed(line: int, kind: str, fault: str) -> None:
        pass

    for path, source in zip(sources, names, strict=True):
        for line, text in fasta.chunks(Archive(path), passed, Counter()):
            records = text[1:].split(b"\n>")
            heads = [record.partition(b"\n")[0].split(None, 1) for record in records]
            ids = [head[0] if head else b"" for head in heads]
            for i in np.flatnonzero(clusters.digests(ids) == digest).tolist():
                before = sum(record.count(b"\n") + 1 for record in records[:i])
                here = f"{source}, line {line + before}"
                sequence = fasta.tidy(records[i].partition(b"\n")[2])[0]
                if first is None:
                    first = here, sequence
                elif sequence != first[1]:
                    return UserError(
                        f"{here}: id {ids[i].decode('latin-1')!a} stood before, with another"
                        f" sequence ({first[0]}); mend it, or keep the first with --on_error=skip"
                    )
    raise RuntimeError("an id was found twice and then not again: did the input change?")
