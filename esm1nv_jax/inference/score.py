"""`esm1nv score`: how well a protein is thought to bear mutations."""

from __future__ import annotations

import csv
import io
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np

from esm1nv_jax.common import files
from esm1nv_jax.common.arguments import Parser
from esm1nv_jax.common.console import bar, console
from esm1nv_jax.common.errors import UserError
from esm1nv_jax.data.compression import Archive, BrokenArchive
from esm1nv_jax.inference import mutants as mutants_lib
from esm1nv_jax.inference.mutants import MODES
from esm1nv_jax.inference.parts import disk
from esm1nv_jax.inference.proteins import scan

COLUMN, SCORE = "mutant", "score"
MEASURED = ("DMS_score", "fitness", "label")  # columns that are compared if --target names none


def read_mutants(path: str) -> tuple[list[str], list[list[str]]]:
    """(names of columns, rows) of a CSV file with a column `mutant`, plain or compressed."""
    try:
        text = b"".join(Archive(Path(path))).decode("utf-8-sig")
        table = [row for row in csv.reader(io.StringIO(text), strict=True) if row]
    except (BrokenArchive, UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{path} cannot be read as CSV: {error}") from None
    if not table or COLUMN not in table[0]:
        raise UserError(
            f"{path} has no column {COLUMN!r}; its first line must name one, with A4G or A4G:L10P "
            "below it"
        )
    columns, *rows = table
    for number, row in enumerate(rows, 2):
        if len(row) != len(columns):
            raise UserError(f"{path}, row {number}: {len(row)} fields, {len(columns)} are named")
    if not rows:
        raise UserError(f"{path} names no mutants")
    return columns, rows


def measurements(
    columns: list[str], rows: list[list[str]], target: str | None
) -> tuple[str, np.ndarray] | None:
    """(column, float64 [rows], NaN where there is no number) to rank the scores against; None where
    nothing was measured.

    Raises UserError where the column `target` is not there, or cannot be ranked.
    """
    column = target or next((c for c in MEASURED if c in columns), None)
    if column is None:
        return None
    if column not in columns:
        raise UserError(f"--target={column} is no column; there are {', '.join(columns)}")
    at = columns.index(column)
    measured = np.full(len(rows), np.nan)
    for i, row in enumerate(rows):
        try:
            measured[i] = float(row[at])
        except ValueError:
            if target and row[at].strip():
                raise UserError(
                    f"row {i + 2}: {column} is {row[at]!r}, which is no number"
                ) from None
    numbers = measured[np.isfinite(measured)]
    if len(numbers) < 3 or np.ptp(numbers) == 0:
        if target:
            raise UserError(f"--target={column} holds no three numbers that differ; leave it out")
        return None
    return column, measured


def spearman(scores: np.ndarray, measured: np.ndarray) -> tuple[float, int]:
    """Rank correlation, and how many rows have a measurement. NaN where all scores are equal."""
    from scipy.stats import spearmanr

    used = np.isfinite(measured)
    rho = spearmanr(scores[used], measured[used]).statistic if np.ptp(scores[used]) else np.nan
    return float(rho), int(used.sum())


def write(out: Path, columns: list[str], rows: list[list[str]], scores: np.ndarray) -> None:
    """The table with its scores behind, in place of OUT at once."""
    temporary = out.with_name(out.name + ".tmp")
    with disk(out, out):
        try:
            with open(temporary, "w", newline="") as file:
                table = csv.writer(file, lineterminator="\n")
                table.writerow([*columns, SCORE])
                table.writerows(
                    [*row, f"{score:.6g}"] for row, score in zip(rows, scores, strict=True)
                )
            os.replace(temporary, out)
        finally:
            temporary.unlink(missing_ok=True)


def protein(path: str) -> tuple[str, str]:
    """(id, sequence) of the only record of a FASTA file."""
    found = list(scan(path))
    if len(found) > 1:
        raise UserError(f"{path} holds {len(found)} proteins; give a file with the wild type alone")
    return found[0][0], found[0][1].decode()


def main(argv: list[str]) -> int | None:
    parser = Parser(
        "score",
        "Scores mutants of a protein: higher is likelier, hence fitter. With --all_singles also "
        "draws a heat map beside --out.",
        "esm1nv score --checkpoint runs/first --fasta wt.fasta --mutants dms.csv --out scores.csv",
    )
    add = parser.add_argument
    add("--checkpoint", required=True, help="a run, one of its steps, a model or exported folder")
    add("--fasta", required=True, help="the wild type")
    add("--mutants", help="CSV with a column `mutant`: A4G, or A4G:L10P for several at once")
    add("--all_singles", action="store_true", help="every single substitution, and a heat map")
    add("--out", required=True, help="CSV to write: the table of --mutants with a column `score`")
    add("--mode", default=MODES[0], choices=MODES)
    add("--additive", action="store_true", help="mask the sites of a mutant one at a time")
    add("--offset", type=int, default=0, help="the first residue has number 1 + offset")
    add("--target", help=f"column to compare by rank (default: {', '.join(MEASURED)} if there)")
    add("--force", action="store_true", help="allow wt-marginals where they mean nothing")
    add("--overwrite", action="store_true", help="replace --out")
    args = parser.parse_args(argv)
    out = Path(args.out)
    picture = out.with_suffix(".png")
    if bool(args.mutants) == args.all_singles:
        parser.error("give --mutants or --all_singles")
    if out.suffix == ".png":
        raise UserError(f"--out {out} is the table; the picture is drawn beside it")
    for path in (out, picture) if args.all_singles else (out,):
        if path.exists() and not args.overwrite:
            raise UserError(f"{path} exists; add --overwrite, or choose another --out")
    files.check(args.out)
    if args.additive and args.mode != MODES[0]:
        raise UserError(f"--additive is for --mode={MODES[0]}, found --mode={args.mode}")
    name, wild_type = protein(args.fasta)
    if args.all_singles:
        columns, names = [COLUMN], mutants_lib.all_singles(wild_type, args.offset)
        rows = [[mutant] for mutant in names]
    else:
        columns, rows = read_mutants(args.mutants)
        names = [row[columns.index(COLUMN)] for row in rows]
        # Row 1 of the file is its header. Checked before the model is loaded.
        mutants_lib.parse_all(names, wild_type, args.offset, first_row=2)
        if SCORE in columns:
            raise UserError(f"{args.mutants} has a column {SCORE!r} already; rename it")
    measured = measurements(columns, rows, args.target)

    from esm1nv_jax.inference.model import load

    model = load(args.checkpoint)
    if len(wild_type) > model.longest:
        console.print(
            f"{name} has {len(wild_type):,} residues, the model reads {model.longest:,}: windows "
            "centred on the sites",
            markup=False,
        )
    scores = _score(model, wild_type, names, args)
    write(out, columns, rows, scores)
    told = f"{out}: {len(rows):,} mutants of {name} by {args.mode}"
    if args.all_singles:
        from esm1nv_jax.inference import heatmap

        with disk(picture, out):
            heatmap.draw(picture, wild_type, names, scores, args.offset)
        told += f"; heat map {picture}"
    console.print(told, markup=False)
    if measured is not None:
        rho, used = spearman(scores, measured[1])
        print(f"spearman {rho:.4f} with {measured[0]} over {used} mutants")


def _score(model, wild_type: str, names: list[str], args) -> np.ndarray:
    with bar("score", len(names), "mutants") as progress:
        tell: Callable[[float], None] = progress.update
        return model.score_variants(
            wild_type, names, args.mode, args.additive, args.offset, args.force, tell
        )
