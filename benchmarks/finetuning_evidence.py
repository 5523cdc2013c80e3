"""What fine-tuning gains over a frozen encoder, by task and method: a Markdown table.

    python benchmarks/finetuning_evidence.py --model DIR --data FOLDER --out RUNS
        [--tasks secondary_structure] [--methods probe,head,full] [--seeds 3] [--epochs 10]
        [--batch 32] [--longest 254] [--train 2000] [--test 500] [--jobs 1]

FOLDER holds the CSV files of TASKS. Every method sees the same proteins, those of up to `--longest`
residues: of the training and the validation split all of the table, or `--train` and an eighth as
many, of the test split `--test`.
`probe` is the linear head of `esm1nv probe` on the frozen encoder, fitted to convergence, so that
no seed plays a part; `scratch` is `full` from random weights. A row is the mean over seeds with its
standard error; peak memory and time are the largest of one run. Below it stands what each method
gains over `head`, paired by protein and seed, with the error over test proteins. Finished runs in
RUNS are not repeated. With `--jobs` several runs share the machine, on one GPU too: then time and
memory mean nothing.
"""

from __future__ import annotations

import csv
import functools
import json
import math
import os
import statistics
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

import esm1nv_jax
from esm1nv_jax.checkpoints import step_folder
from esm1nv_jax.common import command
from esm1nv_jax.common.command import Parser
from esm1nv_jax.data import labeled_data
from esm1nv_jax.data.tables import read_csv
from esm1nv_jax.inference import probe_heads
from esm1nv_jax.inference.probe import error_by_protein, main_metric, metrics
from esm1nv_jax.inference.probe_features import TRAINED, features

# name: file, task, metric
TASKS = {
    "secondary_structure": (
        "flip_secondary_structure_3state.csv.gz",
        "residue_classification",
        "accuracy",
    ),
    "localisation": ("deeploc2_single_label_le510.csv.gz", "protein_classification", "accuracy"),
    "gb1": ("flip_gb1_two_vs_rest.csv.gz", "protein_regression", "spearman"),
}
CONFIG = Path(__file__).parents[1] / "configs" / "finetune.py"
METHODS = ("probe", "head", "last=2", "lora=8", "full", "scratch")


def smaller_table(
    source: Path, target: Path, sizes: dict[str, int | None], longest: int | None
) -> None:
    """Writes at most so many rows of each split, always the same ones, in their order."""
    columns, rows = read_csv(str(source))
    at, sequence = columns.index("split"), columns.index("sequence")
    rows = [row for row in rows if longest is None or len(row[1][sequence]) <= longest]
    chosen: set[int] = set()
    for split, size in sizes.items():
        members = [i for i, (_, row) in enumerate(rows) if labeled_data.SPLITS[row[at]] == split]
        order = np.random.default_rng(0).permutation(len(members))[:size]
        chosen |= {members[i] for i in order}
    with open(target, "w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(columns)
        writer.writerows(row for i, (_, row) in enumerate(rows) if i in chosen)


def timed(arguments: list[str]) -> dict[str, float]:
    """Runs a command to its end: seconds, and the peak of its memory in GiB."""
    began = time.monotonic()
    process = subprocess.Popen([sys.executable, "-m", *arguments])
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(f"failed: {' '.join(arguments)}")
    return {"seconds": time.monotonic() - began, "gib": usage.ru_maxrss / (1 << 20)}


def probe(model: str, table: Path, task: str, metric: str, out: Path) -> None:
    """The linear head of `esm1nv probe`, fitted to convergence on frozen embeddings; no seed."""
    file = out / "probe.json"
    if file.exists():
        return
    began = time.monotonic()
    encoder = esm1nv_jax.load(model)
    labels = labeled_data.read(str(table), task)
    data = features(TRAINED, encoder, labels, seed=0, progress=True, cache=None)
    _, predict = probe_heads.fit_best(
        "linear",
        len(labels.classes),
        data,
        probe_heads.GRIDS["linear"],
        seed=0,
        score=functools.partial(main_metric, labels),
        on_fit=lambda: None,
    )
    score = metrics(labels, labels.test, predict(data["test"]))[metric]
    file.write_text(json.dumps({"mean": score, "seconds": time.monotonic() - began}))


def probed(out: Path) -> dict[str, Any]:
    row = json.loads((out / "probe.json").read_text())
    return {"error": 0.0, "parameters": None, "gib": None, **row}


def train(
    model: str, table: Path, task: str, method: str, seed: int, epochs: int, batch: int, out: Path
) -> None:
    """One run of fine-tuning, unless it is finished."""
    run = out / f"{method}-{seed}"
    if not (run / "cost.json").exists():
        config = f"model={model},csv={table},task={task},epochs={epochs},batch={batch},"
        config += f"seed={seed},"
        config += "scratch" if method == "scratch" else f"method={method}"
        cost = timed(["esm1nv_jax.main", f"--config={CONFIG}:{config}", f"--workdir={run}"])
        (run / "cost.json").write_text(json.dumps(cost))


def finetuned(out: Path, method: str, metric: str, seeds: int) -> dict[str, Any]:
    """Mean and standard error on the test split over seeds, of finished runs."""
    values, costs, parameters = [], [], 0
    for seed in range(seeds):
        run = out / f"{method}-{seed}"
        values.append(json.loads((run / "test.json").read_text())["metrics"][metric])
        costs.append(json.loads((run / "cost.json").read_text()))
        step = step_folder.steps(run, step_folder.BEST)[-1]
        arrays = step_folder.open_params(str(run), step, step_folder.BEST)
        parameters = sum(math.prod(array.shape) for array in arrays.values())
    error = statistics.stdev(values) / len(values) ** 0.5 if seeds > 1 else math.nan
    return {
        "mean": statistics.mean(values),
        "error": error,
        "parameters": parameters,
        **{name: max(cost[name] for cost in costs) for name in ("seconds", "gib")},
    }


def correct(run: Path, task: labeled_data.Task) -> np.ndarray:
    """Of each label of the test split, whether a finished run predicts it: 0 or 1."""
    values = esm1nv_jax.load(str(run / step_folder.BEST)).predict(task.test.sequences).values
    predicted = np.concatenate([np.atleast_2d(value).argmax(axis=1) for value in values])
    return (predicted == task.test.labels).astype(np.float64)


def print_gains(out: Path, task: labeled_data.Task, methods: list[str], seeds: int) -> None:
    """Each method less `head`, on the same proteins and seeds, with the error over proteins."""
    heads = [correct(out / f"head-{seed}", task) for seed in range(seeds)]
    for method in methods:
        runs = [correct(out / f"{method}-{seed}", task) for seed in range(seeds)]
        difference = np.mean(np.array(runs) - heads, axis=0)
        gain, error = difference[task.test.used].mean(), error_by_protein(task, difference)
        print(f"{method} less head: {gain:+.4f} ± {error:.4f} by protein")


def print_table(name: str, metric: str, results: dict[str, dict[str, Any]], seeds: int) -> None:
    print(f"\n{name}, {seeds} seeds\n")
    print(f"| method | test {metric} | trained parameters | peak memory | time |")
    print("|---|---|---|---|---|")
    for method, row in results.items():
        count = "" if row["parameters"] is None else f"{row['parameters']:,}"
        memory = "" if row["gib"] is None else f"{row['gib']:.2f} GiB"
        print(
            f"| {method} | {row['mean']:.4f} ± {row['error']:.4f} | {count} | {memory} | "
            f"{row['seconds'] / 60:.1f} min |"
        )
    tuned = {m: row for m, row in results.items() if m not in ("probe", "scratch")}
    if "probe" in results and tuned and seeds > 1:
        best, row = max(tuned.items(), key=lambda item: item[1]["mean"])
        gain, error = row["mean"] - results["probe"]["mean"], row["error"]
        print(f"\n{best} less probe: {gain:+.4f} ± {error:.4f}, {gain / error:.1f} standard errors")


def main(argv: list[str]) -> None:
    parser = Parser("(benchmark)", "What fine-tuning gains.", "see the file")
    add = parser.add_argument
    add("--model", required=True, help="the checkpoint to fine-tune")
    add("--data", required=True, type=Path, metavar="FOLDER", help="of the CSV files")
    add("--out", required=True, type=Path, metavar="RUNS", help="a folder; a second call goes on")
    add("--tasks", default=",".join(TASKS))
    add("--methods", default=",".join(METHODS))
    add("--seeds", type=int, default=3)
    add("--epochs", type=int, default=10)
    add("--batch", type=int, default=32, help="proteins a step")
    add("--longest", type=int, help="leave out proteins of more residues")
    add("--train", type=int, help="at most so many proteins to train on")
    add("--test", type=int, help="at most so many proteins to test on")
    add("--jobs", type=int, default=1, help="runs at a time")
    args = parser.parse_args(argv)
    jobs = []
    for name in args.tasks.split(","):
        file, task, metric = TASKS[name]
        out = args.out / name
        out.mkdir(parents=True, exist_ok=True)
        table = out / "table.csv"
        valid = args.train and max(2, args.train // 8)
        sizes = {"train": args.train, "valid": valid, "test": args.test}
        smaller_table(args.data / file, table, sizes, args.longest)
        for method in args.methods.split(","):
            if method == "probe":
                jobs.append((probe, args.model, table, task, metric, out))
                continue
            for seed in range(args.seeds):
                schedule = seed, args.epochs, args.batch
                jobs.append((train, args.model, table, task, method, *schedule, out))
    with ThreadPoolExecutor(args.jobs) as pool:
        for running in [pool.submit(*job) for job in jobs]:
            running.result()
    for name in args.tasks.split(","):
        out, metric = args.out / name, TASKS[name][2]
        results: dict[str, dict[str, Any]] = {}
        for method in args.methods.split(","):
            if method == "probe":
                results[method] = probed(out)
            else:
                results[method] = finetuned(out, method, metric, args.seeds)
        print_table(name, metric, results, args.seeds)
        task = labeled_data.read(str(out / "table.csv"), TASKS[name][1])
        if task.kind == "classification" and "head" in results:
            tuned = [method for method in results if method not in ("probe", "head")]
            print_gains(out, task, tuned, args.seeds)


if __name__ == "__main__":
    sys.exit(command.run(main, sys.argv[1:]))
