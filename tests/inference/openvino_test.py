"""Blocks by OpenVINO: beside JAX, alone and packed, in threads, and when they are taken."""

import concurrent.futures
import dataclasses
import importlib.util
import os
import subprocess
import sys

import jax
import numpy as np
import pytest

from esm1nv_jax import load
from esm1nv_jax.common import command
from esm1nv_jax.common.errors import UserError
from esm1nv_jax.inference import cpu_engines, embed
from esm1nv_jax.inference.engine import OutputSpec, embed_sequences
from esm1nv_jax.model.kernels.matmul import multiplies_bf16
from tests.inference.int8_test import MODERN, cosines
from tests.inference.models import CONFIG, make_model, make_proteins, write_fasta

openvino_blocks = pytest.importorskip("esm1nv_jax.inference.openvino_blocks")
SEQUENCES = [sequence for _, sequence in make_proteins(20)]


@pytest.mark.parametrize(
    "options",
    [{}, dict(position_kind="rotary", ffn_activation="gelu_erf"), dict(norm="post"), MODERN],
    ids=["esm1nv", "esm2", "post", "modern"],
)
def test_in_fp32_every_layer_is_that_of_xla(tmp_path, options):
    path = make_model(tmp_path / "m", config=dataclasses.replace(CONFIG, **options))
    ids = [np.frombuffer(s.encode(), np.uint8) % 20 + 5 for s in SEQUENCES]
    for layers in ((0, 1, 2, -1), (1,)):
        outputs = OutputSpec(("mean", "per_residue", "logits"), layers)
        xla, openvino = (
            embed_sequences(model.on_devices, ids, outputs, model.longest)
            for model in (load(path), load(path, engine="openvino"))
        )
        assert [*openvino] == [*xla]
        for name, value in openvino.items():
            np.testing.assert_allclose(value, xla[name], atol=2e-4, err_msg=name)


@pytest.fixture
def all_instructions(monkeypatch):
    everything = frozenset().union(*cpu_engines.INSTRUCTIONS.values())
    monkeypatch.setattr(cpu_engines, "cpu_features", lambda: everything)


@pytest.fixture
def bf16(model_path, all_instructions):
    return load(model_path, "bf16")


def test_auto_takes_it_where_it_is_installed_and_the_cpu_has_instructions(
    model_path, all_instructions, monkeypatch
):
    for precision in cpu_engines.PRECISIONS:
        assert load(model_path, precision).engine == "openvino"
    assert load(model_path, "bf16", engine="xla").engine == "xla"
    with monkeypatch.context() as patch:
        patch.setattr(cpu_engines, "cpu_features", frozenset)
        assert load(model_path).engine == load(model_path, "bf16").engine == "xla"
        assert load(model_path, engine="openvino").engine == "openvino"
        for precision in ("bf16", "int8"):
            with pytest.raises(UserError, match=f"would multiply in fp32, not {precision}"):
                load(model_path, precision, engine="openvino")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert load(model_path).engine == load(model_path, "bf16").engine == "xla"


@pytest.mark.parametrize(
    "features, precisions",
    [
        ("avx2 f16c", ""),
        ("avx2 avx_vnni", "int8"),
        ("avx512f avx512_vnni", "fp32 int8"),
        ("avx512f avx512_vnni avx512_bf16", "fp32 bf16 int8"),
    ],
)
def test_instructions_of_kinds_of_cpus(features, precisions, monkeypatch):
    monkeypatch.setattr(cpu_engines, "cpu_features", lambda: frozenset(features.split()))
    found = filter(cpu_engines.has_instructions, cpu_engines.PRECISIONS)
    assert [*found] == precisions.split()


@pytest.mark.skipif(not multiplies_bf16("cpu"), reason="this CPU does not multiply bf16")
def test_bf16_is_near_fp32_and_is_not_fp32(bf16, model):
    exact, found = model.embed(SEQUENCES).mean, bf16.embed(SEQUENCES).mean
    assert 1e-6 < 1 - cosines(found, exact).min() < 1e-3


@pytest.mark.skipif(not cpu_engines.has_instructions("int8"), reason="this CPU has no VNNI")
def test_in_int8_each_group_of_columns_of_an_activation_has_a_scale():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(1, 9, 320)).astype(np.float32)
    kernel = rng.normal(size=(320, 16)).astype(np.float32)
    kernel[:, 0] = 0
    graph = openvino_blocks.OpenVinoGraph("int8")
    y = graph.linear(graph.input("x", 3), kernel, None)
    (found,) = graph.compile([y])({"x": x}, (0,))
    scale = np.maximum(np.abs(kernel).max(0), 1e-30) / 127
    exact = np.zeros_like(found)
    for i in range(0, 320, openvino_blocks.GROUP):
        columns = slice(i, i + openvino_blocks.GROUP)
        step = np.abs(x[..., columns]).max(-1, keepdims=True) / 127
        levels = np.rint(x[..., columns] / step)
        exact += levels @ np.rint(kernel / scale)[columns] * step * scale
    np.testing.assert_allclose(found, exact, atol=1e-3)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_protein_does_not_depend_on_others(model_path, precision, bf16):
    model = bf16 if precision == "bf16" else load(model_path, engine="openvino")
    others = SEQUENCES[:1] + ["W" * 60] * 10
    packed, alone = model.embed(others).mean[0], model.embed(SEQUENCES[:1]).mean[0]
    np.testing.assert_allclose(packed, alone, atol=0.02 if precision == "bf16" else 2e-5)
    exact = [model.embed(some, deterministic=True).mean[0] for some in (others, SEQUENCES[:1])]
    assert np.array_equal(*exact)


def test_threads_get_the_numbers_of_one(model_path):
    model = load(model_path, engine="openvino")
    expected = [model.embed([s]).mean for s in SEQUENCES]
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        found = [*pool.map(lambda s: model.embed([s]).mean, SEQUENCES)]
    np.testing.assert_array_equal(found, expected)


def test_nothing_is_reported_to_its_makers_and_nothing_is_forked(model_path, tmp_path):
    lines = (
        "import os, sys",
        "os.register_at_fork(before=lambda: os._exit(9))",
        "from esm1nv_jax import load",
        "load(sys.argv[1], engine='openvino').embed(['MKTVRQ'])",
        "assert 'openvino' in sys.modules and sys.modules['openvino_telemetry'] is None",
    )
    ci = ("CI", "TF_BUILD", "JENKINS_URL")  # where it does not report anyway
    home = {k: v for k, v in os.environ.items() if k not in ci} | {"HOME": str(tmp_path)}
    args = [sys.executable, "-c", "\n".join(lines), model_path]
    result = subprocess.run(args, env=home, capture_output=True, text=True)
    assert (result.returncode, result.stderr) == (0, "")
    assert not (tmp_path / "intel").exists()  # where it keeps the number of the user


def test_attention_weights_and_gradients_are_those_of_xla(model_path, model):
    openvino = load(model_path, engine="openvino")
    np.testing.assert_array_equal(openvino.attention("MKTVRQ"), model.attention("MKTVRQ"))
    tokens = np.array([[1, 5, 6, 2]], np.int32)
    found, expected = (m.apply(m.params, tokens).logits for m in (openvino, model))
    np.testing.assert_array_equal(found, expected)


def test_a_command_says_so_and_what_rounds_otherwise_is_not_merged(
    model_path, tmp_path, capsys, all_instructions
):
    fasta = write_fasta(tmp_path / "in.fasta", make_proteins(4))

    def run(precision: str, engine: str, *more: str) -> int:
        out = str(tmp_path / f"{precision}.npz")
        args = ["--checkpoint", model_path, "--fasta", fasta, "--out", out]
        options = ["--precision", precision, "--engine", engine]
        return command.run(embed.main, [*args, *options, *more])

    for precision, merged in (("fp32", 0), ("bf16", 2)):
        assert run(precision, "auto", "--shard", "1/2") == 0
        assert f"matrix products in {precision}, by OpenVINO" in capsys.readouterr().err
        assert run(precision, "xla", "--shard", "2/2") == merged
    assert "bf16, by OpenVINO" in capsys.readouterr().err
    assert run("fp32", "torch") == 2
    assert "'torch' is unknown; there are auto, xla, openvino, onnx" in capsys.readouterr().err


def test_what_cannot_be_had_is_refused(model_path, tmp_path, monkeypatch):
    with pytest.raises(UserError, match="engine 'torch' is unknown; there are auto, xla, openvino"):
        load(model_path, engine="torch")
    for engine, words in (("xla", "fp32 and bf16 only, not int8"), ("onnxruntime", "int8 only")):
        with pytest.raises(UserError, match=f"--engine {engine} computes {words}"):
            load(model_path, "int8" if engine == "xla" else "fp32", engine=engine)
    rms = make_model(tmp_path / "rms", config=dataclasses.replace(CONFIG, norm_kind="rmsnorm"))
    with pytest.raises(UserError, match=r"norm_kind='rmsnorm'.*--engine auto"):
        load(rms, engine="openvino")
    with monkeypatch.context() as patch:
        patch.setattr(jax, "default_backend", lambda: "gpu")
        with pytest.raises(UserError, match="JAX has a gpu"):
            load(model_path, engine="openvino")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"needs openvino: pip install -e '.\[openvino\]', or take"):
        load(model_path, engine="openvino")
