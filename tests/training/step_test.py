"""One step is the same step on any number of devices and in any number of parts."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from esm1nv_jax.model import encoder, masking
from esm1nv_jax.training import sharding, step
from esm1nv_jax.training.objectives.masked_lm import MaskedLM
from esm1nv_jax.training.optimizer import OptimizerConfig
from tests.model.rows import pack, random_tokens

CONFIG = step.StepConfig(
    seed=1,
    model=encoder.EncoderConfig(
        layers=2, width=32, heads=2, ffn=64, positions=66, dropout=0.1, attention_dropout=0.1
    ),
    compute=encoder.ComputeConfig(),
    objective=MaskedLM(masking.recipe("card")),
    optimizer=OptimizerConfig(peak_lr=1e-3, min_lr=0.0, warmup=2, constant=0, horizon=100),
)


def batch(number: int, rows: int = 16) -> dict[str, np.ndarray]:
    """Ragged rows; the last is empty, and devices differ in how much they hold."""
    made = [
        [random_tokens(1000 * number + 10 * r + s, 3 + (7 * r + 13 * s) % 25) for s in range(2)]
        for r in range(rows - 1)
    ]
    return pack([*made, []], 64)


def train(config, devices: int, steps: int):
    mesh = sharding.make_mesh(jax.devices()[:devices])
    train_step, _ = step.jit_steps(config, mesh)
    layout = sharding.sharding(mesh, "state")
    state = jax.jit(step.create_state, static_argnums=0, out_shardings=layout)(config)
    losses = []
    for n in range(steps):
        arrays = jax.device_put(batch(n), sharding.sharding(mesh, "batch"))
        state, values = train_step(state, arrays)
        values = values.fetch()
        losses.append(values["loss"] / values["num_targets"])
    return state, np.array(losses)


@pytest.fixture(scope="module")
def alone():
    return train(CONFIG, 1, 10)


def compiled_text(config, devices: int) -> str:
    mesh = sharding.make_mesh(jax.devices()[:devices])
    train_step, _ = step.jit_steps(config, mesh)
    state = jax.eval_shape(lambda: step.create_state(config))
    shapes = {k: jax.ShapeDtypeStruct(v.shape, v.dtype) for k, v in batch(0).items()}
    return train_step.lower(state, shapes).compile().as_text()


def test_the_loss_falls(alone):
    _, losses = alone
    assert losses[0] == pytest.approx(np.log(30), abs=0.1) and losses[-1] < losses[0] - 0.05


def test_eight_devices_learn_as_one(alone):
    state, losses = train(CONFIG, 8, 10)
    np.testing.assert_allclose(losses, alone[1], rtol=1e-5)
    assert int(state.step) == 10


@pytest.mark.integration
def test_microbatches_learn_as_one(alone):
    _, losses = train(dataclasses.replace(CONFIG, microbatches=4), 2, 10)
    np.testing.assert_allclose(losses, alone[1], rtol=1e-5)


@pytest.mark.integration
@pytest.mark.parametrize("microbatches", [1, 2])
def test_one_reduction_of_every_gradient_and_nothing_gathered(microbatches):
    text = compiled_text(dataclasses.replace(CONFIG, microbatches=microbatches), 8)
    assert not re.search(r"all-gather|all-to-all|collective-permute|reduce-scatter", text)
    reductions = re.findall(r"= (.*) all-reduce(?:-start)?\((.*)", text)
    entry = text[text.index("ENTRY") :]
    assert len(reductions) == len(re.findall(r" all-reduce(?:-start)?\(", entry)), "inside a loop"
    floats = sum(
        int(np.prod([int(n) for n in dims.split(",") if n]))
        for result, _ in reductions
        for dims in re.findall(r"f32\[([\d,]*)\]", result)
    )
    parameters = encoder.parameter_count(CONFIG.model)
    assert parameters <= floats <= parameters + 32  # each once, and a few sums beside them


@pytest.mark.integration
def test_gradients_travel_in_the_dtype_asked_for():
    text = compiled_text(dataclasses.replace(CONFIG, reduce_dtype="bfloat16"), 8)
    lowered = re.findall(r"all-reduce(?:-start)?\(.*", text)
    assert lowered
    mesh = sharding.make_mesh(jax.devices()[:8])
    config = dataclasses.replace(CONFIG, reduce_dtype="bfloat16")
    state = jax.eval_shape(lambda: step.create_state(config))
    stable = step.jit_steps(config, mesh)[0].lower(state, batch(0)).as_text()
    operands = re.findall(r"stablehlo.all_reduce.*?\n.*?\n.*?\n.*?: \((.*?)\)", stable, re.S)
    kernels = [o for o in operands if "64x32" in o]
    assert kernels and all("bf16" in o for o in kernels)


@pytest.mark.integration
def test_dropout_changes_with_the_step_and_not_with_the_layout():
    params = encoder.init(CONFIG.model, 0)
    whole = batch(0)

    def loss(rows, number):
        part = {k: jnp.asarray(v[rows]) for k, v in whole.items()}
        key = step.DropoutKey.at(1, number, jnp.arange(16, dtype=jnp.uint32)[rows])
        return step.batch_sums(CONFIG, params, part, key)["loss"]

    together = loss(slice(0, 16), 3)
    apart = loss(slice(0, 8), 3) + loss(slice(8, 16), 3)
    assert float(together) == pytest.approx(float(apart), rel=1e-6)
    assert float(together) != pytest.approx(float(loss(slice(0, 16), 4)), rel=1e-6)


def poisoned(state, leaf_value):
    params = jax.tree.map(lambda x: x, state.params)
    block = params["blocks"]["0"]["qkv"]
    block["bias"] = block["bias"].at[0].set(leaf_value)
    return dataclasses.replace(state, params=params)


@pytest.mark.integration
@pytest.mark.parametrize("allowed", [0, 1])
def test_a_step_that_is_not_finite_moves_nothing(allowed):
    config = dataclasses.replace(CONFIG, nonfinite_allowed=allowed)
    mesh = sharding.make_mesh(jax.devices()[:1])
    train_step, _ = step.jit_steps(config, mesh)
    state = poisoned(step.create_state(config), jnp.nan)
    before = jax.device_get(state)
    after, values = train_step(state, jax.device_put(batch(0), sharding.sharding(mesh, "batch")))
    after = jax.device_get(after)
    jax.tree.map(np.testing.assert_array_equal, before.params, after.params)
    jax.tree.map(np.testing.assert_array_equal, before.opt_state, after.opt_state)
    values = values.fetch()
    assert not values["finite"] and int(after.nonfinite) == 1
    assert bool(values["halted"]) == (allowed == 0)
    assert int(after.step) == allowed  # a skipped step counts, one that halts does not


def test_after_a_halt_nothing_moves_even_where_it_could():
    config = CONFIG
    mesh = sharding.make_mesh(jax.devices()[:1])
    train_step, _ = step.jit_steps(config, mesh)
    state = dataclasses.replace(step.create_state(config), nonfinite=jnp.int32(1))
    before = jax.device_get(state)
    after, values = train_step(state, jax.device_put(batch(0), sharding.sharding(mesh, "batch")))
    jax.tree.map(np.testing.assert_array_equal, before.params, jax.device_get(after.params))
    values = values.fetch()
    assert values["finite"] and values["halted"] and int(after.nonfinite) == 1


def test_the_gradient_is_the_mean_over_all_predictions():
    config = dataclasses.replace(
        CONFIG, model=dataclasses.replace(CONFIG.model, dropout=0.0, attention_dropout=0.0)
    )
    params = encoder.init(config.model, 0)
    whole = batch(0)

    def mean_loss(params):
        sums = step.batch_sums(config, params, whole, None)
        return sums["loss"] / sums["num_targets"]

    expected = jax.jit(jax.grad(mean_loss))(params)
    norm = np.sqrt(sum(float((x**2).sum()) for x in jax.tree.leaves(expected)))
    mesh = sharding.make_mesh(jax.devices()[:4])
    train_step, _ = step.jit_steps(config, mesh)
    state = jax.device_put(step.state_from_params(config, params), sharding.sharding(mesh, "state"))
    _, values = train_step(state, jax.device_put(whole, sharding.sharding(mesh, "batch")))
    assert values.fetch()["gradient_norm"] == pytest.approx(norm, rel=1e-5)
