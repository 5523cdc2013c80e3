"""`esm1nv score`: how well a protein is thought to bear mutations."""

from __future__ import annotations

import argparse
import math
from array import array
from pathlib import Path
from typing import NamedTuple

import numpy as np

from esm1nv_jax.common import files
from esm1nv_jax.common.command import Parser, parse_shard
from esm1nv_jax.common.console import console, count, stdout
from esm1nv_jax.common.errors import UserError
from esm1nv_jax.data import tokenizer
from esm1nv_jax.data.compression import regular_file
from esm1nv_jax.data.fasta import scan
from esm1nv_jax.inference import cpu_engines, proteingym, variant_table
from esm1nv_jax.inference.fasta_job import OVERWRITE
from esm1nv_jax.inference.likelihood import EXACT, MASKED, MODES, ONE_PASS, SEQUENCE_MODES
from esm1nv_jax.inference.model import load_and_say
from esm1nv_jax.inference.mutants import all_singles, parse_mutants
from esm1nv_jax.inference.variant_table import COLUMN, SequenceTable, column_of, score_table
from esm1nv_jax.model import label_metrics

ORDER = "GAVLIMCPFWYSTNQHKRDE"  # of a heat map: small, aliphatic, aromatic, polar, charged
RESIDUES, LINES = 100, 40  # in a line of it; lines, of more residues if need be
NO_TEXT = (".gz", ".bgz", ".zst", ".zstd", ".xz", ".parquet")  # what a table is not written as
MEASURED = ("DMS_score", "fitness", "label")  # columns that are compared if --target names none


class Measured(NamedTuple):
    """A column, and its numbers: float64 [rows], NaN where there is none."""

    column: str
    values: np.ndarray


def main(argv: list[str]) -> None:
    parser = Parser(
        "score",
        "Scores mutants of a protein: higher is likelier, hence fitter. With --all-singles also\n"
        "draws a heat map beside --out. With --sequences scores whole sequences of any length,\n"
        "with --proteingym every assay of a folder.",
        "esm1nv score --checkpoint runs/first --fasta wt.fasta --mutants dms.csv --out scores.csv",
    )
    add = parser.add_argument
    add("--checkpoint", required=True, help="a run, one of its steps, a model or exported folder")
    add("--fasta", help="wild type of the mutants: FASTA, CSV, TSV or Parquet")
    add("--mutants", help="CSV with a column `mutant`: A4G, or A4G:L10P for several at once")
    add("--all-singles", action="store_true", help="every single substitution, and a heat map")
    add("--sequences", help="CSV with a column `mutated_sequence` or `sequence`")
    add("--proteingym", metavar="DIR", help="the assays of ProteinGym, a CSV file each")
    add("--reference", help="of --proteingym: its DMS_substitutions.csv or DMS_indels.csv")
    add("--shard", metavar="I/N", help="of --proteingym: score the I-th of N shares of the assays")
    add("--out", required=True, help="CSV or TSV to write: the table with scores; a folder")
    add("--mode", choices=(*MODES, ONE_PASS), help=f"default {MASKED}; of sequences {EXACT}")
    add("--additive", action="store_true", help="mask the sites of a mutant one at a time")
    add("--offset", type=int, default=0, help="the first residue has number 1 + offset")
    add("--target", help=f"column to compare by rank (default: {', '.join(MEASURED)} if there)")
    on_error = "stop (default) at a bad row, or skip and count it"
    add("--on-error", default="stop", choices=("stop", "skip"), help=on_error)
    at_once = "residues read in one pass (default: as in training); longer ones are read in windows"
    add("--max-residues", type=int, metavar="N", help=at_once)
    cpu_engines.add_arguments(parser)
    add("--force", action="store_true", help="allow modes where they mean nothing")
    add("--overwrite", action="store_true", help=OVERWRITE)
    args = parser.parse_args(argv)
    inputs = (args.mutants, args.all_singles, args.sequences, args.proteingym)
    if sum(map(bool, inputs)) != 1:
        parser.error("give one of --mutants, --all-singles, --sequences or --proteingym")
    of_mutants = bool(args.mutants or args.all_singles)
    for option, belongs in (
        ("fasta", of_mutants),
        ("offset", of_mutants),
        ("additive", of_mutants),
        ("reference", bool(args.proteingym)),
        ("shard", bool(args.proteingym)),
        ("target", not args.proteingym),
    ):
        if getattr(args, option) and not belongs:
            raise UserError(f"--{option} has no meaning here (see esm1nv score --help)")
    if args.proteingym:
        score_proteingym(args)
    elif args.sequences:
        score_sequences(args)
    else:
        score_mutants(args)


def score_proteingym(args: argparse.Namespace) -> None:
    mode = args.mode or MASKED
    if mode == ONE_PASS:
        raise UserError(f"--mode={ONE_PASS} is for --sequences; indels are scored so by default")
    shard = parse_shard(args.shard) or (1, 1)
    if not 1 <= shard[0] <= shard[1]:
        raise UserError(f"--shard={args.shard} is not i/n with i from 1 to n, such as 1/4")
    out = Path(args.out)
    files.check(args.out.rstrip("/") + ".tmp")
    if out.exists() and not out.is_dir():
        raise UserError(f"--out {out} is a file; name a folder, to be made")
    assays = proteingym.read_assays(args.proteingym, args.reference)
    model = load_and_say(args.checkpoint, args.precision, args.max_residues, args.engine)
    model.check_mode(mode, args.force)
    if mode != EXACT and any(assay.is_indels for assay in assays):
        model.check_mode(ONE_PASS, args.force)
    proteingym.run(model, assays, out, mode, shard, args.overwrite)


def score_sequences(args: argparse.Namespace) -> None:
    mode = args.mode or EXACT
    if mode not in SEQUENCE_MODES:
        raise UserError(f"--mode={mode} is for --mutants; there are {', '.join(SEQUENCE_MODES)}")
    out = Path(args.out)
    check_out(args, out)
    path, _copy = regular_file(args.sequences)
    table = SequenceTable(path, args.on_error == "skip")
    measured = read_measured(path, table.columns, args.target)
    model = load_and_say(args.checkpoint, args.precision, args.max_residues, args.engine)
    model.check_mode(mode, args.force)
    scores = score_table(model, table, out, mode, args.overwrite)
    console.print(f"{out}: {count(len(table.lengths), 'sequence')} by {mode}")
    for name, values in scores.items():
        print_correlation(values, measured, f"{name}: ")


def check_out(args: argparse.Namespace, *paths: Path) -> None:
    for path in paths:
        if path.exists() and not args.overwrite:
            raise UserError(f"{path} exists; add --overwrite, or choose another --out")
    if paths[0].suffix.lower() in NO_TEXT:
        raise UserError(f"--out {args.out}: the table is plain text; let it end in .csv or .tsv")
    files.check(args.out)


def score_mutants(args: argparse.Namespace) -> None:
    mode = args.mode or MASKED
    if mode == ONE_PASS:
        raise UserError(f"--mode={mode} is for --sequences; take wt-marginals")
    if not args.fasta:
        raise UserError("--fasta is missing: the wild type that the mutants are of")
    out = Path(args.out)
    picture = out.with_suffix(".png")
    if out.suffix == ".png":
        raise UserError(f"--out {out} is the table; the picture is drawn beside it")
    check_out(args, *((out, picture) if args.all_singles else (out,)))
    if args.additive and mode != MASKED:
        raise UserError(f"--additive is for --mode={MASKED}, found --mode={mode}")
    name, wild_type = read_wild_type(args.fasta)
    # Checked before the model is loaded. A table is read again and again, not held in memory.
    table, _copy = regular_file(args.mutants) if args.mutants else (None, None)
    measured, columns = None, [COLUMN]
    if table is None:
        measured_column(columns, args.target)
    else:
        skip = args.on_error == "skip"
        columns, mutants = variant_table.read_mutants(table, wild_type, args.offset, skip)
        measured = read_measured(table, columns, args.target)

    model = load_and_say(args.checkpoint, args.precision, args.max_residues, args.engine)
    model.check_mode(mode, args.force)
    model.check_fits(len(wild_type), name)
    if len(wild_type) > model.longest:
        console.print(
            f"{name} has {len(wild_type):,} residues, the model reads {model.longest:,}: windows "
            "centred on the sites"
        )
    if table is None:
        letters = tokenizer.vocabulary(model.config.vocabulary).letters
        names = all_singles(wild_type, args.offset, letters)
        mutants = parse_mutants(names, wild_type, args.offset)
    fields = ([name] for name in names) if table is None else variant_table.rows_of(table)
    how = mode, args.additive, args.overwrite
    scores = variant_table.score_and_write(
        model, wild_type, mutants, columns, fields, out, *how, offset=args.offset
    )
    done = f"{out}: {count(mutants.total, 'mutant')} of {name} by {mode}"
    if args.all_singles:
        with files.writing(picture):
            plot_heat_map(picture, wild_type, names, scores, args.offset)
        done += f"; heat map {picture}"
    console.print(done)
    print_correlation(scores, measured)


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
    numbers, wrong, first = array("d"), 0, ""
    for row, text in enumerate(column_of(path, column), 2):
        try:
            numbers.append(float(text) if text else math.nan)
        except ValueError:
            numbers.append(math.nan)
            first = first or f"row {row}: {column} is {text!r}, which is no number"
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


def print_correlation(scores: np.ndarray, measured: Measured | None, name: str = "") -> None:
    if measured is not None:
        rho, used = spearman(scores, measured.values)
        noun = "sequence" if name else "mutant"
        stdout.print(f"{name}spearman {rho:.4f} with {measured.column} over {count(used, noun)}")


def spearman(scores: np.ndarray, measured: np.ndarray) -> tuple[float, int]:
    """Rank correlation, and over how many rows. NaN where all scores or all measurements of these
    are equal."""
    used = np.isfinite(measured) & np.isfinite(scores)
    if not used.any():
        return math.nan, 0
    return label_metrics.spearman(measured[used], scores[used]), int(used.sum())


def read_wild_type(path: str) -> tuple[str, str]:
    """(id, sequence) of the only record of a FASTA file."""
    proteins = list(scan(path))
    if len(proteins) > 1:
        raise UserError(f"{path} holds {len(proteins)} proteins; give a file with the wild type")
    return proteins[0][0], proteins[0][1].decode()


def plot_heat_map(
    path: Path, wild_type: str, names: list[str], scores: np.ndarray, offset: int = 0
) -> None:
    """Writes a PNG of the scores of single mutants `names` of `wild_type`: residues across, amino
    acids down; dots mark the wild type's own."""
    from matplotlib.figure import Figure

    across = max(RESIDUES, -(-len(wild_type) // LINES))
    tick = 10 * -(-across // RESIDUES)
    values = np.full((len(ORDER), len(wild_type)), np.nan)
    for name, score in zip(names, scores, strict=True):
        values[ORDER.index(name[-1]), int(name[1:-1]) - 1 - offset] = score
    lines = -(-len(wild_type) // across)
    figure = Figure(figsize=(16, 3.4 * lines + 0.6), layout="constrained")
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
            extent=(first - 0.5, last - 0.5, len(ORDER) - 0.5, -0.5),
            interpolation="nearest",
        )
        own = [(i, ORDER.index(wild_type[i])) for i in range(first, last) if wild_type[i] in ORDER]
        axes.plot(*zip(*own, strict=True), "k.", markersize=3) if own else None
        axes.set_xlim(first - 0.5, first + min(across, len(wild_type)) - 0.5)
        axes.set_yticks(range(len(ORDER)), ORDER, fontsize=6)
        ticks = [i for i in range(first, last) if (i + 1 + offset) % tick == 0]
        axes.set_xticks(ticks, [str(i + 1 + offset) for i in ticks])
        axes.set_facecolor("0.85")
    figure.supxlabel("residue")
    figure.colorbar(image, ax=figure.axes, label="score (higher is fitter)", fraction=0.02)
    figure.savefig(path, format="png", dpi=120)
