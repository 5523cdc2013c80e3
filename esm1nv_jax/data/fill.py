"""Planned rows to the arrays of a batch: first read the sequences, then lay out the arrays."""

from __future__ import annotations

import dataclasses
import zlib

import numpy as np

from esm1nv_jax.common.errors import UserError
from esm1nv_jax.common.hashing import fold, fold_all, purpose
from esm1nv_jax.data import tokenizer
from esm1nv_jax.data.packing import SPECIALS, PackedWindow, StreamConfig
from esm1nv_jax.data.source import Labels, Source

# The arrays of a batch by name, each [rows, row_length]:
#   tokens       int32   ids of `tokenizer`, <s> and </s> around each sequence
#   segment_ids  int32   which sequence of its row a token belongs to, from 1; 0 in padding
#   positions    int32   from 0 in each segment
#   example_ids  int32   index of the sequence in its split; -1 in padding
#   mask_bits    uint32  a hash of each token, by which residues to mask are chosen
# And of a source with labels, [rows, row_length] for residues, [rows, max_segments] for proteins;
# -1 or NaN where none is used:
#   labels         int32 or float32  classes or values; [..., classes], 0 or 1, where several hold
#   label_examples int32             index of the sequence in its split; -1 where there is none
Batch = dict[str, np.ndarray]

_PADDING = {
    "tokens": tokenizer.PAD,
    "segment_ids": 0,
    "positions": 0,
    "example_ids": -1,
    "mask_bits": 0xFFFFFFFF,  # the last to be masked
}


@dataclasses.dataclass(frozen=True, eq=False)
class ReadRows:
    """The sequences of planned rows, read and cropped: a byte a token, where a batch has twenty.

    ids: uint8 [rows, row_length], residues alone. The rest is of pieces, which are the segments of
    each row and the padding after them, [segments + rows]: int64 `sizes` in tokens; int32 `segment`
    and `example`, uint32 `mask_key`, and uint32 `start`, the first residue kept. `labels` are
    arrays of the batch as they are.
    """

    ids: np.ndarray
    sizes: np.ndarray
    segment: np.ndarray
    example: np.ndarray
    mask_key: np.ndarray
    start: np.ndarray
    labels: dict[str, np.ndarray] = dataclasses.field(default_factory=dict)


def read_rows(
    source: Source, config: StreamConfig, window: PackedWindow, rows: int, evaluation: bool = False
) -> ReadRows:
    """Reads `rows` rows, of which `window` describes the first; the others are padding.

    In `evaluation` the keys of masks and crops come from the sequences themselves, so that a metric
    does not depend on the order of the data set, nor on what else is in it.
    """
    sequences = source.sequences(window.example)
    mask_key, crop_key = window.mask_key, window.crop_key
    if evaluation:
        checksum = np.fromiter(map(zlib.crc32, sequences), np.uint32, len(sequences))
        mask_key = fold(fold_all(config.seed, purpose("evaluation mask")), checksum)
        crop_key = fold(fold_all(config.seed, purpose("evaluation crop")), checksum)
    kept = np.minimum(window.residues, config.max_residues)
    start = np.zeros(len(kept), np.int64)
    if config.crop == "random":
        start = crop_key.astype(np.int64) % (window.residues - kept + 1)
    for i in np.flatnonzero(window.residues > kept).tolist():
        sequences[i] = sequences[i][start[i] : start[i] + kept[i]]

    # Padding counts as one more piece of each row, so that all rows are one run of pieces.
    tokens = kept + SPECIALS
    used = np.bincount(window.row, weights=tokens, minlength=rows).astype(np.int64)
    padding = config.row_length - used
    order = np.argsort(np.concatenate((window.row, np.arange(rows))), kind="stable")
    texts = [b" %b " % sequence for sequence in sequences]
    texts += [b" " * n for n in padding.tolist()]
    ids = tokenizer.residue_ids(b"".join([texts[i] for i in order.tolist()]))
    if len(ids) != rows * config.row_length:
        raise UserError("sequences are not as long as the lengths say; run esm1nv prepare --verify")

    def pieces(values: np.ndarray, of_padding: int, dtype: type) -> np.ndarray:
        return np.concatenate((values, np.full(rows, of_padding))).astype(dtype)[order]

    return ReadRows(
        ids.reshape(rows, config.row_length),
        np.concatenate((tokens, padding))[order],
        pieces(window.segment, 0, np.int32),
        pieces(window.example, -1, np.int32),
        pieces(mask_key, 0, np.uint32),
        pieces(start, 0, np.uint32),
        {} if source.labels is None else _labels(source.labels, config, window, rows, kept, start),
    )


def _labels(
    labels: Labels, config: StreamConfig, window: PackedWindow, rows: int, kept, start
) -> dict[str, np.ndarray]:
    """The labels of planned rows, where their residues or proteins lie."""
    per_residue = labels.offsets is not None
    shape = (rows, config.row_length if per_residue else config.max_segments)
    values = np.full(shape + labels.values.shape[1:], labels.padding, labels.values.dtype)
    examples = np.full(shape, -1, np.int32)
    if not per_residue:
        where = window.row, window.segment - 1
        values[where], examples[where] = labels.values[window.example], window.example
        return {"labels": values, "label_examples": examples}
    end = np.cumsum(kept + SPECIALS)
    begin_of_row = np.concatenate(([0], end))[np.searchsorted(window.row, window.row)]
    first = end - kept - SPECIALS - begin_of_row + 1  # the column of the first residue, behind <s>
    pieces = (x.tolist() for x in (window.example, window.row, first, kept, start))
    for example, row, column, size, skipped in zip(*pieces, strict=True):
        values[row, column : column + size] = labels.of(example)[skipped : skipped + size]
        examples[row, column : column + size] = example
    return {"labels": values, "label_examples": examples}


def batch_of(rows: ReadRows) -> Batch:
    """The arrays of a batch. Each is a `repeat` of pieces, several times as fast as scattering."""
    first = np.cumsum(rows.sizes) - rows.sizes
    positions = np.arange(rows.ids.size, dtype=np.int32)
    positions -= np.repeat(first.astype(np.int32), rows.sizes)
    residue = positions.astype(np.uint32)
    if rows.start.any():
        residue += np.repeat(rows.start, rows.sizes)
    batch = {
        "tokens": rows.ids.ravel().astype(np.int32),
        "segment_ids": np.repeat(rows.segment, rows.sizes),
        "positions": positions,
        "example_ids": np.repeat(rows.example, rows.sizes),
        "mask_bits": fold(np.repeat(rows.mask_key, rows.sizes), residue),
    }
    real = rows.segment > 0
    batch["tokens"][first[real]] = tokenizer.BOS
    batch["tokens"][first[real] + rows.sizes[real] - 1] = tokenizer.EOS
    padding = np.flatnonzero(batch["segment_ids"] == 0)
    for name, value in _PADDING.items():
        batch[name][padding] = value
    return {name: values.reshape(rows.ids.shape) for name, values in batch.items()} | rows.labels
