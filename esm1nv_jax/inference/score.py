"""`esm1nv score`: how well a protein is thought to bear mutations."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from esm1nv_jax.common import files
from esm1nv_jax.common.command import Parser
from esm1nv_jax.common.console import bar, console, count, stdout
from esm1nv_jax.common.errors import UserError
from esm1nv_jax.data.compression import regular_file
from esm1nv_jax.data.fasta import scan
from esm1nv_jax.inference import variant_scores
from esm1nv_jax.inference.heat_map import plot_heat_map
from esm1nv_jax.inference.model import PRECISIONS, Model, load
from esm1nv_jax.inference.mutants import MutantTable, all_singles, parse_mutants
from esm1nv_jax.inference.variant_table import (
    COLUMN,
    MEASURED,
    Measurements,
    SavedScores,
    read_mutants,
    rows_of,
    spearman,
    write_scores,
)

BLOCK = 64  # mutants after which scores that take hours are saved


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
    # Checked before the model is loaded. A table is read twice: its rows are not held in memory.
    table, _copy = regular_file(args.mutants) if args.mutants else (None, None)
    measured = None
    if table is None:
        names = all_singles(wild_type, args.offset)
        columns, rows = [COLUMN], len(names)
        Measurements.column_of(columns, args.target)
        mutants = parse_mutants(names, wild_type, args.offset)
    else:
        skip = args.on_error == "skip"
        columns, mutants, rows, measured = read_mutants(
            table, wild_type, args.offset, skip, args.target
        )

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
    scores = score_rows(model, wild_type, mutants, rows, args.mode, args.additive, saved)
    fields = ([name] for name in names) if table is None else rows_of(table)
    write_scores(out, columns, fields, scores)
    if saved:
        saved.path.unlink()
    done = f"{out}: {count(rows, 'mutant')} of {name} by {args.mode}"
    if args.all_singles:
        with files.writing(picture):
            plot_heat_map(picture, wild_type, names, scores, args.offset)
        done += f"; heat map {picture}"
    console.print(done)
    if measured is not None:
        rho, used = spearman(scores, measured.values)
        stdout.print(f"spearman {rho:.4f} with {measured.column} over {count(used, 'mutant')}")


def read_wild_type(path: str) -> tuple[str, str]:
    """(id, sequence) of the only record of a FASTA file."""
    proteins = list(scan(path))
    if len(proteins) > 1:
        raise UserError(f"{path} holds {len(proteins)} proteins; give a file with the wild type")
    return proteins[0][0], proteins[0][1].decode()


def score_rows(
    model: Model,
    wild_type: str,
    mutants: MutantTable,
    rows: int,
    mode: str,
    additive: bool,
    saved: SavedScores | None,
) -> np.ndarray:
    """The score of every row, NaN where it has no mutant: float64 [rows]. Where they take hours,
    scores are `saved` block by block, and blocks that are there already are not computed."""
    scores = np.full(rows, np.nan)
    step = BLOCK if saved else max(1, len(mutants))
    blocks = [mutants[first : first + step] for first in range(0, len(mutants), step)]
    if saved:
        for block in blocks:
            scores[block.rows] = [saved.scores.get(mutant.name, np.nan) for mutant in block]
    todo = [block for block in blocks if np.isnan(scores[block.rows]).any()]
    start = rows - sum(map(len, todo))
    with bar("score", rows, "mutants", start=start) as progress:
        for block in todo:
            scores[block.rows] = variant_scores.score_mutants(
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
                saved.write("a", {m.name: x for m, x in zip(block, values, strict=True)})
            start += len(block)
    return scores
