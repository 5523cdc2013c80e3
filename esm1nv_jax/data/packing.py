"""Which sequence goes into which row. Pure planning: lengths in, places out.

A row holds whole sequences. Best-fit decreasing over a window of 2,048 examples fills rows to more
than 98.5 % on natural proteins; a larger window gains nothing that can be measured, and a window
is the grain of a restart. Rows of equal free space are interchangeable, so the packer keeps lists
of rows by free space and moves whole lists at once: its work grows with the number of distinct
lengths, not with the number of sequences times the number of rows.
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
    sizes, counts = np.unique(tokens, return_counts=True)
    rows_by_free: list[list[int]] = [[] for _ in range(row_length + 1)]
    occupied = 0  # bit f is set where rows_by_free[f] is not empty
    taken: list[int] = []  # row of each item in the order longest_first
    opened = 0
    for size, left in zip(sizes[::-1].tolist(), counts[::-1].tolist(), strict=True):
        while left:
            fitting = occupied >> size
            if fitting:
                free = size + (fitting & -fitting).bit_length() - 1  # the least that fits
                rows = rows_by_free[free]
            else:  # every row is too full: open as many as the rest needs
                free = row_length
                rows = list(range(opened, opened - (-left // (row_length // size))))
                opened += len(rows)
            # A row that took one item is the best fit for the next of this size while it has room.
            each = free // size
            whole = min(len(rows), left // each)
            for_whole, rest = rows[:whole], rows[whole:]
            taken.extend(for_whole if each == 1 else np.repeat(for_whole, each).tolist())
            moves = [(for_whole, free - each * size)]
            left -= whole * each
            if left and rest:  # one more row takes what remains and is not full
                taken.extend([rest[0]] * left)
                moves.append(([rest[0]], free - left * size))
                rest, left = rest[1:], 0
            rows_by_free[free] = rest
            if not rest:
                occupied &= ~(1 << free)
            for moved, now_free in moves:
                if moved:
                    rows_by_free[now_free] = rows_by_free[now_free] + moved
                    occupied |= 1 << now_free
    row = np.empty(len(tokens), np.int32)
    row[longest_first] = taken
    return row


def arrange(tokens: np.ndarray, row: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Order within rows: (items sorted by row, longest first in each; segment of each, from 1)."""
    item = np.lexsort((-tokens.astype(np.int64), row))
    ordered = row[item]
    return item, np.arange(len(item)) - np.searchsorted(ordered, ordered) + 1
