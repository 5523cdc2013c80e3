"""`esm1nv evaluate`: a model held against fixed masks, as figures, a table, JSON and a page."""

from __future__ import annotations

import json
import math
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from rich.table import Table

from esm1nv_jax import __version__
from esm1nv_jax.common import arguments, files
from esm1nv_jax.common.console import bar, console
from esm1nv_jax.common.errors import UserError
from esm1nv_jax.common.html import plus_minus
from esm1nv_jax.data.source import Source
from esm1nv_jax.inference import fixed_masks, perplexity
from esm1nv_jax.inference.model import PRECISIONS, Model, load
from esm1nv_jax.inference.protein_source import open_source
from esm1nv_jax.inference.pseudo_perplexity import pseudo_perplexity
from esm1nv_jax.inference.substitution import ORDER, substitution
from esm1nv_jax.model.masking import RECIPES, recipe


def main(argv: list[str]) -> None:
    parser = arguments.Parser(
        "evaluate",
        "Perplexity and accuracy of a model on masked residues, beside baselines that know\n"
        "nothing but composition. Masks are fixed by the proteins and the seed.",
        "esm1nv evaluate --checkpoint runs/first --data sample:test --report first.html",
    )
    add = parser.add_argument
    add("--checkpoint", required=True, metavar="PATH", help="a run, a step, or a model folder")
    add("--data", metavar="DIR[:SPLIT]", help="a data set or sample; SPLIT is validation or test")
    add("--fasta", metavar="FILE", help="proteins, plain or compressed")
    add("--masks", metavar="FILE", help="proteins and their masks, made by --masks-out")
    add("--masking", choices=tuple(RECIPES), help="which recipe (default card)")
    add("--seed", type=int, help="of the masks (default 0)")
    add("--max-residues", type=int, metavar="N", help="cut longer proteins (default as trained)")
    add("--precision", choices=tuple(PRECISIONS), default="fp32", help="of matrix products")
    add("--groups", metavar="TSV", help="id and name of a class, a line each: figures by class")
    add("--pseudo", action="store_true", help="also the pseudo-perplexity: for small sets")
    add("--masks-out", metavar="FILE", help="write the masks, to ask another model the same")
    add("--json", metavar="FILE", help="write all figures")
    add("--report", metavar="FILE.html", help="write a page with plots")
    options = parser.parse_args(argv)
    files.check(options.json, options.report, options.masks_out)

    records = None
    if options.masks is not None:
        others = {name: getattr(options, name) for name in ("data", "fasta", "masking", "seed")}
        given = [f"--{name}" for name, value in others.items() if value is not None]
        if given:
            raise UserError(
                f"--masks brings its own proteins and masks; leave out {' and '.join(given)}"
            )
        (source, records), name = fixed_masks.read(options.masks), options.masks
    else:
        source, name = open_source(options.data, options.fasta)
    groups = read_groups(options.groups) if options.groups else None
    model = load(options.checkpoint, options.precision)
    found = figures(
        model,
        source,
        masking=options.masking or "card",
        seed=options.seed or 0,
        max_residues=options.max_residues,
        records=records,
        groups=groups,
        pseudo=options.pseudo,
        masks_out=options.masks_out,
        show=True,
    )
    found = {"checkpoint": options.checkpoint, "data": name} | found
    show(found)
    if options.json:
        files.write(options.json, to_json(found))
        console.print(f"figures  {options.json}", markup=False)
    if options.report:
        from esm1nv_jax.inference import evaluation_report

        files.write(options.report, evaluation_report.page(found).text())
        console.print(f"report   {options.report}", markup=False)


def figures(
    model: Model,
    source: Source,
    masking: str = "card",
    seed: int = 0,
    max_residues: int | None = None,
    records: list[fixed_masks.Record] | None = None,
    groups: dict[str, str] | None = None,
    pseudo: bool = False,
    masks_out: str | None = None,
    show: bool = False,
) -> dict[str, Any]:
    """All figures of a model on the proteins of `source`, ready for JSON.

    Args:
      masking: name of the recipe that chooses what is predicted; see `model/masking.py`.
      seed: of the masks.
      max_residues: longer proteins are cut to a prefix; as in training where None.
      records: masks to use instead, one for each protein.
      groups: id to class, for figures by class.
      pseudo: whether to compute the pseudo-perplexity as well.
      masks_out: a file to write the masks to.
      show: whether to show progress.

    Raises UserError where nothing can be predicted.
    """
    stream = perplexity.stream_of(model, seed, max_residues)
    if records is None:
        corrupted = fixed_masks.drawn(source, stream, recipe(masking), model.config.vocabulary)
    else:
        corrupted = fixed_masks.given(source, stream, records)
    result = None
    with ExitStack() as stack:
        if masks_out:
            stack.enter_context(files.writing(masks_out))
            file = stack.enter_context(open(masks_out, "w"))
            corrupted = fixed_masks.written(file, source, corrupted)
        task = stack.enter_context(bar("evaluating", len(source.lengths), "proteins", show))
        for result in perplexity.evaluate(model, source, stream, corrupted, groups):
            task.update(result.sequences)
    if result is None or not result.overall["loss"].positions[0]:
        raise UserError("no residue could be predicted: the proteins hold unknown letters only")
    found = {
        "masking": masking if records is None else "given",
        "seed": seed if records is None else None,
        "max_residues": stream.max_residues,
        "precision": model.precision,
        "code": __version__,
        "provenance": model.provenance,
    } | result.figures()
    compared = substitution(result.substitution, perplexity.AMINO_ACIDS)
    found["substitution"] = {
        "order": ORDER,
        "log_odds_bits": compared.log_odds.tolist(),
        "pearson_blosum62": compared.pearson,
        "spearman_blosum62": compared.spearman,
    }
    if pseudo:
        sequences = source.sequences(range(len(source.lengths)))
        passes = int(sum(min(len(s), stream.max_residues) for s in sequences))
        with bar("pseudo-perplexity", passes, "passes", show) as task:
            each = pseudo_perplexity(model, sequences, stream.max_residues, task.advance)
        found["pseudo_perplexity"] = each.figures(source.ids(range(len(sequences))))
    return found


def read_groups(path: str) -> dict[str, str]:
    """Id to class, from lines `id<TAB>class`."""
    found = {}
    try:
        lines = Path(path).read_text().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read {path}: {error}") from None
    for number, line in enumerate(lines, 1):
        if line.strip():
            name, tab, group = line.partition("\t")
            if not tab or not group.strip():
                raise UserError(f"{path}, line {number}: {line[:60]!r} is not id<TAB>class")
            found[name.strip()] = group.strip()
    if not found:
        raise UserError(f"{path} names no class; write id<TAB>class, a line each")
    return found


def show(found: dict[str, Any]) -> None:
    """The figures that matter, on the terminal."""
    whole = found["overall"]
    title = f"{found['checkpoint']} on {found['data']}: {found['sequences']:,} proteins"
    table = Table(title=title, title_justify="left")
    for name, side in (("", "left"), ("all selected", "right"), ("<mask> only", "right")):
        table.add_column(name, justify=side)

    def cell(name):
        return plus_minus(whole[name], whole[f"{name}_se"])

    table.add_row("perplexity", cell("perplexity"), cell("perplexity_mask"), style="bold")
    table.add_row("  among the 20 amino acids", "", cell("perplexity_mask_20"))
    table.add_row("unigram of these proteins", "", cell("unigram_mask"))
    table.add_row("composition of each protein", "", cell("composition_mask"))
    accuracy = plus_minus(100 * whole["accuracy_mask"], 100 * whole["accuracy_mask_se"])
    table.add_row("accuracy, percent", "", accuracy)
    table.add_row("positions", f"{whole['positions']:,}", f"{whole['positions_mask']:,}")
    for name, row in found["by_group"].items():
        value = plus_minus(row["perplexity_mask"], row["perplexity_mask_se"])
        table.add_row(f"perplexity, {name} ({row['sequences']:,})", "", value)
    if "pseudo_perplexity" in found:
        pseudo = found["pseudo_perplexity"]
        weighted = plus_minus(pseudo["token_weighted"], pseudo["token_weighted_se"])
        table.add_row("pseudo-perplexity, by residue", weighted, "")
        table.add_row("pseudo-perplexity, median protein", f"{pseudo['median']:.2f}", "")
    console.print(table)
    gain = plus_minus(whole["nats_gained_mask"], whole["nats_gained_mask_se"], 3)
    console.print(
        f"Gain over composition at <mask>: {gain} nats a residue (standard errors by protein).",
        markup=False,
    )
    if found["cropped"]:
        console.print(
            f"{found['cropped']:,} proteins were cut to their first {found['max_residues']:,} "
            "residues.",
            markup=False,
        )


def to_json(found: Any) -> str:
    """JSON has no NaN: figures that do not exist become null."""

    def plain(value):
        if isinstance(value, dict):
            return {name: plain(x) for name, x in value.items()}
        if isinstance(value, list | tuple):
            return [plain(x) for x in value]
        return None if isinstance(value, float) and not math.isfinite(value) else value

    return json.dumps(plain(found), indent=1)
