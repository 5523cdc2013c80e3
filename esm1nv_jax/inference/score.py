"""`esm1nv score`: how well a protein is thought to bear mutations."""

from __future__ import annotations

import contextlib
import csv
import json
import math
import os
from collections import Counter
from pathlib import Path

import numpy as np

from esm1nv_jax.common import files
from esm1nv_jax.common.command import Parser
from esm1nv_jax.common.console import bar, console, count, stdout
from esm1nv_jax.common.errors import UserError
from esm1nv_jax.data.fasta import scan
from esm1nv_jax.data.labeled_data import read_csv
from esm1nv_jax.inference import variant_scores
from esm1nv_jax.inference.model import PRECISIONS, Model, load

COLUMN, SCORE = "mutant", "score"
MEASURED = ("DMS_score", "fitness", "label")  # columns that are compared if --target names none
BLOCK = 64  # mutants after which scores that take hours are saved
HEAT_MAP_ORDER = "GAVLIMCPFWYSTNQHKRDE"  # by kind: small, aliphatic, aromatic, polar, charged
HEAT_MAP_RESIDUES, HEAT_MAP_LINES = 100, 40  # in a line; lines, of more residues if need be


def main(argv: list[str]) -> None:
    modes = variant_scores.MODES
    parser = Parser(
        "score",
        "Scores mutants of a protein: higher is likelier, hence fitter. With --all-singles also "
        "draws a heat map beside --out.",
        "esm1nv score --checkpoint runs/first --fasta wt.fasta --mutants dms.csv --out scores.csv",
    )
    add = parser.add_argument
    add("--checkpoint", required=True, help="a run, one of its steps, a model or exported folder")
    add("--fasta", required=True, help="the wild type")
    add("--mutants", help="CSV with a column `mutant`: A4G, or A4G:L10P for several at once")
    add("--all-singles", action="store_true", help="every single substitution, and a heat map")
    add("--out", required=True, help="CSV to write: the table of --mutants with a column `score`")
    add("--mode", default=modes[0], choices=modes)
    add("--additive", action="store_true", help="mask the sites of a mutant one at a time")
    add("--offset", type=int, default=0, help="the first residue has number 1 + offset")
    add("--target", help=f"column to compare by rank (default: {', '.join(MEASURED)} if there)")
    add("--on-error", default="stop", choices=("stop", "skip"), help="skip and count bad rows")
    add("--max-residues", type=int, metavar="N", help="read at once (default as trained)")
    add("--precision", default="fp32", choices=tuple(PRECISIONS), help="of matrix products")
    add("--force", action="store_true", help="allow wt-marginals where they mean nothing")
    add("--overwrite", action="store_true", help="replace --out")
    args = parser.parse_args(argv)
    out = Path(args.out)
    picture = out.with_suffix(".png")
    if bool(args.mutants) == args.all_singles:
        parser.error("give --mutants or --all-singles")
    if out.suffix == ".png":
        raise UserError(f"--out {out} is the table; the picture is drawn beside it")
    for path in (out, picture) if args.all_singles else (out,):
        if path.exists() and not args.overwrite:
            raise UserError(f"{path} exists; add --overwrite, or choose another --out")
    files.check(args.out)
    if args.additive and args.mode != modes[0]:
        raise UserError(f"--additive is for --mode={modes[0]}, found --mode={args.mode}")
    name, wild_type = read_wild_type(args.fasta)
    if args.all_singles:
        columns, names = [COLUMN], variant_scores.all_singles(wild_type, args.offset)
        rows = [[mutant] for mutant in names]
    else:
        columns, rows = read_mutants(args.mutants)
        names = [row[columns.index(COLUMN)] for row in rows]
        if SCORE in columns:
            raise UserError(f"{args.mutants} has a column {SCORE!r} already; rename it")
    # Checked before the model is loaded.
    mutants = read_rows(names, wild_type, args.offset, args.on_error == "skip")
    measured = read_measurements(columns, rows, args.target)

    model = load(args.checkpoint, args.precision, args.max_residues)
    model.check_mode(args.mode, args.force)
    if len(wild_type) > model.longest:
        console.print(
            f"{name} has {len(wild_type):,} residues, the model reads {model.longest:,}: windows "
            "centred on the sites"
        )
    saved = None
    if args.mode == "pseudo-perplexity":
        settings = {"model": model.digest, "wild_type": wild_type, "offset": args.offset}
        settings |= {"precision": args.precision, "longest": model.longest}
        saved = SavedScores(out, settings, args.overwrite)
    scores = score_rows(model, wild_type, mutants, len(rows), args.mode, args.additive, saved)
    write_scores(out, columns, rows, scores)
    if saved:
        saved.path.unlink()
    done = f"{out}: {count(len(rows), 'mutant')} of {name} by {args.mode}"
    if args.all_singles:
        with files.writing(picture):
            plot_heat_map(picture, wild_type, names, scores, args.offset)
        done += f"; heat map {picture}"
    console.print(done)
    if measured is not None:
        rho, used = spearman(scores, measured[1])
        stdout.print(f"spearman {rho:.4f} with {measured[0]} over {count(used, 'mutant')}")


def read_wild_type(path: str) -> tuple[str, str]:
    """(id, sequence) of the only record of a FASTA file."""
    proteins = list(scan(path))
    if len(proteins) > 1:
        raise UserError(f"{path} holds {len(proteins)} proteins; give a file with the wild type")
    return proteins[0][0], proteins[0][1].decode()


def read_mutants(path: str) -> tuple[list[str], list[list[str]]]:
    """(names of columns, rows) of a CSV file with a column `mutant`, plain or compressed."""
    columns, table = read_csv(path)
    if COLUMN not in columns:
        below = "its first line must name one, with A4G or A4G:L10P below it"
        raise UserError(f"{path} has no column {COLUMN!r}; {below}")
    if not table:
        raise UserError(f"{path} names no mutants")
    return columns, [fields for _, fields in table]


def read_rows(
    names: list[str], wild_type: str, offset: int, skip: bool
) -> dict[int, variant_scores.Mutant]:
    """Mutants by row of the table. With `skip`, those that cannot be scored are left out and
    counted by kind; without, the first one raises a UserError."""
    mutants: dict[int, variant_scores.Mutant] = {}
    skipped: Counter[str] = Counter()
    for row, name in enumerate(names):
        try:  # row 1 of the file is its header
            mutants[row] = variant_scores.parse_mutant(name, wild_type, offset, f"row {row + 2}")
        except variant_scores.MutantError as error:
            if not skip:
                raise UserError(
                    f"{error}; fix it, or leave such rows out with --on-error=skip"
                ) from None
            skipped[error.kind] += 1
    if skipped:
        kinds = ", ".join(f"{kind} {n:,}" for kind, n in sorted(skipped.items()))
        console.print(f"{count(skipped.total(), 'row')} without a score: {kinds}")
    return mutants


def score_rows(
    model: Model,
    wild_type: str,
    mutants: dict[int, variant_scores.Mutant],
    rows: int,
    mode: str,
    additive: bool,
    saved: SavedScores | None,
) -> np.ndarray:
    """The score of every row, NaN where it has no mutant: float64 [rows]. Where they take hours,
    scores are `saved` block by block, and those that are there already are not computed."""
    scores, known = np.full(rows, np.nan), saved.scores if saved else {}
    for row, mutant in mutants.items():
        scores[row] = known.get(mutant.name, np.nan)
    todo = [row for row, mutant in mutants.items() if mutant.name not in known]
    start, step = rows - len(todo), BLOCK if saved else max(1, len(todo))
    with bar("score", rows, "mutants", start=start) as progress:
        for first in range(0, len(todo), step):
            block = todo[first : first + step]
            scores[block] = variant_scores.score_mutants(
                model.on_devices,
                wild_type,
                [mutants[row] for row in block],
                model.longest,
                mode,
                additive,
                on_progress=lambda done: progress.update(start + first + done),  # noqa: B023
            )
            if saved:
                saved.write("a", {mutants[row].name: float(scores[row]) for row in block})
    return scores


def read_measurements(
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
    texts = [row[columns.index(column)].strip() for row in rows]
    measured, wrong = np.full(len(rows), np.nan), []
    for i, text in enumerate(texts):
        try:
            measured[i] = float(text) if text else np.nan
        except ValueError:
            wrong.append(i)
    if wrong:
        first = f"row {wrong[0] + 2}: {column} is {texts[wrong[0]]!r}, which is no number"
        if target:
            raise UserError(first)
        console.print(f"{first} ({len(wrong):,} of {len(rows):,} rows; not compared)")
    numbers = measured[np.isfinite(measured)]
    if len(numbers) < 3 or np.ptp(numbers) == 0:
        if target:
            raise UserError(f"--target={column} holds no three numbers that differ; leave it out")
        console.print(f"{column} holds no three numbers that differ: no rank correlation")
        return None
    return column, measured


class SavedScores:
    """Scores by mutant in a file beside --out, so that a job that was killed goes on where it was.

    JSON lines: the settings, then {mutant: score, ...} of each block.
    """

    def __init__(self, out: Path, settings: dict, overwrite: bool):
        self.path = out.with_name(out.name + ".partial")
        lines = []
        if self.path.exists() and not overwrite:
            for line in self.path.read_text(encoding="utf-8").splitlines():
                with contextlib.suppress(ValueError):  # cut short by a crash
                    lines.append(json.loads(line))
            if lines[:1] != [settings]:
                raise UserError(
                    f"{self.path} holds unfinished work with other settings; finish it with those, "
                    "or begin anew with --overwrite"
                )
        self.scores: dict[str, float] = dict(pair for line in lines[1:] for pair in line.items())
        if self.scores:
            console.print(f"going on with {self.path}: {count(len(self.scores), 'mutant')} done")
        self.write("w", settings, self.scores)

    def write(self, mode: str, *lines: dict) -> None:
        with files.writing(self.path), open(self.path, mode, encoding="utf-8") as file:
            file.writelines(json.dumps(line) + "\n" for line in lines)
            file.flush()
            os.fsync(file.fileno())


def spearman(scores: np.ndarray, measured: np.ndarray) -> tuple[float, int]:
    """Rank correlation, and over how many rows. NaN where all scores are equal."""
    from scipy.stats import spearmanr

    used = np.isfinite(measured) & np.isfinite(scores)
    if not used.any() or not np.ptp(scores[used]):
        return math.nan, int(used.sum())
    return float(spearmanr(scores[used], measured[used]).statistic), int(used.sum())


def write_scores(out: Path, columns: list[str], rows: list[list[str]], scores: np.ndarray) -> None:
    """The table with its scores as last column, empty where there is none; in place of OUT at
    once."""
    with files.replacing(out) as new, open(new, "w", newline="", encoding="utf-8") as file:
        table = csv.writer(file, lineterminator="\n")
        table.writerow([*columns, SCORE])
        for row, score in zip(rows, scores, strict=True):
            table.writerow([*row, "" if np.isnan(score) else f"{score:.6g}"])


def plot_heat_map(
    path: Path, wild_type: str, names: list[str], scores: np.ndarray, offset: int = 0
) -> None:
    """Writes a PNG of the scores of single mutants `names` of `wild_type`: residues across, amino
    acids down; dots mark the wild type's own."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    order = HEAT_MAP_ORDER
    across = max(HEAT_MAP_RESIDUES, -(-len(wild_type) // HEAT_MAP_LINES))
    tick = 10 * -(-across // HEAT_MAP_RESIDUES)
    values = np.full((len(order), len(wild_type)), np.nan)
    for name, score in zip(names, scores, strict=True):
        values[order.index(name[-1]), int(name[1:-1]) - 1 - offset] = score
    lines = -(-len(wild_type) // across)
    figure = Figure(figsize=(16, 3.4 * lines + 0.6), layout="constrained")
    FigureCanvasAgg(figure)
    # Colours span what nine in ten mutants score; the rest would wash out the picture.
    span = float(np.nanpercentile(np.abs(values), 95)) or 1.0
    for line, axes in enumerate(figure.subplots(lines, 1, squeeze=False)[:, 0]):
        first, last = line * across, min((line + 1) * across, len(wild_type))
        image = axes.imshow(
            values[:, first:last],
            cmap="RdBu",
            vmin=-span,
            vmax=span,
            aspect="auto",
            extent=(first - 0.5, last - 0.5, len(order) - 0.5, -0.5),
            interpolation="nearest",
        )
        own = [(i, order.index(wild_type[i])) for i in range(first, last) if wild_type[i] in order]
        axes.plot(*zip(*own, strict=True), "k.", markersize=3) if own else None
        axes.set_xlim(first - 0.5, first + min(across, len(wild_type)) - 0.5)
        axes.set_yticks(range(len(order)), order, fontsize=6)
        ticks = [i for i in range(first, last) if (i + 1 + offset) % tick == 0]
        axes.set_xticks(ticks, [str(i + 1 + offset) for i in ticks])
        axes.set_facecolor("0.85")
    figure.supxlabel("residue")
    figure.colorbar(image, ax=figure.axes, label="score (higher is fitter)", fraction=0.02)
    figure.savefig(path, format="png", dpi=120)
