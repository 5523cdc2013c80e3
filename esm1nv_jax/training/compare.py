"""`esm1nv compare`: runs side by side: differing fields, validation curves, a table over seeds."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import statistics
from pathlib import Path
from typing import Any

from rich.table import Table

from esm1nv_jax.common import arguments, config_file, files, metrics_log
from esm1nv_jax.common.console import console
from esm1nv_jax.common.errors import UserError
from esm1nv_jax.common.html import HtmlReport, new_figure
from esm1nv_jax.training.run_config import changes_learning
from esm1nv_jax.training.workdir import CONFIG

METRIC = "perplexity_mask"  # the one metric in which recipes can be compared
COLOURS = ("#1f6fb4", "#d9731a", "#5a9e4b", "#8a5fb0", "#b04a4a", "#777777", "#3aa6a6", "#a68a2a")


@dataclasses.dataclass(frozen=True)
class Run:
    """A run as it is on disk: `config` by dotted field, `validation` lines by ascending step."""

    name: str
    config: dict[str, Any]
    validation: list[dict[str, float]]
    train: list[dict[str, float]]

    @property
    def recipe(self) -> tuple:
        """Every field that changes what is learned or asked, but the seed."""
        return tuple(
            (name, value)
            for name, value in sorted(self.config.items())
            if name != "seed" and changes_learning(name)
        )

    def at(self, step: int) -> float:
        """Return the validation metric after `step` steps; NaN where there is none."""
        return next((x[METRIC] for x in self.validation if x["step"] == step), math.nan)


def main(argv: list[str]) -> None:
    parser = arguments.Parser(
        "compare",
        "Set runs side by side: what differs in their configs, validation perplexity at <mask>\n"
        "against steps, and mean and spread over seeds.",
        "esm1nv compare runs/card-0 runs/card-1 runs/shipped-0 --out compare.html",
    )
    parser.add_argument("runs", nargs="+", metavar="RUN", help="the --workdir of a run")
    parser.add_argument("--out", metavar="FILE", help="write a page (.html) or the plot (.png)")
    options = parser.parse_args(argv)
    files.check(options.out)
    if options.out and Path(options.out).suffix not in (".html", ".png"):
        raise UserError(f"--out {options.out} must end in .html or .png")
    runs = read(list(dict.fromkeys(os.path.normpath(run) for run in options.runs)))
    differences, table = differing_fields(runs), over_seeds(runs)
    if differences:
        shown = Table("field", *(run.name for run in runs), title="What differs")
        for name, values in differences.items():
            shown.add_row(name, *map(str, values))
        console.print(shown)
    else:
        console.print("The configs do not differ.")
    shown = Table(*HEADER, title="Validation perplexity at <mask>, by recipe")
    for row in table:
        shown.add_row(*cells(row))
    console.print(shown)
    if options.out:
        if options.out.endswith(".png"):
            with files.writing(options.out):
                plot_curves(runs).savefig(options.out, dpi=110)
        else:
            files.write(options.out, page(runs, differences, table).to_html())
        console.print(f"wrote  {options.out}", markup=False)


def read(paths: list[str]) -> list[Run]:
    """Read runs. Raises UserError for a folder that is no run, or has not validated yet."""
    runs = []
    for path, name in zip(paths, _names(paths), strict=True):
        folder = Path(path)
        try:
            config = config_file.flat(json.loads((folder / CONFIG).read_text()))
            lines = metrics_log.read(folder)
        except OSError as error:
            raise UserError(
                f"{path} is not a run: {Path(error.filename).name} is not there; give the "
                "--workdir of a training run"
            ) from None
        except ValueError as error:
            raise UserError(f"{path}: {CONFIG} cannot be read ({error})") from None
        kinds = {k: [x for x in lines if x["kind"] == k] for k in ("validation", "train")}
        if not kinds["validation"]:
            raise UserError(f"{path} has no validation metrics yet; let it run on, or leave it out")
        runs.append(Run(name, config, kinds["validation"], kinds["train"]))
    return runs


def differing_fields(runs: list[Run]) -> dict[str, list[Any]]:
    """Return, for every field that is not the same in all runs, its value in each."""
    names = sorted(set().union(*(run.config for run in runs)))
    rows = {name: [run.config.get(name, "-") for run in runs] for name in names}
    return {name: values for name, values in rows.items() if len(set(map(str, values))) > 1}


def over_seeds(runs: list[Run]) -> list[dict[str, Any]]:
    """Return one row a recipe, best first: its runs, mean and spread of the metric they share.

    Runs of one recipe are compared at the last step at which all of them validated. The spread
    is the sample standard deviation over runs, NaN for one run.
    """
    recipes: dict[tuple, list[Run]] = {}
    for run in runs:
        recipes.setdefault(run.recipe, []).append(run)
    rows = []
    for same in recipes.values():
        shared = set.intersection(*({x["step"] for x in run.validation} for run in same))
        step = max(shared) if shared else 0
        values = [run.at(step) for run in same]
        rows.append(
            {
                "runs": [run.name for run in same],
                "seeds": [run.config.get("seed") for run in same],
                "step": step,
                "mean": statistics.fmean(values),
                "spread": statistics.stdev(values) if len(values) > 1 else math.nan,
            }
        )
    return sorted(rows, key=lambda row: row["mean"])


HEADER = ("runs", "seeds", "step", "mean", "spread")


def cells(row: dict[str, Any]) -> list[str]:
    spread = "-" if math.isnan(row["spread"]) else f"{row['spread']:.3f}"
    seeds = ", ".join(map(str, row["seeds"]))
    return [", ".join(row["runs"]), seeds, f"{row['step']:,}", f"{row['mean']:.3f}", spread]


def plot_curves(runs: list[Run]):
    """Plot the validation perplexity of every run against steps."""
    plot, axis = new_figure(height=4.2)
    colour_of: dict[tuple, str] = {}
    for run in runs:
        known = run.recipe in colour_of
        colour = colour_of.setdefault(run.recipe, COLOURS[len(colour_of) % len(COLOURS)])
        points = [(x["step"], x[METRIC]) for x in run.validation]
        axis.plot(
            *zip(*points, strict=True),
            "o-" if not known else "o--",
            color=colour,
            label=run.name,
            ms=3,
            lw=1.2,
        )
    axis.set(xlabel="step", ylabel="validation perplexity, <mask> only")
    axis.legend(frameon=False, fontsize=8)
    learned = [x[METRIC] for run in runs for x in run.validation if x["step"] > 0]
    if learned:  # the untrained model, at about 30, would flatten all that follows
        axis.set_ylim(min(learned) - 0.2, max(learned) + 0.2)
    return plot


def page(runs: list[Run], differences: dict[str, list], table: list[dict]) -> HtmlReport:
    made = HtmlReport("Runs side by side")
    made.plot(plot_curves(runs), "validation perplexity of every run against steps")
    made.note("One colour a recipe; dashed lines are further seeds of it.")
    made.heading("Over seeds")
    made.table(HEADER, [cells(row) for row in table])
    made.note("Spread is the sample standard deviation over runs of one recipe.")
    made.heading("What differs")
    if differences:
        made.table(
            ["field", *(run.name for run in runs)],
            [[name, *map(str, values)] for name, values in differences.items()],
        )
    else:
        made.paragraph("The configs do not differ.")
    return made


def _names(paths: list[str]) -> list[str]:
    """Return the last parts of the paths, as many as tell them apart."""
    parts = [Path(path).absolute().parts for path in paths]
    for n in range(1, max(map(len, parts)) + 1):
        names = ["/".join(p[-n:]) for p in parts]
        if len(set(names)) == len(names):
            return names
    return paths
