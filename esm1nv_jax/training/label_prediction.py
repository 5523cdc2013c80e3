"""Supervised fine-tuning: predict the labels of residues or of proteins."""

from __future__ import annotations

import dataclasses
import math
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import optax

from esm1nv_jax.common.errors import UserError
from esm1nv_jax.common.html import plus_minus
from esm1nv_jax.model import encoder, heads, label_metrics, lora
from esm1nv_jax.model.dropout import DropoutKey
from esm1nv_jax.model.encoder_config import ComputeConfig, EncoderConfig
from esm1nv_jax.model.heads import HeadConfig
from esm1nv_jax.model.lora import LoraConfig
from esm1nv_jax.training.objective import ROW_DTYPES

# The metric that chooses the best checkpoint, where the config names none.
DEFAULT_METRIC = {"classification": "accuracy", "multilabel": "macro_f1", "regression": "spearman"}
METRICS = {
    "classification": ("loss", "accuracy", "macro_f1", "mcc"),
    "multilabel": ("loss", "accuracy", "macro_f1", "mcc"),
    "regression": ("loss", "spearman", "mse"),
}


@dataclasses.dataclass(frozen=True)
class LabelPrediction:
    """The loss of a head on the encoder's last hidden state; an `Objective`.

    Cross-entropy of a class, the mean over classes of the binary cross-entropies of several, or the
    squared error of (label - label_mean) / label_std. Means are over the labelled residues or
    proteins of all devices; those of a class count `class_weights` times.

    max_segments: the most proteins that a row can hold.
    """

    head: HeadConfig
    max_segments: int
    class_weights: tuple[float, ...] = ()
    label_mean: float = 0.0
    label_std: float = 1.0
    lora: LoraConfig | None = None
    metric: str = "auto"

    reads_all: ClassVar[bool] = True  # a head at labels alone, but pooling reads all residues

    def __post_init__(self):
        allowed = ("auto", *METRICS[self.head.kind])
        if self.metric not in allowed:
            raise UserError(
                f"finetune.metric={self.metric!r} is unknown for {self.head.kind}; there are "
                f"{', '.join(allowed)}"
            )

    @property
    def best_metric(self) -> str:
        return best_metric(self.head.kind, self.metric)[0]

    @property
    def maximize(self) -> bool:
        return best_metric(self.head.kind, self.metric)[1]

    @property
    def batch_dtypes(self) -> dict[str, Any]:
        dtype = jnp.float32 if self.head.kind == "regression" else jnp.int32
        return ROW_DTYPES | {"label_examples": jnp.int32, "labels": dtype}

    def batch_shape(self, name: str, rows: int, row_length: int) -> tuple[int, ...]:
        if name not in ("labels", "label_examples") or self.head.level == "residue":
            return rows, row_length
        several = name == "labels" and self.head.kind == "multilabel"
        return (rows, self.max_segments, *((self.head.outputs,) if several else ()))

    def init(self, model: EncoderConfig, seed) -> dict:
        """Return fresh parameters of the encoder, the `head`, and of `lora` if there is any."""
        return encoder.init(model, seed) | self.init_added(model, seed)

    def init_added(self, model: EncoderConfig, seed) -> dict:
        """Return fresh parameters of what fine-tuning adds to an encoder."""
        added = {"head": heads.init(self.head, model.width, seed)}
        return added | ({"lora": lora.init(model, self.lora, seed)} if self.lora else {})

    def loss_sums(
        self,
        model: EncoderConfig,
        compute: ComputeConfig,
        params: dict,
        batch: dict,
        dropout_key: DropoutKey | None,
    ) -> tuple[dict[str, jax.Array], dict[str, jax.Array]]:
        """Return sums over labels, `num_labels` of them with the weight `num_targets`; and logits,
        or values in units of the label, beside labels and the examples they belong to."""
        hidden = encoder.forward(
            model,
            {name: value for name, value in params.items() if name not in ("head", "lora")},
            batch["tokens"],
            batch["segment_ids"],
            batch["positions"],
            compute=compute,
            dropout_key=dropout_key,
            hidden_layers=(-1,),
            lora=(self.lora, params["lora"]) if self.lora else None,
        ).hidden[-1]
        place = batch["segment_ids"], batch["positions"]
        logits = heads.logits(self.head, params["head"], hidden, *place, self.max_segments)
        labels = batch["labels"]
        if self.head.kind == "regression":
            used = ~jnp.isnan(labels)
            target = (jnp.where(used, labels, 0.0) - self.label_mean) / self.label_std
            losses, weight = jnp.square(logits[..., 0] - target), used.astype(jnp.float32)
            predicted = logits * self.label_std + self.label_mean
            correct = jnp.zeros_like(losses)
        else:
            target, predicted = jnp.maximum(labels, 0), logits
            class_weights = jnp.asarray(self.class_weights or (1.0,) * self.head.outputs)
            if self.head.kind == "multilabel":
                used = labels[..., 0] >= 0
                losses = optax.sigmoid_binary_cross_entropy(logits, target.astype(jnp.float32))
                losses = jnp.mean(losses * jnp.where(target, class_weights, 1.0), axis=-1)
                weight = used.astype(jnp.float32)
                correct = jnp.mean((logits > 0) == (target > 0), axis=-1)
            else:
                used = labels >= 0
                losses = optax.softmax_cross_entropy_with_integer_labels(logits, target)
                weight = jnp.where(used, class_weights[target], 0.0)
                correct = jnp.argmax(logits, axis=-1) == target
        sums = {
            "loss": jnp.sum(jnp.where(used, losses * weight, 0.0)),
            "num_targets": jnp.sum(weight),
            "num_labels": jnp.sum(used, dtype=jnp.float32),
            "num_correct": jnp.sum(jnp.where(used, correct, 0.0), dtype=jnp.float32),
        }
        outputs = {"predicted": predicted, "labels": labels, "examples": batch["label_examples"]}
        return sums, outputs

    def num_targets(self, sums: dict):
        """Return what `loss` is divided by; a batch may hold no label at all."""
        return jnp.maximum(sums["num_targets"], 1e-6)

    def head_flops(self, model: EncoderConfig) -> float:
        params = jax.tree.leaves(heads.abstract(self.head, model.width))
        return 2.0 * sum(leaf.size for leaf in params if leaf.ndim == 2)

    def metrics(
        self, sums: dict[str, float], outputs: dict[str, Any] | None = None
    ) -> dict[str, float]:
        """Return the loss, and accuracy or mse of training; of validation all of `METRICS`."""
        loss = sums["loss"] / max(sums["num_targets"], 1e-6)
        if outputs is not None:
            labels, predicted, _ = self.used_labels(outputs)
            return {"loss": loss} | label_metrics.score(self.head.kind, labels, predicted)
        if self.head.kind == "regression":
            return {"loss": loss, "mse": loss * self.label_std**2}
        return {"loss": loss, "accuracy": sums["num_correct"] / max(sums["num_labels"], 1)}

    def used_outputs(self, outputs: dict[str, Any]) -> dict[str, Any]:
        return dict(
            zip(("labels", "predicted", "examples"), self.used_labels(outputs), strict=True)
        )

    def used_labels(self, outputs: dict[str, Any]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return (labels, predictions, examples) of the n labels of an evaluation, or of one of its
        batches, that are used."""
        labels, predicted, examples = (outputs[n] for n in ("labels", "predicted", "examples"))
        if self.head.kind == "regression":
            used = ~np.isnan(labels)
        else:
            used = (labels[..., 0] if self.head.kind == "multilabel" else labels) >= 0
        return labels[used], predicted[used], examples[used]

    def progress_note(self, metrics: dict[str, float]) -> str:
        name = "mse" if self.head.kind == "regression" else "accuracy"
        shown = plus_minus(metrics[name], math.nan, 3)
        return f"loss {metrics['loss']:.3f}  {name} {shown}"


def best_metric(kind: str, metric: str) -> tuple[str, bool]:
    """Return the metric of validation that chooses the best checkpoint of a config's
    `finetune.metric`, and whether a higher one is better."""
    name = DEFAULT_METRIC[kind] if metric == "auto" else metric
    return name, name not in label_metrics.LOWER_IS_BETTER


def balanced_weights(counts: np.ndarray) -> tuple[float, ...]:
    """Return a weight of each class, the mean number of examples over its own."""
    return tuple((counts.sum() / (len(counts) * np.maximum(counts, 1))).tolist())


def standard_scale(values: np.ndarray) -> tuple[float, float]:
    """Return mean and standard deviation of labels; the latter 1 where all are equal."""
    std = float(values.std())
    return float(values.mean()), std if std and math.isfinite(std) else 1.0
