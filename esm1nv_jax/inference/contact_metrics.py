"""Precision of predicted contacts, by range of sequence separation, beside two baselines.

P@L/k is the share of true contacts among the L/k pairs with the highest scores, of L residues, in
one range. Ties count as if broken at random, so a constant score gives the base rate exactly.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import numpy as np

from esm1nv_jax.inference.structures import Structure
from esm1nv_jax.model.label_metrics import standard_error

RANGES = {"short": (6, 12), "medium": (12, 24), "long": (24, None)}  # |i - j|, first to before last
CUTOFFS = {"P@L": 1, "P@L/2": 2, "P@L/5": 5}
MIN_SEPARATION = 6


def expected_precision(scores: np.ndarray, is_contact: np.ndarray, top: int) -> float:
    """The share of contacts among the `top` highest scores, in expectation over the order of ties;
    among all where they are fewer, NaN where there are none."""
    top = min(top, len(scores))
    if not top:
        return math.nan
    lowest = np.partition(scores, len(scores) - top)[len(scores) - top]
    above, tied = scores > lowest, scores == lowest
    hits = is_contact[above].sum() + (top - above.sum()) * is_contact[tied].mean()
    return float(hits / top)


def evaluate(scores: np.ndarray, structure: Structure) -> dict[tuple[str, str], float]:
    """By (range, cutoff): the precision of scores [residues, residues], higher is likelier."""
    L = len(structure.sequence)
    i, j = np.triu_indices(L, MIN_SEPARATION)
    resolved = structure.is_resolved[i] & structure.is_resolved[j]
    i, j = i[resolved], j[resolved]
    values = {}
    for name, (first, end) in RANGES.items():
        used = (j - i >= first) & (j - i < (end or L))
        pairs = i[used], j[used]
        for cutoff, k in CUTOFFS.items():
            top = max(1, L // k)
            values[name, cutoff] = expected_precision(
                scores[pairs], structure.is_contact[pairs], top
            )
    return values


def baselines(residues: int) -> dict[str, np.ndarray]:
    """Scores [residues, residues] that no model is needed for: all pairs alike, and pairs that are
    nearer in the sequence first."""
    index = np.arange(residues)
    separation = np.abs(index[:, None] - index)
    return {"random": np.zeros((residues, residues)), "by separation": -separation.astype(float)}


def mean_and_error(values: Iterable[float]) -> tuple[float, float, int]:
    """(mean over proteins, its standard error, number of proteins), leaving out NaN."""
    numbers = np.array([value for value in values if not math.isnan(value)])
    if not len(numbers):
        return math.nan, math.nan, 0
    return float(numbers.mean()), standard_error(numbers), len(numbers)
