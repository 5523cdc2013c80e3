"""`esm1nv probe`: what a frozen encoder's embeddings predict, beside baselines.

Each head is trained on three kinds of features: one-hot residues, an untrained encoder of the same
shape (another for each seed), and the encoder in question. Its penalty and learning rate are chosen
on the validation split with the first seed; the test split is used once, at the end.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from esm1nv_jax import __version__
from esm1nv_jax.common import command, files
from esm1nv_jax.common.console import bar, console, count, numbers_table, stdout
from esm1nv_jax.common.errors import UserError
from esm1nv_jax.common.html import plus_minus
from esm1nv_jax.data import labeled_data
from esm1nv_jax.data.labeled_data import Split, Task
from esm1nv_jax.inference import cpu_engines, layer_record, probe_heads
from esm1nv_jax.inference.model import Model, check_layers, load_and_say
from esm1nv_jax.inference.perplexity import GroupedMean
from esm1nv_jax.inference.probe_features import KINDS, TRAINED, UNTRAINED, EmbeddingCache, features
from esm1nv_jax.inference.probe_heads import GRIDS
from esm1nv_jax.model import label_metrics

NETWORK = {"secondary_structure": "cnn"}  # the head beside the linear one; else mlp
# Published with the same test set, probes and frozen encoders; keyed by Task.fingerprint.
PUBLISHED = {
    "934afca90a280e41": (
        "FLIP secondary structure, sampled",
        "accuracy, CNN",
        {"one-hot": 0.643, "ESM-1nv": 0.773, "ESM-2 650M": 0.855},
    ),
    "045cf08365f3db58": (
        "FLIP GB1, two_vs_rest",
        "MSE, MLP",
        {"one-hot": 2.56, "ESM-1nv": 1.58, "ESM-2 650M": 1.67},
    ),
}


def main(argv: list[str]) -> None:
    parser = command.Parser(
        "probe",
        "Train small heads on a frozen encoder's embeddings, on those of an untrained one, and on\n"
        "one-hot residues. The CSV has columns sequence, label, split (train, valid, test), and\n"
        "for secondary structure mask, where 0 leaves a residue out.",
        "esm1nv probe --checkpoint models/first --task secondary_structure --csv ss3.csv.gz",
    )
    add = parser.add_argument
    add("--checkpoint", required=True, metavar="PATH", help="a run, a step, or a model folder")
    older = {new: old for old, new in labeled_data.PROBE_TASKS.items()}
    tasks = "the last three are tasks of finetune"
    add("--task", required=True, choices=(*older.values(), *older), help=tasks)
    add("--csv", required=True, metavar="FILE", help="plain or compressed")
    choice = "all, or some as of embed (default -1): the best on validation is probed"
    add("--layers", nargs="+", action="extend", metavar="K", help=choice)
    add("--plot", metavar="FILE", help="draw the validation scores of --layers: PNG, SVG, PDF")
    add("--seeds", type=int, default=3, metavar="N", help="repetitions of each head (default 3)")
    add("--limit", type=int, metavar="N", help="at most N proteins of each split, always the same")
    cpu_engines.add_arguments(parser)
    add("--no-cache", action="store_true", help="embed anew; keep no embeddings in ~/.cache")
    add("--json", metavar="FILE", help="write all results")
    options = parser.parse_args(argv)
    for name, least in (("seeds", 1), ("limit", 2)):
        if (value := getattr(options, name)) is not None and value < least:
            raise UserError(f"--{name} {value} must be {least} or more")
    files.check(options.json, options.plot)
    if options.plot and Path(options.plot).suffix not in layer_record.PLOTS:
        raise UserError(f"--plot {options.plot} must end in {', '.join(layer_record.PLOTS)}")
    name = older.get(options.task, options.task)
    task = labeled_data.read(options.csv, name, options.limit)
    folder = None if options.no_cache else command.cache_folder()
    cache = EmbeddingCache(folder / "embeddings") if folder else None
    model = load_and_say(options.checkpoint, options.precision, None, options.engine)
    layers = parse_layers(options.layers or ["-1"], model)
    if options.plot and len(layers) == 1:
        raise UserError("--plot shows several layers; name them, as in --layers all")
    results = probe(model, task, options.seeds, progress=True, cache=cache, layers=layers)
    results = {
        "checkpoint": options.checkpoint,
        "csv": options.csv,
        "limit": options.limit,
    } | results
    if len(layers) > 1:
        layer_record.write(options.checkpoint, model.digest, name, results["layers"])
        layer_record.print_curve(results)
        if options.plot:
            layer_record.plot_curve(options.plot, results)
    print_results(results)
    if options.json:
        files.write(options.json, files.to_json(results))
        console.print(f"results  {options.json}")


def probe(
    model: Model,
    task: Task,
    seeds: int,
    progress: bool = False,
    cache: EmbeddingCache | None = None,
    layers: Sequence[int] = (-1,),
) -> dict[str, Any]:
    """Results of every head on every kind of features, on the test split. Of several `layers` that
    one is taken on which a linear head scores best on validation."""
    curve, layer = {}, layers[0]
    if len(layers) > 1:
        curve = layer_curve(model, task, layers, progress, cache)
        layer = max(curve, key=lambda k: (curve[k] == curve[k], curve[k]))
    heads = ("linear", NETWORK.get(task.name, "mlp"))
    score = functools.partial(main_metric, task)
    settings: dict[tuple[str, str], probe_heads.Setting] = {}
    predictions: dict[tuple[str, str], list[np.ndarray]] = {}  # of the test labels, by seed
    for kind in KINDS:
        for seed in range(seeds):
            if seed == 0 or kind == UNTRAINED:  # an encoder embeds each protein once
                data = features(kind, model, task, seed, progress, cache, layer)
            total = sum(len(GRIDS[head]) if seed == 0 else 1 for head in heads)
            with bar(f"heads on {kind}", total, "fits", progress) as task_bar:
                for key in [(head, kind) for head in heads]:
                    grid = GRIDS[key[0]] if seed == 0 else (settings[key],)
                    settings[key], predict = probe_heads.fit_best(
                        key[0], len(task.classes), data, grid, seed, score, task_bar.advance
                    )
                    predictions.setdefault(key, []).append(predict(data["test"]))
    keys = [(head, kind) for head in heads for kind in KINDS]
    return {
        "task": task.name,
        "classes": list(task.classes),
        "proteins": {s: len(getattr(task, s).sizes) for s in ("train", "valid", "test")},
        "labels_scored": int(task.test.used.sum()),
        "seeds": seeds,
        "precision": model.arithmetic,
        "layers": {
            "layer": layer,
            "metric": "-MSE" if task.kind == "regression" else "accuracy",
            "curve": curve,
        },
        "test_set": task.fingerprint,
        "rows": [row_of(task, *key, settings[key], predictions[key]) for key in keys],
        "differences": [gain(task, head, predictions) for head in heads],
        "published": PUBLISHED.get(task.fingerprint),
        "provenance": model.provenance,
        "code": __version__,
    }


def layer_curve(
    model: Model,
    task: Task,
    layers: Sequence[int],
    progress: bool = False,
    cache: EmbeddingCache | None = None,
) -> dict[int, float]:
    """The score of a linear head on the validation split by layer, at the penalty that is best for
    it there. The test split takes no part."""
    score, curve = functools.partial(main_metric, task), {}
    for layer in layers:
        data = features(TRAINED, model, task, 0, progress, cache, layer, ("train", "valid"))
        grid = GRIDS["linear"]
        with bar(f"linear head on layer {layer}", len(grid), "fits", progress) as task_bar:
            _, predict = probe_heads.fit_best(
                "linear", len(task.classes), data, grid, 0, score, task_bar.advance
            )
        curve[layer] = score(task.valid, predict(data["valid"]))
    return curve


def parse_layers(words: list[str], model: Model) -> tuple[int, ...]:
    """The layers that `--layers` names. Raises UserError for one that the model does not have."""
    words = [word for text in words for word in text.split(",") if word]
    if words == ["all"]:
        return (*range(model.config.layers + 1), -1)
    layers = tuple(dict.fromkeys(command.parse_integers("layers", words)))
    if not layers:
        raise UserError("--layers names none; give all, or numbers such as 0 3 -1")
    check_layers(layers, model.config)
    return layers


def main_metric(task: Task, split: Split, predicted: np.ndarray) -> float:
    """What settings and rounds are chosen by; higher is better."""
    value = metrics(task, split, predicted)[_mean_metric(task)]
    return -value if task.kind == "regression" else value


def metrics(task: Task, split: Split, predicted: np.ndarray) -> dict[str, float]:
    """Of the labels that are used. Accuracy for secondary structure; accuracy, macro-F1 and MCC for
    localisation; Spearman's rho and mean squared error for regression."""
    values = label_metrics.score(task.kind, split.labels[split.used], predicted[split.used])
    return {"accuracy": values["accuracy"]} if task.per_residue else values


def row_of(
    task: Task, head: str, kind: str, setting, predictions: list[np.ndarray]
) -> dict[str, Any]:
    """Mean over seeds of every metric, with its standard error over seeds; and for the metrics that
    are means over labels, the error over test proteins."""
    by_seed = [metrics(task, task.test, predicted) for predicted in predictions]
    row = {"head": head, "features": kind, **dataclasses.asdict(setting)}
    for name in by_seed[0]:
        values = np.array([x[name] for x in by_seed])
        row[name], row[f"{name}_se_seeds"] = (
            float(values.mean()),
            label_metrics.standard_error(values),
        )
    losses = np.mean([_by_label(task, predicted) for predicted in predictions], axis=0)
    row[f"{_mean_metric(task)}_se_proteins"] = error_by_protein(task, losses)
    return row


def gain(task: Task, head: str, predictions: dict[tuple[str, str], list]) -> dict[str, Any]:
    """This encoder less the untrained one, on the same proteins. The standard error joins that over
    test proteins, of paired differences, and that over seeds."""
    trained, untrained = (
        np.array([_by_label(task, predicted) for predicted in predictions[head, kind]])
        for kind in (TRAINED, UNTRAINED)
    )
    difference = trained - untrained
    by_seed = difference[:, task.test.used].mean(axis=1)
    over_proteins = error_by_protein(task, difference.mean(axis=0))
    error = math.hypot(
        over_proteins, label_metrics.standard_error(by_seed) if len(by_seed) > 1 else 0.0
    )
    mean = float(by_seed.mean())
    return {
        "head": head,
        "metric": _mean_metric(task),
        "difference": mean,
        "se": error,
        "standard_errors": mean / error if error else math.nan,
    }


def _mean_metric(task: Task) -> str:
    return "mse" if task.kind == "regression" else "accuracy"


def _by_label(task: Task, predicted: np.ndarray) -> np.ndarray:
    """Of each test label, used or not: whether it is correct, or its squared error."""
    if task.kind == "regression":
        return (task.test.labels - predicted[:, 0]) ** 2
    return (predicted.argmax(axis=1) == task.test.labels).astype(np.float64)


def error_by_protein(task: Task, by_label: np.ndarray) -> float:
    """Standard error, by protein, of the mean over the labels that are used."""
    split = task.test
    n = len(split.sizes)
    protein = np.repeat(np.arange(n), split.sizes)
    mean = GroupedMean(1)
    mean.add(
        np.zeros(n, np.int64),
        np.bincount(protein, split.used, minlength=n),
        np.bincount(protein, np.where(split.used, by_label, 0.0), minlength=n),
    )
    return mean.mean()[1]


def print_results(results: dict[str, Any]) -> None:
    rows, counts, seeds = results["rows"], results["proteins"], results["seeds"]
    names = [n for n in ("accuracy", "macro_f1", "mcc", "spearman", "mse") if n in rows[0]]
    title = f"{results['task']}: {count(counts['test'], 'test protein')}"
    title += f", {counts['train']:,} to train on"
    title += f", mean ± standard error over {seeds} seeds" if seeds > 1 else ""
    table = numbers_table(title, "head", "features", *names, names=2)
    for row in rows:
        cells = (plus_minus(row[n], row[f"{n}_se_seeds"], 3) for n in names)
        style = "bold" if row["features"] == TRAINED else ""
        table.add_row(row["head"], row["features"], *cells, style=style)
    stdout.print(table)
    for difference in results["differences"]:
        errors = difference["standard_errors"]
        stdout.print(
            f"{difference['head']}: this encoder less the untrained, {difference['metric']} "
            f"{plus_minus(difference['difference'], difference['se'], 4, '+')} (by protein"
            f"{' and seed' if seeds > 1 else ''})"
            + (f", {errors:+.1f} standard errors" if math.isfinite(errors) else "")
        )
    if results["published"] and not results.get("limit"):
        where, what, values = results["published"]
        shown = ", ".join(f"{name} {value}" for name, value in values.items())
        stdout.print(f"Published on this test set ({where}; {what}): {shown}")
