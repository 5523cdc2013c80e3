"""Attention weights and gradients of sequences by the Python API."""

import dataclasses
import re
from pathlib import Path

import jax
import numpy as np
import pytest

from esm1nv_jax.common.errors import UserError
from esm1nv_jax.data import tokenizer
from esm1nv_jax.inference.likelihood import pseudo_log_likelihood

SEQUENCE = "MKTVRQERLK"


def test_attention_weights_are_distributions_over_the_tokens_of_the_sequence(model):
    weights = model.attention(SEQUENCE)
    assert weights.shape == (2, 4, 12, 12) and weights.dtype == np.float32
    np.testing.assert_allclose(weights.sum(axis=-1), 1, atol=1e-6)
    apply = jax.jit(lambda p, x: model.apply(p, x, return_attention=True))
    output = apply(model.params, tokenizer.encode(SEQUENCE)[None].astype(int))
    np.testing.assert_allclose(weights, np.concatenate(output.attention), atol=1e-6)


def test_the_pseudo_log_likelihood_of_one_hot_vectors_is_that_of_the_sequence(model):
    one_hot = jax.nn.one_hot(tokenizer.encode("MKXVRBLAW"), tokenizer.VOCABULARY)
    vocabulary = tokenizer.ESM1NV.removesuffix(" X B Z U O")  # as AntiBERTy
    config = dataclasses.replace(model.config, vocabulary=vocabulary)
    without_x = dataclasses.replace(model, config=config)
    residues, pll = pseudo_log_likelihood(without_x.on_devices, [b"MKXVRBLAW"], 64)
    assert residues[0] == 7
    value = jax.jit(without_x.pseudo_log_likelihood)(without_x.params, one_hot)
    np.testing.assert_allclose(value, pll[0], rtol=1e-5)


def test_more_tokens_than_positions_are_refused(model):
    tokens = np.full((1, 67), tokenizer.encode("M")[1])
    with pytest.raises(UserError, match="rows of 67 tokens: this model has 66 positions"):
        jax.jit(model.apply)(model.params, tokens)
    with pytest.raises(UserError, match="rows of 67 tokens"):
        model.pseudo_log_likelihood(model.params, jax.nn.one_hot(tokens[0], tokenizer.VOCABULARY))
    positions = np.arange(67)[None] % 50
    assert np.isfinite(model.apply(model.params, tokens, positions_BT=positions).logits).all()


def test_the_design_in_the_documents_raises_the_pseudo_log_likelihood(model):
    text = Path(__file__).parents[2].joinpath("docs/embeddings.md").read_text(encoding="utf-8")
    section = text.partition("## Gradients of a sequence")[2]
    code = re.search(r"```python\n(.*?)```", section, re.DOTALL)[1]
    names = {"model": model}
    exec(code, names)
    designed = names["sequence"]
    assert len(designed) == 12 and set(designed) <= set(tokenizer.RESIDUES[:20])
    _, pll = pseudo_log_likelihood(model.on_devices, [designed.encode()], 64)
    letters = np.array(list(tokenizer.RESIDUES[:20]))
    random = [
        "".join(np.random.default_rng(seed).choice(letters, 12)).encode() for seed in range(20)
    ]
    _, of_random = pseudo_log_likelihood(model.on_devices, random, 64)
    assert pll[0] > of_random.max()
