"""Runs as they are on disk: configs, data, validation and test; which of them can be compared."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
from pathlib import Path
from typing import Any

from esm1nv_jax.common import metrics_log
from esm1nv_jax.common.errors import UserError
from esm1nv_jax.data.labeled_data import TASKS
from esm1nv_jax.training import evaluation, summary
from esm1nv_jax.training.label_prediction import best_metric
from esm1nv_jax.training.run_config import changes_learning, flat_with_defaults
from esm1nv_jax.training.workdir import CONFIG, DATA

METRIC = "perplexity_mask"  # the one metric in which recipes of pretraining can be compared
# Fields that say which residues validation asks for: under different ones, perplexities are answers
# to different questions.
QUESTION = ("masking.", "evaluation.", "data.max_residues", "data.fingerprint.validation")


@dataclasses.dataclass(frozen=True)
class Run:
    """A run as it is on disk: `fields` of its config and data, `validation` lines by step, the
    content of `test.json`, if it was fine-tuned and tested, and the perplexities of `baselines` on
    what it validates on, if it was pretrained to its end; and its lines of `training`."""

    name: str
    fields: dict[str, Any]
    validation: list[dict[str, float]]
    test: dict[str, Any] = dataclasses.field(default_factory=dict)
    baselines: dict[str, float] = dataclasses.field(default_factory=dict)
    training: list[dict[str, float]] = dataclasses.field(default_factory=list)

    @property
    def is_finetuned(self) -> bool:
        return "finetune.task" in self.fields

    @property
    def metric(self) -> tuple[str, bool]:
        """The metric of validation to compare by, and whether a higher one is better."""
        if not self.is_finetuned:
            return METRIC, False
        task, metric = self.fields["finetune.task"], self.fields["finetune.metric"]
        return best_metric(TASKS[task][1], metric)

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
        """Every field that changes what validation asks for."""
        if self.is_finetuned:
            names = ["finetune.task", "data.fingerprint.validation"]
            if TASKS[self.fields["finetune.task"]][0] == "residue":  # those beyond are not scored
                names.append("data.max_residues")
            asked = tuple((name, self.fields.get(name)) for name in names)
            return (("metric", self.metric[0]), *asked)
        fields = {name: value for name, value in self.recipe if name.startswith(QUESTION)}
        # Validation masks at the last rate, however training comes there.
        fields["masking.rate"] = fields.pop("masking.final_rate", 0) or fields.get("masking.rate")
        return tuple(fields.items())

    def at(self, step: float) -> float:
        """Return the validation metric after `step` steps; NaN where there is no finite one."""
        values = (x.get(self.metric[0]) for x in self.validation if x["step"] == step)
        return next((x for x in values if x is not None and math.isfinite(x)), math.nan)

    def best(self) -> float:
        """Return the best validation metric after any step; NaN where there is none."""
        values = [self.at(x["step"]) for x in self.validation if x["step"]]
        choose = max if self.metric[1] else min
        return choose((x for x in values if not math.isnan(x)), default=math.nan)


def read(paths: list[str]) -> list[Run]:
    """Read runs. Raises UserError for a folder that is no run, or has not validated yet."""
    runs = []
    for path, name in zip(paths, _short_names(paths), strict=True):
        folder = Path(path)
        try:
            fields = flat_with_defaults(json.loads((folder / CONFIG).read_text("utf-8")))
            fingerprints = _read_if_there(folder / DATA)
            fingerprints.pop("test", None)  # test.json says what was tested
            fields |= {f"data.fingerprint.{split}": x for split, x in fingerprints.items()}
            lines = metrics_log.read(folder)
            test = _read_if_there(folder / evaluation.FILE)
            baselines = _read_if_there(folder / summary.BASELINES)
            validation = [line for line in lines if line["kind"] == "validation"]
            training = [line for line in lines if line["kind"] == "train"]
            run = Run(name, fields, validation, test, baselines, training)
            is_validated = bool(validation) and not (
                run.is_finetuned and math.isnan(run.best())  # raises KeyError
            )
        except OSError as error:
            raise UserError(
                f"{path} is not a run: {Path(error.filename).name} cannot be read "
                f"({error.strerror}); give the --workdir of a training run"
            ) from None
        except (ValueError, AttributeError, KeyError) as error:
            listed = f"{CONFIG}, {DATA} or {evaluation.FILE}"
            raise UserError(f"{path}: {listed} cannot be read ({error})") from None
        if not is_validated:
            raise UserError(f"{path} has no validation metrics yet; let it run on, or leave it out")
        runs.append(run)
    check_comparable(runs)
    return runs


def shared_steps(runs: list[Run]) -> list[int]:
    """Return the steps after which all of `runs` validated, ascending."""
    return sorted(set.intersection(*({int(x["step"]) for x in run.validation} for run in runs)))


def check_comparable(runs: list[Run]) -> None:
    """Raise UserError where fine-tuned runs have another task, metric, validation or test set, or
    where some are not fine-tuned."""
    for a, b in itertools.combinations(runs, 2):
        if a.is_finetuned != b.is_finetuned:
            task, other = (run.fields.get("finetune.task", "pretraining") for run in (a, b))
            differing = [f"one is of {task}, the other of {other}"]
        elif not a.is_finetuned:
            continue
        else:
            there, here = dict(a.question), dict(b.question)
            if a.test and b.test:
                sets = (run.test.get("test_set") for run in (a, b))
                there["test_set"], here["test_set"] = sets
            differing = [
                f"{name} is {there.get(name)} in the first, {here.get(name)} in the second"
                for name in there | here
                if there.get(name) != here.get(name)
            ]
        if differing:
            raise UserError(
                f"{a.name} and {b.name} cannot be compared: {'; '.join(differing)}; name runs of "
                "one task, metric, validation and test set"
            )


def _read_if_there(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


def _short_names(paths: list[str]) -> list[str]:
    """Return the last parts of the paths, as many as tell them apart."""
    parts = [Path(path).absolute().parts for path in paths]
    for n in range(1, max(map(len, parts)) + 1):
        names = ["/".join(p[-n:]) for p in parts]
        if len(set(names)) == len(names):
            return names
    return paths
