"""Planned rows to the arrays of a batch: reads the sequences, crops them, lays them out."""

from __future__ import annotations

import zlib

import numpy as np

from esm1nv_jax.common.errors import UserError
from esm1nv_jax.common.hashing import fold, fold_all, purpose
from esm1nv_jax.data import tokenizer
from esm1nv_jax.data.packing import PackedWindow
from esm1nv_jax.data.source import Source
from esm1nv_jax.data.stream_config import SPECIALS, StreamConfig

# The arrays of a batch by name, each [rows, row_length]:
#   tokens       int32   ids of `tokenizer`, <s> and </s> around each sequence
#   segment_ids  int32   which sequence of its row a token belongs to, from 1; 0 in padding
#   positions    int32   from 0 in each segment
#   example_ids  int32   index of the sequence in its split; -1 in padding
#   mask_bits    uint32  a hash of each token, by which residues to mask are chosen
Batch = dict[str, np.ndarray]

_PADDING = {
    "tokens": tokenizer.PAD,
    "segment_ids": 0,
    "positions": 0,
    "example_ids": -1,
    "mask_bits": 0xFFFFFFFF,  # the last to be masked
}


def fill(
    source: Source, config: StreamConfig, window: PackedWindow, rows: int, evaluation: bool = False
) -> Batch:
    """A batch of `rows` rows, of which `window` describes the first; the others are padding.

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

    # Padding counts as one more piece of each row, so that all rows are one run of tokens and every
    # array is a `repeat` over pieces: several times as fast as scattering tokens.
    tokens = kept + SPECIALS
    used = np.bincount(window.row, weights=tokens, minlength=rows).astype(np.int64)
    order = np.argsort(np.concatenate((window.row, np.arange(rows))), kind="stable")
    sizes = np.concatenate((tokens, config.row_length - used))[order]
    texts = [b" %b " % sequence for sequence in sequences]
    texts += [b" " * n for n in (config.row_length - used).tolist()]
    ids = tokenizer.residue_ids(b"".join([texts[i] for i in order.tolist()]))
    if len(ids) != rows * config.row_length:
        raise UserError("sequences are not as long as the lengths say; run esm1nv prepare --verify")

    def spread(values: np.ndarray, padding: int, dtype: type) -> np.ndarray:
        """One value a segment to one value a token, [rows * row_length]."""
        values = np.concatenate((values.astype(dtype), np.full(rows, padding, dtype)))
        return np.repeat(values[order], sizes)

    first = np.cumsum(sizes) - sizes
    positions = np.arange(len(ids), dtype=np.int32) - np.repeat(first.astype(np.int32), sizes)
    residue = positions.astype(np.uint32)
    if start.any():
        residue += spread(start, 0, np.uint32)
    batch = {
        "tokens": ids.astype(np.int32),
        "segment_ids": spread(window.segment, 0, np.int32),
        "positions": positions,
        "example_ids": spread(window.example, -1, np.int32),
        "mask_bits": fold(spread(mask_key, 0, np.uint32), residue),
    }
    real = order < len(tokens)
    batch["tokens"][first[real]] = tokenizer.BOS
    batch["tokens"][first[real] + sizes[real] - 1] = tokenizer.EOS
    padding = np.flatnonzero(batch["segment_ids"] == 0)
    for name, value in _PADDING.items():
        batch[name][padding] = value
    return {name: values.reshape(rows, config.row_length) for name, values in batch.items()}
