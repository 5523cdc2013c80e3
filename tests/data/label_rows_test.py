"""Labels lie in packed rows where their residues and proteins lie, cropped as they are."""

import numpy as np
import pytest

from esm1nv_jax.data import pipeline, tokenizer
from esm1nv_jax.data.packing import StreamConfig
from esm1nv_jax.data.source import Labels, MemorySource, subset

RNG = np.random.default_rng(0)
LETTERS = np.frombuffer(b"ACDEFGHIKLMNPQRSTVWY", np.uint8)
SEQUENCES = [RNG.choice(LETTERS, n).tobytes() for n in RNG.integers(3, 90, 60)]
RECORDS = [(f"p{i}", sequence) for i, sequence in enumerate(SEQUENCES)]
OFFSETS = np.concatenate(([0], np.cumsum([len(s) for s in SEQUENCES])))


def stream(crop: str, packed: bool = True) -> StreamConfig:
    return StreamConfig(seed=3, rows=4, row_length=128, max_residues=50, crop=crop, packed=packed)


def some_batches(source, config, evaluation: bool):
    if evaluation:
        return list(pipeline.evaluation_batches(source, config))
    batches = iter(pipeline.train_dataset(source, config))
    return [next(batches) for _ in range(12)]


@pytest.mark.parametrize("evaluation", [False, True])
@pytest.mark.parametrize(
    ("crop", "packed"), [("prefix", True), ("random", True), ("random", False)]
)
def test_a_residue_keeps_its_label(crop, packed, evaluation):
    """The label of a residue is its own token, but for those that are not used."""
    values = tokenizer.residue_ids(b"".join(SEQUENCES)).astype(np.int32)
    used = np.random.default_rng(1).random(len(values)) < 0.7
    source = MemorySource(RECORDS, Labels(np.where(used, values, -1), OFFSETS))
    seen = 0
    for batch in some_batches(source, stream(crop, packed), evaluation):
        labels, tokens = batch["labels"], batch["tokens"]
        is_used = labels >= 0
        np.testing.assert_array_equal(labels[is_used], tokens[is_used])
        is_residue = tokens >= tokenizer.FIRST_RESIDUE
        assert not is_used[~is_residue].any()
        assert 0.5 < is_used[is_residue].mean() < 0.9
        np.testing.assert_array_equal(
            batch["label_examples"], np.where(is_residue, batch["example_ids"], -1)
        )
        seen += int(is_used.sum())
    assert seen > 500


@pytest.mark.parametrize("crop", ["prefix", "random"])
def test_a_label_is_that_of_the_residue_and_not_of_its_place(crop):
    values = np.concatenate([np.arange(len(s)) for s in SEQUENCES]).astype(np.float32)
    source = MemorySource(RECORDS, Labels(values, OFFSETS))
    moved = False
    for batch in some_batches(source, stream(crop), False):
        for row, column in zip(*np.nonzero(batch["positions"] == 1), strict=True):
            example, start = batch["example_ids"][row, column], int(batch["labels"][row, column])
            moved |= start > 0
            n = int(np.sum(batch["segment_ids"][row] == batch["segment_ids"][row, column])) - 2
            here = batch["labels"][row, column : column + n]
            np.testing.assert_array_equal(here, np.arange(start, start + n))
            letters = tokenizer.residue_ids(SEQUENCES[example][start : start + n])
            np.testing.assert_array_equal(batch["tokens"][row, column : column + n], letters)
    assert moved == (crop == "random")


@pytest.mark.parametrize("shape", [(), (3,)])
@pytest.mark.parametrize("evaluation", [False, True])
def test_a_protein_keeps_its_label_whatever_its_row(shape, evaluation):
    numbers = np.arange(len(SEQUENCES), dtype=np.int32)
    values = numbers if not shape else np.stack([numbers, 2 * numbers, 3 * numbers], axis=1)
    source = MemorySource(RECORDS, Labels(values, None))
    for batch in some_batches(source, stream("prefix"), evaluation):
        assert batch["labels"].shape == (4, 42, *shape)
        first = (batch["positions"] == 0) & (batch["segment_ids"] > 0)
        rows, columns = np.nonzero(first)
        segments = batch["segment_ids"][rows, columns] - 1
        examples = batch["example_ids"][rows, columns]
        np.testing.assert_array_equal(batch["label_examples"][rows, segments], examples)
        np.testing.assert_array_equal(batch["labels"][rows, segments], values[examples])
        assert np.sum(batch["label_examples"] >= 0) == len(rows)


def test_labels_change_no_other_array_and_are_part_of_the_fingerprint():
    plain = MemorySource(RECORDS)
    labeled = MemorySource(RECORDS, Labels(np.arange(len(SEQUENCES), dtype=np.int32), None))
    pairs = zip(*(some_batches(s, stream("random"), False) for s in (plain, labeled)), strict=True)
    for without, batch in pairs:
        assert set(batch) - set(without) == {"labels", "label_examples"}
        for name, array in without.items():
            np.testing.assert_array_equal(batch[name], array)
    other = MemorySource(RECORDS, Labels(np.ones(len(SEQUENCES), np.int32), None))
    assert len({plain.fingerprint, labeled.fingerprint, other.fingerprint}) == 3


def test_a_subset_keeps_its_labels():
    numbers = np.repeat(np.arange(len(SEQUENCES)), [len(s) for s in SEQUENCES]).astype(np.int32)
    some = subset(MemorySource(RECORDS, Labels(numbers, OFFSETS)), 7)
    for i, name in enumerate(some.ids(range(7))):
        assert set(some.labels.of(i).tolist()) == {int(name[1:])}
