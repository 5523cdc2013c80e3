"""`esm1nv average`: the mean of checkpoints as a model folder, and whether it is any better.

ESM-1nv was released as such a mean, of the last 47 checkpoints of its run. Members are added array
by array in fp64, in the order of (run, step), so that neither the order of arguments nor rounding
can matter; memory holds the sum and one array, whatever the number of members. Each member's
parameters are checked against their checksums before they are added, while the member before it is
read.
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import numpy as np
import tensorstore
from etils import epath

from esm1nv_jax import __version__
from esm1nv_jax.checkpoints import model_folder, step_folder
from esm1nv_jax.common import command, config_file, files
from esm1nv_jax.common.console import bar, console, numbers_table, stdout
from esm1nv_jax.common.errors import UserError
from esm1nv_jax.common.html import BLUE, ORANGE, HtmlReport, new_figure, plus_minus
from esm1nv_jax.data.source import MemorySource
from esm1nv_jax.inference.evaluate import evaluate_model, open_source
from esm1nv_jax.inference.model import Model
from esm1nv_jax.inference.perplexity import paired_difference
from esm1nv_jax.interchange.loader import load_weights
from esm1nv_jax.model import encoder

COLUMNS = ("", "all selected", "<mask> only", "nats, average minus member")


def main(argv: list[str]) -> None:
    parser = command.Parser(
        "average",
        "The mean of checkpoints, array by array in fp64, as a model folder.",
        "esm1nv average --workdir runs/first --last 47 --out models/first",
    )
    add = parser.add_argument
    runs = "one run or several"
    add("--workdir", required=True, nargs="+", action="extend", metavar="RUN", help=runs)
    add("--out", required=True, metavar="DIR", help="the model folder to write")
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--last", type=int, metavar="N", help="the newest N of each run (or all)")
    which.add_argument("--steps", default="", metavar="A,B", help="these steps of each run")
    add("--every", type=int, default=1, metavar="K", help="each Kth only, counted from the newest")
    add("--report", metavar="FILE.html", help="evaluate the average beside its members")
    add("--data", metavar="DIR[:SPLIT]", help="for the report (default: the run's validation)")
    add("--proteins", type=int, default=500, metavar="N", help="of them, for the report")
    options = parser.parse_args(argv)
    out = epath.Path(options.out)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"--out {options.out} is there already; remove it or choose another folder")
    files.check(options.report)
    if options.last == 0:
        raise UserError("--last 0 names no checkpoint; give 1 or more, or leave it out for all")
    if options.steps and options.every != 1:
        raise UserError("--every chooses among --last or all; leave it out beside --steps")
    try:
        steps = tuple(int(step) for step in options.steps.split(",")) if options.steps else ()
    except ValueError:
        raise UserError(
            f"--steps {options.steps} is not a list of steps such as 1000,2000"
        ) from None
    members = select(options.workdir, options.last or 0, steps, options.every)
    source = _open_proteins(options, members[-1]) if options.report else None

    with bar("averaging", len(members), "checkpoints") as task:
        weights = average(members, lambda member: task.advance(note=str(member.step)))
    with files.writing(options.out):
        model_folder.write(options.out, weights)
    averaged = [member.step for member in members]
    console.print(
        f"averaged {len(members)} checkpoints, steps {min(averaged)} to {max(averaged)}, "
        f"into {options.out}"
    )
    if source is not None:
        proteins, name = source
        rows = evaluate_models(weights, members, proteins)
        provenance = weights.provenance | {"metrics": {"data": name, **rows[-1]["metrics"]}}
        with files.writing(options.out):
            model_folder.write(options.out, dataclasses.replace(weights, provenance=provenance))
        table = numbers_table(f"Perplexity on {name}, the same masks", *COLUMNS)
        for row in rows:
            table.add_row(*_cells(row, rows[-1]), style="bold" if row is rows[-1] else "")
        stdout.print(table)
        stdout.print(verdict(rows))
        page = report(rows, name)
        page.config(rows[-1]["name"], config_file.flat(weights.provenance.get("config", {})))
        files.write(options.report, page.to_html())
        console.print(f"report   {options.report}")


@dataclasses.dataclass(frozen=True, order=True)
class Member:
    run: str
    step: int

    def __str__(self) -> str:
        return f"checkpoint {self.step} of {self.run}"


def select(
    runs: Iterable[str], last: int = 0, steps: tuple[int, ...] = (), every: int = 1
) -> list[Member]:
    """Members in order: of each run the given steps, or the `last` (0: all) of each `every`th.

    `every` counts back from the newest. The best checkpoint, which lives apart, is no member.
    Raises UserError where a run has fewer than asked for.
    """
    if last < 0 or every < 1:
        raise UserError(f"--last {last} and --every {every} must be 1 or more")
    members: list[Member] = []
    for run in sorted({_absolute(run) for run in runs}):
        saved = step_folder.steps(run)
        if not saved:
            raise UserError(f"{run} holds no finished checkpoint; is it the --workdir of a run?")
        if missing := sorted(set(steps) - set(saved)):
            raise UserError(
                f"{run} has no checkpoint {', '.join(map(str, missing))}; it has {len(saved)}, "
                f"from {saved[0]} to {saved[-1]}"
            )
        chosen = sorted(set(steps)) or saved[::-1][::every][: last or None][::-1]
        if not steps and len(chosen) < last:
            raise UserError(
                f"{run} has {len(chosen)} checkpoints"
                + (f" when one in {every} is taken" if every > 1 else "")
                + f", --last {last} were asked for; take --last {len(chosen)}, or train with "
                f"--config.checkpoint.keep={last * every}"
            )
        members += [Member(run, step) for step in chosen]
    return members


def average(
    members: list[Member], on_progress: Callable[[Member], None] = lambda member: None
) -> model_folder.Weights:
    """The mean of the members' parameters, fp32. Calls `on_progress` with each member added.

    Raises UserError that names the member, and the field or parameter, where one is damaged or not
    of the same model as the first.
    """
    members = sorted(set(members))
    if model_folder.find_finetuned(str(_path(members[0]))) is not None:
        return _average_finetuned(members, on_progress)
    model, opened = _open_alike(members)
    sums: dict[str, np.ndarray] = {}
    with ThreadPoolExecutor(1) as thread:  # hashing and reading release the interpreter's lock
        checks = [
            thread.submit(step_folder.verify, m.run, m.step, items=("params",)) for m in members
        ]
        try:
            for member, arrays, check in zip(members, opened, checks, strict=True):
                if errors := check.result():
                    raise UserError(f"{member} is damaged: {'; '.join(errors)}; leave it out")
                for name, array in arrays.items():
                    value = np.asarray(array.read().result())
                    if name in sums:
                        sums[name] += value
                    else:
                        sums[name] = value.astype(np.float64)
                on_progress(member)
        finally:
            thread.shutdown(wait=False, cancel_futures=True)
    means = {name: (total / len(members)).astype(np.float32) for name, total in sums.items()}
    return model_folder.Weights(model_folder.unflatten(means), model, _provenance(members))


def _average_finetuned(
    members: list[Member], on_progress: Callable[[Member], None]
) -> model_folder.Weights:
    """The mean of whole models, each with its base and LoRA merged: the mean of LoRA's factors is
    not that of their products."""
    sums: dict[str, np.ndarray] = {}
    first = load_weights(str(_path(members[0])))
    for member in members:
        weights = load_weights(str(_path(member)))
        if (weights.model, weights.head) != (first.model, first.head):
            raise UserError(
                f"{member} has another model or head than {members[0]}; only checkpoints of one "
                "model can be averaged"
            )
        for name, value in model_folder.flatten(weights.params).items():
            sums[name] = sums.get(name, 0.0) + value.astype(np.float64)
        on_progress(member)
    means = {name: (total / len(members)).astype(np.float32) for name, total in sums.items()}
    params = model_folder.unflatten(means)
    return model_folder.Weights(params, first.model, _provenance(members), first.head)


def _path(member: Member) -> epath.Path:
    return epath.Path(member.run) / step_folder.FOLDER / str(member.step)


def _open_alike(
    members: list[Member],
) -> tuple[encoder.EncoderConfig, list[dict[str, tensorstore.TensorStore]]]:
    """The members' one architecture, and every member's parameters, opened but not read."""
    first, model, opened = members[0], _model(members[0]), []
    for member in members:
        for name, value in dataclasses.asdict(_model(member)).items():
            if value != (expected := getattr(model, name)):
                raise UserError(
                    f"{member} has model.{name}={value}, {first} has {expected}; only "
                    "checkpoints of one model can be averaged"
                )
        try:
            opened.append(step_folder.open_params(member.run, member.step))
        except Exception as error:  # tensorstore raises many kinds
            reason = str(error).splitlines()[0][:200]
            raise UserError(f"{member} cannot be read ({reason}); leave it out") from None
        model_folder.check(opened[-1], model, str(member))
    return model, opened


def _model(member: Member) -> encoder.EncoderConfig:
    try:
        metadata = step_folder.read_metadata(member.run, member.step)
        return encoder.EncoderConfig(**metadata["config"]["model"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{member} has no readable config ({error}); leave it out") from None


def _provenance(members: list[Member]) -> dict:
    """Where an average comes from. A member's digest is that of its file of checksums, which holds
    the digest of every other of its files."""
    rows, data = [], set()
    for member in members:
        digest = hashlib.sha256((_path(member) / step_folder.CHECKSUMS).read_bytes()).hexdigest()
        rows.append(dataclasses.asdict(member) | {"sha256": digest})
        try:
            data.add(step_folder.read_data_state(member.run, member.step).get("data", ""))
        except (OSError, ValueError) as error:
            raise UserError(f"{member} cannot be read ({error}); leave it out") from None
    return {
        "run": members[-1].run,
        "steps": [member.step for member in members],
        "members": rows,
        "data": sorted(data),
        "averaged_by": __version__,
    } | step_folder.read_metadata(members[-1].run, members[-1].step)


def _absolute(run: str) -> str:
    """One name for one run, however it was written, so that the order of members is fixed."""
    path = epath.Path(run)
    if not path.exists():
        raise UserError(f"run {run} does not exist; give the --workdir of a training run")
    return str(path) if "://" in run else str(path.resolve())


def evaluate_models(
    weights: model_folder.Weights, members: list[Member], source: MemorySource
) -> list[dict[str, Any]]:
    """Metrics of every member and, last, of the average, on the same masks: over all proteins
    (`metrics`), and of each (`by_protein`)."""
    ids = source.ids(range(len(source.lengths)))
    longest = Model(weights.model, {}, weights.provenance).longest  # cut alike, masked alike
    rows = []
    with bar("evaluating", len(members) + 1, "models") as task:
        for member in [*members, None]:
            params = (load_weights(str(_path(member))) if member else weights).encoder_params
            provenance = {} if member else weights.provenance  # read the training data once
            model = Model(weights.model, jax.device_put(params), provenance, max_residues=longest)
            results = evaluate_model(model, source, groups=dict(zip(ids, ids, strict=True)))
            row = {"metrics": results["overall"], "by_protein": results["by_group"]}
            row |= {"name": str(member or f"average of {len(members)}"), "run": "", "step": 0}
            rows.append(row | (dataclasses.asdict(member) if member else {}))
            task.advance()
    return rows


def verdict(rows: list[dict[str, Any]]) -> str:
    """Whether the average is better than its best member, by a paired test at 5 %."""
    best = min(rows[:-1], key=lambda row: row["metrics"]["perplexity_mask"])
    difference, error = paired_difference(rows[-1], best)
    ours, theirs = (row["metrics"]["perplexity_mask"] for row in (rows[-1], best))
    evidence = f"{difference:+.4f} ± {error:.4f} nats a residue, paired by protein"
    pair = f"the best member, {best['name']} ({ours:.3f}, {theirs:.3f}: {evidence})"
    if abs(difference) <= 1.96 * error:
        return f"The average cannot be told apart from {pair}; more proteins may tell."
    if difference < 0:
        return f"The average is better than {pair}."
    why = "old members hold it back while the loss falls fast; average fewer, or train longer"
    if len({row["run"] for row in rows[:-1]}) > 1:
        why = "runs that began from other weights have no common mean; average within each run"
    return f"The average is worse than {pair}: {why}."


def report(rows: list[dict[str, Any]], data: str) -> HtmlReport:
    """A page with the perplexity of the average beside its members, as a plot and a table."""
    page = HtmlReport(f"{rows[-1]['name']} beside its members")
    page.paragraph(f"Perplexity at <mask> on {data}, the same masks for all. {verdict(rows)}")
    plot, axis = new_figure()
    colours = itertools.cycle([BLUE, "#5a9e4b", "#8a5fb0", "#777777"])
    for run, colour in zip(sorted({row["run"] for row in rows[:-1]}), colours, strict=False):
        points = [(r["step"], r["metrics"]["perplexity_mask"]) for r in rows if r["run"] == run]
        label = f"members of {Path(run).name}"
        axis.plot(*zip(*points, strict=True), "o-", color=colour, label=label, ms=4, lw=1.2)
    axis.axhline(rows[-1]["metrics"]["perplexity_mask"], color=ORANGE, label=rows[-1]["name"])
    axis.set(xlabel="step", ylabel="perplexity, <mask> only")
    axis.legend(frameon=False)
    page.plot(plot, "perplexity of members against steps, and of their average")
    page.table(COLUMNS, [_cells(row, rows[-1]) for row in rows])
    page.note("± is one standard error by protein; that of a difference is paired.")
    return page


def _cells(row: dict[str, Any], mean: dict[str, Any]) -> list[str]:
    metrics = row["metrics"]
    names = ("perplexity", "perplexity_mask")
    cells = [plus_minus(metrics[name], metrics[f"{name}_se"], 3) for name in names]
    paired = "" if row is mean else plus_minus(*paired_difference(mean, row), 4)
    return [row["name"], *cells, paired]


def _open_proteins(options, newest: Member) -> tuple[MemorySource, str]:
    """The first proteins of the split asked for, held in memory, and its name."""
    if options.proteins < 1:
        raise UserError(f"--proteins {options.proteins} must be 1 or more")
    data = options.data
    if not data:
        try:
            config = step_folder.read_metadata(newest.run, newest.step)["config"]
            data = f"{config['data']['path']}:validation"
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(f"{newest} has no readable config ({error}); give --data") from None
    source, name = open_source(data, None)
    chosen = np.arange(min(options.proteins, len(source.lengths)))
    return MemorySource(list(zip(source.ids(chosen), source.sequences(chosen), strict=True))), name
