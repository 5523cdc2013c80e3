"""The vocabulary of a model that was trained elsewhere, mapped to ours.

Token ids are ours everywhere, so that the tokenizer, the input stream, masking and every verb work
with any model. `EncoderConfig.vocabulary` lists the model's tokens in the order of its ids. Its
embedding rows are in our order: a token that we have is at our id, any other (ESM-2's `.`, `-` and
`<null_1>`) in a row after ours. A residue without a token (AntiBERTy has none for X, B, Z, U and O)
is read as `<unk>` and never predicted.
"""

from __future__ import annotations

import dataclasses
import functools

import numpy as np

from esm1nv_jax.common.errors import UserError
from esm1nv_jax.data import tokenizer

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
ESM1NV = " ".join(tokenizer.TOKENS)
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

    def own_id(self, row: int) -> int:
        """The model's id of one of our ids; that of its `<unk>` where it has none."""
        return self.rows.index(tokenizer.UNK if row in self.missing else row)

    def predicted(self) -> np.ndarray:
        """Which rows hold a token, and so have a probability: bool [size]."""
        return np.isin(np.arange(self.size), self.rows)


@functools.cache
def vocabulary(text: str) -> Vocabulary:
    """Parses tokens in the order of the model's ids, separated by single blanks.

    Raises UserError where a special token or a standard amino acid is not among them.
    """
    tokens = tuple(text.split(" "))
    known = {name: i for i, name in enumerate(tokenizer.TOKENS)}
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
    required = range(tokenizer.FIRST_RESIDUE + tokenizer.STANDARD)
    absent = [tokenizer.TOKENS[i] for i in missing if i in required]
    if absent:
        raise UserError(
            f"model.vocabulary ({len(tokens)} tokens) has no {', '.join(absent)}; the 20 standard "
            "amino acids and unknown, start, end, padding and mask tokens must be among them"
        )
    multiple = tokenizer.PADDED_VOCABULARY
    return Vocabulary(tokens, tuple(rows), -(-end // multiple) * multiple, missing)
