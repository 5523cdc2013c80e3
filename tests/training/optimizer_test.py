"""The schedule to the digit, and AdamW against a hand-written one."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from esm1nv_jax.common.errors import UserError
from esm1nv_jax.training.optimizer import (
    OptimizerConfig,
    decays,
    optimizer,
    resolve_shares,
    schedule,
)

CARD = OptimizerConfig()


@pytest.mark.parametrize(
    ("update", "rate"),
    [
        (0, 0.0),
        (1, 4e-7),
        (250, 1e-4),
        (499, 2e-4 * 499 / 500),
        (500, 2e-4),
        (475_250, 1.1e-4),  # halfway down the cosine
        (237_875, 2e-5 + 0.9e-4 * (1 + math.cos(math.pi / 4))),
        (949_999, 2e-5),
        (950_000, 2e-5),
        (957_610, 2e-5),  # where the release stopped
        (1_000_000, 2e-5),
        (2_000_000, 2e-5),
    ],
)
def test_the_original_holds_the_minimum_last(update, rate):
    assert float(schedule(CARD)(update)) == pytest.approx(rate, rel=2e-6, abs=1e-12)


@pytest.mark.parametrize(
    ("update", "rate"),
    [(0, 0.0), (500, 2e-4), (50_499, 2e-4), (50_500, 2e-4), (525_250, 1.1e-4), (1_000_000, 2e-5)],
)
def test_the_other_reading_holds_the_peak(update, rate):
    config = OptimizerConfig(constant_at="peak")
    assert float(schedule(config)(update)) == pytest.approx(rate, rel=2e-6, abs=1e-12)


@pytest.mark.parametrize("at", ["min_lr", "peak"])
def test_corners_without_a_phase(at):
    flat = schedule(OptimizerConfig(1e-3, 1e-4, 0, 100, at, 100))
    level = 1e-4 if at == "min_lr" else 1e-3
    assert [float(flat(n)) for n in (0, 99)] == pytest.approx([level, level])
    assert float(flat(100)) == pytest.approx(1e-4)
    no_warm = schedule(OptimizerConfig(1e-3, 0.0, 0, 0, at, 10))
    assert [float(no_warm(n)) for n in (0, 5, 10)] == pytest.approx([1e-3, 5e-4, 0.0], abs=1e-10)
    only_warm = schedule(OptimizerConfig(1e-3, 0.0, 10, 0, at, 10))
    assert [float(only_warm(n)) for n in (0, 5, 9)] == pytest.approx([0, 5e-4, 9e-4])


def test_adamw_equals_a_hand_written_one():
    config = OptimizerConfig(
        peak_lr=0.1, min_lr=0.0, warmup=2, constant=0, horizon=50, weight_decay=0.2, clip_norm=0.7
    )
    rng = np.random.default_rng(0)
    params = {
        "dense": {"kernel": rng.normal(size=(3, 2)), "bias": rng.normal(size=2)},
        "norm": {"scale": rng.normal(size=2)},
    }
    params = jax.tree.map(jnp.float32, params)
    flat = {
        k: np.asarray(v, np.float64)
        for k, v in (
            ("kernel", params["dense"]["kernel"]),
            ("bias", params["dense"]["bias"]),
            ("scale", params["norm"]["scale"]),
        )
    }
    m, v = ({k: np.zeros_like(x) for k, x in flat.items()} for _ in range(2))
    tx = optimizer(config)
    state = tx.init(params)
    for n in range(6):
        g = {k: rng.normal(size=x.shape) * (3 if n % 2 else 0.01) for k, x in flat.items()}
        tree = {"dense": {"kernel": g["kernel"], "bias": g["bias"]}, "norm": {"scale": g["scale"]}}
        updates, state = tx.update(jax.tree.map(jnp.float32, tree), state, params)
        params = jax.tree.map(jnp.add, params, updates)

        norm = math.sqrt(sum((x**2).sum() for x in g.values()))
        lr = 0.1 * n / 2 if n < 2 else 0.05 * (1 + math.cos(math.pi * (n - 2) / 48))
        for k, x in flat.items():
            clipped = g[k] * min(1, 0.7 / norm)
            m[k] = 0.9 * m[k] + 0.1 * clipped
            v[k] = 0.98 * v[k] + 0.02 * clipped**2
            step = m[k] / (1 - 0.9 ** (n + 1)) / (np.sqrt(v[k] / (1 - 0.98 ** (n + 1))) + 1e-8)
            flat[k] = x - lr * (step + (0.2 * x if k == "kernel" else 0))
    np.testing.assert_allclose(params["dense"]["kernel"], flat["kernel"], rtol=2e-5)
    np.testing.assert_allclose(params["dense"]["bias"], flat["bias"], rtol=2e-5)
    np.testing.assert_allclose(params["norm"]["scale"], flat["scale"], rtol=2e-5)


def test_biases_and_norms_do_not_decay():
    from esm1nv_jax.checkpoints.model_folder import flatten
    from esm1nv_jax.model import encoder

    config = encoder.EncoderConfig(layers=1, width=8, heads=2, ffn=8, positions=8)
    mask = flatten(decays(encoder.abstract(config)))
    assert {name for name, decayed in mask.items() if decayed} == {
        "token_embedding/embedding",
        "position_embedding/embedding",
        "lm_head/dense/kernel",
        *(f"blocks/0/{n}/kernel" for n in ("qkv", "out_proj", "fc1", "fc2")),
    }


def test_lengths_may_be_shares_of_the_steps():
    shares = {"warmup": 0.05, "constant": 0.29, "horizon": 1.0, "peak_lr": 0.5}
    whole = {"warmup": 5, "constant": 29, "horizon": 100, "peak_lr": 0.5}
    assert resolve_shares(shares, 100) == whole
    assert resolve_shares(whole | {"warmup": 1.0}, 7) == whole | {"warmup": 1}
    assert resolve_shares({"warmup": 0.5, "constant": 0.5, "horizon": 1}, 11)["horizon"] == 11
    with pytest.raises(UserError, match=r"horizon=100\.5 is neither whole"):
        resolve_shares(whole | {"horizon": 100.5}, 100)


@pytest.mark.parametrize(
    "wrong",
    [
        {"constant_at": "max"},
        {"decay": "square"},
        {"warmup": 600, "constant": 500, "horizon": 1000},
        {"min_lr": 1.0},
        {"clip_norm": 0.0},
        {"beta2": 1.0},
        {"epsilon": 0.0},
        {"weight_decay": -0.1},
    ],
)
def test_impossible_optimisers_are_refused(wrong):
    with pytest.raises(UserError, match="optimizer"):
        OptimizerConfig(**wrong)
