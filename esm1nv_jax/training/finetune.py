"""`esm1nv finetune`: a door to the run of configs/finetune.py, once or over a grid of settings.

Every setting of a grid is a run of its own in `OUT/grid`, without a look at the test split. The one
that validates best becomes the run `OUT`, and that one is tested.
"""

from __future__ import annotations

import itertools
import json
import math
import os
import shutil
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from esm1nv_jax.checkpoints import step_folder
from esm1nv_jax.checkpoints.model_folder import DESCRIPTION
from esm1nv_jax.checkpoints.step_folder import BEST
from esm1nv_jax.common import config_file, files
from esm1nv_jax.common.command import Parser
from esm1nv_jax.common.console import console, numbers_table
from esm1nv_jax.common.errors import EXIT_INTERRUPTED, EXIT_SAVED, UserError
from esm1nv_jax.common.html import plus_minus
from esm1nv_jax.data.labeled_data import TASKS
from esm1nv_jax.training.label_prediction import best_metric
from esm1nv_jax.training.process_group import initialize_arguments
from esm1nv_jax.training.run_config import RunConfig
from esm1nv_jax.training.train import train
from esm1nv_jax.training.workdir import CONFIG, LOCK

FOLDER, FILE = "grid", "grid.json"  # in the folder of the run
FIELDS = {"lr": "optimizer.peak_lr", "weight_decay": "optimizer.weight_decay"}
# Fields that are arguments of the config, too: the steps of an epoch depend on them.
SPLIT = ("valid_fraction", "test_fraction", "split_seed")


def main(argv: list[str]) -> int:
    parser = Parser(
        "finetune",
        "Fine-tune a model on the labels of a CSV table with columns sequence, label and, if it\n"
        "has them, split (train, valid, test), id and mask. Every field of the config can be set:\n"
        "--config.finetune.pooling=attention",
        "esm1nv finetune --checkpoint models/first --csv ss3.csv --task residue_classification \\\n"
        "      --method lora=8 --out runs/ss3",
    )
    add = parser.add_argument
    add("--checkpoint", required=True, metavar="PATH", help="the model to fine-tune")
    add("--csv", required=True, metavar="FILE", help="plain or compressed")
    add("--task", required=True, choices=tuple(TASKS))
    add("--out", required=True, metavar="RUN", help="where the run lives")
    add("--method", default="full", help="full (default), last=BLOCKS, lora=RANK or head")
    add("--epochs", type=int, metavar="N", help="passes over the training split, at most")
    add("--batch", type=int, metavar="N", help="proteins a step and device, about")
    add("--lr", type=float, metavar="RATE", help="peak learning rate; by default of the method")
    add("--seed", type=int, metavar="N", help="of the head, the order and dropout")
    grid = "lr=1e-4,3e-4 weight_decay=0,0.01"
    add("--grid", nargs="+", action="extend", metavar="NAME=VALUES", help=grid)
    options, overrides = parser.parse_known_args(argv)
    names = {"model": options.checkpoint, "csv": options.csv, "task": options.task}
    names |= {name: getattr(options, name) for name in ("method", "epochs", "batch", "lr", "seed")}
    for option in overrides:
        field, has_value, value = option.partition("=")
        name = field.removeprefix("--config.finetune.")
        names |= {name: value} if has_value and name in SPLIT else {}
    for name, value in names.items():
        if "," in str(value):
            raise UserError(f"{name} {value!r} has a comma, which config arguments cannot have")
    arg = ",".join(f"{name}={value}" for name, value in names.items() if value is not None)
    config = config_file.from_option(f"finetune:{arg}", overrides)
    if options.grid:
        return search(config, parse_grid(options.grid), Path(options.out))
    return train(RunConfig.from_config_dict(config), options.out)


def parse_grid(words: list[str]) -> list[dict[str, float]]:
    """Return every setting of a grid such as `lr=1e-4,3e-4 weight_decay=0`, by name."""
    axes: dict[str, list[float]] = {}
    for word in words:
        name, _, values = word.partition("=")
        try:
            axes.setdefault(FIELDS[name], []).extend(map(float, values.split(",")))
        except (KeyError, ValueError):
            raise UserError(
                f"--grid {word!r} is not NAME=VALUE,VALUE with a name of {', '.join(FIELDS)}"
            ) from None
    return [dict(zip(axes, values, strict=True)) for values in itertools.product(*axes.values())]


def search(config: ConfigDict, grid: list[dict[str, float]], out: Path) -> int:
    """Train every setting of `grid`, and make the one that validates best the run `out`.

    Started again, it goes on where it was stopped. Returns the exit status.
    """
    if initialize_arguments() is not None:
        raise UserError("--grid runs in one process; start its settings one by one on a cluster")
    names = {_name(setting): setting for setting in grid}
    if not (out / FILE).exists():
        if (out / CONFIG).exists() or (out / DESCRIPTION).exists():
            raise UserError(f"{out} holds a run or a model and no grid; choose another --out")
        for name, setting in names.items():
            console.print(f"grid       {name}")
            trial = _config(config, setting, test=False)
            status = train(trial, str(out / FOLDER / name))
            if status in (EXIT_SAVED, EXIT_INTERRUPTED):
                return status
        assert trial.finetune is not None
        metric, maximize = best_metric(TASKS[trial.finetune.task][1], trial.finetune.metric)
        sign = 1 if maximize else -1
        values = {name: _best(out / FOLDER / name, metric) for name in names}
        scores = {name: sign * x for name, x in values.items() if x is not None}
        if not scores:
            raise UserError(f"no setting of the grid has a {metric}; try smaller learning rates")
        winner = max(scores, key=lambda name: scores[name])
        record = {"metric": metric, "validation": values, "chosen": winner}
        with files.writing(out / FILE):
            files.write_atomically(out / FILE, json.dumps(record, indent=1))
    record = json.loads((out / FILE).read_text(encoding="utf-8"))
    if record["validation"].keys() != names.keys():
        raise UserError(f"{out / FILE} is of another grid; choose another --out")
    _print(record)
    _move(out / FOLDER / record["chosen"], out)
    return train(_config(config, names[record["chosen"]], test=True), str(out))


def _name(setting: dict[str, float]) -> str:
    short = {field: name for name, field in FIELDS.items()}
    texts = ((short[field], repr(value).removesuffix(".0")) for field, value in setting.items())
    return "_".join(f"{name}={text}" for name, text in texts)


def _config(config: ConfigDict, setting: dict[str, float], test: bool) -> RunConfig:
    options = [f"--config.{field}={value!r}" for field, value in setting.items()]
    if not test:
        options.append("--config.finetune.test=False")
    return RunConfig.from_config_dict(
        config_file.override(config.copy_and_resolve_references(), options)
    )


def _best(run: Path, metric: str) -> float | None:
    steps = step_folder.steps(run, BEST)
    if not steps:
        return None
    value = step_folder.read_metadata(run, steps[-1], BEST)[metric]
    return value if math.isfinite(value) else None


def _print(record: dict[str, Any]) -> None:
    table = numbers_table("Validation", "setting", record["metric"])
    for name, value in record["validation"].items():
        style = "bold" if name == record["chosen"] else ""
        table.add_row(
            name, plus_minus(math.nan if value is None else value, math.nan, 4), style=style
        )
    console.print(table)


def _move(trial: Path, out: Path) -> None:
    """Moves what a run consists of; what has been moved before a kill is not there any more."""
    for entry in sorted(trial.iterdir()) if trial.exists() else ():
        if entry.name != LOCK and not os.path.lexists(out / entry.name):
            shutil.move(entry, out / entry.name)
