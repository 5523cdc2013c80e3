"""The stream: a data set to global batches of rows, as a pure function of the place.

What is in a global batch follows from (data set, StreamConfig, Place) and nothing else. Every
process plans every row, from lengths alone, and reads only the sequences of its own rows.

The stream has no end. The rows of an epoch's last window are followed by those of the next epoch's
first, in the same batch if it is not yet full, so that no example is left out of any epoch.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from esm1nv_jax.common.errors import UserError
from esm1nv_jax.common.hashing import fold, fold_all, purpose
from esm1nv_jax.data import packing
from esm1nv_jax.data.fill import Batch, Segments, Window, fill
from esm1nv_jax.data.order import Order, permute
from esm1nv_jax.data.source import Source
from esm1nv_jax.data.stream_config import SPECIALS, Place, StreamConfig

START = Place()
_NO_KEY = np.uint32(0)
__all__ = ["Batch", "Place", "StreamConfig", "evaluation_batches", "rows_for", "train_batches"]


def train_batches(
    source: Source, config: StreamConfig, place: Place = START, rows: slice = slice(None)
) -> Iterator[tuple[Batch, Place]]:
    """Global batches from `place` on, without end; each with the place of the batch after it.

    Only `rows` of each global batch are made: every array is [len(rows), row_length].
    'tokens' int32; 'segment_ids' int32, 0 in padding, from 1 within a row; 'positions' int32, from
    0 in each segment; 'example_ids' int32, -1 in padding; 'mask_bits' uint32, one hash a token.
    """
    wanted = _wanted(source, config, rows)
    epoch = _Epoch(source, config, place.epoch)
    window = epoch.window(place.window)
    if place.row > window.rows:
        raise UserError(f"{place} is past the {window.rows} rows of its window; another data set?")
    while True:
        batch = _Rows(wanted)
        while batch.filled < config.rows:
            batch.take(window, place.row, config.rows)
            place = Place(place.epoch, place.window, batch.end)
            if place.row == window.rows:
                last = place.window + 1 == epoch.windows
                place = Place(place.epoch + 1) if last else Place(place.epoch, place.window + 1)
                if last:
                    epoch = _Epoch(source, config, place.epoch)
                window = epoch.window(place.window)
        yield fill(source, config, batch.segments(), len(wanted)), place


def evaluation_batches(
    source: Source, config: StreamConfig, rows: slice = slice(None)
) -> Iterator[Batch]:
    """Every sequence once, in a fixed order of rows; empty rows fill up the last batch.

    The keys of masks and crops come from the sequence itself, so a figure does not depend on the
    order of the data set, nor on what else is in it.
    """
    wanted = _wanted(source, config, rows)
    batch = _Rows(wanted)
    for start in range(0, len(source.lengths), packing.WINDOW):
        examples = np.arange(start, min(start + packing.WINDOW, len(source.lengths)))
        window = _plan(source, config, examples)
        done = 0
        while done < window.rows:
            batch.take(window, done, config.rows)
            done = batch.end
            if batch.filled == config.rows:
                yield fill(source, config, batch.segments(), len(wanted), evaluation=True)
                batch = _Rows(wanted)
    if batch.filled:
        yield fill(source, config, batch.segments(), len(wanted), evaluation=True)


def rows_for(lengths: np.ndarray, sequences: int, config: StreamConfig) -> int:
    """Rows that hold about `sequences` sequences: round(sequences x mean tokens / row length).

    With one sequence a row, `sequences`. `lengths` are those of the data set, uncropped.
    """
    if not config.packed:
        return sequences
    mean = float(np.minimum(lengths, config.max_residues).mean()) + SPECIALS
    return max(1, round(sequences * mean / config.row_length))


def _wanted(source: Source, config: StreamConfig, rows: slice) -> range:
    """The rows of the global batch that this process makes."""
    if len(source.lengths) == 0:
        raise UserError("the split holds no sequence; prepare the data set with a larger one")
    if len(source.lengths) > 2**31 - 1:  # example ids are int32
        raise UserError(f"a split holds at most 2**31 - 1 sequences, found {len(source.lengths):,}")
    wanted = range(*rows.indices(config.rows))
    if wanted.step != 1:
        raise ValueError(f"a process makes consecutive rows, found {rows}")
    return wanted


class _Rows:
    """A global batch as it fills up with rows of windows; keeps the wanted ones."""

    def __init__(self, wanted: range):
        self.wanted, self.filled, self.end = wanted, 0, 0
        self.parts: list[Segments] = []

    def take(self, window: Window, row: int, total: int) -> None:
        """Takes rows of the window from `row` on, until the window or the batch ends at `end`."""
        self.end = min(row + total - self.filled, window.rows)
        low = max(self.wanted.start, self.filled)
        high = min(self.wanted.stop, self.filled + self.end - row)
        if low < high:
            shift = row - self.filled
            part = window.segments.of_rows(low + shift, high + shift, low - self.wanted.start)
            self.parts.append(part)
        self.filled += self.end - row

    def segments(self) -> Segments | None:
        return Segments.join(self.parts) if self.parts else None


class _Epoch:
    """The windows of an epoch, each a stretch of its order."""

    def __init__(self, source: Source, config: StreamConfig, epoch: int):
        self.source, self.config, self.epoch = source, config, epoch
        self.groups = source.groups if config.sample == "one_per_group" else None
        if config.sample == "one_per_group" and self.groups is None:
            raise UserError(
                "sample='one_per_group' needs a data set with clusters, and this has none:"
                " prepare it with --groups, or set sample='all'"
            )
        n = len(source.lengths) if self.groups is None else len(self.groups.first) - 1
        self.order = Order(n, config.seed, epoch, config.block)
        self.windows = -(-n // packing.WINDOW)

    def window(self, number: int) -> Window:
        if number >= self.windows:
            raise UserError(
                f"the place is window {number} of {self.windows} in an epoch; another data set?"
            )
        start = number * packing.WINDOW
        examples = self.order(start, start + packing.WINDOW)
        if self.groups is not None:
            examples = self.groups.draw(examples, self._key("member"))
        return _plan(
            self.source,
            self.config,
            examples,
            row_key=fold(self._key("rows"), np.uint32(number)),
            mask_key=self._key("mask"),
            crop_key=self._key("crop"),
        )

    def _key(self, what: str) -> np.uint32:
        return fold_all(self.config.seed, purpose(what), self.epoch)


def _plan(
    source: Source,
    config: StreamConfig,
    examples: np.ndarray,
    row_key: np.uint32 | None = None,
    mask_key: np.uint32 = _NO_KEY,
    crop_key: np.uint32 = _NO_KEY,
) -> Window:
    """Lays a window's examples into rows; in an order of rows chosen by `row_key`, if given.

    The packer makes long sequences' rows first. Shuffling the rows gives every batch the same
    mixture of lengths.
    """
    residues = np.asarray(source.lengths[examples], np.int64)
    tokens = np.minimum(residues, config.max_residues) + SPECIALS
    row = packing.best_fit(tokens, config.row_length) if config.packed else np.arange(len(tokens))
    rows = int(row.max()) + 1
    if row_key is not None:
        row = permute(np.arange(rows), rows, row_key)[row]
    item, segment = packing.arrange(tokens, row)
    example = examples[item]
    word = example.astype(np.uint32)
    return Window(
        rows,
        Segments(
            example,
            residues[item],
            row[item].astype(np.int64),
            segment,
            mask_key=fold(mask_key, word),
            crop_key=fold(crop_key, word),
        ),
    )
