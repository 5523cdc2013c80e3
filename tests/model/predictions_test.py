"""The last block at the predictions alone: as all of it, of which only these are read."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import pallas as pl

from esm1nv_jax.model import encoder, lora
from esm1nv_jax.model.dropout import DropoutKey
from esm1nv_jax.model.kernels import flash_gpu, flash_tpu
from tests.model.compiling import UNOPTIMIZED
from tests.model.parameters import random_parameters
from tests.model.rows import pack, random_tokens

SIZE = {"layers": 2, "width": 32, "heads": 2, "ffn": 64, "positions": 66}
MODELS = {
    "pre": {},
    "one block": {"layers": 1},
    "no dropout": {"dropout": 0.0, "attention_dropout": 0.0},
    "post": {"norm": "post"},
    "modern": {
        "position_kind": "rotary",
        "norm_kind": "rmsnorm",
        "ffn_activation": "swiglu",
        "bias": False,
        "qk_norm": True,
        "branch_scale": 0.5,
    },
    "esm1": {"bias_kv": True, "bare_head": True},
}
BATCH = pack([[random_tokens(1, 30), random_tokens(2, 20)], [random_tokens(3, 40)]], 64)
# As `masking.mask` makes them: ascending, of two segments, with </s> of the last or padding at the
# end of a row in the place of those that are none.
COLUMNS = np.array([[1, 5, 31, 32, 47, 63, 63], [3, 40, 41, 63, 63, 63, 63]], np.int32)
IS_TARGET = np.arange(7) < np.array([[5], [3]])
TARGETS = np.random.default_rng(0).integers(5, 25, COLUMNS.shape)


def loss_of(config, params, adapters, restricted, compute):
    """A loss of the logits at the targets. Where a hidden state is asked for, too, the last block
    is computed whole."""
    output = encoder.forward(
        config,
        params,
        BATCH["tokens"],
        BATCH["segment_ids"],
        BATCH["positions"],
        compute=compute,
        dropout_key=DropoutKey.at(0, 1, jnp.arange(4, 6, dtype=jnp.uint32)),
        prediction_positions_BM=COLUMNS,
        hidden_layers=() if restricted else (-1,),
        lora=None if adapters is None else (LORA, adapters),
    )
    chosen = jax.nn.one_hot(TARGETS, output.logits.shape[-1]) * IS_TARGET[..., None]
    return -jnp.sum(jax.nn.log_softmax(output.logits) * chosen), output.logits


LORA = lora.LoraConfig(rank=2, dropout=0.2, projections=lora.PROJECTIONS)


def both_ways(name, adapted=False, **compute):
    """(logits, gradients) of the last block at the predictions, and of all of it."""
    config = encoder.EncoderConfig(**(SIZE | MODELS[name]))
    params = random_parameters(config)
    adapters = lora.init(config, LORA, 1) if adapted else None
    if adapted:
        rng = np.random.default_rng(1)
        adapters = jax.tree.map(lambda x: rng.normal(0, 0.1, x.shape).astype("f"), adapters)

    def run(restricted):
        loss = functools.partial(loss_of, config)
        settings = encoder.ComputeConfig(**compute)
        argument = 1 if adapted else 0

        def total(params, adapters):
            return loss(params, adapters, restricted, settings)

        program = jax.jit(jax.grad(total, argument, has_aux=True), compiler_options=UNOPTIMIZED)
        gradients, logits = program(params, adapters)
        return [np.asarray(logits)[IS_TARGET], *jax.tree.leaves(gradients)]

    return run(True), run(False)


def assert_equal(some, whole, tolerance=2e-5):
    for found, expected in zip(some, whole, strict=True):
        np.testing.assert_allclose(found, expected, atol=tolerance * np.abs(expected).max() + 1e-7)


@pytest.mark.parametrize("name", MODELS)
def test_logits_and_gradients_are_those_of_the_whole_block(name):
    assert_equal(*both_ways(name))


@pytest.mark.parametrize("remat", ["dots", "block"])
def test_rematerialised(remat):
    assert_equal(*both_ways("pre", remat=remat))


def test_with_lora():
    assert_equal(*both_ways("pre", adapted=True))


@pytest.mark.parametrize("backend", ["pallas", "pallas_tpu"])
def test_in_the_kernels_of_accelerators(backend, monkeypatch):
    """Interpreted. Their attention has all queries; the residual sum of the last block has XLA's
    form, which drops what the kernel drops."""
    monkeypatch.setattr(pl, "pallas_call", functools.partial(pl.pallas_call, interpret=True))
    for module in (flash_gpu, flash_tpu):
        interpreted = functools.partial(module.flash_attention, interpret=True)
        monkeypatch.setattr(module, "flash_attention", interpreted)
    kernels = {"dtype": "bfloat16", "attention": backend, "token_kernels": backend}
    some, whole = both_ways("one block", **kernels)
    assert_equal(some, whole, tolerance=2e-2)
    plain, _ = both_ways("one block", dtype="bfloat16")
    assert_equal(some, plain, tolerance=2e-2)


def test_nothing_else_of_the_last_block_is_computed():
    def products(restricted):
        config = encoder.EncoderConfig(**SIZE)
        loss = functools.partial(loss_of, config)
        jaxpr = jax.make_jaxpr(
            lambda params: loss(params, None, restricted, encoder.ComputeConfig())[0]
        )(random_parameters(config))
        return [
            tuple(eqn.outvars[0].aval.shape)
            for eqn in _equations(jaxpr.jaxpr)
            if eqn.primitive.name == "dot_general"
        ]

    B, T, M, D, N, F = 2, 64, COLUMNS.shape[1], 32, 2, 64
    last = [(B, T, 3 * D), (B, N, M, T), (B, N, M, D // N), (B, M, D), (B, M, F), (B, M, D)]
    head = [(B, M, D), (B, M, 128)]
    assert products(True)[-8:] == last + head
    assert products(False)[-8:-2] == [
        (B, T, 3 * D), (B, N, T, T), (B, N, T, D // N), (B, T, D), (B, T, F), (B, T, D)
    ]  # fmt: skip


def _equations(jaxpr):
    for eqn in jaxpr.eqns:
        yield eqn
        for inner in jax.tree.leaves(
            list(eqn.params.values()), is_leaf=lambda x: hasattr(x, "eqns") or hasattr(x, "jaxpr")
        ):
            if hasattr(inner, "jaxpr"):
                yield from _equations(inner.jaxpr)
            elif hasattr(inner, "eqns"):
                yield from _equations(inner)
