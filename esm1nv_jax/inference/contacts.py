"""`esm1nv contacts`: contact maps of proteins, and their precision where structures are known."""

from __future__ import annotations

import dataclasses
import itertools
import re
from pathlib import Path

import numpy as np

from esm1nv_jax.common import files
from esm1nv_jax.common.command import Parser
from esm1nv_jax.common.console import bar, console, count
from esm1nv_jax.common.errors import UserError
from esm1nv_jax.data.fasta import scan
from esm1nv_jax.data.tokenizer import STANDARD
from esm1nv_jax.inference import contact_maps
from esm1nv_jax.inference.api_types import residue_ids
from esm1nv_jax.inference.contact_files import (
    TABLE,
    WRITERS,
    Protein,
    file_stem,
    print_summary,
    write_table,
)
from esm1nv_jax.inference.contact_maps import MAX_STRUCTURES, MIN_STRUCTURES, fit_contact_head
from esm1nv_jax.inference.model import PRECISIONS, Model, load
from esm1nv_jax.inference.structures import (
    Structure,
    baseline_scores,
    contact_precision,
    find_structures,
    name_of,
    read_structure,
)


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
    add("--fasta", help="proteins to predict contacts of")
    add(
        "--structures",
        nargs="+",
        default=[],
        metavar="PATH",
        help="known structures: files, FILE:CHAIN or folders; PDB, mmCIF or lists of contacts. "
        "Those named as a protein of --fasta belong to it; without --fasta all are predicted",
    )
    add("--out", metavar="DIR", help="folder for the maps, and precision.tsv")
    add(
        "--method",
        choices=contact_maps.METHODS,
        help="default: attention with --fit, else jacobian",
    )
    add(
        "--fit",
        nargs="+",
        default=[],
        metavar="PATH",
        help=f"fit the contact head to these {MIN_STRUCTURES} to {MAX_STRUCTURES} structures first",
    )
    add(
        "--save-model", metavar="DIR", help="with --fit: a model folder that holds the contact head"
    )
    add(
        "--formats",
        default="npz,tsv,png",
        metavar="LIST",
        help="which files to write, some of npz,tsv,png (default all)",
    )
    add("--max-residues", type=int, metavar="N", help="the most residues of a protein")
    add("--precision", default="fp32", choices=tuple(PRECISIONS), help="of matrix products")
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
    model = load(args.checkpoint, args.precision, args.max_residues)
    method = args.method or ("attention" if args.fit else "jacobian")
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


def read_proteins(fasta: str | None, paths: list[str]) -> list[Protein]:
    """Proteins of a FASTA file, with the structures that have their names; without a FASTA file,
    those of the structures.

    Raises UserError where a structure belongs to no protein, or is not of its sequence.
    """
    found = find_structures(paths)
    named = {name_of(*one): one for one in found}
    if len(named) < len(found):
        raise UserError("two structures of --structures have one name; rename the file of one")
    if fasta is None:
        structures = [read_structure(*one) for one in found]
        return [Protein(s.name, s.sequence, s) for s in structures]
    proteins = []
    for name, letters in scan(fasta):
        sequence = letters.decode()
        one = named.pop(name, None)
        structure = read_structure(*one, sequence) if one else None
        proteins.append(Protein(name, sequence, structure))
    if named:
        raise UserError(
            f"structure {next(iter(named))} has the name of no protein in {fasta}; name its file "
            "as its id there"
        )
    return proteins


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
        head = fit_contact_head(model.on_devices, structures, ids, progress.update)
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
    taken: set[str] = set()
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
