"""Vocabularies of other models as rows of ours."""

import numpy as np
import pytest

from esm1nv_jax.common.errors import UserError
from esm1nv_jax.data import tokenizer
from esm1nv_jax.data.vocabulary import ESM1NV, ESM2, vocabulary


def test_ours_is_the_identity():
    known = vocabulary(ESM1NV)
    assert known.rows == tuple(range(30))
    assert (known.size, known.missing) == (128, ())
    np.testing.assert_array_equal(known.predicted(), np.arange(128) < 30)


def test_esm2():
    known = vocabulary(ESM2)
    assert len(known.tokens) == 33
    # ids of fair-esm's alphabet, as its documentation and files have them
    for token, own, row in [
        ("<cls>", 0, 1),
        ("<pad>", 1, 3),
        ("<eos>", 2, 2),
        ("<unk>", 3, 0),
        ("L", 4, 5),
        ("C", 23, 23),
        ("<mask>", 32, 4),
    ]:
        assert known.tokens.index(token) == own
        assert known.rows[own] == row
        assert known.own_id(row) == own
    assert [known.rows[known.tokens.index(t)] for t in (".", "-", "<null_1>")] == [30, 31, 32]
    assert known.predicted().sum() == 33


def test_a_vocabulary_without_rare_letters():
    known = vocabulary("[PAD] [UNK] [CLS] [SEP] [MASK] A C D E F G H I K L M N P Q R S T V W Y")
    assert [tokenizer.TOKENS[i] for i in known.missing] == list("XBZUO")
    assert known.own_id(tokenizer.TOKENS.index("X")) == 1
    assert known.predicted().sum() == 25


def test_rows_grow_by_128():
    assert vocabulary(ESM1NV + " " + " ".join(f"<{i}>" for i in range(99))).size == 256


@pytest.mark.parametrize(
    ("text", "told"),
    [
        (ESM1NV.replace("<mask> ", ""), "has no <mask>"),
        (ESM1NV.replace("L ", ""), "has no L"),
        (ESM1NV + " L", "'L' twice"),
        (ESM1NV + " <cls>", "'<cls>' twice"),
        (ESM1NV + "  x", "'' twice"),
        (ESM1NV + " x x", "'x' twice"),
        ("", "twice|has no"),
    ],
)
def test_what_cannot_be_used_is_named(text, told):
    with pytest.raises(UserError, match=told) as error:
        vocabulary(text)
    assert "\n" not in str(error.value)
