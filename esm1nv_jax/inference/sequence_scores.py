"""Pseudo-log-likelihoods of whole sequences in a table, insertions and deletions included."""

from __future__ import annotations

import hashlib
from array import array
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from esm1nv_jax.common.console import bar, console, count
from esm1nv_jax.common.errors import UserError
from esm1nv_jax.data import tokenizer
from esm1nv_jax.data.tables import open_csv
from esm1nv_jax.inference import likelihood, variant_table
from esm1nv_jax.inference.likelihood import EXACT, ONE_PASS
from esm1nv_jax.inference.model import Model
from esm1nv_jax.inference.variant_table import BLOCK, SCORE, SavedScores

SEQUENCES = ("mutated_sequence", "sequence")  # names of the column
PER_RESIDUE = f"{SCORE}_per_residue"
BLOCK_RESIDUES = 1 << 16  # of one-pass: logits of so many are in memory


class SequenceTable:
    """A CSV file with a column of sequences, checked; its rows are not held in memory.

    lengths: int32 [rows], 0 where there is no sequence to score. digest: of all sequences.
    """

    def __init__(self, path: Path, skip: bool):
        self.path = path
        self.columns, _ = open_csv(str(path))
        column = next((name for name in SEQUENCES if name in self.columns), None)
        if column is None:
            raise UserError(
                f"{path} has no column {' or '.join(SEQUENCES)}; it has {', '.join(self.columns)}"
            )
        if taken := {SCORE, PER_RESIDUE} & {*self.columns}:
            raise UserError(f"{path} has a column {min(taken)!r} already; rename it")
        self._column = self.columns.index(column)
        lengths, digest, skipped = array("i"), hashlib.sha256(), Counter[str]()
        for row, fields in enumerate(variant_table.rows_of(path)):
            sequence, kind = _normalized(fields[self._column])
            if kind and not skip:
                raise UserError(
                    f"{path}, row {row + 2}: the sequence cannot be scored ({kind}); fix it, or "
                    "leave such rows out with --on-error=skip"
                )
            skipped[kind] += 1
            lengths.append(len(sequence))
            digest.update(sequence + b"\n")
        self.lengths = np.array(lengths, np.int32)
        self.digest = digest.hexdigest()
        if not self.lengths.any():
            raise UserError(f"{path} holds no sequence that can be scored")
        del skipped[""]
        variant_table.print_skipped(skipped, path.name)

    def blocks(self, sequences: int, residues: int) -> Iterator[tuple[list[int], list[bytes]]]:
        """Rows and sequences, at most so many, and at least one, at a time."""
        rows: list[int] = []
        block: list[bytes] = []
        size = 0
        for row, fields in enumerate(variant_table.rows_of(self.path)):
            if not self.lengths[row]:
                continue
            length = int(self.lengths[row])
            if block and (len(block) == sequences or size + length > residues):
                yield rows, block
                rows, block, size = [], [], 0
            rows.append(row)
            size += length
            block.append(_normalized(fields[self._column])[0])
        yield rows, block


def _normalized(text: str) -> tuple[bytes, str]:
    """(sequence, why it cannot be scored); one of the two is empty."""
    try:
        sequence = tokenizer.normalize(text).sequence
    except tokenizer.InvalidResidueError:
        return b"", "no residue letters"
    if b"*" in sequence:
        return b"", "stop"
    return sequence, "" if sequence else "blank"


def score_table(
    model: Model, table: SequenceTable, out: Path, mode: str, overwrite: bool
) -> dict[str, np.ndarray]:
    """Writes `table` with the columns `score`, the pseudo-log-likelihood, and `score_per_residue`,
    divided by the length, to `out`; returns them, float64 [rows], NaN where there is no sequence.

    Killed and started again, it goes on where it was.
    """
    longest = int(table.lengths.argmax())
    model.check_fits(int(table.lengths[longest]), f"row {longest + 2} of {table.path.name}")
    scores = np.full(len(table.lengths), np.nan)
    sequences, passes = int(np.count_nonzero(table.lengths)), int(table.lengths.sum(dtype=np.int64))
    cost = f"{sequences:,} forward passes, one a sequence (exact: {passes:,})"
    if mode == EXACT:
        cost = f"{passes:,} forward passes, one a residue (--mode={ONE_PASS}: {sequences:,})"
    console.print(f"{table.path.name}: {count(sequences, 'sequence')} by {mode}, {cost}")
    settings: dict = {"model": model.digest, "precision": model.precision, "mode": mode}
    settings |= {"longest": model.longest, "sequences": table.digest}
    saved = SavedScores(out, settings, overwrite)
    for row, value in saved.scores.items():
        scores[int(row)] = value
    copied = likelihood.copy_log_odds(model.masking) if mode == ONE_PASS else 0.0
    limits = (BLOCK, 1 << 62) if mode == EXACT else (1 << 62, BLOCK_RESIDUES)
    start = int(table.lengths[np.isfinite(scores)].sum())
    with bar("score", passes, "residues", start=start) as progress:
        for rows, block in table.blocks(*limits):
            if np.isfinite(scores[rows]).all():
                continue
            if mode == EXACT:
                pll = likelihood.pseudo_log_likelihood(
                    model.on_devices, block, model.longest, progress.advance
                )[1]
            else:
                pll = likelihood.one_pass_log_likelihood(
                    model.on_devices, block, model.longest, copied
                )
                progress.advance(sum(map(len, block)))
            scores[rows] = pll
            saved.append(dict(zip(map(str, rows), pll.tolist(), strict=True)))
    per_residue = scores / np.where(table.lengths, table.lengths, 1)
    columns = {SCORE: scores, PER_RESIDUE: per_residue}
    variant_table.write_scores(out, table.columns, variant_table.rows_of(table.path), columns)
    saved.path.unlink()
    return columns
