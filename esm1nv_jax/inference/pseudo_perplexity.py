"""Pseudo-perplexity: each residue predicted with only itself hidden. One pass a residue.

exp(-mean log p(x_i | x without i)) over the residues of a protein (Salazar et al., "Masked language
model scoring", 2020). For small sets: a protein of L residues costs L forward passes.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from esm1nv_jax.data import tokenizer
from esm1nv_jax.data.vocabulary import vocabulary
from esm1nv_jax.inference.grouped_mean import Tally
from esm1nv_jax.inference.model import Model
from esm1nv_jax.inference.perplexity import predict


@dataclasses.dataclass(frozen=True)
class PseudoPerplexity:
    """Of n proteins, in their order: residues that were predicted (int [n]) and the sums of their
    -log p in nats (float64 [n])."""

    residues: np.ndarray
    nats: np.ndarray

    @property
    def each(self) -> np.ndarray:
        """Pseudo-perplexity of every protein: float64 [n], NaN where no residue is known."""
        n = np.where(self.residues, self.residues, 1)
        return np.where(self.residues, np.exp(self.nats / n), np.nan)

    def figures(self, ids: Sequence[str]) -> dict[str, Any]:
        """Median over proteins, and exp of the mean over all residues with its error by protein."""
        tally = Tally.empty(1)
        tally.add(np.zeros(len(self.residues), np.int64), self.residues, self.nats)
        weighted, error = tally.perplexity()
        known = self.each[self.residues > 0]
        return {
            "median": float(np.median(known)) if len(known) else math.nan,
            "token_weighted": weighted,
            "token_weighted_se": error,
            "sequences": [
                {"id": name, "residues": int(n), "pseudo_perplexity": float(value)}
                for name, n, value in zip(ids, self.residues, self.each, strict=True)
            ],
        }


def pseudo_perplexity(
    model: Model,
    sequences: Sequence[bytes],
    max_residues: int,
    tell: Callable[[int], None] = lambda passes: None,
) -> PseudoPerplexity:
    """Of cleaned sequences, those longer than `max_residues` cut to a prefix.

    Unknown letters, and those that the model has no token for, stay and are not predicted. `tell`
    hears how many passes a batch was.
    """
    shapes = model.placed.shapes
    tokens = [tokenizer.encode(sequence[:max_residues]) for sequence in sequences]
    residues, nats = (np.zeros(len(tokens), dtype) for dtype in (np.int64, np.float64))
    unanswerable = np.array(vocabulary(model.config.vocabulary).missing, np.int64)
    by_length: dict[int, list[tuple[int, int]]] = {}
    for i, row in enumerate(tokens):
        known = np.flatnonzero((row >= tokenizer.FIRST_RESIDUE) & ~np.isin(row, unanswerable))
        residues[i] = len(known)
        by_length.setdefault(shapes.length(len(row)), []).extend((i, at) for at in known.tolist())
    for T, questions in by_length.items():
        B = shapes.rows(T)
        for start in range(0, len(questions), B):
            part = questions[start : start + B]
            tokens_BT = np.full((B, T), tokenizer.PAD, np.int32)
            index_BM = np.zeros((B, 1), np.int32)
            for row, (i, at) in enumerate(part):
                tokens_BT[row, : len(tokens[i])] = tokens[i]
                tokens_BT[row, at] = tokenizer.MASK
                index_BM[row] = at
            segment_ids_BT = (tokens_BT != tokenizer.PAD).astype(np.int32)
            positions_BT = np.broadcast_to(np.arange(T, dtype=np.int32), (B, T))
            arrays = (tokens_BT, segment_ids_BT, positions_BT, index_BM)
            on_device = jax.device_put(arrays, model.placed.rows)
            logp = predict(model.placed.params, *on_device, model.config, model.compute)
            logp_BV = np.asarray(jax.device_get(logp), np.float64)[:, 0]
            for row, (i, at) in enumerate(part):
                nats[i] -= logp_BV[row, tokens[i][at]]
            tell(len(part))
    return PseudoPerplexity(residues, nats)
