"""Which characters of a sequence are residues."""

import string

import numpy as np
import pytest

from esm1nv_jax.data import tokenizer


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
