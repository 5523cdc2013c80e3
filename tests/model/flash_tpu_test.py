"""Flash attention for TPUs, interpreted on a CPU, against NumPy in fp64."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from esm1nv_jax.model.attention import AttentionSpec, select_backend
from esm1nv_jax.model.kernels.flash_tpu import flash_attention
from tests.model import attention_reference as reference
from tests.model.attention_test import ROW_KEYS, inputs, segments
from tests.model.compiling import UNOPTIMIZED

T, N, H = 140, 3, 64  # a block of 128 lanes holds two heads, so that one is added
LAYOUT = segments([50, 1, 1, 67, 3], [T])


@functools.partial(jax.jit, static_argnames="rate", compiler_options=UNOPTIMIZED)
def both(qkv, ids, g, rate):
    keys = jnp.asarray(ROW_KEYS[: len(qkv)]) if rate else None
    out, pull = jax.vjp(lambda qkv: flash_attention(qkv, ids, rate, keys, interpret=True), qkv)
    return out, pull(g)[0]


def run(qkv, ids, g, rate=0.0):
    """Output and gradient, in NumPy."""
    return tuple(np.asarray(x) for x in both(qkv, jnp.asarray(ids), g, rate))


@pytest.mark.parametrize("rate", [0.0, 0.3])
def test_values_and_gradients_equal_the_reference(rate):
    qkv, g = inputs(0, (2, T, 3, N, H))
    expected = reference.attention(qkv, LAYOUT, g, rate, ROW_KEYS)
    for found, right in zip(run(qkv, LAYOUT, g, rate), expected, strict=True):
        np.testing.assert_allclose(found, right, atol=1e-5)


@pytest.mark.integration
@pytest.mark.parametrize("heads, size", [(1, 128), (5, 32), (3, 24)])
def test_heads_of_other_sizes_and_ids_in_any_order(heads, size):
    qkv, g = inputs(4, (1, 200, 3, heads, size))
    ids = np.random.default_rng(0).integers(0, 4, (1, 200)).astype(np.int32) * 1000
    expected = reference.attention(qkv, ids, g, 0.2, ROW_KEYS)
    for found, right in zip(run(qkv, ids, g, 0.2), expected, strict=True):
        np.testing.assert_allclose(found, right, atol=1e-5)


def test_what_is_dropped_is_that_of_the_reference_bit_by_bit():
    """Of equal probabilities, with unit vectors for values and for the gradient."""
    length, size = 300, 128  # three blocks of queries; the keys are those of the second
    qkv = np.zeros((1, length, 3, 1, size), np.float32)
    qkv[0, 128:256, 2, 0] = np.eye(size)
    out, grad = run(qkv, segments([length], length=length), qkv[:, :, 2], 0.3)
    at, keys = np.arange(length)[:, None], np.arange(128, 256)[None]
    kept = reference.kept(ROW_KEYS[0], 0, at, keys, length, 0.3)
    np.testing.assert_array_equal(out[0, :, 0] != 0, kept)
    kept = reference.kept(ROW_KEYS[0], 0, keys, at, length, 0.3)
    np.testing.assert_array_equal(grad[0, :, 2, 0] != 0, kept)


def test_neighbours_and_padding_change_nothing_bitwise():
    """The second of three segments, with other neighbours, with neighbours of other lengths."""
    shape, middle = (1, T, 3, 2, H), slice(40, 100)
    (qkv, g), (others, _) = inputs(1, shape), inputs(2, shape)
    layouts = [segments([40, 60, 40]), segments([40, 60, 7]), segments([3, 30, 7, 60, 20])]
    found = []
    for layout, around in zip(layouts, (qkv, others, others), strict=True):
        around = around.copy()
        around[:, middle] = qkv[:, middle]
        around[layout == 0] = 1e4
        results = run(around, layout, g, 0.3)
        for x in results:
            assert np.all(np.isfinite(x)) and np.all(x[layout == 0] == 0)
        found.append([x[:, middle] for x in results])
    for other in found[1:]:
        for first, second in zip(found[0], other, strict=True):
            np.testing.assert_array_equal(first, second)


@pytest.mark.integration
def test_bfloat16_is_as_near_as_its_rounding():
    qkv, g = inputs(5, (1, T, 3, 2, H))
    expected = reference.attention(qkv, LAYOUT[:1], g)
    rounded = (jnp.asarray(x, jnp.bfloat16) for x in (qkv, g))
    for found, right in zip(run(next(rounded), LAYOUT[:1], next(rounded)), expected, strict=True):
        assert found.dtype == jnp.bfloat16
        np.testing.assert_allclose(found.astype(np.float64), right, atol=0.06)


@pytest.mark.parametrize(
    "changes, chosen",
    [
        ({}, "pallas_tpu"),
        ({"rate": 0.0}, "pallas_tpu"),  # JAX's kernel visits every block
        ({"packed": False, "row_length": 1000}, "pallas_tpu"),
        ({"rate": 0.0, "head_size": 192}, "splash"),
        ({"head_size": 192}, "xla"),
        ({"head_size": 24}, "pallas_tpu"),
        ({"dtype": "float32"}, "xla"),
        ({"row_length": 2**15}, "xla"),
    ],
)
def test_auto_takes_it_where_it_can(changes, chosen):
    card = {"dtype": "bfloat16", "packed": True, "rate": 0.1, "head_size": 64, "row_length": 1152}
    spec = AttentionSpec(**({"platform": "tpu", "capability": 0.0} | card | changes))
    assert select_backend("auto", spec) == chosen
