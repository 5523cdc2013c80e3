"""The order of an epoch is a permutation; rows are packed best-fit decreasing."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from esm1nv_jax.data import packing
from esm1nv_jax.data.packing import EpochOrder
from esm1nv_jax.data.source import open_split


@settings(deadline=None)
@given(n=st.integers(1, 3000), block=st.integers(1, 70), near=st.integers(1, 500))
def test_every_order_visits_each_once(n, block, near):
    order = EpochOrder(n, seed=3, epoch=2, block=block, near=near)
    visited = np.concatenate([order(start, start + 97) for start in range(0, n, 97)])
    assert np.array_equal(np.sort(visited), np.arange(n))


def test_a_block_order_stays_near():
    n, block, near = 100_000, 64, 4096
    order = EpochOrder(n, 0, 0, block=block, near=near)
    stretch = order(0, near)
    assert len(np.unique(stretch // block)) <= near // block + 1
    assert np.abs(np.diff(stretch)).mean() > block  # and is shuffled within
    assert not np.array_equal(stretch, EpochOrder(n, 0, 1, block=block, near=near)(0, near))


def test_epochs_and_seeds_differ():
    orders = [EpochOrder(1000, seed, epoch)(0, 1000) for seed in (0, 1) for epoch in (0, 1)]
    for i, a in enumerate(orders):
        for b in orders[i + 1 :]:
            assert (a == b).mean() < 0.02


def plain_best_fit(tokens, row_length):
    """Item by item, longest first, into the fullest row with room: free space of each row."""
    free = []
    for size in sorted(tokens, reverse=True):
        fitting = [r for r, space in enumerate(free) if space >= size]
        if not fitting:
            free.append(row_length)
            fitting = [len(free) - 1]
        row = min(fitting, key=lambda r: free[r])
        free[row] -= size
    return sorted(free)


@settings(deadline=None, max_examples=400)
@given(data=st.data(), row_length=st.integers(3, 60))
def test_best_fit_is_the_plain_algorithm(data, row_length):
    tokens = np.array(data.draw(st.lists(st.integers(1, row_length), max_size=80)), np.int64)
    row = packing.best_fit(tokens, row_length)
    rows = int(row.max()) + 1 if len(row) else 0
    used = np.bincount(row, weights=tokens, minlength=rows) if len(row) else np.zeros(0)
    assert sorted(row_length - used) == plain_best_fit(tokens.tolist(), row_length)


@pytest.mark.parametrize("wrong", [[0, 3], [3, 11]])
def test_what_does_not_fit_is_refused(wrong):
    with pytest.raises(ValueError, match=r"1\.\.10"):
        packing.best_fit(np.array(wrong), 10)


@pytest.mark.parametrize(("row_length", "least"), [(512, 0.985), (1024, 0.995)])
def test_rows_are_full(row_length, least):
    lengths = np.asarray(open_split("sample", "train").lengths, np.int64)
    tokens = np.minimum(lengths, row_length - 2) + 2
    rows = 0
    for start in range(0, 4 * packing.WINDOW, packing.WINDOW):
        window = tokens[start : start + packing.WINDOW]
        rows += packing.best_fit(window, row_length).max() + 1
    assert tokens[: 4 * packing.WINDOW].sum() / (rows * row_length) >= least
