"""What a run learns and from what: its objective, sources, and the parameters it starts from."""

from __future__ import annotations

import dataclasses
import os
from typing import Any

import jax
import numpy as np

from esm1nv_jax.checkpoints import model_folder, step_folder
from esm1nv_jax.checkpoints.model_folder import Weights
from esm1nv_jax.common.errors import UserError
from esm1nv_jax.data import labeled_data
from esm1nv_jax.data.labeled_data import Task
from esm1nv_jax.data.packing import TrainingWindows, stream_config
from esm1nv_jax.data.source import Source, open_split, subset
from esm1nv_jax.interchange.loader import load_weights
from esm1nv_jax.model.heads import HeadConfig
from esm1nv_jax.model.masking import max_targets
from esm1nv_jax.training.label_prediction import LabelPrediction, balanced_weights, standard_scale
from esm1nv_jax.training.objective import MaskedLM, Objective
from esm1nv_jax.training.run_config import RunConfig
from esm1nv_jax.training.tuning import Tuning


@dataclasses.dataclass(frozen=True)
class RunData:
    """What a run is about, beside its config.

    train, validation: the sources; of fine-tuning also the `task` that holds them, and `test`, if
      it is to be evaluated.
    objective: what is learned from them.
    tuning: which parameters are trained; None: all.
    initial: the parameters to start from, on the host; None: random ones.
    metadata: what checkpoints hold beside the config: of a fine-tuned run, its base and its head.
    """

    train: Source
    validation: Source
    objective: Objective
    test: Source | None = None
    task: Task | None = None
    tuning: Tuning | None = None
    initial: dict | None = None
    metadata: dict[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def fingerprints(self) -> dict[str, str]:
        """The fingerprint of each source, by split."""
        sources = {"train": self.train, "validation": self.validation, "test": self.test}
        return {name: x.fingerprint for name, x in sources.items() if x is not None}


def open_data(config: RunConfig, workdir: str = "") -> RunData:
    """Return what a run is about: one of pretraining that has checkpoints in `workdir` needs no
    other parameters. Raises UserError where data or model do not fit the config."""
    if config.finetune is not None:
        return _open_labeled(config)
    if not config.data.path:
        raise UserError(
            "config.data.path is empty: make a data set with `esm1nv prepare --fasta "
            "uniref50.fasta.gz --out DIR` and add --config.data.path=DIR, or try "
            "--config.data.path=sample"
        )
    validation = open_split(config.data.path, "validation")
    train = open_split(config.data.path, "train")
    TrainingWindows(train, stream_config(config, rows=1))  # raises UserError
    initial = None
    resumes = config.init_from and workdir and step_folder.steps(os.path.expanduser(workdir))
    if config.init_from and not resumes:  # a head is no part of masked language modelling
        initial = _load_base(config).encoder_params
    objective = masked_lm(config, train, validation)
    validation = subset(validation, config.evaluation.sequences)
    return RunData(train, validation, objective, initial=initial)


def masked_lm(config: RunConfig, *sources: Source) -> MaskedLM:
    """Return the objective of masked language modelling on rows of these sources."""
    masking, stream = config.masking.config(), stream_config(config, rows=1)
    most = max(max_targets(masking.highest_rate, stream, source.lengths) for source in sources)
    return MaskedLM(masking, config.optimizer.horizon, most)


def _load_base(config: RunConfig) -> Weights:
    weights = load_weights(config.init_from)
    model_folder.check(weights.encoder_params, config.model, f"init_from={config.init_from}")
    return weights


def _open_labeled(config: RunConfig) -> RunData:
    finetune, path = config.finetune, config.data.path
    assert finetune is not None
    if not path:
        raise UserError("config.data.path is empty: name the CSV file with the labels")
    task = labeled_data.read(path, finetune.task, fractions=finetune.fractions)
    labeled_data.check_classes(path, task)
    objective = objective_of(config, task)
    if task.kind == "regression":
        labeled_data.check_values(path, task, objective.best_metric == "spearman")
    validation = subset(task.source("valid"), config.evaluation.sequences)
    metadata: dict[str, Any] = {
        "head": dataclasses.asdict(objective.head),
        "label_scale": [objective.label_mean, objective.label_std],
        "lora": dataclasses.asdict(objective.lora) if objective.lora else None,
        "base": None,
    }
    train, test = task.source("train"), task.source("test") if finetune.test else None
    data = RunData(train, validation, objective, test, task, metadata=metadata)
    if not config.init_from:  # all parameters are trained, so that a checkpoint is a whole model
        metadata |= model_folder.NO_LM_HEAD  # labels train none
        return data
    weights = _load_base(config)
    if not weights.has_lm_head:
        metadata |= model_folder.NO_LM_HEAD
    params = weights.encoder_params
    metadata["base"] = {"path": _exact_path(weights, config), "digest": model_folder.digest(params)}
    initial = params | objective.init_added(config.model, config.seed)
    if weights.head is not None:
        mean, std = objective.label_mean, objective.label_std
        head = _head_params(config.init_from, weights, weights.head, objective.head)
        initial["head"] = model_folder.scale_head(head, -mean / std, 1 / std)
    return dataclasses.replace(
        data, tuning=finetune.tuning, initial=jax.tree.map(np.asarray, initial), metadata=metadata
    )


def objective_of(config: RunConfig, task: Task) -> LabelPrediction:
    """Return the objective that predicts the labels of `task`."""
    finetune = config.finetune
    assert finetune is not None
    labels = task.train.labels[task.train.used]
    scale: tuple[float, float] = (0.0, 1.0)
    weights: tuple[float, ...] = ()
    if task.kind == "regression":
        scale = standard_scale(labels)
    elif finetune.class_weights:
        several = labels.ndim == 2
        counts = labels.sum(axis=0) if several else np.bincount(labels, minlength=len(task.classes))
        weights = balanced_weights(counts)
    return LabelPrediction(
        HeadConfig(task.level, task.kind, task.classes, finetune.pooling),
        stream_config(config, rows=1).max_segments,
        weights,
        *scale,
        lora=finetune.tuning.lora,
        metric=finetune.metric,
    )


def _head_params(path: str, weights: Weights, there: HeadConfig, here: HeadConfig) -> dict:
    """Return the parameters of the model's head, with outputs in the order of `here`, the head of a
    table, whose classes are sorted. Raises UserError where it is a head for other labels."""
    alike = dataclasses.replace(there, classes=tuple(sorted(there.classes)), pooling=here.pooling)
    same_pooling = here.level == "residue" or there.pooling == here.pooling
    if alike == here and same_pooling:
        order = [there.classes.index(name) for name in here.classes] or [0]
        params = weights.params["head"]
        last = {name: np.asarray(leaf)[..., order] for name, leaf in params["out_proj"].items()}
        return params | {"out_proj": last}
    describe = "{0.level} {0.kind}, pooling {0.pooling}, classes {1}".format
    listed = [describe(head, ", ".join(head.classes) or "none") for head in (there, here)]
    pooling = f"set finetune.pooling={there.pooling}, or " if alike == here else ""
    raise UserError(
        f"init_from={path} has a head for {listed[0]}; the table needs one for {listed[1]}; "
        f"{pooling}begin from the model that it was fine-tuned from"
    )


def _exact_path(weights: Weights, config: RunConfig) -> str:
    """The path of the base that goes on to name the same parameters, where a run trains on."""
    run, steps = weights.provenance.get("run"), weights.provenance.get("steps", [])
    path = os.path.abspath(os.path.expanduser(config.init_from))
    if not os.path.exists(os.path.join(path, model_folder.DESCRIPTION)) and run and len(steps) == 1:
        for folder in ("checkpoints", "best"):
            if os.path.isdir(exact := os.path.join(os.path.abspath(run), folder, str(steps[0]))):
                return exact
    return config.init_from if "://" in config.init_from else path
