"""Metrics of scored assays, and their averages as ProteinGym takes them.

Of each assay the five metrics of its leaderboard, to three decimals; their mean over the assays of
a protein (UniProt id) that measure one function; over proteins, for each function; over functions.
"""

from __future__ import annotations

import csv
import dataclasses
import math
import re
from array import array
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import numpy as np

from esm1nv_jax.common import files
from esm1nv_jax.common.console import console, count, numbers_table, stdout
from esm1nv_jax.common.html import plus_minus
from esm1nv_jax.data.tables import open_csv
from esm1nv_jax.inference.variant_table import PER_RESIDUE, SCORE
from esm1nv_jax.model.label_metrics import matthews, spearman

METRICS = ("Spearman", "AUC", "MCC", "NDCG", "Top_recall")
TOP = 0.1  # of the mutants, in NDCG and in recall
TAXA = ("Human", "Eukaryote", "Prokaryote", "Virus")
# Spearman over all assays of substitutions, on the leaderboard of ProteinGym.
PUBLISHED = {
    "ESM-2 8M": 0.226,
    "ESM-2 35M": 0.321,
    "ESM-2 150M": 0.387,
    "CARP 38M": 0.280,
    "ESM-1v": 0.374,
}
PUBLISHED_ASSAYS = 217


@dataclasses.dataclass(frozen=True)
class Assay:
    """What was measured of one protein; `function`, `taxon` and, of indels, `wild_type` are empty
    where they are not known."""

    name: str
    path: Path
    is_indels: bool
    protein: str
    function: str = ""
    taxon: str = ""
    wild_type: str = ""


def metrics_of(measured: np.ndarray, is_fit: np.ndarray, scores: np.ndarray) -> dict[str, float]:
    """The metrics of n mutants; NaN where they have no meaning.

    Args:
      measured: float64 [n]. is_fit: float64 [n], 0 or 1, NaN where it is not known; for AUC and
      MCC, for which a score from the median on is a prediction of 1. scores: float64 [n].
    """
    used = np.isfinite(measured) & np.isfinite(scores)
    measured, is_fit, scores = measured[used], is_fit[used], scores[used]
    values = dict.fromkeys(METRICS, math.nan)
    if len(scores) < 2 or not np.ptp(measured):
        return values
    values["Spearman"] = spearman(measured, scores)
    values["NDCG"] = ndcg(measured, scores)
    is_top, is_high = (x >= np.percentile(x, 100 * (1 - TOP)) for x in (measured, scores))
    values["Top_recall"] = float((is_top & is_high).sum() / is_top.sum())
    if np.isfinite(is_fit).all() and np.ptp(is_fit):
        values["AUC"] = auc(is_fit > 0, scores)
        predicted = (scores >= np.median(scores)).astype(int)
        cells = np.bincount(2 * (is_fit > 0) + predicted, minlength=4)
        values["MCC"] = matthews(cells.reshape(2, 2).astype(np.float64))
    return values


def auc(is_fit: np.ndarray, scores: np.ndarray) -> float:
    """The probability that one that is fit scores higher than one that is not; ties count half."""
    from scipy.stats import rankdata  # slow to import

    fit = int(is_fit.sum())
    wins = rankdata(scores)[is_fit].sum() - fit * (fit + 1) / 2
    return float(wins / (fit * (len(scores) - fit)))


def ndcg(measured: np.ndarray, scores: np.ndarray) -> float:
    """Normalized discounted cumulative gain of the best-scored tenth; gains are measurements, from
    0 to 1."""
    k = math.floor(TOP * len(scores))
    if not k:
        return math.nan
    gains = (measured - measured.min()) / np.ptp(measured)
    discounts = 1 / np.log2(np.arange(2, k + 2))
    chosen, best = (np.argsort(-x, kind="stable")[:k] for x in (scores, gains))
    return float((gains[chosen] @ discounts) / (gains[best] @ discounts))


def average(assays: Sequence[Assay], values: Sequence[float]) -> tuple[dict, dict, float, float]:
    """(means by function, means by taxon, mean over functions, its standard error).

    The error is what a bootstrap of the proteins of each function converges to; NaN where a
    function has but one protein.
    """
    by_function = _by_group(assays, values, lambda assay: assay.function)
    means = {group: float(np.mean(x)) for group, x in by_function.items()}
    by_taxon = _by_group(assays, values, lambda assay: assay.taxon)
    taxa = {group: float(np.mean(x)) for group, x in by_taxon.items() if group}
    if not means:
        return {}, {}, math.nan, math.nan
    variances = [
        float(np.var(x)) / len(x) if len(x) > 1 else math.nan for x in by_function.values()
    ]
    error = math.sqrt(sum(variances)) / len(means)
    return means, taxa, float(np.mean([*means.values()])), error


def _by_group(
    assays: Sequence[Assay], values: Sequence[float], group_of: Callable[[Assay], str]
) -> dict[str, list[float]]:
    """The means over assays of each protein, by group."""
    proteins: dict[tuple[str, str], list[float]] = {}
    for assay, value in zip(assays, values, strict=True):
        if value == value:
            proteins.setdefault((group_of(assay), assay.protein), []).append(round(value, 3))
    groups: dict[str, list[float]] = {}
    for (group, _), of_protein in sorted(proteins.items()):
        groups.setdefault(group, []).append(float(np.mean(of_protein)))
    return groups


def summarize(assays: Sequence[Assay], out: Path, kind: str) -> None:
    """Prints the averages over scored assays in the folder `out`, and writes there
    `KIND_assays.csv`, a row an assay, and `KIND_summary.csv`, a row a score."""
    scores = (SCORE, PER_RESIDUE) if kind == "indels" else (SCORE,)
    names = ("DMS_score", "DMS_score_bin", *scores)
    rows: list[dict[str, object]] = []
    values: dict[tuple[str, str], list[float]] = {}
    for assay in assays:
        numbers = read_numbers(out / f"{assay.name}.csv", names)
        row: dict[str, object] = {"DMS_id": assay.name, "UniProt_ID": assay.protein}
        row |= {"Selection Type": assay.function, "Taxon": assay.taxon}
        row["number_mutants"] = int(np.isfinite(numbers[SCORE]).sum())
        for score in scores:
            of_assay = metrics_of(numbers["DMS_score"], numbers["DMS_score_bin"], numbers[score])
            for metric, value in of_assay.items():
                values.setdefault((score, metric), []).append(value)
                row[f"{metric}_{score}"] = f"{value:.3f}"
        rows.append(row)
    _write_csv(out / f"{kind}_assays.csv", rows)
    proteins = len({assay.protein for assay in assays})
    title = f"{count(len(assays), 'assay')} of {kind}, {count(proteins, 'protein')}"
    table = numbers_table(f"{title}, mean ± standard error", "", *METRICS)
    groups: dict[str, dict[str, str]] = {}  # Spearman by group, then by score
    summary: list[dict[str, object]] = []
    not_viral = [assay.taxon != "Virus" for assay in assays]
    for score in scores:
        line: dict[str, object] = {"Model_name": score}
        cells = []
        for metric in METRICS:
            of_metric = values[score, metric]
            functions, taxa, mean, error = average(assays, of_metric)
            cells.append(plus_minus(mean, error, 3))
            line |= {f"Average_{metric}": f"{mean:.3f}", f"Standard_error_{metric}": f"{error:.3f}"}
            if metric != "Spearman":
                continue
            grouped = {f"Function_{name}": x for name, x in functions.items() if name}
            grouped |= {f"Taxa_{name}": taxa[name] for name in TAXA if name in taxa}
            if any(not_viral) and not all(not_viral):
                kept = np.where(not_viral, of_metric, math.nan).tolist()
                grouped["Without_viruses"] = average(assays, kept)[2]
            for name, x in grouped.items():
                line[name] = groups.setdefault(name, {})[score] = f"{x:.3f}"
        table.add_row(score, *cells, style="bold")
        summary.append(line)
    if kind == "substitutions":
        for name, value in PUBLISHED.items():
            table.add_row(f"{name} (published)", f"{value:.3f}")
    _write_csv(out / f"{kind}_summary.csv", summary)
    stdout.print(table)
    if groups:  # a row each: they are too many for columns
        by_group = numbers_table("Spearman", "", *scores)
        for name, row_of in groups.items():
            shown = re.sub("^(Function|Taxa)_", "", name).replace("_", " ")
            by_group.add_row(shown, *(row_of.get(score, "") for score in scores))
        stdout.print(by_group)
    if kind == "substitutions" and len(assays) != PUBLISHED_ASSAYS:
        stdout.print(f"The published values are over {PUBLISHED_ASSAYS} assays, not these.")
    for row in rows:
        if row[f"Spearman_{SCORE}"] != "nan":
            continue
        stdout.print(
            f"{row['DMS_id']} takes no part in the mean of Spearman: it has fewer than two mutants "
            "with a measurement and a score, or all of these are equal."
        )
    if not any(assay.function for assay in assays):
        stdout.print("Without functions, which a reference file has, the mean is over proteins.")
    console.print(f"{out}/{kind}_summary.csv, {kind}_assays.csv")


def read_numbers(path: Path, columns: Sequence[str]) -> dict[str, np.ndarray]:
    """Columns of a CSV file: float64 [rows], NaN where there is no column or no number."""
    names, rows = open_csv(str(path))
    values = {column: array("d") for column in columns}
    at = {column: names.index(column) for column in columns if column in names}
    for _, fields in rows:
        for column, content in values.items():
            try:
                content.append(float(fields[at[column]]))
            except (KeyError, ValueError):
                content.append(math.nan)
    return {column: np.array(content) for column, content in values.items()}


def _write_csv(path: Path, rows: Sequence[dict[str, object]]) -> None:
    columns: Iterable[str] = dict.fromkeys(name for row in rows for name in row)
    with files.replacing(path) as new, open(new, "w", newline="", encoding="utf-8") as file:
        table = csv.DictWriter(file, [*columns], lineterminator="\n")
        table.writeheader()
        table.writerows(rows)
