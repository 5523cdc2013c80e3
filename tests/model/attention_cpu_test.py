"""The attention of one CPU against the plain one."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from esm1nv_jax.model.attention import Case, attention, unfit

CASE = Case("cpu", 0.0, "float32", True, 0.0, 16, 48)


@pytest.mark.parametrize("dtype,bound", [(jnp.float32, 2e-6), (jnp.bfloat16, 2e-2)])
def test_it_equals_the_plain_one_and_so_do_its_gradients(dtype, bound):
    rng = np.random.default_rng(0)
    qkv = jnp.asarray(rng.normal(size=(3, 48, 3, 2, 16)), jnp.float32)
    segments = np.repeat([[1, 1, 2, 3, 0, 0], [1, 2, 2, 2, 3, 4], [0] * 6], 8, axis=1)

    def run(backend):
        def loss(qkv):
            out = attention(qkv, jnp.asarray(segments), dtype, backend=backend)
            return jnp.sum(jnp.sin(out)), out

        (_, out), gradient = jax.value_and_grad(loss, has_aux=True)(qkv)
        return np.asarray(out), np.asarray(gradient)

    for found, expected in zip(run("cpu"), run("xla"), strict=True):
        np.testing.assert_allclose(found, expected, atol=bound)
        assert not found[segments == 0].any()


def test_what_it_cannot_do_is_said():
    assert unfit("cpu", CASE) == ""
    assert "for the caches of a cpu" in unfit("cpu", dataclasses.replace(CASE, platform="gpu"))
    assert "no dropout" in unfit("cpu", dataclasses.replace(CASE, rate=0.1))
