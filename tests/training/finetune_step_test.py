"""A step of fine-tuning: the same on any number of devices and in any row; what is frozen stays."""

import dataclasses
from types import SimpleNamespace

import jax
import numpy as np
import pytest

from esm1nv_jax.checkpoints.model_folder import flatten
from esm1nv_jax.common.errors import UserError
from esm1nv_jax.data.packing import StreamConfig
from esm1nv_jax.data.source import Labels, MemorySource
from esm1nv_jax.model import encoder, lora
from esm1nv_jax.model.heads import HeadConfig
from esm1nv_jax.training import evaluation, sharding, step
from esm1nv_jax.training.label_prediction import LabelPrediction, balanced_weights
from esm1nv_jax.training.metrics import ThroughputWindow, training_flops
from esm1nv_jax.training.optimizer import OptimizerConfig
from esm1nv_jax.training.tuning import Tuning
from tests.model.parameters import random_parameters
from tests.model.rows import pack, random_tokens

MODEL = encoder.EncoderConfig(
    layers=2, width=32, heads=2, ffn=64, positions=66, dropout=0.1, attention_dropout=0.1
)
LORA = lora.LoraConfig(rank=4)
SEGMENTS = 21
HEADS = {
    "residue": HeadConfig("residue", "classification", ("a", "b", "c")),
    "values": HeadConfig("residue", "regression"),
    "protein": HeadConfig("protein", "classification", ("a", "b", "c"), "attention"),
    "several": HeadConfig("protein", "multilabel", ("a", "b", "c"), "cls"),
    "fitness": HeadConfig("protein", "regression", (), "mean"),
}


def config(head="residue", method="full", **fields) -> step.StepConfig:
    tuning = Tuning.parse(method, LORA, fields.pop("frozen_dtype", "float32"))
    objective = LabelPrediction(HEADS[head], SEGMENTS, lora=tuning.lora, label_mean=0.1)
    return step.StepConfig(
        seed=1,
        model=MODEL,
        compute=encoder.ComputeConfig(dtype=fields.pop("dtype", "float32")),
        objective=objective,
        optimizer=OptimizerConfig(peak_lr=1e-2, min_lr=0.0, warmup=1, constant=0, horizon=100),
        tuning=tuning,
        **fields,
    )


def proteins(number: int, rows: int):
    return [
        [random_tokens(1000 * number + 10 * r + s, 3 + (7 * r + 13 * s) % 25) for s in range(2)]
        for r in range(rows - 1)
    ]


def batch(head: str, number: int = 0, rows: int = 16) -> dict[str, np.ndarray]:
    """Ragged rows, the last of them empty, with labels that the letters decide."""
    return labeled(pack([*proteins(number, rows), []], 64), HEADS[head])


def labeled(arrays, head: HeadConfig):
    tokens, is_residue = arrays["tokens"], arrays["tokens"] >= 5
    if head.level == "residue":
        value = np.where(tokens % 5 == 0, -1, tokens % 3)  # a fifth is not used
        labels = np.where(is_residue, value, -1).astype(np.int32)
        examples = np.where(is_residue, arrays["segment_ids"], -1)
    else:
        shape = (len(tokens), SEGMENTS)
        labels, examples = np.full(shape, -1, np.int32), np.full(shape, -1)
        for row, column in zip(*np.nonzero(arrays["positions"] == 0), strict=True):
            if segment := arrays["segment_ids"][row, column]:
                labels[row, segment - 1] = tokens[row, column + 1] % 3
                examples[row, segment - 1] = 10 * row + segment
    if head.kind == "multilabel":
        labels = np.where(labels[..., None] < 0, -1, np.arange(3) <= labels[..., None])
    if head.kind == "regression":
        labels = np.where(labels < 0, np.nan, labels).astype(np.float32)
    return arrays | {
        "labels": labels if head.kind == "regression" else labels.astype(np.int32),
        "label_examples": examples.astype(np.int32),
    }


def reads(config, arrays):
    return {name: arrays[name] for name in config.objective.batch_dtypes}


def fresh(objective) -> dict:
    """Parameters to start from, in NumPy."""
    added = objective.init_added(MODEL, 0)
    return random_parameters(MODEL) | jax.tree.map(np.asarray, added)


def train(config, head: str, devices: int, steps: int, params=None):
    mesh = sharding.make_mesh(jax.devices()[:devices])
    train_step, _ = step.jit_steps(config, mesh)
    layout = sharding.sharding(mesh, "state")
    if params is None:
        state = jax.jit(step.create_state, static_argnums=0, out_shardings=layout)(config)
    else:
        state = jax.device_put(step.state_from_params(config, params), layout)
    losses = []
    for n in range(steps):
        arrays = reads(config, batch(head, n % 2))
        state, values = train_step(state, jax.device_put(arrays, sharding.sharding(mesh, "batch")))
        values = values.fetch()
        losses.append(values["loss"] / values["num_targets"])
    return state, np.array(losses)


@pytest.mark.integration
@pytest.mark.parametrize(
    ("head", "method"), [("residue", "lora=4"), ("several", "full"), ("fitness", "last=1")]
)
def test_eight_devices_learn_as_one(head, method):
    _, alone = train(config(head, method), head, 1, 6)
    _, losses = train(config(head, method, microbatches=2), head, 8, 6)
    np.testing.assert_allclose(losses, alone, rtol=1e-5)
    assert alone[-1] < alone[0]


@pytest.mark.integration
@pytest.mark.parametrize("head", HEADS)
def test_packed_equals_alone(head):
    objective = config(head, "lora=4").objective
    params = fresh(objective)

    def outputs(rows):
        arrays = labeled(pack(rows, 64), HEADS[head])
        return jax.device_get(
            step.batch_outputs(config(head, "lora=4"), params, reads(config(head), arrays), None)
        )

    packed = [[random_tokens(1, 20), random_tokens(2, 11), random_tokens(3, 25)]]
    alone = [[sequence] for sequence in packed[0]]
    (sums, together), (sums_alone, apart) = outputs(packed), outputs(alone)
    for name in sums:
        if name != "num_slots":
            np.testing.assert_allclose(sums[name], sums_alone[name], rtol=1e-5, err_msg=name)
    expected, _, _ = objective.used_labels(apart)
    labels, _, _ = objective.used_labels(together)
    np.testing.assert_array_equal(labels, expected)
    np.testing.assert_allclose(
        objective.used_labels(together)[1], objective.used_labels(apart)[1], atol=1e-5
    )


@pytest.mark.parametrize("head", ["protein", "several", "fitness"])
def test_an_evaluation_holds_the_labels_alone(head):
    """A row has places for many more proteins than it holds, each with an output for each class."""
    objective, is_float = config(head).objective, head == "fitness"
    values = np.arange(7, dtype=np.float32) if is_float else np.arange(7, dtype=np.int32) % 2
    values = np.stack([values] * 3, axis=1) if head == "several" else values
    records = [(f"p{i}", b"MKV" * (i + 3)) for i in range(7)]
    source = MemorySource(records, Labels(values, None))
    stream = StreamConfig(seed=0, rows=2, row_length=64, max_residues=62)
    mesh = sharding.make_mesh(jax.devices()[:1])

    def eval_step(params, arrays):
        predicted = np.zeros((2, SEGMENTS, objective.head.outputs), np.float32)
        outputs = {"labels": arrays["labels"], "examples": arrays["label_examples"]}
        sums = {"loss": 1.0, "num_targets": 1.0}
        return SimpleNamespace(fetch=lambda: sums), outputs | {"predicted": predicted}

    _, outputs = evaluation.evaluate(
        objective, stream, mesh, eval_step, lambda activity: None, source, {}
    )
    assert outputs["predicted"].shape == (7, objective.head.outputs)
    order = np.argsort(outputs["examples"])
    np.testing.assert_array_equal(outputs["labels"][order], values)


@pytest.mark.parametrize(
    "method",
    [
        *(pytest.param(m, marks=pytest.mark.integration) for m in ("full", "last=1", "lora=4")),
        "head",
    ],
)
def test_only_what_is_trained_moves(method):
    chosen = config("protein", method)
    params = fresh(chosen.objective)
    state, _ = train(chosen, "protein", 1, 2, params)
    before, after = flatten(params), flatten(jax.device_get(state.all_params))
    assert before.keys() == after.keys()
    moved = {name for name in before if np.any(before[name] != after[name])}
    in_head = {name for name in before if name.startswith("head/")}
    first_block = {name for name in before if name.startswith("blocks/0/")}
    last_block = {name for name in before if name.startswith("blocks/1/")}
    assert in_head <= moved and not any(name.startswith("lm_head/") for name in moved)
    # The bias of the keys, a third of that of qkv, has no gradient; the other two have.
    expected = {
        "full": first_block | last_block | {"token_embedding/embedding", "final_norm/scale"},
        "last=1": last_block | {"final_norm/scale"},
        "lora=4": {name for name in before if name.startswith("lora/")},
        "head": set(),
    }[method]
    assert expected <= moved
    if method != "full":
        assert not moved & (first_block | {"token_embedding/embedding"})
    if method in ("lora=4", "head"):
        assert not moved & last_block
    assert set(flatten(state.params)).isdisjoint(flatten(state.frozen))
    moments = jax.tree.leaves(state.opt_state)
    trained = sum(x.size for x in jax.tree.leaves(state.params))
    assert sum(x.size for x in moments) == pytest.approx(2 * trained, abs=4)


def test_lora_starts_at_the_loss_of_its_base():
    params = fresh(config("residue", "lora=4").objective)
    arrays = batch("residue")
    plain = {name: value for name, value in params.items() if name != "lora"}
    losses = [
        float(step.batch_sums(c, p, reads(c, arrays), None)["loss"])
        for c, p in ((config("residue", "lora=4"), params), (config("residue"), plain))
    ]
    assert losses[0] == losses[1]


@pytest.mark.integration
def test_frozen_kernels_in_bf16_change_no_bit_of_a_bf16_step():
    params = fresh(config("residue", "lora=4").objective)
    states = []
    for dtype in ("float32", "bfloat16"):
        chosen = config("residue", "lora=4", dtype="bfloat16", frozen_dtype=dtype)
        state, losses = train(chosen, "residue", 1, 3, params)
        kernel = state.frozen["blocks"]["0"]["qkv"]["kernel"]
        assert kernel.dtype == dtype and state.frozen["final_norm"]["scale"].dtype == "float32"
        states.append((jax.device_get(state.params), losses))
    jax.tree.map(np.testing.assert_array_equal, *states)


def test_class_weights_and_masked_labels():
    """A weight of two counts as a second copy of the example."""
    arrays = reads(config(), batch("residue"))
    objective = dataclasses.replace(config().objective, class_weights=(1.0, 2.0, 1.0))
    params = fresh(objective)

    def sums(objective, arrays):
        return jax.device_get(
            step.batch_sums(
                dataclasses.replace(config(), objective=objective), params, arrays, None
            )
        )

    def only(label):
        kept = np.where(arrays["labels"] == label, arrays["labels"], -1)
        return sums(config().objective, arrays | {"labels": kept})

    weighted, parts = sums(objective, arrays), [only(label) for label in range(3)]
    for name in ("loss", "num_targets"):
        expected = parts[0][name] + 2 * parts[1][name] + parts[2][name]
        assert weighted[name] == pytest.approx(expected, rel=1e-5)
    assert weighted["num_labels"] == np.sum(arrays["labels"] >= 0)
    assert balanced_weights(np.array([1, 3])) == (2.0, pytest.approx(2 / 3))


def test_a_batch_without_labels_moves_nothing_but_by_weight_decay():
    mesh = sharding.make_mesh(jax.devices()[:1])
    chosen = config("residue", "head")
    train_step, _ = step.jit_steps(chosen, mesh)
    arrays = reads(chosen, batch("residue"))
    arrays["labels"] = np.full_like(arrays["labels"], -1)
    _, values = train_step(step.state_from_params(chosen, fresh(chosen.objective)), arrays)
    values = values.fetch()
    assert values["finite"] and values["loss"] == 0 and values["gradient_norm"] == 0


@pytest.mark.parametrize("text", ["last", "last=0", "lora", "half", "lora=x"])
def test_what_is_no_method(text):
    with pytest.raises(UserError, match="full, last=BLOCKS, lora=RANK or head"):
        Tuning.parse(text, LORA)


def test_more_blocks_than_there_are():
    with pytest.raises(UserError, match="last=3: the model has 2 blocks"):
        jax.eval_shape(lambda: step.create_state(config("residue", "last=3")))


@pytest.mark.parametrize("method", ["full", "last=1", "lora=4", "head"])
def test_mfu_counts_what_the_method_computes(method, monkeypatch):
    now = 100.0
    monkeypatch.setattr("time.perf_counter", lambda: now)
    settings = config("protein", method)
    window = ThroughputWindow(MODEL, jax.devices()[:2], settings.objective, settings.tuning)
    window.peak = 1e12
    sums = {"loss": 9.0, "num_labels": 5.0, "num_correct": 2.0, "num_targets": 5.0}
    sums |= {"tokens": 90.0, "sequences": 5.0, "num_slots": 128.0, "sum_squared_lengths": 1800.0}
    window.add(sums)
    with window.pause():
        now += 30
    now += 4
    metrics = window.take()
    assert metrics["seconds_per_step"] == 4
    assert metrics["tokens_per_second"] == (90 - 2 * 5) / 4  # residues
    flops = metrics["mfu"] * metrics["seconds_per_step"] * 2e12
    head = 2 * (3 * MODEL.width + MODEL.width) * 5  # three classes, and the scores of the pooling
    assert flops == pytest.approx(training_flops(MODEL, 90, 1800, head, settings.tuning))
    assert metrics["flops_per_step"] == pytest.approx(flops)
