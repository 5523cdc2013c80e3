"""The page of an evaluation: what a biologist would ask a language model of proteins first."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from esm1nv_jax.common import metrics_log
from esm1nv_jax.common.html import BLUE, GREY, ORANGE, Page, figure, plus_minus
from esm1nv_jax.inference.substitution import ORDER, blosum62


def page(found: dict[str, Any]) -> Page:
    """From the figures of `evaluate.figures`, with the names of checkpoint and data."""
    made = Page(f"{found['checkpoint']} on {found['data']}")
    _summary(made, found)
    _curves(made, found["provenance"])
    _residues(made, found["by_residue"])
    _substitution(made, found["substitution"])
    _lengths(made, found)
    if "pseudo_perplexity" in found:
        _pseudo(made, found["pseudo_perplexity"])
    _origin(made, found)
    return made


def _summary(made: Page, found: dict[str, Any]) -> None:
    whole = found["overall"]
    made.say(
        f"{found['sequences']:,} proteins, {whole['positions']:,} residues predicted, "
        f"{whole['positions_mask']:,} of them hidden behind <mask>. "
        f"Masking: {found['masking']}, seed {found['seed']}."
    )

    def cell(name):
        return plus_minus(whole[name], whole[f"{name}_se"])

    accuracy = plus_minus(100 * whole["accuracy_mask"], 100 * whole["accuracy_mask_se"])
    made.table(
        ["perplexity (lower is better)", "all selected", "<mask> only"],
        [
            ["this model", cell("perplexity"), cell("perplexity_mask")],
            ["this model, among the 20 amino acids", "", cell("perplexity_mask_20")],
            ["unigram: residue frequencies of these proteins", "", cell("unigram_mask")],
            ["composition: each protein's visible residues", "", cell("composition_mask")],
            ["accuracy of the best guess, percent", "", accuracy],
            *(
                [
                    f"{name} ({row['sequences']:,} proteins)",
                    "",
                    plus_minus(row["perplexity_mask"], row["perplexity_mask_se"]),
                ]
                for name, row in found["by_group"].items()
            ),
        ],
    )
    made.note(
        "± is one standard error, by protein. Perplexity over all selected positions is not "
        "comparable with the baselines: where a residue was left as it was, the answer stands in "
        "the input. "
        + (
            f"{found['cropped']:,} proteins were cut to their first {found['max_residues']:,} "
            "residues."
            if found["cropped"]
            else ""
        )
    )


def _curves(made: Page, provenance: dict[str, Any]) -> None:
    """Learning curves, where the run that the weights come from still lies where it was."""
    run = provenance.get("run")
    if not run or not (Path(run) / metrics_log.FILE).is_file():
        made.note("Learning curves are not shown: the run of these weights is not on this machine.")
        return
    lines = metrics_log.read(run)
    made.heading("Learning curves")
    plot, axis = figure()
    for kind, colour, style in (("train", GREY, "-"), ("validation", BLUE, "o-")):
        points = [(x["step"], x["perplexity_mask"]) for x in lines if x["kind"] == kind]
        if points:
            axis.plot(*zip(*points, strict=True), style, color=colour, label=kind, ms=4, lw=1.2)
    axis.set(xlabel="update", ylabel="perplexity, <mask> only", yscale="log")
    _plain_ticks(axis)
    axis.legend(frameon=False)
    made.plot(plot, "perplexity of training and validation against updates")


def _residues(made: Page, rows: dict[str, dict]) -> None:
    made.heading("Accuracy by residue")
    letters = sorted((a for a in rows if a in ORDER), key=lambda a: -rows[a]["accuracy_mask"])
    plot, axis = figure(height=3.2)
    values = [100 * rows[a]["accuracy_mask"] for a in letters]
    errors = [100 * rows[a]["accuracy_mask_se"] for a in letters]
    share = np.array([rows[a]["positions_mask"] for a in letters], float)
    axis.bar(letters, values, color=BLUE, yerr=errors, ecolor=GREY, capsize=2)
    axis.plot(
        letters,
        100 * share / share.sum(),
        "_",
        color=ORANGE,
        ms=12,
        mew=2,
        label="how often it occurs",
    )
    axis.set(xlabel="residue", ylabel="right at <mask>, percent")
    axis.legend(frameon=False)
    made.plot(plot, "accuracy at masked positions for each amino acid")
    made.table(
        ["residue", "<mask> positions", "accuracy, percent", "perplexity"],
        [
            [
                a,
                f"{rows[a]['positions_mask']:,}",
                plus_minus(100 * rows[a]["accuracy_mask"], 100 * rows[a]["accuracy_mask_se"], 1),
                plus_minus(rows[a]["perplexity_mask"], rows[a]["perplexity_mask_se"], 1),
            ]
            for a in letters
        ],
    )


def _substitution(made: Page, found: dict[str, Any]) -> None:
    made.heading("What the model takes for what, beside BLOSUM62")
    log_odds, theirs = np.array(found["log_odds_bits"], float), blosum62()
    # Neighbours in this order are alike: small, acid and amide, basic, aromatic, aliphatic.
    order = [ORDER.index(a) for a in "CSTAGPDENQHRKMILVFYW"]
    names = [ORDER[i] for i in order]
    plot, axes = figure(10, 4.2, columns=3)
    off = ~np.eye(20, dtype=bool)
    for axis, matrix, title in (
        (axes[0], log_odds, "model, log-odds in bits"),
        (axes[1], theirs, "BLOSUM62, half-bits"),
    ):
        shown = np.where(off, matrix, np.nan)[np.ix_(order, order)]
        seen = np.abs(shown[np.isfinite(shown)])
        limit = max(float(np.quantile(seen, 0.98)), 1e-3) if seen.size else 1
        image = axis.imshow(shown, cmap="RdBu_r", vmin=-limit, vmax=limit)
        axis.set_xticks(range(20), names, fontsize=7)
        axis.set_yticks(range(20), names, fontsize=7)
        axis.set_title(title, fontsize=10)
        plot.colorbar(image, ax=axis, shrink=0.7)
    pairs = np.tril_indices(20, -1)
    jitter = np.linspace(-0.18, 0.18, len(pairs[0]))
    axes[2].plot(theirs[pairs] + jitter, log_odds[pairs], ".", color=BLUE, ms=4)
    axes[2].set(xlabel="BLOSUM62", ylabel="model, bits")
    axes[2].set_title("190 pairs", fontsize=10)
    axes[2].set_box_aspect(1)
    made.plot(plot, "substitution log-odds of the model beside BLOSUM62")
    pearson, spearman = found["pearson_blosum62"], found["spearman_blosum62"]
    made.say(
        f"Correlation off the diagonal: Pearson {plus_minus(pearson, np.nan)}, "
        f"Spearman {plus_minus(spearman, np.nan)}."
    )
    made.note(
        "From the probabilities at <mask> positions, summed over what stood there, symmetrised. "
        "A model that only knows each protein's composition has log-odds near 0, and some "
        "correlation from proteins that differ in composition."
    )


def _lengths(made: Page, found: dict[str, Any]) -> None:
    made.heading("Perplexity against length")
    rows = found["by_length"]
    names = list(rows)
    plot, axis = figure(height=3.2)
    for key, colour, label in (
        ("perplexity_mask", BLUE, "this model"),
        ("composition_mask", ORANGE, "composition of each protein"),
        ("unigram_mask", GREY, "unigram"),
    ):
        values = [rows[n][key] for n in names]
        errors = [rows[n][f"{key}_se"] for n in names]
        axis.errorbar(names, values, errors, fmt="o-", color=colour, label=label, capsize=2, lw=1.2)
    axis.set(xlabel="residues in the protein", ylabel="perplexity, <mask> only")
    axis.legend(frameon=False)
    made.plot(plot, "perplexity at masked positions for classes of length")
    made.table(
        ["residues", "proteins", "model", "composition"],
        [
            [
                n,
                f"{rows[n]['sequences']:,}",
                plus_minus(rows[n]["perplexity_mask"], rows[n]["perplexity_mask_se"]),
                plus_minus(rows[n]["composition_mask"], rows[n]["composition_mask_se"]),
            ]
            for n in names
        ],
    )


def _pseudo(made: Page, found: dict[str, Any]) -> None:
    made.heading("Pseudo-perplexity")
    made.say(
        f"Median protein {found['median']:.2f}; by residue "
        f"{plus_minus(found['token_weighted'], found['token_weighted_se'])}."
    )
    plot, axis = figure(height=2.8)
    values = [x["pseudo_perplexity"] for x in found["sequences"]]
    axis.hist([v for v in values if v == v], bins=30, color=BLUE)
    axis.set(xlabel="pseudo-perplexity", ylabel="proteins")
    made.plot(plot, "histogram of pseudo-perplexity over proteins")


def _origin(made: Page, found: dict[str, Any]) -> None:
    made.heading("Where this comes from")
    origin = found["provenance"]
    rows = [["weights", str(found["checkpoint"])], ["proteins", str(found["data"])]]
    if origin.get("run"):
        rows.append(["run", str(origin["run"])])
    if origin.get("steps"):
        steps = list(map(str, origin["steps"]))
        shown = ", ".join(steps if len(steps) <= 6 else [*steps[:3], "...", *steps[-2:]])
        rows.append(["updates", f"{shown} ({len(steps)} averaged)" if len(steps) > 1 else shown])
    rows += [["products in", found["precision"]], ["code", found["code"]]]
    made.table(["", ""], rows)


def _plain_ticks(axis) -> None:
    """2, 5, 10, 20 rather than powers of ten."""
    from matplotlib.ticker import LogLocator, NullFormatter, ScalarFormatter

    axis.yaxis.set_major_locator(LogLocator(subs=(1, 1.2, 1.5, 2, 3, 5, 7)))
    axis.yaxis.set_major_formatter(ScalarFormatter())
    axis.yaxis.set_minor_formatter(NullFormatter())
