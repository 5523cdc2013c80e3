"""How likely a model finds the mutants of a protein.

Masked and wild-type marginals: Meier et al., "Language models enable zero-shot prediction of the
effects of mutations on protein function", 2021. Natural logarithms, softmax over all tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np

from esm1nv_jax.common.errors import UserError
from esm1nv_jax.data import tokenizer
from esm1nv_jax.inference.engine import DeviceModel, LogProbQuery, run_queries
from esm1nv_jax.inference.mutants import MutantTable
from esm1nv_jax.inference.pseudo_likelihood import add_specials, pseudo_log_ratios
from esm1nv_jax.inference.row_shapes import centered_starts

MODES = ("masked-marginals", "wt-marginals", "pseudo-perplexity")


def score_mutants(
    model: DeviceModel,
    wild_type: str,
    mutants: MutantTable,
    limit: int,
    mode: str = MODES[0],
    additive: bool = False,
    on_progress: Callable[[float], None] = lambda done: None,
) -> np.ndarray:
    """The score of each mutant, higher is fitter: float64 [mutants].

    Args:
      wild_type: upper-case sequence that the mutants are of.
      limit: residues read at once; longer proteins are read in a window centred on the sites.
      mode: one of MODES.
      additive: mask the sites of a mutant one at a time, and add up.
      on_progress: called with how many mutants are done.

    Raises UserError where the sites of a mutant do not share a window.
    """
    if mode not in MODES:
        raise UserError(f"mode {mode!r} is unknown; there are {', '.join(MODES)}")
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
    if mode == "pseudo-perplexity":
        of_mutants = starts[mutants.starts]
        return pseudo_log_ratios(model, wild_type, mutants, of_mutants, limit, on_progress)
    # Sites that ask the same are answered by one table of log-probabilities: in wt-marginals all
    # that are read in one window, else those that are masked together.
    if mode == "wt-marginals":
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
            if mode == "masked-marginals":
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
