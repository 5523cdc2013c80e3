"""Muon against NumPy: which parameters it moves, each matrix by itself, and how far."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from esm1nv_jax.checkpoints.model_folder import flatten
from esm1nv_jax.common.errors import UserError
from esm1nv_jax.model import heads
from esm1nv_jax.model.heads import HeadConfig
from esm1nv_jax.training.optimizer import OptimizerConfig, optimizer
from tests.model.modern_test import ESMC
from tests.model.parameters import random_parameters

SHARED = {"peak_lr": 0.1, "min_lr": 0.1, "warmup": 0, "constant": 0, "horizon": 9}
MUON = OptimizerConfig(kind="muon", **SHARED)


def orthogonalized(g):
    """Five steps of Newton-Schulz on a matrix [n, m], fp64, with the published coefficients."""
    x = g / np.linalg.norm(g)
    for _ in range(5):
        gram = x @ x.T
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    return 0.2 * np.sqrt(max(x.shape)) * x


def run_steps(config, params, gradients):
    tx = optimizer(config)
    state, update = tx.init(params), jax.jit(tx.update)
    for grads in gradients:
        updates, state = update(grads, state, params)
        params = jax.tree.map(jnp.add, params, updates)
    return flatten(jax.device_get(params))


def random_like(params, seed):
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda x: (rng.normal(size=x.shape) * 0.01).astype(np.float32), params)


@pytest.fixture(scope="module")
def params():
    head = heads.init(HeadConfig("residue", "classification", ("H", "E", "C")), ESMC.width, 0)
    return jax.device_get(random_parameters(ESMC) | {"head": head})


def test_three_steps_equal_numpy(params):
    gradients = [random_like(params, seed) for seed in range(3)]
    found = run_steps(MUON, params, gradients)
    flat = [flatten(g) for g in gradients]
    norms = [np.sqrt(sum((x.astype(np.float64) ** 2).sum() for x in g.values())) for g in flat]
    for name, parts in {"qkv": 3, "out_proj": 1, "fc1": 2, "fc2": 1}.items():
        path = f"blocks/1/{name}/kernel"
        x, moment = flatten(params)[path].astype(np.float64), 0.0
        for n, g in enumerate(flat):
            clipped = g[path].astype(np.float64) * min(1, 1 / norms[n])
            moment = 0.95 * moment + 0.05 * clipped
            ahead = 0.95 * moment / (1 - 0.95 ** (n + 2)) + 0.05 * clipped / (1 - 0.95 ** (n + 1))
            step = [orthogonalized(part) for part in np.split(ahead, parts, axis=1)]
            x = x - 0.1 * (np.concatenate(step, axis=1) + 0.01 * x)
        np.testing.assert_allclose(found[path], x, atol=1e-4)


def test_all_but_hidden_matrices_are_moved_by_adamw(params):
    gradients = [random_like(params, seed) for seed in range(3)]
    muon = run_steps(MUON, params, gradients)
    adamw = run_steps(OptimizerConfig(**SHARED), params, gradients)
    apart = {name for name in muon if not np.array_equal(muon[name], adamw[name])}
    assert apart == {
        "lm_head/dense/kernel",
        *(
            f"blocks/{i}/{name}/kernel"
            for i in range(ESMC.layers)
            for name in ("qkv", "out_proj", "fc1", "fc2")
        ),
    }


def test_impossible_values_are_refused():
    with pytest.raises(UserError, match="adamw, muon"):
        OptimizerConfig(kind="lion")
    with pytest.raises(UserError, match="muon_beta"):
        OptimizerConfig(muon_beta=1.0)
