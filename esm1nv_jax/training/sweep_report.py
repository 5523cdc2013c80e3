"""A sweep, runs NAME-SEED in one folder: which recipes differ from a baseline by more than noise.

Every recipe is compared with the baseline seed by seed, at the same masks: those of
`evaluation.json`, written by `esm1nv evaluate`, where runs have one, else of their own validation.
"""

from __future__ import annotations

import dataclasses
import json
import math
import statistics
from pathlib import Path
from typing import Any

from rich.table import Table

from esm1nv_jax.common.console import numbers_table
from esm1nv_jax.common.errors import UserError
from esm1nv_jax.common.html import HtmlReport, new_figure, plus_minus
from esm1nv_jax.model.label_metrics import standard_error
from esm1nv_jax.training.recorded_run import Run, read, shared_steps
from esm1nv_jax.training.workdir import CONFIG

EVALUATION, BASELINE = "evaluation.json", "baseline"
CONFIDENCE = 0.95
HEADER = ("recipe", "seeds", "loss", "perplexity", "less baseline", "95 %", "exceeds noise")
COST = ("residues", "FLOP", "hours")
NOTE = (
    "Loss is in nats at <mask>, ± its standard error over seeds. Differences are paired by seed, "
    "at the same masks of the same proteins; 95 % is the interval of Student's t around their "
    "mean, and a difference exceeds noise where 0 lies outside. One in twenty does so by chance. "
    "Costs are means over seeds: residues trained on, FLOP of model and loss, hours of its steps."
)


@dataclasses.dataclass(frozen=True)
class SweepRow:
    """The runs of one recipe. `losses` are by seed, in nats at `<mask>`.

    `difference` is the mean over shared seeds of what they lie above the baseline, `difference_se`
    its standard error, `half_width` that of its interval; NaN where there are too few seeds, where
    the runs were asked for other residues, or where one diverged.
    """

    name: str
    losses: dict[int, float]
    tokens: float
    flops: float
    seconds: float
    difference: float = math.nan
    difference_se: float = math.nan
    half_width: float = math.nan

    @property
    def exceeds_noise(self) -> bool | None:
        """Whether 0 lies outside the interval; None where there is no interval."""
        return None if math.isnan(self.half_width) else abs(self.difference) > self.half_width

    def cells(self) -> list[str]:
        """Return what tables show, under HEADER and COST."""
        losses = list(self.losses.values())
        mean, verdict = statistics.fmean(losses), {True: "yes", False: "no", None: "-"}
        low, high = (self.difference + sign * self.half_width for sign in (-1, 1))
        return [
            self.name,
            " ".join(map(str, self.losses)),
            plus_minus(mean, standard_error(losses), 4),
            f"{math.exp(mean):.3f}",
            plus_minus(self.difference, self.difference_se, 4),
            "-" if math.isnan(low) else f"{low:+.4f} to {high:+.4f}",
            verdict[self.exceeds_noise],
            f"{self.tokens / 1e6:.1f} M",
            f"{self.flops:.2e}",
            f"{self.seconds / 3600:.2f}",
        ]

    def record(self) -> dict[str, Any]:
        """Return what is written as JSON and CSV."""
        losses = list(self.losses.values())
        return dataclasses.asdict(self) | {
            "seeds": list(self.losses),
            "losses": losses,
            "loss": statistics.fmean(losses),
            "loss_se": standard_error(losses),
            "exceeds_noise": self.exceeds_noise,
        }


@dataclasses.dataclass(frozen=True)
class Sweep:
    """Rows, the baseline first, then by loss; the runs by recipe; what was asked; and which
    runs are left out, with the reason."""

    rows: list[SweepRow]
    runs: dict[str, list[Run]]
    question: str
    left_out: list[str]


def runs_in(path: str) -> list[str]:
    """Return the runs in a folder that is no run itself."""
    folder = Path(path)
    if (folder / CONFIG).exists() or not folder.is_dir():
        return []
    return [str(sub) for sub in sorted(folder.iterdir()) if (sub / CONFIG).is_file()]


def read_sweep(paths: list[str], baseline: str = BASELINE) -> Sweep:
    """Read the runs of a folder. Raises UserError where none that is finished is a `baseline`, for
    two runs of one recipe and seed, for seeds of one recipe that differ otherwise, for fine-tuned
    runs, or where runs without evaluation share no validated step."""
    evaluated = [path for path in paths if (Path(path) / EVALUATION).exists()]
    runs: list[Run] = []
    left_out: dict[str, str] = {}  # by name, why
    for path in paths:
        name = Path(path).name
        if evaluated and path not in evaluated:
            left_out[name] = "not evaluated"
            continue
        try:
            (run,) = read([path])
        except UserError:
            left_out[name] = "not finished"
            continue
        if run.is_finetuned:
            left_out[name] = "fine-tuned"
        elif not (evaluated or _is_finished(run)):
            left_out[name] = "not finished"
        else:
            runs.append(dataclasses.replace(run, name=name))
    if not runs and "fine-tuned" in left_out.values():
        folder = Path(paths[0]).parent
        raise UserError(
            f"the runs of {folder} are fine-tuned, and those of one folder are compared by recipe "
            f"only after pretraining; name them: esm1nv compare {folder}/*-*/"
        )
    step = max(shared_steps(runs), default=0) if runs else 0
    if runs and not evaluated and not step:
        raise UserError(
            "there is no step after which all of the runs validated; ask them the same at their "
            "ends: EVALUATE of launch/sweep.sh"
        )
    measured: dict[str, tuple[float, Any]] = {}
    for run in runs:
        folder = Path(paths[0]).parent / run.name
        measured[run.name] = (
            _evaluated(folder) if evaluated else (math.log(run.at(step)), run.question)
        )
    by_recipe: dict[str, list[Run]] = {}
    for run in runs:
        same = by_recipe.setdefault(run.name.rpartition("-")[0] or run.name, [])
        for other in same:
            if _seed(other) == _seed(run):
                raise UserError(
                    f"{other.name} and {run.name} are one recipe with one seed, {_seed(run)}; move "
                    "one to another folder"
                )
            if differing := _differing(other, run, bool(evaluated)):
                raise UserError(
                    f"{other.name} and {run.name} are seeds of one recipe, but differ in "
                    f"{', '.join(differing)}; move one to another folder"
                )
        same.append(run)
    if baseline not in by_recipe:
        raise UserError(
            f"no finished run is called {baseline}-SEED; --baseline names another: "
            f"{', '.join(by_recipe) or 'none is finished'}"
        )
    reference = {_seed(run): measured[run.name] for run in by_recipe[baseline]}
    rows = [
        _row(name, same, measured, {} if name == baseline else reference)
        for name, same in by_recipe.items()
    ]
    means = {row.name: statistics.fmean(row.losses.values()) for row in rows}
    rows.sort(key=lambda row: (row.name != baseline, math.isnan(means[row.name]), means[row.name]))
    asked: Any = next(iter(reference.values()))[1]
    question = (
        f"{asked['positions_mask']:,} <mask> positions of {asked['data']}, masking "
        f"{asked['masking']}, seed {asked['seed']}"
        if evaluated
        else f"validation after {step:,} steps"
    )
    reasons = [f"{name} ({reason})" for name, reason in left_out.items()]
    return Sweep(rows, by_recipe, question, reasons)


def _is_finished(run: Run) -> bool:
    """Whether it has validated after its last step. One that ends after some minutes has then
    written its baselines."""
    last = max((line["step"] for line in run.validation), default=0)
    by_time = run.fields.get("minutes") and run.baselines
    return bool(last and (by_time or last >= run.fields["steps"]))


def _evaluated(folder: Path) -> tuple[float, dict[str, Any]]:
    """Return the loss at `<mask>` in nats, and all that says which residues were asked for."""
    try:
        results = json.loads((folder / EVALUATION).read_text(encoding="utf-8"))
        names = ("data", "masking", "seed", "max_residues")
        overall = results["overall"]
        asked = {name: results[name] for name in names}
        asked["positions_mask"] = overall["positions_mask"]
        perplexity = overall["perplexity_mask"]  # null of a run that diverged
        return math.nan if perplexity is None else math.log(perplexity), asked
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{folder / EVALUATION} cannot be read ({error}); write it again: esm1nv evaluate "
            "--checkpoint RUN --json RUN/evaluation.json"
        ) from None


def _row(name: str, runs: list[Run], measured: dict, reference: dict) -> SweepRow:
    losses = {_seed(run): measured[run.name] for run in runs}
    differences = [
        losses[seed][0] - reference[seed][0]
        for seed in losses
        if seed in reference and losses[seed][1] == reference[seed][1]
    ]
    tokens, flops, seconds = (
        statistics.fmean(x) for x in zip(*(_cost(run) for run in runs), strict=True)
    )
    error = standard_error(differences)
    return SweepRow(
        name,
        {seed: loss for seed, (loss, _) in sorted(losses.items())},
        tokens,
        flops,
        seconds,
        difference=statistics.fmean(differences) if differences else math.nan,
        difference_se=error,
        half_width=error * _student(len(differences) - 1),
    )


def _differing(a: Run, b: Run, evaluated: bool) -> list[str]:
    """Return the fields in which two seeds of a recipe differ and must not. Each may begin with a
    model and read data of its own; without evaluation all are compared at one step."""
    there, here = (
        dict(run.recipe) | ({"steps": run.fields["steps"]} if evaluated else {}) for run in (a, b)
    )
    own = ("init_from", "fork_from", "data.fingerprint.")
    return [
        name
        for name in sorted(there.keys() | here.keys())
        if there.get(name) != here.get(name) and not name.startswith(own)
    ]


def _seed(run: Run) -> int:
    return run.fields["seed"]


def _cost(run: Run) -> tuple[float, float, float]:
    """Return residues, FLOP and seconds of the training steps of a run."""
    tokens = flops = seconds = before = 0.0
    if run.fields.get("fork_from"):  # it begins with the validation of the step it is forked from
        before = run.validation[0]["step"]
    for line in run.training:
        steps, before = line["step"] - before, line["step"]
        tokens += line["tokens_per_second"] * line["seconds_per_step"] * steps
        flops += line.get("flops_per_step", math.nan) * steps
        seconds += line["seconds_per_step"] * steps
    return tokens, flops, seconds


def _student(degrees: int) -> float:
    """Return the quantile of Student's t that bounds the interval; NaN of no degree of freedom."""
    from scipy.special import stdtrit  # comes with JAX, and is not needed to train

    return float(stdtrit(degrees, (1 + CONFIDENCE) / 2)) if degrees > 0 else math.nan


def changed_fields(sweep: Sweep) -> list[list[str]]:
    """Return (recipe, what it changes of the baseline) for a table."""
    first = sweep.runs[sweep.rows[0].name][0]
    rows = []
    for row in sweep.rows[1:]:
        fields = sweep.runs[row.name][0].fields
        changed = [
            f"{name}={fields.get(name)}"
            for name in sorted(fields.keys() | first.fields.keys())
            if name != "seed" and fields.get(name) != first.fields.get(name)
        ]
        rows.append([row.name, ", ".join(changed)])
    return rows


def terminal_table(sweep: Sweep) -> Table:
    """Return the columns that fit a terminal; the page has all."""
    columns = [*HEADER, *COST]
    shown = [columns.index(name) for name in ("recipe", "loss", "less baseline", "exceeds noise")]
    table = numbers_table(sweep.question, *(columns[i] for i in shown), names=len(shown))
    for row in sweep.rows:
        cells = row.cells()
        table.add_row(*(cells[i] for i in shown))
    return table


def plot_sweep(sweep: Sweep):
    """Plot the differences with their intervals, and the mean validation perplexity of recipes."""
    figure, (left, right) = new_figure(width=11.0, height=0.3 * len(sweep.rows) + 2.4, columns=2)
    compared = [row for row in sweep.rows[1:] if math.isfinite(row.difference)]
    for y, row in enumerate(reversed(compared)):
        error = 0.0 if math.isnan(row.half_width) else row.half_width
        colour = "#d9731a" if row.exceeds_noise else "#777777"
        left.errorbar(row.difference, y, xerr=error, fmt="o", color=colour, capsize=3)
    left.set_yticks(range(len(compared)), [row.name for row in reversed(compared)])
    left.axvline(0, color="#1a1a1a", lw=0.8)
    left.set(xlabel=f"loss less that of {sweep.rows[0].name}, nats at <mask>")
    for row in sweep.rows:
        runs = sweep.runs[row.name]
        steps = [step for step in shared_steps(runs) if step]
        means = [statistics.fmean(run.at(step) for run in runs) for step in steps]
        right.plot(steps, means, lw=2 if row is sweep.rows[0] else 1, label=row.name)
    right.set(xlabel="step", ylabel="perplexity at <mask>, own validation")
    right.legend(frameon=False, fontsize=7, ncols=2)
    return figure


def sweep_page(sweep: Sweep) -> HtmlReport:
    """Return the page: differences, curves, costs, and what each recipe changes."""
    page = HtmlReport(f"Against {sweep.rows[0].name}: {sweep.question}")
    page.plot(plot_sweep(sweep), "differences with intervals; validation perplexity against steps")
    page.table([*HEADER, *COST], [row.cells() for row in sweep.rows])
    page.note(NOTE)
    page.note("Curves are means over seeds; recipes that mask otherwise validate otherwise.")
    if sweep.left_out:
        page.paragraph(f"Left out: {', '.join(sweep.left_out)}.")
    page.heading("What each changes")
    page.table(["recipe", "fields"], changed_fields(sweep))
    first = sweep.runs[sweep.rows[0].name][0]
    page.config(first.name, first.fields)
    return page
