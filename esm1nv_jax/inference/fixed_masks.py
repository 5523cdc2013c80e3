"""Fixed masks of an evaluation, made or read from a file, so that any model can be asked the same.

A file of masks is JSON lines, one a protein:
  {"id": "P12345", "sequence": "MKV", "positions": [1], "inputs": ["<mask>"]}
`sequence` is the protein as it was cropped, `?` for an unknown letter; `positions` count its
residues from 0, and `inputs` is what stands there instead: `<mask>`, another letter, or the same.
"""

from __future__ import annotations

import collections
import json
from collections.abc import Iterator
from typing import NamedTuple, TextIO

import jax
import numpy as np

from esm1nv_jax.common.errors import UserError
from esm1nv_jax.data import tokenizer
from esm1nv_jax.data.pipeline import Batch, StreamConfig, evaluation_batches
from esm1nv_jax.data.source import MemorySource, Source
from esm1nv_jax.model import esm2, masking
from esm1nv_jax.model.masking import Masked, MaskingConfig

UNKNOWN = "?"
# What may stand at a predicted position.
_IDS = {t: i for i, t in enumerate(tokenizer.TOKENS) if i >= tokenizer.MASK}


class Record(NamedTuple):
    """The masks of one protein; positions count residues from 0."""

    positions: np.ndarray  # int [n]
    inputs: np.ndarray  # int [n]: tokens that stand there


def drawn(
    source: Source, stream: StreamConfig, recipe: MaskingConfig, vocabulary: str
) -> Iterator[tuple[Batch, Masked]]:
    """Every protein once, masked by the hash of its own sequence; arrays on the host.

    Letters that `vocabulary`, the model's own, does not have are not predicted.
    """
    corrupt = jax.jit(masking.mask, static_argnums=0)
    for batch in evaluation_batches(source, stream):
        tokens = esm2.readable(vocabulary, batch["tokens"])
        masked = corrupt(recipe, tokens, batch["segment_ids"], batch["mask_bits"])
        yield batch, jax.device_get(masked)


def given(
    source: Source, stream: StreamConfig, records: list[Record]
) -> Iterator[tuple[Batch, Masked]]:
    """Every protein once, masked as `records`, one for each example of `source`, say.

    Raises UserError where a mask lies beyond the residues that are read.
    """
    for example, record in enumerate(records):
        if len(record.positions) and record.positions.max() >= stream.max_residues:
            raise UserError(
                f"{source.ids([example])[0]}: residue {record.positions.max() + 1} is masked, "
                f"{stream.max_residues} are read; raise --max-residues if the model has positions "
                f"for them, or write the masks with --max-residues {stream.max_residues}"
            )
    for batch in evaluation_batches(source, stream):
        tokens, B = batch["tokens"], len(batch["tokens"])
        found = collections.defaultdict(list)
        for row, example, start in segments(batch):
            record = records[example]
            for position, token in zip(record.positions, record.inputs, strict=True):
                found[row].append((start + 1 + int(position), int(token)))
        # One shape for all batches: as many entries as a row could be asked for.
        M = stream.row_length
        index_BM, inputs_BT = np.zeros((B, M), np.int32), tokens.copy()
        selected_BM = np.zeros((B, M), bool)
        for row, entries in found.items():
            at, token = np.array(sorted(entries), np.int32).T
            index_BM[row, : len(at)], selected_BM[row, : len(at)] = at, True
            inputs_BT[row, at] = token
        targets_BM = np.take_along_axis(tokens, index_BM, axis=1)
        masked_BM = selected_BM & (
            np.take_along_axis(inputs_BT, index_BM, axis=1) == tokenizer.MASK
        )
        yield batch, Masked(inputs_BT, index_BM, targets_BM, selected_BM, masked_BM)


def segments(batch: Batch) -> Iterator[tuple[int, int, int]]:
    """(row, example, column of its <s>) of every protein in a batch."""
    rows, columns = np.nonzero((batch["segment_ids"] > 0) & (batch["positions"] == 0))
    examples = batch["example_ids"][rows, columns]
    yield from zip(rows.tolist(), examples.tolist(), columns.tolist(), strict=True)


def written(
    file: TextIO, source: Source, corrupted: Iterator[tuple[Batch, Masked]]
) -> Iterator[tuple[Batch, Masked]]:
    """Passes `corrupted` on, and writes the masks of every protein to `file`."""
    for batch, masked in corrupted:
        found = list(segments(batch))
        names = source.ids([example for _, example, _ in found])
        for name, (row, _, start) in zip(names, found, strict=True):
            segment = batch["segment_ids"][row, start]
            end = start + int((batch["segment_ids"][row] == segment).sum())
            residues = tokenizer.decode(batch["tokens"][row, start + 1 : end - 1])
            at = masked.index_BM[row][masked.selected_BM[row]]
            at = at[(at > start) & (at < end)]
            line = {
                "id": name,
                "sequence": residues.replace("<unk>", UNKNOWN),
                "positions": (at - start - 1).tolist(),
                "inputs": [tokenizer.TOKENS[i] for i in masked.inputs_BT[row, at]],
            }
            file.write(json.dumps(line) + "\n")
        yield batch, masked


def read(path: str) -> tuple[MemorySource, list[Record]]:
    """The proteins of a file of masks, and the masks of each."""
    proteins, records, number = [], [], 0
    try:
        with open(path) as file:
            for text in file:
                number += 1
                name, sequence, record = _record(json.loads(text))
                proteins.append((name, sequence))
                records.append(record)
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from None
    except ValueError as error:
        raise UserError(
            f"{path}, line {number}: {error}; make a file of masks by esm1nv evaluate --masks-out"
        ) from None
    if not records:
        raise UserError(f"{path} holds no masks; make it by esm1nv evaluate --masks-out")
    return MemorySource(proteins), records


def _record(line: object) -> tuple[str, bytes, Record]:
    """(id, sequence, masks) of a line. Raises ValueError that says what is wrong with it."""
    kinds = {"id": str, "sequence": str, "positions": list, "inputs": list}
    for name, kind in kinds.items():
        if not (isinstance(line, dict) and isinstance(line.get(name), kind)):
            raise ValueError(f"no {name!r} that is a {kind.__name__}")
    sequence = tokenizer.clean(line["sequence"]).sequence
    positions, inputs = line["positions"], line["inputs"]
    if len(positions) != len(inputs):
        raise ValueError(f"{len(positions)} positions, {len(inputs)} inputs")
    if not all(type(at) is int and 0 <= at < len(sequence) for at in positions):
        raise ValueError(f"positions are integers in 0..{len(sequence) - 1}")
    if len(set(positions)) < len(positions):
        raise ValueError("a position stands there twice")
    if unknown := [token for token in inputs if token not in list(_IDS)]:
        raise ValueError(f"input {unknown[0]!r} is neither <mask> nor a residue letter")
    found = Record(np.array(positions, np.int64), np.array([_IDS[t] for t in inputs], np.int64))
    return line["id"], sequence, found
