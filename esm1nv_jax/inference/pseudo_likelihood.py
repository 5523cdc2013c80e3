"""How likely a model finds whole sequences: pseudo-log-likelihood and pseudo-perplexity.

Each residue is predicted with only itself masked: Salazar et al., "Masked language model scoring",
2020. Natural logarithms, softmax over all tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import numpy as np

from esm1nv_jax.data import tokenizer
from esm1nv_jax.data.tokenizer import vocabulary
from esm1nv_jax.inference.engine import DeviceModel, LogProbQuery, run_queries
from esm1nv_jax.inference.mutants import MutantTable


def pseudo_log_ratios(
    model: DeviceModel,
    wild_type: str,
    mutants: MutantTable,
    starts: np.ndarray,
    limit: int,
    on_progress: Callable[[float], None] = lambda done: None,
) -> np.ndarray:
    """PLL(mutant) - PLL(wild type) of each mutant, both over the same window of `limit` residues
    from `starts` on: float64 [mutants]."""
    n = len(mutants)
    windows, window = np.unique(starts, return_inverse=True)
    pll = np.zeros(n + len(windows))  # of the mutants, then of the windows of the wild type

    def queries() -> Iterator[LogProbQuery]:
        for key, start in enumerate(windows.tolist(), n):
            yield from whole(wild_type, start, key)
        for key, start in enumerate(starts.tolist()):
            yield from whole(mutants[key].apply_to(wild_type), start, key)

    def whole(sequence: str, start: int, key: int) -> Iterator[LogProbQuery]:
        tokens = add_specials(sequence[start : start + limit].encode())
        return one_masked(tokens, range(1, len(tokens) - 1), key)

    total = len(pll) * min(limit, len(wild_type))
    for done, (query, log_probs) in enumerate(run_queries(model, queries()), 1):
        key, token = query.context
        pll[key] += float(log_probs[0, token])
        on_progress(n * done / total)
    return pll[:n] - pll[n:][window]


def pseudo_perplexity(
    model: DeviceModel,
    sequences: Sequence[bytes],
    max_residues: int,
    on_progress: Callable[[int], None] = lambda passes: None,
) -> tuple[np.ndarray, np.ndarray]:
    """Residues that were predicted, int64 [n], and sums of -log p(x_i | x without i) in nats,
    float64 [n], of n clean sequences, one forward pass a residue.

    Sequences longer than `max_residues` are cut to a prefix. Unknown letters, and those that the
    model has no token for, stay and are not predicted. `on_progress` is called for each pass.
    """
    residues, nats = np.zeros(len(sequences), np.int64), np.zeros(len(sequences))
    missing = np.array(vocabulary(model.config.vocabulary).missing, np.int64)

    def queries() -> Iterator[LogProbQuery]:
        for i, sequence in enumerate(sequences):
            tokens = add_specials(sequence[:max_residues])
            known = (tokens >= tokenizer.FIRST_RESIDUE) & ~np.isin(tokens, missing)
            residues[i] = known.sum()
            yield from one_masked(tokens, np.flatnonzero(known).tolist(), i)

    for query, log_probs in run_queries(model, queries()):
        i, token = query.context
        nats[i] -= float(log_probs[0, token])
        on_progress(1)
    return residues, nats


def one_masked(tokens: np.ndarray, columns: Iterable[int], key: Any) -> Iterator[LogProbQuery]:
    """One query for each of `columns`, with that token masked; context (key, the token)."""
    for column in columns:
        masked = tokens.copy()
        masked[column] = tokenizer.MASK
        yield LogProbQuery(masked, [column], (key, int(tokens[column])))


def add_specials(window: bytes) -> np.ndarray:
    """Token ids of a part of a normalized sequence, of which a `*` at its end is no final stop."""
    return tokenizer.add_specials(tokenizer.residue_ids(window))
