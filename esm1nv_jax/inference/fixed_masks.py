"""Fixed masks of an evaluation, made or read from a file, so that any model can be asked the same.

A file of masks is JSON lines, one a protein:
  {"id": "P12345", "sequence": "MKV", "positions": [1], "inputs": ["<mask>"]}
`sequence` is the protein as it was cropped, `?` for an unknown letter; `positions` count its
residues from 0, and `inputs` is what stands there instead: `<mask>`, another letter, or the same.
The first line also holds `residue_counts`, those of the unigram baseline, by letter.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np

from esm1nv_jax.common import files
from esm1nv_jax.common.errors import UserError
from esm1nv_jax.data import tokenizer
from esm1nv_jax.data.fill import Batch
from esm1nv_jax.data.packing import StreamConfig
from esm1nv_jax.data.pipeline import evaluation_batches
from esm1nv_jax.data.source import MemorySource, Source
from esm1nv_jax.model import esm2, masking
from esm1nv_jax.model.masking import Masked, MaskingConfig

UNKNOWN = "?"
# What may stand at a predicted position.
_INPUT_IDS = {t: i for i, t in enumerate(tokenizer.TOKENS) if i >= tokenizer.MASK}


# Of one protein, int64 [n] each: positions, counting residues from 0; tokens that stand there.
ProteinMasks = tuple[np.ndarray, np.ndarray]


class MaskFile(NamedTuple):
    """The proteins of a file of masks, the masks of each, and the residue counts [25] of the
    unigram baseline where the file has them."""

    source: MemorySource
    masks: list[ProteinMasks]
    residue_counts: np.ndarray | None


def draw_masks(
    source: Source, stream: StreamConfig, recipe: MaskingConfig, vocabulary: str
) -> Iterator[tuple[Batch, Masked]]:
    """Every protein once, masked by the hash of its own sequence; arrays on the host.

    Letters that `vocabulary`, the model's own, does not have are not predicted.
    """
    corrupt = jax.jit(masking.mask, static_argnums=0)
    for batch in evaluation_batches(source, stream):
        tokens = esm2.map_missing_to_unk(vocabulary, batch["tokens"])
        masked = corrupt(recipe, tokens, batch["segment_ids"], batch["mask_bits"])
        yield batch, jax.device_get(masked)


def apply_masks(
    source: Source, stream: StreamConfig, masks: list[ProteinMasks]
) -> Iterator[tuple[Batch, Masked]]:
    """Every protein once, with the masks of the same index.

    Raises UserError where a mask lies beyond the residues that are read.
    """
    for example, (positions, _) in enumerate(masks):
        if (last := positions.max(initial=-1)) >= stream.max_residues:
            raise UserError(
                f"{source.ids([example])[0]}: residue {last + 1} is masked, "
                f"{stream.max_residues} are read; raise --max-residues if the model has positions "
                f"for them, or write the masks with --max-residues {stream.max_residues}"
            )
    for batch in evaluation_batches(source, stream):
        tokens = batch["tokens"]
        inputs_BT, predicted_BT = tokens.copy(), np.zeros(tokens.shape, bool)
        for row, example, start in _proteins(batch):
            positions, inputs = masks[example]
            inputs_BT[row, start + 1 + positions] = inputs
            predicted_BT[row, start + 1 + positions] = True
        # One shape for all batches: as many entries as a row could be asked for, in order first.
        order_BT = np.argsort(~predicted_BT, axis=1, kind="stable").astype(np.int32)
        is_target_BM = np.take_along_axis(predicted_BT, order_BT, axis=1)
        positions_BM = np.where(is_target_BM, order_BT, 0)
        targets_BM = np.take_along_axis(tokens, positions_BM, axis=1)
        is_mask_BM = np.take_along_axis(inputs_BT, positions_BM, axis=1) == tokenizer.MASK
        arrays = (inputs_BT, positions_BM, targets_BM, is_target_BM, is_target_BM & is_mask_BM)
        yield batch, Masked(*arrays)  # type: ignore[arg-type]  # NumPy arrays, as they are small


def _proteins(batch: Batch) -> Iterator[tuple[int, int, int]]:
    """(row, example, column of its <s>) of every protein in a batch."""
    rows, columns = np.nonzero((batch["segment_ids"] > 0) & (batch["positions"] == 0))
    examples = batch["example_ids"][rows, columns]
    yield from zip(rows.tolist(), examples.tolist(), columns.tolist(), strict=True)


def write_masks(
    path: str, source: Source, corrupted: Iterator[tuple[Batch, Masked]], residue_counts: np.ndarray
) -> Iterator[tuple[Batch, Masked]]:
    """Passes `corrupted` on, and writes the masks of every protein to a file, which is there once
    they are complete."""
    counts = dict(zip(tokenizer.RESIDUES, map(int, residue_counts), strict=True))
    first: dict = {"residue_counts": counts}
    with files.beside(Path(path)) as new:
        for batch, masked in corrupted:
            proteins, lines = list(_proteins(batch)), []
            ids = source.ids([example for _, example, _ in proteins])
            for name, (row, _, start) in zip(ids, proteins, strict=True):
                segment = batch["segment_ids"][row, start]
                end = start + int((batch["segment_ids"][row] == segment).sum())
                residues = tokenizer.decode(batch["tokens"][row, start + 1 : end - 1])
                at = masked.prediction_positions_BM[row][masked.is_target_BM[row]]
                at = at[(at > start) & (at < end)]
                line = {
                    "id": name,
                    "sequence": residues.replace("<unk>", UNKNOWN),
                    "positions": (at - start - 1).tolist(),
                    "inputs": [tokenizer.TOKENS[i] for i in masked.inputs_BT[row, at]],
                }
                lines.append(json.dumps(line | first) + "\n")
                first = {}
            with files.writing(path), new.open("a", encoding="utf-8") as file:
                file.writelines(lines)
            yield batch, masked


def read_masks(path: str) -> MaskFile:
    """Reads a file of masks. Raises UserError that names the line at fault."""
    proteins, masks, counts, number = [], [], None, 0
    try:
        with open(path, encoding="utf-8-sig") as file:
            for text in file:
                number += 1
                line = json.loads(text)
                name, sequence, mask = _parse(line)
                proteins.append((name, sequence))
                masks.append(mask)
                if "residue_counts" in line:
                    letters = line["residue_counts"]
                    counts = np.array([int(letters[a]) for a in tokenizer.RESIDUES])
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from None
    except (ValueError, TypeError, LookupError) as error:
        raise UserError(
            f"{path}, line {number}: {error}; make a file of masks by esm1nv evaluate --masks-out"
        ) from None
    if not masks:
        raise UserError(f"{path} holds no masks; make it by esm1nv evaluate --masks-out")
    return MaskFile(MemorySource(proteins), masks, counts)


def _parse(line: object) -> tuple[str, bytes, ProteinMasks]:
    """(id, sequence, masks) of a line. Raises ValueError that says what is wrong with it."""
    kinds = {"id": str, "sequence": str, "positions": list, "inputs": list}
    if not isinstance(line, dict):
        raise ValueError("no JSON object")
    for name, kind in kinds.items():
        if not isinstance(line.get(name), kind):
            raise ValueError(f"no {name!r} that is a {kind.__name__}")
    sequence, positions, inputs = line["sequence"].upper(), line["positions"], line["inputs"]
    if wrong := re.search(r"[^A-Z*?]", sequence):
        raise ValueError(f"the sequence has {wrong[0]!r}, which is no residue letter")
    if len(positions) != len(inputs):
        raise ValueError(f"{len(positions)} positions, {len(inputs)} inputs")
    if not all(type(at) is int and 0 <= at < len(sequence) for at in positions):
        raise ValueError(f"positions are integers in 0..{len(sequence) - 1}")
    if len(set(positions)) < len(positions):
        raise ValueError("a position stands there twice")
    if unknown := [token for token in inputs if token not in list(_INPUT_IDS)]:
        raise ValueError(f"input {unknown[0]!r} is neither <mask> nor a residue letter")
    ids = np.array([_INPUT_IDS[token] for token in inputs], np.int64)
    sequence = sequence.replace(UNKNOWN, "J")  # as in FASTA; a `?` is read as <mask> elsewhere
    return line["id"], sequence.encode(), (np.array(positions, np.int64), ids)
