"""`esm1nv plan` on the command line. Compiling for absent chips needs their compilers:
`pip install -e '.[plan]'`, best in an environment of its own."""

import dataclasses
import importlib.util
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from esm1nv_jax.common import config_file
from esm1nv_jax.common.errors import UserError
from esm1nv_jax.model.encoder_config import EncoderConfig
from esm1nv_jax.model.kernels.flash_gpu import Blocks
from esm1nv_jax.planning import chips, hlo, roofline
from esm1nv_jax.planning import plan as plan_module
from tests.planning.run_plan import plan

needs_cuda = pytest.mark.skipif(
    not any(map(importlib.util.find_spec, ("jax_cuda13_plugin", "jax_cuda12_plugin"))),
    reason="compiling for GPUs needs jax-cuda13-plugin (the extra `plan`)",
)
needs_tpu = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="compiling for TPUs needs libtpu"
)
ROOT = Path(__file__).parents[2]
CARD = "--config=configs/pretrain_small.py"
SHORT = ["--config.model.layers=2", "--config.batch.sequences_per_device=37"]


def collectives(result) -> set[tuple[str, str]]:
    return {(c["kind"], c["dtype"]) for c in result["collectives"]}


@pytest.mark.aot
def test_card_on_176_a100s():
    """The real step at full width: packed rows, both dropouts, the flash kernel, 22 hosts."""
    result = plan(CARD, *SHORT, "--chip=a100-80gb", "--hosts=22", "--devices-per-host=8")
    assert result["devices"] == 176
    assert result["attention"] == result["token_kernels"] == "pallas"
    kernels = {(k["phase"], k["kind"]): k["kernels"] for k in result["kernels"]}
    assert kernels["forward", "attention"] == kernels["backward", "attention"] == 2
    # No row leaves its device, and gradients are summed in fp32, under the backward.
    assert collectives(result) == {("all-reduce", "f32")}
    assert all(c["asynchronous"] for c in result["collectives"])
    assert len(result["collectives"]) <= 8
    total = sum(c["bytes"] for c in result["collectives"])
    parameters = result["memory"]["parameters"]
    assert parameters <= total <= parameters + 1024
    # 48 KB a token are kept for the backward of two layers (measured). One T x T tensor a layer,
    # 12 heads in bf16, would add 55.
    tokens = result["rows"] * result["row_length"]
    assert result["memory"]["activations"] < 75_000 * tokens
    assert result["fits"]
    assert 0.2 < result["mfu"] < 0.85 and not result["miscounted"]
    assert result["fastest"] < result["seconds"] < result["slowest"]


@needs_tpu
@pytest.mark.slow  # libtpu takes minutes
def test_card_on_a_tpu():
    result = plan(
        CARD,
        "--chip=tpu-v5e",
        "--devices-per-host=8",
        "--config.model.layers=1",
        "--config.batch.rows=32",
        "--config.compute.remat=block",
    )
    assert result["attention"] == "pallas_tpu"
    assert collectives(result) == {("all-reduce", "f32")}


@pytest.mark.aot
def test_products_and_loops_of_a_tpu_program_are_counted():
    """By the number of microbatches the work of a step does not change."""
    config = "--config=configs/pretrain_small.py:width=128,layers=1,max_length=254,batch=64"
    flops = []
    for microbatches in (1, 4):
        result = plan(
            config,
            "--chip=tpu-v5e",
            "--devices-per-host=8",
            f"--config.batch.microbatches={microbatches}",
        )
        assert collectives(result) == {("all-reduce", "f32")}
        assert 0 < result["mfu"] < 1 and not result["miscounted"]
        flops.append(sum(k["flops"] for k in result["kernels"]))
    assert flops[0] == pytest.approx(flops[1], rel=0.02)


@needs_tpu
@pytest.mark.slow
def test_splash_attention_on_a_tpu():
    result = plan(
        CARD,
        "--chip=tpu-v5e",
        "--devices-per-host=8",
        "--config.model.layers=1",
        "--config.batch.rows=32",
        "--config.model.attention_dropout=0",
        "--config.compute.attention=splash",
    )
    assert result["attention"] == "splash"
    assert 0 < result["mfu"] < 1 and not result["miscounted"]
    assert collectives(result) == {("all-reduce", "f32")}


@needs_cuda
@pytest.mark.slow
@pytest.mark.parametrize("chip", ["a100-80gb", "h100-80gb"])
@pytest.mark.parametrize("attention", ["pallas", "cudnn", "xla"])
def test_every_backend_compiles_for_gpus(chip, attention):
    if attention == "cudnn":
        needed = "compiling with cuDNN needs: pip install --no-deps nvidia-cudnn-cu13"
        pytest.importorskip("nvidia.cudnn", reason=needed)
    result = plan(
        "--config=configs/pretrain_small.py:padded",
        *SHORT,
        f"--chip={chip}",
        "--devices-per-host=8",
        "--config.model.attention_dropout=0",
        f"--config.compute.attention={attention}",
    )
    assert result["attention"] == attention
    assert collectives(result) == {("all-reduce", "f32")}


@needs_cuda
@pytest.mark.slow
@pytest.mark.parametrize(
    "name, chip, changes",
    [
        ("packed", "a100-80gb", []),
        ("packed", "a100-40gb", []),
        ("padded", "a100-80gb", ["--config.batch.microbatches=4"]),
        ("padded", "a100-40gb", ["--config.batch.microbatches=4"]),
        ("padded", "a100-40gb", ["--config.compute.remat=block"]),
    ],
)
def test_the_card_fits_with_a_tenth_to_spare(name, chip, changes):
    config = CARD + (":padded" if name == "padded" else "")
    result = plan(config, f"--chip={chip}", "--devices-per-host=8", *changes)
    assert result["fits"], result["memory"]


@needs_cuda
@pytest.mark.slow
def test_gradients_in_bfloat16_where_the_config_says_so():
    result = plan(
        CARD,
        *SHORT,
        "--chip=a100-80gb",
        "--devices-per-host=8",
        "--config.compute.reduce_dtype=bfloat16",
    )
    sizes = {c["dtype"]: c["bytes"] for c in result["collectives"]}
    assert sizes["bf16"] == pytest.approx(result["memory"]["parameters"] / 2, rel=1e-3)


@pytest.mark.integration
def test_this_machine_needs_no_compiler():
    result = plan("--config=tests/configs/tiny.py", "--chip=this-cpu")
    assert result["attention"] == "xla" and result["fits"]
    assert result["seconds"] > 0 and result["residues_per_second"] > 0


@pytest.mark.slow
def test_predictions_hold_on_this_cpu():
    """Within a factor of 1.5: short and long rows, with rematerialisation, and in bf16."""
    completed = subprocess.run(
        [sys.executable, "benchmarks/plan.py", "--shapes=short rows,long rows,remat,bf16"],
        capture_output=True,
        text=True,
        check=False,
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": "."},
    )
    assert completed.returncode == 0, completed.stdout + completed.stderr


@pytest.mark.integration
def test_the_bandwidth_of_this_cpu_is_that_of_memory_which_is_there():
    """Not that of fresh pages, which is a small part of it."""
    big, times = np.ones(2**26, np.float32), []
    for _ in range(5):
        start = time.process_time()
        np.add(big, 1, out=big)
        times.append(time.process_time() - start)
    result = chips.measured_cpu(clock=time.process_time).bandwidth
    assert result > 0.4 * 2 * big.nbytes / min(times)


@pytest.mark.parametrize(
    "arguments, expected",
    [
        (["--chip=a100"], "a100-80gb"),
        (["--chip=this-cpu", "--compare=depth"], "remat"),
        (["--chip=this-cpu", "--hosts=0"], "at least 1"),
        (["--chip=this-cpu", "--against=/nowhere"], "metrics.jsonl"),
        (["--chip=tpu-v5e", "--devices-per-host=3"], "there are slices of"),
        pytest.param(
            ["--chip=this-cpu", "--config.compute.attention=pallas"],
            "runs on gpu",
            marks=pytest.mark.integration,  # it measures the CPU first
        ),
    ],
)
def test_mistakes_are_answered_in_one_line(arguments, expected):
    completed = subprocess.run(
        [sys.executable, "-m", "esm1nv_jax", "plan", CARD, *arguments],
        capture_output=True,
        text=True,
        check=False,
    )
    assert completed.returncode == 2
    (line,) = completed.stderr.strip().splitlines()
    assert line.startswith("error:") and expected in line


def test_a_compiler_that_is_not_installed_is_named(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    for chip, package in (("h100-80gb", "jax-cuda13-plugin"), ("tpu-v5e", "libtpu")):
        with pytest.raises(UserError, match=package):
            chips.devices(chips.CHIPS[chip], 1, 8)


def test_load_of_rows_counted_by_hand():
    ids = np.zeros((2, 128), np.int32)
    ids[0, :64], ids[0, 64:104], ids[1, :2] = 1, 2, 1
    load = roofline.load_of({"segment_ids": ids}, 0.15, Blocks(queries=64, keys=64, backward=32))
    assert (load.tokens, load.sequences, load.residues) == (106, 3, 62 + 38)
    assert load.squares == 64**2 + 40**2 + 2**2
    assert load.selected == round(0.15 * 62) + round(0.15 * 38)
    # Forward: one tile of each sequence. Backward, in tiles of 32: 4, 4 and 1.
    assert (load.tiles_forward, load.tiles_backward) == (3 * 64 * 64, 9 * 32 * 32)


def made_up_load(tiles: float, sequences: float = 400) -> roofline.Load:
    return roofline.Load(100, 1000, 9e4, 8e4, sequences, 1e7, 1e4, tiles, tiles)


def test_the_load_is_the_mean_and_the_slowest_device_is_waited_for():
    rng = np.random.default_rng(0)
    tiles = rng.normal(1e9, 5e7, 2000)
    loads = [made_up_load(t, s) for t, s in zip(tiles, rng.normal(369, 20, 2000), strict=True)]
    for devices in (1, 8, 176):
        load = roofline.mean_load(loads, devices)
        assert load.sequences == pytest.approx(369, rel=0.01)
        most = rng.choice(tiles, (2000, devices)).max(1).mean() / tiles.mean()
        assert load.slowest == pytest.approx(most, abs=0.005)


def test_attention_takes_the_head_size_of_the_model_and_waits_for_the_slowest():
    def seconds(head_size, slowest=1.0):
        model = EncoderConfig(width=12 * head_size, heads=12, attention_dropout=0.0)
        step = roofline.Step(model, "pallas", 1, 1, 1)
        load = dataclasses.replace(made_up_load(1e9), slowest=slowest)
        return roofline.attention_seconds(KERNEL, dataclasses.replace(A100, vector=0.0), load, step)

    A100 = chips.CHIPS["a100-80gb"]
    op = "jit(f)/jvp()/flash_forward/pallas_call"
    KERNEL = hlo.Kernel("k", "custom-call", "attention", "forward", op, "", 0, 0, 0)
    assert seconds(64) == pytest.approx(1e9 * 12 * 2 * 2 * 64 / 312e12)
    assert seconds(32) == pytest.approx(seconds(64) / 2)
    assert seconds(64, slowest=1.25) == pytest.approx(1.25 * seconds(64))


def test_advice_is_compiled_before_it_is_given(monkeypatch):
    config = config_file.load("tests/configs/tiny.py")
    tried = []

    def plan_that_fits_with_block(config, *target):
        tried.append((config.batch.microbatches, config.compute.remat))
        if config.batch.microbatches == 4:
            raise UserError("4 microbatches do not divide the rows")
        peak = 50 if config.compute.remat == "block" else 95
        return {"peak": peak, "fits": plan_module.fits(peak, budget=100)}

    monkeypatch.setattr(plan_module, "plan", plan_that_fits_with_block)
    assert "--config.compute.remat=block fits" in plan_module.advice(config, ("a100-80gb", 1, 8))
    assert tried == [(2, "none"), (4, "none"), (1, "block")]

    def plan_that_fits_with_few_rows_at_a_time(config, *target):
        peak = 800 / config.batch.microbatches
        return {"peak": peak, "fits": plan_module.fits(peak, budget=100)}

    monkeypatch.setattr(plan_module, "plan", plan_that_fits_with_few_rows_at_a_time)
    advice = plan_module.advice(config, ("tpu-v5e", 1, 8))
    assert "--config.batch.microbatches=16 --config.compute.remat=block fits" in advice


def write_run(folder, model, **fields):
    lines = [
        {"step": n, "kind": "train", "seconds_per_step": s, "tokens_per_second": 10.0}
        for n, s in ((1, 99.0), (2, 0.5), (3, 0.7))
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / "config.json").write_text(json.dumps({"model": model} | fields))


@pytest.mark.integration
def test_measured_beside_predicted(tmp_path):
    write_run(tmp_path, config_file.load("tests/configs/tiny.py").model.to_dict())
    result = plan("--config=tests/configs/tiny.py", "--chip=this-cpu", f"--against={tmp_path}")
    assert result["measured"]["seconds_per_step"] == pytest.approx(0.6)


def test_a_run_of_another_model_is_refused(tmp_path):
    config = config_file.load("tests/configs/tiny.py")
    write_run(tmp_path, config.model.to_dict() | {"width": 32, "layers": 7})
    with pytest.raises(UserError, match="another model: layers, width differ"):
        plan_module.measured(str(tmp_path), config)
    write_run(tmp_path, config.model.to_dict(), finetune={"method": "lora=8"})
    with pytest.raises(UserError, match="a run of lora=8, the plan is of pretraining"):
        plan_module.measured(str(tmp_path), config)


def test_a_run_that_changed_its_kind_of_device_has_no_one_utilisation(tmp_path):
    config = config_file.load("tests/configs/tiny.py")
    write_run(tmp_path, config.model.to_dict())
    path = tmp_path / "metrics.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    lines[1]["mfu"] = 0.4
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert plan_module.measured(str(tmp_path), config).keys() == {
        "seconds_per_step",
        "tokens_per_second",
    }


@pytest.mark.parametrize("text", ['{"model":', "[1]"])
def test_a_damaged_config_of_a_run_is_one_line(tmp_path, text):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(UserError, match=r"config\.json cannot be read"):
        plan_module.config_of(str(tmp_path))


@pytest.mark.parametrize("residues, words", [(5_000, "1.50 times"), (300, "not comparable")])
def test_a_run_of_another_batch_is_not_compared(residues, words):
    run = {"seconds_per_step": 0.3, "tokens_per_second": residues / 0.3}
    planned = {"seconds": 0.2, "residues_per_second": 5_100 / 0.2}
    assert words in plan_module.beside_measured(planned | {"measured": run})


def test_a_run_of_an_older_version_is_of_the_model_that_it_meant(tmp_path):
    config = config_file.load("tests/configs/tiny.py")
    model = config.model.to_dict()
    del model["branch_scale"]
    write_run(tmp_path, model)
    assert plan_module.measured(str(tmp_path), config)["seconds_per_step"] == pytest.approx(0.6)


@pytest.mark.aot
def test_compilers_for_absent_chips_are_silent_in_other_commands():
    completed = subprocess.run(
        [sys.executable, "-m", "esm1nv_jax", "inspect", "sample"],
        capture_output=True,
        text=True,
        env={k: v for k, v in os.environ.items() if k != "JAX_PLATFORMS"},
        check=True,
    )
    assert "cuda" not in completed.stderr.lower() and "Traceback" not in completed.stderr
