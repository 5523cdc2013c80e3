"""Dropout bits: one formula, the same bits everywhere, close to random."""

import itertools

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


def test_the_shorter_hash_is_the_hash():
    keys, values = np.random.default_rng(0).integers(2**32, size=(2, 2**20), dtype=np.uint32)
    found = hashing.fold_scaled(keys, values * hashing.GOLDEN)
    np.testing.assert_array_equal(found, hashing.fold(keys, values))


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


def attention_bits(rate=0.1, step=0, layer=0, site=dropout.ATTENTION, T=128, tile=0):
    """bool [8 rows, 4 heads, T, T] of a row that is longer than the tile drawn here."""
    row_keys = dropout.DropoutKey.at(0, step, np.arange(8, dtype=np.uint32)).rows(layer, site)
    n, q, k = np.ogrid[:4, :T, :T]
    masks = [
        dropout.attention_mask(key, *(x.astype(np.uint32) for x in (n, q + tile, k)), 1000, rate)
        for key in np.asarray(row_keys)
    ]
    return np.stack(masks)


@pytest.mark.parametrize("rate", [0.1, 0.3, 0.5, 0.001, 0.9999])
def test_attention_probabilities_are_dropped_at_the_nearest_rate_of_256(rate):
    used = dropout.attention_rate(rate)
    assert used * 256 == min(max(round(rate * 256), 1), 255)
    drawn = attention_bits(rate)
    sigma = np.sqrt(used * (1 - used))
    assert abs(drawn.mean() - (1 - used)) < 4 * sigma / np.sqrt(drawn.size)
    for axis in range(4):  # rows, heads, queries, keys
        others = tuple(a for a in range(4) if a != axis)
        count = drawn.size / drawn.shape[axis]
        assert np.abs(drawn.mean(others) - (1 - used)).max() < 4.5 * sigma / np.sqrt(count)


@pytest.mark.parametrize("rate", [0.1, 0.5])
def test_attention_dropout_is_independent_of_whatever_is_near(rate):
    """Most of all of the other three that share a hash: each pair, three and all four."""
    drawn = attention_bits(rate)
    used = dropout.attention_rate(rate)
    centred = (drawn - (1 - used)) / np.sqrt(used * (1 - used))  # mean 0, variance 1
    four = centred.reshape(8, 4, 8, 2, 8, 8, 2, 8).transpose(3, 6, 0, 1, 2, 4, 5, 7).reshape(4, -1)
    for size in (2, 3, 4):
        for chosen in itertools.combinations(four, size):
            assert abs(np.prod(chosen, axis=0).mean()) < 4.5 / np.sqrt(four.shape[1])
    near = [np.roll(centred, by, axis) for axis, by in ((0, 1), (0, 2), (1, 1))]
    near += [np.roll(centred, by, axis) for axis in (2, 3) for by in (1, 2, 4, 7, 9, 16)]
    near += [np.roll(centred, (8, by), (2, 3)) for by in (1, 16, -8)]
    near.append(np.triu(centred.swapaxes(2, 3), 1))
    for changes in ({"step": 1}, {"layer": 1}, {"site": dropout.FFN_OUTPUT}, {"tile": 128}):
        near.append((attention_bits(rate, **changes) - (1 - used)) / np.sqrt(used * (1 - used)))
    for other in near:
        assert abs((centred * other).mean()) < 4.5 / np.sqrt(centred.size)


def test_a_tile_draws_the_bits_of_its_place():
    n, q, k = (x.astype(np.uint32) for x in np.ogrid[:2, :80, :96])
    key = np.uint32(99)
    whole = dropout.attention_mask(key, n, q, k, 96, 0.3)
    first = (np.uint32(32), np.uint32(16))
    tile = dropout.attention_mask(key, n, q[:, :48], k[..., :80], 96, 0.3, first)
    np.testing.assert_array_equal(tile, whole[:, 32:80, 16:])


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
