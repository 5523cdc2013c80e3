"""How well a model predicts residues it does not see, on masks that are fixed by the proteins.

The mask of a protein is keyed by the hash of its sequence and a seed, so the same proteins give the
same perplexity in any order of the file, with any batch, on any number of devices, and every model
is asked the same questions. Errors are by sequence: positions of one are not independent.
"""

from __future__ import annotations

import itertools
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


class GroupedMean:
    """Means over positions with standard errors by sequence, for K groups.

    The error of a mean over positions is that of a ratio of sums over sequences: with l_i and n_i
    the sum and the number of positions of sequence i and R = sum l / sum n, the variance is
    k / (k - 1) sum (l_i - R n_i)^2 / (sum n)^2 over k sequences (Cochran, "Sampling Techniques",
    1977, section 6.4).
    """

    def __init__(self, groups: int):
        # Of 1, n, l, l^2, l n, n^2 over the sequences that have a position.
        self._sums = np.zeros((6, groups))
        self.sequences, self.positions = self._sums[:2]  # views

    def add(self, group: np.ndarray, n: np.ndarray, total: np.ndarray) -> None:
        """Adds an entry a sequence (or a sequence and group): its group, positions and sum.

        Entries without positions, or of a negative group, are left out.
        """
        used = (n > 0) & (group >= 0)
        group, n, total = group[used], n[used].astype(float), total[used].astype(float)
        terms = (np.ones_like(n), n, total, total**2, total * n, n**2)
        for sums, term in zip(self._sums, terms, strict=True):
            sums += np.bincount(group, term, minlength=len(sums))

    def mean(self, k: int = 0) -> tuple[float, float]:
        """The mean over positions of group k and its standard error; NaN where it has none."""
        sequences, n, total, total_squared, products, n_squared = self._sums[:, k].tolist()
        if not n:
            return math.nan, math.nan
        mean = total / n
        if sequences < 2:
            return mean, math.nan
        spread = max(total_squared - 2 * mean * products + mean**2 * n_squared, 0.0)
        return mean, math.sqrt(spread * sequences / (sequences - 1)) / n

    def perplexity(self, k: int = 0) -> tuple[float, float]:
        """exp of the mean, with the error of the mean carried through."""
        mean, error = self.mean(k)
        value = math.inf if mean >= 700 else math.exp(mean)  # NaN stays NaN
        return value, value * error


class Evaluation:
    """Sums of an evaluation, as a whole and by classes; `results` makes means of them.

    `substitution` [20, 20] sums p(predicted b) over `<mask>` positions that were a.
    """

    def __init__(
        self,
        source: Source,
        max_residues: int,
        model_vocabulary: str,
        residue_counts: np.ndarray,
        groups: dict[str, str] | None,
    ):
        lengths = [f"{a + 1}-{b}" for a, b in itertools.pairwise((0, *LENGTHS))]
        classes = sorted(set(groups.values())) if groups else []
        self._names = {  # of the classes of each table
            "overall": ["all"],
            "by_residue": list(tokenizer.RESIDUES),  # that stood there
            "by_length": [*lengths, f"over {LENGTHS[-1]}"],
            "by_group": classes,
        }
        self._means = {
            table: {quantity: GroupedMean(len(names)) for quantity in QUANTITIES}
            for table, names in self._names.items()
        }
        self.substitution = np.zeros((STANDARD, STANDARD))
        self.sequences = 0
        self._lengths = np.asarray(source.lengths)
        self._cropped = int((self._lengths > max_residues).sum())
        self._unigram = baselines.unigram(residue_counts)
        self._missing = np.array(vocabulary(model_vocabulary).missing, np.int64)
        self._group_of = np.full(len(self._lengths), -1)
        if groups is not None:
            order = {name: k for k, name in enumerate(classes)}
            ids = source.ids(range(len(self._lengths)))
            self._group_of[:] = [order.get(groups.get(name, ""), -1) for name in ids]
            if (self._group_of < 0).all():
                raise UserError(f"--groups names none of the {len(ids)} proteins, such as {ids[0]}")

    @property
    def positions(self) -> int:
        """How many positions were predicted."""
        return int(self._means["overall"]["loss"].positions[0])

    def results(self) -> dict[str, Any]:
        """Perplexities and accuracies of everything and of each class, for JSON."""
        tables = {
            table: {
                name: _row(self._means[table], k)
                for k, name in enumerate(names)
                if table == "overall" or self._means[table]["loss"].positions[k]
            }
            for table, names in self._names.items()
        }
        counts = {"sequences": self.sequences, "cropped": self._cropped}
        return counts | tables | {"overall": tables["overall"]["all"]}

    def add(self, batch: Batch, masked: Masked, logp_BMV: np.ndarray) -> None:
        """Adds a batch. Every protein lies in one batch, whole, so its sums are complete here.

        Left out: unknown letters, which a file of masks may ask for, and letters that the model has
        no token for. All other questions are the same for every model.
        """
        rows, entries = np.nonzero(masked.is_target_BM)
        targets = np.asarray(masked.targets_BM)[rows, entries]
        asked = (targets >= FIRST) & ~np.isin(targets, self._missing)
        rows, entries, targets = rows[asked], entries[asked], targets[asked]
        at = np.asarray(masked.prediction_positions_BM)[rows, entries]
        is_mask = np.asarray(masked.is_masked_BM)[rows, entries]
        letter = targets - FIRST
        standard = is_mask & (letter < STANDARD)

        each = np.arange(len(targets))
        logp = logp_BMV[rows, entries].astype(np.float64)
        amino = logp[:, FIRST : FIRST + STANDARD]
        amino = amino - np.logaddexp.reduce(amino, axis=1, keepdims=True)
        np.add.at(self.substitution, letter[standard], np.exp(amino[standard]))
        loss = -logp[each, targets]
        composition = baselines.composition_nats(
            self._unigram, masked.inputs_BT, batch["segment_ids"], rows, at, targets
        )
        values = {  # quantity: its value at every position, and where it counts
            "loss": (loss, np.ones_like(is_mask)),
            "loss_mask": (loss, is_mask),
            "loss_mask_20": (-amino[each, np.minimum(letter, STANDARD - 1)], standard),
            "unigram": (baselines.unigram_nats(self._unigram, targets), is_mask),
            "composition": (composition, is_mask),
            "correct": ((logp.argmax(axis=1) == targets).astype(np.float64), is_mask),
            "gain": (composition - loss, is_mask),  # over the composition of the protein, paired
        }

        starts = (batch["segment_ids"] > 0) & (batch["positions"] == 0)
        examples = np.unique(batch["example_ids"][starts])
        self.sequences += int(starts.sum())
        protein = np.searchsorted(examples, batch["example_ids"][rows, at])
        k, letters = len(examples), baselines.LETTERS
        group_of = {  # of each protein, and of each protein and letter
            "overall": np.zeros(k, np.int64),
            "by_length": np.searchsorted(LENGTHS, self._lengths[examples]),
            "by_group": self._group_of[examples],
            "by_residue": np.arange(k * letters) % letters,
        }
        for quantity, (value, used) in values.items():
            for table, group in group_of.items():
                owner = protein * letters + letter if table == "by_residue" else protein
                n = np.bincount(owner[used], minlength=len(group))
                total = np.bincount(owner[used], value[used], minlength=len(group))
                self._means[table][quantity].add(group, n, total)


def _row(means: dict[str, GroupedMean], k: int) -> dict[str, float]:
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


def paired_difference(a: dict[str, Any], b: dict[str, Any]) -> tuple[float, float]:
    """How much higher the loss of `a` is than that of `b`, nats at `<mask>`, and its standard error
    by protein: both were asked the same, so what is hard for both cancels."""
    counts = np.array([row["positions_mask"] for row in a["by_protein"].values()])
    losses = [np.log([row["perplexity_mask"] for row in x["by_protein"].values()]) for x in (a, b)]
    mean = GroupedMean(1)
    mean.add(np.zeros(len(counts), np.int64), counts, counts * (losses[0] - losses[1]))
    return mean.mean()


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
      corrupted: batches of `source` with their masks, from `fixed_masks`.
      residue_counts: of the unigram baseline [25], see `baselines.count_residues`.
      groups: id to the name of a class of proteins, for results by class.
    """
    vocabulary = model.config.vocabulary
    sums = Evaluation(source, stream.max_residues, vocabulary, residue_counts, groups)

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
        sums.add(batch, masked, results["log_probs"])
        yield sums
