"""How likely a model finds whole sequences, and the mutants of a protein.

Pseudo-log-likelihoods predict each residue with only itself masked: Salazar et al., "Masked
language model scoring", 2020. Masked and wild-type marginals: Meier et al., "Language models enable
zero-shot prediction of the effects of mutations on protein function", 2021. Natural logarithms,
softmax over all tokens.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence

import numpy as np

from esm1nv_jax.common.errors import UserError
from esm1nv_jax.data import tokenizer
from esm1nv_jax.data.tokenizer import vocabulary
from esm1nv_jax.inference.api_types import letter_ids
from esm1nv_jax.inference.engine import (
    DeviceModel,
    LogProbQuery,
    OutputSpec,
    embed_sequences,
    run_queries,
)
from esm1nv_jax.inference.mutants import MutantTable
from esm1nv_jax.inference.row_shapes import centered_starts, split_into_windows
from esm1nv_jax.model.masking import RECIPES, MaskingConfig

MASKED, UNMASKED, EXACT = MODES = ("masked-marginals", "wt-marginals", "pseudo-perplexity")
ONE_PASS = "one-pass"
SEQUENCE_MODES = (EXACT, ONE_PASS)


def pseudo_log_likelihood(
    model: DeviceModel,
    sequences: Sequence[bytes],
    limit: int,
    on_progress: Callable[[int], None] = lambda passes: None,
) -> tuple[np.ndarray, np.ndarray]:
    """Residues that were predicted, int64 [n], and sums of log p(x_i | x without i) in nats,
    float64 [n], of n normalized sequences, one forward pass a residue.

    Those longer than `limit` residues are read in windows, and a residue is predicted in the one
    in which it is farthest from a cut. Unknown letters, and those that the model has no token for,
    stay and are not predicted. `on_progress` is called for each pass.
    """
    residues, pll = np.zeros(len(sequences), np.int64), np.zeros(len(sequences))

    def queries() -> Iterator[LogProbQuery]:
        for i, sequence in enumerate(sequences):
            for window in split_into_windows(len(sequence), limit):
                tokens = add_specials(sequence[window.start : window.stop])
                owned = slice(window.first - window.start + 1, window.last - window.start + 1)
                known = owned.start + np.flatnonzero(_is_predicted(model, tokens[owned]))
                residues[i] += len(known)
                for column in known.tolist():
                    masked = tokens.copy()
                    masked[column] = tokenizer.MASK
                    yield LogProbQuery(masked, [column], (i, int(tokens[column])))

    for query, log_probs in run_queries(model, queries()):
        i, token = query.context
        pll[i] += float(log_probs[0, token])
        on_progress(1)
    return residues, pll


def copy_log_odds(masking: MaskingConfig | None) -> float:
    """By how much a visible residue raises the log-odds of itself, for a model that predicts
    perfectly; as for BERT where its masking is not known, 0 where targets are never left unchanged.

    Of the visible targets a share b stands unchanged and a share r for each letter replaces another
    one. With q the probability of residue x by its context alone, that of x where x is visible has
    the odds q (b + r) / ((1 - q) r); without r in the numerator if a replacement never repeats.
    """
    masking = masking or RECIPES["card"]
    unchanged = 1 - masking.mask - masking.random
    replaced = masking.random / (masking.letters if masking.may_repeat else masking.letters - 1)
    kept = unchanged + replaced * masking.may_repeat
    return math.log(kept / replaced) if kept > 1e-9 and replaced else 0.0


def one_pass_log_likelihood(
    model: DeviceModel, sequences: Sequence[bytes], limit: int, copied: float
) -> np.ndarray:
    """An approximation of `pseudo_log_likelihood`, float64 [n], from one forward pass of each
    sequence with nothing masked: `copied`, of `copy_log_odds`, is taken off the log-odds of each
    residue."""
    ids = [letter_ids(sequence) for sequence in sequences]
    if not ids:
        return np.zeros(0)
    logits = embed_sequences(model, ids, OutputSpec(("logits",), ()), limit)["logits"]
    token = np.concatenate(ids)
    known = _is_predicted(model, token)
    logits = logits.astype(np.float64)
    own = np.take_along_axis(logits, token[:, None].astype(np.int64), axis=1)[:, 0]
    np.put_along_axis(logits, token[:, None].astype(np.int64), -np.inf, axis=1)
    others = np.logaddexp.reduce(logits, axis=1)
    log_p = -np.logaddexp(0, -(own - others - copied))
    owner = np.repeat(np.arange(len(ids)), [len(i) for i in ids])
    return np.bincount(owner, np.where(known, log_p, 0), minlength=len(ids))


def score_mutants(
    model: DeviceModel,
    wild_type: str,
    mutants: MutantTable,
    limit: int,
    mode: str = MASKED,
    additive: bool = False,
    on_progress: Callable[[float], None] = lambda done: None,
) -> np.ndarray:
    """The score of each mutant by one of MODES, higher is fitter: float64 [mutants].

    A protein of more than `limit` residues is read in windows centred on the sites. `additive`
    masks the sites of a mutant one at a time. `on_progress` is called with how many are done.

    Raises UserError where the sites of a mutant do not share a window, or the wild type's letter
    there is one that is never predicted.
    """
    if mode not in MODES:
        raise UserError(f"mode {mode!r} is unknown; there are {', '.join(MODES)}")
    if additive and mode != MASKED:
        raise UserError(f"additive scores are of mode {MASKED}, found {mode}")
    index, n = mutants.residues, len(mutants)
    if not n:
        return np.zeros(0)
    row = np.repeat(np.arange(n), mutants.ends - mutants.starts)  # of each site
    if additive:
        first = last = index
    else:
        first, last = index[mutants.starts][row], index[mutants.ends - 1][row]
    starts = centered_starts(first, last, len(wild_type), limit)
    if (apart := np.flatnonzero(last - first >= limit)).size:
        raise UserError(
            f"{mutants[row[apart[0]]].name}: its sites are {(last - first)[apart[0]] + 1} residues "
            f"apart, the model reads {limit} at once; leave the mutant out, or score its parts "
            "with --additive"
        )
    known = _is_predicted(model, tokenizer.residue_ids(mutants.old.tobytes()))
    if (unknown := np.flatnonzero(~known)).size:
        raise UserError(
            f"{mutants[row[unknown[0]]].name}: this model has no token for "
            f"{chr(mutants.old[unknown[0]])}, so that nothing can be compared with it; leave such "
            "mutants out"
        )
    if mode == EXACT:
        starts = starts[mutants.starts]
        windows, window = np.unique(starts, return_inverse=True)
        cut = [wild_type[start : start + limit].encode() for start in windows.tolist()]
        for mutant, start in zip(mutants, starts.tolist(), strict=True):
            cut.append(mutant.apply_to(wild_type)[start : start + limit].encode())
        passed, passes = itertools.count(1), sum(map(len, cut))
        pll = pseudo_log_likelihood(
            model, cut, limit, lambda _: on_progress(n * next(passed) / passes)
        )[1]
        return pll[len(windows) :] - pll[window]
    # Sites that ask the same are answered by one table of log-probabilities: in wt-marginals all
    # that are read in one window, else those that are masked together.
    if mode == UNMASKED:
        group = starts
    else:
        group = index if additive else _site_sets(mutants)[row]
    order = np.lexsort((index, group))
    bounds = np.flatnonzero(np.diff(group[order], prepend=-1, append=-1))
    is_new = np.diff(index[order], prepend=-1) != 0
    is_new[bounds[:-1]] = True
    widest = int(np.add.reduceat(is_new, bounds[:-1], dtype=np.int64).max())

    def queries() -> Iterator[LogProbQuery]:
        for begin, end in zip(bounds[:-1].tolist(), bounds[1:].tolist(), strict=True):
            sites = order[begin:end]
            start = int(starts[sites[0]])
            tokens = add_specials(wild_type[start : start + limit].encode())
            columns = np.unique(index[sites]) - start + 1
            if mode == MASKED:
                tokens[columns] = tokenizer.MASK
            yield LogProbQuery(tokens, columns, sites)

    scores = np.zeros(n)
    answers = run_queries(model, queries(), widest)
    for done, (query, log_probs) in enumerate(answers, 1):
        sites = query.context
        column = np.searchsorted(query.columns, index[sites] - starts[sites] + 1)
        old, new = (tokenizer.residue_ids(x[sites].tobytes()) for x in (mutants.old, mutants.new))
        logp = log_probs.astype(np.float64)
        np.add.at(scores, row[sites], logp[column, new] - logp[column, old])
        on_progress(n * done / (len(bounds) - 1))
    return scores


def _site_sets(mutants: MutantTable) -> np.ndarray:
    """int64 [mutants]: equal numbers for mutants of the same residues."""
    numbers: dict[bytes, int] = {}
    spans = zip(mutants.starts.tolist(), mutants.ends.tolist(), strict=True)
    sets = (mutants.residues[begin:end].tobytes() for begin, end in spans)
    return np.fromiter((numbers.setdefault(x, len(numbers)) for x in sets), np.int64, len(mutants))


def _is_predicted(model: DeviceModel, tokens: np.ndarray) -> np.ndarray:
    missing = np.array(vocabulary(model.config.vocabulary).missing, np.int64)
    return (tokens >= tokenizer.FIRST_RESIDUE) & ~np.isin(tokens, missing)


def add_specials(window: bytes) -> np.ndarray:
    """Token ids of a part of a normalized sequence, of which a `*` at its end is no final stop."""
    return tokenizer.add_specials(letter_ids(window))
