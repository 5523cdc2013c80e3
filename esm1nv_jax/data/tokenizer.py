"""The vocabulary of ESM-1nv: 30 tokens, one token per residue; and which letters are residues.

Ids equal those of the released model's tokenizer wherever a sequence holds residues only. Where it
does not, the released tokenizer merges runs of unknown characters into one `<unk>` and does not
convert lower case, so that rows of an embedding no longer line up with residues. Here a sequence is
normalized or refused, and every letter of it is one token.
"""

from __future__ import annotations

import string
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from esm1nv_jax.common.errors import UserError

SPECIALS = ("<unk>", "<s>", "</s>", "<pad>", "<mask>")
RESIDUES = "LASGVERTDIPKNFQYHMCWXBZUO"
TOKENS = (*SPECIALS, *RESIDUES)

UNK, BOS, EOS, PAD, MASK = range(5)
FIRST_RESIDUE = len(SPECIALS)
STANDARD = 20  # residues FIRST_RESIDUE .. FIRST_RESIDUE + 19 are the standard amino acids
VOCABULARY = len(TOKENS)  # 30
PADDED_VOCABULARY = 128  # rows of the embedding: a multiple of 128 keeps matrix units full

LETTERS = string.ascii_uppercase + "*"  # what a normalized sequence consists of; J and * are <unk>
_LINE_ENDS, _WHITE_SPACE, _GAPS = b"\r\n", b" \t\v\f", b"-."
_ACCEPTED = LETTERS.encode() + _LINE_ENDS + _WHITE_SPACE + _GAPS
_RESIDUES = RESIDUES.encode()
_IDS = np.full(256, UNK, np.uint8)
for _letters in (_RESIDUES, _RESIDUES.lower()):
    _IDS[np.frombuffer(_letters, np.uint8)] = np.arange(FIRST_RESIDUE, VOCABULARY)


class InvalidResidueError(UserError):
    """A character at an index (from 0) of a sequence that is neither a letter nor normalized."""

    def __init__(self, character: str, index: int):
        super().__init__(
            f"character {character!a} at index {index} of the sequence is no residue; sequences "
            "consist of letters (gaps, white space and final stops are removed)"
        )
        self.character, self.index = character, index


class Normalized(NamedTuple):
    """A sequence as it is tokenized, upper-case letters and inner `*`, and what was changed."""

    sequence: bytes
    changes: tuple[str, ...]


def normalize(sequence: bytes | str, keep: bytes = b"") -> Normalized:
    """Converts a sequence to upper case and removes white space, gaps (`-`, `.`) and final `*`.

    `J` and an inner `*` stay and become `<unk>`, characters of `keep` stay as they are. This is the
    one rule for sequences from anywhere: FASTA, tables and the Python API. Raises
    InvalidResidueError for any other character.
    """
    text = sequence.encode("ascii", "replace") if isinstance(sequence, str) else bytes(sequence)
    if not text.translate(None, _RESIDUES):
        return Normalized(text, ())
    upper = text.upper()
    if invalid := upper.translate(None, _ACCEPTED + keep):
        index = upper.index(invalid[:1])
        character = sequence[index : index + 1]
        if isinstance(character, bytes):
            character = character.decode("latin-1")
        raise InvalidResidueError(character, index)
    changes = []
    if upper != text:
        changes.append("lower case")
    joined = upper.translate(None, _LINE_ENDS)
    compact = joined.translate(None, _WHITE_SPACE)
    if len(compact) != len(joined):
        changes.append("white space")
    ungapped = compact.translate(None, _GAPS)
    if len(ungapped) != len(compact):
        changes.append("gaps")
    residues = ungapped.rstrip(b"*")
    if len(residues) != len(ungapped):
        changes.append("final stop")
    if b"*" in residues:
        changes.append("inner stop, kept as <unk>")
    if b"J" in residues:
        changes.append("letter J, kept as <unk>")
    return Normalized(residues, tuple(changes))


def residue_ids(sequence: bytes) -> np.ndarray:
    """Token ids of a normalized sequence without special tokens: uint8 [length]."""
    return _IDS[np.frombuffer(sequence, np.uint8)]


def encode(sequence: bytes | str) -> np.ndarray:
    """Token ids of `<s> residues </s>`: uint8 [residues + 2]. Normalizes the sequence first."""
    return add_specials(residue_ids(normalize(sequence).sequence))


def add_specials(ids: np.ndarray) -> np.ndarray:
    """Token ids of residues between `<s>` and `</s>`: uint8 [residues + 2]."""
    return np.concatenate(([BOS], ids, [EOS])).astype(np.uint8)


def decode(ids: Sequence[int] | np.ndarray) -> str:
    """The tokens of `ids`, joined; ids of the padding rows of the vocabulary raise ValueError."""
    ids = np.asarray(ids)
    if ids.size and (ids.min() < 0 or ids.max() >= VOCABULARY):
        raise ValueError(f"token ids lie in 0..{VOCABULARY - 1}, found {ids.min()}..{ids.max()}")
    return "".join(TOKENS[i] for i in ids)
