"""What a perplexity must beat: predictors that know nothing but composition. NumPy only.

Both are evaluated at `<mask>` positions: where a target is left unchanged in the input, a model
that merely copies it looks better than it is.
"""

from __future__ import annotations

import numpy as np

from esm1nv_jax.data.source import Source
from esm1nv_jax.data.tokenizer import FIRST_RESIDUE, VOCABULARY, residue_ids

UNIGRAM_PROTEINS = 20_000  # of training, from which the unigram is counted
PSEUDOCOUNTS = 100.0  # of the unigram, in the composition baseline
LETTERS = VOCABULARY - FIRST_RESIDUE


def count_residues(source: Source, most: int | None = None) -> np.ndarray:
    """How often each residue letter stands in the first `most` proteins, or in all: int64 [25]."""
    counts = np.zeros(LETTERS, np.int64)
    n = min(len(source.lengths), most or len(source.lengths))
    for start in range(0, n, 4096):
        ids = residue_ids(b"".join(source.sequences(range(start, min(start + 4096, n)))))
        counts += np.bincount(ids[ids >= FIRST_RESIDUE] - FIRST_RESIDUE, minlength=LETTERS)
    return counts


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
