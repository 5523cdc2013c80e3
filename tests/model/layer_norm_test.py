"""What lies between products: gradients against differences in NumPy and fp64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from esm1nv_jax.model import encoder
from esm1nv_jax.model.dropout import DropoutKey
from esm1nv_jax.model.encoder_config import REMATS
from esm1nv_jax.model.kernels import layer_norm


def normed(x, scale, bias):
    """LayerNorm in NumPy."""
    mean = x.mean(-1, keepdims=True)
    return (x - mean) / np.sqrt(((x - mean) ** 2).mean(-1, keepdims=True) + 1e-5) * scale + bias


def test_layer_norm_and_its_gradient():
    random = np.random.default_rng(0)
    x, scale, bias = random.normal(2, 3, (2, 5, 8)), random.normal(size=8), random.normal(size=8)
    g = random.normal(size=x.shape)
    out, pull = jax.vjp(
        lambda *a: layer_norm.layer_norm(*a, 1e-5, jnp.float32),
        *(jnp.asarray(a, jnp.float32) for a in (x, scale, bias)),
    )
    np.testing.assert_allclose(out, normed(x, scale, bias), atol=1e-5)
    found = pull(jnp.asarray(g, jnp.float32))
    for i, part in enumerate((x, scale, bias)):
        direction = random.normal(size=part.shape)
        moved = [[x, scale, bias] for _ in range(2)]
        for sign, arguments in zip((1, -1), moved, strict=True):
            arguments[i] = part + sign * 1e-5 * direction
        slope = ((normed(*moved[0]) - normed(*moved[1])) * g).sum() / 2e-5
        assert np.sum(found[i] * direction) == pytest.approx(slope, rel=1e-4)


def test_taking_columns_and_giving_gradients_back():
    x = jnp.arange(2 * 6 * 3.0).reshape(2, 6, 3)
    index = jnp.asarray([[0, 2, 5, 5], [1, 3, 4, 5]])  # the second 5 selects nothing
    out, pull = jax.vjp(lambda x: layer_norm.take(x, index), x)
    np.testing.assert_array_equal(out[0], x[0, np.array([0, 2, 5, 5])])
    g = jnp.asarray(np.random.default_rng(0).normal(size=out.shape), jnp.float32)
    expected = np.zeros(x.shape, np.float32)
    for row, columns in enumerate([[0, 2, 5], [1, 3, 4, 5]]):
        for place, column in enumerate(columns):
            expected[row, column] = g[row, place]
    np.testing.assert_array_equal(pull(g)[0], expected)


def test_activations_in_bfloat16_are_as_near_as_their_rounding():
    """As on an accelerator: gradients of every parameter, with dropout, with and without remat."""
    config = encoder.EncoderConfig(layers=2, width=32, heads=2, ffn=64, positions=32)
    params = encoder.init(config, 0)
    tokens = jnp.asarray(np.random.default_rng(0).integers(5, 25, (2, 32)), jnp.int32)
    ids, positions = jnp.ones((2, 32), jnp.int32), jnp.tile(jnp.arange(32), (2, 1))
    key = DropoutKey.at(0, 1, jnp.arange(2, dtype=jnp.uint32))

    def gradient(**compute):
        def total(params):
            output = encoder.forward(
                config,
                params,
                tokens,
                ids,
                positions,
                compute=encoder.Compute(**compute),
                dropout_key=key,
            )
            return jnp.sum(jnp.square(output.logits[..., 5:25]))

        return jax.tree.leaves(jax.jit(jax.grad(total))(params))

    exact = gradient()
    for remat in REMATS:
        for found, right in zip(gradient(activations="bfloat16", remat=remat), exact, strict=True):
            assert found.dtype == jnp.float32
            error = jnp.linalg.norm(found - right) / (jnp.linalg.norm(right) + 1e-3)
            assert error < 0.05
