"""Which sequence goes into which row of which compiled shape.

A program is compiled for each shape, so there are few: rows of a handful of lengths, and for each
length one number of rows. Short rows are worth their compilation, since attention costs the square
of a row's length.
"""

from __future__ import annotations

import bisect
import dataclasses
import itertools
from collections.abc import Iterator

import numpy as np

LENGTHS = (64, 128, 256, 384, 512, 768, 1024)  # tokens; then doubling
WORTH_COMPILING = 4  # batches; a program takes about as long to compile as to run once or twice
SLOT_TOKENS = 8  # a row of T tokens holds at most T / SLOT_TOKENS sequences


@dataclasses.dataclass(frozen=True)
class Shapes:
    """The shapes of a model: `lengths` of rows, ascending, and about `tokens` tokens a device."""

    lengths: tuple[int, ...]
    tokens: int
    devices: int

    @classmethod
    def of(cls, longest: int, tokens: int, devices: int) -> Shapes:
        """Shapes for sequences of up to `longest` tokens, specials included."""
        lengths = [*LENGTHS]
        while lengths[-1] < longest:
            lengths.append(2 * lengths[-1])
        shorter = [length for length in lengths if length < longest]
        # The longest row is no longer than it must be: 1,026 positions need no row of 2,048.
        return cls((*shorter, -(-longest // 32) * 32), tokens, devices)

    def for_work(self, tokens: np.ndarray) -> Shapes:
        """These, or the one that holds all items where there is less to compute than to compile."""
        if tokens.sum() > WORTH_COMPILING * self.tokens * self.devices:
            return self
        return dataclasses.replace(self, lengths=(self.length(int(tokens.max())),))

    def length(self, tokens: int) -> int:
        """The shortest row that holds so many tokens."""
        return self.lengths[bisect.bisect_left(self.lengths, tokens)]

    def rows(self, length: int) -> int:
        """Rows of a batch, over all devices."""
        return max(1, self.tokens // length) * self.devices

    def slots(self, length: int) -> int:
        return max(1, length // SLOT_TOKENS)


@dataclasses.dataclass(frozen=True)
class Packed:
    """One batch: `length` tokens a row, and for each row the items that follow each other in it."""

    length: int
    rows: list[list[int]]


def alone(tokens: np.ndarray, shapes: Shapes) -> Iterator[Packed]:
    """One item a row, in a row whose length depends on the item's own length alone."""
    by_length: dict[int, list[list[int]]] = {}
    for item, size in enumerate(tokens.tolist()):
        by_length.setdefault(shapes.length(size), []).append([item])
    yield from _batches(by_length, shapes)


def packed(tokens: np.ndarray, shapes: Shapes) -> Iterator[Packed]:
    """Several items a row: longest first, each into the fullest row that has room, or a new one."""
    room: list[tuple[int, int]] = []  # (free tokens, row), ascending
    rows: list[list[int]] = []
    lengths: list[int] = []
    for item in np.argsort(-tokens, kind="stable").tolist():
        size = int(tokens[item])
        at = bisect.bisect_left(room, (size, -1))
        if at < len(room):
            free, row = room.pop(at)
        else:
            free, row = shapes.length(size), len(rows)
            rows.append([])
            lengths.append(free)
        rows[row].append(item)
        if len(rows[row]) < shapes.slots(lengths[row]):
            bisect.insort(room, (free - size, row))
    by_length: dict[int, list[list[int]]] = {}
    for length, row in zip(lengths, rows, strict=True):
        by_length.setdefault(length, []).append(row)
    _fill_batches(by_length, tokens, shapes)
    yield from _batches(by_length, shapes)


def _fill_batches(by_length: dict[int, list[list[int]]], tokens: np.ndarray, shapes: Shapes):
    """Moves rows that would leave a batch half empty into longer rows, several into one."""
    in_use = sorted(by_length)
    for length, longer in itertools.pairwise(in_use):
        rows = by_length[length]
        left = rows[len(rows) - len(rows) % shapes.rows(length) :]
        del rows[len(rows) - len(left) :]
        room = slots = 0
        for row in left:
            size = int(tokens[row].sum())
            if size > room or len(row) > slots:
                by_length[longer].append([])
                room, slots = longer, shapes.slots(longer)
            by_length[longer][-1].extend(row)
            room, slots = room - size, slots - len(row)


def _batches(by_length: dict[int, list[list[int]]], shapes: Shapes) -> Iterator[Packed]:
    for length, rows in sorted(by_length.items()):
        size = shapes.rows(length)
        for start in range(0, len(rows), size):
            yield Packed(length, rows[start : start + size])
