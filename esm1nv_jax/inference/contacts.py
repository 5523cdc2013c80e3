"""`esm1nv contacts`: contact maps of proteins, and their precision where structures are known."""

from __future__ import annotations

import csv
import dataclasses
import itertools
import math
import re
from pathlib import Path

import numpy as np

from esm1nv_jax.common import files
from esm1nv_jax.common.command import Parser
from esm1nv_jax.common.console import bar, console, count, numbers_table, stdout
from esm1nv_jax.common.errors import UserError
from esm1nv_jax.common.html import new_figure, plus_minus
from esm1nv_jax.data.tokenizer import STANDARD
from esm1nv_jax.inference import contact_maps, cpu_engines
from esm1nv_jax.inference.api_types import residue_ids
from esm1nv_jax.inference.contact_maps import MAX_STRUCTURES, MIN_STRUCTURES, fit_contact_head
from esm1nv_jax.inference.model import Model, load, load_and_say
from esm1nv_jax.inference.structures import (
    CUTOFFS,
    MIN_SEPARATION,
    RANGES,
    Protein,
    Structure,
    baseline_scores,
    contact_precision,
    find_structures,
    mean_and_error,
    read_proteins,
    read_structure,
)

TABLE = "precision.tsv"


def main(argv: list[str]) -> None:
    parser = Parser(
        "contacts",
        "Predicts which residues of a protein touch each other, from a model that has seen only\n"
        "sequences: by its categorical Jacobian (no training, 20 passes a residue), or by a\n"
        "logistic regression on its attention maps, which is fitted to a few structures.",
        "esm1nv contacts --checkpoint runs/first --fasta p.fasta --structures p.pdb --out maps\n"
        "  esm1nv contacts --checkpoint runs/first --fit pdbs/ --save-model models/with_head",
    )
    add = parser.add_argument
    add("--checkpoint", required=True, help="a run, one of its steps, a model or exported folder")
    add("--fasta", help="proteins to predict contacts of: FASTA, CSV, TSV or Parquet")
    known = (
        "known structures: files, FILE:CHAIN or folders; PDB, mmCIF or lists of contacts. "
        "Those named as a protein of --fasta belong to it; without --fasta all are predicted"
    )
    add("--structures", nargs="+", action="extend", default=[], metavar="PATH", help=known)
    add("--out", metavar="DIR", help="folder for the maps, and precision.tsv")
    default = "default: attention with --fit, else jacobian"
    add("--method", choices=contact_maps.METHODS, help=default)
    fit_to = f"fit the contact head to these {MIN_STRUCTURES} to {MAX_STRUCTURES} structures first"
    add("--fit", nargs="+", action="extend", default=[], metavar="PATH", help=fit_to)
    saved = "with --fit: a model folder that holds the contact head"
    add("--save-model", metavar="DIR", help=saved)
    some = "which files to write, some of npz,tsv,png (default all)"
    add("--formats", default="npz,tsv,png", metavar="LIST", help=some)
    add("--max-residues", type=int, metavar="N", help="the most residues of a protein")
    cpu_engines.add_arguments(parser)
    add("--overwrite", action="store_true", help="write into a folder that is not empty")
    args = parser.parse_args(argv)
    formats = [name for name in re.split(r"[,\s]+", args.formats) if name]
    if unknown := [name for name in formats or [""] if name not in WRITERS]:
        raise UserError(f"--formats={unknown[0]} is unknown; there are {', '.join(WRITERS)}")
    if args.save_model and not args.fit:
        parser.error("--save-model goes with --fit")
    if not args.save_model and not args.out:
        parser.error("give --out, a folder for the maps, or --fit with --save-model")
    if args.out and not args.fasta and not args.structures:
        parser.error("give proteins: --fasta, --structures or both")
    for folder in filter(None, (args.out, args.save_model)):
        check_folder(Path(folder), args.overwrite)

    training = [read_structure(*found) for found in find_structures(args.fit)]
    if args.fit and not MIN_STRUCTURES <= len(training) <= MAX_STRUCTURES:
        raise UserError(
            f"--fit names {count(len(training), 'structure')}; give {MIN_STRUCTURES} to "
            f"{MAX_STRUCTURES}, and the others to --structures"
        )
    proteins = read_proteins(args.fasta, args.structures) if args.out else []
    check_held_out(training, proteins)
    method = args.method or ("attention" if args.fit else "jacobian")
    load_model = load if method == "attention" else load_and_say  # attention maps are XLA's
    model = load_model(args.checkpoint, args.precision, args.max_residues, args.engine)
    if method == "attention" and not args.fit:
        contact_maps.check_method(method, model.contact_head_params is not None)
    if method == "jacobian" and proteins:
        model.require_lm_head()
    checked = [(protein.name, protein.sequence, method) for protein in proteins]
    checked += [(structure.name, structure.sequence, "attention") for structure in training]
    for name, sequence, by in checked:
        ids = model.read_whole(sequence, f"protein {name}")
        contact_maps.check_size(model.config, len(ids), by, f"protein {name}")
    if training:
        model = fit(model, training)
    if args.save_model:
        save(args.checkpoint, args.save_model, model)
    if not args.out:
        return
    Path(args.out).mkdir(exist_ok=True)
    results = predict(model, proteins, method, Path(args.out), formats)
    console.print(f"{args.out}: contact maps of {count(len(proteins), 'protein')} by {method}")
    if not results:  # of an earlier run, which --overwrite replaces
        (Path(args.out) / TABLE).unlink(missing_ok=True)
    else:
        write_table(Path(args.out) / TABLE, results)
        print_summary(results)


def check_folder(folder: Path, overwrite: bool) -> None:
    """Raises UserError where a folder cannot be written, or is not empty."""
    if folder.exists() and (not folder.is_dir() or (any(folder.iterdir()) and not overwrite)):
        raise UserError(f"{folder} exists and is not empty; choose another, or add --overwrite")
    files.check(str(folder / TABLE) if folder.is_dir() else str(folder))


def check_held_out(training: list[Structure], proteins: list[Protein]) -> None:
    """Raises UserError where a protein that is evaluated is also one of --fit."""
    fitted = {structure.sequence: structure.name for structure in training}
    for protein in proteins:
        if protein.structure and protein.sequence in fitted:
            raise UserError(
                f"{protein.name} of --structures has the sequence of {fitted[protein.sequence]} of "
                "--fit, so its precision would mean nothing; leave it out of one"
            )


def fit(model: Model, structures: list[Structure]) -> Model:
    """The model with a contact head that is fitted to `structures`."""
    ids = [residue_ids(s.sequence, f"structure {s.name}") for s in structures]
    with bar("attention maps", len(ids), "structures") as progress:
        head = fit_contact_head(
            model.with_attention_weights.on_devices, structures, ids, progress.update
        )
    used = int(np.count_nonzero(head["kernel"]))
    console.print(
        f"contact head fitted to {count(len(ids), 'structure')}: {used} of {head['kernel'].size} "
        "attention heads have a weight"
    )
    return dataclasses.replace(model, contact_head_params=head)


def save(checkpoint: str, out: str, model: Model) -> None:
    """Writes the model of a checkpoint with its new contact head as a model folder."""
    from esm1nv_jax.checkpoints import model_folder
    from esm1nv_jax.interchange.loader import load_weights

    weights = dataclasses.replace(load_weights(checkpoint), contact_head=model.contact_head_params)
    with files.writing(Path(out)):
        model_folder.write(out, weights)
    console.print(f"model folder {out}; use it with --method attention, or convert it --to hf")


def predict(
    model: Model, proteins: list[Protein], method: str, out: Path, formats: list[str]
) -> list[dict]:
    """Writes the maps of all proteins, and returns rows of precision of those with a structure."""
    passes = [STANDARD * len(p.sequence) if method == "jacobian" else 1 for p in proteins]
    rows: list[dict] = []
    taken = {Path(TABLE).stem}
    with bar("contacts", sum(passes), "passes") as progress:
        starts = itertools.accumulate(passes, initial=0)
        for protein, start in zip(proteins, starts, strict=False):
            scores = model.contacts(
                protein.sequence,
                method,
                lambda done, start=start: progress.update(start + done),  # type: ignore[misc]
            )
            stem = file_stem(protein.name, taken)
            for suffix in formats:
                with files.replacing(out / f"{stem}.{suffix}") as new:
                    WRITERS[suffix](new, protein, scores, method)
            if protein.structure is not None:
                by_method = {method: scores} | baseline_scores(len(protein.sequence))
                for name, values in by_method.items():
                    precision = contact_precision(values, protein.structure)
                    rows.append({"protein": protein, "method": name, "precision": precision})
    return rows


def file_stem(name: str, taken: set[str]) -> str:
    """A file name for an id from outside, which no other protein has; added to `taken`."""
    stem = plain = re.sub(r"[^A-Za-z0-9_-]", "_", name)[:100] or "_"
    n = 1
    while stem.lower() in taken:
        n += 1
        stem = f"{plain}-{n}"
    taken.add(stem.lower())
    return stem


def write_npz(path: Path, protein: Protein, scores: np.ndarray, method: str) -> None:
    """Arrays `scores` [residues, residues], `id`, `sequence` and `method`; with a structure also
    `is_contact` and `is_resolved`."""
    arrays = {"scores": scores, "id": protein.name, "sequence": protein.sequence, "method": method}
    if protein.structure is not None:
        arrays["is_contact"] = protein.structure.is_contact
        arrays["is_resolved"] = protein.structure.is_resolved
    with open(path, "wb") as file:  # a name with another ending would get .npz
        np.savez_compressed(file, **arrays)  # type: ignore[arg-type]


def write_tsv(path: Path, protein: Protein, scores: np.ndarray, method: str) -> None:
    """Pairs at least 6 apart, the highest score first: i, j (from 1), their letters, the score, and
    whether they touch (1, 0, or empty where it is not known)."""
    i, j = np.triu_indices(len(scores), MIN_SEPARATION)
    order = np.argsort(-scores[i, j], kind="stable")
    known = protein.structure
    with open(path, "w", encoding="utf-8") as file:
        file.write("i\tj\tresidue_i\tresidue_j\tscore\tcontact\n")
        for a, b in zip(i[order].tolist(), j[order].tolist(), strict=True):
            contact = ""
            if known is not None and known.is_resolved[a] and known.is_resolved[b]:
                contact = str(int(known.is_contact[a, b]))
            letters = f"{protein.sequence[a]}\t{protein.sequence[b]}"
            file.write(f"{a + 1}\t{b + 1}\t{letters}\t{scores[a, b]:.6g}\t{contact}\n")


def write_png(path: Path, protein: Protein, scores: np.ndarray, method: str) -> None:
    """A picture: the scores above the diagonal, true contacts below where they are known."""
    L = len(scores)
    figure, axes = new_figure(6.4, 6.0)
    i, j = np.triu_indices(L, MIN_SEPARATION)
    upper = np.full((L, L), np.nan)
    upper[i, j] = scores[i, j]
    top = float(np.quantile(scores[i, j], 0.995)) if len(i) else 1.0
    lower = np.full((L, L), np.nan)
    edges = (0.5, L + 0.5, L + 0.5, 0.5)
    image = axes.imshow(upper, cmap="Blues", vmin=0, vmax=max(top, 1e-9), extent=edges)
    title = f"{protein.name[:60]}, {L} residues: above the diagonal {method}"
    if (known := protein.structure) is not None:
        unknown = ~(known.is_resolved[i] & known.is_resolved[j])
        lower[j[unknown], i[unknown]] = 0.3
        axes.imshow(lower, cmap="Greys", vmin=0, vmax=1, extent=edges)
        contact = known.is_contact[i, j]
        style = {"markersize": max(0.5, 250 / L), "markeredgewidth": 0}
        axes.plot(i[contact] + 1, j[contact] + 1, "s", color="black", **style)
        title += "\nbelow it true contacts (grey: not resolved)"
    axes.set_title(title, fontsize=9)
    axes.set(xlabel="residue", ylabel="residue")
    figure.colorbar(image, ax=axes, label="score", fraction=0.04)
    figure.savefig(path, format="png", dpi=120)


WRITERS = {"npz": write_npz, "tsv": write_tsv, "png": write_png}


def write_table(path: Path, rows: list[dict]) -> None:
    """Writes the precision of each protein, method and range as a table."""
    with files.replacing(path) as new, open(new, "w", newline="", encoding="utf-8") as file:
        table = csv.writer(file, delimiter="\t", lineterminator="\n")
        table.writerow(["protein", "residues", "method", "range", *CUTOFFS])
        for row in rows:
            for name in RANGES:
                values = [row["precision"][name, cutoff] for cutoff in CUTOFFS]
                shown = ["" if math.isnan(value) else f"{value:.6f}" for value in values]
                protein = row["protein"]
                table.writerow([protein.name, len(protein.sequence), row["method"], name, *shown])


def print_summary(rows: list[dict]) -> None:
    """Prints means over proteins with their standard errors."""
    proteins = len({id(row["protein"]) for row in rows})
    title = f"precision, mean ± s.e. over {count(proteins, 'protein')}"
    table = numbers_table(title, "range", "method", *CUTOFFS, names=2)
    for name, (first, end) in RANGES.items():
        text = f"{name} {first}-{end - 1}" if end else f"{name} {first}+"
        for method in dict.fromkeys(row["method"] for row in rows):
            of_method = [row["precision"] for row in rows if row["method"] == method]
            means = (mean_and_error(p[name, cutoff] for p in of_method) for cutoff in CUTOFFS)
            table.add_row(text, method, *(plus_minus(mean, error, 3) for mean, error, _ in means))
            text = ""
    stdout.print(table)
