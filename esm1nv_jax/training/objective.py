"""What a run learns. The loop, the step and the monitor know it by the interface `Objective` alone;
masked language modelling is one, `label_prediction` another."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, ClassVar, Protocol

import jax
import jax.numpy as jnp

from esm1nv_jax.data.tokenizer import vocabulary
from esm1nv_jax.model import encoder, esm2, masking
from esm1nv_jax.model.dropout import DropoutKey
from esm1nv_jax.model.encoder_config import ComputeConfig, EncoderConfig
from esm1nv_jax.model.masking import Masked

# The arrays of a batch that say what stands where, all [B, T]; every objective reads them.
ROW_DTYPES = {"tokens": jnp.int32, "segment_ids": jnp.int32, "positions": jnp.int32}


class Objective(Protocol):
    """A frozen value, so that it is a static argument of the jitted step.

    best_metric: the metric of validation that chooses the best checkpoint.
    maximize: whether a higher one is better.
    batch_dtypes: the arrays of a batch that it reads, by name.
    reads_all: whether it reads the encoder's output at all tokens, not only at its targets.
    """

    @property
    def best_metric(self) -> str: ...

    @property
    def maximize(self) -> bool: ...

    @property
    def batch_dtypes(self) -> Mapping[str, Any]: ...

    @property
    def reads_all(self) -> bool: ...

    def batch_shape(self, name: str, rows: int, row_length: int) -> tuple[int, ...]:
        """Return the shape of an array of a batch, rows first."""

    def init(self, model: EncoderConfig, seed) -> dict:
        """Return fresh parameters of all that the loss reads."""

    def loss_sums(
        self,
        model: EncoderConfig,
        compute: ComputeConfig,
        params: dict,
        batch: dict,
        dropout_key: DropoutKey | None,
    ) -> tuple[dict[str, jax.Array], dict[str, jax.Array]]:
        """Return sums over some rows, and the outputs that validation needs beside them.

        In training the batch also has the number of the `step`, a scalar.
        The sums are fp32 scalars that add up over rows, devices and hosts; `loss` is what is
        minimised, over `num_targets`. The outputs are arrays by row, of which training makes none.
        """

    def num_targets(self, sums: dict) -> Any:
        """Return what `loss` is divided by."""

    def head_flops(self, model: EncoderConfig) -> float:
        """Return the FLOPs of the products of one prediction, forward."""

    def used_outputs(self, outputs: dict[str, Any]) -> dict[str, Any]:
        """Return what metrics need of the outputs of a batch: rows have many empty places."""

    def metrics(self, sums: dict[str, float], outputs: dict[str, Any] | None = None) -> dict:
        """Return metrics from sums, and of validation from used outputs, over any number of
        batches."""

    def progress_note(self, metrics: dict[str, float]) -> str:
        """Return what the progress bar shows of the metrics of training."""


@dataclasses.dataclass(frozen=True)
class MaskedLM:
    """Cross-entropy of the masked residues; an `Objective`.

    masking: the recipe.
    horizon: steps in which a rate of masking that changes gets to its end; validation is there.
    most: a bound on the targets of a row, where the lengths of its sequences are known.
    """

    masking: masking.MaskingConfig
    horizon: int = 1
    most: int | None = None

    best_metric: ClassVar[str] = "loss_mask"
    maximize: ClassVar[bool] = False
    reads_all: ClassVar[bool] = False
    batch_dtypes: ClassVar[dict[str, Any]] = ROW_DTYPES | {"mask_bits": jnp.uint32}

    def init(self, model: EncoderConfig, seed) -> dict:
        """Return fresh parameters of the encoder."""
        return encoder.init(model, seed)

    def batch_shape(self, name: str, rows: int, row_length: int) -> tuple[int, ...]:
        return rows, row_length

    def targets(self, model: EncoderConfig, batch: dict) -> Masked:
        """Return the corrupted input and the residues to predict."""
        tokens_BT = esm2.map_missing_to_unk(model.vocabulary, batch["tokens"])
        progress = None
        if self.masking.final_rate and "step" in batch:
            progress = jnp.minimum(batch["step"] / self.horizon, 1.0)
        bits = batch["mask_bits"]
        ids = batch["segment_ids"]
        return masking.mask(self.masking, tokens_BT, ids, bits, progress, self.most)

    def loss_sums(
        self,
        model: EncoderConfig,
        compute: ComputeConfig,
        params: dict,
        batch: dict,
        dropout_key: DropoutKey | None,
    ) -> tuple[dict[str, jax.Array], dict[str, jax.Array]]:
        """Return sums over some rows, fp32 scalars that add up over rows, devices and hosts; and no
        outputs.

        `loss` is in nats, over `num_targets` targets; `loss_mask`, `num_masked` and
        `num_correct_masked` are over targets at `<mask>` positions only.
        """
        masked = self.targets(model, batch)
        output = encoder.forward(
            model,
            params,
            masked.inputs_BT,
            batch["segment_ids"],
            batch["positions"],
            compute=compute,
            dropout_key=dropout_key,
            prediction_positions_BM=masked.prediction_positions_BM,
        )
        return masking.cross_entropy_sums(output.logits, masked), {}

    def num_targets(self, sums: dict):
        """Return what `loss` is divided by: the number of predictions."""
        return sums["num_targets"]

    def head_flops(self, model: EncoderConfig) -> float:
        hidden = 0 if model.bare_head else model.width
        return 2.0 * model.width * (hidden + vocabulary(model.vocabulary).size)

    def used_outputs(self, outputs: dict[str, Any]) -> dict[str, Any]:
        return outputs

    def metrics(
        self, sums: dict[str, float], outputs: dict[str, Any] | None = None
    ) -> dict[str, float]:
        """Return metrics from sums over any number of batches.

        Perplexity is exp of the token-weighted mean cross-entropy: over all selected positions,
        and over `<mask>` positions only (`_mask`), which alone is compared with baselines.
        """
        mean_loss = sums["loss"] / max(sums["num_targets"], 1)
        mean_loss_mask = sums["loss_mask"] / max(sums["num_masked"], 1)
        return {
            "loss": mean_loss,
            "perplexity": _exp(mean_loss),
            "loss_mask": mean_loss_mask,
            "perplexity_mask": _exp(mean_loss_mask),
            "accuracy_mask": sums["num_correct_masked"] / max(sums["num_masked"], 1),
        }

    def progress_note(self, metrics: dict[str, float]) -> str:
        return (
            f"loss {metrics['loss']:.3f}  perplexity {metrics['perplexity']:.2f} "
            f"(<mask> {metrics['perplexity_mask']:.2f})"
        )


def _exp(nats: float) -> float:
    return math.inf if nats >= 700 else math.exp(nats)
