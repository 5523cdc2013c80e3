"""Embeddings as biotrainer's autoeval asks for them: generators of (sequence, embedding).

    from biotrainer.autoeval import autoeval_pipeline
    from esm1nv_jax import load
    from esm1nv_jax.inference.biotrainer import embedding_functions
    per_residue, per_sequence = embedding_functions(load("MODEL"))
    progress = autoeval_pipeline(
        "esm1nv", "FLIP",
        custom_embedding_function_per_residue=per_residue,
        custom_embedding_function_per_sequence=per_sequence,
    )
    reports = list(progress)

Files for its other commands are written by `esm1nv embed --layout biotrainer`.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator

import numpy as np

from esm1nv_jax.inference.model import Model

CHUNK = 256  # sequences embedded together

EmbeddingFunction = Callable[[Iterable[str]], Iterator[tuple[str, np.ndarray]]]


def embedding_functions(
    model: Model, layer: int = -1
) -> tuple[EmbeddingFunction, EmbeddingFunction]:
    """(per residue, per sequence): functions of sequences that yield each of them, in order, with
    its embedding, float32 [residues, width] or [width], of a layer as in `Model.embed`."""

    def embed(sequences: Iterable[str], per_residue: bool) -> Iterator[tuple[str, np.ndarray]]:
        remaining = iter(sequences)
        while chunk := list(itertools.islice(remaining, CHUNK)):
            embedded = model.embed(chunk, layer=layer)
            yield from zip(
                chunk, embedded.per_residue if per_residue else embedded.mean, strict=True
            )

    return lambda sequences: embed(sequences, True), lambda sequences: embed(sequences, False)
