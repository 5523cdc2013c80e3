"""The stream: a data set to global batches of rows, as a pure function of the place.

What is in a global batch follows from (data set, StreamConfig, Place) and nothing else. Every
process plans every row, from lengths alone, and reads only the sequences of its own rows.

The stream has no end. The rows of an epoch's last window are followed by those of the next epoch's
first, in the same batch if it is not yet full, so that no example is left out of any epoch.
"""

from __future__ import annotations

import dataclasses
import zlib
from collections.abc import Iterator

import numpy as np

from esm1nv_jax.data import packing, tokenizer
from esm1nv_jax.data.dataset import Source
from esm1nv_jax.data.order import Order, permute
from esm1nv_jax.errors import UserError
from esm1nv_jax.hashing import fold, fold_all, purpose

Batch = dict[str, np.ndarray]

SPECIALS = 2  # <s> and </s> around every sequence, cropped or not
NO_EXAMPLE = -1
NO_MASK = np.uint32(0xFFFFFFFF)


@dataclasses.dataclass(frozen=True)
class Place:
    """Where the next batch starts: row `row` of window `window` of epoch `epoch`, all from 0."""

    epoch: int = 0
    window: int = 0
    row: int = 0

    def __post_init__(self):
        if min(self.epoch, self.window, self.row) < 0:
            raise ValueError(f"a place is three numbers from 0, found {self}")


@dataclasses.dataclass(frozen=True)
class StreamConfig:
    """What a stream is, beside its data set.

    rows: rows in a global batch, over all hosts. row_length: tokens in a row.
    max_residues: longer sequences are cropped to a window of so many residues.
    crop: where the window lies: 'prefix' as the original, or 'random', anew in every epoch.
    packed: several sequences in a row; else one.
    sample: 'all' examples in an epoch, or 'one_per_group', another member of each in every epoch.
    block: see `Order`; 1 unless reading at random is dear.
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


@dataclasses.dataclass(frozen=True)
class _Segments:
    """Segments of some rows, sorted by row; one array element each (int64 unless said)."""

    example: np.ndarray
    residues: np.ndarray  # of the whole sequence
    row: np.ndarray
    offset: np.ndarray  # tokens into the row
    segment: np.ndarray
    mask_key: np.ndarray  # uint32
    crop_key: np.ndarray  # uint32

    @staticmethod
    def join(parts: list[_Segments]) -> _Segments:
        names = [field.name for field in dataclasses.fields(_Segments)]
        return _Segments(*(np.concatenate([getattr(p, n) for p in parts]) for n in names))


def train_batches(
    source: Source, config: StreamConfig, place: Place = Place(), rows: slice = slice(None)
) -> Iterator[tuple[Batch, Place]]:
    """Global batches from `place` on, without end; each with the place of the batch after it.

    Only `rows` of each global batch are made: every array is [len(rows), row_length].
    'tokens' int32; 'segment_ids' int32, 0 in padding, from 1 within a row; 'positions' int32, from
    0 in each segment; 'example_ids' int32, -1 in padding; 'mask_bits' uint32, one hash a token.
    """
    wanted = range(*rows.indices(config.rows))
    _check(source, wanted)
    order = _EpochOrder(source, config)
    window = None
    while True:
        parts, filled = [], 0
        while filled < config.rows:
            if place.window >= order.windows:
                place = Place(place.epoch + 1)
            if window is None or window[0] != (place.epoch, place.window):
                window = (place.epoch, place.window), _train_window(source, config, order, place)
            plan, segments = window[1]
            take = min(config.rows - filled, plan.rows - place.row)
            if take <= 0:
                place = Place(place.epoch, place.window + 1)
                continue
            low, high = max(filled, wanted.start), min(filled + take, wanted.stop)
            if low < high:
                shift = place.row - filled
                parts.append(_cut(segments, plan, low + shift, high + shift, low - wanted.start))
            filled += take
            place = Place(place.epoch, place.window, place.row + take)
            if place.row == plan.rows:
                place = Place(place.epoch, place.window + 1)
        if place.window >= order.windows:
            place = Place(place.epoch + 1)
        yield _fill(source, config, _joined(parts), len(wanted)), place


def evaluation_batches(
    source: Source, config: StreamConfig, rows: slice = slice(None)
) -> Iterator[Batch]:
    """Every sequence once, in a fixed order of rows; empty rows fill up the last batch.

    The keys of masks and crops come from the sequence itself, so a figure does not depend on the
    order of the data set, nor on what else is in it.
    """
    wanted = range(*rows.indices(config.rows))
    _check(source, wanted)
    waiting: list[_Segments] = []
    filled = 0
    for start in range(0, len(source.lengths), packing.WINDOW):
        examples = np.arange(start, min(start + packing.WINDOW, len(source.lengths)))
        plan, segments = _window(source, config, examples, None, None, None)
        row = 0
        while row < plan.rows:
            take = min(config.rows - filled, plan.rows - row)
            low, high = max(filled, wanted.start), min(filled + take, wanted.stop)
            if low < high:
                shift = row - filled
                waiting.append(_cut(segments, plan, low + shift, high + shift, low - wanted.start))
            filled, row = filled + take, row + take
            if filled == config.rows:
                yield _fill(source, config, _joined(waiting), len(wanted), evaluation=True)
                waiting, filled = [], 0
    if filled:
        yield _fill(source, config, _joined(waiting), len(wanted), evaluation=True)


def rows_for(lengths: np.ndarray, sequences: int, config_like: tuple[int, int, bool]) -> int:
    """Rows that hold about `sequences` sequences: round(sequences x mean tokens / row length)."""
    row_length, max_residues, packed = config_like
    if not packed:
        return sequences
    mean = float(np.minimum(lengths, max_residues).mean()) + SPECIALS
    return max(1, round(sequences * mean / row_length))


class _EpochOrder:
    """Windows of examples of each epoch."""

    def __init__(self, source: Source, config: StreamConfig):
        self.config = config
        self.groups = None
        self.n = len(source.lengths)
        if config.sample == "one_per_group":
            self.groups = getattr(source, "groups", None)
            if self.groups is None:
                raise UserError(
                    "sample='one_per_group' needs a data set with clusters; found none:"
                    " prepare it with --groups, or set sample='all'"
                )
            self.n = len(self.groups.first) - 1
        self.windows = -(-self.n // packing.WINDOW)
        self.epoch, self.order = -1, None

    def __call__(self, place: Place) -> np.ndarray:
        """Examples of the window: int64 [WINDOW or fewer]."""
        config = self.config
        if place.epoch != self.epoch:
            self.epoch = place.epoch
            self.order = Order(self.n, config.seed, place.epoch, config.block)
        start = place.window * packing.WINDOW
        chosen = self.order(start, start + packing.WINDOW)
        if self.groups is not None:
            key = fold_all(config.seed, purpose("member"), place.epoch)
            chosen = self.groups.draw(chosen, key)
        return chosen


def _check(source: Source, wanted: range) -> None:
    if len(source.lengths) == 0:
        raise UserError("the split holds no sequence; prepare the data set with a larger one")
    if len(source.lengths) > 2**31 - 1:
        raise UserError(f"a split holds at most 2**31 - 1 sequences, found {len(source.lengths):,}")
    if wanted.step != 1:
        raise ValueError(f"a process makes consecutive rows, found {wanted}")


def _train_window(source: Source, config: StreamConfig, order: _EpochOrder, place: Place):
    if place.window >= order.windows:
        raise UserError(f"{place} is past {order.windows} windows of an epoch; another data set?")
    seed, epoch = config.seed, place.epoch
    return _window(
        source,
        config,
        order(place),
        fold(fold_all(seed, purpose("rows"), epoch), np.uint32(place.window)),
        fold_all(seed, purpose("mask"), epoch),
        fold_all(seed, purpose("crop"), epoch),
    )


def _window(source, config, examples, row_key, mask_key, crop_key) -> tuple:
    """The plan of a window and its segments; `None` keys leave the order and the keys alone."""
    residues = np.asarray(source.lengths[examples], np.int64)
    tokens = np.minimum(residues, config.max_residues) + SPECIALS
    layout = packing.best_fit if config.packed else packing.one_a_row
    row = layout(tokens, config.row_length)
    rows = int(row.max()) + 1
    new_row = None if row_key is None else permute(np.arange(rows), rows, row_key)
    plan = packing.plan(tokens, row, new_row)
    example = examples[plan.item]
    word = example.astype(np.uint32)
    none = np.zeros(len(example), np.uint32)
    segments = _Segments(
        example,
        residues[plan.item],
        plan.row,
        plan.offset,
        plan.segment,
        none if mask_key is None else fold(mask_key, word),
        none if crop_key is None else fold(crop_key, word),
    )
    return plan, segments


def _cut(segments: _Segments, plan: packing.Plan, low: int, high: int, to: int) -> _Segments:
    """Rows low..high-1 of a window, renamed to..."""
    part = slice(plan.first[low], plan.first[high])
    values = {f.name: getattr(segments, f.name)[part] for f in dataclasses.fields(segments)}
    values["row"] = values["row"] - low + to
    return _Segments(**values)


def _joined(parts: list[_Segments]) -> _Segments | None:
    return _Segments.join(parts) if parts else None


def _fill(
    source: Source, config: StreamConfig, part: _Segments | None, rows: int, evaluation=False
) -> Batch:
    """Reads the sequences of `part` and lays them into `rows` rows."""
    shape = (rows, config.row_length)
    batch = {
        "tokens": np.full(shape, tokenizer.PAD, np.int32),
        "segment_ids": np.zeros(shape, np.int32),
        "positions": np.zeros(shape, np.int32),
        "example_ids": np.full(shape, NO_EXAMPLE, np.int32),
        "mask_bits": np.full(shape, NO_MASK, np.uint32),
    }
    if part is None or not len(part.example):
        return batch
    sequences = source.sequences(part.example)
    mask_key, crop_key = part.mask_key, part.crop_key
    if evaluation:
        own = np.fromiter(map(zlib.crc32, sequences), np.uint32, len(sequences))
        mask_key = fold(fold_all(config.seed, purpose("evaluation mask")), own)
        crop_key = fold(fold_all(config.seed, purpose("evaluation crop")), own)
    kept = np.minimum(part.residues, config.max_residues)
    start = np.zeros(len(kept), np.int64)
    if config.crop == "random":
        start = crop_key.astype(np.int64) % (part.residues - kept + 1)
    long = np.flatnonzero(part.residues > kept)
    for i in long.tolist():
        sequences[i] = sequences[i][start[i] : start[i] + kept[i]]

    # One flat pass over all tokens; `at` is where each of them goes in the batch.
    tokens = kept + SPECIALS
    ends = np.cumsum(tokens)
    starts = ends - tokens
    flat = tokenizer.residue_ids(b" %b " % b"  ".join(sequences)).astype(np.int32)
    if len(flat) != ends[-1]:
        raise UserError("sequences are not as long as the lengths file says; run prepare --verify")
    flat[starts], flat[ends - 1] = tokenizer.BOS, tokenizer.EOS
    positions = np.arange(len(flat), dtype=np.int32) - np.repeat(starts.astype(np.int32), tokens)
    at = np.repeat((part.row * config.row_length + part.offset - starts), tokens)
    at += np.arange(len(flat))
    index = positions.astype(np.uint32) + np.repeat(start.astype(np.uint32), tokens)
    values = {
        "tokens": flat,
        "segment_ids": np.repeat(part.segment.astype(np.int32), tokens),
        "positions": positions,
        "example_ids": np.repeat(part.example.astype(np.int32), tokens),
        "mask_bits": fold(np.repeat(mask_key, tokens), index),
    }
    for name, value in values.items():
        batch[name].reshape(-1)[at] = value
    return batch
