"""What is read out of compiled programs, held against programs whose figures are known."""

import functools

import jax
import jax.numpy as jnp
import pytest

from esm1nv_jax.common import config_file
from esm1nv_jax.planning.hlo import Program, size
from esm1nv_jax.training import sharding, step
from esm1nv_jax.training.run_config import RunConfig
from tests.planning import abstract


def program(function, *shapes) -> Program:
    arrays = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    return Program(jax.jit(function).lower(*arrays).compile().as_text())


def test_sizes_of_shapes():
    assert size("f32[3,5]{1,0}") == 60
    assert size("(bf16[8], (pred[4], s32[]))") == 16 + 4 + 4


def test_flops_and_bytes_of_a_product():
    found = program(lambda a, b: a @ b, (64, 256), (256, 32))
    assert sum(k.flops for k in found.kernels) == 2 * 64 * 256 * 32
    assert sum(k.bytes for k in found.of("gemm")) == 4 * (64 * 256 + 256 * 32 + 64 * 32)


def test_a_loop_counts_as_often_as_it_runs():
    def looped(x):
        return jax.lax.scan(lambda x, _: (jnp.tanh(x @ x), None), x, length=7)[0]

    assert sum(k.flops for k in program(looped, (64, 64)).kernels) == 7 * 2 * 64**3


@functools.cache
def tiny_step(microbatches=1) -> tuple[Program, int]:
    """The training step on 8 devices, and the bytes of its gradients in fp32."""
    config = config_file.load("tests/configs/tiny.py")
    with config.unlocked():
        config.batch.update(rows=16, microbatches=microbatches)
    mesh = sharding.make_mesh(jax.devices("cpu")[:8])
    settled = RunConfig.from_config_dict(config).step_config(mesh.devices.flat[0])
    state, batch = abstract.arguments(settled, mesh, 16, config.data.row_length)
    compiled = step.jit_steps(settled, mesh)[0].lower(state, batch).compile()
    parameters = sum(leaf.size * 4 for leaf in jax.tree.leaves(state.params))
    return Program(compiled.as_text()), parameters


@pytest.mark.parametrize("microbatches", [1, 2])
def test_the_step_reduces_each_gradient_once_and_gathers_nothing(microbatches):
    found, parameters = tiny_step(microbatches)
    collectives = found.of("collective")
    assert {k.opcode.removesuffix("-start") for k in collectives} == {"all-reduce"}
    assert "bf16" not in " ".join(k.shape for k in collectives)
    total = sum(k.bytes for k in collectives)
    assert parameters <= total <= parameters + 1024  # and some scalars


def test_a_gather_would_be_seen():
    """What the test above relies on: rows that every device needs are an all-gather."""
    mesh = sharding.make_mesh(jax.devices("cpu")[:8])
    spread, whole = (sharding.sharding(mesh, kind) for kind in ("batch", "state"))
    function = jax.jit(lambda x: x * 2, in_shardings=spread, out_shardings=whole)
    x = jax.ShapeDtypeStruct((64, 3), jnp.float32, sharding=spread)
    found = Program(function.lower(x).compile().as_text())
    assert [k.opcode for k in found.of("collective")] == ["all-gather"]
