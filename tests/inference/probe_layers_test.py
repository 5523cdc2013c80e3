"""The layer that a probe takes: chosen on validation alone, recorded, and recommended by embed."""

import json

import numpy as np
import optax
import pytest
from matplotlib.image import imread

from esm1nv_jax import cli, load
from esm1nv_jax.common import command
from esm1nv_jax.common.errors import UserError
from esm1nv_jax.data import labeled_data
from esm1nv_jax.data.labeled_data import Split
from esm1nv_jax.inference import layer_record, probe, probe_features, probe_heads
from esm1nv_jax.inference.probe_heads import LabeledFeatures
from tests.inference.models import make_model, make_proteins, write_fasta
from tests.inference.probe_test import one_setting, proteins, three, write  # noqa: F401
from tests.model.compiling import inexact_products


@pytest.fixture(autouse=True)
def cache_folder(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def made(n, seed, informative):
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, 2, n)
    x = rng.normal(size=(n, 3)).astype(np.float32)
    x[:, 0] += informative * 4 * labels
    ones = np.ones(n, np.int64)
    return LabeledFeatures(Split([b"A"] * n, labels, ones.astype(bool), ones), x)


def test_the_layer_is_chosen_without_the_test_split(model, monkeypatch):
    """Validation prefers layer 1; the test split, were it looked at, would prefer layer 2."""
    looked_at = []

    def planted(kind, model, task, seed, progress, cache, layer, names):
        looked_at.append((layer, tuple(names)))
        informative = {"train": 1, "valid": layer == 1, "test": layer == 2}
        return {name: made(200, ord(name[1]), informative[name]) for name in names}

    monkeypatch.setattr(probe, "features", planted)
    data = planted(None, None, None, 0, None, None, 1, ("train", "valid", "test"))
    looked_at.clear()
    splits = (data[name].split for name in ("train", "valid", "test"))
    task = labeled_data.Task("localisation", ("a", "b"), *splits, "")
    curve = probe.layer_curve(model, task, (0, 1, 2))
    assert max(curve, key=curve.get) == 1 and curve[1] > 0.9 > curve[2]
    assert looked_at == [(layer, ("train", "valid")) for layer in (0, 1, 2)]


def test_features_are_those_of_the_layer(model, monkeypatch):
    sequences = [s for _, s in make_proteins(6, seed=1)]
    ones = np.ones(6, np.int64)
    split = Split([s.encode() for s in sequences], ones, ones.astype(bool), ones)
    for layer in (0, 1, 2, -1):
        expected = model.embed(sequences, layer=layer)
        found = probe_features.embeddings(model, split, False, layer=layer)
        np.testing.assert_allclose(found, expected.mean, atol=1e-5)
        found = probe_features.embeddings(model, split, True, layer=layer)
        np.testing.assert_allclose(found, np.concatenate(expected.per_residue), atol=2e-2)
    too_large = {"per_residue_0": np.full((60, 16), np.inf, np.float16)}
    monkeypatch.setattr(probe_features, "embed_sequences", lambda *_: too_large)
    with pytest.raises(UserError, match="states of layer 0 are not finite in float16"):
        probe_features.embeddings(model, split, True, layer=0)


def test_a_record_is_of_one_model_and_of_every_task(tmp_path, capsys):
    path = make_model(tmp_path / "model")
    choice = {"layer": 1, "metric": "accuracy", "curve": {0: 0.5, 1: 0.75, -1: 0.625}}
    layer_record.write(path, "aa", "localisation", choice)
    layer_record.write(path, "aa", "regression", choice | {"layer": 0})
    layer_record.write(path, "bb", "localisation", choice | {"layer": 0})
    assert layer_record.read(path, "aa")["localisation"] == choice
    assert layer_record.read(path, "aa")["regression"]["layer"] == 0
    assert layer_record.read(path, "cc") == {}
    capsys.readouterr()
    layer_record.print_recommended(path, "aa", (0, -1))
    told = capsys.readouterr().err.strip()
    assert told == (
        "probes of localisation recommend --layers 1: validation accuracy 0.750, layer 0 0.500, "
        "layer -1 0.625"
    )
    for damaged in ("", "[]", '{"aa": 3}', '{"aa": {"x": {"layer": "y"}}}'):
        (tmp_path / "model" / "layers.json").write_text(damaged)
        assert layer_record.read(path, "aa") == {}
    (tmp_path / "model" / "layers.json").write_text('{"aa": 3}')
    layer_record.write(path, "aa", "localisation", choice)
    assert layer_record.read(path, "aa") == {"localisation": choice}
    assert load(path).config.layers == 2  # it is no part of the model


def test_a_place_that_cannot_be_written_costs_the_record_only(tmp_path, capsys):
    (tmp_path / "layers.json").mkdir()
    choice = {"layer": 1, "metric": "accuracy", "curve": {1: 0.75}}
    layer_record.write(str(tmp_path), "aa", "localisation", choice)
    assert "not recorded: " in capsys.readouterr().err


def test_a_plot_of_another_format_is_refused_before_any_work(tmp_path, capsys):
    argv = ["probe", "--checkpoint", "none", "--task", "regression", "--csv", "none"]
    plot = str(tmp_path / "layers.xyz")
    assert command.run(cli.dispatch, [*argv, "--layers", "all", "--plot", plot]) == 2
    assert "layers.xyz must end in .png, .svg, .pdf" in capsys.readouterr().err


@pytest.mark.integration
def test_all_layers_from_file_to_record(tmp_path, one_setting, capsys):  # noqa: F811
    path = make_model(tmp_path / "model")
    rows = three(proteins(80, 2), lambda s: str(s.count("L") / len(s)))
    table = write(tmp_path / "t.csv", rows)
    out = tmp_path / "out.json"
    argv = ["probe", "--checkpoint", path, "--task", "regression", "--csv", table, "--seeds", "1"]
    plot = tmp_path / "layers.png"
    options = ["--layers", "all", "--json", str(out), "--plot", str(plot)]
    assert command.run(cli.dispatch, [*argv, *options]) == 0
    layers = json.loads(out.read_text())["layers"]
    assert [*layers["curve"]] == ["0", "1", "2", "-1"] and layers["metric"] == "-MSE"
    best = max(layers["curve"], key=layers["curve"].get)
    assert layers["layer"] == int(best)
    printed = capsys.readouterr()
    assert f"chosen on validation: layer {best}" in printed.out
    assert len(np.unique(imread(plot).reshape(-1, 4), axis=0)) > 10
    record = layer_record.read(path, load(path).digest)
    assert record["regression"]["layer"] == int(best)
    fasta = write_fasta(tmp_path / "p.fasta", make_proteins(3, seed=2))
    other = "1" if best != "1" else "2"
    embed = ["embed", "--checkpoint", path, "--fasta", fasta, "--layers", other]
    assert command.run(cli.dispatch, [*embed, "--out", str(tmp_path / "e.npz")]) == 0
    assert f"recommend --layers {best}" in capsys.readouterr().err
    assert command.run(cli.dispatch, [*argv, "--layers", "7"]) == 2
    assert "layer 7 is unknown; there are 0 (embeddings) to 2" in capsys.readouterr().err
    assert command.run(cli.dispatch, [*argv, "--plot", str(plot)]) == 2
    assert "--plot shows several layers" in capsys.readouterr().err


@pytest.mark.parametrize("head", ["linear", "mlp", "cnn"])
def test_heads_ask_for_products_in_fp32(head):
    x, real = np.ones((2, 9, 4), np.float32), np.ones((2, 9), bool)
    if head == "linear":
        params = {"kernel": np.ones((4, 3), np.float32), "bias": np.zeros(3, np.float32)}
        rows = (x[0], np.zeros(9, np.int64), real[0])
        assert not inexact_products(probe_heads._linear_loss.lower(params, 0, 1, *rows, classes=3))
        return
    params = probe_heads.init(head, 4, 3, 0)
    batch = {"x": x, "real": real, "used": real, "label": np.zeros((2, 9), np.int64)}
    state = optax.scale_by_adam().init(params)
    assert not inexact_products(
        probe_heads.train_step.lower(params, state, 0.0, 1.0, batch, 1e-3, 0.0, classes=3)
    )
