"""Kernels that read each token once, interpreted on a CPU: residual sum, dropout and LayerNorm, and
the gradient of GELU; against NumPy in fp64, and against the encoder without them."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import pallas as pl

from esm1nv_jax.model import dropout, encoder, kernels, lora
from esm1nv_jax.model.kernels.gelu import gelu_of_biased
from esm1nv_jax.model.kernels.residual_norm import ResidualNorm, residual_norm
from tests.model.compiling import UNOPTIMIZED
from tests.model.parameters import random_parameters
from tests.model.rows import pack, random_tokens

# No powers of two: rows end within blocks of 128 tokens (TPU), of 8 and of 64 (GPU).
ROWS, TOKENS, WIDTH = 2, 140, 24
BACKENDS = ("pallas", "pallas_tpu")
KEY = dropout.DropoutKey.at(3, 7, jnp.array([5, 2**20], jnp.uint32))


@pytest.fixture(autouse=True)
def interpreted(monkeypatch):
    monkeypatch.setattr(pl, "pallas_call", functools.partial(pl.pallas_call, interpret=True))


def kept(rate):
    """bool [rows, tokens, width]: the elements that XLA's form keeps."""
    if not rate:
        return np.ones((ROWS, TOKENS, WIDTH), bool)
    ones = jnp.ones((ROWS, TOKENS, WIDTH))
    return np.asarray(dropout.dropout(ones, rate, KEY, 4, dropout.FFN_OUTPUT)) != 0


@functools.partial(jax.jit, static_argnums=0, compiler_options=UNOPTIMIZED)
def kernel(config, arrays, gradients):
    """Both results, and the gradients of all arrays."""
    keys = KEY.rows(4, dropout.FFN_OUTPUT)
    out, pull = jax.vjp(lambda *arrays: residual_norm(config, *arrays, keys), *arrays)
    return out, pull(gradients)


def reference(config, x, branch, branch_bias, scale, bias):
    x = x + (branch + branch_bias) * config.branch_scale * kept(config.rate) / (1 - config.rate)
    centered = x - x.mean(-1, keepdims=True) * config.centered
    deviation = np.sqrt((centered**2).mean(-1, keepdims=True) + config.epsilon)
    return x, centered / deviation * scale + bias


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("rate, centered", [(0.3, True), (0.0, False)])
def test_values_and_gradients_are_those_of_numpy(backend, rate, centered):
    config = ResidualNorm(backend, jnp.float32, 1e-5, centered, rate, 0.7)
    random = np.random.default_rng(0)
    shape = (ROWS, TOKENS, WIDTH)
    arrays = [random.normal(0.5, 2, shape), random.normal(size=shape)]
    arrays += [random.normal(size=WIDTH) for _ in range(3)]
    gradients = random.normal(size=(2, *shape))
    out, found = kernel(
        config, *(tuple(jnp.asarray(a, jnp.float32) for a in g) for g in (arrays, gradients))
    )
    for result, right in zip(out, reference(config, *arrays), strict=True):
        np.testing.assert_allclose(result, right, atol=2e-5)
    for i, array in enumerate(arrays):
        direction = random.normal(size=array.shape)
        slope = 0.0
        for sign in (1, -1):
            moved = [a + sign * 1e-5 * direction if k == i else a for k, a in enumerate(arrays)]
            slope += sign * sum(map(np.vdot, gradients, reference(config, *moved))) / 2e-5
        # Of as many random terms, whose sum may be small.
        size = np.linalg.norm(found[i]) * np.linalg.norm(direction)
        assert np.vdot(found[i], direction) == pytest.approx(slope, abs=1e-6 * size)


@pytest.mark.parametrize("backend", BACKENDS)
def test_what_is_dropped_is_what_the_other_form_drops(backend):
    config = ResidualNorm(backend, jnp.float32, 1e-5, True, 0.3, 1.0)
    ones, zero = jnp.ones((ROWS, TOKENS, WIDTH)), jnp.zeros(WIDTH)
    (total, _), (_, gradient, *_) = kernel(
        config, (0 * ones, ones, zero, zero, zero), (ones, 0 * ones)
    )
    np.testing.assert_array_equal(total != 0, kept(0.3))
    np.testing.assert_array_equal(gradient != 0, kept(0.3))
    np.testing.assert_array_equal(gradient, total)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("width", [24, 1100])  # a GPU takes 1,024 columns at a time
def test_the_gradient_of_gelu_and_of_the_bias_within(backend, width):
    random = np.random.default_rng(2)
    x, g = random.normal(size=(2, 1, 140, width)) * 3
    x[0, 0, :2] = -100, 100  # where the exponential overflows
    slope = (gelu_tanh(x + 1e-5) - gelu_tanh(x - 1e-5)) / 2e-5
    arrays = jnp.asarray(x, jnp.float32), jnp.ones(width)
    out, pull = jax.vjp(functools.partial(gelu_of_biased, backend), *arrays)
    dx, dbias = pull(jnp.asarray(g, jnp.float32))
    np.testing.assert_allclose(out, gelu_tanh(x), atol=1e-5)
    np.testing.assert_allclose(dx, g * slope, atol=3e-5)
    np.testing.assert_allclose(dbias, (g * slope).sum((0, 1)), atol=1e-4)


def gelu_tanh(x):
    return x / 2 * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))


@pytest.mark.parametrize("backend", BACKENDS)
def test_bfloat16_in_and_out(backend):
    """The residual and its gradient stay fp32; the branch, the norm and theirs are bfloat16."""
    config = ResidualNorm(backend, jnp.bfloat16, 1e-5, True, 0.1, 1.0)
    random = np.random.default_rng(1)
    x, branch, g = (jnp.asarray(a, jnp.float32) for a in random.normal(size=(3, 2, 140, 24)))
    branch, vectors = branch.astype(jnp.bfloat16), (jnp.full(WIDTH, 0.1),) * 3
    (total, normed), (dx, dbranch, *dvectors) = kernel(
        config, (x, branch, *vectors), (g, g.astype(jnp.bfloat16))
    )
    assert (total.dtype, dx.dtype) == (jnp.float32, jnp.float32)
    assert (normed.dtype, dbranch.dtype) == (jnp.bfloat16, jnp.bfloat16)
    assert {d.dtype for d in dvectors} == {jnp.dtype("float32")}
    exact = reference(config, *(np.asarray(a, np.float64) for a in (x, branch, *vectors)))
    np.testing.assert_allclose(total, exact[0], atol=1e-5)
    np.testing.assert_allclose(np.asarray(normed, np.float64), exact[1], atol=2e-3)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_bfloat16_residual_is_rounded_once_and_normalized_as_stored(backend):
    """And so is its gradient, from a sum in fp32."""
    config = ResidualNorm(backend, jnp.float32, 1e-5, True, 0.1, 1.0)
    random = np.random.default_rng(1)
    x, branch, *g = (jnp.asarray(a, jnp.bfloat16) for a in random.normal(size=(4, 2, 140, 24)))
    vectors = (jnp.full(WIDTH, 0.1),) * 3
    # By default XLA drops a cast to bfloat16 and back; a GPU's or a TPU's compiler does not.
    run = jax.jit(
        kernel.__wrapped__, static_argnums=0, compiler_options={"xla_allow_excess_precision": False}
    )
    arrays, g = (x, branch, *vectors), (g[0], g[1].astype(jnp.float32))
    (total, normed), (dx, *_) = run(config, arrays, g)
    assert {total.dtype, dx.dtype} == {jnp.dtype("bfloat16")}
    exact, _ = reference(config, *(np.asarray(a, np.float64) for a in arrays))
    np.testing.assert_allclose(np.asarray(total, np.float64), exact, rtol=2**-8)
    stored = total.astype(jnp.float32)
    zeros = jnp.zeros_like(stored), jnp.zeros(WIDTH)
    _, exact = reference(
        config, *(np.asarray(a, np.float64) for a in (stored, *zeros, *vectors[1:]))
    )
    np.testing.assert_allclose(normed, exact, atol=1e-5)
    _, (exact, *_) = run(config, (stored, *zeros, *vectors[1:]), (g[0].astype(jnp.float32), g[1]))
    np.testing.assert_allclose(np.asarray(dx, np.float32), exact, rtol=2**-8)


MODERN = {"norm_kind": "layernorm_no_bias", "bias": False, "branch_scale": 0.6, "dropout": 0.0}


def outputs(token_kernels, remat="none", residual_dtype="float32", with_lora=False, **fields):
    """Loss, hidden states and gradients of a model of two blocks, with dropout."""
    config = encoder.EncoderConfig(
        **{"layers": 2, "width": 24, "heads": 2, "ffn": 48, "positions": 40} | fields
    )
    batch = pack([[random_tokens(1, 20), random_tokens(2, 10)], [random_tokens(3, 30)]], 40)
    key = dropout.DropoutKey.at(0, 1, jnp.arange(2, dtype=jnp.uint32))
    params = random_parameters(config)
    lora_config = lora.LoraConfig(2, projections=("out_proj",))
    adapter = lora.init(config, lora_config, 1)
    trained = adapter if with_lora else params

    def total(trained):
        output = encoder.forward(
            config,
            params if with_lora else trained,
            *(batch[name] for name in ("tokens", "segment_ids", "positions")),
            compute=encoder.ComputeConfig(
                token_kernels=token_kernels, remat=remat, residual_dtype=residual_dtype
            ),
            dropout_key=key,
            hidden_layers=(1, 2, -1),
            lora=(lora_config, trained) if with_lora else None,
        )
        return jnp.sum(jnp.square(output.logits[..., 5:25])), output.hidden

    gradient = jax.value_and_grad(total, has_aux=True)
    return jax.jit(gradient, compiler_options=UNOPTIMIZED)(trained)


@pytest.mark.parametrize(
    "options",
    [
        pytest.param({}, id="card"),
        pytest.param({"norm": "post"}, id="post", marks=pytest.mark.integration),
        pytest.param(MODERN, id="modern", marks=pytest.mark.integration),
        pytest.param({"remat": "block"}, id="remat", marks=pytest.mark.integration),
        pytest.param({"with_lora": True}, id="LoRA", marks=pytest.mark.integration),
    ],
)
def test_the_encoder_is_the_same_with_the_kernel(options):
    found, expected = (outputs(backend, **options) for backend in ("pallas", "xla"))
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5 * np.abs(b).max() + 1e-7),
        found,
        expected,
    )


@pytest.mark.integration
@pytest.mark.parametrize("norm", ["pre", "post"])
def test_a_bfloat16_residual_is_the_same_with_the_kernel(norm):
    """To one rounding: XLA's form rounds the gradient of the norm before it is added, too."""
    found, expected = (
        outputs(backend, residual_dtype="bfloat16", norm=norm) for backend in ("pallas", "xla")
    )
    jax.tree.map(
        lambda a, b: np.testing.assert_array_less(
            np.linalg.norm(a - b), 2**-8 * np.linalg.norm(b) + 1e-7
        ),
        found,
        expected,
    )


@pytest.mark.parametrize(
    "platform, capability, chosen",
    [("gpu", 8.0, "pallas"), ("gpu", 7.5, "xla"), ("tpu", 0.0, "pallas_tpu"), ("cpu", 0.0, "xla")],
)
def test_who_takes_it_and_how_it_is_turned_off(platform, capability, chosen, monkeypatch):
    assert kernels.token_backend(platform, capability) == chosen
    compute = encoder.ComputeConfig(token_kernels=chosen)
    monkeypatch.setenv(kernels.VARIABLE, "residual_norm")
    assert (compute.backend("residual_norm"), compute.backend("gelu")) == ("xla", chosen)
