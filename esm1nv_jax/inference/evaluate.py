"""`esm1nv evaluate`: perplexity and accuracy on fixed masks, as a table, JSON and HTML."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import numpy as np

from esm1nv_jax import __version__
from esm1nv_jax.common import command, files
from esm1nv_jax.common.console import bar, console, count, numbers_table, stdout
from esm1nv_jax.common.errors import UserError
from esm1nv_jax.common.html import plus_minus
from esm1nv_jax.data import manifest
from esm1nv_jax.data.fasta import scan
from esm1nv_jax.data.source import SAMPLE, SPLITS, MemorySource, Source, open_split
from esm1nv_jax.data.tokenizer import vocabulary
from esm1nv_jax.inference import cpu_engines, fixed_masks, perplexity
from esm1nv_jax.inference.evaluation_report import build_report, compare_with_blosum62
from esm1nv_jax.inference.likelihood import pseudo_log_likelihood
from esm1nv_jax.inference.model import Model, load, load_and_say
from esm1nv_jax.model import baselines
from esm1nv_jax.model.masking import RECIPES, recipe

THESE_PROTEINS = "these proteins"  # where no training data are known


def main(argv: list[str]) -> None:
    parser = command.Parser(
        "evaluate",
        "Perplexity and accuracy of a model on masked residues, beside baselines that know\n"
        "nothing but composition. Masks are fixed by the proteins and the seed.",
        "esm1nv evaluate --checkpoint runs/first --data sample:test --report first.html",
    )
    add = parser.add_argument
    add("--checkpoint", required=True, metavar="PATH", help="a run, a step, or a model folder")
    of_data = "a data set or sample; SPLIT is validation (default), test or train"
    add("--data", metavar="DIR[:SPLIT]", help=of_data)
    add("--fasta", metavar="FILE", help="proteins: FASTA, CSV, TSV or Parquet")
    add("--masks", metavar="FILE", help="proteins and their masks, made by --masks-out")
    add("--masking", choices=tuple(RECIPES), help="which recipe (default card)")
    add("--seed", type=int, help="of the masks (default 0)")
    add("--max-residues", type=int, metavar="N", help="cut longer proteins (default as trained)")
    cpu_engines.add_arguments(parser)
    add("--groups", metavar="TSV", help="id and name of a class, a line each: results by class")
    add("--pseudo", action="store_true", help="also the pseudo-perplexity: for small sets")
    add("--against", metavar="PATH", help="another model: its difference, paired by protein")
    masks_out = "write the masks, to evaluate another model at the same positions"
    add("--masks-out", metavar="FILE", help=masks_out)
    add("--json", metavar="FILE", help="write all results")
    add("--report", metavar="FILE.html", help="write a page with plots")
    options = parser.parse_args(argv)
    files.check(options.json, options.report, options.masks_out)

    mask_file = None
    if options.masks is not None:
        others = {name: getattr(options, name) for name in ("data", "fasta", "masking", "seed")}
        given = [f"--{name}" for name, value in others.items() if value is not None]
        if given:
            raise UserError(
                f"--masks brings its own proteins and masks; leave out {' and '.join(given)}"
            )
        mask_file, name = fixed_masks.read_masks(options.masks), options.masks
        source: Source = mask_file.source
    else:
        source, name = open_source(options.data, options.fasta)
    if options.against and options.groups:
        raise UserError("--against pairs by protein, --groups sums by class; leave out one of them")
    groups = read_groups(options.groups) if options.groups else None
    if options.against:
        groups = {x: x for x in source.ids(range(len(source.lengths)))}
    model = load_and_say(
        options.checkpoint, options.precision, options.max_residues, options.engine
    )
    model.require_lm_head()
    if options.against:
        other = load(options.against, options.precision, options.max_residues, options.engine)
        other.require_lm_head()
        if other.longest != model.longest:
            raise UserError(
                f"{options.checkpoint} reads {model.longest:,} residues at once, {options.against} "
                f"{other.longest:,}, so that they are not asked the same; try --max-residues "
                f"{min(other.longest, model.longest)}"
            )
        ours, theirs = (vocabulary(x.config.vocabulary).letters for x in (model, other))
        if ours != theirs:
            raise UserError(
                f"{options.checkpoint} has tokens of {ours}, {options.against} of {theirs}, so "
                "that they are not asked the same; evaluate each by itself"
            )
    evaluate_one = functools.partial(
        evaluate_model,
        source=source,
        masking=options.masking or "card",
        seed=options.seed or 0,
        mask_file=mask_file,
        training_data=name.rpartition(":")[0] if options.data else None,
        groups=groups,
        progress=True,
    )
    results = evaluate_one(model, pseudo=options.pseudo, masks_out=options.masks_out)
    results = {"checkpoint": options.checkpoint, "data": name} | results
    if options.against:
        results["against"] = compare_models(results, evaluate_one(other), options.against)
        results["by_group"] = {}
    print_results(results)
    if options.json:
        files.write(options.json, files.to_json(results))
        console.print(f"results  {options.json}")
    if options.report:
        files.write(options.report, build_report(results, summary_rows(results)).to_html())
        console.print(f"report   {options.report}")


def open_source(data: str | None, path: str | None) -> tuple[Source, str]:
    """The source behind `--data DIR[:split]` or `--fasta FILE`, of which exactly one is given, and
    its name. The split is `validation` where none is named.

    Raises UserError where there is none, or nothing in it can be used.
    """
    if (data is None) == (path is None):
        raise UserError("give the proteins by --data DIR[:split] or by --fasta FILE, one of them")
    if data is None:
        assert path is not None
        return read_fasta(path), path
    folder, colon, split = data.rpartition(":")
    if not data.endswith(tuple(f":{split}" for split in SPLITS)):
        if colon and (folder == SAMPLE or Path(folder, manifest.FILE).exists()):
            raise UserError(f"--data {data}: no split {split!r}; there are {', '.join(SPLITS)}")
        folder, split = data, "validation"
    return open_split(folder, split), f"{folder}:{split}"


def read_fasta(path: str) -> MemorySource:
    """All records of a FASTA file, plain or compressed. Faulty ones are counted and left out."""
    proteins = scan(path, skip=True)
    if proteins.skipped:
        console.print(f"{path}: {proteins}")
    return MemorySource(list(proteins))


def evaluate_model(
    model: Model,
    source: Source,
    masking: str = "card",
    seed: int = 0,
    mask_file: fixed_masks.MaskFile | None = None,
    training_data: str | None = None,
    groups: dict[str, str] | None = None,
    pseudo: bool = False,
    masks_out: str | None = None,
    progress: bool = False,
) -> dict[str, Any]:
    """All results of a model on the proteins of `source`, ready for JSON.

    Args:
      masking, seed: the recipe (see `model/masking.py`) and the seed of the masks.
      mask_file: masks to use instead, of the same proteins.
      training_data: data set whose training split gives the unigram; else that of the model's run.
      groups: id to class, for results by class.
      pseudo: whether to compute the pseudo-perplexity as well.
      masks_out: a file to write the masks to.

    Raises UserError where nothing can be predicted.
    """
    stream = perplexity.evaluation_stream(model, seed)
    if mask_file is None:
        corrupted = fixed_masks.draw_masks(source, stream, recipe(masking), model.config.vocabulary)
    else:
        corrupted = fixed_masks.apply_masks(source, stream, mask_file.masks)
    if mask_file is not None and mask_file.residue_counts is not None:
        counts, counted_in = mask_file.residue_counts, "the data of the masks"
    else:
        counts, counted_in = unigram_counts(model, source, training_data)
    sums = None
    if masks_out:
        corrupted = fixed_masks.write_masks(masks_out, source, corrupted, counts)
    with bar("evaluating", len(source.lengths), "proteins", progress) as task:
        for sums in perplexity.evaluate(model, source, stream, corrupted, counts, groups):
            task.update(sums.sequences)
    if sums is None or not sums.positions:
        raise UserError("no residue could be predicted: the proteins hold unknown letters only")
    results = {
        "masking": masking if mask_file is None else "given",
        "seed": seed if mask_file is None else None,
        "max_residues": stream.max_residues,
        "precision": model.arithmetic,
        "unigram_of": counted_in,
        "code": __version__,
        "provenance": model.provenance,
    } | sums.results()
    results["substitution"] = compare_with_blosum62(sums.substitution)
    if pseudo:
        longest = stream.max_residues
        sequences = [s[:longest] for s in source.sequences(range(len(source.lengths)))]
        with bar("pseudo-perplexity", sum(map(len, sequences)), "passes", progress) as task:
            residues, pll = pseudo_log_likelihood(
                model.on_devices, sequences, longest, task.advance
            )
        mean = perplexity.GroupedMean(1)
        mean.add(np.zeros(len(sequences), np.int64), residues, -pll)
        with np.errstate(invalid="ignore"):  # NaN where no residue is known
            each = np.exp(-pll / residues)
        rows = zip(source.ids(range(len(each))), residues.tolist(), each.tolist(), strict=True)
        names = ("id", "residues", "pseudo_perplexity")
        results["pseudo_perplexity"] = {
            "median": float(np.median(each[residues > 0])),
            **dict(zip(("token_weighted", "token_weighted_se"), mean.perplexity(), strict=True)),
            "sequences": [dict(zip(names, row, strict=True)) for row in rows],
        }
    return results


def compare_models(ours: dict[str, Any], theirs: dict[str, Any], name: str) -> dict[str, Any]:
    """How much higher our loss at `<mask>` is, nats a residue, with its error paired by protein."""
    rows = ({"by_protein": results["by_group"]} for results in (ours, theirs))
    difference, error = perplexity.paired_difference(*rows)
    return {
        "checkpoint": name,
        "perplexity_mask": theirs["overall"]["perplexity_mask"],
        "difference": difference,
        "difference_se": error,
    }


def unigram_counts(
    model: Model, source: Source, training_data: str | None = None
) -> tuple[np.ndarray, str]:
    """Residue counts [25] of the unigram baseline, and of what: of training proteins where a data
    set is known, for frequencies of the evaluated proteins hold the answers."""
    data = (model.provenance.get("config") or {}).get("data") or {}
    for folder in (training_data, data.get("path")):
        if folder is None:
            continue
        try:
            train = open_split(str(folder), "train")
        except UserError:  # it has no training split, or lies elsewhere by now
            continue
        counts = baselines.count_residues(train, baselines.UNIGRAM_PROTEINS)
        return counts, f"{folder}:train"
    return baselines.count_residues(source), THESE_PROTEINS


def read_groups(path: str) -> dict[str, str]:
    """Id to class, from lines `id<TAB>class`."""
    groups: dict[str, str] = {}
    try:
        lines = Path(path).read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read {path}: {error}") from None
    for number, line in enumerate(lines, 1):
        if line.strip():
            name, _, group = (text.strip() for text in line.partition("\t"))
            if not group or "\t" in group:
                raise UserError(f"{path}, line {number}: {line[:60]!r} is not id<TAB>class")
            if groups.setdefault(name, group) != group:
                raise UserError(
                    f"{path}, line {number}: {name!r} is in class {group!r}, and in "
                    f"{groups[name]!r} above; give each id one class"
                )
    if not groups:
        raise UserError(f"{path} names no class; write id<TAB>class, a line each")
    return groups


def summary_rows(results: dict[str, Any]) -> list[tuple[str, str, str]]:
    """The results that matter: (what, over all selected positions, at `<mask>` only)."""
    overall = results["overall"]

    def cell(name: str, row: dict[str, Any] = overall, scale: float = 1) -> str:
        return plus_minus(scale * row[name], scale * row[f"{name}_se"])

    rows = [
        ("perplexity (lower is better)", cell("perplexity"), cell("perplexity_mask")),
        ("  among the 20 amino acids", "", cell("perplexity_mask_20")),
        (f"unigram of {results['unigram_of']}", "", cell("unigram_mask")),
        ("composition of each protein", "", cell("composition_mask")),
        ("accuracy, percent", "", cell("accuracy_mask", scale=100)),
        ("positions", f"{overall['positions']:,}", f"{overall['positions_mask']:,}"),
    ]
    for name, row in results["by_group"].items():
        what = f"perplexity, {name} ({row['sequences']:,})"
        rows.append((what, "", cell("perplexity_mask", row)))
    if "pseudo_perplexity" in results:
        pseudo = results["pseudo_perplexity"]
        rows.append(("pseudo-perplexity, by residue", cell("token_weighted", pseudo), ""))
        rows.append(("pseudo-perplexity, median protein", f"{pseudo['median']:.2f}", ""))
    return rows


def print_results(results: dict[str, Any]) -> None:
    """The results that matter, on standard output."""
    title = (
        f"{results['checkpoint']} on {results['data']}: {count(results['sequences'], 'protein')}"
    )
    table = numbers_table(title, "", "all selected", "<mask> only")
    for i, row in enumerate(summary_rows(results)):
        table.add_row(*row, style="" if i else "bold")
    stdout.print(table)
    overall = results["overall"]
    gain = plus_minus(overall["nats_gained_mask"], overall["nats_gained_mask_se"], 3)
    stdout.print(
        f"Gain over composition at <mask>: {gain} nats a residue (standard errors by protein)."
    )
    if other := results.get("against"):
        stdout.print(
            f"Loss at <mask> less that of {other['checkpoint']} (perplexity "
            f"{other['perplexity_mask']:.3f}): "
            f"{plus_minus(other['difference'], other['difference_se'], 4)} nats a residue, paired "
            "by protein."
        )
    if results["cropped"]:
        stdout.print(
            f"{count(results['cropped'], 'protein')} cut to the first "
            f"{count(results['max_residues'], 'residue')}."
        )
