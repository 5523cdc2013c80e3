"""What ESM-1 has otherwise: a key and value in place of those of `</s>`, and a bare LM head."""

import dataclasses

import jax
import numpy as np
import pytest

from esm1nv_jax.common.errors import UserError
from esm1nv_jax.model import encoder
from tests.model import encoder_test, reference
from tests.model.encoder_test import run
from tests.model.rows import pack, random_tokens

CONFIG = encoder.EncoderConfig(
    layers=2,
    width=48,
    heads=4,
    ffn=64,
    positions=130,
    ffn_activation="gelu_erf",
    bias_kv=True,
    bare_head=True,
    tied_head=False,
)


def attend(x, p, heads):
    """Each residue attends to all tokens but the last, and to one more key and value."""
    q, k, v = np.split(x @ p["qkv"]["kernel"] + p["qkv"]["bias"], 3, axis=1)
    k, v = (np.concatenate([a[:-1], p["bias_kv"][i : i + 1]]) for i, a in enumerate((k, v)))
    size = x.shape[1] // heads
    parts = [slice(h * size, (h + 1) * size) for h in range(heads)]
    mixed = [reference.softmax(q[:, s] @ k[:, s].T / size**0.5) @ v[:, s] for s in parts]
    return np.concatenate(mixed, axis=1) @ p["out_proj"]["kernel"] + p["out_proj"]["bias"]


def forward(params, tokens, heads):
    x = params["token_embedding"]["embedding"][tokens]
    x = x + params["position_embedding"]["embedding"][: len(tokens)]
    for p in params["blocks"].values():
        x = x + attend(reference.layer_norm(x, p["attention_norm"]), p, heads)
        hidden = reference.layer_norm(x, p["ffn_norm"]) @ p["fc1"]["kernel"] + p["fc1"]["bias"]
        x = x + reference.gelu_erf(hidden) @ p["fc2"]["kernel"] + p["fc2"]["bias"]
    head = params["lm_head"]
    return x, x @ head["decoder"]["embedding"].T + head["bias"]


def test_the_encoder_equals_numpy_in_fp64():
    params = encoder_test.parameters(CONFIG)
    sequences = [random_tokens(1, 20), random_tokens(2, 7), random_tokens(3, 33)]
    batch = pack([sequences[:2], sequences[2:]], 40)
    out = run(CONFIG, params, batch, hidden_layers=(-1,))
    wide = jax.tree.map(lambda x: np.asarray(x, np.float64), params)
    for row, start, tokens in ((0, 0, sequences[0]), (0, 22, sequences[1]), (1, 0, sequences[2])):
        x, logits = forward(wide, tokens, CONFIG.heads)
        part = slice(start, start + len(tokens) - 1)  # what </s> itself gives is not read
        np.testing.assert_allclose(out.hidden[-1][row, part], x[:-1], atol=1e-5 * np.abs(x).max())
        np.testing.assert_allclose(out.logits[row, part, :30], logits[:-1, :30], atol=5e-5)


def test_the_end_token_is_not_read():
    params = encoder_test.parameters(CONFIG)
    tokens = random_tokens(1, 20)
    other = tokens.copy()
    other[-1] = 7
    a, b = (run(CONFIG, params, pack([[t]], 40)).logits[0, :21] for t in (tokens, other))
    np.testing.assert_array_equal(a, b)


def test_a_bare_head_needs_pre_norm():
    with pytest.raises(UserError, match="bare_head=True is for norm='pre'"):
        dataclasses.replace(CONFIG, norm="post")
