"""The tables of `esm1nv score`: CSV files of mutants and measurements, and files of scores."""

from __future__ import annotations

import contextlib
import csv
import json
import math
import os
from array import array
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from esm1nv_jax.common import files
from esm1nv_jax.common.console import bar, console, count
from esm1nv_jax.common.errors import UserError
from esm1nv_jax.data.tables import open_csv
from esm1nv_jax.inference import likelihood
from esm1nv_jax.inference.model import Model
from esm1nv_jax.inference.mutants import MutantError, MutantTable, parse_mutants
from esm1nv_jax.model import label_metrics

COLUMN, SCORE = "mutant", "score"
BLOCK = 64  # mutants or sequences after which scores that take hours are saved
MEASURED = ("DMS_score", "fitness", "label")  # columns that are compared if --target names none


class Measured(NamedTuple):
    """A column, and its numbers: float64 [rows], NaN where there is none."""

    column: str
    values: np.ndarray


def read_mutants(
    path: Path, wild_type: str, offset: int, skip: bool
) -> tuple[list[str], MutantTable]:
    """Names of columns and mutants of a CSV file with a column `mutant`, plain or compressed.

    With `skip`, rows that cannot be scored are left out and counted by kind; else they are refused.
    """
    columns, table = open_csv(str(path))
    if COLUMN not in columns:
        below = "its first line must name one, with A4G or A4G:L10P below it"
        raise UserError(f"{path} has no column {COLUMN!r}; {below}")
    if SCORE in columns:
        raise UserError(f"{path} has a column {SCORE!r} already; rename it")
    at = columns.index(COLUMN)
    names = (fields[at] for _, fields in table)
    skipped: Counter[str] = Counter()
    try:  # row 1 of the file is its header
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


def read_numbers(path: Path, columns: Sequence[str]) -> dict[str, np.ndarray]:
    """Columns of a CSV file: float64 [rows], NaN where there is no column or no number."""
    names, rows = open_csv(str(path))
    values = {column: array("d") for column in columns}
    at = {column: names.index(column) for column in columns if column in names}
    for _, fields in rows:
        for column, content in values.items():
            try:
                content.append(float(fields[at[column]]))
            except (KeyError, ValueError):
                content.append(math.nan)
    return {column: np.array(content) for column, content in values.items()}


def measured_column(columns: list[str], target: str | None) -> str | None:
    """The column that scores are ranked against: `target`, or what `MEASURED` names, if any."""
    column = target or next((c for c in MEASURED if c in columns), None)
    if column is not None and column not in columns:
        raise UserError(f"--target={column} is no column; there are {', '.join(columns)}")
    return column


def read_measured(path: Path, columns: list[str], target: str | None) -> Measured | None:
    """What scores are ranked against. Where there is nothing to rank, None: it is printed why, or
    raised as UserError where it is `target` that was asked for."""
    if (column := measured_column(columns, target)) is None:
        return None
    at, numbers, wrong, first = columns.index(column), array("d"), 0, ""
    for row, fields in enumerate(rows_of(path), 2):
        try:
            numbers.append(float(fields[at]) if fields[at] else math.nan)
        except ValueError:
            numbers.append(math.nan)
            first = first or f"row {row}: {column} is {fields[at]!r}, which is no number"
            wrong += 1
    if first and target is not None:
        raise UserError(first)
    if first:
        console.print(f"{first} ({wrong:,} of {len(numbers):,} rows; not compared)")
    values = np.array(numbers)
    known = values[np.isfinite(values)]
    if len(known) >= 3 and np.ptp(known):
        return Measured(column, values)
    lacks = "holds no three numbers that differ"
    if target is not None:
        raise UserError(f"--target={column} {lacks}; leave it out")
    console.print(f"{column} {lacks}: no rank correlation")
    return None


class SavedScores:
    """Scores by mutant in a file beside --out, so that a job that was killed goes on where it was.

    JSON lines: the settings, then {mutant: score, ...} of each block.
    """

    def __init__(self, out: Path, settings: dict, overwrite: bool):
        self.path = out.with_name(out.name + ".partial")
        lines = []
        if self.path.exists() and not overwrite:
            for line in self.path.read_text(encoding="utf-8", errors="replace").splitlines():
                with contextlib.suppress(ValueError):  # cut short by a crash
                    lines.append(json.loads(line))
            if lines and lines[0] != settings:
                raise UserError(
                    f"{self.path} holds unfinished work with other settings; finish it with those, "
                    "or begin anew with --overwrite"
                )
        blocks = [line for line in lines[1:] if isinstance(line, dict)]
        self.scores: dict[str, float] = dict(pair for block in blocks for pair in block.items())
        if self.scores:
            console.print(f"going on with {self.path}: {count(len(self.scores), 'mutant')} done")
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
    if mode == likelihood.EXACT:
        settings |= {"model": model.digest, "wild_type": wild_type, "precision": model.precision}
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


def spearman(scores: np.ndarray, measured: np.ndarray) -> tuple[float, int]:
    """Rank correlation, and over how many rows. NaN where all scores or all measurements of these
    are equal."""
    used = np.isfinite(measured) & np.isfinite(scores)
    if not used.any():
        return math.nan, 0
    return label_metrics.spearman(measured[used], scores[used]), int(used.sum())


def write_scores(
    out: Path, columns: list[str], rows: Iterable[list[str]], scores: dict[str, np.ndarray]
) -> None:
    """The table with scores as last columns, empty where there is none; in place of OUT at once."""
    with files.replacing(out) as new, open(new, "w", newline="", encoding="utf-8") as file:
        table = csv.writer(file, lineterminator="\n")
        table.writerow([*columns, *scores])
        for row, *values in zip(rows, *scores.values(), strict=True):
            table.writerow([*row, *("" if np.isnan(x) else f"{x:.6g}" for x in values)])
