"""`esm1nv compare`: runs side by side: differing fields, validation curves, a table over seeds."""

from __future__ import annotations

import csv
import dataclasses
import io
import itertools
import math
import os
import statistics
from pathlib import Path
from typing import Any

from esm1nv_jax.common import command, files
from esm1nv_jax.common.console import console, numbers_table, stdout
from esm1nv_jax.common.errors import UserError
from esm1nv_jax.common.html import HtmlReport, new_figure, plus_minus
from esm1nv_jax.model.label_metrics import standard_error
from esm1nv_jax.training import sweep_report
from esm1nv_jax.training.recorded_run import Run, read, shared_steps

COLOURS = ("#1f6fb4", "#d9731a", "#5a9e4b", "#8a5fb0", "#b04a4a", "#777777", "#3aa6a6", "#a68a2a")
DIFFERENCES = (
    "Above the first: the difference of means at the last step at which all runs of the table "
    "validated, ± its standard error over seeds. Runs of one seed each have none; the difference "
    "of two models with an error paired by protein: esm1nv evaluate --checkpoint RUN --against RUN "
    "--data DIR."
)
BEST = (
    "Each run counts at its best validation; means are ± their standard error over seeds. Above "
    "the first: the difference of these means, ± its standard error. Test: the means of the "
    "metrics in test.json, where all runs of the recipe have it."
)


@dataclasses.dataclass(frozen=True)
class RecipeRow:
    """The runs of one recipe at the last step at which all of them validated; fine-tuned runs at
    the best validation of each, with `step` None.

    `spread` is the sample standard deviation over seeds, `se` the standard error of the mean; NaN
    for one run. `difference` is how much the mean lies above that of the first row of its table, of
    pretraining both at the last step that all its runs share, with its standard error over seeds;
    NaN where there is none. `test` has mean and standard error of the metrics of test.json, where
    all of the runs were tested.
    """

    runs: list[str]
    seeds: list[int | None]
    step: int | None
    mean: float
    spread: float
    se: float = math.nan
    test: dict[str, tuple[float, float]] = dataclasses.field(default_factory=dict)
    difference: float = math.nan
    difference_se: float = math.nan

    def cells(self) -> dict[str, str]:
        """Return what tables show, by column."""
        cells = {"runs": ", ".join(self.runs), "seeds": ", ".join(map(str, self.seeds))}
        if self.step is None:
            cells["mean"] = plus_minus(self.mean, self.se, 3)
        else:
            cells["step"] = f"{self.step:,}"
            for name, value in {"mean": self.mean, "spread": self.spread}.items():
                cells[name] = plus_minus(value, math.nan, 3)
        cells["above the first"] = plus_minus(self.difference, self.difference_se, 3)
        return cells | {f"test {name}": plus_minus(*x, 3) for name, x in self.test.items()}

    def record(self) -> dict[str, Any]:
        """Return what is written as JSON and CSV."""
        record = dataclasses.asdict(self)
        for name, (mean, se) in record.pop("test").items():
            record |= {f"test_{name}": mean, f"test_{name}_se": se}
        return record


def main(argv: list[str]) -> None:
    parser = command.Parser(
        "compare",
        "Set runs side by side: what differs in their configs, validation perplexity at <mask>\n"
        "against steps, and mean and spread over seeds. Fine-tuned runs by the metric that chose\n"
        "their best checkpoint, and by their tests. Of a folder of runs NAME-SEED, as\n"
        "launch/sweep.sh makes it: every recipe against a baseline, paired by seed.",
        "esm1nv compare runs/card-0 runs/card-1 runs/card-2 --out compare.html",
    )
    add = parser.add_argument
    add("runs", nargs="+", metavar="RUN", help="the --workdir of a run, or one folder of runs")
    add("--baseline", metavar="NAME", help="of a folder: compare with it (default baseline)")
    add("--out", metavar="FILE", help="write a page (.html) or the plot (.png)")
    add("--json", metavar="FILE", help="write the table over seeds as JSON")
    add("--csv", metavar="FILE", help="write the table over seeds as CSV")
    options = parser.parse_args(argv)
    files.check(options.out, options.json, options.csv)
    if options.out and Path(options.out).suffix not in (".html", ".png"):
        raise UserError(f"--out {options.out} must end in .html or .png")
    paths = list(dict.fromkeys(os.path.normpath(run) for run in options.runs))
    if len(paths) == 1 and (inside := sweep_report.runs_in(paths[0])):
        compare_sweep(sweep_report.read_sweep(inside, options.baseline or "baseline"), options)
        return
    if options.baseline:
        raise UserError("--baseline is for one folder with runs NAME-SEED; leave it out")
    runs = read(paths)
    differences, groups = differing_fields(runs), over_seeds(runs)

    if differences:
        header, *lines = difference_rows(runs, differences)
        table = numbers_table("What differs", *header, names=len(header))
        table.columns[0].no_wrap = True  # the values are broken first
        least = max(len(line[0]) for line in lines) + 8 * len(header)
        if least > stdout.width:  # columns without room would vanish: the terminal breaks the lines
            table.width = least
        for line in lines:
            table.add_row(*line)
        stdout.print(table)
    else:
        stdout.print("The configs do not differ.")
    for rows in groups:
        header, cells = table_of(rows)
        title = f"Validation {metric_name(runs)}, by recipe"
        table = numbers_table(title, *header, names=len(header))
        for row in cells:
            table.add_row(*row)
        stdout.print(table)
    if runs[0].is_finetuned:
        stdout.print(BEST)
    elif any(len(rows) > 1 for rows in groups):
        stdout.print(DIFFERENCES)
    if len(groups) > 1:
        stdout.print(not_comparable(runs))
    records = [row.record() for group in groups for row in group]
    write_outputs(
        options,
        records,
        lambda: plot_curves(runs),
        lambda: report(runs, differences, groups).to_html(),
    )


def compare_sweep(sweep: sweep_report.Sweep, options) -> None:
    """Print the table of a sweep, and write what the options ask for."""
    stdout.print(sweep_report.terminal_table(sweep))
    stdout.print(sweep_report.NOTE)
    if sweep.left_out:
        console.print(f"left out: {', '.join(sweep.left_out)}")
    write_outputs(
        options,
        [row.record() for row in sweep.rows],
        lambda: sweep_report.plot_sweep(sweep),
        lambda: sweep_report.sweep_page(sweep).to_html(),
    )


def write_outputs(options, records: list[dict], plot, page) -> None:
    """Write records as JSON and CSV, and a plot or a page, made by calls, by the options."""
    if options.json:
        files.write(options.json, files.to_json(records, indent=None))
    if options.csv:
        text_file = io.StringIO()
        columns = dict.fromkeys(name for record in records for name in record)
        writer = csv.DictWriter(text_file, columns, lineterminator="\n")
        writer.writeheader()
        for record in records:
            lists = {k: " ".join(map(str, v)) for k, v in record.items() if isinstance(v, list)}
            writer.writerow(record | lists)
        files.write(options.csv, text_file.getvalue())
    if options.out and options.out.endswith(".png"):
        with files.writing(options.out):
            plot().savefig(options.out, dpi=110)
    elif options.out:
        files.write(options.out, page())
    for path in filter(None, (options.out, options.json, options.csv)):
        console.print(f"wrote  {path}")


def differing_fields(runs: list[Run]) -> dict[str, list[Any]]:
    """Return, for every field that is not the same in all runs, its value in each."""
    names = sorted(set().union(*(run.fields for run in runs)))
    rows = {name: [run.fields.get(name, "-") for run in runs] for name in names}
    return {name: values for name, values in rows.items() if len(set(map(str, values))) > 1}


def difference_rows(runs: list[Run], differences: dict[str, list[Any]]) -> list[list[str]]:
    """Return header and rows of a table: a row a field, or a row a run where runs are more."""
    columns = [["field", *differences]]
    columns += [
        [run.name, *(str(values[i]) for values in differences.values())]
        for i, run in enumerate(runs)
    ]
    if len(runs) > len(differences):
        return [["run", *differences], *columns[1:]]
    return [list(row) for row in zip(*columns, strict=True)]


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
        step = max(shared_steps(same), default=0)
        if not step and len(same) > 1 and not same[0].is_finetuned:
            raise UserError(
                f"there is no step after which {' and '.join(run.name for run in same)} validated, "
                "which are one recipe; compare them one by one, or train them on"
            )
        values = _values(same, step)
        row = RecipeRow(
            [run.name for run in same],
            seeds,
            None if same[0].is_finetuned else step,
            statistics.fmean(values),
            _spread(values),
            standard_error(values),
            _test_metrics(same),
        )
        groups.setdefault(same[0].question, []).append(row)
    return [_with_differences(rows, runs) for rows in groups.values()]


def _with_differences(rows: list[RecipeRow], runs: list[Run]) -> list[RecipeRow]:
    """Return rows of one question, best first, with their differences from the best."""
    sign = -1 if runs[0].metric[1] else 1
    rows = sorted(rows, key=lambda row: (math.isnan(row.mean), sign * row.mean))
    named = {run.name: run for run in runs}
    of_rows = [[named[name] for name in row.runs] for row in rows]
    step = max(shared_steps([run for same in of_rows for run in same]), default=0)
    if not step and not runs[0].is_finetuned:  # before it all are untrained
        return rows
    values = [_values(same, step) for same in of_rows]
    return rows[:1] + [
        dataclasses.replace(
            row,
            difference=statistics.fmean(x) - statistics.fmean(values[0]),
            difference_se=math.hypot(standard_error(x), standard_error(values[0])),
        )
        for row, x in zip(rows[1:], values[1:], strict=True)
    ]


def _values(runs: list[Run], step: int) -> list[float]:
    """Return what each run counts: its best validation, in pretraining that after `step` steps."""
    return [run.best() if run.is_finetuned else run.at(step) for run in runs]


def _spread(x: list[float]) -> float:
    """Return the sample standard deviation; NaN of one value, or where there is a NaN."""
    return statistics.stdev(x) if len(x) > 1 and not any(map(math.isnan, x)) else math.nan


def _test_metrics(runs: list[Run]) -> dict[str, tuple[float, float]]:
    """Return mean and standard error over `runs` of every metric of their tests."""
    metrics = [run.test.get("metrics", {}) for run in runs]
    values = {
        name: [math.nan if x[name] is None else x[name] for x in metrics]
        for name in metrics[0]
        if name != "loss" and all(name in x for x in metrics)
    }
    return {name: (statistics.fmean(x), standard_error(x)) for name, x in values.items()}


def metric_name(runs: list[Run]) -> str:
    """Return what titles and axes call the metric of `runs`."""
    return runs[0].metric[0] if runs[0].is_finetuned else "perplexity at <mask>"


def table_of(rows: list[RecipeRow]) -> tuple[list[str], list[list[str]]]:
    """Return header and cells of a table over seeds."""
    cells = [row.cells() for row in rows]
    header = list(dict.fromkeys(name for row in cells for name in row))
    return header, [[row.get(name, "-") for name in header] for row in cells]


def not_comparable(runs: list[Run]) -> str:
    """Return one sentence on why runs stand in different tables."""
    names = sorted({name for run in runs for name, _ in run.question})
    asked = [dict(run.question) for run in runs]
    differing = [name for name in names if len({str(fields.get(name)) for fields in asked}) > 1]
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
            points = [(x["step"], run.at(x["step"])) for x in run.validation]
            axis.plot(*zip(*points, strict=True), style, color=colour, label=run.name, ms=3, lw=0.9)
        if len(same) > 1:
            steps = shared_steps(same)
            means = [statistics.fmean(run.at(step) for run in same) for step in steps]
            label = f"mean of {len(same)} seeds, {same[0].name} ..."
            axis.plot(steps, means, "-", color=colour, label=label, lw=2)
    if runs[0].baselines and all(run.baselines == runs[0].baselines for run in runs):
        for (name, value), style in zip(
            sorted(runs[0].baselines.items()), (":", "-."), strict=False
        ):
            axis.axhline(value, color="#777777", ls=style, lw=0.9, label=f"baseline: {name}")
    axis.set(xlabel="step", ylabel=f"validation {metric_name(runs)}")
    axis.set_title(", ".join(run.name for run in runs[:4]) + (", ..." if len(runs) > 4 else ""))
    axis.legend(frameon=False, fontsize=8)
    trained = [run.at(x["step"]) for run in runs for x in run.validation if x["step"] > 0]
    shown = list(filter(math.isfinite, [*trained, *runs[0].baselines.values()]))
    if any(map(math.isfinite, trained)) and not runs[0].is_finetuned:
        # The untrained model, at about 30, would flatten all that follows.
        axis.set_ylim(min(shown) - 0.2, max(shown) + 0.2)
    return figure


def report(
    runs: list[Run], differences: dict[str, list], groups: list[list[RecipeRow]]
) -> HtmlReport:
    """Return the page: curves, the tables over seeds, and what differs."""
    page = HtmlReport("Runs side by side")
    page.plot(plot_curves(runs), f"validation {metric_name(runs)} of every run against steps")
    page.note("One colour a recipe; dashed lines are its seeds, a thick one their mean.")
    page.heading("Over seeds")
    for rows in groups:
        page.table(*table_of(rows))
    spread = f"Spread is the sample standard deviation over runs of one recipe. {DIFFERENCES}"
    page.note(BEST if runs[0].is_finetuned else spread)
    if len(groups) > 1:
        page.paragraph(not_comparable(runs))
    page.heading("What differs")
    if differences:
        header, *lines = difference_rows(runs, differences)
        page.table(header, lines)
    else:
        page.paragraph("The configs do not differ.")
    page.config(runs[0].name, runs[0].fields)
    return page
