"""Which sequence goes into which row. Pure planning: lengths in, places out.

A row holds whole sequences. Best-fit decreasing over a window of 2,048 examples fills rows to more
than 98.5 % on natural proteins; a larger window gains nothing that can be measured, and a window
is the grain of a restart. Rows with the same free space are interchangeable, so the packer keeps
them by free space, and finds the least that fits as the lowest bit of one long integer: more than
a million sequences a second in plain Python.
"""

from __future__ import annotations

import numpy as np

WINDOW = 2_048  # examples planned together


def best_fit(tokens: np.ndarray, row_length: int) -> np.ndarray:
    """Packs items of `tokens` lengths into rows best-fit decreasing: row of each, int32 [n].

    Each item in turn, longest first, goes to the fullest row that still has room. Raises ValueError
    if an item is empty or longer than a row.
    """
    if len(tokens) == 0:
        return np.zeros(0, np.int32)
    if tokens.min() < 1 or tokens.max() > row_length:
        raise ValueError(
            f"lengths must lie in 1..{row_length}, found {tokens.min()}..{tokens.max()}"
        )
    longest_first = np.argsort(-tokens.astype(np.int64), kind="stable")
    rows_by_free: list[list[int]] = [[] for _ in range(row_length + 1)]
    occupied = 0  # bit f is set where rows_by_free[f] is not empty
    taken: list[int] = []  # row of each item in the order longest_first
    opened = 0
    for size in tokens[longest_first].tolist():
        fitting = occupied >> size
        if fitting:
            free = size + (fitting & -fitting).bit_length() - 1  # the least that fits
            rows = rows_by_free[free]
            row = rows.pop()
            if not rows:
                occupied ^= 1 << free
        else:
            row, free = opened, row_length
            opened += 1
        free -= size
        rows_by_free[free].append(row)
        occupied |= 1 << free
        taken.append(row)
    out = np.empty(len(tokens), np.int32)
    out[longest_first] = taken
    return out


def arrange(tokens: np.ndarray, row: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Order within rows: (items sorted by row, longest first in each; segment of each, from 1)."""
    item = np.lexsort((-tokens.astype(np.int64), row))
    ordered = row[item]
    return item, np.arange(len(item)) - np.searchsorted(ordered, ordered) + 1
