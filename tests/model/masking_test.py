"""Masking: counts, keys, fractions, and what may never be masked."""

import jax
import numpy as np
import pytest

from esm1nv_jax.common.errors import UserError
from esm1nv_jax.data import tokenizer
from esm1nv_jax.model import masking
from esm1nv_jax.model.encoder_config import EncoderConfig
from esm1nv_jax.training.objective import MaskedLM
from tests.model.rows import pack, random_tokens

mask = jax.jit(masking.mask, static_argnums=0)


def run(recipe, batch):
    names = ("tokens", "segment_ids", "mask_bits")
    return jax.device_get(mask(masking.recipe(recipe), *(batch[n] for n in names)))


def selected_columns(masked, row):
    return masked.prediction_positions_BM[row][masked.is_target_BM[row]]


@pytest.mark.parametrize(("recipe", "rate"), [("card", 0.15), ("shipped", 0.10)])
def test_each_sequence_loses_exactly_its_share_of_smallest_hash(recipe, rate):
    sequences = [random_tokens(n, n) for n in (1, 2, 9, 10, 11, 30, 47, 100)]
    batch = pack([sequences], 256)
    masked = run(recipe, batch)
    chosen = selected_columns(masked, 0)
    start = 0
    for tokens in sequences:
        residues = np.arange(start + 1, start + len(tokens) - 1)
        count = max(1, round(rate * len(residues)))
        by_hash = residues[np.argsort(batch["mask_bits"][0, residues], kind="stable")]
        inside = chosen[(chosen >= start) & (chosen < start + len(tokens))]
        assert sorted(by_hash[:count]) == inside.tolist()
        start += len(tokens)
    assert masked.is_target_BM.sum() == sum(max(1, round(rate * (len(t) - 2))) for t in sequences)
    np.testing.assert_array_equal(
        masked.targets_BM[0][masked.is_target_BM[0]], batch["tokens"][0, chosen]
    )


def test_specials_padding_and_unknown_are_never_selected_nor_changed():
    tokens = random_tokens(0, 60)
    tokens[5:50] = tokenizer.UNK
    batch = pack([[tokens, np.array([1, 0, 0, 2], np.int32)], []], 96)
    masked = run("card", batch)
    chosen = selected_columns(masked, 0)
    assert len(chosen) == max(1, round(0.15 * 15))
    assert np.all(batch["tokens"][0, chosen] >= tokenizer.FIRST_RESIDUE)
    untouched = np.ones((2, 96), bool)
    untouched[0, chosen] = False
    np.testing.assert_array_equal(masked.inputs_BT[untouched], batch["tokens"][untouched])
    assert not masked.is_target_BM[1].any()


def many():
    """8 rows of 4 sequences of 120 residues, and what `recipe` makes of them."""
    rows = [[random_tokens(10 * r + s, 120) for s in range(4)] for r in range(64)]
    return pack(rows, 512)


def test_card_is_80_10_10_over_the_standard_residues():
    batch = many()
    masked = run("card", batch)
    at = np.take_along_axis(masked.inputs_BT, masked.prediction_positions_BM, 1)[
        masked.is_target_BM
    ]
    target = masked.targets_BM[masked.is_target_BM]
    n = len(at)
    is_mask, same = at == tokenizer.MASK, at == target
    np.testing.assert_array_equal(is_mask, masked.is_masked_BM[masked.is_target_BM])
    assert abs(is_mask.mean() - 0.8) < 4 * np.sqrt(0.16 / n)
    assert abs(same.mean() - (0.1 + 0.1 / 20)) < 4 * np.sqrt(0.1 / n)
    replaced = at[~is_mask & ~same]
    assert set(replaced) == set(range(5, 25))
    counts = np.bincount(replaced, minlength=25)[5:]
    assert (counts - counts.mean()).max() < 5 * np.sqrt(counts.mean())


def test_shipped_is_half_and_half_over_all_letters_and_never_the_original():
    batch = many()
    batch["tokens"][:, 100] = 29  # the last letter too must be replaced by another one
    masked = run("shipped", batch)
    at = np.take_along_axis(masked.inputs_BT, masked.prediction_positions_BM, 1)[
        masked.is_target_BM
    ]
    target = masked.targets_BM[masked.is_target_BM]
    assert not np.any(at == target)
    assert abs((at == tokenizer.MASK).mean() - 0.5) < 4 * np.sqrt(0.25 / len(at))
    assert set(at) - {tokenizer.MASK} == set(range(5, 30))


def test_a_sequence_is_masked_alike_in_any_row_and_company():
    one, two, three = (random_tokens(n, 40 + n) for n in range(3))
    together = run("card", pack([[one, two, three]], 160))
    apart = run("card", pack([[three], [two, one], []], 160))
    np.testing.assert_array_equal(
        together.inputs_BT[0, len(one) + len(two) :][: len(three)], apart.inputs_BT[0, : len(three)]
    )
    np.testing.assert_array_equal(
        together.inputs_BT[0, : len(one)], apart.inputs_BT[1, len(two) :][: len(one)]
    )


@pytest.mark.parametrize("rate", [0.1, 0.15, 0.3, 1.0])
@pytest.mark.parametrize("residues", [1, 2, 3, 4, 5, 7, 10, 17, 62])
def test_the_bound_holds_for_rows_full_of_sequences_of_one_length(rate, residues):
    per_row = 64 // (residues + 2)
    batch = pack([[random_tokens(i, residues) for i in range(per_row)]], 64)
    config = masking.recipe("card", rate)
    masked = jax.device_get(
        masking.mask(config, *(batch[n] for n in ("tokens", "segment_ids", "mask_bits")))
    )
    assert masked.is_target_BM.sum() == per_row * max(1, round(rate * residues))


@pytest.mark.parametrize(("rate", "row_length"), [(0.4, 71), (0.4, 551), (0.36, 159), (0.6, 23)])
def test_the_bound_is_exact_where_a_division_rounds_down(rate, row_length):
    batch = pack([[random_tokens(0, row_length - 2)]], row_length)
    masked = mask(
        masking.recipe("card", rate), *(batch[n] for n in ("tokens", "segment_ids", "mask_bits"))
    )
    assert masked.is_target_BM.sum() == round(rate * (row_length - 2))


def test_equal_hashes_still_give_the_exact_count():
    batch = pack([[random_tokens(0, 50)]], 64)
    batch["mask_bits"][:] = 7
    assert selected_columns(run("card", batch), 0).tolist() == list(range(1, 9))


def test_unknown_recipe_and_rates_are_refused():
    with pytest.raises(UserError, match="card, shipped"):
        masking.recipe("bert")
    with pytest.raises(UserError, match="masking rate"):
        masking.recipe("card", 0.0)


def test_a_rate_that_changes_passes_through_the_recipes_of_its_rates():
    batch = pack([[random_tokens(s, 100) for s in range(4)]], 512)
    arrays = [batch[n] for n in ("tokens", "segment_ids", "mask_bits")]
    falling = masking.recipe("card", 0.30, 0.15)
    chosen = []
    for progress, rate in ((0.0, 0.30), (0.4, 0.24), (1.0, 0.15), (None, 0.15)):
        found = jax.device_get(mask(falling, *arrays, progress))
        alone = jax.device_get(mask(masking.recipe("card", rate), *arrays))
        np.testing.assert_array_equal(found.inputs_BT, alone.inputs_BT)
        chosen.append(set(selected_columns(found, 0).tolist()))
        assert chosen[-1] == set(selected_columns(alone, 0).tolist())
    assert [len(columns) for columns in chosen] == [120, 96, 60, 60]
    assert chosen[2] < chosen[1] < chosen[0]
    rising = masking.recipe("card", 0.15, 0.30)
    assert jax.device_get(mask(rising, *arrays, 0.0)).is_target_BM.sum() == 60


def test_a_rate_that_changes_is_that_of_the_step():
    batch = pack([[random_tokens(s, 100) for s in range(4)]], 512)
    model = EncoderConfig()
    objective = MaskedLM(masking.recipe("card", 0.30, 0.15), horizon=10)
    counts = [
        int(objective.targets(model, batch | step).is_target_BM.sum())
        for step in ({"step": 0}, {"step": 4}, {"step": 10}, {"step": 99}, {})
    ]
    assert counts == [120, 96, 60, 60, 60]


def test_a_last_rate_above_1_is_refused():
    with pytest.raises(UserError, match=r"final_rate 1\.5"):
        masking.recipe("card", 0.15, 1.5)
