"""The tables of `esm1nv score`: CSV files of mutants, or of whole sequences with insertions and
deletions. They come back with their scores."""

from __future__ import annotations

import contextlib
import csv
import hashlib
import json
import os
from array import array
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np

from esm1nv_jax.common import files
from esm1nv_jax.common.console import bar, console, count
from esm1nv_jax.common.errors import UserError
from esm1nv_jax.data import tokenizer
from esm1nv_jax.data.tables import check_unique, delimiter_of, open_csv
from esm1nv_jax.inference import likelihood
from esm1nv_jax.inference.likelihood import EXACT, ONE_PASS
from esm1nv_jax.inference.model import Model
from esm1nv_jax.inference.mutants import MutantError, MutantTable, parse_mutants

COLUMN, SCORE = "mutant", "score"
SEQUENCES = ("mutated_sequence", "sequence")  # names of the column
PER_RESIDUE = f"{SCORE}_per_residue"
BLOCK_RESIDUES = 1 << 16  # of one-pass: logits of so many are in memory
BLOCK = 64  # mutants or sequences after which scores that take hours are saved


def read_mutants(
    path: Path, wild_type: str, offset: int, skip: bool
) -> tuple[list[str], MutantTable]:
    """Names of columns and mutants of a CSV file with a column `mutant`, plain or compressed.

    With `skip`, rows that cannot be scored are left out and counted by kind; else they are refused.
    """
    columns = open_csv(str(path))[0]
    if COLUMN not in columns:
        below = "its first line must name one, with A4G or A4G:L10P below it"
        raise UserError(f"{path} has no column {COLUMN!r}; {below}")
    if SCORE in columns:
        raise UserError(f"{path} has a column {SCORE!r} already; rename it")
    skipped: Counter[str] = Counter()
    try:  # row 1 of the file is its header
        names = column_of(path, COLUMN)
        mutants = parse_mutants(names, wild_type, offset, 2, skipped if skip else None)
    except MutantError as error:
        raise UserError(f"{error}; fix it, or leave such rows out with --on-error=skip") from None
    if not mutants.total:
        raise UserError(f"{path} names no mutants")
    print_skipped(skipped)
    return columns, mutants


def print_skipped(skipped: Counter[str], name: str = "") -> None:
    """Prints how many rows have no score, by kind; nothing where there are none."""
    if skipped:
        kinds = ", ".join(f"{kind} {n:,}" for kind, n in sorted(skipped.items()))
        rows = count(skipped.total(), "row")
        console.print(f"{name}{': ' * bool(name)}{rows} without a score: {kinds}")


def rows_of(path: Path) -> Iterator[list[str]]:
    return (fields for _, fields in open_csv(str(path))[1])


def column_of(path: Path, name: str) -> Iterator[str]:
    columns, rows = open_csv(str(path))
    check_unique(str(path), columns, [name])
    at = columns.index(name)
    return (fields[at] for _, fields in rows)


class SequenceTable:
    """A CSV file with a column of sequences, checked; its rows are not held in memory.

    lengths: int32 [rows], 0 where there is no sequence to score. digest: of all sequences.
    """

    def __init__(self, path: Path, skip: bool):
        self.path = path
        self.columns = open_csv(str(path))[0]
        column = next((name for name in SEQUENCES if name in self.columns), None)
        if column is None:
            raise UserError(
                f"{path} has no column {' or '.join(SEQUENCES)}; it has {', '.join(self.columns)}"
            )
        if taken := {SCORE, PER_RESIDUE} & {*self.columns}:
            raise UserError(f"{path} has a column {min(taken)!r} already; rename it")
        self._column = column
        lengths, digest, skipped = array("i"), hashlib.sha256(), Counter[str]()
        for row, text in enumerate(column_of(path, column)):
            sequence, kind = _normalized(text)
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
        print_skipped(skipped, path.name)

    def blocks(self, sequences: int, residues: int) -> Iterator[tuple[list[int], list[bytes]]]:
        """Rows and sequences, at most so many, and at least one, at a time."""
        rows: list[int] = []
        block: list[bytes] = []
        size = 0
        texts = column_of(self.path, self._column)
        for row, (text, length) in enumerate(zip(texts, self.lengths.tolist(), strict=True)):
            if not length:
                continue
            if block and (len(block) == sequences or size + length > residues):
                yield rows, block
                rows, block, size = [], [], 0
            rows.append(row)
            size += length
            block.append(_normalized(text)[0])
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


class SavedScores:
    """Scores by mutant in a file beside --out, so that a job that was killed goes on where it was.

    JSON lines: the settings, then {mutant: score, ...} of each block.
    """

    def __init__(self, out: Path, settings: dict, overwrite: bool, noun: str = "mutant"):
        self.path = out.with_name(out.name + ".partial")
        lines = []
        if self.path.exists():
            for line in self.path.read_text(encoding="utf-8", errors="replace").splitlines():
                with contextlib.suppress(ValueError):  # cut short by a crash
                    lines.append(json.loads(line))
            if lines and lines[0] != settings:
                if not overwrite:
                    raise UserError(
                        f"{self.path} holds unfinished work with other settings; finish it with "
                        "those, or begin anew with --overwrite"
                    )
                lines = []
        blocks = [line for line in lines[1:] if isinstance(line, dict)]
        self.scores: dict[str, float] = dict(pair for block in blocks for pair in block.items())
        if self.scores:
            console.print(f"going on with {self.path}: {count(len(self.scores), noun)} done")
        with files.writing(self.path):  # whole or not at all: a full disk takes nothing away
            text = f"{json.dumps(settings)}\n{json.dumps(self.scores)}\n"
            files.write_atomically(self.path, text)

    def append(self, block: dict) -> None:
        with files.writing(self.path), open(self.path, "a", encoding="utf-8") as file:
            file.write(json.dumps(block) + "\n")
            file.flush()
            os.fsync(file.fileno())


def score_and_write(
    model: Model,
    wild_type: str,
    mutants: MutantTable,
    columns: list[str],
    table: Iterable[list[str]],
    out: Path,
    mode: str,
    additive: bool,
    overwrite: bool,
    **settings: object,
) -> np.ndarray:
    """Writes the rows of a table with the scores of its mutants to `out`; returns the scores,
    float64 [rows], NaN where a row has none.

    Exact scores, which take hours, are saved block by block, and go on where a killed job was if
    model, wild type and other `settings` are the same.
    """
    scores, saved, step = np.full(mutants.total, np.nan), None, max(1, len(mutants))
    if mode == EXACT:
        settings |= {"model": model.digest, "wild_type": wild_type, "precision": model.arithmetic}
        saved, step = SavedScores(out, settings | {"longest": model.longest}, overwrite), BLOCK
    blocks = [mutants[first : first + step] for first in range(0, len(mutants), step)]
    if saved:
        for block in blocks:
            scores[block.rows] = [saved.scores.get(mutant.name, np.nan) for mutant in block]
    todo = [block for block in blocks if np.isnan(scores[block.rows]).any()]
    start = mutants.total - sum(map(len, todo))
    with bar("score", mutants.total, "mutants", start=start) as progress:
        for block in todo:
            scores[block.rows] = likelihood.score_mutants(
                model.on_devices,
                wild_type,
                block,
                model.longest,
                mode,
                additive,
                on_progress=lambda done: progress.update(start + done),  # noqa: B023
            )
            if saved:
                values = scores[block.rows].tolist()
                saved.append({m.name: x for m, x in zip(block, values, strict=True)})
            start += len(block)
    write_scores(out, columns, table, {SCORE: scores})
    if saved:
        saved.path.unlink()
    return scores


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
    settings: dict = {"model": model.digest, "precision": model.arithmetic, "mode": mode}
    settings |= {"longest": model.longest, "sequences": table.digest}
    saved = SavedScores(out, settings, overwrite, "sequence")
    for row, value in saved.scores.items():
        scores[int(row)] = value
    copied = likelihood.copy_log_odds(model.masking) if mode == ONE_PASS else 0.0
    limits = (BLOCK, 1 << 62) if mode == EXACT else (1 << 62, BLOCK_RESIDUES)
    start = int(table.lengths[np.isfinite(scores)].sum())
    with bar("score", passes, "residues", start=start) as progress:
        for rows, block in table.blocks(*limits):
            if np.isfinite(scores[rows]).all():
                continue
            args = model.on_devices, block, model.longest
            if mode == EXACT:
                pll = likelihood.pseudo_log_likelihood(*args, progress.advance)[1]
            else:
                pll = likelihood.one_pass_log_likelihood(*args, copied)
                progress.advance(sum(map(len, block)))
            scores[rows] = pll
            saved.append(dict(zip(map(str, rows), pll.tolist(), strict=True)))
    per_residue = scores / np.where(table.lengths, table.lengths, 1)
    columns = {SCORE: scores, PER_RESIDUE: per_residue}
    write_scores(out, table.columns, rows_of(table.path), columns)
    saved.path.unlink()
    return columns


def write_scores(
    out: Path, columns: list[str], rows: Iterable[list[str]], scores: dict[str, np.ndarray]
) -> None:
    """The table with scores as last columns, empty where there is none; in place of OUT at once."""
    with files.replacing(out) as new, open(new, "w", newline="", encoding="utf-8") as file:
        table = csv.writer(file, delimiter=delimiter_of(out), lineterminator="\n")
        table.writerow([*columns, *scores])
        for row, *values in zip(rows, *scores.values(), strict=True):
            table.writerow([*row, *("" if np.isnan(x) else f"{x:.6g}" for x in values)])
