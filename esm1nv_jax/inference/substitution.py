"""What a model takes for what: log-odds of substitution, held against BLOSUM62."""

from __future__ import annotations

import dataclasses

import numpy as np
from scipy import stats

# Henikoff and Henikoff, PNAS 89, 10915 (1992), as NCBI distributes it; half-bits.
ORDER = "ARNDCQEGHILKMFPSTWYV"
_LOWER_TRIANGLE = """
 4
-1  5
-2  0  6
-2 -2  1  6
 0 -3 -3 -3  9
-1  1  0  0 -3  5
-1  0  0  2 -4  2  5
 0 -2  0 -1 -3 -2 -2  6
-2  0  1 -1 -3  0  0 -2  8
-1 -3 -3 -3 -1 -3 -3 -4 -3  4
-1 -2 -3 -4 -1 -2 -3 -4 -3  2  4
-1  2  0 -1 -3  1  1 -2 -1 -3 -2  5
-1 -1 -2 -3 -1  0 -2 -3 -2  1  2 -1  5
-2 -3 -3 -3 -2 -3 -3 -3 -1  0  0 -3  0  6
-1 -2 -2 -1 -3 -1 -1 -2 -2 -3 -3 -1 -2 -4  7
 1 -1  1  0 -1  0  0  0 -1 -2 -2  0 -1 -2 -1  4
 0 -1  0 -1 -1 -1 -1 -2 -2 -1 -1 -1 -1 -2 -1  1  5
-3 -3 -4 -4 -2 -2 -3 -2 -2 -3 -2 -3 -1  1 -4 -3 -2 11
-2 -2 -2 -3 -2 -1 -2 -3  2 -1 -1 -2 -1  3 -3 -2 -2  2  7
 0 -3 -3 -3 -1 -2 -2 -3 -3  3  1 -2  1 -1 -2 -2  0 -3 -1  4
"""


def blosum62() -> np.ndarray:
    """[20, 20] in the order of ORDER."""
    found = np.zeros((20, 20))
    for i, line in enumerate(_LOWER_TRIANGLE.split("\n")[1:-1]):
        found[i, : i + 1] = line.split()
    return found + np.tril(found, -1).T


@dataclasses.dataclass(frozen=True)
class Substitution:
    """`log_odds` [20, 20] in bits, symmetric, in the order of ORDER; its correlation with BLOSUM62
    over the 190 pairs off the diagonal, NaN where a pair was never seen."""

    log_odds: np.ndarray
    pearson: float
    spearman: float


def substitution(sums: np.ndarray, letters: str) -> Substitution:
    """From sums[a, b] of p(b) over `<mask>` positions where the residue was a.

    The sums, over all positions, estimate how often a and b could stand in one place; symmetrised,
    their log-odds against chance are what BLOSUM is of aligned columns.
    """
    order = [letters.index(a) for a in ORDER]
    joint = np.asarray(sums, np.float64)[np.ix_(order, order)]
    joint = (joint + joint.T) / 2
    with np.errstate(divide="ignore", invalid="ignore"):
        joint = joint / joint.sum()
        expected = joint.sum(axis=1)
        log_odds = np.log2(joint / np.outer(expected, expected))
    pairs = np.tril_indices(20, -1)
    mine, theirs = log_odds[pairs], blosum62()[pairs]
    if not np.isfinite(mine).all() or mine.std() < 1e-12:
        return Substitution(log_odds, float("nan"), float("nan"))
    return Substitution(
        log_odds,
        float(stats.pearsonr(mine, theirs).statistic),
        float(stats.spearmanr(mine, theirs).statistic),
    )
