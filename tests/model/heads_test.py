"""Prediction heads: what they compute, and that the other proteins of a row do not matter."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from esm1nv_jax.common.errors import UserError
from esm1nv_jax.model import heads
from esm1nv_jax.model.heads import HeadConfig

WIDTH, CLASSES = 12, ("E", "H", "L")
SIZES = (7, 5, 9)  # tokens of the proteins of a row, with <s> and </s>
HEADS = [
    HeadConfig("residue", "classification", CLASSES),
    HeadConfig("residue", "regression"),
    *(HeadConfig("protein", "multilabel", CLASSES, p) for p in heads.POOLINGS),
]
name_of = "{0.level}-{0.kind}-{0.pooling}".format


def parameters(config, seed=0):
    """Large values in all arrays, so that none of them can be forgotten."""
    leaves, tree = jax.tree.flatten(heads.abstract(config, WIDTH))
    rng = np.random.default_rng(seed)
    return tree.unflatten([rng.normal(size=leaf.shape).astype(np.float32) for leaf in leaves])


def row(sizes, padding=4):
    segments = np.repeat(np.arange(1, len(sizes) + 1), sizes)
    positions = np.concatenate([np.arange(n) for n in sizes])
    pad = (0, padding)
    return np.pad(segments, pad)[None], np.pad(positions, pad)[None]


def run(config, params, x_TD, sizes, padding=4):
    segments, positions = row(sizes, padding)
    x = np.pad(x_TD, ((0, padding), (0, 0)), constant_values=3.0)[None]
    out = jax.jit(heads.logits, static_argnums=(0, 5))(
        config, params, jnp.asarray(x), segments, positions, len(sizes) + 1
    )
    return np.asarray(out[0])


def states(seed=1):
    return np.random.default_rng(seed).normal(size=(sum(SIZES), WIDTH)).astype(np.float32)


def witness(config, params, x_TD):
    """The head on one protein, in NumPy and fp64."""
    params = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), params)
    x = x_TD.astype(np.float64)
    out = params["out_proj"]
    if config.level == "protein" and config.pooling == "cls":
        x = np.tanh(x[0] @ params["dense"]["kernel"] + params["dense"]["bias"])
    elif config.level == "protein":
        x = x[1:-1]
        scores = x @ params["score"]["kernel"][:, 0] if "score" in params else np.zeros(len(x))
        weights = np.exp(scores) / np.exp(scores).sum()
        x = weights @ x
    return x @ out["kernel"] + out["bias"]


@pytest.mark.parametrize("config", HEADS, ids=name_of)
def test_a_packed_row_gives_what_each_protein_gives_in_numpy(config):
    params, x = parameters(config), states()
    out = run(config, params, x, SIZES)
    ends = np.cumsum(SIZES)
    for i, (size, end) in enumerate(zip(SIZES, ends, strict=True)):
        result = out[end - size : end] if config.level == "residue" else out[i]
        expected = witness(config, params, x[end - size : end])
        np.testing.assert_allclose(result, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("config", HEADS, ids=name_of)
def test_packed_equals_alone(config):
    params, x = parameters(config), states()
    packed = run(config, params, x, SIZES)
    a, b = SIZES[0], SIZES[0] + SIZES[1]
    alone = run(config, params, x[a:b], SIZES[1:2])
    if config.level == "residue":
        packed, alone = packed[a:b], alone[: b - a]
    else:
        packed, alone = packed[1], alone[0]
    np.testing.assert_allclose(packed, alone, rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize("config", HEADS, ids=name_of)
def test_neighbours_change_no_bit(config):
    params, x = parameters(config), states()
    a, b = SIZES[0], SIZES[0] + SIZES[1]
    other = states(seed=2) * 10
    other[a:b] = x[a:b]
    before, after = (run(config, params, value, SIZES) for value in (x, other))
    own = slice(a, b) if config.level == "residue" else 1
    np.testing.assert_array_equal(before[own], after[own])
    assert not np.allclose(before[0], after[0])


@pytest.mark.parametrize("pooling", heads.POOLINGS)
def test_gradients_reach_all_parameters_and_no_other_token(pooling):
    config = HeadConfig("protein", "regression", pooling=pooling)
    params, segments, positions = parameters(config), *row(SIZES)
    x = jnp.asarray(np.pad(states(), ((0, 4), (0, 0)))[None])

    def first(params, x):
        return heads.logits(config, params, x, segments, positions, len(SIZES) + 1)[0, 0, 0]

    by_params, by_x = jax.grad(first, argnums=(0, 1))(params, x)
    assert all(np.isfinite(g).all() and np.any(g) for g in jax.tree.leaves(by_params))
    reached = np.flatnonzero(np.any(np.asarray(by_x[0]) != 0, axis=1))
    assert reached.tolist() == ([0] if pooling == "cls" else list(range(1, SIZES[0] - 1)))


def test_attention_pooling_starts_as_the_mean():
    x = states()
    mean, attention = (
        run(c, heads.init(c, WIDTH, 0), x, SIZES)
        for c in (HeadConfig("protein", "regression", pooling=p) for p in ("mean", "attention"))
    )
    np.testing.assert_allclose(mean, attention, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize(
    "fields, message",
    [
        (("atom", "regression"), "residue, protein"),
        (("residue", "ranking"), "classification, multilabel, regression"),
        (("residue", "regression", ("A",)), "cannot have the 1 classes A"),
        (("protein", "classification"), "cannot have the 0 classes"),
        (("protein", "classification", ("A", "B", "A")), "twice: A, B, A"),
        (("protein", "regression", (), "max"), "mean, attention, cls"),
    ],
)
def test_a_head_that_cannot_be_is_refused(fields, message):
    with pytest.raises(UserError, match=message):
        HeadConfig(*fields)
