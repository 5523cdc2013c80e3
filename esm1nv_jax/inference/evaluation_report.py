"""The HTML report of an evaluation, and a model's substitutions beside BLOSUM62."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from scipy import stats

from esm1nv_jax.common import config_file, metrics_log
from esm1nv_jax.common.console import count
from esm1nv_jax.common.html import BLUE, GREY, ORANGE, HtmlReport, log_scale, new_figure, plus_minus
from esm1nv_jax.data.tokenizer import RESIDUES, STANDARD

# Henikoff and Henikoff, PNAS 89, 10915 (1992), as NCBI distributes it; half-bits.
ORDER = "ARNDCQEGHILKMFPSTWYV"
_LOWER_TRIANGLE = """
 4
-1  5
-2  0  6
-2 -2  1  6
 0 -3 -3 -3  9
-1  1  0  0 -3  5
-1  0  0  2 -4  2  5
 0 -2  0 -1 -3 -2 -2  6
-2  0  1 -1 -3  0  0 -2  8
-1 -3 -3 -3 -1 -3 -3 -4 -3  4
-1 -2 -3 -4 -1 -2 -3 -4 -3  2  4
-1  2  0 -1 -3  1  1 -2 -1 -3 -2  5
-1 -1 -2 -3 -1  0 -2 -3 -2  1  2 -1  5
-2 -3 -3 -3 -2 -3 -3 -3 -1  0  0 -3  0  6
-1 -2 -2 -1 -3 -1 -1 -2 -2 -3 -3 -1 -2 -4  7
 1 -1  1  0 -1  0  0  0 -1 -2 -2  0 -1 -2 -1  4
 0 -1  0 -1 -1 -1 -1 -2 -2 -1 -1 -1 -1 -2 -1  1  5
-3 -3 -4 -4 -2 -2 -3 -2 -2 -3 -2 -3 -1  1 -4 -3 -2 11
-2 -2 -2 -3 -2 -1 -2 -3  2 -1 -1 -2 -1  3 -3 -2 -2  2  7
 0 -3 -3 -3 -1 -2 -2 -3 -3  3  1 -2  1 -1 -2 -2  0 -3 -1  4
"""


def blosum62() -> np.ndarray:
    """BLOSUM62 in half-bits, [20, 20] in the order of ORDER."""
    scores = np.zeros((20, 20))
    for i, line in enumerate(_LOWER_TRIANGLE.split("\n")[1:-1]):
        scores[i, : i + 1] = line.split()
    return scores + np.tril(scores, -1).T


def compare_with_blosum62(sums: np.ndarray, letters: str = RESIDUES[:STANDARD]) -> dict[str, Any]:
    """Log-odds of substitution from sums[a, b] of p(b) over `<mask>` positions that were a.

    The sums, over all positions, estimate how often a and b could stand in one place; symmetrised,
    their log-odds against chance are what BLOSUM is of aligned columns.

    Returns `order`, the letters; `log_odds_bits` [20, 20]; and its correlation with BLOSUM62 over
    the 190 pairs off the diagonal, NaN where a pair was never seen.
    """
    order = [letters.index(a) for a in ORDER]
    joint = np.asarray(sums, np.float64)[np.ix_(order, order)]
    joint = (joint + joint.T) / 2
    with np.errstate(divide="ignore", invalid="ignore"):
        joint = joint / joint.sum()
        expected = joint.sum(axis=1)
        log_odds = np.log2(joint / np.outer(expected, expected))
    pairs = np.tril_indices(20, -1)
    ours, theirs = log_odds[pairs], blosum62()[pairs]
    pearson = spearman = float("nan")
    if np.isfinite(ours).all() and ours.std() >= 1e-12:
        pearson = float(stats.pearsonr(ours, theirs).statistic)
        spearman = float(stats.spearmanr(ours, theirs).statistic)
    return {
        "order": ORDER,
        "log_odds_bits": log_odds.tolist(),
        "pearson_blosum62": pearson,
        "spearman_blosum62": spearman,
    }


def build_report(results: dict[str, Any], summary: list[tuple[str, str, str]]) -> HtmlReport:
    """The report of `evaluate_model`'s results, with the names of checkpoint and data, and of
    their summary."""
    report = HtmlReport(f"{results['checkpoint']} on {results['data']}")
    overall = results["overall"]
    report.paragraph(
        f"{count(results['sequences'], 'protein')}, {overall['positions']:,} residues predicted, "
        f"{overall['positions_mask']:,} of them hidden behind <mask>. "
        f"Masking: {results['masking']}, seed {results['seed']}."
    )
    report.table(["", "all selected", "<mask> only"], summary)
    report.note(
        "± is one standard error, by protein. Perplexity over all selected positions is not "
        "comparable with the baselines: where a residue was left as it was, the answer stands in "
        f"the input. Cut to their first {results['max_residues']:,} residues: "
        f"{count(results['cropped'], 'protein')}."
    )
    _plot_learning_curves(report, results["provenance"])
    _plot_residues(report, results["by_residue"])
    _plot_substitutions(report, results["substitution"])
    _plot_lengths(report, results["by_length"])
    if "pseudo_perplexity" in results:
        _plot_pseudo_perplexity(report, results["pseudo_perplexity"])
    _add_provenance(report, results)
    report.config(results["checkpoint"], config_file.flat(results["provenance"].get("config", {})))
    return report


def _plot_learning_curves(report: HtmlReport, provenance: dict[str, Any]) -> None:
    """Learning curves, where the run that the weights come from still lies where it was."""
    run = provenance.get("run")
    if not run or not (Path(run) / metrics_log.FILE).is_file():
        report.note("No learning curves: the run of these weights is not on this machine.")
        return
    lines = [line for line in metrics_log.read(run) if "perplexity_mask" in line]
    if not lines:
        report.note("No learning curves: the run of these weights was fine-tuned to labels.")
        return
    report.heading("Learning curves")
    figure, axis = new_figure()
    for kind, colour, style in (("train", GREY, "-"), ("validation", BLUE, "o-")):
        points = [(x["step"], x["perplexity_mask"]) for x in lines if x["kind"] == kind]
        if points:
            axis.plot(*zip(*points, strict=True), style, color=colour, label=kind, ms=4, lw=1.2)
    axis.set(xlabel="step", ylabel="perplexity, <mask> only")
    log_scale(axis)
    axis.legend(frameon=False)
    report.plot(figure, "perplexity of training and validation against steps")


def _plot_residues(report: HtmlReport, rows: dict[str, dict]) -> None:
    report.heading("Accuracy by residue")
    letters = sorted((a for a in rows if a in ORDER), key=lambda a: -rows[a]["accuracy_mask"])
    figure, axis = new_figure(height=3.2)
    values = [100 * rows[a]["accuracy_mask"] for a in letters]
    errors = [100 * rows[a]["accuracy_mask_se"] for a in letters]
    share = np.array([rows[a]["positions_mask"] for a in letters], float)
    share *= 100 / share.sum()
    axis.bar(letters, values, color=BLUE, yerr=errors, ecolor=GREY, capsize=2)
    axis.plot(letters, share, "_", color=ORANGE, ms=12, mew=2, label="how often it occurs")
    axis.set(xlabel="residue", ylabel="correct at <mask>, percent")
    axis.legend(frameon=False)
    report.plot(figure, "accuracy at masked positions for each amino acid")
    cells = [
        [a, f"{rows[a]['positions_mask']:,}", plus_minus(value, error, 1), _perplexity(rows[a], 1)]
        for a, value, error in zip(letters, values, errors, strict=True)
    ]
    report.table(["residue", "<mask> positions", "accuracy, percent", "perplexity"], cells)


def _plot_substitutions(report: HtmlReport, results: dict[str, Any]) -> None:
    report.heading("What the model takes for what, beside BLOSUM62")
    log_odds, blosum = np.array(results["log_odds_bits"], float), blosum62()
    # Neighbours in this order are alike: small, acid and amide, basic, aromatic, aliphatic.
    order = [ORDER.index(a) for a in "CSTAGPDENQHRKMILVFYW"]
    names = [ORDER[i] for i in order]
    figure, axes = new_figure(10, 4.2, columns=3)
    for axis, matrix, title in (
        (axes[0], log_odds, "model, log-odds in bits"),
        (axes[1], blosum, "BLOSUM62, half-bits"),
    ):
        shown = np.where(np.eye(20, dtype=bool), np.nan, matrix)[np.ix_(order, order)]
        finite = np.abs(shown[np.isfinite(shown)])
        limit = max(float(np.quantile(finite, 0.98)), 1e-3) if finite.size else 1
        image = axis.imshow(shown, cmap="RdBu_r", vmin=-limit, vmax=limit)
        axis.set_xticks(range(20), names, fontsize=7)
        axis.set_yticks(range(20), names, fontsize=7)
        axis.set_title(title, fontsize=10)
        figure.colorbar(image, ax=axis, shrink=0.7)
    pairs = np.tril_indices(20, -1)
    jitter = np.linspace(-0.18, 0.18, len(pairs[0]))
    axes[2].plot(blosum[pairs] + jitter, log_odds[pairs], ".", color=BLUE, ms=4)
    axes[2].set(xlabel="BLOSUM62", ylabel="model, bits")
    axes[2].set_title("190 pairs", fontsize=10)
    axes[2].set_box_aspect(1)
    report.plot(figure, "substitution log-odds of the model beside BLOSUM62")
    report.paragraph(
        f"Correlation off the diagonal: Pearson {plus_minus(results['pearson_blosum62'], np.nan)}, "
        f"Spearman {plus_minus(results['spearman_blosum62'], np.nan)}."
    )
    report.note(
        "From the probabilities at <mask> positions, summed over what stood there, symmetrised. "
        "A model that only knows each protein's composition has log-odds near 0, and some "
        "correlation from proteins that differ in composition."
    )


def _plot_lengths(report: HtmlReport, rows: dict[str, dict]) -> None:
    report.heading("Perplexity against length")
    figure, axis = new_figure(height=3.2)
    for key, colour, label in (
        ("perplexity_mask", BLUE, "this model"),
        ("composition_mask", ORANGE, "composition of each protein"),
        ("unigram_mask", GREY, "unigram"),
    ):
        values, errors = ([row[k] for row in rows.values()] for k in (key, f"{key}_se"))
        style = {"fmt": "o-", "color": colour, "label": label, "capsize": 2, "lw": 1.2}
        axis.errorbar(list(rows), values, errors, **style)
    axis.set(xlabel="residues in the protein", ylabel="perplexity, <mask> only")
    axis.legend(frameon=False)
    report.plot(figure, "perplexity at masked positions for classes of length")
    cells = [
        [n, f"{row['sequences']:,}", _perplexity(row), _perplexity(row, name="composition_mask")]
        for n, row in rows.items()
    ]
    report.table(["residues", "proteins", "model", "composition"], cells)


def _perplexity(row: dict[str, float], digits: int = 2, name: str = "perplexity_mask") -> str:
    return plus_minus(row[name], row[f"{name}_se"], digits)


def _plot_pseudo_perplexity(report: HtmlReport, results: dict[str, Any]) -> None:
    report.heading("Pseudo-perplexity")
    figure, axis = new_figure(height=2.8)
    values = [x["pseudo_perplexity"] for x in results["sequences"]]
    axis.hist([v for v in values if v == v], bins=30, color=BLUE)
    axis.set(xlabel="pseudo-perplexity", ylabel="proteins")
    report.plot(figure, "histogram of pseudo-perplexity over proteins")


def _add_provenance(report: HtmlReport, results: dict[str, Any]) -> None:
    report.heading("Provenance")
    provenance = results["provenance"]
    rows = [["weights", str(results["checkpoint"])], ["proteins", str(results["data"])]]
    if provenance.get("run"):
        rows.append(["run", str(provenance["run"])])
    if provenance.get("steps"):
        steps = list(map(str, provenance["steps"]))
        shown = ", ".join(steps if len(steps) <= 6 else [*steps[:3], "...", *steps[-2:]])
        rows.append(["steps", f"{shown} ({len(steps)} averaged)" if len(steps) > 1 else shown])
    rows += [["precision", results["precision"]], ["code", results["code"]]]
    report.table(["", ""], rows)
