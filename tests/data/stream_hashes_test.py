"""Batches keep the bits that they had before Grain carried the stream, however they are made.

The table was recorded with the stream that this one replaced. A difference here means that a run
does not go on with the batches it would have seen: never record the table anew to pass the test.
"""

import functools
import hashlib
import itertools

import numpy as np
import pytest

from esm1nv_jax.common.hashing import fold, fold_all
from esm1nv_jax.data import packing, tokenizer
from esm1nv_jax.data.packing import StreamConfig
from esm1nv_jax.data.pipeline import evaluation_batches, train_dataset
from esm1nv_jax.data.source import MemorySource, open_split
from esm1nv_jax.data.splits import Groups

ARRAYS = ("tokens", "segment_ids", "positions", "example_ids", "mask_bits")
PROCESSES = (1, 2, 3, 5)
SHORT = dict(seed=7, rows=151, row_length=128, max_residues=90)

# name: (data set, StreamConfig, first place, batches, hash of them)
TRAINING = {
    "packed": ("2500", SHORT, (0, 0, 0), 26, "e9c8f459cde9d747"),
    "packed, late": ("2500", SHORT, (3, 1, 40), 12, "0bb26c0a0962bdb6"),
    "random crops": ("2500", SHORT | dict(crop="random"), (0, 0, 0), 12, "9c7108d814034f1b"),
    "padded": ("2500", SHORT | dict(packed=False), (0, 1, 0), 12, "a8bc61a6dc042d1a"),
    "padded, random crops": (
        "2500",
        SHORT | dict(packed=False, crop="random", seed=2**40 + 1),
        (1, 1, 17),
        12,
        "58267e2c596aafd9",
    ),
    "one per group": (
        "groups",
        SHORT | dict(sample="one_per_group"),
        (0, 0, 0),
        12,
        "5ef38203a2bcc196",
    ),
    "one per group, late": (
        "groups",
        SHORT | dict(sample="one_per_group", crop="random"),
        (9, 0, 100),
        12,
        "77c1f0d43f47a4cb",
    ),
    "blocks": ("2500", SHORT | dict(block=16), (0, 0, 0), 12, "48c0cb2e3e15d7e6"),
    "blocks of a long epoch": (
        "70000",
        dict(seed=1, rows=500, row_length=64, max_residues=20, block=64),
        (1, 33, 200),
        8,
        "5cb27a45261b99e8",
    ),
    "many epochs in a batch": (
        "7",
        dict(seed=3, rows=31, row_length=140, max_residues=100),
        (0, 0, 0),
        9,
        "2c65865f0228d8a8",
    ),
    "bundled sample": (
        "sample",
        dict(seed=0, rows=64, row_length=512, max_residues=510),
        (2, 4, 500),
        5,
        "d8a27ce3afa8fe2a",
    ),
}
# name: (data set, StreamConfig, hash of all batches)
EVALUATION = {
    "packed": ("2500", SHORT, "692044868e85fccb"),
    "random crops": ("2500", SHORT | dict(crop="random"), "06d4181724f40c52"),
    "padded": ("2500", SHORT | dict(packed=False), "a3834fd7aad60661"),
    "fewer than rows": ("7", SHORT, "6dae4b224db9b48f"),
    "bundled sample": (
        "sample",
        dict(seed=0, rows=64, row_length=512, max_residues=510),
        "4e191c3d972d2552",
    ),
}


@functools.cache
def source(name, split="train"):
    """A data set whose lengths and residues come from the project's hash alone."""
    if name == "sample":
        return open_split("sample", split)
    n = 3000 if name == "groups" else int(name)
    lengths = 1 + fold(fold_all(n, 1), np.arange(n, dtype=np.uint32)) % (16 if n > 10_000 else 160)
    letters = np.frombuffer(tokenizer.RESIDUES.encode(), np.uint8)
    drawn = fold(fold_all(n, 2), np.arange(lengths.sum(), dtype=np.uint32)) % len(letters)
    text, ends = letters[drawn].tobytes(), np.cumsum(lengths).tolist()
    starts = [0, *ends[:-1]]
    data = MemorySource(
        [(f"p{i}", text[a:b]) for i, (a, b) in enumerate(zip(starts, ends, strict=True))]
    )
    if name == "groups":
        data.groups = Groups.of(fold(fold_all(n, 3), np.arange(n, dtype=np.uint32)) % 1200)
    return data


def slices(rows, processes):
    return [slice(i * rows // processes, (i + 1) * rows // processes) for i in range(processes)]


def digest(batches):
    """Hash of global batches, each a list of the parts of it that the processes made."""
    found = hashlib.sha256()
    for parts in batches:
        for name in ARRAYS:
            values = np.concatenate([part[name] for part in parts])
            found.update(f"{name} {values.dtype} {values.shape}".encode())
            found.update(values.tobytes())
    return found.hexdigest()[:16]


def from_place(data, config, place, rows):
    """Iterates from row `row` of window `window` of epoch `epoch` on."""
    epoch, window, row = place
    examples = len(data.lengths) if config.sample == "all" else len(data.groups.first) - 1
    windows = -(-examples // packing.WINDOW)
    iterator = iter(train_dataset(data, config, rows))
    iterator.set_state({"parent": {"next_index": epoch * windows + window}, "batch_idx": row})
    return iterator


@pytest.mark.parametrize("processes", PROCESSES)
@pytest.mark.parametrize("name", TRAINING)
def test_training_batches(name, processes):
    data, values, place, batches, expected = TRAINING[name]
    data, config = source(data), StreamConfig(**values)
    parts = [from_place(data, config, place, rows) for rows in slices(config.rows, processes)]
    assert digest(itertools.islice(zip(*parts, strict=True), batches)) == expected


@pytest.mark.parametrize("processes", PROCESSES)
@pytest.mark.parametrize("name", EVALUATION)
def test_evaluation_batches(name, processes):
    data, values, expected = EVALUATION[name]
    data, config = source(data, "validation"), StreamConfig(**values)
    parts = [evaluation_batches(data, config, rows) for rows in slices(config.rows, processes)]
    assert digest(zip(*parts, strict=True)) == expected
