"""Blocks by ONNX Runtime beside JAX, int8 sums, and what int8 of both engines may differ by."""

import dataclasses
import importlib.util

import jax
import numpy as np
import pytest

from esm1nv_jax import load
from esm1nv_jax.common import command
from esm1nv_jax.common.errors import UserError
from esm1nv_jax.inference import cpu_engines, embed, onnx_blocks
from esm1nv_jax.inference.block_graph import compile_blocks
from esm1nv_jax.inference.engine import OutputSpec, embed_sequences
from tests.inference.models import CONFIG, make_model, make_proteins, write_fasta

pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")

MODERN = dict(
    position_kind="rotary",
    ffn_activation="swiglu",
    norm_kind="layernorm_no_bias",
    qk_norm=True,
    bias=False,
    branch_scale=0.7,
)


def cosines(a, b):
    return np.sum(a * b, -1) / np.linalg.norm(a, axis=-1) / np.linalg.norm(b, axis=-1)


@pytest.mark.parametrize(
    "options",
    [{}, dict(position_kind="rotary", ffn_activation="gelu_erf"), dict(norm="post"), MODERN],
    ids=["esm1nv", "esm2", "post", "modern"],
)
def test_the_graph_in_fp32_gives_the_states_of_every_layer(tmp_path, options):
    model = load(make_model(tmp_path / "m", config=dataclasses.replace(CONFIG, **options)))
    ids = [np.frombuffer(s.encode(), np.uint8) % 20 + 5 for _, s in make_proteins(12)]
    outputs = OutputSpec(("mean", "per_residue", "logits"), (0, 1, 2, -1))
    expected = embed_sequences(model.on_devices, ids, outputs, model.longest)
    blocks = compile_blocks(model.config, model.params["blocks"], onnx_blocks.OnnxGraph(int8=False))
    other = dataclasses.replace(model.on_devices, run_blocks=blocks)
    for name, value in embed_sequences(other, ids, outputs, model.longest).items():
        np.testing.assert_allclose(value, expected[name], atol=1e-4, err_msg=name)


def test_sums_of_int8_products_are_exact_where_16_bits_would_saturate():
    rng = np.random.default_rng(0)
    kernel = rng.choice([0.0, 1.0], (64, 16), p=[0.1, 0.9]).astype(np.float32)
    kernel[:, 8:] *= -rng.random((64, 8), np.float32)
    levels, scale = onnx_blocks.quantize_kernel(kernel)
    x = rng.uniform(0.9, 1, (5, 64)).astype(np.float32)
    x[:, 0] = 1
    graph = onnx_blocks.OnnxGraph()
    y = graph.linear(graph.input("x", 2), kernel, None)
    (found,) = graph.compile([y])({"x": x}, (0,))
    exact = (np.rint(x * 127).astype(np.int64) @ levels.astype(np.int64)) * (scale / 127)
    np.testing.assert_allclose(found, exact, rtol=1e-6)


@pytest.fixture(scope="module")
def model_path(tmp_path_factory):
    """As wide as a group of columns that OpenVINO gives a scale."""
    config = dataclasses.replace(CONFIG, width=128, ffn=256)
    return make_model(tmp_path_factory.mktemp("model") / "wide", config=config)


@pytest.fixture(scope="module")
def model(model_path):
    return load(model_path)


@pytest.fixture(params=["onnxruntime", "openvino"])
def int8(request, model_path, monkeypatch):
    if request.param == "openvino":
        pytest.importorskip("esm1nv_jax.inference.openvino_blocks")
    monkeypatch.setattr(cpu_engines, "cpu_features", lambda: frozenset({"avx512_vnni"}))
    return load(model_path, "int8", engine=request.param)


def test_int8_is_near_fp32_and_a_protein_hardly_depends_on_others(model, int8):
    sequences = [sequence for _, sequence in make_proteins(20)]
    exact, found = model.embed(sequences), int8.embed(sequences)
    assert cosines(found.mean, exact.mean).min() > 0.995
    assert cosines(found.mean, exact.mean).max() < 1 - 1e-6  # it is not fp32
    outliers = sequences[:1] + ["W" * 60] * 10
    np.testing.assert_allclose(int8.embed(outliers).mean[0], found.mean[0], atol=0.02)
    alone = int8.embed(sequences[:1], deterministic=True).mean[0]
    assert np.array_equal(alone, int8.embed(outliers, deterministic=True).mean[0])


def test_variants_are_scored_in_int8(model, int8):
    mutants = [f"{a}{i}{b}" for i, a in enumerate("MKTVRQ", 1) for b in "LASGW" if a != b]
    exact = model.score_variants("MKTVRQ", mutants)
    found = int8.score_variants("MKTVRQ", mutants)
    assert np.corrcoef(exact, found)[0, 1] > 0.98


def test_parts_of_other_precision_are_not_merged(model_path, tmp_path, capsys):
    fasta = write_fasta(tmp_path / "in.fasta", make_proteins(4))
    out = str(tmp_path / "out.npz")
    args = ["--checkpoint", model_path, "--fasta", fasta, "--out", out]
    assert command.run(embed.main, [*args, "--precision", "int8", "--shard", "1/2"]) == 0
    assert "int8, by ONNX Runtime" in capsys.readouterr().err
    assert command.run(embed.main, [*args, "--shard", "2/2"]) == 2
    assert "precision" in capsys.readouterr().err


def test_what_int8_cannot_do_is_refused(int8, model_path, tmp_path, monkeypatch):
    with pytest.raises(UserError, match="fp32 or bf16"):
        int8.attention("MKTVRQ")
    with pytest.raises(UserError, match="fp32 or bf16"):
        int8.apply(int8.params, np.zeros((1, 4), np.int32))
    rms = make_model(tmp_path / "rms", config=dataclasses.replace(CONFIG, norm_kind="rmsnorm"))
    with pytest.raises(UserError, match=r"norm_kind='rmsnorm'.*--precision fp32"):
        load(rms, "int8")
    with monkeypatch.context() as patch:
        patch.setattr(jax, "default_backend", lambda: "gpu")
        with pytest.raises(UserError, match=r"gpu.*JAX_PLATFORMS=cpu"):
            load(model_path, "int8")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    for feature, package in (("avx_vnni", "openvino"), ("avx2", "onnx")):
        monkeypatch.setattr(cpu_engines, "cpu_features", lambda f=feature: frozenset({f}))
        with pytest.raises(UserError, match=f"needs {package}: pip install"):
            load(model_path, "int8")
