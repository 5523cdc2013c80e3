"""How a protein longer than the model's positions is cut, and which window speaks for a residue."""

from __future__ import annotations

import itertools
from typing import NamedTuple


class Window(NamedTuple):
    """Residues start..stop-1 are read together; those from first to last-1 are taken from it."""

    start: int
    stop: int
    first: int
    last: int


def windows(length: int, limit: int) -> list[Window]:
    """Windows of `limit` residues at a stride of half, the last one flush with the end.

    A residue is taken from the window in which it is farthest from a cut (an end of the protein is
    none), the earlier one where two are equal. For windows of one size this is the middle of the
    overlap of neighbours.
    """
    if length <= limit:
        return [Window(0, length, 0, length)]
    stride = max(1, limit // 2)
    starts = [*range(0, length - limit, stride), length - limit]
    # One past the last residue as far from a window's right cut as from the next one's left cut.
    bounds = [(a + limit - 1 + b) // 2 + 1 for a, b in itertools.pairwise(starts)]
    return [
        Window(start, start + limit, first, last)
        for start, first, last in zip(starts, [0, *bounds], [*bounds, length], strict=True)
    ]


def centred(first: int, last: int, length: int, limit: int) -> tuple[int, int] | None:
    """The window (start, stop) of `limit` residues around residues first..last, inside the protein.

    None where they do not fit into one window.
    """
    if length <= limit:
        return 0, length
    if last - first >= limit:
        return None
    start = (first + last + 1) // 2 - limit // 2
    start = min(max(start, 0), length - limit)
    return start, start + limit
