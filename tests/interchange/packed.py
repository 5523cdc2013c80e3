"""Sequences for the comparisons with other tools, computed here in packed rows."""

import functools

import jax
import numpy as np

from esm1nv_jax.model import encoder
from tests.model.rows import pack

TOKENS = ("<unk>", "<s>", "</s>", "<pad>", "<mask>", *"LASGVERTDIPKNFQYHMCWXBZUO")
OUR_ID = {token: i for i, token in enumerate(TOKENS)} | {"_": 4}
LETTERS = "LASGVERTDIPKNFQYHMCW"


def proteins(seed, *lengths, masked=0.0):
    """Random sequences; a share of their residues are masked (`_`)."""
    rng = np.random.default_rng(seed)
    return [
        "".join("_" if rng.random() < masked else c for c in rng.choice(list(LETTERS), n))
        for n in lengths
    ]


def our_ids(sequence):
    return np.array([1, *(OUR_ID.get(c, 0) for c in sequence), 2], np.int32)


def run_packed(weights, rows, row_length):
    """{sequence: (hidden states, the last after the final norm; logits)} of rows of sequences."""
    config = weights.model
    layers = (*range(config.layers), -1 if config.norm == "pre" else config.layers)
    batch = pack([[our_ids(s) for s in row] for row in rows], row_length)
    out = _forward(
        config, layers, weights.params, batch["tokens"], batch["segment_ids"], batch["positions"]
    )
    found = {}
    for r, row in enumerate(rows):
        start = 0
        for sequence in row:
            part = slice(start, start + len(sequence) + 2)
            hidden = [np.asarray(out.hidden[layer][r, part]) for layer in layers]
            found[sequence] = hidden, np.asarray(out.logits[r, part])
            start = part.stop
    return found


@functools.partial(jax.jit, static_argnums=(0, 1))
def _forward(config, layers, params, *arrays):
    return encoder.forward(config, params, *arrays, hidden_layers=layers)


def columns(tokens):
    """Where each token of another vocabulary stands among our logits, worked out by name."""
    names = {"<cls>": "<s>", "[CLS]": "<s>", "<eos>": "</s>", "[SEP]": "</s>"}
    names |= {"[PAD]": "<pad>", "[UNK]": "<unk>", "[MASK]": "<mask>"}
    rows, behind = [], 30
    for token in tokens:
        rows.append(OUR_ID.get(names.get(token, token), behind))
        behind += rows[-1] == behind
    return rows


def differences(there, weights, rows, row_length, tokens):
    """The largest difference of each hidden state, and of the logits, over all sequences.

    there: {sequence: (hidden states by layer, logits)}, of as many tokens as the other tool has.
    """
    here = run_packed(weights, rows, row_length)
    worst = np.zeros(weights.model.layers + 2)
    for sequence, (hidden, logits) in there.items():
        our_hidden, our_logits = here[sequence]
        length = len(logits)
        assert len(hidden) == len(our_hidden) == weights.model.layers + 1
        apart = [np.abs(a[:length] - b).max() for a, b in zip(our_hidden, hidden, strict=True)]
        apart.append(np.abs(our_logits[:length, columns(tokens)] - logits).max())
        worst = np.maximum(worst, apart)
    return worst
