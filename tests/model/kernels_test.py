"""Handwritten kernels against NumPy in fp64, and against JAX where they are turned off."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from esm1nv_jax.common.errors import UserError
from esm1nv_jax.model import encoder, kernels, masking
from esm1nv_jax.model.dropout import DropoutKey
from esm1nv_jax.model.encoder_config import REMATS
from esm1nv_jax.model.kernels.layer_norm import layer_norm
from esm1nv_jax.model.kernels.matmul import EMULATED_BFLOAT16, cast_operand, matmul
from esm1nv_jax.model.kernels.remat import after, checkpoint_block, gather_positions
from tests.model.compiling import UNOPTIMIZED
from tests.model.parameters import random_parameters
from tests.model.rows import pack, random_tokens

CONFIG = encoder.EncoderConfig(layers=1, width=32, heads=2, ffn=64, positions=64)


def numpy_layer_norm(x, scale, bias):
    mean = x.mean(-1, keepdims=True)
    return (x - mean) / np.sqrt(((x - mean) ** 2).mean(-1, keepdims=True) + 1e-5) * scale + bias


def test_layer_norm_and_its_gradient():
    random = np.random.default_rng(0)
    x, scale, bias = random.normal(2, 3, (2, 5, 8)), random.normal(size=8), random.normal(size=8)
    g = random.normal(size=x.shape)
    out, pull = jax.vjp(
        lambda *a: layer_norm(*a, 1e-5, jnp.float32, True),
        *(jnp.asarray(a, jnp.float32) for a in (x, scale, bias)),
    )
    np.testing.assert_allclose(out, numpy_layer_norm(x, scale, bias), atol=1e-5)
    found = pull(jnp.asarray(g, jnp.float32))
    for i, part in enumerate((x, scale, bias)):
        direction = random.normal(size=part.shape)
        moved = [[x, scale, bias] for _ in range(2)]
        for sign, arguments in zip((1, -1), moved, strict=True):
            arguments[i] = part + sign * 1e-5 * direction
        slope = ((numpy_layer_norm(*moved[0]) - numpy_layer_norm(*moved[1])) * g).sum() / 2e-5
        assert np.sum(found[i] * direction) == pytest.approx(slope, rel=1e-4)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("width", [16, 48])  # narrower and wider than the result
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, EMULATED_BFLOAT16])
def test_matmul_and_its_gradients_are_those_of_rounded_operands(transposed, width, dtype):
    random = np.random.default_rng(0)
    x, w = random.normal(size=(2, 5, width)), random.normal(size=(width, 24))
    g = random.normal(size=(2, 5, 24))
    arrays = [jnp.asarray(a, jnp.float32) for a in (x, w.T if transposed else w, g)]
    y, pull = jax.vjp(lambda x, w: matmul(x, w, dtype, transposed), *arrays[:2])
    dx, dw = pull(arrays[2])
    assert {y.dtype, dx.dtype, dw.dtype} == {jnp.dtype("float32")}
    x, w, g = (np.asarray(cast_operand(a, dtype), np.float64) for a in arrays)
    w = w.T if transposed else w
    expected_dw = np.einsum("btk,btn->kn", x, g)
    np.testing.assert_allclose(y, x @ w, atol=1e-4)
    np.testing.assert_allclose(dx, g @ w.T, atol=1e-4)
    np.testing.assert_allclose(dw, expected_dw.T if transposed else expected_dw, atol=1e-4)


def test_gathered_columns_and_their_gradient():
    x = jnp.arange(2 * 6 * 3.0).reshape(2, 6, 3)
    index = jnp.asarray([[0, 2, 5, 5], [1, 3, 4, 5]])  # the second 5 predicts nothing
    out, pull = jax.vjp(lambda x: gather_positions(x, index), x)
    np.testing.assert_array_equal(out[0], x[0, np.array([0, 2, 5, 5])])
    g = jnp.asarray(np.random.default_rng(0).normal(size=out.shape), jnp.float32)
    expected = np.zeros(x.shape, np.float32)
    for row, columns in enumerate([[0, 2, 5], [1, 3, 4, 5]]):
        for entry, column in enumerate(columns):
            expected[row, column] = g[row, entry]
    np.testing.assert_array_equal(pull(g)[0], expected)


@pytest.mark.parametrize("value", [0.0, -1.5, np.inf, -np.inf, np.nan, 1e-45, -3e38])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_waiting_for_a_value_changes_nothing_whatever_the_value(value, dtype):
    x = jnp.asarray([1.5, -2.0, np.inf, 1e-30], dtype)
    for run in (after, jax.jit(after)):
        np.testing.assert_array_equal(run(x, jnp.full((2, 2), value, dtype), x), x)


def test_the_compiler_keeps_the_wait():
    """It must not see that the sum is zero: then nothing would wait."""
    x = jnp.ones((4, 4))
    assert "popcnt" in jax.jit(after).lower(x, x).compile().as_text()
    assert "popcnt" not in jax.jit(lambda x, y: after(x)).lower(x, x).compile().as_text()


def test_an_infinite_gradient_of_one_parameter_leaves_the_others_finite():
    def run(differentiable, others):
        params, x, _ = differentiable
        # d sqrt(0) is infinite: only the gradient of `at_zero` may be.
        return x * params["scale"] + jnp.sqrt(params["at_zero"])

    def total(params, x, remat):
        return checkpoint_block(run, remat)((params, x, None), None).sum()

    params = {"at_zero": jnp.zeros(()), "scale": jnp.ones(3)}
    for remat in ("dots", "block"):
        grads, dx = jax.jit(jax.grad(total, argnums=(0, 1)), static_argnums=2)(
            params, jnp.ones((2, 4, 3)), remat
        )
        assert np.isinf(grads["at_zero"])
        np.testing.assert_array_equal(grads["scale"], [8, 8, 8])
        np.testing.assert_array_equal(dx, np.ones((2, 4, 3)))


def gradients(**compute):
    """Gradients of the masked-LM loss by every parameter, with dropout."""
    batch = pack([[random_tokens(1, 30), random_tokens(2, 20)], [random_tokens(3, 40)]], 64)
    key = DropoutKey.at(0, 1, jnp.arange(2, dtype=jnp.uint32))

    def total(params):
        masked = masking.mask(
            masking.recipe("card"), *(batch[k] for k in ("tokens", "segment_ids", "mask_bits"))
        )
        output = encoder.forward(
            CONFIG,
            params,
            masked.inputs_BT,
            batch["segment_ids"],
            batch["positions"],
            compute=encoder.ComputeConfig(**compute),
            dropout_key=key,
            prediction_positions_BM=masked.prediction_positions_BM,
        )
        return masking.cross_entropy_sums(output.logits, masked)["loss"]

    gradient = jax.jit(jax.grad(total), compiler_options=UNOPTIMIZED)
    return jax.tree.leaves(gradient(random_parameters(CONFIG)))


@functools.cache
def handwritten_gradients(remat):
    return gradients(remat=remat)


PLAIN = [(name, "none") for name in kernels.NAMES if name != "remat"]
TOGETHER = [pytest.param(name, "dots", marks=pytest.mark.integration) for name in ("remat", "all")]


@pytest.mark.parametrize(("name", "remat"), PLAIN + TOGETHER)
def test_every_kernel_equals_the_plain_form(name, remat, monkeypatch):
    by_hand = handwritten_gradients(remat)
    monkeypatch.setenv(kernels.VARIABLE, name)
    for found, expected in zip(by_hand, gradients(remat=remat), strict=True):
        np.testing.assert_allclose(found, expected, atol=1e-5 * np.abs(expected).max() + 1e-7)


def test_plain_kernels_are_told_by_name(monkeypatch):
    assert not kernels.is_plain("matmul")
    monkeypatch.setenv(kernels.VARIABLE, "matmul,remat")
    assert [name for name in kernels.NAMES if kernels.is_plain(name)] == ["matmul", "remat"]
    monkeypatch.setenv(kernels.VARIABLE, "flash")
    with pytest.raises(UserError, match="flash is unknown; there are all, attention_xla"):
        gradients()


def test_a_plain_kernel_is_differentiated_by_jax(monkeypatch):
    def jaxpr():
        x, w = jnp.ones((2, 3)), jnp.ones(3)
        return str(jax.make_jaxpr(lambda x, w: layer_norm(x, w, w, 1e-5, jnp.float32, True))(x, w))

    assert "custom_vjp" in jaxpr()
    monkeypatch.setenv(kernels.VARIABLE, "layer_norm")
    assert "custom_vjp" not in jaxpr()


@pytest.mark.integration
def test_activations_in_bfloat16_are_as_near_as_their_rounding():
    """As on an accelerator: gradients of every parameter, with dropout, with and without remat."""
    config = encoder.EncoderConfig(layers=2, width=32, heads=2, ffn=64, positions=32)
    params = random_parameters(config)
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
                compute=encoder.ComputeConfig(**compute),
                dropout_key=key,
            )
            return jnp.sum(jnp.square(output.logits[..., 5:25]))

        return jax.tree.leaves(jax.jit(jax.grad(total), compiler_options=UNOPTIMIZED)(params))

    exact = gradient()
    for remat in REMATS:
        for found, right in zip(
            gradient(activation_dtype="bfloat16", remat=remat), exact, strict=True
        ):
            assert found.dtype == jnp.float32
            error = jnp.linalg.norm(found - right) / (jnp.linalg.norm(right) + 1e-3)
            assert error < 0.05
