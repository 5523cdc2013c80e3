"""What `esm1nv contacts` writes and prints: maps as npz, TSV and PNG, and tables of precision."""

from __future__ import annotations

import csv
import dataclasses
import math
import re
from pathlib import Path

import numpy as np

from esm1nv_jax.common import files
from esm1nv_jax.common.console import count, stdout
from esm1nv_jax.common.html import new_figure, plus_minus
from esm1nv_jax.inference.structures import (
    CUTOFFS,
    MIN_SEPARATION,
    RANGES,
    Structure,
    mean_and_error,
)

TABLE = "precision.tsv"


@dataclasses.dataclass(frozen=True)
class Protein:
    """What to predict contacts of; with its structure, where that is known."""

    name: str
    sequence: str
    structure: Structure | None = None


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
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    L = len(scores)
    figure, axes = new_figure(6.4, 6.0)
    FigureCanvasAgg(figure)
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
        axes.plot(
            i[contact] + 1,
            j[contact] + 1,
            "s",
            color="black",
            markersize=max(0.5, 250 / L),
            markeredgewidth=0,
        )
        title += "\nbelow it true contacts (grey: not resolved)"
    axes.set_title(title, fontsize=9)
    axes.set_xlabel("residue")
    axes.set_ylabel("residue")
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
    from rich.table import Table

    proteins = len({id(row["protein"]) for row in rows})
    table = Table(title=f"precision, mean ± s.e. over {count(proteins, 'protein')}")
    for column in ("range", "method", *CUTOFFS):
        table.add_column(column, justify="right" if column in CUTOFFS else "left")
    for name, (first, end) in RANGES.items():
        text = f"{name} {first}-{end - 1}" if end else f"{name} {first}+"
        for method in dict.fromkeys(row["method"] for row in rows):
            of_method = [row["precision"] for row in rows if row["method"] == method]
            shown = []
            for cutoff in CUTOFFS:
                mean, error, _ = mean_and_error(p[name, cutoff] for p in of_method)
                shown.append(plus_minus(mean, error, 3))
            table.add_row(text, method, *shown)
            text = ""
    stdout.print(table)
