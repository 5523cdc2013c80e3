"""`esm1nv probe`: what a frozen encoder knows of a downstream task, beside what it need not know.

Each head is trained on three kinds of features: one-hot residues, an untrained encoder of the same
shape (another for each seed), and the encoder in question. Its learning rate and weight decay are
chosen on the validation split with the first seed; the test split is looked at once, at the end.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any

import numpy as np
from rich.table import Table
from scipy import stats

from esm1nv_jax import __version__
from esm1nv_jax.common import arguments, files
from esm1nv_jax.common.console import bar, console
from esm1nv_jax.common.errors import UserError
from esm1nv_jax.common.html import plus_minus
from esm1nv_jax.data import labeled_data, tokenizer
from esm1nv_jax.data.labeled_data import Split, Task
from esm1nv_jax.inference import probe_heads
from esm1nv_jax.inference.engine import Want, encode
from esm1nv_jax.inference.evaluate import to_json
from esm1nv_jax.inference.grouped_mean import Tally
from esm1nv_jax.inference.model import Model, load
from esm1nv_jax.inference.probe_heads import GRID, Data
from esm1nv_jax.model import encoder

KINDS = ONE_HOT, UNTRAINED, TRAINED = "one-hot", "untrained encoder", "this encoder"
HEADS = {"secondary_structure": ("linear", "cnn")}  # else linear and mlp
CHUNK = 256  # proteins embedded together
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
    parser = arguments.Parser(
        "probe",
        "Train small heads on a frozen encoder's embeddings, on those of an untrained one, and on\n"
        "one-hot residues. The CSV has columns sequence, label, split (train, valid, test), and\n"
        "for secondary structure mask, where 0 leaves a residue out.",
        "esm1nv probe --checkpoint models/first --task secondary_structure --csv ss3.csv.gz",
    )
    add = parser.add_argument
    add("--checkpoint", required=True, metavar="PATH", help="a run, a step, or a model folder")
    add("--task", required=True, choices=labeled_data.TASKS)
    add("--csv", required=True, metavar="FILE", help="plain or compressed")
    add("--seeds", type=int, default=3, metavar="N", help="repetitions of each head (default 3)")
    add("--limit", type=int, metavar="N", help="at most N proteins to train on, always the same")
    add("--json", metavar="FILE", help="write all figures")
    options = parser.parse_args(argv)
    for name, least in (("seeds", 1), ("limit", 2)):
        if (value := getattr(options, name)) is not None and value < least:
            raise UserError(f"--{name} {value} must be {least} or more")
    files.check(options.json)
    task = labeled_data.read(options.csv, options.task, options.limit)
    found = probe(load(options.checkpoint), task, options.seeds, show=True)
    found = {"checkpoint": options.checkpoint, "csv": options.csv, "limit": options.limit} | found
    show(found)
    if options.json:
        files.write(options.json, to_json(found))
        console.print(f"figures  {options.json}", markup=False)


def probe(model: Model, task: Task, seeds: int, show: bool = False) -> dict[str, Any]:
    """Figures of every head on every kind of features, on the test split."""
    chosen = HEADS.get(task.name, ("linear", "mlp"))
    settings: dict[tuple[str, str], probe_heads.Setting] = {}
    tried: dict[tuple[str, str], list[np.ndarray]] = {}
    total = seeds * 3 * len(chosen) + 3 * len(chosen) * (len(GRID) - 1)
    with bar("probing", total, "heads", show) as progress:
        for kind in KINDS:
            for seed in range(seeds):
                if seed == 0 or kind == UNTRAINED:
                    data = features(kind, model, task, seed)
                for head in chosen:
                    where = (head, kind)
                    grid = GRID if seed == 0 else (settings[where],)
                    best = -math.inf
                    for setting in grid:
                        score, predict = probe_heads.fit(
                            head,
                            len(task.classes),
                            data["train"],
                            data["valid"],
                            setting,
                            seed,
                            functools.partial(main_figure, task),
                        )
                        progress.advance(note=f"{head} on {kind}")
                        if score > best or setting is grid[0]:
                            best, settings[where] = score, setting
                            predicted = predict(data["test"])
                    tried.setdefault(where, []).append(predicted)
    rows = [
        row_of(task, head, kind, settings[head, kind], tried[head, kind])
        for head in chosen
        for kind in KINDS
    ]
    return {
        "task": task.name,
        "classes": list(task.classes),
        "proteins": {s: len(getattr(task, s).sizes) for s in ("train", "valid", "test")},
        "labels_scored": int(task.test.used.sum()),
        "seeds": seeds,
        "test_set": task.fingerprint,
        "rows": rows,
        "differences": [gain(task, head, tried) for head in chosen],
        "published": PUBLISHED.get(task.fingerprint),
        "provenance": model.provenance,
        "code": __version__,
    }


def features(kind: str, model: Model, task: Task, seed: int) -> dict[str, Data]:
    """Features of every split. `seed` is that of the untrained encoder."""
    if kind == UNTRAINED:
        model = dataclasses.replace(model, params=encoder.init(model.config, seed))
    found = {}
    for name in ("train", "valid", "test"):
        split = getattr(task, name)
        if kind == ONE_HOT:
            made = one_hot(split, task.per_residue)
        else:
            made = embeddings(model, split, task.per_residue)
        found[name] = Data(split, made)
    return found


def one_hot(split: Split, per_residue: bool) -> np.ndarray:
    """float32 [k, 30]: of each residue, or their mean over a protein."""
    eye = np.eye(tokenizer.VOCABULARY, dtype=np.float32)
    if per_residue:
        return eye[tokenizer.residue_ids(b"".join(split.sequences))].astype(np.float16)
    return np.stack([eye[tokenizer.residue_ids(s)].mean(axis=0) for s in split.sequences])


def embeddings(model: Model, split: Split, per_residue: bool) -> np.ndarray:
    """The last hidden state, after the final LayerNorm: float16 [residues, D], or the mean over
    residues, float32 [proteins, D]."""
    kind, dtype = ("per_residue", "float16") if per_residue else ("mean", "float32")
    ids = [tokenizer.residue_ids(sequence) for sequence in split.sequences]
    parts = [
        encode(model.placed, ids[i : i + CHUNK], Want((kind,), (-1,), dtype), model.longest)
        for i in range(0, len(ids), CHUNK)
    ]
    return np.concatenate([part[f"{kind}_-1"] for part in parts])


def main_figure(task: Task, split: Split, predicted: np.ndarray) -> float:
    """What settings and epochs are chosen by; higher is better."""
    found = figures(task, split, predicted)
    return -found["mse"] if task.name == "regression" else found["accuracy"]


def figures(task: Task, split: Split, predicted: np.ndarray) -> dict[str, float]:
    """Of the labels that are used. Accuracy for secondary structure; accuracy, macro-F1 and MCC for
    localisation; Spearman's rho and mean squared error for regression."""
    labels, predicted = split.labels[split.used], predicted[split.used]
    if task.name == "regression":
        rho = stats.spearmanr(labels, predicted[:, 0]).statistic if np.ptp(predicted) else math.nan
        return {"spearman": float(rho), "mse": float(np.mean((labels - predicted[:, 0]) ** 2))}
    guess = predicted.argmax(axis=1)
    found = {"accuracy": float(np.mean(guess == labels))}
    if task.name == "localisation":
        k = len(task.classes)
        table = np.bincount(labels * k + guess, minlength=k * k).reshape(k, k).astype(float)
        found["macro_f1"] = macro_f1(table)
        found["mcc"] = matthews(table)
    return found


def macro_f1(table: np.ndarray) -> float:
    """Mean F1 over the classes that occur or are guessed; table[true, guess] counts."""
    either = table.sum(axis=0) + table.sum(axis=1)
    return float(np.mean(2 * np.diag(table)[either > 0] / either[either > 0]))


def matthews(table: np.ndarray) -> float:
    """Matthews' correlation for many classes (Gorodkin, 2004); 0 where only one is guessed."""
    n, right = table.sum(), np.trace(table)
    true, guess = table.sum(axis=1), table.sum(axis=0)
    scale = math.sqrt((n**2 - (guess**2).sum()) * (n**2 - (true**2).sum()))
    return float((right * n - true @ guess) / scale) if scale else 0.0


def row_of(task: Task, head: str, kind: str, setting, tried: list[np.ndarray]) -> dict[str, Any]:
    """Mean over seeds of every figure, with its standard error over seeds; and for the figures that
    are means over labels, the error over test proteins."""
    each = [figures(task, task.test, predicted) for predicted in tried]
    row = {"head": head, "features": kind, **dataclasses.asdict(setting)}
    for name in each[0]:
        values = [x[name] for x in each]
        row[name] = float(np.mean(values))
        row[f"{name}_se_seeds"] = _error(values)
    name = "mse" if task.name == "regression" else "accuracy"
    row[f"{name}_se_proteins"] = by_protein(task, np.mean([_each(task, p) for p in tried], axis=0))
    return row


def gain(task: Task, head: str, tried: dict[tuple[str, str], list[np.ndarray]]) -> dict[str, Any]:
    """This encoder less the untrained one, on the same proteins. The standard error joins that over
    test proteins, of paired differences, and that over seeds."""
    mine, theirs = (
        np.array([_each(task, predicted) for predicted in tried[head, kind]])
        for kind in (TRAINED, UNTRAINED)
    )
    used = task.test.used
    per_seed = (mine - theirs)[:, used].mean(axis=1)
    proteins = by_protein(task, (mine - theirs).mean(axis=0))
    error = math.hypot(proteins, _error(per_seed.tolist()) if len(per_seed) > 1 else 0.0)
    name = "mse" if task.name == "regression" else "accuracy"
    mean = float(per_seed.mean())
    return {
        "head": head,
        "figure": name,
        "difference": mean,
        "se": error,
        "standard_errors": mean / error if error else math.nan,
    }


def _each(task: Task, predicted: np.ndarray) -> np.ndarray:
    """Of each test label, used or not: whether it is right, or its squared error."""
    if task.name == "regression":
        return (task.test.labels - predicted[:, 0]) ** 2
    return (predicted.argmax(axis=1) == task.test.labels).astype(np.float64)


def by_protein(task: Task, each: np.ndarray) -> float:
    """Standard error, by protein, of the mean of a figure over the labels that are used."""
    split = task.test
    protein = np.repeat(np.arange(len(split.sizes)), split.sizes)
    tally = Tally.empty(1)
    tally.add(
        np.zeros(len(split.sizes), np.int64),
        np.bincount(protein, split.used, minlength=len(split.sizes)),
        np.bincount(protein, np.where(split.used, each, 0.0), minlength=len(split.sizes)),
    )
    return tally.mean()[1]


def _error(values: list[float]) -> float:
    return float(np.std(values, ddof=1) / len(values) ** 0.5) if len(values) > 1 else math.nan


def show(found: dict[str, Any]) -> None:
    names = [n for n in ("accuracy", "macro_f1", "mcc", "spearman", "mse") if n in found["rows"][0]]
    counts = found["proteins"]
    title = (
        f"{found['task']}: {counts['test']:,} test proteins, {counts['train']:,} to train on, "
        f"mean ± standard error over {found['seeds']} seeds"
    )
    table = Table(title=title, title_justify="left")
    for name in ("head", "features", *names):
        table.add_column(name, justify="left" if name in ("head", "features") else "right")
    for row in found["rows"]:
        cells = (plus_minus(row[n], row[f"{n}_se_seeds"], 3) for n in names)
        table.add_row(
            row["head"], row["features"], *cells, style="bold" if row["features"] == TRAINED else ""
        )
    console.print(table)
    for difference in found["differences"]:
        console.print(
            f"{difference['head']}: this encoder less the untrained, {difference['figure']} "
            f"{difference['difference']:+.4f} ± {difference['se']:.4f} (by protein and seed), "
            f"{difference['standard_errors']:+.1f} standard errors",
            markup=False,
        )
    if found["published"] and not found.get("limit"):
        where, what, values = found["published"]
        shown = ", ".join(f"{name} {value}" for name, value in values.items())
        console.print(f"Published on this test set ({where}; {what}): {shown}", markup=False)
