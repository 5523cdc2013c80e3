"""Ids that occur more than once."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np

from esm1nv_jax.data import clusters, fasta
from esm1nv_jax.data.archive import Archive
from esm1nv_jax.errors import UserError

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


def report(sources: tuple[Path, ...], digest: np.uint64) -> UserError:
    """Where an id with this digest stands in the input: it is read again to find the lines."""
    found: list[tuple[str, str]] = []

    def passed(line: int, kind: str, fault: str) -> None:
        pass

    for path in sources:
        for line, text in fasta.chunks(Archive(path), passed, Counter()):
            headers = [record.partition(b"\n")[0].split(None, 1) for record in text.split(b"\n>")]
            names = [head[0].removeprefix(b">") if head else b"" for head in headers]
            for i in np.flatnonzero(clusters.digests(names) == digest).tolist():
                before = b"\n>".join(text.split(b"\n>")[:i])
                here = line + before.count(b"\n") + (i > 0)
                found.append((f"{path}, line {here}", names[i].decode("latin-1")))
            if len(found) > 1:
                return UserError(
                    f"{found[1][0]}: id {found[1][1]!a} stood before, with another sequence"
                    f" ({found[0][0]}); mend it, or keep the first with --on_error=skip"
                )
    raise RuntimeError("an id was found twice and then not again: did the input change?")
