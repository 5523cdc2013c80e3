"""The tokens of ESM-1nv, one a residue; which letters are residues; other models' vocabularies.

Ids equal those of the released model's tokenizer wherever a sequence holds residues only. Where it
does not, the released tokenizer merges runs of unknown characters into one `<unk>` and does not
convert lower case, so that rows of an embedding no longer line up with residues. Here a sequence is
normalized or refused, and every letter of it is one token.

Token ids are ours everywhere, so that the input stream, masking and every command work with any
model. `EncoderConfig.vocabulary` lists the model's tokens in the order of its ids. Its embedding
rows are in our order: a token that we have is at our id, any other (ESM-2's `.`, `-` and
`<null_1>`) in a row after ours. A residue without a token (AntiBERTy has none for X, B, Z, U and O)
is read as `<unk>` and never predicted.
"""

from __future__ import annotations

import dataclasses
import functools
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
    joined = upper.translate(None, _LINE_ENDS)
    compact = joined.translate(None, _WHITE_SPACE)
    ungapped = compact.translate(None, _GAPS)
    residues = ungapped.rstrip(b"*")
    changes = {
        "lower case": upper != text,
        "white space": compact != joined,
        "gaps": ungapped != compact,
        "final stop": residues != ungapped,
        "inner stop, kept as <unk>": b"*" in residues,
        "letter J, kept as <unk>": b"J" in residues,
    }
    return Normalized(residues, tuple(name for name, changed in changes.items() if changed))


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


# Our names of the special tokens of ESM-2 and BERT.
ALIASES = {
    "<cls>": "<s>",
    "<eos>": "</s>",
    "[UNK]": "<unk>",
    "[CLS]": "<s>",
    "[SEP]": "</s>",
    "[PAD]": "<pad>",
    "[MASK]": "<mask>",
}
ESM1NV = " ".join(TOKENS)
# `transformers.models.esm.configuration_esm.get_default_vocab_list`
ESM2 = (
    "<cls> <pad> <eos> <unk> L A G V S E R T I D P K Q N F Y M H W C X B U Z O . - <null_1> <mask>"
)


@dataclasses.dataclass(frozen=True)
class Vocabulary:
    """A model's tokens and where they are in the embedding.

    tokens: by the model's id. rows: the embedding row of each token. size: rows of the embedding, a
    multiple of 128. missing: ids of ours that the model has no token for.
    """

    tokens: tuple[str, ...]
    rows: tuple[int, ...]
    size: int
    missing: tuple[int, ...]

    @property
    def letters(self) -> str:
        """The residues that have a token."""
        return "".join(x for i, x in enumerate(RESIDUES, FIRST_RESIDUE) if i not in self.missing)

    def own_id(self, row: int) -> int:
        """The model's id of one of our ids; that of its `<unk>` where it has none."""
        return self.rows.index(UNK if row in self.missing else row)

    def predicted(self) -> np.ndarray:
        """Which rows hold a token, and so have a probability: bool [size]."""
        return np.isin(np.arange(self.size), self.rows)


@functools.cache
def vocabulary(text: str) -> Vocabulary:
    """Parses tokens in the order of the model's ids, separated by single blanks.

    Raises UserError where a special token or a standard amino acid is not among them.
    """
    tokens = tuple(text.split(" "))
    known = {name: i for i, name in enumerate(TOKENS)}
    rows, end = [], len(known)
    for token in tokens:
        row = known.get(ALIASES.get(token, token))
        if row is None:
            row, end = end, end + 1
        rows.append(row)
    repeated = [token for i, token in enumerate(tokens) if rows[i] in rows[:i] or not token]
    repeated += [token for i, token in enumerate(tokens) if token in tokens[:i]]
    if repeated:
        raise UserError(
            f"model.vocabulary has {repeated[0]!r} twice, under this or another name; list each "
            "token once, separated by single blanks"
        )
    missing = tuple(sorted(set(known.values()) - set(rows)))
    required = range(FIRST_RESIDUE + STANDARD)
    absent = [TOKENS[i] for i in missing if i in required]
    if absent:
        raise UserError(
            f"model.vocabulary ({len(tokens)} tokens) has no {', '.join(absent)}; the 20 standard "
            "amino acids and unknown, start, end, padding and mask tokens must be among them"
        )
    multiple = PADDED_VOCABULARY
    return Vocabulary(tokens, tuple(rows), -(-end // multiple) * multiple, missing)
