"""Proteins made up for the tests, from a seed."""

import numpy as np

from esm1nv_jax.data import tokenizer


def made_up(n, seed=0, mean=300):
    """(id, description, sequence) of n proteins, as bytes; no id and no sequence twice."""
    rng = np.random.default_rng(seed)
    letters = np.frombuffer(tokenizer.RESIDUES[:20].encode(), np.uint8)
    lengths = np.maximum(20, rng.gamma(2, mean / 2, n).astype(int))
    return [
        (
            b"UniRef50_A%05d" % i,
            b"some protein n=%d Tax=Homo sapiens TaxID=9606 RepID=A%05d_X" % (i % 7, i),
            rng.choice(letters, length).tobytes(),
        )
        for i, length in enumerate(lengths)
    ]


def fasta(records, width=60, end=b"\n"):
    out = []
    for name, description, sequence in records:
        lines = [sequence[i : i + width] for i in range(0, len(sequence), width)]
        out += [b">" + name + (b" " + description if description else b""), *lines]
    return end.join(out) + end
