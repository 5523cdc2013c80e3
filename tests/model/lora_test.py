"""LoRA starts at the base's bits, equals its merged form, and leaves the base without gradients."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from esm1nv_jax.common.errors import UserError
from esm1nv_jax.model import encoder, lora
from esm1nv_jax.model.dropout import DropoutKey
from tests.model.parameters import random_parameters
from tests.model.rows import pack, random_tokens

MODEL = encoder.EncoderConfig(
    layers=2, width=32, heads=2, ffn=64, positions=66, dropout=0.0, attention_dropout=0.0
)
ALL = lora.LoraConfig(rank=4, alpha=8.0, projections=lora.PROJECTIONS)
PARAMS = random_parameters(MODEL)
BATCH = pack([[random_tokens(1, 20), random_tokens(2, 25)], [random_tokens(3, 60)]], 64)


def hidden(model, params, adapters=None, key=None, **compute):
    output = encoder.forward(
        model,
        params,
        BATCH["tokens"],
        BATCH["segment_ids"],
        BATCH["positions"],
        compute=encoder.ComputeConfig(**compute),
        dropout_key=key,
        hidden_layers=(-1,),
        lora=adapters,
    )
    return np.asarray(output.hidden[-1])


def trained(config):
    """Parameters whose `lora_b` is no longer zero."""
    rng = np.random.default_rng(0)
    params = lora.init(MODEL, config, 1)
    return jax.tree.map(lambda x: rng.normal(0, 0.05, x.shape).astype(np.float32), params)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("norm", ["pre", "post"])
def test_the_start_has_the_bits_of_the_base(norm, dtype):
    model = dataclasses.replace(MODEL, norm=norm)
    params = random_parameters(model)
    start = (ALL, lora.init(model, ALL, 1))
    np.testing.assert_array_equal(
        hidden(model, params, start, dtype=dtype), hidden(model, params, dtype=dtype)
    )


@pytest.mark.parametrize(
    "projections", [lora.LoraConfig().projections, lora.PROJECTIONS, ("value",), ("fc2",)]
)
def test_merged_equals_unmerged(projections):
    config = dataclasses.replace(ALL, projections=projections)
    adapters = trained(config)
    apart = hidden(MODEL, PARAMS, (config, adapters))
    merged = hidden(MODEL, lora.merge(PARAMS, adapters, config))
    np.testing.assert_allclose(apart, merged, atol=1e-6 * np.abs(merged).max())
    assert np.abs(apart - hidden(MODEL, PARAMS)).max() > 1e-3  # and they say something


def test_merging_leaves_what_it_does_not_adapt():
    config = dataclasses.replace(ALL, projections=("key",))
    merged = lora.merge(PARAMS, trained(config), config)
    before, after = PARAMS["blocks"]["1"]["qkv"], merged["blocks"]["1"]["qkv"]
    np.testing.assert_array_equal(before["bias"], after["bias"])
    changed = np.any(np.asarray(before["kernel"]) != after["kernel"], axis=0)
    assert changed[32:64].all() and not changed[:32].any() and not changed[64:].any()
    assert merged["blocks"]["1"]["fc1"] is PARAMS["blocks"]["1"]["fc1"]


@pytest.mark.integration
@pytest.mark.parametrize("remat", ["dots", "block"])
def test_gradients_do_not_depend_on_what_is_computed_again(remat):
    adapters = trained(ALL)

    def gradient(remat):
        def loss(adapters):
            output = encoder.forward(
                MODEL,
                PARAMS,
                BATCH["tokens"],
                BATCH["segment_ids"],
                BATCH["positions"],
                compute=encoder.ComputeConfig(remat=remat),
                hidden_layers=(-1,),
                lora=(ALL, adapters),
            )
            return jnp.sum(output.hidden[-1] ** 3)

        return jax.jit(jax.grad(loss))(adapters)

    expected = gradient("none")
    assert all(np.abs(x).max() > 0 for x in jax.tree.leaves(expected))
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4),
        gradient(remat),
        expected,
    )


def test_dropout_is_of_the_input_and_changes_with_the_step():
    config = dataclasses.replace(ALL, dropout=0.5)
    adapters, rows = (config, trained(config)), jnp.arange(2, dtype=jnp.uint32)
    first, again, second = (
        hidden(MODEL, PARAMS, adapters, DropoutKey.at(0, step, rows)) for step in (1, 1, 2)
    )
    np.testing.assert_array_equal(first, again)
    assert np.abs(first - second).max() > 1e-3


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"rank": 0}, "rank 0 must be at least 1"),
        ({"dropout": 1.0}, "dropout 1.0"),
        ({"projections": ("q",)}, "take some of query, key, value"),
        ({"projections": ()}, "none: take some of"),
    ],
)
def test_what_is_no_lora(fields, words):
    with pytest.raises(UserError, match=words):
        lora.LoraConfig(**fields)


def test_a_rank_beyond_the_width_is_refused():
    with pytest.raises(UserError, match="rank 33 exceeds the width of the model, 32"):
        lora.init(MODEL, lora.LoraConfig(rank=33), 0)
