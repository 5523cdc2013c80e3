"""Which residues are read together, and which sequence goes into which row of which compiled shape.

Programs are compiled for each shape, so there are few: rows of a handful of lengths, and for each
length one number of rows. Short rows are worth their compilation, since attention costs the square
of a row's length; so are rows of many lengths where there is much to compute, since less of them is
padding (of 3,000 proteins of Swiss-Prot cut at 510, 3 % instead of 9 %).
"""

from __future__ import annotations

import bisect
import dataclasses
import itertools
import math
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from esm1nv_jax.data.packing import best_fit

LENGTHS = (64, 128, 256, 384, 512, 768, 1024)  # tokens; then doubling
MANY_LENGTHS = (*range(32, 512, 32), *range(512, 1025, 64))
WORTH_COMPILING = 4  # batches; a program takes about as long to compile as to run once or twice
MUCH_WORK = 500  # times compiling: 16 more lengths are compiled, and save 5 % of the work
SLOT_TOKENS = 8  # a row of T tokens holds at most T / SLOT_TOKENS sequences


@dataclasses.dataclass(frozen=True)
class RowShapes:
    """The shapes of a model: `lengths` of rows, ascending, and about `tokens` tokens a device. The
    programs of a shape take as long to compile as `compile_tokens` tokens take to compute."""

    lengths: tuple[int, ...]
    tokens: int
    devices: int
    compile_tokens: float = math.inf

    @classmethod
    def up_to(
        cls, longest: int, tokens: int, devices: int, compile_tokens: float = math.inf
    ) -> RowShapes:
        """Shapes for sequences of up to `longest` tokens, specials included."""
        lengths = [*LENGTHS]
        while lengths[-1] < longest:
            lengths.append(2 * lengths[-1])
        shorter = [length for length in lengths if length < longest]
        # The longest row is no longer than it must be: 1,026 positions need no row of 2,048.
        return cls((*shorter, -(-longest // 32) * 32), tokens, devices, compile_tokens)

    def for_work(self, tokens: np.ndarray) -> RowShapes:
        """These, or one shape for all items where there is less to compute than to compile, or
        more shapes where there is much to compute."""
        total = tokens.sum()
        if total <= WORTH_COMPILING * self.tokens * self.devices:
            return dataclasses.replace(self, lengths=(self.length(int(tokens.max())),))
        if total <= MUCH_WORK * self.compile_tokens:
            return self
        more = {length for length in MANY_LENGTHS if length < self.lengths[-1]}
        return dataclasses.replace(self, lengths=tuple(sorted(more.union(self.lengths))))

    def length(self, tokens: int) -> int:
        """The shortest row that holds so many tokens."""
        return self.lengths[bisect.bisect_left(self.lengths, tokens)]

    def rows(self, length: int) -> int:
        """Rows of a batch, over all devices."""
        return max(1, self.tokens // length) * self.devices

    def fewest_rows(self, length: int, needed: int) -> int:
        """Rows of a batch that needs so many: all, or half of them and so on, where computing the
        rest takes longer than compiling for fewer."""
        rows = self.rows(length) // self.devices
        while rows > 1 and (half := -(-rows // 2)) * self.devices >= needed:
            if (rows - half) * length <= self.compile_tokens:
                break
            rows = half
        return rows * self.devices

    def slots(self, length: int) -> int:
        """The most sequences in a row."""
        return max(1, length // SLOT_TOKENS)


@dataclasses.dataclass(frozen=True)
class RowBatch:
    """One batch: `length` tokens a row, and for each row the items that follow each other in it."""

    length: int
    rows: list[list[int]]


def pad_rows(tokens: np.ndarray, shapes: RowShapes) -> Iterator[RowBatch]:
    """One item a row, in a row whose length depends on the item's own length alone."""
    by_length: dict[int, list[list[int]]] = {}
    for item, size in enumerate(tokens.tolist()):
        by_length.setdefault(shapes.length(size), []).append([item])
    yield from _batches(by_length, shapes)


def pack_rows(tokens: np.ndarray, shapes: RowShapes) -> Iterator[RowBatch]:
    """Several items a row, best-fit decreasing; a row is as short as its longest item allows.

    From the longest rows down: all items that are left are packed, and the rows that hold an item
    too long for shorter rows stay. What shares no such row is packed again, into shorter rows.
    """
    by_length: dict[int, list[list[int]]] = {}
    left = np.argsort(-tokens, kind="stable")
    for length, shorter in zip(shapes.lengths[::-1], (*shapes.lengths[-2::-1], 0), strict=True):
        if not left.size or tokens[left[0]] <= shorter:
            continue
        row = best_fit(np.maximum(tokens[left], SLOT_TOKENS), length)
        stays = np.isin(row, row[tokens[left] > shorter])
        rows: dict[int, list[int]] = {}
        for item, number in zip(left[stays].tolist(), row[stays].tolist(), strict=True):
            rows.setdefault(number, []).append(item)
        by_length[length] = list(rows.values())
        left = left[~stays]
    _fill_batches(by_length, tokens, shapes)
    yield from _batches(by_length, shapes)


def _fill_batches(by_length: dict[int, list[list[int]]], tokens: np.ndarray, shapes: RowShapes):
    """Moves rows that would leave a batch half empty into longer rows, several into one."""
    for length, longer in itertools.pairwise(sorted(by_length)):
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


def _batches(by_length: dict[int, list[list[int]]], shapes: RowShapes) -> Iterator[RowBatch]:
    for length, rows in sorted(by_length.items()):
        size = shapes.rows(length)
        for start in range(0, len(rows), size):
            yield RowBatch(length, rows[start : start + size])


class ResidueWindow(NamedTuple):
    """Residues start..stop-1 are read together; those from first to last-1 are taken from it."""

    start: int
    stop: int
    first: int
    last: int


def split_into_windows(length: int, limit: int) -> list[ResidueWindow]:
    """Windows of `limit` residues at a stride of half, the last one flush with the end.

    A residue is taken from the window in which it is farthest from a cut (an end of the protein is
    none), the earlier one where two are equal. For windows of one size this is the middle of the
    overlap of neighbours.
    """
    if length <= limit:
        return [ResidueWindow(0, length, 0, length)]
    stride = max(1, limit // 2)
    starts = [*range(0, length - limit, stride), length - limit]
    # One past the last residue as far from a window's right cut as from the next one's left cut.
    bounds = [(a + limit - 1 + b) // 2 + 1 for a, b in itertools.pairwise(starts)]
    return [
        ResidueWindow(start, start + limit, first, last)
        for start, first, last in zip(starts, [0, *bounds], [*bounds, length], strict=True)
    ]


def centered_starts(first: np.ndarray, last: np.ndarray, length: int, limit: int) -> np.ndarray:
    """Where windows of `limit` residues begin that are centred on residues first..last and stay
    inside the protein; they are too short for residues that are farther apart."""
    return np.clip((first + last + 1) // 2 - limit // 2, 0, max(0, length - limit))
