"""Dropout whose bits are a function of what they are for, never stored and never a stream.

An element is kept when hash(seed, step, layer, site, global row, element) >= rate * 2**32. The same
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

    @classmethod
    def at(cls, seed: int, step, rows_B) -> DropoutKey:
        """The key of `step` (a traced or Python integer) of the run with this seed."""
        base = hashing.fold_all(seed, hashing.purpose("dropout"))
        return cls(hashing.fold(base, jnp.asarray(step).astype(jnp.uint32)), rows_B)

    def rows(self, layer: int, site: int):
        """uint32 [B]: one key a row for this layer and site."""
        return hashing.fold(
            hashing.fold(self.step, np.uint32(layer * 16 + site)), self.rows_B.astype(jnp.uint32)
        )


def threshold(rate: float) -> np.uint32:
    """Elements whose hash lies below this are dropped."""
    return np.uint32(round(rate * 2**32))


def dropout_mask(row_keys, element, rate: float):
    """bool: which elements are kept. `element` is uint32, its index in the row, row-major."""
    return hashing.hash_at_least(row_keys, element * hashing.GOLDEN, threshold(rate))


def dropout(x_BTD, rate: float, key: DropoutKey | None, layer: int, site: int):
    """Inverted dropout over [B, T, D]; the identity where `rate` is 0 or `key` is None."""
    if not rate or key is None:
        return x_BTD
    _, T, D = x_BTD.shape
    element_TD = jax.lax.broadcasted_iota(jnp.uint32, (T, D), 0) * np.uint32(
        D
    ) + jax.lax.broadcasted_iota(jnp.uint32, (T, D), 1)
    mask_BTD = dropout_mask(key.rows(layer, site)[:, None, None], element_TD, rate)
    # A product, no selection: XLA would write the zeros to memory and read them at every site.
    return x_BTD * (mask_BTD * np.float32(1 / (1 - rate)))
