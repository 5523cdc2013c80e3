"""What the Python API returns: embeddings, predictions at `<mask>`, predictions of a head."""

from __future__ import annotations

import dataclasses

import numpy as np

from esm1nv_jax.common.errors import UserError
from esm1nv_jax.model.heads import HeadConfig


@dataclasses.dataclass(frozen=True)
class Embeddings:
    """Of n sequences: `per_residue[i]` float32 [residues of sequence i, width], row j is residue j;
    `mean` float32 [n, width], over residues only; `cls` float32 [n, width], the state of `<s>`."""

    per_residue: list[np.ndarray]
    mean: np.ndarray
    cls: np.ndarray


@dataclasses.dataclass(frozen=True)
class Prediction:
    """One `<mask>`: its position (1-based) and residues with their probabilities, best first."""

    position: int
    residues: list[tuple[str, float]]


@dataclasses.dataclass(frozen=True)
class HeadPredictions:
    """What the head of a fine-tuned model predicts for n sequences.

    values: float32; `values[i]` is [residues of sequence i, K] of a head on residues, [K] of one on
      proteins. Probabilities in the order of `head.classes`, which add up to 1 in "classification"
      and are independent in "multilabel"; in "regression" K = 1, and it is the value itself.
    """

    head: HeadConfig
    values: list[np.ndarray]

    @property
    def labels(self) -> list[list[str]]:
        """Of each sequence the likeliest class of every residue, or of the protein."""
        if self.head.kind != "classification":
            raise UserError(f"a head for {self.head.kind} has no likeliest class; take .values")
        best = [np.atleast_2d(value).argmax(axis=1) for value in self.values]
        return [[self.head.classes[k] for k in classes] for classes in best]
