"""Metrics of predicted labels, and their errors by protein.

Classification is scored from a table of counts: `table[true, predicted]` of one label,
`table[class, true, predicted]` of several labels a protein. A bootstrap draws whole proteins, for
residues of one protein are not independent.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

SAMPLES = 1_000  # of a bootstrap
LOWER_IS_BETTER = ("loss", "mse")


def score(kind: str, labels: np.ndarray, predicted: np.ndarray) -> dict[str, float]:
    """Return the metrics of n predictions.

    Args:
      kind: "classification": labels int [n], predicted [n, K] logits, gives accuracy, macro_f1 and
        mcc. "multilabel": labels int [n, K], 0 or 1, predicted [n, K] logits, gives the same, as
        means over classes but for accuracy, over all labels. "regression": labels [n], predicted
        [n, 1], gives spearman and mse.
    """
    if kind == "regression":
        values = predicted[:, 0].astype(np.float64)
        return {"spearman": spearman(labels, values), "mse": float(np.mean((labels - values) ** 2))}
    cells, shape = _cells(kind, labels, predicted)
    table = np.bincount(cells.ravel(), minlength=math.prod(shape)).reshape(shape)
    return _of_table(kind, table.astype(np.float64))  # products of integers would overflow


def bootstrap_errors(
    kind: str, labels: np.ndarray, predicted: np.ndarray, protein: np.ndarray, seed: int = 0
) -> dict[str, float]:
    """Return the standard error of every metric of `score`, by a bootstrap of the proteins; NaN of
    one protein alone.

    protein: int [n], which one a label belongs to.
    """
    _, protein = np.unique(protein, return_inverse=True)
    n, rng = int(protein.max()) + 1, np.random.default_rng(seed)
    if n == 1:  # every draw is the same
        return dict.fromkeys(score(kind, labels, predicted), math.nan)
    if kind == "regression":
        values = predicted[:, 0].astype(np.float64)
        squares = (labels - values) ** 2
        # Sorted once: to sort every draw takes minutes of a million residues.
        levels = [np.unique(x, return_inverse=True)[1] for x in (labels, values)]

        def draw() -> dict[str, float]:
            times = np.bincount(rng.integers(0, n, n), minlength=n)[protein]
            a, b = (_mean_ranks(level, times) for level in levels)
            mse = float(np.average(squares, weights=times))
            return {"spearman": _correlation(a, b, times), "mse": mse}
    else:
        cells, shape = _cells(kind, labels, predicted)
        size = math.prod(shape)
        # Of the cells of each protein those that are not empty: a table for each has no bounds.
        keys, counts = np.unique(protein[:, None] * size + cells, return_counts=True)
        owner, cell = np.divmod(keys, size)

        def draw() -> dict[str, float]:
            times = np.bincount(rng.integers(0, n, n), minlength=n)
            return _of_table(kind, np.bincount(cell, counts * times[owner], size).reshape(shape))

    drawn = [draw() for _ in range(SAMPLES)]
    known = {name: [x[name] for x in drawn if x[name] == x[name]] for name in drawn[0]}
    return {
        name: float(np.std(values, ddof=1)) if len(values) > 1 else math.nan
        for name, values in known.items()
    }


def _cells(
    kind: str, labels: np.ndarray, predicted: np.ndarray
) -> tuple[np.ndarray, tuple[int, ...]]:
    """Return (indices into the flat table that each label counts in, [n, 1] or [n, K]; the shape of
    the table)."""
    k = predicted.shape[1]
    if kind == "classification":
        return (labels * k + predicted.argmax(axis=1))[:, None], (k, k)
    return 4 * np.arange(k) + 2 * labels + (predicted > 0), (k, 2, 2)


def _of_table(kind: str, table: np.ndarray) -> dict[str, float]:
    if kind == "classification":
        right = float(np.trace(table) / table.sum())
        return {"accuracy": right, "macro_f1": macro_f1(table), "mcc": matthews(table)}
    right = float((table[:, 0, 0] + table[:, 1, 1]).sum() / table.sum())
    either = 2 * table[:, 1, 1] + table[:, 0, 1] + table[:, 1, 0]
    f1 = 2 * table[either > 0, 1, 1] / either[either > 0]
    return {
        "accuracy": right,
        "macro_f1": float(f1.mean()) if len(f1) else 0.0,
        "mcc": float(np.mean([matthews(x) for x in table])),
    }


def macro_f1(table: np.ndarray) -> float:
    """Return the mean F1 over the classes that occur or are predicted; table[true, predicted]."""
    either = table.sum(axis=0) + table.sum(axis=1)
    return float(np.mean(2 * np.diag(table)[either > 0] / either[either > 0]))


def matthews(table: np.ndarray) -> float:
    """Return Matthews' correlation for any number of classes (Gorodkin, 2004); 0 where only one is
    predicted."""
    n, right = table.sum(), np.trace(table)
    true, predicted = table.sum(axis=1), table.sum(axis=0)
    scale = math.sqrt((n**2 - (predicted**2).sum()) * (n**2 - (true**2).sum()))
    return float((right * n - true @ predicted) / scale) if scale else 0.0


def standard_error(values: Sequence[float] | np.ndarray) -> float:
    """Return that of the mean of independent values; NaN of fewer than two, or where one is not
    finite."""
    is_known = len(values) > 1 and np.isfinite(values).all()
    return float(np.std(values, ddof=1) / len(values) ** 0.5) if is_known else math.nan


def spearman(labels: np.ndarray, values: np.ndarray) -> float:
    """Return Spearman's rho; NaN where all labels or all values are equal."""
    from scipy import stats  # slow to import

    if not (np.ptp(values) and np.ptp(labels)):
        return math.nan
    return float(stats.spearmanr(labels, values).statistic)


def _mean_ranks(level: np.ndarray, times: np.ndarray) -> np.ndarray:
    """Return the ranks of values that stand `times` times each; equal ones share their mean rank.

    level: int [n], the number of a value among the distinct ones in ascending order.
    """
    counts = np.bincount(level, times)
    return (np.cumsum(counts) - (counts - 1) / 2)[level]


def _correlation(a: np.ndarray, b: np.ndarray, times: np.ndarray) -> float:
    """Return Pearson's correlation of pairs that stand `times` times each; NaN without variance."""
    a, b = (x - np.average(x, weights=times) for x in (a, b))
    scale = math.sqrt(times @ a**2) * math.sqrt(times @ b**2)
    return float(times @ (a * b) / scale) if scale else math.nan
