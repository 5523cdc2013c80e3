"""How well a model predicts residues it does not see, on masks that are fixed by the proteins.

The mask of a protein is keyed by the hash of its sequence and a seed, so the same proteins give the
same perplexity in any order of the file, with any batch, on any number of devices, and every model
is asked the same questions. Errors are by sequence: positions of one are not independent.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from typing import Any

import numpy as np

from esm1nv_jax.common.errors import UserError
from esm1nv_jax.data import tokenizer
from esm1nv_jax.data.packing import StreamConfig
from esm1nv_jax.data.pipeline import Batch
from esm1nv_jax.data.source import Source
from esm1nv_jax.data.tokenizer import vocabulary
from esm1nv_jax.inference.engine import run_batches
from esm1nv_jax.inference.model import Model
from esm1nv_jax.model import baselines
from esm1nv_jax.model.masking import Masked

LENGTHS = (100, 200, 300, 400, 600, 800, 1024)  # classes by length end here, inclusive
FIRST, STANDARD = tokenizer.FIRST_RESIDUE, tokenizer.STANDARD
# What is averaged over positions, and the name of exp of its mean or of the mean itself. Over all
# selected positions (no suffix) or over `<mask>` positions only; `_20` is renormalised over the 20
# amino acids, with targets among them, as other models can be asked.
PERPLEXITIES = {
    "loss": "perplexity",
    "loss_mask": "perplexity_mask",
    "loss_mask_20": "perplexity_mask_20",
    "unigram": "unigram_mask",
    "composition": "composition_mask",
}
MEANS = {"correct": "accuracy_mask", "gain": "nats_gained_mask"}
QUANTITIES = (*PERPLEXITIES, *MEANS)


@dataclasses.dataclass
class GroupedMean:
    """Means over positions with standard errors by sequence, for K groups. Sums, float64 [K].

    The error of a mean over positions is that of a ratio of sums over sequences: with l_i and n_i
    the sum and the number of positions of sequence i and R = sum l / sum n, the variance is
    k / (k - 1) sum (l_i - R n_i)^2 / (sum n)^2 over k sequences (Cochran, "Sampling Techniques",
    1977, section 6.4).
    """

    sequences: np.ndarray  # that have a position here
    positions: np.ndarray  # sum of n,
    total: np.ndarray  # l,
    total_squared: np.ndarray  # l^2,
    total_positions: np.ndarray  # l n
    positions_squared: np.ndarray  # and n^2

    @classmethod
    def zeros(cls, groups: int) -> GroupedMean:
        return cls(*(np.zeros(groups) for _ in dataclasses.fields(cls)))

    def add(self, group: np.ndarray, n: np.ndarray, total: np.ndarray) -> None:
        """Adds an entry a sequence (or a sequence and group): its group, positions and sum."""
        present = n > 0
        group, n, total = group[present], n[present].astype(float), total[present].astype(float)
        terms = (np.ones_like(n), n, total, total**2, total * n, n**2)
        for field, term in zip(dataclasses.fields(self), terms, strict=True):
            sums = getattr(self, field.name)
            sums += np.bincount(group, term, minlength=len(sums))

    def mean(self, k: int = 0) -> tuple[float, float]:
        """The mean over positions of group k and its standard error; NaN where it has none."""
        n, sequences = self.positions[k], self.sequences[k]
        if not n:
            return math.nan, math.nan
        mean = self.total[k] / n
        if sequences < 2:
            return float(mean), math.nan
        spread = self.total_squared[k] - 2 * mean * self.total_positions[k]
        spread += mean**2 * self.positions_squared[k]
        error = math.sqrt(max(spread, 0.0) * sequences / (sequences - 1)) / n
        return float(mean), error

    def perplexity(self, k: int = 0) -> tuple[float, float]:
        """exp of the mean, with the error of the mean carried through."""
        mean, error = self.mean(k)
        value = math.inf if mean >= 700 else math.exp(mean)  # NaN stays NaN
        return value, value * error


GroupedMeans = dict[str, GroupedMean]  # by quantity


@dataclasses.dataclass
class Evaluation:
    """Sums of an evaluation; `results` makes means of them."""

    groups: list[str]  # names of classes of proteins beside those by length
    overall: GroupedMeans  # one group
    by_length: GroupedMeans  # classes of LENGTHS, the last is longer
    by_group: GroupedMeans
    by_residue: GroupedMeans  # groups are the residue letters that stood there
    substitution: np.ndarray  # [20, 20]: sums of p(predicted b) over `<mask>` positions that were a
    sequences: int = 0
    cropped: int = 0

    @classmethod
    def zeros(cls, groups: list[str]) -> Evaluation:
        def zeros(n: int) -> GroupedMeans:
            return {quantity: GroupedMean.zeros(n) for quantity in QUANTITIES}

        return cls(
            groups,
            overall=zeros(1),
            by_length=zeros(len(LENGTHS) + 1),
            by_group=zeros(len(groups)),
            by_residue=zeros(baselines.LETTERS),
            substitution=np.zeros((STANDARD, STANDARD)),
        )

    def results(self) -> dict[str, Any]:
        """Perplexities and accuracies of everything and of each class, for JSON."""
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


def _rows(means: GroupedMeans, names: list[str]) -> dict[str, dict]:
    return {name: _row(means, k) for k, name in enumerate(names) if means["loss"].positions[k]}


def _row(means: GroupedMeans, k: int) -> dict[str, float]:
    """Perplexities and accuracies of one class, each with its standard error as `_se`."""
    row: dict[str, float] = {
        "sequences": int(means["loss"].sequences[k]),
        "positions": int(means["loss"].positions[k]),
        "positions_mask": int(means["loss_mask"].positions[k]),
    }
    for quantity, name in PERPLEXITIES.items():
        row[name], row[f"{name}_se"] = means[quantity].perplexity(k)
    for quantity, name in MEANS.items():
        row[name], row[f"{name}_se"] = means[quantity].mean(k)
    return row


def evaluation_stream(model: Model, seed: int) -> StreamConfig:
    """Rows as long as the model reads at once; longer proteins are cut to a prefix."""
    shapes = model.on_devices.shapes
    length = shapes.lengths[-1]
    return StreamConfig(seed, shapes.rows(length), length, model.longest)


def evaluate(
    model: Model,
    source: Source,
    stream: StreamConfig,
    corrupted: Iterator[tuple[Batch, Masked]],
    residue_counts: np.ndarray,
    groups: dict[str, str] | None = None,
) -> Iterator[Evaluation]:
    """Yields the sums after every batch, the same object each time.

    Args:
      corrupted: batches of `source` with their masks, from `fixed_masks.draw` or `apply`.
      residue_counts: of the unigram baseline [25], see `count_residues`.
      groups: id to the name of a class of proteins, for results by class.
    """
    unigram = baselines.unigram(residue_counts)
    names = sorted(set(groups.values())) if groups else []
    sums = Evaluation.zeros(names)
    sums.cropped = int((np.asarray(source.lengths) > stream.max_residues).sum())
    group_of = None
    if groups is not None:
        order = {name: k for k, name in enumerate(names)}
        ids = source.ids(range(len(source.lengths)))
        group_of = np.array([order.get(groups.get(name, ""), -1) for name in ids])
        if (group_of < 0).all():
            raise UserError(f"--groups names none of the {len(ids)} proteins, such as {ids[0]}")
    missing = np.array(vocabulary(model.config.vocabulary).missing, np.int64)

    def batches():
        for batch, masked in corrupted:
            arrays = {
                "tokens_BT": masked.inputs_BT,
                "segment_ids_BT": batch["segment_ids"],
                "positions_BT": batch["positions"],
                "prediction_positions_BM": masked.prediction_positions_BM,
            }
            yield arrays, (batch, masked)

    for results, (batch, masked) in run_batches(model.on_devices, batches()):
        _add_batch(sums, source, batch, masked, results["log_probs"], unigram, missing, group_of)
        yield sums


def count_residues(source: Source, most: int | None = None) -> np.ndarray:
    """How often each residue letter stands in the first `most` proteins, or in all: int64 [25]."""
    counts = np.zeros(baselines.LETTERS, np.int64)
    n = min(len(source.lengths), most or len(source.lengths))
    for start in range(0, n, 4096):
        ids = tokenizer.residue_ids(b"".join(source.sequences(range(start, min(start + 4096, n)))))
        counts += np.bincount(ids[ids >= FIRST] - FIRST, minlength=baselines.LETTERS)
    return counts


def _add_batch(
    sums: Evaluation,
    source: Source,
    batch: Batch,
    masked: Masked,
    logp_BMV: np.ndarray,
    unigram: np.ndarray,
    missing: np.ndarray,
    group_of: np.ndarray | None,
) -> None:
    """Adds a batch. Every protein lies in one batch, whole, so its sums are complete here.

    Left out: unknown letters, which a file of masks may ask for, and letters that the model has no
    token for. All other questions are the same for every model.
    """
    rows, entries = np.nonzero(masked.is_target_BM)
    positions_BM, targets_BM = map(np.asarray, (masked.prediction_positions_BM, masked.targets_BM))
    asked = (targets_BM[rows, entries] >= FIRST) & ~np.isin(targets_BM[rows, entries], missing)
    rows, entries = rows[asked], entries[asked]
    at, targets = positions_BM[rows, entries], targets_BM[rows, entries]
    is_mask = np.asarray(masked.is_masked_BM)[rows, entries]
    letter = targets - FIRST
    standard = is_mask & (letter < STANDARD)

    each = np.arange(len(targets))
    logp = logp_BMV[rows, entries].astype(np.float64)
    amino = logp[:, FIRST : FIRST + STANDARD]
    amino = amino - np.logaddexp.reduce(amino, axis=1, keepdims=True)
    np.add.at(sums.substitution, letter[standard], np.exp(amino[standard]))
    loss = -logp[each, targets]
    composition = baselines.composition_nats(
        unigram, masked.inputs_BT, batch["segment_ids"], rows, at, targets
    )
    values = {  # quantity: its value at every position, and where it counts
        "loss": (loss, np.ones_like(is_mask)),
        "loss_mask": (loss, is_mask),
        "loss_mask_20": (-amino[each, np.minimum(letter, STANDARD - 1)], standard),
        "unigram": (baselines.unigram_nats(unigram, targets), is_mask),
        "composition": (composition, is_mask),
        "correct": ((logp.argmax(axis=1) == targets).astype(np.float64), is_mask),
        "gain": (composition - loss, is_mask),  # over the composition of the protein, paired
    }

    starts = (batch["segment_ids"] > 0) & (batch["positions"] == 0)
    examples = np.unique(batch["example_ids"][starts])
    sums.sequences += int(starts.sum())
    protein = np.searchsorted(examples, batch["example_ids"][rows, at])
    length_class = np.searchsorted(LENGTHS, np.asarray(source.lengths)[examples])
    k, letters = len(examples), baselines.LETTERS
    for quantity, (value, used) in values.items():
        value, owner, of_letter = value[used], protein[used], letter[used]
        n, total = np.bincount(owner, minlength=k), np.bincount(owner, value, minlength=k)
        sums.overall[quantity].add(np.zeros(k, np.int64), n, total)
        sums.by_length[quantity].add(length_class, n, total)
        if group_of is not None:
            known = group_of[examples] >= 0
            sums.by_group[quantity].add(group_of[examples][known], n[known], total[known])
        pair, size = owner * letters + of_letter, k * letters
        n, total = np.bincount(pair, minlength=size), np.bincount(pair, value, minlength=size)
        sums.by_residue[quantity].add(np.arange(size) % letters, n, total)
