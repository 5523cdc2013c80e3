"""Masked language modelling: predict residues that are hidden or replaced in the input."""

from __future__ import annotations

import dataclasses
import math
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from esm1nv_jax.data.tokenizer import vocabulary
from esm1nv_jax.model import encoder, esm2, masking
from esm1nv_jax.model.dropout import DropoutKey
from esm1nv_jax.model.masking import Masked
from esm1nv_jax.training.objectives import ROW_DTYPES


@dataclasses.dataclass(frozen=True)
class MaskedLM:
    """Cross-entropy of the masked residues; an `Objective`.

    masking: the recipe.
    horizon: steps in which a rate of masking that changes gets to its end; validation is there.
    """

    masking: masking.MaskingConfig
    horizon: int = 1

    best_metric: ClassVar[str] = "loss_mask"
    maximize: ClassVar[bool] = False
    batch_dtypes: ClassVar[dict[str, Any]] = ROW_DTYPES | {"mask_bits": jnp.uint32}

    def init(self, model: encoder.EncoderConfig, seed) -> dict:
        """Return fresh parameters of the encoder."""
        return encoder.init(model, seed)

    def batch_shape(self, name: str, rows: int, row_length: int) -> tuple[int, ...]:
        return rows, row_length

    def targets(self, model: encoder.EncoderConfig, batch: dict) -> Masked:
        """Return the corrupted input and the residues to predict."""
        tokens_BT = esm2.map_missing_to_unk(model.vocabulary, batch["tokens"])
        progress = None
        if self.masking.final_rate and "step" in batch:
            progress = jnp.minimum(batch["step"] / self.horizon, 1.0)
        bits = batch["mask_bits"]
        return masking.mask(self.masking, tokens_BT, batch["segment_ids"], bits, progress)

    def loss_sums(
        self,
        model: encoder.EncoderConfig,
        compute: encoder.ComputeConfig,
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

    def head_flops(self, model: encoder.EncoderConfig) -> float:
        hidden = 0 if model.bare_head else model.width
        return 2.0 * model.width * (hidden + vocabulary(model.vocabulary).size)

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
    return math.exp(nats) if nats < 700 else math.inf
