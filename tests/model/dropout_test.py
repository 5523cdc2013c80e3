"""Dropout bits: one formula, the same bits everywhere, close to random."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from esm1nv_jax.common import hashing
from esm1nv_jax.model import dropout


def literal(seed, step, layer, site, row, element):
    """The formula in Python integers, written from its description alone."""
    word = 0xFFFFFFFF

    def mix(x):
        x = (x ^ (x >> 16)) * 0x7FEB352D & word
        x = (x ^ (x >> 15)) * 0x846CA68B & word
        return x ^ (x >> 16)

    def fold(key, value):
        x = (value * 0x9E3779B9 & word) ^ key
        x = ((x ^ (x >> 16)) * 0x7FEB352D & word) ^ mix((key + 0x9E3779B9) & word)
        x = (x ^ (x >> 15)) * 0x846CA68B & word
        return x ^ (x >> 16)

    name = 2166136261
    for byte in b"dropout":
        name = (name ^ byte) * 16777619 & word
    key = fold(fold(fold(0, seed), name), step)
    return fold(fold(fold(key, layer * 16 + site), row), element)


def test_xla_draws_the_bits_of_the_formula():
    rows = jnp.array([3, 700], jnp.uint32)

    @jax.jit
    def kept(step, x):
        key = dropout.DropoutKey.at(5, step, rows)
        return dropout.dropout(x, 0.25, key, 2, dropout.FFN_OUTPUT)

    found = np.asarray(kept(11, jnp.ones((2, 4, 8))))
    for b, row in enumerate((3, 700)):
        for t in range(4):
            for d in range(8):
                bits = literal(5, 11, 2, dropout.FFN_OUTPUT, row, t * 8 + d)
                assert found[b, t, d] == (np.float32(1 / 0.75) if bits >= 2**30 else 0)


@pytest.mark.parametrize("threshold", [0, 1, 2**16, round(0.1 * 2**32), 0x9999FFFF, 2**32 - 1])
def test_the_shorter_comparison_is_that_of_the_hash(threshold):
    """Most of all where the upper halves of the hash and of the threshold are equal."""
    draw = np.random.default_rng(threshold)
    keys, values = draw.integers(2**32, size=(2, 2**20), dtype=np.uint32)
    hashes = hashing.fold(keys, values)
    for limit in (np.uint32(threshold), *hashes[:9], *(hashes[:9] ^ np.uint32(1))):
        found = hashing.hash_at_least(keys, values * hashing.GOLDEN, limit)
        np.testing.assert_array_equal(found, hashes >= limit)


def bits(step=0, layer=0, site=0, rows=64, elements=4096):
    key = dropout.DropoutKey.at(0, step, np.arange(rows, dtype=np.uint32))
    row_keys = np.asarray(key.rows(layer, site))
    return dropout.dropout_mask(row_keys[:, None], np.arange(elements, dtype=np.uint32)[None], 0.1)


def test_rates_and_correlations_are_those_of_chance():
    drawn = bits()
    n = drawn.size
    sigma = np.sqrt(0.09 / n)
    assert abs(drawn.mean() - 0.9) < 4 * sigma
    assert np.abs(drawn.mean(1) - 0.9).max() < 5 * np.sqrt(0.09 / drawn.shape[1])
    assert np.abs(drawn.mean(0) - 0.9).max() < 5.5 * np.sqrt(0.09 / drawn.shape[0])
    centred = drawn - 0.9
    others = [bits(step=1), bits(layer=1), bits(site=1), np.roll(drawn, 1, 0), np.roll(drawn, 1, 1)]
    for other in others:
        assert abs((centred * (other - 0.9)).mean()) < 4.5 * 0.09 / np.sqrt(n)
    # No row is another one shifted: the keys are not offsets of one sequence.
    spectrum = np.fft.rfft(centred[:2], axis=1)
    across = np.fft.irfft(spectrum[0] * np.conj(spectrum[1])) / drawn.shape[1]
    assert np.abs(across).max() < 6 * 0.09 / np.sqrt(drawn.shape[1])


def test_no_key_or_no_rate_is_the_identity():
    x = jnp.arange(8.0).reshape(1, 2, 4)
    key = dropout.DropoutKey.at(0, 0, jnp.zeros(1, jnp.uint32))
    assert dropout.dropout(x, 0.5, None, 0, 0) is x
    assert dropout.dropout(x, 0.0, key, 0, 0) is x


def test_it_keeps_the_mean():
    x = jnp.ones((8, 64, 64))
    key = dropout.DropoutKey.at(0, 0, jnp.arange(8, dtype=jnp.uint32))
    mean = float(dropout.dropout(x, 0.1, key, 0, 1).mean())
    assert abs(mean - 1) < 4 * np.sqrt(0.1 / 0.9 / x.size)
