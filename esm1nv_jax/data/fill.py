"""Segments of planned rows to arrays: reads the sequences, crops them, lays them out."""

from __future__ import annotations

import dataclasses
import zlib

import numpy as np

from esm1nv_jax.common.errors import UserError
from esm1nv_jax.common.hashing import fold, fold_all, purpose
from esm1nv_jax.data import tokenizer
from esm1nv_jax.data.source import Source
from esm1nv_jax.data.stream_config import SPECIALS, StreamConfig

Batch = dict[str, np.ndarray]

NO_EXAMPLE = -1
_PADDING = {
    "tokens": tokenizer.PAD,
    "segment_ids": 0,
    "positions": 0,
    "example_ids": NO_EXAMPLE,
    "mask_bits": 0xFFFFFFFF,  # the last to be masked
}


@dataclasses.dataclass(frozen=True)
class Segments:
    """Segments, in the order in which they lie in their rows; one array element each [n].

    int64 `example`; `residues` of the whole sequence; `row`; `segment`, from 1 in each row; and
    uint32 `mask_key`, `crop_key`.
    """

    example: np.ndarray
    residues: np.ndarray
    row: np.ndarray
    segment: np.ndarray
    mask_key: np.ndarray
    crop_key: np.ndarray

    @staticmethod
    def join(parts: list[Segments]) -> Segments:
        names = [field.name for field in dataclasses.fields(Segments)]
        return Segments(*(np.concatenate([getattr(p, n) for p in parts]) for n in names))

    def of_rows(self, low: int, high: int, to: int) -> Segments:
        """The segments of rows low..high-1, as rows `to` and on."""
        part = slice(*np.searchsorted(self.row, (low, high)))
        values = {f.name: getattr(self, f.name)[part] for f in dataclasses.fields(self)}
        return Segments(**{**values, "row": values["row"] - low + to})


@dataclasses.dataclass(frozen=True)
class Window:
    """A planned window: so many rows, and what is in them."""

    rows: int
    segments: Segments


def fill(
    source: Source, config: StreamConfig, part: Segments | None, rows: int, evaluation: bool = False
) -> Batch:
    """Reads the sequences of `part` and lays them into `rows` rows."""
    if part is None:
        return _empty(rows, config.row_length)
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
    for i in np.flatnonzero(part.residues > kept).tolist():
        sequences[i] = sequences[i][start[i] : start[i] + kept[i]]

    # Padding counts as one more piece of each row, so that all rows are one run of tokens and every
    # array is a `repeat` over pieces: several times as fast as scattering tokens into place.
    tokens = kept + SPECIALS
    used = np.bincount(part.row, weights=tokens, minlength=rows).astype(np.int64)
    order = np.argsort(np.concatenate((part.row, np.arange(rows))), kind="stable")
    sizes = np.concatenate((tokens, config.row_length - used))[order]
    texts = [b" %b " % sequence for sequence in sequences]
    texts += [b" " * n for n in (config.row_length - used).tolist()]
    ids = tokenizer.residue_ids(b"".join([texts[i] for i in order.tolist()]))
    if len(ids) != rows * config.row_length:
        raise UserError("sequences are not as long as the lengths say; run esm1nv prepare --verify")

    def spread(values: np.ndarray, padding: int, dtype: type) -> np.ndarray:
        """One value a segment to one value a token, [rows * row_length]."""
        padded = np.concatenate((values.astype(dtype), np.full(rows, padding, dtype)))
        return np.repeat(padded[order], sizes)

    first = np.cumsum(sizes) - sizes
    positions = np.arange(len(ids), dtype=np.int32) - np.repeat(first.astype(np.int32), sizes)
    index = positions.astype(np.uint32)
    if start.any():
        index += spread(start, 0, np.uint32)
    batch = {
        "tokens": ids.astype(np.int32),
        "segment_ids": spread(part.segment, 0, np.int32),
        "positions": positions,
        "example_ids": spread(part.example, NO_EXAMPLE, np.int32),
        "mask_bits": fold(spread(mask_key, 0, np.uint32), index),
    }
    real = order < len(tokens)
    batch["tokens"][first[real]] = tokenizer.BOS
    batch["tokens"][first[real] + sizes[real] - 1] = tokenizer.EOS
    padding = np.flatnonzero(batch["segment_ids"] == 0)
    for name, value in _PADDING.items():
        batch[name][padding] = value
    return {name: values.reshape(rows, config.row_length) for name, values in batch.items()}


def _empty(rows: int, row_length: int) -> Batch:
    return {
        name: np.full((rows, row_length), value, np.uint32 if name == "mask_bits" else np.int32)
        for name, value in _PADDING.items()
    }
