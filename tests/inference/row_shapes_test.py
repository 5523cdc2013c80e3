"""Properties of the layout of rows."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from esm1nv_jax.inference.row_shapes import MUCH_WORK, RowShapes, pack_rows, pad_rows

SHAPES = RowShapes.up_to(1026, 2048, 3)
SIZES = st.lists(st.integers(3, 1026), min_size=1, max_size=200).map(np.array)


def test_the_longest_row_is_no_longer_than_it_must_be():
    assert SHAPES.lengths == (64, 128, 256, 384, 512, 768, 1024, 1056)
    assert RowShapes.up_to(66, 2048, 1).lengths == (64, 96)
    assert RowShapes.up_to(5000, 2048, 1).lengths[-3:] == (2048, 4096, 5024)


@given(SIZES)
def test_every_item_stands_in_one_row_that_holds_it(sizes):
    for plan in (pad_rows, pack_rows):
        batches = list(plan(sizes, SHAPES))
        items = [item for batch in batches for row in batch.rows for item in row]
        assert sorted(items) == list(range(len(sizes)))
        for batch in batches:
            assert batch.length in SHAPES.lengths
            assert 0 < len(batch.rows) <= SHAPES.rows(batch.length)
            for row in batch.rows:
                assert sizes[row].sum() <= batch.length
                assert len(row) <= SHAPES.slots(batch.length)


def test_peptides_left_over_take_no_more_slots_than_a_longer_row_has():
    sizes = np.array([3] * 500 + [120] * 80)
    for batch in pack_rows(sizes, RowShapes.up_to(256, 2048, 1)):
        assert max(map(len, batch.rows)) <= SHAPES.slots(batch.length)


@given(SIZES)
def test_packed_only_the_last_batch_of_the_longest_rows_is_not_full(sizes):
    batches = list(pack_rows(sizes, SHAPES))
    longest = max(batch.length for batch in batches)
    for batch in batches[:-1]:
        assert len(batch.rows) == SHAPES.rows(batch.length) or batch.length == longest


@given(SIZES, st.integers(0, 2**32 - 1))
def test_alone_an_item_has_the_row_of_its_own_length(sizes, seed):
    chosen = np.random.default_rng(seed).permutation(len(sizes))[: len(sizes) // 2 + 1]
    for subset in (sizes, sizes[chosen]):
        for batch in pad_rows(subset, SHAPES):
            for (item,) in batch.rows:
                assert batch.length == SHAPES.length(subset[item])


def test_rows_of_natural_proteins_are_full():
    sizes = np.random.default_rng(0).gamma(2.2, 160, 2000).clip(30, 1022).astype(int) + 2
    tokens = sum(batch.length * len(batch.rows) for batch in pack_rows(sizes, SHAPES))
    assert sizes.sum() / tokens > 0.9


def test_little_work_takes_one_shape():
    few = np.array([40, 300, 1000])
    assert SHAPES.for_work(few).lengths == (1024,)
    assert SHAPES.for_work(np.repeat(few, 100)) == SHAPES


def test_much_work_takes_rows_of_many_lengths_and_less_padding():
    sizes = np.random.default_rng(0).gamma(2.2, 160, 3000).clip(30, 510).astype(int) + 2
    shapes = RowShapes.up_to(1026, 2048, 1, compile_tokens=(sizes.sum() - 1) / MUCH_WORK)
    many = shapes.for_work(sizes)
    assert shapes.for_work(sizes[1:]) == shapes
    assert {*shapes.lengths} < {*many.lengths} and many.lengths[-1] == shapes.lengths[-1]
    padded = [
        sum(batch.length * chosen.rows(batch.length) for batch in pack_rows(sizes, chosen))
        for chosen in (shapes, many)
    ]
    assert padded[1] < 1.05 * sizes.sum() < padded[0]
    items = [i for batch in pack_rows(sizes, many) for row in batch.rows for i in row]
    assert sorted(items) == list(range(len(sizes)))


def test_a_batch_that_is_not_full_has_fewer_rows_where_that_is_worth_a_program():
    shapes = RowShapes.up_to(1026, 2048, 2, compile_tokens=500)
    assert [shapes.fewest_rows(512, needed) for needed in range(1, 9)] == [2, 2, 4, 4, 8, 8, 8, 8]
    assert [shapes.fewest_rows(64, needed) for needed in (1, 16, 17, 64)] == [16, 16, 32, 64]
    assert shapes.fewest_rows(1056, 1) == shapes.rows(1056) == 2
    for length in SHAPES.lengths:  # by default no program is worth it
        assert SHAPES.fewest_rows(length, 1) == SHAPES.rows(length)
