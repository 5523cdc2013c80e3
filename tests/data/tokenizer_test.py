"""Which characters of a sequence are residues; vocabularies of other models as rows of ours."""

import string

import numpy as np
import pytest

from esm1nv_jax.common.errors import UserError
from esm1nv_jax.data import tokenizer
from esm1nv_jax.data.tokenizer import ESM1NV, ESM2, vocabulary


@pytest.mark.parametrize(
    ("text", "expected", "changes"),
    [
        ("MKV", b"MKV", ()),
        (b"MKV", b"MKV", ()),
        ("mkV", b"MKV", ("lower case",)),
        ("MK--T.V", b"MKTV", ("gaps",)),
        ("MKTV**", b"MKTV", ("final stop",)),
        ("MKTV*-\n", b"MKTV", ("gaps", "final stop")),
        (" MK\tV\r\n", b"MKV", ("white space",)),
        ("M*KJ", b"M*KJ", ("inner stop, kept as <unk>", "letter J, kept as <unk>")),
        ("", b"", ()),
        ("-*", b"", ("gaps", "final stop")),
    ],
)
def test_what_is_normalized(text, expected, changes):
    assert tokenizer.normalize(text) == (expected, changes)


@pytest.mark.parametrize(
    ("text", "character", "index"),
    [
        ("MK1TV", "1", 2),
        ("MK[MASK]V", "[", 2),
        ("<cls>MKTV<eos>", "<", 0),
        ("m k-?", "?", 4),
        ("MKλV", "λ", 2),
        ("MK\u0130V", "\u0130", 2),  # its lower case has two characters
        (b"MK\xe9V", "\xe9", 2),
        ("MK\0", "\0", 2),
        ("MKéV1", "é", 2),
    ],
)
def test_what_is_refused_with_index_and_character(text, character, index):
    with pytest.raises(ValueError, match=f"at index {index} of the sequence") as error:
        tokenizer.normalize(text)
    assert (error.value.character, error.value.index) == (character, index)
    assert ascii(character) in str(error.value) and "\n" not in str(error.value)
    with pytest.raises(tokenizer.InvalidResidueError):
        tokenizer.encode(text)


def test_every_character_is_a_letter_normalized_or_refused():
    changed = string.ascii_lowercase + string.whitespace + "-."
    for code in range(256):
        text = f"M{chr(code)}K"
        if chr(code) in string.ascii_uppercase + "*":
            assert tokenizer.normalize(text).sequence == text.encode()
        elif chr(code) in changed:
            kept = chr(code).upper() if chr(code).isalpha() else ""
            assert tokenizer.normalize(text).sequence == f"M{kept}K".encode()
        else:
            with pytest.raises(tokenizer.InvalidResidueError):
                tokenizer.normalize(text)


def test_one_token_per_letter():
    ids = tokenizer.encode("mk*Xjv*")
    assert tokenizer.decode(ids) == "<s>MK<unk>X<unk>V</s>"
    np.testing.assert_array_equal(ids, tokenizer.add_specials(tokenizer.residue_ids(b"MK*XJV")))


def test_kept_characters():
    assert tokenizer.normalize("M?k-", keep=b"?").sequence == b"M?K"


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
