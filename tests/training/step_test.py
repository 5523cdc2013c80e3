"""One step is the same step on any number of devices and in any number of parts."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from esm1nv_jax.model import encoder, masking
from esm1nv_jax.training import sharding, step
from esm1nv_jax.training.objective import MaskedLM
from esm1nv_jax.training.optimizer import OptimizerConfig
from tests.model.compiling import UNOPTIMIZED, inexact_products
from tests.model.rows import pack, random_tokens

CONFIG = step.StepConfig(
    seed=1,
    model=encoder.EncoderConfig(
        layers=1, width=32, heads=2, ffn=64, positions=66, dropout=0.1, attention_dropout=0.1
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


@pytest.mark.parametrize(("loss", "perplexity"), [(2.0, 7.389), (1e4, np.inf), (np.nan, np.nan)])
def test_a_loss_that_is_no_number_is_no_infinite_perplexity(loss, perplexity):
    sums = {"loss": loss, "loss_mask": loss, "num_correct_masked": 0, "num_targets": 1}
    found = CONFIG.objective.metrics(sums | {"num_masked": 1})
    assert found["perplexity_mask"] == pytest.approx(perplexity, nan_ok=True, rel=1e-3)


@functools.cache
def jitted(config, devices: int):
    """(train step, mesh)."""
    mesh = sharding.make_mesh(jax.devices()[:devices])
    return step.jit_steps(config, mesh)[0], mesh


def lower(config, devices: int):
    state = jax.eval_shape(lambda: step.create_state(config))
    shapes = {k: jax.ShapeDtypeStruct(v.shape, v.dtype) for k, v in batch(0).items()}
    return jitted(config, devices)[0].lower(state, shapes)


def test_every_product_in_fp32_asks_for_fp32():
    assert not inexact_products(lower(CONFIG, 1))


@functools.cache
def compiled(config, devices: int):
    """The train step: tests of one config share its compilation."""
    return lower(config, devices).compile(compiler_options=UNOPTIMIZED)


@functools.cache
def initial_state(config, devices: int):
    """The fresh state, in NumPy: a step consumes the device arrays that it is given."""
    layout = sharding.sharding(jitted(config, devices)[1], "state")
    create_state = jax.jit(
        step.create_state, static_argnums=0, out_shardings=layout, compiler_options=UNOPTIMIZED
    )
    return jax.device_get(create_state(config))


def one_step(config, devices: int, state, arrays):
    mesh = jitted(config, devices)[1]
    # Without the alias: the step overwrites its input.
    state = jax.device_put(state, sharding.sharding(mesh, "state"), may_alias=False)
    arrays = jax.device_put(arrays, sharding.sharding(mesh, "batch"))
    return compiled(config, devices)(state, arrays)


def train(config, devices: int, steps: int, state=None):
    state = initial_state(config, devices) if state is None else state
    losses = []
    for n in range(steps):
        state, values = one_step(config, devices, state, batch(n))
        values = values.fetch()
        losses.append(values["loss"] / values["num_targets"])
    return state, np.array(losses)


@pytest.fixture(scope="module")
def alone():
    return train(CONFIG, 1, 10)


def test_the_loss_falls(alone):
    _, losses = alone
    assert losses[0] == pytest.approx(np.log(30), abs=0.1) and losses[-1] < losses[0] - 0.05


def test_eight_devices_learn_as_one(alone):
    state, losses = train(CONFIG, 8, 10, initial_state(CONFIG, 1))
    np.testing.assert_allclose(losses, alone[1], rtol=1e-5)
    assert int(state.step) == 10


@pytest.mark.integration
def test_microbatches_learn_as_one(alone):
    _, losses = train(dataclasses.replace(CONFIG, microbatches=4), 2, 10)
    np.testing.assert_allclose(losses, alone[1], rtol=1e-5)


@pytest.mark.integration
@pytest.mark.parametrize("microbatches", [1, 2])
def test_one_reduction_of_every_gradient_and_nothing_gathered(microbatches):
    text = lower(dataclasses.replace(CONFIG, microbatches=microbatches), 8).compile().as_text()
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
    lowered = lower(dataclasses.replace(CONFIG, reduce_dtype="bfloat16"), 8)
    assert re.findall(r"all-reduce(?:-start)?\(.*", lowered.compile().as_text())
    stable = lowered.as_text()
    operands = re.findall(r"stablehlo.all_reduce.*?\n.*?\n.*?\n.*?: \((.*?)\)", stable, re.S)
    kernels = [o for o in operands if "64x32" in o]
    assert kernels and all("bf16" in o for o in kernels)


@pytest.mark.integration
def test_dropout_changes_with_the_step_and_not_with_the_layout():
    params = initial_state(CONFIG, 1).params
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
    block["bias"] = np.concatenate(([leaf_value], block["bias"][1:])).astype(np.float32)
    return dataclasses.replace(state, params=params)


@pytest.mark.integration
@pytest.mark.parametrize("allowed", [0, 1])
def test_a_step_that_is_not_finite_moves_nothing(allowed):
    config = dataclasses.replace(CONFIG, nonfinite_allowed=allowed)
    before = poisoned(initial_state(config, 1), np.nan)
    after, values = one_step(config, 1, before, batch(0))
    after = jax.device_get(after)
    jax.tree.map(np.testing.assert_array_equal, before.params, after.params)
    jax.tree.map(np.testing.assert_array_equal, before.opt_state, after.opt_state)
    values = values.fetch()
    assert not values["finite"] and int(after.nonfinite) == 1
    assert bool(values["halted"]) == (allowed == 0)
    assert int(after.step) == allowed  # a skipped step counts, one that halts does not


def test_after_a_halt_nothing_moves_even_where_it_could():
    before = dataclasses.replace(initial_state(CONFIG, 1), nonfinite=np.int32(1))
    after, values = one_step(CONFIG, 1, before, batch(0))
    jax.tree.map(np.testing.assert_array_equal, before.params, jax.device_get(after.params))
    values = values.fetch()
    assert values["finite"] and values["halted"] and int(after.nonfinite) == 1


def test_the_gradient_is_the_mean_over_all_predictions():
    before, whole = initial_state(CONFIG, 1), batch(0)
    key = step.DropoutKey.at(CONFIG.seed, 0, jnp.arange(16, dtype=jnp.uint32))

    def mean_loss(params):
        sums = step.batch_sums(CONFIG, params, whole, key)
        return sums["loss"] / sums["num_targets"]

    expected = jax.jit(jax.grad(mean_loss), compiler_options=UNOPTIMIZED)(before.params)
    norm = np.sqrt(sum(float((x**2).sum()) for x in jax.tree.leaves(expected)))
    _, values = one_step(CONFIG, 8, before, whole)
    assert values.fetch()["gradient_norm"] == pytest.approx(norm, rel=1e-5)
