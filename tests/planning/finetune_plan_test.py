"""The plan of fine-tuning: what is frozen has no optimizer, no gradient and no reduction."""

import csv

import jax
import numpy as np
import pytest

from esm1nv_jax.checkpoints import model_folder
from esm1nv_jax.model import encoder
from esm1nv_jax.model.heads import HeadConfig
from esm1nv_jax.model.lora import LoraConfig
from esm1nv_jax.model.masking import recipe
from esm1nv_jax.planning.hlo import Program
from esm1nv_jax.planning.plan import compile_step
from esm1nv_jax.training import sharding
from esm1nv_jax.training.label_prediction import LabelPrediction
from esm1nv_jax.training.metrics import training_flops
from esm1nv_jax.training.objective import MaskedLM
from esm1nv_jax.training.optimizer import OptimizerConfig
from esm1nv_jax.training.step import StepConfig
from esm1nv_jax.training.tuning import Tuning
from tests.model.parameters import random_parameters
from tests.planning.run_plan import plan

MODEL = encoder.EncoderConfig(
    layers=3, width=64, heads=2, ffn=256, positions=64, dropout=0.1, attention_dropout=0.1
)
RANK = 4
LORA = 4 * MODEL.layers * 2 * RANK * MODEL.width  # parameters: q, k, v and output
HEAD = 2 * MODEL.width + 2


@pytest.fixture
def config(tmp_path):
    """`--config` of a tiny model and a table of residues of two classes."""
    base, table = str(tmp_path / "model"), str(tmp_path / "t.csv")
    model_folder.write(base, model_folder.Weights(random_parameters(MODEL), MODEL, {}))
    rng = np.random.default_rng(0)
    with open(table, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(("sequence", "label", "split"))
        for i in range(60):
            sequence = "".join(rng.choice(list("ACDEFGHIKL"), rng.integers(20, 60)))
            label = "".join("H" if letter in "AFIL" else "C" for letter in sequence)
            writer.writerow((sequence, label, ("train", "train", "train", "valid", "test")[i % 5]))
    arguments = f"model={base},csv={table},task=residue_classification,method=lora={RANK}"
    return f"--config=configs/finetune.py:{arguments}"


@pytest.mark.integration
def test_lora_on_this_cpu(config):
    result = plan(config, "--chip=this-cpu")
    trained = 4 * (LORA + HEAD)
    assert result["memory"]["parameters"] == trained
    assert result["memory"]["frozen"] == 4 * encoder.parameter_count(MODEL)
    assert 2 * trained <= result["memory"]["optimizer"] <= 2 * trained + 64
    assert result["memory"]["batch"] < 10 * 4 * result["rows"] * result["row_length"] + 1024
    assert result["fits"] and result["seconds"] > 0 and not result["miscounted"]
    # The head reads every residue, and rows are filled with the proteins of the table.
    assert 0 < result["mfu"] < 1 and result["sequences_per_step"] > 20


@pytest.mark.aot
def test_gradients_of_lora_alone_are_reduced_on_gpus(config):
    result = plan(config, "--chip=a100-80gb", "--devices-per-host=8")
    assert {(c["kind"], c["dtype"]) for c in result["collectives"]} == {("all-reduce", "f32")}
    trained = 4 * (LORA + HEAD)
    assert result["memory"]["parameters"] == trained
    assert trained <= sum(c["bytes"] for c in result["collectives"]) <= trained + 1024


@pytest.mark.integration
@pytest.mark.parametrize("method", ["full", "last=2", "lora=8", "lora=8 on fc1", "head"])
def test_products_of_a_step_are_those_that_are_counted(method):
    """By the compiled program of full rows, of which no product is spent on padding."""
    method, _, only = method.partition(" on ")
    tuning = Tuning.parse(method, LoraConfig(projections=(only,)) if only else LoraConfig())
    head = HeadConfig("residue", "classification", ("a", "b", "c"))
    settings = StepConfig(
        seed=0,
        model=MODEL,
        compute=encoder.ComputeConfig(dtype="float32"),
        objective=LabelPrediction(head, 1, lora=tuning.lora),
        optimizer=OptimizerConfig(peak_lr=1e-2, min_lr=0.0, warmup=1, constant=0, horizon=100),
        tuning=tuning,
    )
    rows, length = 8, 64
    _, compiled, _ = compile_step(settings, sharding.make_mesh(jax.devices()[:1]), rows, length)
    products = sum(kernel.flops for kernel in Program(compiled.as_text()).kernels)
    tokens = rows * length
    head_flops = settings.objective.head_flops(MODEL) * tokens
    counted = training_flops(MODEL, tokens, rows * length**2, head_flops, tuning)
    assert products == pytest.approx(counted, rel=0.02)


@pytest.mark.integration
def test_products_of_a_step_of_masked_modelling():
    """Of the last block only those of the targets, apart from queries, keys and values."""
    settings = StepConfig(
        seed=0,
        model=MODEL,
        compute=encoder.ComputeConfig(dtype="float32"),
        objective=MaskedLM(recipe("card"), most=16),
        optimizer=OptimizerConfig(peak_lr=1e-2, min_lr=0.0, warmup=1, constant=0, horizon=100),
    )
    rows, length = 8, 64
    _, compiled, _ = compile_step(settings, sharding.make_mesh(jax.devices()[:1]), rows, length)
    products = sum(kernel.flops for kernel in Program(compiled.as_text()).kernels)
    tokens, targets = rows * length, rows * 16
    head = settings.objective.head_flops(MODEL) * targets
    counted = training_flops(MODEL, tokens, rows * length**2, head, outputs=targets)
    queries = 3 * 2 * MODEL.width**2 * (tokens - targets)
    assert products == pytest.approx(counted + queries, rel=0.02)
    whole = training_flops(MODEL, tokens, rows * length**2, head)
    assert products < 0.85 * whole
