"""`esm1nv score --proteingym`: the assays of a folder in the layout of ProteinGym.

Notin et al., "ProteinGym: Large-Scale Benchmarks for Protein Fitness Prediction and Design", 2023.
An assay is a CSV file with `mutant` or `mutated_sequence`, `DMS_score` and `DMS_score_bin`. Its
scores are written to a file of the same name; an assay whose file is there is not scored again, so
that a job which was killed goes on, and several jobs can share the work.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from esm1nv_jax.common import files
from esm1nv_jax.common.console import console, count
from esm1nv_jax.common.errors import UserError
from esm1nv_jax.data import tokenizer
from esm1nv_jax.data.tables import open_csv
from esm1nv_jax.inference import variant_table
from esm1nv_jax.inference.likelihood import EXACT, MASKED, ONE_PASS
from esm1nv_jax.inference.model import Model
from esm1nv_jax.inference.mutants import is_mutant, parse_mutants, undo, why_no_substitution
from esm1nv_jax.inference.proteingym_summary import Assay, summarize
from esm1nv_jax.inference.variant_table import COLUMN, SCORE, SequenceTable, column_of, score_table

MUTATED, MEASURED = "mutated_sequence", "DMS_score"
# Columns of a reference file, with the names that other releases have for them.
REFERENCE = {
    "name": ("DMS_id",),
    "file": ("DMS_filename",),
    "protein": ("UniProt_ID",),
    "taxon": ("taxon",),
    "function": ("coarse_selection_type", "selection_type"),
    "wild_type": ("target_seq", "sequence"),
}
LOOKED_AT = 100  # rows by which an assay of indels is told from one of substitutions
NEITHER = ("wild type", "synonymous", "stop", "blank")  # rows that say nothing of that
_FILE = re.compile(r"(.+)\.csv(\.(gz|zst|xz))?", re.DOTALL)
LONGEST_NAME = 200  # bytes of the name of an assay, which names a file
SETTINGS = "settings.json"


def run(
    model: Model,
    assays: list[Assay],
    out: Path,
    mode: str,
    shard: tuple[int, int] = (1, 1),
    overwrite: bool = False,
) -> None:
    """Scores the assays of a shard (i, n) into the folder `out`; when all are there, prints and
    writes the summary.

    Raises UserError where `out` holds the scores of another model or mode.
    """
    if any(assay.path.parent.resolve() == out.resolve() for assay in assays):
        raise UserError(f"--out {out} is the folder of the assays; choose another")
    with files.writing(out):
        out.mkdir(exist_ok=True)
    settings = {"model": model.digest, "precision": model.arithmetic, "longest": model.longest}
    _write_or_check(out, settings | {"mode": mode}, assays, overwrite)
    # Large and small ones are dealt out in turn.
    by_size = sorted(assays, key=lambda assay: (-assay.path.stat().st_size, assay.name))
    mine = by_size[shard[0] - 1 :: shard[1]]
    lock = out / f"job-{shard[0]}-of-{shard[1]}.lock"
    with files.locked(lock, f"another live job scores this shard into {out}; wait for it"):
        for number, assay in enumerate(mine, 1):
            path = out / f"{assay.name}.csv"
            if path.exists() and _has_rows(path, assay):
                continue
            if path.exists() and not overwrite:
                raise UserError(
                    f"{path} has other rows than {assay.path}; remove it, and the same command "
                    "scores it"
                )
            console.print(f"{assay.name}, {number} of {len(mine)}")
            if assay.is_indels:
                table = SequenceTable(assay.path, skip=True)
                score_table(model, table, path, EXACT if mode == EXACT else ONE_PASS, overwrite)
            else:
                _score_substitutions(model, assay, path, mode, overwrite)
    missing = [assay.name for assay in assays if not (out / f"{assay.name}.csv").exists()]
    if missing:
        console.print(
            f"{count(len(missing), 'assay')} of {len(assays)} left to other shards; the same "
            "command without --shard scores what is missing, and summarizes"
        )
        return
    for kind in ("substitutions", "indels"):
        some = [assay for assay in assays if assay.is_indels == (kind == "indels")]
        if some:
            summarize(some, out, kind)


def _has_rows(path: Path, assay: Assay) -> bool:
    """Whether a file of scores has the columns and rows of its assay."""
    tables = [open_csv(str(file)) for file in (assay.path, path)]
    (columns, rows), (scored_columns, scored_rows) = tables
    n = len(columns)
    pairs = itertools.zip_longest((r for _, r in rows), (r[:n] for _, r in scored_rows))
    return scored_columns[:n] == columns and all(row == scored for row, scored in pairs)


def _score_substitutions(model: Model, assay: Assay, out: Path, mode: str, overwrite: bool) -> None:
    columns = open_csv(str(assay.path))[0]
    wild_type, names = assay.wild_type, column_of(assay.path, COLUMN)
    skipped: Counter[str] = Counter()
    mutants = parse_mutants(names, wild_type, 0, 2, skipped, missense=True)
    variant_table.print_skipped(skipped, assay.name)
    if not len(mutants):
        raise UserError(f"{assay.path} names no mutant of {assay.protein}; is it its assay?")
    model.check_fits(len(wild_type), assay.name)
    # As the benchmark scores masked language models: the sites of a mutant are masked one by one.
    how = mode, mode == MASKED, overwrite
    rows = variant_table.rows_of(assay.path)
    variant_table.score_and_write(model, wild_type, mutants, columns, rows, out, *how)


def _with_wild_type(assay: Assay) -> Assay:
    """An assay of substitutions with the sequence that its first mutant is one of."""
    columns = open_csv(str(assay.path))[0]
    if MUTATED not in columns:
        raise UserError(f"{assay.path} has no column {MUTATED!r}; give the wild types: --reference")
    texts = (column_of(assay.path, name) for name in (COLUMN, MUTATED))
    for name, text in zip(*texts, strict=True):
        if is_mutant(name):
            try:
                mutated = tokenizer.normalize(text).sequence.decode()
                return dataclasses.replace(assay, wild_type=undo(name, mutated))
            except UserError as error:
                raise UserError(f"{assay.path}: {error}") from None
    raise UserError(f"{assay.path} names no mutant such as A4G")


def read_assays(folder: str, reference: str | None) -> list[Assay]:
    """The assays of a folder, those that a reference file lists where there is one.

    Raises UserError for a file that is no assay, and where there are none.
    """
    if not Path(folder).is_dir():
        raise UserError(f"--proteingym {folder} is no folder; give the one that holds the assays")
    paths: dict[str, Path] = {}
    for path in sorted(Path(folder).iterdir()):
        if not (match := _FILE.fullmatch(path.name)) or path.is_dir():
            continue
        if other := paths.get(match[1]):
            raise UserError(f"{other} and {path.name} are one assay by their names; remove one")
        paths[match[1]] = path
    if reference is None:
        assays = [
            Assay(name, path, _is_indels(path), "_".join(name.split("_")[:2]))
            for name, path in paths.items()
        ]
        listed = len(assays)
    else:
        entries = list(_read_reference(reference))
        listed = len(entries)
        assays = []
        for entry in entries:
            file = entry.pop("file") or entry["name"]
            if found := paths.get(file.split(".csv")[0]):
                assays.append(Assay(path=found, is_indels=_is_indels(found), **entry))
    if not assays:
        of = f", of the {listed} that {reference} lists" if reference else ""
        raise UserError(f"{folder} holds no assay{of}; they are files such as DMS_id.csv")
    if reference:
        unlisted = len(paths) - len({assay.path for assay in assays})
        console.print(
            f"{folder}: {len(assays)} of {listed} assays of {reference}"
            + f"; {count(unlisted, 'other file')} left out" * (unlisted > 0)
        )
    # Before any is scored, so that a fault in one ends no long run.
    return [a if a.is_indels or a.wild_type else _with_wild_type(a) for a in assays]


def _is_indels(path: Path) -> bool:
    columns = open_csv(str(path))[0]
    if MEASURED not in columns or not {COLUMN, MUTATED} & {*columns}:
        raise UserError(
            f"{path} is no assay: it needs {MEASURED}, and {COLUMN} or {MUTATED}; its columns are "
            f"{', '.join(columns)}"
        )
    if SCORE in columns:
        raise UserError(f"{path} has a column {SCORE!r} already; rename it")
    if COLUMN not in columns:
        return True
    names = (
        name for name in column_of(path, COLUMN) if why_no_substitution(name)[0] not in NEITHER
    )
    return not any(map(is_mutant, itertools.islice(names, LOOKED_AT)))


def _read_reference(path: str) -> Iterator[dict[str, str]]:
    """The fields of `REFERENCE` of each assay; empty where the file has no such column."""
    columns, rows = open_csv(path)
    at = {
        field: next((columns.index(name) for name in names if name in columns), None)
        for field, names in REFERENCE.items()
    }
    if at["name"] is None or at["protein"] is None:
        raise UserError(
            f"{path} has no column DMS_id or UniProt_ID; give a reference file of ProteinGym, such "
            "as DMS_substitutions.csv"
        )
    lines: dict[str, int] = {}
    for line, fields in rows:
        entry = {field: "" if i is None else fields[i] for field, i in at.items()}
        name = entry["name"]
        is_file = name and Path(name).name == name and name.isprintable()
        if not is_file or len(name.encode()) > LONGEST_NAME:
            raise UserError(f"{path}, line {line}: DMS_id {name[:80]!r} is no file name")
        if (first := lines.setdefault(name, line)) != line:
            raise UserError(f"{path}, line {line}: DMS_id {name!r} is in line {first}, too")
        try:
            entry["wild_type"] = tokenizer.normalize(entry["wild_type"]).sequence.decode()
        except tokenizer.InvalidResidueError as error:
            raise UserError(f"{path}, line {line}: {error}") from None
        yield entry


def _write_or_check(
    out: Path, settings: dict[str, Any], assays: list[Assay], overwrite: bool
) -> None:
    """Raises UserError where scores in `out` are of other settings, or not from here at all; with
    `overwrite` those of other settings are removed, and those of finished work."""
    path, old = out / SETTINGS, None
    written = [score for assay in assays if (score := out / f"{assay.name}.csv").exists()]
    try:
        old = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(old, dict):
            raise ValueError(old)
    except FileNotFoundError:
        if written:
            raise UserError(
                f"{written[0]} was not written by this command; choose another --out"
            ) from None
    except ValueError:
        if not overwrite:
            raise UserError(f"{path} is damaged; begin anew with --overwrite") from None
        old = {}
    if old == settings and not (overwrite and len(written) == len(assays)):
        return
    if old is not None and not overwrite:
        changed = sorted(name for name in settings if old.get(name) != settings[name])
        raise UserError(
            f"{out} holds scores of other settings ({', '.join(changed)}); choose another --out, "
            "or begin anew with --overwrite"
        )
    with files.writing(path):
        for score in written:
            score.unlink(missing_ok=True)
        files.write_atomically(path, json.dumps(settings, indent=1))
