"""SwiGLU, RMSNorm, no biases, normalized queries and keys, an output matrix, scaled branches: the
encoder against NumPy in fp64, its size, and its FLOPs."""

import dataclasses

import jax
import numpy as np
import pytest

from esm1nv_jax.common.errors import UserError
from esm1nv_jax.model import encoder
from esm1nv_jax.model.kernels import VARIABLE
from esm1nv_jax.training.metrics import training_flops
from tests.model import encoder_test, reference
from tests.model.compiling import UNOPTIMIZED
from tests.model.encoder_test import run
from tests.model.rows import pack, random_tokens

SHAPE = {"layers": 2, "width": 48, "heads": 4, "ffn": 64, "positions": 130}
MODERN = encoder.EncoderConfig(
    **SHAPE,
    position_kind="rotary",
    ffn_activation="swiglu",
    norm_kind="rmsnorm",
    bias=False,
    qk_norm=True,
)
ESMC = dataclasses.replace(
    MODERN, norm_kind="layernorm", tied_head=False, branch_scale=(36 / 2) ** 0.5
)
NO_BIAS = dataclasses.replace(MODERN, norm_kind="layernorm_no_bias", norm="post", qk_norm=False)
CONFIGS = {"modern": MODERN, "esmc": ESMC, "no_bias": NO_BIAS}


def parameters(config):
    """Every one moved; queries and keys short, or softmax would magnify rounding."""
    return jax.tree_util.tree_map_with_path(
        lambda path, x: x / 3 if path[-2:-1] and path[-2].key in ("q_norm", "k_norm") else x,
        encoder_test.parameters(config),
    )


def normalize(x, p, config):
    if config.norm_kind == "rmsnorm":
        return x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-5) * p["scale"]
    return reference.layer_norm(x, {"bias": 0.0} | p)


def rotate(x, frequency):
    """[length, H]: pairs (i, i + H / 2) as complex numbers, turned."""
    half = x.shape[1] // 2
    turned = (x[:, :half] + 1j * x[:, half:]) * np.exp(
        1j * np.arange(len(x))[:, None] * frequency[None]
    )
    return np.concatenate([turned.real, turned.imag], axis=1)


def attend(x, p, config, frequency):
    q, k, v = np.split(x @ p["qkv"]["kernel"], 3, axis=1)
    if config.qk_norm:
        q, k = normalize(q, p["q_norm"], config), normalize(k, p["k_norm"], config)
    size = config.width // config.heads
    heads = []
    for h in range(config.heads):
        part = slice(h * size, (h + 1) * size)
        scores = rotate(q[:, part], frequency) @ rotate(k[:, part], frequency).T
        heads.append(reference.softmax(scores / np.sqrt(size)) @ v[:, part])
    return np.concatenate(heads, axis=1) @ p["out_proj"]["kernel"]


def feed_forward(x, p):
    gate, value = np.split(x @ p["fc1"]["kernel"], 2, axis=1)
    return gate / (1 + np.exp(-gate)) * value @ p["fc2"]["kernel"]


def expected_output(params, tokens, config):
    """(hidden states 0, 1, .., last; logits [length, 30])."""
    norm = lambda x, p: normalize(x, p, config)  # noqa: E731
    x = params["token_embedding"]["embedding"][tokens]
    if config.norm == "post":
        x = norm(x, params["embedding_norm"])
    hidden, scale = [x], config.branch_scale
    for i in range(config.layers):
        p = params["blocks"][str(i)]
        if config.norm == "pre":
            mixed = attend(norm(x, p["attention_norm"]), p, config, params["rotary_frequency"])
            x = x + scale * mixed
            x = x + scale * feed_forward(norm(x, p["ffn_norm"]), p)
        else:
            x = norm(x + attend(x, p, config, params["rotary_frequency"]), p["attention_norm"])
            x = norm(x + feed_forward(x, p), p["ffn_norm"])
        hidden.append(x)
    x = norm(x, params["final_norm"]) if config.norm == "pre" else x
    head = params["lm_head"]
    y = reference.gelu_erf(x @ head["dense"]["kernel"] + head["dense"]["bias"])
    embedding = params["token_embedding"] if config.tied_head else head["decoder"]
    logits = norm(y, head["layer_norm"]) @ embedding["embedding"].T + head["bias"]
    return [*hidden, x], logits[:, :30]


@pytest.mark.parametrize("name", CONFIGS)
def test_every_layer_equals_numpy(name):
    config = CONFIGS[name]
    params = parameters(config)
    sequences = [random_tokens(1, 40), random_tokens(2, 9), random_tokens(3, 1)]
    layers = (*range(config.layers + 1), -1)
    found = run(config, params, pack([sequences], 64), hidden_layers=layers)
    params64 = jax.tree.map(lambda x: np.asarray(x, np.float64), params)
    start = 0
    for tokens in sequences:
        part = slice(start, start + len(tokens))
        hidden, logits = expected_output(params64, tokens, config)
        for layer, there in zip(layers, hidden, strict=True):
            here = np.asarray(found.hidden[layer][0, part])
            assert np.abs(here - there).max() < 1e-5 * max(np.abs(there).max(), 1), layer
        here = np.asarray(found.logits[0, part, :30])
        assert np.abs(here - logits).max() < 1e-5 * max(np.abs(logits).max(), 1)
        start += len(tokens)


@pytest.mark.parametrize("name", ["modern", pytest.param("no_bias", marks=pytest.mark.integration)])
def test_gradients_equal_those_of_plain_kernels(name, monkeypatch):
    config, batch = CONFIGS[name], pack([[random_tokens(1, 30)]], 40)
    params = parameters(config)

    def gradient(kernels):
        monkeypatch.setenv(VARIABLE, kernels)

        def loss(params):
            arrays = (batch[k] for k in ("tokens", "segment_ids", "positions"))
            return (encoder.forward(config, params, *arrays).logits[..., :30] ** 2).mean()

        return jax.jit(jax.grad(loss), compiler_options=UNOPTIMIZED)(params)

    for a, b in zip(*map(jax.tree.leaves, (gradient(""), gradient("all"))), strict=True):
        np.testing.assert_allclose(a, b, atol=2e-5 * np.abs(a).max() + 1e-12)
        assert np.any(a) or a.shape == params["rotary_frequency"].shape


def test_swiglu_at_two_thirds_of_the_width_has_the_parameters_of_gelu():
    gelu = encoder.EncoderConfig(bias=False)
    swiglu = dataclasses.replace(gelu, ffn_activation="swiglu", ffn=2048)
    assert encoder.parameter_count(swiglu) == encoder.parameter_count(gelu)
    untied = dataclasses.replace(gelu, tied_head=False)
    assert encoder.parameter_count(untied) - encoder.parameter_count(gelu) == 128 * 768
    biases = encoder.parameter_count(encoder.EncoderConfig()) - encoder.parameter_count(gelu)
    assert biases == 6 * (3 * 768 + 768 + 3072 + 768) + 768


def test_flops_are_six_times_the_kernels_a_token():
    kernels = sum(
        leaf.size
        for path, leaf in jax.tree_util.tree_leaves_with_path(encoder.abstract(MODERN)["blocks"])
        if path[-1].key == "kernel"
    )
    assert training_flops(MODERN, 100, 0, 0) == 6 * kernels * 100


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"norm_kind": "batchnorm"}, "layernorm, layernorm_no_bias, rmsnorm"),
        ({"branch_scale": 0.0}, "above 0"),
        ({"norm_epsilon": float("nan")}, "above 0"),
        ({"head_activation": "swiglu"}, "gelu_tanh, gelu_erf"),
    ],
)
def test_impossible_values_are_refused(change, words):
    with pytest.raises(UserError, match=words):
        dataclasses.replace(MODERN, **change)
