"""Dropout whose bits are a function of what they are for, never stored and never a stream.

An element is kept when hash(seed, step, layer, site, global row, element) >= rate * 2**32. Of
attention probabilities, which are many, four share a hash and each compares a byte of it. The same
formula in NumPy, in XLA and in kernels gives the same bits, so neither the number of devices, nor
microbatches, nor rematerialisation, nor the attention backend can change what is dropped; the
backward pass draws the bits again instead of reading a mask from memory.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from esm1nv_jax.common import hashing

EMBEDDING, ATTENTION, ATTENTION_OUTPUT, FFN_OUTPUT = range(4)  # sites; the first has no layer


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class DropoutKey:
    """What the dropout of one step depends on, apart from layer, site and element."""

    step: jax.Array  # uint32 []: hash of (seed, step)
    rows_B: jax.Array  # uint32 [B]: number of each row in the global batch
    columns_BM: jax.Array | None = None  # int32: which of a row activations are of; None: all

    @classmethod
    def at(cls, seed: int, step, rows_B) -> DropoutKey:
        """The key of `step` (a traced or Python integer) of the run with this seed."""
        base = hashing.fold_all(seed, hashing.purpose("dropout"))
        return cls(hashing.fold(base, jnp.asarray(step).astype(jnp.uint32)), rows_B)

    def at_columns(self, columns_BM) -> DropoutKey:
        """The key of activations [B, M, *] of these columns of the rows."""
        return dataclasses.replace(self, columns_BM=columns_BM)

    def rows(self, layer: int, site: int):
        """uint32 [B]: one key a row for this layer and site."""
        return hashing.fold(
            hashing.fold(self.step, np.uint32(layer * 16 + site)), self.rows_B.astype(jnp.uint32)
        )


def dropout_mask(row_keys, element, rate: float):
    """bool: which elements are kept. `element` is uint32, its index in the row, row-major."""
    hashes = hashing.fold_scaled(row_keys, element * hashing.GOLDEN)
    return hashes >= np.uint32(round(rate * 2**32))


def attention_rate(rate: float) -> float:
    """The rate at which attention probabilities are dropped: the nearest of 1/256 to 255/256."""
    return min(max(round(rate * 256), 1), 255) / 256 if rate else 0.0


def attention_mask(row_keys, head, query, key, length: int, rate: float, first=(0, 0)):
    """bool: which attention probabilities of rows of `length` tokens are kept.

    Four of them, whose query and key differ only in bit 3, share the hash of the first of the four,
    element (head * length + query) * length + key. Each compares one byte: the key's bit selects
    the higher of two bytes, the query's the higher two. One thread of a GPU holds all four in the
    tile that a matrix unit makes, and so computes their hash once.

    Args:
      row_keys, head, query, key: uint32, broadcasting.
      length: of a row, which the element is counted by.
      rate: as configured; `attention_rate` is what is used.
      first: what `query` and `key` are counted from, multiples of 16. What depends on the tile
        alone stays apart, so that compilers find the equal hashes.
    """
    hashes = attention_hashes(row_keys, head, query, key, length, first)
    return kept_attention(hashes, query, key, rate)


def attention_hashes(row_keys, head, query, key, length: int, first=(0, 0)):
    """uint32: the hash that a probability shares; arguments as of `attention_mask`."""
    T, bit = np.uint32(length), np.uint32(8)
    start = (head * T + first[0]) * T + first[1]
    element = (query & ~bit) * T + (key & ~bit)
    return hashing.fold_scaled(row_keys, (start + element) * hashing.GOLDEN)


def kept_attention(hashes, query, key, rate: float):
    """bool: whether the byte of each probability keeps it; arguments as of `attention_mask`."""
    bit = np.uint32(8)
    shift = ((query & bit) << np.uint32(1)) | (key & bit)
    limit = np.uint32(round(attention_rate(rate) * 256))
    return (hashes & (np.uint32(255) << shift)) >= (limit << shift)


def dropout(x_BTD, rate: float, key: DropoutKey | None, layer: int, site: int):
    """Inverted dropout over [B, T, D]; the identity where `rate` is 0 or `key` is None."""
    if not rate or key is None:
        return x_BTD
    _, T, D = x_BTD.shape
    if key.columns_BM is None:
        column = jax.lax.broadcasted_iota(jnp.uint32, (T, D), 0)
    else:
        column = key.columns_BM.astype(jnp.uint32)[..., None]
    element = column * np.uint32(D) + jax.lax.broadcasted_iota(jnp.uint32, (T, D), 1)
    mask_BTD = dropout_mask(key.rows(layer, site)[:, None, None], element, rate)
    # A product, no selection: XLA would write the zeros to memory and read them at every site.
    return x_BTD * (mask_BTD * np.float32(1 / (1 - rate)))
