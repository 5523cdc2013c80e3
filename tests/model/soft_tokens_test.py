"""Probabilities over tokens in place of ids, against the ids themselves and finite differences."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from esm1nv_jax.common.errors import UserError
from esm1nv_jax.data import tokenizer
from esm1nv_jax.model import encoder, soft_tokens
from tests.model.parameters import random_parameters

OURS = encoder.EncoderConfig(
    layers=2, width=32, heads=4, ffn=64, positions=66, dropout=0.0, attention_dropout=0.0
)
ESM2 = dataclasses.replace(
    OURS, position_kind="rotary", token_dropout=True, vocabulary=tokenizer.ESM2
)
NO_X = " ".join(t for t in tokenizer.TOKENS if t not in "XBZUO")  # as AntiBERTy
POST = dataclasses.replace(OURS, norm="post", vocabulary=NO_X)


def make(config):
    rng = np.random.default_rng(0)
    return jax.tree.map(
        lambda x: np.float32(x + rng.normal(0, 0.2, x.shape)), random_parameters(config, 1)
    )


def run(config, params, tokens):
    """Logits of rows without padding."""
    segment_ids = jnp.ones(tokens.shape[:2], jnp.int32)
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), segment_ids.shape)
    return encoder.forward(config, params, tokens, segment_ids, positions).logits


@pytest.mark.parametrize("config", [OURS, ESM2, POST], ids=["ours", "esm2", "no X"])
def test_one_hot_vectors_equal_ids_to_the_bit(config):
    params = make(config)
    ids = np.stack([tokenizer.encode("MKVLAXBJW"), tokenizer.encode("MRRLAUOZK")]).astype(np.int32)
    ids[0, 3] = ids[1, 5] = tokenizer.MASK
    one_hot = jax.nn.one_hot(ids, tokenizer.VOCABULARY)
    logits = jax.jit(functools.partial(run, config))
    expected = np.asarray(logits(params, ids))
    assert np.ptp(expected[..., :20]) > 1
    assert np.asarray(logits(params, one_hot)).tobytes() == expected.tobytes()


def soft(length, seed):
    rng = np.random.default_rng(seed)
    return jnp.asarray(rng.dirichlet(np.ones(tokenizer.STANDARD), length), jnp.float32)


@pytest.mark.parametrize(
    "config",
    [pytest.param(OURS, id="ours"), pytest.param(ESM2, id="esm2", marks=pytest.mark.integration)],
)
def test_gradients_equal_finite_differences(config):
    params, probabilities = make(config), soft(6, 0)

    @jax.jit
    def value(p):
        return soft_tokens.pseudo_log_likelihood(
            lambda x: run(config, params, x), soft_tokens.from_residues(p), config.vocabulary
        )

    gradient, step = jax.jit(jax.grad(value))(probabilities), 0.02
    for seed in range(3):
        direction = np.random.default_rng(seed).normal(size=probabilities.shape)
        direction /= np.linalg.norm(direction)
        ahead, behind = (value(probabilities + sign * step * direction) for sign in (1, -1))
        assert abs(float(ahead - behind) / (2 * step) - np.sum(gradient * direction)) < 2e-2
    assert np.linalg.norm(gradient) > 1


@pytest.mark.integration
def test_jit_grad_and_vmap_compose():
    config = dataclasses.replace(OURS, layers=1)
    params = make(config)
    batch = jnp.stack([soft(4, seed) for seed in range(3)])

    def value(p, at_once):
        return soft_tokens.pseudo_log_likelihood(
            lambda x: run(config, params, x),
            soft_tokens.from_residues(p),
            config.vocabulary,
            at_once,
        )

    together = jax.jit(jax.vmap(jax.grad(lambda p: value(p, 2))))(batch)
    alone = jax.jit(jax.grad(lambda p: value(p, 64)))
    for p, gradient in zip(batch, together, strict=True):
        np.testing.assert_allclose(gradient, alone(p), atol=1e-4)


@pytest.mark.parametrize(
    ("tokens", "found"),
    [
        (np.zeros((2, 5), np.float32), r"float32 \(2, 5\)"),
        (np.zeros((2, 5, 20), np.float32), r"float32 \(2, 5, 20\)"),
        (np.zeros((5, 2, 30), np.int32), r"int32 \(5, 2, 30\)"),
    ],
)
def test_what_is_neither_ids_nor_probabilities_is_refused(tokens, found):
    with pytest.raises(UserError, match=f"tokens are {found}; give integer ids"):
        soft_tokens.check(tokens)
