"""The vocabulary of ESM-1nv: 30 tokens, one token a residue, always.

Ids equal those of the released model's tokenizer wherever a sequence holds valid residues only.
Where it does not, the released tokenizer merges runs of unknown characters into one `<unk>` and
does not raise lower case, so that rows of an embedding no longer line up with residues; here every
character is one token.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

SPECIALS = ("<unk>", "<s>", "</s>", "<pad>", "<mask>")
RESIDUES = "LASGVERTDIPKNFQYHMCWXBZUO"
TOKENS = (*SPECIALS, *RESIDUES)

UNK, BOS, EOS, PAD, MASK = range(5)
FIRST_RESIDUE = len(SPECIALS)
STANDARD = 20  # residues FIRST_RESIDUE .. FIRST_RESIDUE + 19 are the standard amino acids
VOCABULARY = len(TOKENS)  # 30
PADDED_VOCABULARY = 128  # rows of the embedding: a multiple of 128 keeps matrix units full

_WHITE_SPACE = b" \t\n\r\v\f"
_IDS = np.full(256, UNK, np.uint8)
for _i, _letter in enumerate(RESIDUES):
    _IDS[[ord(_letter), ord(_letter.lower())]] = FIRST_RESIDUE + _i


@dataclasses.dataclass(frozen=True)
class Cleaned:
    """A sequence as it will be tokenised, and what was done to it."""

    sequence: bytes  # upper case, no white space, no final stop
    unknown: int  # characters that are no residue letter; each becomes one `<unk>`


def clean(sequence: bytes | str) -> Cleaned:
    """Raises lower case, removes white space and one trailing `*`, counts what is no residue.

    A character outside ASCII is one unknown character, whatever its length in UTF-8.
    """
    if isinstance(sequence, str):
        sequence = sequence.encode("ascii", "replace")
    sequence = sequence.translate(None, _WHITE_SPACE).upper()
    if sequence.endswith(b"*"):
        sequence = sequence[:-1]
    return Cleaned(sequence, int(np.count_nonzero(residue_ids(sequence) == UNK)))


def residue_ids(sequence: bytes) -> np.ndarray:
    """Ids of a cleaned sequence without specials: uint8 [length]."""
    return _IDS[np.frombuffer(sequence, np.uint8)]


def encode(sequence: bytes | str) -> np.ndarray:
    """Ids of `<s> residues </s>`: uint8 [residues + 2]. The sequence is cleaned first."""
    return np.concatenate(([BOS], residue_ids(clean(sequence).sequence), [EOS])).astype(np.uint8)


def decode(ids: Sequence[int] | np.ndarray) -> str:
    """The tokens of `ids`, joined; ids of the padding rows of the vocabulary raise ValueError."""
    ids = np.asarray(ids)
    if ids.size and (ids.min() < 0 or ids.max() >= VOCABULARY):
        raise ValueError(f"token ids lie in 0..{VOCABULARY - 1}, found {ids.min()}..{ids.max()}")
    return "".join(TOKENS[i] for i in ids)
