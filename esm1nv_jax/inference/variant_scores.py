"""How much likelier a model finds a mutant than the wild type: three ways of asking.

Masked and wild-type marginals: Meier et al., "Language models enable zero-shot prediction of the
effects of mutations on protein function", 2021. Pseudo-perplexity: Salazar et al., "Masked language
model scoring", 2020. Higher is fitter in all of them; natural logarithms, softmax over all tokens.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence

import jax
import numpy as np

from esm1nv_jax.common.errors import UserError
from esm1nv_jax.data import tokenizer
from esm1nv_jax.inference.engine import IN_FLIGHT, Placed
from esm1nv_jax.inference.mutants import MODES, Mutant
from esm1nv_jax.inference.windows import centred
from esm1nv_jax.model import encoder

BLOCK = 64  # mutants whose pseudo-perplexities are computed together


@dataclasses.dataclass(frozen=True)
class Question:
    """Log-probabilities wanted at `sites` of the window start..stop-1 of `sequence`, with <mask>
    standing there if `masked`."""

    sequence: str
    start: int
    stop: int
    sites: tuple[int, ...]
    masked: bool = True


@functools.partial(jax.jit, static_argnames=("config", "compute"))
def _log_probabilities(params, tokens_BT, segment_ids_BT, index_BM, config, compute):
    """log softmax at columns `index_BM` of rows that hold one sequence each: fp32 [B, M, V]."""
    positions_BT = jax.lax.broadcasted_iota(np.int32, tokens_BT.shape, 1) * segment_ids_BT
    out = encoder.forward(
        config, params, tokens_BT, segment_ids_BT, positions_BT, compute=compute, index_BM=index_BM
    )
    return jax.nn.log_softmax(out.logits)[..., : tokenizer.VOCABULARY]


def answers(
    placed: Placed, questions: Sequence[Question], residues: int, sites: int
) -> Iterator[np.ndarray]:
    """For each question in turn: log-probabilities, float32 [its sites, vocabulary].

    No window may be longer than `residues`, no question may have more than `sites`: they fix the
    shape, so that a protein takes one compilation.
    """
    T, M = placed.shapes.length(residues + 2), 1 << (sites - 1).bit_length()
    B = placed.shapes.rows(T)
    waiting: list[tuple] = []

    def collect():
        out, batch = waiting.pop(0)
        for row, question in zip(jax.device_get(out), batch, strict=False):
            yield row[: len(question.sites)]

    for first in range(0, len(questions), B):
        batch = questions[first : first + B]
        tokens_BT = np.full((B, T), tokenizer.PAD, np.int32)
        index_BM = np.zeros((B, M), np.int32)
        for row, q in enumerate(batch):
            ids = tokenizer.encode(q.sequence[q.start : q.stop])
            columns = np.array(q.sites) - q.start + 1
            if q.masked:
                ids[columns] = tokenizer.MASK
            tokens_BT[row, : len(ids)] = ids
            index_BM[row, : len(columns)] = columns
        segment_ids_BT = (tokens_BT != tokenizer.PAD).astype(np.int32)
        arrays = jax.device_put((tokens_BT, segment_ids_BT, index_BM), placed.rows)
        out = _log_probabilities(placed.params, *arrays, placed.config, placed.compute)
        waiting.append((out, batch))
        if len(waiting) == IN_FLIGHT:
            yield from collect()
    while waiting:
        yield from collect()


def scores(
    placed: Placed,
    wild_type: str,
    mutants: Sequence[Mutant],
    limit: int,
    mode: str = MODES[0],
    additive: bool = False,
    tell: Callable[[float], None] = lambda done: None,
) -> np.ndarray:
    """The score of each mutant, higher is fitter: float64 [mutants].

    Args:
      placed: the model.
      wild_type: upper-case sequence that the mutants are of.
      mutants: from `mutants.parse`.
      limit: residues read at once; longer proteins are read in a window centred on the sites.
      mode: one of MODES.
      additive: mask the sites of a mutant one at a time, and add up.
      tell: called with how many mutants are done.

    Raises UserError where the sites of a mutant do not share a window.
    """
    if mode not in MODES:
        raise UserError(f"mode {mode!r} is unknown; there are {', '.join(MODES)}")
    plan = {
        "masked-marginals": _masked_additive if additive else _masked,
        "wt-marginals": _wild_type,
        "pseudo-perplexity": _pseudo,
    }[mode]
    if not additive:
        for mutant in mutants:  # one that cannot be scored is told before the first is computed
            _window(wild_type, mutant, mutant.indices, limit)
    residues = min(len(wild_type), limit)
    at_once = max((len(mutant.sites) for mutant in mutants), default=1)
    sites = {"masked-marginals": at_once, "wt-marginals": residues, "pseudo-perplexity": 1}[mode]
    # A pseudo-perplexity puts a question a residue: only so many mutants are planned together.
    block = BLOCK if mode == "pseudo-perplexity" else max(1, len(mutants))
    known: dict[Question, np.ndarray] = {}  # many mutants ask the same
    result = np.zeros(len(mutants))
    for first in range(0, len(mutants), block):
        terms = [plan(wild_type, mutant, limit) for mutant in mutants[first : first + block]]
        asked = dict.fromkeys(q for mutant in terms for q, _ in mutant)
        new = [q for q in asked if q not in known]
        for done, answer in enumerate(answers(placed, new, residues, sites)):
            known[new[done]] = answer
            tell(first + len(terms) * (done + 1) / len(new))
        for row, mutant in enumerate(terms, first):
            result[row] = sum(_term(known[q], wanted) for q, wanted in mutant)
        known = {q: answer for q, answer in known.items() if q.sequence == wild_type}
    return result


# A term: the sites of a question in order, each with (letter counted in, letter counted out).
Terms = list[tuple[Question, tuple[tuple[str | None, str | None], ...]]]


def _term(log_p: np.ndarray, wanted) -> float:
    total = 0.0
    for row, (plus, minus) in zip(log_p.astype(np.float64), wanted, strict=True):
        for letter, sign in ((plus, 1), (minus, -1)):
            if letter is not None:
                total += sign * row[tokenizer.residue_ids(letter.encode())[0]]
    return total


def _window(wild_type: str, mutant: Mutant, indices: Sequence[int], limit: int) -> tuple[int, int]:
    window = centred(min(indices), max(indices), len(wild_type), limit)
    if window is None:
        raise UserError(
            f"{mutant.name}: its sites are {max(indices) - min(indices) + 1} residues apart, the "
            f"model reads {limit} at once; leave the mutant out, or score its parts with --additive"
        )
    return window


def _masked(wild_type: str, mutant: Mutant, limit: int) -> Terms:
    window = _window(wild_type, mutant, mutant.indices, limit)
    return [
        (
            Question(wild_type, *window, mutant.indices),
            tuple((new, old) for _, old, new in mutant.sites),
        )
    ]


def _masked_additive(wild_type: str, mutant: Mutant, limit: int) -> Terms:
    return [
        (Question(wild_type, *_window(wild_type, mutant, (i,), limit), (i,)), ((new, old),))
        for i, old, new in mutant.sites
    ]


def _wild_type(wild_type: str, mutant: Mutant, limit: int) -> Terms:
    # The whole window is one question, so that a short protein is read once for all mutants.
    window = _window(wild_type, mutant, mutant.indices, limit)
    letters = {i: (new, old) for i, old, new in mutant.sites}
    sites = tuple(range(*window))
    return [
        (
            Question(wild_type, *window, sites, masked=False),
            tuple(letters.get(i, (None, None)) for i in sites),
        )
    ]


def _pseudo(wild_type: str, mutant: Mutant, limit: int) -> Terms:
    """PLL(mutant) - PLL(wild type), both over the same window."""
    window = _window(wild_type, mutant, mutant.indices, limit)
    changed = mutant.applied(wild_type)
    inside = range(*window)
    return [(Question(changed, *window, (i,)), ((changed[i], None),)) for i in inside] + [
        (Question(wild_type, *window, (i,)), ((None, wild_type[i]),)) for i in inside
    ]
