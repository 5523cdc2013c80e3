"""How well a model predicts residues it does not see, on masks that are fixed by the proteins.

The mask of a protein is keyed by the hash of its sequence and a seed, so the same proteins give the
same figure in any order of the file, with any batch, on any number of devices, and every model is
asked the same questions.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np

from esm1nv_jax.common.errors import UserError
from esm1nv_jax.data import tokenizer
from esm1nv_jax.data.pipeline import Batch
from esm1nv_jax.data.source import Source
from esm1nv_jax.data.stream_config import SPECIALS, StreamConfig
from esm1nv_jax.data.vocabulary import vocabulary
from esm1nv_jax.inference.grouped_mean import Tally
from esm1nv_jax.inference.model import Model
from esm1nv_jax.model import baselines, encoder
from esm1nv_jax.model.masking import Masked

LENGTHS = (100, 200, 300, 400, 600, 800, 1024)  # classes by length end here, inclusive
FIRST, STANDARD = tokenizer.FIRST_RESIDUE, tokenizer.STANDARD
AMINO_ACIDS = tokenizer.RESIDUES[:STANDARD]
# What is averaged, over all selected positions (no suffix) or over `<mask>` positions only; `_20`
# is renormalised over the 20 amino acids, with targets among them, as other models can be asked.
QUANTITIES = ("loss", "loss_mask", "right_mask", "loss_mask_20", "unigram", "composition", "gain")
IN_FLIGHT = 2  # batches dispatched before the first is fetched


@dataclasses.dataclass
class Evaluation:
    """Sums of an evaluation. `figures` makes of them what a person reads."""

    groups: list[str]  # names of classes of proteins beside those by length
    by_length: dict[str, Tally]  # quantity: classes of LENGTHS, the last is longer
    by_group: dict[str, Tally]
    overall: dict[str, Tally]  # one class
    by_residue: dict[str, Tally]  # classes are the residue letters that stood there
    substitution: np.ndarray  # [20, 20]: sums of p(predicted b) over `<mask>` positions that were a
    sequences: int = 0
    cropped: int = 0

    def figures(self) -> dict[str, Any]:
        lengths = [f"{a + 1}-{b}" for a, b in zip((0, *LENGTHS[:-1]), LENGTHS, strict=True)]
        lengths.append(f"over {LENGTHS[-1]}")
        return {
            "sequences": self.sequences,
            "cropped": self.cropped,
            "overall": _row(self.overall, 0),
            "by_residue": _rows(self.by_residue, list(tokenizer.RESIDUES)),
            "by_length": _rows(self.by_length, lengths),
            "by_group": _rows(self.by_group, self.groups),
        }


def _rows(tallies: dict[str, Tally], names: list[str]) -> dict[str, dict]:
    some = next(iter(tallies.values()))
    return {name: _row(tallies, k) for k, name in enumerate(names) if some.positions[k]}


def _row(tallies: dict[str, Tally], k: int) -> dict[str, float]:
    """Perplexities and accuracies of one class, each with its standard error as `_se`."""
    found: dict[str, float] = {
        "sequences": int(tallies["loss"].sequences[k]),
        "positions": int(tallies["loss"].positions[k]),
        "positions_mask": int(tallies["loss_mask"].positions[k]),
    }
    names = {
        "loss": "perplexity",
        "loss_mask": "perplexity_mask",
        "loss_mask_20": "perplexity_mask_20",
        "unigram": "unigram_mask",
        "composition": "composition_mask",
    }
    for quantity, name in names.items():
        if quantity in tallies:
            found[name], found[f"{name}_se"] = tallies[quantity].perplexity(k)
    for quantity, name in {"right_mask": "accuracy_mask", "gain": "nats_gained_mask"}.items():
        if quantity in tallies:
            found[name], found[f"{name}_se"] = tallies[quantity].mean(k)
    return found


def stream_of(model: Model, seed: int, max_residues: int | None = None) -> StreamConfig:
    """Rows as long as the model reads at once; longer proteins are cut to a prefix.

    Raises UserError where `max_residues` is more than the model has positions for.
    """
    room = model.config.positions - SPECIALS
    if max_residues is not None and not 1 <= max_residues <= room:
        raise UserError(
            f"--max-residues {max_residues}: this model has {model.config.positions} positions; "
            f"give 1 to {room}"
        )
    kept = max_residues or model.longest
    shapes = model.placed.shapes
    length = max(shapes.lengths[-1], kept + SPECIALS)
    return StreamConfig(seed, rows=shapes.rows(length), row_length=length, max_residues=kept)


def evaluate(
    model: Model,
    source: Source,
    stream: StreamConfig,
    corrupted: Iterator[tuple[Batch, Masked]],
    groups: dict[str, str] | None = None,
) -> Iterator[Evaluation]:
    """Yields the sums after every batch, the same object each time.

    Args:
      corrupted: batches of `source` with their masks, from `masks.drawn` or `masks.given`.
      groups: id to the name of a class of proteins, for figures by class.
    """
    unigram = baselines.unigram(residue_counts(source))
    names = sorted(set(groups.values())) if groups else []
    found = Evaluation(
        names,
        *({q: Tally.empty(n) for q in QUANTITIES} for n in (len(LENGTHS) + 1, len(names), 1)),
        {q: Tally.empty(baselines.LETTERS) for q in QUANTITIES},
        np.zeros((STANDARD, STANDARD)),
    )
    found.cropped = int((np.asarray(source.lengths) > stream.max_residues).sum())
    group_of = None
    if groups is not None:
        order = {name: k for k, name in enumerate(names)}
        ids = source.ids(range(len(source.lengths)))
        group_of = np.array([order.get(groups.get(name, ""), -1) for name in ids])
        if (group_of < 0).all():
            raise UserError(f"--groups names none of the {len(ids)} proteins, such as {ids[0]}")
    unanswerable = np.array(vocabulary(model.config.vocabulary).missing, np.int64)
    waiting: collections.deque = collections.deque()

    def collect() -> Evaluation:
        batch, masked, logp = waiting.popleft()
        logp = np.asarray(jax.device_get(logp))
        values = _positions(batch, masked, logp, unigram, unanswerable)
        _count(found, source, batch, values, group_of)
        return found

    for batch, masked in corrupted:
        arrays = (masked.inputs_BT, batch["segment_ids"], batch["positions"], masked.index_BM)
        on_device = jax.device_put(arrays, model.placed.rows)
        logp = predict(model.placed.params, *on_device, model.config, model.compute)
        waiting.append((batch, masked, logp))
        if len(waiting) == IN_FLIGHT:
            yield collect()
    while waiting:
        yield collect()


@functools.partial(jax.jit, static_argnames=("config", "compute"))
def predict(params, inputs_BT, segment_ids_BT, positions_BT, index_BM, config, compute):
    """log p of every token at the positions asked for: fp32 [B, M, VOCABULARY]."""
    output = encoder.forward(
        config, params, inputs_BT, segment_ids_BT, positions_BT, compute=compute, index_BM=index_BM
    )
    return jax.nn.log_softmax(output.logits, axis=-1)[..., : tokenizer.VOCABULARY]


def residue_counts(source: Source, chunk: int = 4096) -> np.ndarray:
    """How often each residue letter stands in the proteins themselves: int64 [25]."""
    counts = np.zeros(baselines.LETTERS, np.int64)
    for start in range(0, len(source.lengths), chunk):
        some = source.sequences(range(start, min(start + chunk, len(source.lengths))))
        ids = tokenizer.residue_ids(b"".join(some))
        counts += np.bincount(ids[ids >= FIRST] - FIRST, minlength=baselines.LETTERS)
    return counts


@dataclasses.dataclass(frozen=True)
class _Positions:
    """The predicted positions of a batch; one element each."""

    example: np.ndarray
    letter: np.ndarray  # that stood there, from 0
    masked: np.ndarray  # bool
    values: dict[str, np.ndarray]  # quantity: what is to be averaged,
    where: dict[str, np.ndarray]  # and at which positions it is
    share: np.ndarray  # [n, 20]: p of each amino acid, renormalised over the 20


def _positions(
    batch: Batch, masked: Masked, logp_BMV: np.ndarray, unigram, unanswerable
) -> _Positions:
    """Left out: unknown letters, which a file of masks may ask for, and letters that the model has
    no token for. All other questions are the same for every model."""
    rows, entries = np.nonzero(masked.selected_BM)
    at, targets = masked.index_BM[rows, entries], masked.targets_BM[rows, entries]
    residues = (targets >= FIRST) & ~np.isin(targets, unanswerable)
    rows, entries, at, targets = (x[residues] for x in (rows, entries, at, targets))
    logp = logp_BMV[rows, entries].astype(np.float64)
    own = np.arange(len(targets))
    mask = np.asarray(masked.masked_BM)[rows, entries]
    loss = -logp[own, targets]
    amino = logp[:, FIRST : FIRST + STANDARD]
    amino = amino - np.logaddexp.reduce(amino, axis=1, keepdims=True)
    letter = targets - FIRST
    standard = mask & (letter < STANDARD)
    plain = baselines.unigram_nats(unigram, targets)
    composition = baselines.composition_nats(
        unigram, masked.inputs_BT, batch["segment_ids"], rows, at, targets
    )
    values = {
        "loss": loss,
        "loss_mask": loss,
        "right_mask": (logp.argmax(axis=1) == targets).astype(np.float64),
        "loss_mask_20": -amino[own, np.minimum(letter, STANDARD - 1)],
        "unigram": plain,
        "composition": composition,
        "gain": composition - loss,  # of the model over the composition of the protein, paired
    }
    where = {q: mask for q in QUANTITIES} | {"loss": np.ones_like(mask), "loss_mask_20": standard}
    return _Positions(batch["example_ids"][rows, at], letter, mask, values, where, np.exp(amino))


def _count(found: Evaluation, source: Source, batch: Batch, p: _Positions, group_of) -> None:
    """Adds a batch. Every protein lies in one batch, whole, so its sums are complete here."""
    starts = (batch["segment_ids"] > 0) & (batch["positions"] == 0)
    examples = np.unique(batch["example_ids"][starts])
    found.sequences += int(starts.sum())
    protein = np.searchsorted(examples, p.example)
    length_class = np.searchsorted(LENGTHS, np.asarray(source.lengths)[examples])
    k = len(examples)
    for quantity in QUANTITIES:
        use = p.where[quantity]
        value, who, letter = p.values[quantity][use], protein[use], p.letter[use]
        n, total = np.bincount(who, minlength=k), np.bincount(who, value, minlength=k)
        found.overall[quantity].add(np.zeros(k, np.int64), n, total)
        found.by_length[quantity].add(length_class, n, total)
        if group_of is not None:
            known = group_of[examples] >= 0
            found.by_group[quantity].add(group_of[examples][known], n[known], total[known])
        pair = who * baselines.LETTERS + letter
        size = k * baselines.LETTERS
        n, total = np.bincount(pair, minlength=size), np.bincount(pair, value, minlength=size)
        found.by_residue[quantity].add(np.arange(size) % baselines.LETTERS, n, total)
    standard = p.masked & (p.letter < STANDARD)
    np.add.at(found.substitution, p.letter[standard], p.share[standard])
