"""`esm1nv plan` as a person runs it. Compiles for chips that are absent need their compilers:
`pip install 'esm1nv_jax[plan]'`, best in an environment of its own."""

import importlib.util
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from esm1nv_jax.model.kernels.flash_gpu import Blocks
from esm1nv_jax.planning import chips
from esm1nv_jax.planning.roofline import load_of
from tests.planning.command import plan

needs_cuda = pytest.mark.skipif(
    importlib.util.find_spec("jax_cuda12_plugin") is None,
    reason="compiling for GPUs needs jax-cuda12-plugin (the extra `plan`)",
)
needs_tpu = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="compiling for TPUs needs libtpu"
)
ROOT = Path(__file__).parents[2]
CARD = "--config=configs/pretrain_small.py"
SHORT = ["--config.model.layers=2", "--config.batch.sequences_per_device=37"]


def collectives(found) -> set[tuple[str, str]]:
    return {(c["kind"], c["dtype"]) for c in found["collectives"]}


@needs_cuda
def test_card_on_176_a100s():
    """The real step at full width: packed rows, both dropouts, the flash kernel, 22 hosts."""
    found = plan(CARD, *SHORT, "--chip=a100-80gb", "--hosts=22", "--devices_per_host=8")
    assert found["devices"] == 176
    assert found["attention"] == "pallas"
    kernels = {(k["phase"], k["kind"]): k["kernels"] for k in found["kernels"]}
    assert kernels["forward", "attention"] == kernels["backward", "attention"] == 2
    # No row leaves its device, and gradients are summed in fp32, under the backward.
    assert collectives(found) == {("all-reduce", "f32")}
    assert all(c["asynchronous"] for c in found["collectives"])
    assert len(found["collectives"]) <= 8
    total = sum(c["bytes"] for c in found["collectives"])
    parameters = found["memory"]["parameters"]
    assert parameters <= total <= parameters + 1024
    # 48 KB a token are kept for the backward of two layers (measured). One T x T tensor a layer,
    # 12 heads in bf16, would add 55.
    tokens = found["rows"] * found["row_length"]
    assert found["memory"]["activations"] < 75_000 * tokens
    assert found["fits"]
    assert 0.2 < found["mfu"] < 0.85


@needs_tpu
@pytest.mark.slow  # libtpu takes more than ten minutes on two cores
def test_card_on_a_tpu():
    found = plan(
        CARD,
        "--chip=tpu-v5e",
        "--devices_per_host=8",
        "--config.model.layers=1",
        "--config.batch.rows=32",
        "--config.compute.remat=block",
    )
    assert found["attention"] == "xla"  # none of TPU's kernels has attention dropout
    assert collectives(found) == {("all-reduce", "f32")}


@needs_tpu
@pytest.mark.slow
def test_splash_attention_on_a_tpu():
    found = plan(
        CARD,
        "--chip=tpu-v5e",
        "--devices_per_host=8",
        "--config.model.layers=1",
        "--config.batch.rows=32",
        "--config.model.attention_dropout=0",
    )
    assert found["attention"] == "splash"
    assert collectives(found) == {("all-reduce", "f32")}


@needs_cuda
@pytest.mark.slow
@pytest.mark.parametrize("chip", ["a100-80gb", "h100-80gb"])
@pytest.mark.parametrize("attention", ["pallas", "cudnn", "xla"])
def test_every_backend_compiles_for_gpus(chip, attention):
    if attention == "cudnn" and importlib.util.find_spec("nvidia.cudnn") is None:
        pytest.skip("compiling with cuDNN needs: pip install --no-deps nvidia-cudnn-cu12")
    found = plan(
        "--config=configs/pretrain_small.py:padded",
        *SHORT,
        f"--chip={chip}",
        "--devices_per_host=8",
        "--config.model.attention_dropout=0",
        f"--config.compute.attention={attention}",
    )
    assert found["attention"] == attention
    assert collectives(found) == {("all-reduce", "f32")}


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
    found = plan(config, f"--chip={chip}", "--devices_per_host=8", *changes)
    assert found["fits"], found["memory"]


@needs_cuda
@pytest.mark.slow
def test_gradients_in_bfloat16_where_the_config_says_so():
    found = plan(
        CARD,
        *SHORT,
        "--chip=a100-80gb",
        "--devices_per_host=8",
        "--config.compute.reduce_dtype=bfloat16",
    )
    sizes = {c["dtype"]: c["bytes"] for c in found["collectives"]}
    assert sizes["bf16"] == pytest.approx(found["memory"]["parameters"] / 2, rel=1e-3)


def test_this_machine_needs_no_compiler():
    found = plan("--config=tests/configs/tiny.py", "--chip=this-cpu")
    assert found["attention"] == "xla" and found["fits"]
    assert found["seconds"] > 0 and found["residues_per_second"] > 0


def test_predictions_hold_on_this_cpu():
    """Within a factor of 1.5: short rows, long rows, and with rematerialisation."""
    ended = subprocess.run(
        [sys.executable, "benchmarks/plan.py", "--shapes=short rows,long rows,remat"],
        capture_output=True,
        text=True,
        check=False,
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": "."},
    )
    assert ended.returncode == 0, ended.stdout + ended.stderr


def test_the_bandwidth_of_this_cpu_is_that_of_memory_which_is_there():
    """Not that of fresh pages, which is a small part of it."""
    big, times = np.ones(2**26, np.float32), []
    for _ in range(5):
        began = time.process_time()
        np.add(big, 1, out=big)
        times.append(time.process_time() - began)
    found = chips.measured_cpu(clock=time.process_time).bandwidth
    assert found > 0.4 * 2 * big.nbytes / min(times)


@pytest.mark.parametrize(
    "arguments, said",
    [
        (["--chip=a100"], "a100-80gb"),
        (["--chip=this-cpu", "--compare=depth"], "remat"),
        (["--chip=this-cpu", "--hosts=0"], "at least 1"),
        (["--chip=this-cpu", "--against=/nowhere"], "metrics.jsonl"),
        (["--chip=this-cpu", "--config.compute.attention=pallas"], "runs on gpu"),
    ],
)
def test_mistakes_are_answered_in_one_line(arguments, said):
    ended = subprocess.run(
        [sys.executable, "-m", "esm1nv_jax", "plan", CARD, *arguments],
        capture_output=True,
        text=True,
        check=False,
    )
    assert ended.returncode == 2
    noise = ("WARNING: All log messages", "I0000")  # of the CUDA plugin, where it is installed
    (line,) = [x for x in ended.stderr.strip().splitlines() if not x.startswith(noise)]
    assert line.startswith("error:") and said in line


def test_a_compiler_that_is_not_installed_is_named(monkeypatch):
    from esm1nv_jax.common.errors import UserError

    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    for chip, package in (("h100-80gb", "jax-cuda12-plugin"), ("tpu-v5e", "libtpu")):
        with pytest.raises(UserError, match=package):
            chips.devices(chips.CHIPS[chip], 1, 8)


def test_load_of_rows_counted_by_hand():
    ids = np.zeros((2, 128), np.int32)
    ids[0, :64], ids[0, 64:104], ids[1, :2] = 1, 2, 1
    load = load_of({"segment_ids": ids}, 0.15, Blocks(queries=64, keys=64, backward=32))
    assert (load.tokens, load.sequences, load.residues) == (106, 3, 62 + 38)
    assert load.squares == 64**2 + 40**2 + 2**2
    assert load.selected == round(0.15 * 62) + round(0.15 * 38)
    # Forward: one tile of each sequence. Backward, in tiles of 32: 4, 4 and 1.
    assert load.tiles == (3 * 64 * 64, 9 * 32 * 32)


def test_measured_beside_predicted(tmp_path):
    lines = [
        {"step": n, "kind": "train", "seconds_per_step": s, "tokens_per_second": 10.0}
        for n, s in ((1, 99.0), (2, 0.5), (3, 0.7))
    ]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    found = plan("--config=tests/configs/tiny.py", "--chip=this-cpu", f"--against={tmp_path}")
    assert found["measured"]["seconds_per_step"] == pytest.approx(0.6)
