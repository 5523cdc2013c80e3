"""How likely a model finds a protein or its mutants: variant scores and pseudo-perplexity.

Masked and wild-type marginals: Meier et al., "Language models enable zero-shot prediction of the
effects of mutations on protein function", 2021. Pseudo-perplexity, each residue predicted with only
itself masked: Salazar et al., "Masked language model scoring", 2020. Natural logarithms, softmax
over all tokens.
"""

from __future__ import annotations

import collections
import dataclasses
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from esm1nv_jax.common.errors import UserError
from esm1nv_jax.data import tokenizer
from esm1nv_jax.data.tokenizer import RESIDUES, STANDARD, vocabulary
from esm1nv_jax.inference.engine import DeviceModel, LogProbQuery, run_queries
from esm1nv_jax.inference.row_shapes import centered_window

MODES = ("masked-marginals", "wt-marginals", "pseudo-perplexity")
AMINO_ACIDS = RESIDUES[:STANDARD]
_SUBSTITUTION = re.compile(r"([A-Za-z])(-?\d+)([A-Za-z])")


class MutantError(UserError):
    """What is not a mutant that can be scored; `kind` says in two words why, to be counted."""

    def __init__(self, kind: str, message: str):
        super().__init__(message)
        self.kind = kind


@dataclasses.dataclass(frozen=True, slots=True)
class Mutant:
    """Substitutions of one sequence, ascending: (index from 0, old letter, new letter)."""

    name: str
    sites: tuple[tuple[int, str, str], ...]

    def apply_to(self, wild_type: str) -> str:
        letters = list(wild_type)
        for index, _, new in self.sites:
            letters[index] = new
        return "".join(letters)


def parse_mutant(name: str, wild_type: str, offset: int = 0, where: str = "mutant") -> Mutant:
    """Reads `A4G:L10P`; the first residue of the sequence has number 1 + `offset`.

    Raises MutantError, beginning with `where`, for anything but substitutions of the residues that
    stand in the sequence by standard amino acids.
    """
    sites = []
    for text in map(str.strip, name.split(":")):
        match = _SUBSTITUTION.fullmatch(text)
        if match is None:
            raise MutantError(*_not_a_substitution(text, where))
        old, index, new = match[1].upper(), int(match[2]) - 1 - offset, match[3].upper()
        if not 0 <= index < len(wild_type):
            raise MutantError(
                "outside the sequence",
                f"{where}: {text} is outside the sequence, whose residues have the numbers "
                f"{1 + offset} to {len(wild_type) + offset}; is --offset right?",
            )
        if wild_type[index] != old:
            raise MutantError(
                "another residue in the sequence",
                f"{where}: {text} begins with {old}, but the sequence has {wild_type[index]} "
                "there; is --offset right, is it the right sequence?",
            )
        if new not in AMINO_ACIDS:
            raise MutantError(
                "no standard amino acid",
                f"{where}: {text} ends in {new}, which is no standard amino acid",
            )
        sites.append((index, old, new))
    if len({index for index, _, _ in sites}) < len(sites):
        raise MutantError("one residue twice", f"{where}: {name} changes one residue twice")
    return Mutant(name, tuple(sorted(sites)))


def _not_a_substitution(text: str, where: str) -> tuple[str, str]:
    """(kind, message) of what is no `A4G`."""
    parts = re.split(r"\s*[,;/+&\s]\s*", text)
    if len(parts) > 1 and all(map(_SUBSTITUTION.fullmatch, parts)):
        return "not joined by ':'", (
            f"{where}: {text!r} has several substitutions; join them by ':', as {':'.join(parts)}"
        )
    kind = "no substitution"
    if not text:
        kind = "blank"
    elif text.lower().strip("_") in ("wt", "wildtype", "wild-type", "wild_type"):
        kind = "wild type"
    elif text.endswith(("*", "Ter")):
        kind = "stop"
    return kind, (
        f"{where}: {text!r} is no substitution such as A4G; insertions, deletions and stops cannot "
        "be scored"
    )


def parse_mutants(
    names: Sequence[str], wild_type: str, offset: int = 0, first_row: int = 1
) -> list[Mutant]:
    """`parse_mutant` for each row of a table. Raises MutantError that names the row."""
    return [parse_mutant(n, wild_type, offset, f"row {i}") for i, n in enumerate(names, first_row)]


def all_singles(wild_type: str, offset: int = 0) -> list[str]:
    """Every single substitution of a residue by another standard amino acid, by position."""
    return [
        f"{old}{index + 1 + offset}{new}"
        for index, old in enumerate(wild_type)
        for new in AMINO_ACIDS
        if new != old and old in RESIDUES
    ]


def score_mutants(
    model: DeviceModel,
    wild_type: str,
    mutants: Sequence[Mutant],
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
    if mode == "pseudo-perplexity":
        return _pseudo_log_ratios(model, wild_type, mutants, limit, on_progress)
    # Mutants that ask the same share a query: (window, masked sites) to (row, index, old, new).
    wanted: dict[tuple, list[tuple[int, int, str, str]]] = collections.defaultdict(list)
    for row, mutant in enumerate(mutants):
        for sites in [(site,) for site in mutant.sites] if additive else [mutant.sites]:
            window = _window(wild_type, mutant.name, sites, limit)
            masked = tuple(s[0] for s in sites) if mode == "masked-marginals" else ()
            wanted[window, masked] += [(row, *site) for site in sites]

    def queries() -> Iterator[LogProbQuery]:
        for ((start, stop), masked), terms in wanted.items():
            tokens = _tokens(wild_type[start:stop].encode())
            tokens[np.array(masked, int) - start + 1] = tokenizer.MASK
            columns = sorted({index - start + 1 for _, index, _, _ in terms})
            yield LogProbQuery(tokens, columns, (start, terms))

    scores = np.zeros(len(mutants))
    most = max((len({term[1] for term in terms}) for terms in wanted.values()), default=1)
    for done, (query, log_probs) in enumerate(run_queries(model, queries(), most), 1):
        start, terms = query.context
        rows, indices, old, new = zip(*terms, strict=True)
        at = np.searchsorted(query.columns, np.array(indices) - start + 1)
        logp = log_probs.astype(np.float64)
        np.add.at(scores, np.array(rows), logp[at, _ids(new)] - logp[at, _ids(old)])
        on_progress(len(mutants) * done / len(wanted))
    return scores


def _pseudo_log_ratios(model, wild_type, mutants, limit, on_progress) -> np.ndarray:
    """PLL(mutant) - PLL(wild type), both over the same window, of each mutant."""
    windows = [_window(wild_type, mutant.name, mutant.sites, limit) for mutant in mutants]
    sequences: dict[tuple, str] = {(None, window): wild_type for window in windows}
    for row, (mutant, window) in enumerate(zip(mutants, windows, strict=True)):
        sequences[row, window] = mutant.apply_to(wild_type)

    def queries() -> Iterator[LogProbQuery]:
        for key, sequence in sequences.items():
            tokens = _tokens(sequence[slice(*key[1])].encode())
            yield from _one_masked(tokens, range(1, len(tokens) - 1), key)

    pll = dict.fromkeys(sequences, 0.0)
    total = sum(stop - start for _, (start, stop) in sequences)
    for done, (query, log_probs) in enumerate(run_queries(model, queries()), 1):
        key, token = query.context
        pll[key] += float(log_probs[0, token])
        on_progress(len(mutants) * done / total)
    return np.array([pll[row, w] - pll[None, w] for row, w in enumerate(windows)])


def _one_masked(tokens: np.ndarray, columns, key: Any) -> Iterator[LogProbQuery]:
    """One query for each of `columns`, with that token masked; context (key, the token)."""
    for column in columns:
        masked = tokens.copy()
        masked[column] = tokenizer.MASK
        yield LogProbQuery(masked, [column], (key, int(tokens[column])))


def _tokens(window: bytes) -> np.ndarray:
    """Token ids of a part of a normalized sequence, of which a `*` at its end is no final stop."""
    return tokenizer.add_specials(tokenizer.residue_ids(window))


def _ids(letters: Sequence[str]) -> np.ndarray:
    return tokenizer.residue_ids("".join(letters).encode())


def _window(wild_type: str, name: str, sites: Sequence, limit: int) -> tuple[int, int]:
    first, last = min(sites)[0], max(sites)[0]
    window = centered_window(first, last, len(wild_type), limit)
    if window is None:
        raise UserError(
            f"{name}: its sites are {last - first + 1} residues apart, the model reads {limit} at "
            "once; leave the mutant out, or score its parts with --additive"
        )
    return window


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
            tokens = _tokens(sequence[:max_residues])
            known = (tokens >= tokenizer.FIRST_RESIDUE) & ~np.isin(tokens, missing)
            residues[i] = known.sum()
            yield from _one_masked(tokens, np.flatnonzero(known).tolist(), i)

    for query, log_probs in run_queries(model, queries()):
        i, token = query.context
        nats[i] -= float(log_probs[0, token])
        on_progress(1)
    return residues, nats
