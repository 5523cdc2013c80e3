"""Packed rows for tests, made without the project's packer."""

import numpy as np


def random_tokens(seed: int, residues: int) -> np.ndarray:
    """`<s>`, standard residues, `</s>`."""
    letters = np.random.default_rng(seed).integers(5, 25, residues)
    return np.concatenate(([1], letters, [2])).astype(np.int32)


def pack(rows: list[list[np.ndarray]], row_length: int) -> dict[str, np.ndarray]:
    """A batch of rows, each a list of token sequences, padded at its end."""
    shape = (len(rows), row_length)
    batch = {
        "tokens": np.full(shape, 3, np.int32),
        "segment_ids": np.zeros(shape, np.int32),
        "positions": np.zeros(shape, np.int32),
        "mask_bits": np.full(shape, 0xFFFFFFFF, np.uint32),
    }
    for r, sequences in enumerate(rows):
        start = 0
        for s, tokens in enumerate(sequences):
            part = slice(start, start + len(tokens))
            batch["tokens"][r, part] = tokens
            batch["segment_ids"][r, part] = s + 1
            batch["positions"][r, part] = np.arange(len(tokens))
            bits = np.random.default_rng(int(tokens.sum())).integers(0, 2**32, len(tokens))
            batch["mask_bits"][r, part] = bits
            start += len(tokens)
    return batch
