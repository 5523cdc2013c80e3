"""What an input stream is; and which sequences go into which row, by their lengths alone.

An epoch visits its examples in a random order. 2,048 in a row of that order are a packing window,
and are laid into rows by best-fit decreasing. With the bundled sample that fills rows of 1,152
tokens to 99.8 %, of 512 to 99.0 %, of 256 to 97.4 %; a larger window gains nothing measurable.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools

import numpy as np
from ml_collections import ConfigDict

from esm1nv_jax.common.errors import UserError
from esm1nv_jax.common.hashing import fold, fold_all, permute, purpose
from esm1nv_jax.data.source import Source

SPECIALS = 2  # <s> and </s> around every sequence, cropped or not
WINDOW = 2_048  # examples planned together
NEAR = 65_536  # positions of an epoch among which the records of its blocks are shuffled


@dataclasses.dataclass(frozen=True)
class StreamConfig:
    """What an input stream is, beside its data set.

    rows: rows in a global batch, over all processes. row_length: tokens in a row.
    max_residues: longer sequences are cropped to so many residues.
    crop: 'prefix' keeps the first residues; 'random' keeps a window drawn anew in every epoch.
    packed: several sequences in a row; otherwise one.
    sample: 'all' examples in an epoch, or 'one_per_group', one member of each cluster.
    block: consecutive records that stay together in the shuffle (see `packing.EpochOrder`).
    """

    seed: int
    rows: int
    row_length: int
    max_residues: int
    crop: str = "prefix"
    packed: bool = True
    sample: str = "all"
    block: int = 1

    def __post_init__(self):
        for name in ("rows", "row_length", "max_residues", "block"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} must be 1 or more, found {getattr(self, name)}")
        if self.max_residues + SPECIALS > self.row_length:
            raise UserError(
                f"a row of {self.row_length} tokens holds {self.row_length - SPECIALS} residues"
                f" between <s> and </s>; max_residues is {self.max_residues}"
            )
        if self.crop not in ("prefix", "random"):
            raise UserError(f"crop must be 'prefix' or 'random', found {self.crop!r}")
        if self.sample not in ("all", "one_per_group"):
            raise UserError(f"sample must be 'all' or 'one_per_group', found {self.sample!r}")

    @property
    def max_segments(self) -> int:
        """The most sequences that a row can hold."""
        return self.row_length // (SPECIALS + 1) if self.packed else 1


def stream_config(config: ConfigDict, rows: int) -> StreamConfig:
    """The stream that a run's config describes, with `rows` rows in a global batch."""
    names = ("row_length", "max_residues", "crop", "packed", "sample", "block")
    fields = {name: getattr(config.data, name) for name in names}
    return StreamConfig(seed=config.seed, rows=rows, **fields)


def evaluation_stream(config: StreamConfig) -> StreamConfig:
    """The stream that a run validates on: of a fixed seed, and prefixes of long sequences.

    So runs of any seed and crop, and `esm1nv evaluate`, are asked for the same residues.
    """
    return dataclasses.replace(config, seed=0, crop="prefix")


def rows_for(
    lengths: np.ndarray, sequences: int, config: StreamConfig, microbatches: int = 1
) -> int:
    """The number of rows that hold about `sequences` sequences, equally many a microbatch.

    Packed, it is round(sequences x mean tokens / row length); otherwise one row a sequence; both
    are rounded up to a multiple of `microbatches`. `lengths` are those of the data set in residues,
    uncropped: [examples].
    """
    rows = sequences
    if config.packed:
        mean = float(np.minimum(lengths, np.int64(config.max_residues)).mean()) + SPECIALS
        rows = max(1, round(sequences * mean / config.row_length))
    return rows + -rows % microbatches


class EpochOrder:
    """The order in which an epoch visits `n` examples, computed where it is looked up.

    With `block` 1 every example moves by itself. A larger `block` is for disks on which random
    reads are slow: blocks of consecutive examples are permuted, then examples are shuffled among
    `near` consecutive positions, which touch about `near / block` places on the disk.
    """

    def __init__(self, n: int, seed: int, epoch: int, block: int = 1, near: int = NEAR):
        self.n, self.block, self.near = n, block, near
        self.key = fold_all(seed, purpose("order"), epoch)
        if block > 1:
            self.near_key = fold_all(seed, purpose("order within a stretch"), epoch)
            blocks = -(-n // block)
            self.block_starts = permute(np.arange(blocks), blocks, self.key) * block
            sizes = np.minimum(self.block_starts + block, n) - self.block_starts
            self.block_ends = np.cumsum(sizes)  # positions in the epoch

    def __call__(self, start: int, stop: int) -> np.ndarray:
        """Examples at positions start..stop-1 of the epoch, cut at its end: int64 [positions]."""
        positions = np.arange(start, min(stop, self.n))
        if self.block == 1:
            return permute(positions, self.n, self.key) if positions.size else positions
        for stretch in np.unique(positions // self.near):
            inside = positions // self.near == stretch
            first = stretch * self.near
            size = min(self.near, self.n - first)
            key = fold(self.near_key, np.uint32(stretch))
            positions[inside] = first + permute(positions[inside] - first, int(size), key)
        index = np.searchsorted(self.block_ends, positions, side="right")
        before = np.concatenate(([0], self.block_ends))[index]
        return self.block_starts[index] + positions - before


_epoch_order = functools.lru_cache(maxsize=2)(EpochOrder)  # blocks of an epoch are permuted once


def best_fit(tokens: np.ndarray, row_length: int) -> np.ndarray:
    """Packs items of `tokens` lengths into rows best-fit decreasing: row of each item, int32 [n].

    Each item in turn, longest first, goes to the fullest row that still has room. Raises ValueError
    if an item is empty or longer than a row.

    Rows with the same free space are interchangeable, so they are kept by free space, and the least
    space that fits is the lowest bit of one long integer: more than a million items a second.
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
    assigned: list[int] = []  # row of each item in the order longest_first
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
        assigned.append(row)
    out = np.empty(len(tokens), np.int32)
    out[longest_first] = assigned
    return out


@dataclasses.dataclass(frozen=True, eq=False)
class PackedWindow:
    """Segments laid into `rows` rows, in the order in which they lie there.

    One value a segment, [segments]: int64 `example`; int64 `residues` of the whole sequence; int64
    `row`; int64 `segment`, from 1 in each row; uint32 `mask_key` and `crop_key`.
    """

    rows: int
    example: np.ndarray
    residues: np.ndarray
    row: np.ndarray
    segment: np.ndarray
    mask_key: np.ndarray
    crop_key: np.ndarray


_SEGMENT_FIELDS = ("example", "residues", "row", "segment", "mask_key", "crop_key")


def gather_rows(windows: np.ndarray, rows: np.ndarray, wanted: slice) -> PackedWindow:
    """Rows `wanted` of a batch as one PackedWindow; fewer where the batch has fewer.

    Row i of the batch, which is not empty, is row `rows[i]` of `windows[i]`: PackedWindow [batch],
    int64 [batch]. Rows of one window stand together and count upwards.
    """
    parts = {name: [getattr(windows[0], name)[:0]] for name in _SEGMENT_FIELDS}
    windows, rows = windows[wanted], rows[wanted]
    starts = np.flatnonzero(np.diff(rows, prepend=-2) != 1)  # of each stretch of one window
    for start, stop in itertools.pairwise([*starts.tolist(), len(rows)]):
        window, first = windows[start], rows[start]
        segments = slice(*np.searchsorted(window.row, (first, first + stop - start)))
        for name, part in parts.items():
            part.append(getattr(window, name)[segments])
        parts["row"][-1] = parts["row"][-1] - first + start
    return PackedWindow(len(rows), **{name: np.concatenate(part) for name, part in parts.items()})


@dataclasses.dataclass(frozen=True)
class TrainingWindows:
    """The packing windows of endless training: window i of all epochs, one after another.

    Raises UserError where `config.sample` needs clusters and the data set has none.
    """

    source: Source
    config: StreamConfig

    def __post_init__(self):
        if self.config.sample == "one_per_group" and self.source.groups is None:
            raise UserError(
                "sample='one_per_group' needs a data set with clusters, and this has none:"
                " prepare it with --groups, or set sample='all'"
            )

    def __call__(self, index: int) -> PackedWindow:
        config = self.config
        groups = self.source.groups if config.sample == "one_per_group" else None
        n = len(self.source.lengths) if groups is None else len(groups.first) - 1
        epoch, number = divmod(index, -(-n // WINDOW))
        order = _epoch_order(n, config.seed, epoch, config.block)
        examples = order(number * WINDOW, (number + 1) * WINDOW)

        def key(name: str) -> np.uint32:
            return fold_all(config.seed, purpose(name), epoch)

        if groups is not None:
            examples = groups.draw(examples, key("member"))
        return _plan(
            self.source,
            config,
            examples,
            row_key=fold(key("rows"), np.uint32(number)),
            mask_key=key("mask"),
            crop_key=key("crop"),
        )


@dataclasses.dataclass(frozen=True)
class EvaluationWindows:
    """The packing windows of evaluation: every example once, in the order of the data set."""

    source: Source
    config: StreamConfig

    def __len__(self) -> int:
        return -(-len(self.source.lengths) // WINDOW)

    def __call__(self, index: int) -> PackedWindow:
        stop = min((index + 1) * WINDOW, len(self.source.lengths))
        return _plan(self.source, self.config, np.arange(index * WINDOW, stop))


def _plan(
    source: Source,
    config: StreamConfig,
    examples: np.ndarray,
    row_key: np.uint32 | None = None,
    mask_key: np.uint32 = np.uint32(0),
    crop_key: np.uint32 = np.uint32(0),
) -> PackedWindow:
    """Lays `examples` into rows, and shuffles the rows by `row_key`.

    Best-fit decreasing makes the rows of long sequences first; shuffled, every batch has the same
    mixture of lengths.
    """
    residues = np.asarray(source.lengths[examples], np.int64)
    tokens = np.minimum(residues, config.max_residues) + SPECIALS
    row = best_fit(tokens, config.row_length) if config.packed else np.arange(len(tokens))
    rows = int(row.max()) + 1
    if row_key is not None:
        row = permute(np.arange(rows), rows, row_key)[row]
    item = np.lexsort((-tokens, row))  # by row, the longest first in each
    row, example = row[item].astype(np.int64), examples[item]
    words = example.astype(np.uint32)
    return PackedWindow(
        rows,
        example,
        residues[item],
        row,
        segment=np.arange(len(item)) - np.searchsorted(row, row) + 1,
        mask_key=fold(mask_key, words),
        crop_key=fold(crop_key, words),
    )
