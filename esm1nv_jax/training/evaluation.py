"""Evaluation of held-out sequences; and the end of fine-tuning: the best checkpoint on the test
split, once, with errors by protein."""

from __future__ import annotations

import json
import math
from collections.abc import Callable

import jax
import numpy as np
from etils import epath

from esm1nv_jax.checkpoints import step_folder
from esm1nv_jax.checkpoints.step_folder import BEST
from esm1nv_jax.common import files, metrics_log
from esm1nv_jax.common.console import console, numbers_table
from esm1nv_jax.common.html import plus_minus
from esm1nv_jax.data import pipeline
from esm1nv_jax.data.packing import StreamConfig, evaluation_stream
from esm1nv_jax.data.source import Source
from esm1nv_jax.model import label_metrics
from esm1nv_jax.training import sharding
from esm1nv_jax.training.label_prediction import LabelPrediction
from esm1nv_jax.training.metrics import add_sums
from esm1nv_jax.training.objective import Objective
from esm1nv_jax.training.process_group import ProcessGroup
from esm1nv_jax.training.run_data import RunData
from esm1nv_jax.training.step import TrainState
from esm1nv_jax.training.tuning import merge_trees

FILE = "test.json"  # in the folder of a run


def evaluate(
    objective: Objective,
    stream: StreamConfig,
    mesh: jax.sharding.Mesh,
    eval_step,
    heartbeat: Callable[[str], None],
    source: Source,
    params: dict,
) -> tuple[dict[str, float], dict[str, np.ndarray] | None]:
    """Return metrics of `source`, every sequence of it once and masked alike every time, and the
    objective's outputs that are used, if it has any; the same on every process.

    params: all of them, trained and frozen. eval_step: compiled for batches of `stream`.
    """
    sums: dict[str, float] = {}
    parts: list[dict[str, np.ndarray]] = []
    rows = sharding.local_rows(mesh, stream.rows)
    for batch in pipeline.evaluation_batches(source, evaluation_stream(stream), rows):
        heartbeat("evaluating")
        arrays = sharding.place_on_devices(batch, objective.batch_dtypes, mesh)
        scalars, by_row = eval_step(params, arrays)
        sums = add_sums(sums, scalars.fetch())
        parts.append(objective.used_outputs(jax.device_get(by_row)))
    outputs = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]} or None
    return objective.metrics(sums, outputs), outputs


def test_once(
    data: RunData,
    state: TrainState,
    mesh: jax.sharding.Mesh,
    group: ProcessGroup,
    evaluate: Callable[[Source, dict], tuple[dict[str, float], dict[str, np.ndarray] | None]],
    run_dir: epath.Path,
) -> None:
    """Evaluate the checkpoint that validates best on the test split, and write `test.json`.

    A checkpoint of which the file is there already is not tested again. `evaluate` is the function
    of that name but for its source and parameters.
    """
    if data.test is None or data.task is None:
        return
    assert isinstance(data.objective, LabelPrediction)
    saved = step_folder.steps(run_dir, BEST)
    best = int(group.broadcast("best of all", lambda: str(saved[-1] if saved else 0)))
    step = best or int(state.step)
    if group.broadcast("tested", lambda: str(_tested(run_dir).get("step") == step)) == "True":
        return
    params = state.all_params
    if best:
        trained = step_folder.read_params(run_dir, best, BEST)
        params = merge_trees(sharding.place_state(trained, mesh), state.frozen)
    metrics, outputs = evaluate(data.test, params)
    if not group.is_primary:
        return
    assert outputs is not None
    labels, predicted, examples = data.objective.used_labels(outputs)
    results = {
        "step": step,
        "task": data.task.name,
        "classes": list(data.task.classes),
        "metrics": metrics,
        "errors": label_metrics.bootstrap_errors(data.task.kind, labels, predicted, examples),
        "labels": len(labels),
        "proteins": len(np.unique(examples)),
        "test_set": data.task.fingerprint,
        "sequences_in_several_splits": data.task.shared,
    }
    with files.writing(run_dir / FILE):
        files.write_atomically(run_dir / FILE, files.to_json(results))


def _tested(run_dir: epath.Path) -> dict:
    """The results that `test_once` has written; empty where there are none."""
    try:
        return json.loads((run_dir / FILE).read_text())
    except (OSError, ValueError):
        return {}


def print_results(data: RunData, run_dir: epath.Path) -> None:
    """Print the metrics of the best validation and of the test split, and what to do next."""
    assert isinstance(data.objective, LabelPrediction)
    validated = [line for line in metrics_log.read(run_dir) if line["kind"] == "validation"]
    name = data.objective.best_metric
    sign = 1 if data.objective.maximize else -1
    known = [x for x in validated if x["step"] and x.get(name) is not None and x[name] == x[name]]
    tested = _tested(run_dir)
    rows: list[tuple[str, dict, dict]] = []
    if known:
        best = max(known, key=lambda line: sign * line[name])
        rows.append((f"validation, step {best['step']:,}", best, {}))
    if tested:
        label = f"test, {tested['proteins']:,} proteins, ± s.e. by protein"
        rows.append((label, tested["metrics"], tested["errors"]))
    names = [
        n
        for n in ("loss", "accuracy", "macro_f1", "mcc", "spearman", "mse")
        if rows and n in rows[0][1]
    ]
    table = numbers_table(f"{data.objective.head.level} labels, chosen by {name}", "", *names)
    for label, metrics, errors in rows:
        cells = (plus_minus(_number(metrics, n), _number(errors, n), 3) for n in names)
        table.add_row(label, *cells)
    console.print(table)
    console.print(
        f"\nbest         {run_dir / BEST}\n"
        f"metrics      {run_dir / metrics_log.FILE}, {run_dir / FILE if tested else 'not tested'}\n"
        f"predict      esm1nv predict --checkpoint {run_dir} --fasta FILE --out FILE.csv"
    )


def _number(values: dict, name: str) -> float:
    """A value of JSON, where NaN is null."""
    return math.nan if values.get(name) is None else values[name]
