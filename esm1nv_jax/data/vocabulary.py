"""The vocabulary of a model that was trained elsewhere, as seen from ours.

Ids are always our own, so that the tokenizer, the input stream, masking and every verb serve any
model. A model keeps its own tokens in `EncoderConfig.vocabulary`, in the order of its own ids; its
embedding rows lie in our order: a token that we have at our id, any other (ESM-2's `.`, `-` and
`<null_1>`) in a row behind ours. A residue that the model never learned (AntiBERTy has no X, B, Z,
U and O) is read as `<unk>` and is never predicted.
"""

from __future__ import annotations

import dataclasses
import functools

import numpy as np

from esm1nv_jax.common.errors import UserError
from esm1nv_jax.data import tokenizer

# Other names of our special tokens: ESM-2's, and BERT's.
OURS = {
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
    """tokens: the model's own, by its own id. rows: where each of them lies among ours. size: rows
    of our embedding, a multiple of 128. missing: our ids that the model has no token for."""

    tokens: tuple[str, ...]
    rows: tuple[int, ...]
    size: int
    missing: tuple[int, ...]

    def own_id(self, row: int) -> int:
        """The model's own id of one of our ids, or of its `<unk>`."""
        return self.rows.index(tokenizer.UNK if row in self.missing else row)

    def predicted(self) -> np.ndarray:
        """bool [size]: rows that hold a token, the only ones with a probability."""
        return np.isin(np.arange(self.size), self.rows)


@functools.cache
def vocabulary(text: str) -> Vocabulary:
    """Takes apart tokens joined by single blanks, in the order of the model's own ids.

    Raises UserError where a special token or a standard amino acid is not among them.
    """
    tokens = tuple(text.split(" "))
    known = {name: i for i, name in enumerate(tokenizer.TOKENS)}
    rows, behind = [], len(known)
    for token in tokens:
        row = known.get(OURS.get(token, token))
        if row is None:
            row, behind = behind, behind + 1
        rows.append(row)
    twice = [token for i, token in enumerate(tokens) if rows[i] in rows[:i] or not token]
    if twice or len(set(tokens)) < len(tokens):
        again = [token for i, token in enumerate(tokens) if token in tokens[:i]]
        raise UserError(
            f"model.vocabulary has {(twice + again)[0]!r} twice, under this or another name; each "
            "of its tokens must stand there once, divided by single blanks"
        )
    missing = tuple(sorted(set(known.values()) - set(rows)))
    needed = range(tokenizer.FIRST_RESIDUE + tokenizer.STANDARD)
    lacking = [tokenizer.TOKENS[i] for i in missing if i in needed]
    if lacking:
        raise UserError(
            f"model.vocabulary ({len(tokens)} tokens) has no {', '.join(lacking)}; the 20 standard "
            "amino acids and unknown, start, end, padding and mask tokens must be among them"
        )
    unit = tokenizer.PADDED_VOCABULARY
    return Vocabulary(tokens, tuple(rows), -(-behind // unit) * unit, missing)
