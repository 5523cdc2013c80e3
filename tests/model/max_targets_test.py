"""The bound on the targets of a row, by the lengths of a data set: never too low, and little too
high."""

import itertools

import jax
import numpy as np
import pytest

from esm1nv_jax.data.packing import StreamConfig
from esm1nv_jax.data.pipeline import evaluation_batches, train_dataset
from esm1nv_jax.data.source import MemorySource
from esm1nv_jax.model import masking
from esm1nv_jax.model.encoder_config import EncoderConfig
from esm1nv_jax.model.masking import max_targets, max_targets_of_any
from esm1nv_jax.training.objective import MaskedLM

LETTERS = np.frombuffer(b"ACDEFGHIKLMNPQRSTVWY", np.uint8)


def stream(row_length, max_residues=None, packed=True):
    return StreamConfig(0, 4, row_length, max_residues or row_length - 2, packed=packed)


def count(rate, residues):
    return max(1, round(rate * residues))


def most_of_all_choices(rate, row_length, lengths):
    """The most targets of any choice of the sequences that fits into a row: exact, by trying."""
    best = [0] * (row_length + 1)
    for residues in lengths:
        for room in range(row_length, residues + 1, -1):
            best[room] = max(best[room], best[room - residues - 2] + count(rate, residues))
    return best[row_length]


@pytest.mark.parametrize("rate", [0.1, 0.15, 0.3, 0.37, 1.0])
def test_no_choice_of_sequences_has_more_and_some_has_hardly_fewer(rate):
    random = np.random.default_rng(0)
    for _ in range(60):
        row_length = int(random.integers(8, 130))
        longest = int(random.integers(1, row_length - 1))
        lengths = random.integers(1, longest + 1, int(random.integers(1, 40)))
        bound = max_targets(rate, stream(row_length), lengths)
        most = most_of_all_choices(rate, row_length, lengths.tolist())
        # One sequence in part, a multiple of 8, and halves rounded up.
        assert most <= bound <= max(8, most + count(rate, longest) + 8 + len(lengths))
        assert bound <= row_length


def test_a_few_tiny_sequences_cost_a_few_entries_only():
    lengths = np.random.default_rng(0).integers(30, 900, 100_000)
    assert max_targets_of_any(0.15, 512) == 170
    assert max_targets(0.15, stream(512), lengths) == 80
    assert max_targets(0.15, stream(512), np.append(lengths, [1, 2, 3])) == 88
    assert max_targets(0.15, stream(512), np.append(lengths, [1] * 1000)) == 176
    assert max_targets(0.15, stream(512, packed=False), np.append(lengths, [1] * 1000)) == 77


def test_long_sequences_count_as_they_are_cropped():
    assert max_targets(0.5, stream(64, max_residues=20), np.array([5000])) == 16  # of 10
    assert max_targets(0.5, stream(64, max_residues=20, packed=False), np.array([5000])) == 10
    many = np.append(np.ones(100, np.uint16), np.full(3 * 2**20, 60, np.uint16))
    assert max_targets(0.15, stream(64), many) == 24  # counted in several parts


@pytest.mark.parametrize("final_rate", [0.0, 0.15, 0.45])
@pytest.mark.parametrize("packed", [True, False])
def test_no_target_of_a_stream_is_lost(packed, final_rate):
    """By the numbers of targets that the recipe asks of each sequence, at every rate in between."""
    random = np.random.default_rng(1)
    lengths = [*random.integers(1, 8, 300), *random.integers(8, 200, 40)]
    source = MemorySource(
        [(str(i), random.choice(LETTERS, n).tobytes()) for i, n in enumerate(lengths)]
    )
    layout = stream(64, packed=packed)
    recipe = masking.recipe("card", 0.3, final_rate)
    most = max_targets(recipe.highest_rate, layout, source.lengths)
    objective = MaskedLM(recipe, 7, most)
    targets = jax.jit(lambda batch: objective.targets(EncoderConfig(), batch))
    names = ("tokens", "segment_ids", "mask_bits")
    batches = [
        ({name: batch[name] for name in names}, {"step": step})
        for step, batch in zip(range(9), itertools.cycle(train_dataset(source, layout)))
    ]
    batches += [({n: b[n] for n in names}, {}) for b in evaluation_batches(source, layout)]
    seen = 0
    for arrays, step in batches:
        masked = jax.device_get(targets(arrays | step))
        rate = np.float32(0.3)
        if final_rate:
            share = np.float32(min(step.get("step", 7) / 7, 1))
            rate = rate + np.float32(final_rate - 0.3) * share
        rate = rate if final_rate and step else final_rate or 0.3
        for row, ids in enumerate(arrays["segment_ids"]):
            residues = np.bincount(ids)[1:] - 2
            asked = [max(1, round(float(rate * n))) for n in residues[residues > 0]]
            assert masked.is_target_BM[row].sum() == sum(asked)
        assert masked.is_target_BM.shape[1] == most
        seen = max(seen, masked.is_target_BM.sum(axis=1).max())
    assert seen > most / 2
