"""Means with standard errors by sequence, added up batch by batch. NumPy only.

Positions of one protein are not independent, so the error of a mean over positions is that of a
ratio of sums over proteins: with l_i and n_i the sum and the number of positions of protein i and
R = sum l / sum n, the variance is k / (k - 1) sum (l_i - R n_i)^2 / (sum n)^2 over k proteins
(Cochran, "Sampling Techniques", 1977, section 6.4).
"""

from __future__ import annotations

import dataclasses
import math

import numpy as np


@dataclasses.dataclass
class Tally:
    """What the mean of a quantity and its error are made of, for K classes. float64 [K]."""

    sequences: np.ndarray  # that have a position here
    positions: np.ndarray
    total: np.ndarray
    squares: np.ndarray  # sums over proteins of l^2,
    products: np.ndarray  # l n
    counts: np.ndarray  # and n^2

    @classmethod
    def empty(cls, classes: int) -> Tally:
        return cls(*(np.zeros(classes) for _ in dataclasses.fields(cls)))

    def add(self, cls: np.ndarray, n: np.ndarray, total: np.ndarray) -> None:
        """Adds one entry a protein (or a protein and class): its class, positions and sum."""
        there = n > 0
        cls, n, total = cls[there], n[there].astype(np.float64), total[there].astype(np.float64)
        terms = (np.ones_like(n), n, total, total**2, total * n, n**2)
        for field, term in zip(dataclasses.fields(self), terms, strict=True):
            mine = getattr(self, field.name)
            mine += np.bincount(cls, term, minlength=len(mine))

    def mean(self, k: int = 0) -> tuple[float, float]:
        """The mean over positions of class k and its standard error; NaN where it has none."""
        n, proteins = self.positions[k], self.sequences[k]
        if not n:
            return math.nan, math.nan
        mean = self.total[k] / n
        if proteins < 2:
            return float(mean), math.nan
        spread = self.squares[k] - 2 * mean * self.products[k] + mean**2 * self.counts[k]
        error = math.sqrt(max(spread, 0.0) * proteins / (proteins - 1)) / n
        return float(mean), error

    def perplexity(self, k: int = 0) -> tuple[float, float]:
        """exp of the mean, with the error of the mean carried through."""
        mean, error = self.mean(k)
        value = math.inf if mean >= 700 else math.exp(mean)  # NaN stays NaN
        return value, value * error
