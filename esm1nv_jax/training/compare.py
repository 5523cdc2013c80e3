"""`esm1nv compare`: runs side by side: differing fields, validation curves, a table over seeds."""

from __future__ import annotations

import csv
import dataclasses
import io
import itertools
import json
import math
import os
import statistics
from pathlib import Path
from typing import Any

from rich.table import Table

from esm1nv_jax.common import command, config_file, files, metrics_log
from esm1nv_jax.common.console import console, stdout
from esm1nv_jax.common.errors import UserError
from esm1nv_jax.common.html import HtmlReport, new_figure
from esm1nv_jax.training.run_config import changes_learning
from esm1nv_jax.training.workdir import CONFIG, DATA

METRIC = "perplexity_mask"  # the one metric in which recipes can be compared
# Fields that say which residues validation asks for: under different ones, perplexities are answers
# to different questions.
QUESTION = ("masking.", "evaluation.", "data.max_residues", "data.fingerprint.validation")
COLOURS = ("#1f6fb4", "#d9731a", "#5a9e4b", "#8a5fb0", "#b04a4a", "#777777", "#3aa6a6", "#a68a2a")
HEADER = ("runs", "seeds", "step", "mean", "spread", "above the first")
DIFFERENCES = (
    "Above the first: the difference of means at the last step at which all runs of the table "
    "validated, ± its standard error over seeds. Runs of one seed each have none; the difference "
    "of two models with an error paired by protein: esm1nv evaluate --checkpoint RUN --against RUN "
    "--data DIR."
)


@dataclasses.dataclass(frozen=True)
class Run:
    """A run as it is on disk: `fields` of its config and data, `validation` lines by step."""

    name: str
    fields: dict[str, Any]
    validation: list[dict[str, float]]

    @property
    def recipe(self) -> tuple:
        """Every field that changes what is learned or asked, but the seed."""
        return tuple(
            (name, value)
            for name, value in sorted(self.fields.items())
            if name != "seed" and changes_learning(name)
        )

    @property
    def question(self) -> tuple:
        """Every field that changes which residues validation asks for."""
        return tuple(
            (name, value)
            for name, value in self.recipe
            if name.startswith(QUESTION) and changes_learning(name)
        )

    def at(self, step: float) -> float:
        """Return the validation metric after `step` steps; NaN where there is none."""
        return next((x[METRIC] for x in self.validation if x["step"] == step), math.nan)


@dataclasses.dataclass(frozen=True)
class RecipeRow:
    """The runs of one recipe at the last step at which all of them validated.

    `spread` is the sample standard deviation over seeds, NaN for one. `difference` is how much the
    mean lies above that of the first row of its table, both at the last step that all its runs
    share, with its standard error over seeds; NaN where there is none.
    """

    runs: list[str]
    seeds: list[int | None]
    step: int
    mean: float
    spread: float
    difference: float = math.nan
    difference_se: float = math.nan

    def cells(self) -> list[str]:
        spread = "-" if math.isnan(self.spread) else f"{self.spread:.3f}"
        seeds = ", ".join(map(str, self.seeds))
        above = "-"
        if not math.isnan(self.difference):
            error = "" if math.isnan(self.difference_se) else f" ± {self.difference_se:.3f}"
            above = f"{self.difference:.3f}{error}"
        return [", ".join(self.runs), seeds, f"{self.step:,}", f"{self.mean:.3f}", spread, above]


def main(argv: list[str]) -> None:
    parser = command.Parser(
        "compare",
        "Set runs side by side: what differs in their configs, validation perplexity at <mask>\n"
        "against steps, and mean and spread over seeds.",
        "esm1nv compare runs/card-0 runs/card-1 runs/card-2 --out compare.html",
    )
    add = parser.add_argument
    add("runs", nargs="+", metavar="RUN", help="the --workdir of a run")
    add("--out", metavar="FILE", help="write a page (.html) or the plot (.png)")
    add("--json", metavar="FILE", help="write the table over seeds as JSON")
    add("--csv", metavar="FILE", help="write the table over seeds as CSV")
    options = parser.parse_args(argv)
    files.check(options.out, options.json, options.csv)
    if options.out and Path(options.out).suffix not in (".html", ".png"):
        raise UserError(f"--out {options.out} must end in .html or .png")
    runs = read(list(dict.fromkeys(os.path.normpath(run) for run in options.runs)))
    differences, groups = differing_fields(runs), over_seeds(runs)

    if differences:
        table = Table("field", *(run.name for run in runs), title="What differs")
        for name, values in differences.items():
            table.add_row(name, *map(str, values))
        stdout.print(table)
    else:
        stdout.print("The configs do not differ.")
    for rows in groups:
        table = Table(*HEADER, title="Validation perplexity at <mask>, by recipe")
        for row in rows:
            table.add_row(*row.cells())
        stdout.print(table)
    if any(len(rows) > 1 for rows in groups):
        stdout.print(DIFFERENCES)
    if len(groups) > 1:
        stdout.print(not_comparable(runs))
    records = [dataclasses.asdict(row) for group in groups for row in group]
    if options.json:
        text = json.dumps(records).replace("NaN", "null")
        files.write(options.json, text)
    if options.csv:
        text_file = io.StringIO()
        writer = csv.writer(text_file, lineterminator="\n")
        writer.writerow(field.name for field in dataclasses.fields(RecipeRow))
        for record in records:
            lists = {name: " ".join(map(str, record[name])) for name in ("runs", "seeds")}
            writer.writerow((record | lists).values())
        files.write(options.csv, text_file.getvalue())
    if options.out and options.out.endswith(".png"):
        with files.writing(options.out):
            plot_curves(runs).savefig(options.out, dpi=110)
    elif options.out:
        files.write(options.out, report(runs, differences, groups).to_html())
    for path in filter(None, (options.out, options.json, options.csv)):
        console.print(f"wrote  {path}")


def read(paths: list[str]) -> list[Run]:
    """Read runs. Raises UserError for a folder that is no run, or has not validated yet."""
    runs = []
    for path, name in zip(paths, _short_names(paths), strict=True):
        folder = Path(path)
        try:
            fields = config_file.flat(json.loads((folder / CONFIG).read_text(encoding="utf-8")))
            if (folder / DATA).exists():
                fingerprints = json.loads((folder / DATA).read_text(encoding="utf-8"))
                fields |= {f"data.fingerprint.{split}": x for split, x in fingerprints.items()}
            lines = metrics_log.read(folder)
        except OSError as error:
            raise UserError(
                f"{path} is not a run: {Path(error.filename).name} cannot be read "
                f"({error.strerror}); give the --workdir of a training run"
            ) from None
        except (ValueError, AttributeError) as error:
            raise UserError(f"{path}: {CONFIG} cannot be read ({error})") from None
        validation = [line for line in lines if line["kind"] == "validation"]
        if not validation:
            raise UserError(f"{path} has no validation metrics yet; let it run on, or leave it out")
        if "finetune.task" in fields:
            raise UserError(f"{path} is a fine-tuned run; compare is for pretraining: leave it out")
        runs.append(Run(name, fields, validation))
    return runs


def differing_fields(runs: list[Run]) -> dict[str, list[Any]]:
    """Return, for every field that is not the same in all runs, its value in each."""
    names = sorted(set().union(*(run.fields for run in runs)))
    rows = {name: [run.fields.get(name, "-") for run in runs] for name in names}
    return {name: values for name, values in rows.items() if len(set(map(str, values))) > 1}


def over_seeds(runs: list[Run]) -> list[list[RecipeRow]]:
    """Return one row a recipe, best first, in a list for each question that validation asks.

    Raises UserError for two runs of one recipe and seed: they are no independent measurements.
    """
    recipes: dict[tuple, list[Run]] = {}
    for run in runs:
        recipes.setdefault(run.recipe, []).append(run)
    groups: dict[tuple, list[RecipeRow]] = {}
    for same in recipes.values():
        seeds = [run.fields.get("seed") for run in same]
        for i, seed in enumerate(seeds):
            if seed in seeds[:i]:
                first = same[seeds.index(seed)].name
                raise UserError(
                    f"{first} and {same[i].name} are one recipe with one seed, {seed}; name one"
                )
        shared = set.intersection(*({x["step"] for x in run.validation} for run in same))
        step = int(max(shared)) if shared else 0
        values = [run.at(step) for run in same]
        spread = statistics.stdev(values) if len(values) > 1 else math.nan
        row = RecipeRow([run.name for run in same], seeds, step, statistics.fmean(values), spread)
        groups.setdefault(same[0].question, []).append(row)
    return [_with_differences(rows, runs) for rows in groups.values()]


def _with_differences(rows: list[RecipeRow], runs: list[Run]) -> list[RecipeRow]:
    """Return rows of one question, best first, with their differences from the best."""
    rows = sorted(rows, key=lambda row: row.mean)
    named = {run.name: run for run in runs}
    steps = ({x["step"] for x in named[name].validation} for row in rows for name in row.runs)
    shared = set.intersection(*steps)
    if not shared:
        return rows
    values = [[named[name].at(max(shared)) for name in row.runs] for row in rows]

    def error_of_mean(x: list[float]) -> float:
        return statistics.stdev(x) / math.sqrt(len(x)) if len(x) > 1 else math.nan

    return rows[:1] + [
        dataclasses.replace(
            row,
            difference=statistics.fmean(x) - statistics.fmean(values[0]),
            difference_se=math.hypot(error_of_mean(x), error_of_mean(values[0])),
        )
        for row, x in zip(rows[1:], values[1:], strict=True)
    ]


def not_comparable(runs: list[Run]) -> str:
    """Return one sentence on why runs stand in different tables."""
    names = sorted({name for run in runs for name, _ in run.question})
    differing = [n for n in names if len({str(run.fields.get(n)) for run in runs}) > 1]
    return (
        f"Perplexities of different tables cannot be compared: {', '.join(differing)} differ, so "
        "their validations ask for different residues. Ask all the same: esm1nv evaluate "
        "--checkpoint RUN, with the same --masks for each."
    )


def plot_curves(runs: list[Run]):
    """Plot the validation perplexity of every run against steps, and the mean over its seeds."""
    figure, axis = new_figure(height=4.2)
    recipes: dict[tuple, list[Run]] = {}
    for run in runs:
        recipes.setdefault(run.recipe, []).append(run)
    for same, colour in zip(recipes.values(), itertools.cycle(COLOURS), strict=False):
        style = "o--" if len(same) > 1 else "o-"
        for run in same:
            points = [(x["step"], x[METRIC]) for x in run.validation]
            axis.plot(*zip(*points, strict=True), style, color=colour, label=run.name, ms=3, lw=0.9)
        if len(same) > 1:
            steps = sorted(set.intersection(*({x["step"] for x in r.validation} for r in same)))
            means = [statistics.fmean(run.at(step) for run in same) for step in steps]
            label = f"mean of {len(same)} seeds, {same[0].name} ..."
            axis.plot(steps, means, "-", color=colour, label=label, lw=2)
    axis.set(xlabel="step", ylabel="validation perplexity, <mask> only")
    axis.set_title(", ".join(run.name for run in runs[:4]) + (", ..." if len(runs) > 4 else ""))
    axis.legend(frameon=False, fontsize=8)
    trained = [x[METRIC] for run in runs for x in run.validation if x["step"] > 0]
    if trained:  # the untrained model, at about 30, would flatten all that follows
        axis.set_ylim(min(trained) - 0.2, max(trained) + 0.2)
    return figure


def report(
    runs: list[Run], differences: dict[str, list], groups: list[list[RecipeRow]]
) -> HtmlReport:
    """Return the page: curves, the tables over seeds, and what differs."""
    page = HtmlReport("Runs side by side")
    page.plot(plot_curves(runs), "validation perplexity of every run against steps")
    page.note("One colour a recipe; dashed lines are its seeds, a thick one their mean.")
    page.heading("Over seeds")
    for rows in groups:
        page.table(HEADER, [row.cells() for row in rows])
    page.note(f"Spread is the sample standard deviation over runs of one recipe. {DIFFERENCES}")
    if len(groups) > 1:
        page.paragraph(not_comparable(runs))
    page.heading("What differs")
    if differences:
        header = ["field", *(run.name for run in runs)]
        page.table(header, [[name, *map(str, values)] for name, values in differences.items()])
    else:
        page.paragraph("The configs do not differ.")
    return page


def _short_names(paths: list[str]) -> list[str]:
    """Return the last parts of the paths, as many as tell them apart."""
    parts = [Path(path).absolute().parts for path in paths]
    for n in range(1, max(map(len, parts)) + 1):
        names = ["/".join(p[-n:]) for p in parts]
        if len(set(names)) == len(names):
            return names
    return paths
