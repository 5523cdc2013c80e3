"""What a run learns. The loop, the step and the monitor know an objective by `Objective` alone."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

import jax
import jax.numpy as jnp

from esm1nv_jax.model.dropout import DropoutKey
from esm1nv_jax.model.encoder_config import ComputeConfig, EncoderConfig

# The arrays of a batch that say what stands where, all [B, T]; every objective reads them.
ROW_DTYPES = {"tokens": jnp.int32, "segment_ids": jnp.int32, "positions": jnp.int32}


class Objective(Protocol):
    """A frozen value, so that it is a static argument of the jitted step.

    best_metric: the metric of validation that chooses the best checkpoint.
    maximize: whether a higher one is better.
    batch_dtypes: the arrays of a batch that it reads, by name.
    """

    @property
    def best_metric(self) -> str: ...

    @property
    def maximize(self) -> bool: ...

    @property
    def batch_dtypes(self) -> Mapping[str, Any]: ...

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

    def metrics(self, sums: dict[str, float], outputs: dict[str, Any] | None = None) -> dict:
        """Return metrics from sums, and of validation from outputs, over any number of batches."""

    def progress_note(self, metrics: dict[str, float]) -> str:
        """Return what the progress bar shows of the metrics of training."""
