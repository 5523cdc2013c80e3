"""Blocks by OpenVINO: beside JAX, alone and packed, in threads, and when they are taken."""

import concurrent.futures
import dataclasses
import importlib.util

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

pytest.importorskip("openvino")
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
def bf16(model_path, monkeypatch):
    monkeypatch.setattr(cpu_engines, "multiplies_bf16", lambda platform: True)
    return load(model_path, "bf16")


def test_auto_takes_it_for_bf16_alone_and_only_where_the_cpu_has_it(bf16, model_path, monkeypatch):
    assert (bf16.engine, load(model_path).engine) == ("openvino", "xla")
    assert load(model_path, "bf16", engine="xla").engine == "xla"
    monkeypatch.setattr(cpu_engines, "multiplies_bf16", lambda platform: False)
    assert load(model_path, "bf16").engine == "xla"
    with pytest.raises(UserError, match="would multiply in fp32 on this CPU"):
        load(model_path, "bf16", engine="openvino")
    monkeypatch.setattr(cpu_engines, "multiplies_bf16", lambda platform: True)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert load(model_path, "bf16").engine == "xla"


@pytest.mark.skipif(not multiplies_bf16("cpu"), reason="this CPU does not multiply bf16")
def test_bf16_is_near_fp32_and_is_not_fp32(bf16, model):
    exact, found = model.embed(SEQUENCES).mean, bf16.embed(SEQUENCES).mean
    assert 1e-6 < 1 - cosines(found, exact).min() < 1e-3


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


def test_attention_weights_and_gradients_are_those_of_xla(model_path, model):
    openvino = load(model_path, engine="openvino")
    np.testing.assert_array_equal(openvino.attention("MKTVRQ"), model.attention("MKTVRQ"))
    tokens = np.array([[1, 5, 6, 2]], np.int32)
    found, expected = (m.apply(m.params, tokens).logits for m in (openvino, model))
    np.testing.assert_array_equal(found, expected)


def test_a_command_says_so_and_parts_of_two_engines_are_not_merged(model_path, tmp_path, capsys):
    fasta = write_fasta(tmp_path / "in.fasta", make_proteins(4))
    args = ["--checkpoint", model_path, "--fasta", fasta, "--out", str(tmp_path / "out.npz")]
    assert command.run(embed.main, [*args, "--engine", "openvino", "--shard", "1/2"]) == 0
    assert "matrix products in fp32, by OpenVINO" in capsys.readouterr().err
    assert command.run(embed.main, [*args, "--shard", "2/2"]) == 2
    assert "fp32, by OpenVINO" in capsys.readouterr().err
    assert command.run(embed.main, [*args, "--engine", "torch"]) == 2
    assert "'torch' is unknown; there are auto, xla, openvino" in capsys.readouterr().err


def test_what_cannot_be_had_is_refused(model_path, tmp_path, monkeypatch):
    with pytest.raises(UserError, match="engine 'torch' is unknown; there are auto, xla, openvino"):
        load(model_path, engine="torch")
    with pytest.raises(UserError, match="int8 is computed by ONNX Runtime, not by OpenVINO"):
        load(model_path, "int8", engine="openvino")
    rms = make_model(tmp_path / "rms", config=dataclasses.replace(CONFIG, norm_kind="rmsnorm"))
    with pytest.raises(UserError, match=r"norm_kind='rmsnorm'.*--engine xla"):
        load(rms, engine="openvino")
    with monkeypatch.context() as patch:
        patch.setattr(jax, "default_backend", lambda: "gpu")
        with pytest.raises(UserError, match="JAX has a gpu"):
            load(model_path, engine="openvino")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"needs openvino: pip install -e '.\[openvino\]', or take"):
        load(model_path, engine="openvino")
