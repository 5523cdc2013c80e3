"""What the Python API accepts: sequences as str, bytes, `Bio.Seq` or `SeqRecord`; and what it
returns: embeddings, predictions at `<mask>`, predictions of a head."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Set

import numpy as np

from esm1nv_jax.common.errors import UserError
from esm1nv_jax.data import tokenizer
from esm1nv_jax.model.heads import HeadConfig


def as_list(texts: Iterable) -> list:
    """Refuses one text, which is as many as it has letters, and what has no order of its own."""
    if isinstance(texts, str | bytes | bytearray) or hasattr(texts, "seq") or _is_biopython(texts):
        raise UserError(f"{str(texts)[:20]!r} is one text; give a list, as in [text]")
    no_texts = isinstance(texts, Mapping | Set) or not isinstance(texts, Iterable)
    if no_texts or hasattr(texts, "columns") or getattr(texts, "ndim", 1) != 1:
        raise UserError(f"a {type(texts).__name__} is given; give a list of texts, or one column")
    return list(texts)


def sequence_ids(sequences: Iterable) -> list[np.ndarray]:
    """`residue_ids` of each of several sequences."""
    return [residue_ids(s, f"sequence {i}") for i, s in enumerate(as_list(sequences))]


def _is_biopython(value: object) -> bool:
    return type(value).__module__.partition(".")[0] == "Bio"


def residue_letters(sequence: object, name: str) -> bytes:
    """A sequence as FASTA files are read, with `?` for `<mask>`.

    Raises UserError, which begins with `name`, for what is no sequence of residue letters.
    """
    sequence = getattr(sequence, "seq", sequence)
    if isinstance(sequence, bytes | bytearray):
        sequence = sequence.decode("latin-1")
    elif _is_biopython(sequence):
        sequence = str(sequence)
    if not isinstance(sequence, str):
        raise UserError(
            f"{name} is {str(sequence)[:20]}, a {type(sequence).__name__}; give residue letters as "
            "str or bytes"
        )
    try:
        tokenizer.normalize(sequence.replace("<mask>", " " * len("<mask>")))
    except tokenizer.InvalidResidueError as error:
        raise UserError(f"{name}: {error}; <mask> stands for an unknown residue") from None
    letters, _ = tokenizer.normalize(sequence.replace("<mask>", "?"), keep=b"?")
    if not letters:
        raise UserError(f"{name} is empty; give at least one residue")
    return letters


def residue_ids(sequence: object, name: str) -> np.ndarray:
    """uint8 ids of the residues, `<mask>` included; no specials."""
    return letter_ids(residue_letters(sequence, name))


def letter_ids(letters: bytes) -> np.ndarray:
    """uint8 ids of what `residue_letters` returns, or of a part of it."""
    ids = tokenizer.residue_ids(letters)
    ids[np.frombuffer(letters, np.uint8) == ord("?")] = tokenizer.MASK
    return ids


@dataclasses.dataclass(frozen=True)
class Embeddings:
    """Of n sequences: `per_residue[i]` float32 [residues of sequence i, width], row j is residue j;
    `mean` float32 [n, width], over residues only; `cls` float32 [n, width], the state of `<s>`."""

    per_residue: list[np.ndarray]
    mean: np.ndarray
    cls: np.ndarray


@dataclasses.dataclass(frozen=True)
class Prediction:
    """One `<mask>`: its position (1-based) and residues with their probabilities, best first."""

    position: int
    residues: list[tuple[str, float]]


@dataclasses.dataclass(frozen=True)
class HeadPredictions:
    """What the head of a fine-tuned model predicts for n sequences.

    values: float32; `values[i]` is [residues of sequence i, K] of a head on residues, [K] of one on
      proteins. Probabilities in the order of `head.classes`, which add up to 1 in "classification"
      and are independent in "multilabel"; in "regression" K = 1, and it is the value itself.
    """

    head: HeadConfig
    values: list[np.ndarray]

    @property
    def labels(self) -> list[list[str]]:
        """Of each sequence the likeliest class of every residue, or of the protein."""
        if self.head.kind != "classification":
            raise UserError(f"a head for {self.head.kind} has no likeliest class; take .values")
        best = [np.atleast_2d(value).argmax(axis=1) for value in self.values]
        return [[self.head.classes[k] for k in classes] for classes in best]
