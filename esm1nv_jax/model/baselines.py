"""What a perplexity must beat: predictors that know nothing but composition. NumPy only.

Both are evaluated at `<mask>` positions: where a target is left unchanged in the input, a model
that merely copies it looks better than it is.
"""

from __future__ import annotations

import dataclasses

import numpy as np

from esm1nv_jax.data.tokenizer import FIRST_RESIDUE, VOCABULARY

PSEUDOCOUNTS = 100.0  # of the unigram, in the composition baseline
LETTERS = VOCABULARY - FIRST_RESIDUE


@dataclasses.dataclass
class Baselines:
    """Sums of -log p over `<mask>` positions, in nats, under two predictors.

    unigram: the frequencies of residues in training data. composition: each protein's own visible
    residues, smoothed by 100 pseudocounts of the unigram.
    """

    unigram: np.ndarray  # float64 [25]: probability of each residue letter
    positions: int = 0
    unigram_nats: float = 0.0
    composition_nats: float = 0.0

    def add(
        self, inputs_BT, segment_ids_BT, prediction_positions_BM, targets_BM, is_masked_BM
    ) -> None:
        """Counts one corrupted batch (arrays as in `masking.Masked`, on the host)."""
        rows, entries = np.nonzero(is_masked_BM)
        columns, targets = prediction_positions_BM[rows, entries], targets_BM[rows, entries]
        self.composition_nats += float(
            composition_nats(self.unigram, inputs_BT, segment_ids_BT, rows, columns, targets).sum()
        )
        self.unigram_nats += float(unigram_nats(self.unigram, targets).sum())
        self.positions += len(targets)

    def perplexities(self) -> dict[str, float]:
        """exp of the mean of each sum; NaN where nothing was counted."""
        n = self.positions or float("nan")
        return {
            "unigram": float(np.exp(self.unigram_nats / n)),
            "composition": float(np.exp(self.composition_nats / n)),
        }


def unigram(counts: np.ndarray) -> np.ndarray:
    """Probabilities from residue counts [25], one added to each, so that none is impossible."""
    counts = np.asarray(counts, np.float64) + 1
    return counts / counts.sum()


def unigram_nats(unigram: np.ndarray, targets: np.ndarray) -> np.ndarray:
    """-log p of each target token under residue frequencies [25]: float64, shape of `targets`."""
    return -np.log(unigram[targets - FIRST_RESIDUE])


def composition_nats(
    unigram: np.ndarray, inputs_BT, segment_ids_BT, rows, columns, targets
) -> np.ndarray:
    """-log p of `targets` at (rows, columns), int [n] each, under the visible rest of their
    protein: float64 [n]."""
    letters = targets - FIRST_RESIDUE
    segments = int(segment_ids_BT.max(initial=0)) + 1
    protein_BT = np.arange(len(inputs_BT))[:, None] * segments + segment_ids_BT
    is_visible_BT = (inputs_BT >= FIRST_RESIDUE) & (segment_ids_BT > 0)
    keys = protein_BT[is_visible_BT] * LETTERS + inputs_BT[is_visible_BT] - FIRST_RESIDUE
    counts = np.bincount(keys, minlength=len(inputs_BT) * segments * LETTERS).reshape(-1, LETTERS)
    visible = counts[protein_BT[rows, columns]]
    smoothed = visible[np.arange(len(visible)), letters] + PSEUDOCOUNTS * unigram[letters]
    return -np.log(smoothed / (visible.sum(axis=1) + PSEUDOCOUNTS))
