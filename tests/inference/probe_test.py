"""Heads that must find what was planted, figures against formulas written out, and files."""

import dataclasses
import gzip
import json
import math
import os
from pathlib import Path

import numpy as np
import pytest

from esm1nv_jax import cli
from esm1nv_jax.checkpoints import model_folder
from esm1nv_jax.common import command
from esm1nv_jax.common.errors import UserError
from esm1nv_jax.data import labeled_data
from esm1nv_jax.data.labeled_data import Split
from esm1nv_jax.inference import probe, probe_features, probe_heads
from esm1nv_jax.inference.model import load
from esm1nv_jax.inference.probe_features import EmbeddingCache, key_of, model_digest
from esm1nv_jax.inference.probe_heads import LabeledFeatures, Scale, Setting
from esm1nv_jax.model import encoder, label_metrics
from tests.model.parameters import random_parameters

LETTERS = "LASGVERTDIPKNFQYHMCW"


SETTING = {"linear": Setting(1e-4), "cnn": Setting(0.0, 1e-2), "mlp": Setting(0.0, 1e-2)}


def proteins(n, seed, low=20, high=90):
    rng = np.random.default_rng(seed)
    return ["".join(rng.choice(list(LETTERS), rng.integers(low, high))) for _ in range(n)]


def write(path, rows, columns=("sequence", "label", "split")):
    text = "\n".join([",".join(columns), *(",".join(row) for row in rows)]) + "\n"
    path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())
    return str(path)


def three(sequences, label):
    third = len(sequences) // 4
    names = ["train"] * (len(sequences) - 2 * third) + ["valid"] * third + ["test"] * third
    return [(s, label(s), split) for s, split in zip(sequences, names, strict=True)]


def accuracy(split, predicted):
    right = predicted.argmax(axis=1) == split.labels
    return right[split.used].mean()


def of_residues(sequences, per_residue=True):
    labels = np.concatenate([[int(a in "LIVMF") for a in s] for s in sequences])
    sizes = np.array([len(s) for s in sequences])
    split = Split([s.encode() for s in sequences], labels, np.ones(len(labels), bool), sizes)
    return LabeledFeatures(split, probe_features.one_hot(split, True))


@pytest.mark.parametrize("head", ["linear", pytest.param("cnn", marks=pytest.mark.integration)])
def test_a_head_finds_what_stands_in_the_features(head):
    train, valid, test = (of_residues(proteins(40, seed)) for seed in range(3))
    _, predict = probe_heads.fit(head, 2, train, valid, SETTING[head], 0, accuracy)
    assert accuracy(test.split, predict(test)) > 0.99


@pytest.mark.integration
def test_only_the_cnn_sees_neighbours():
    """The label of a residue is whether the one three before it is aliphatic."""

    def shifted(seed):
        data = of_residues(proteins(60, seed))
        starts = np.repeat(np.cumsum(data.split.sizes) - data.split.sizes, data.split.sizes)
        at = np.arange(len(starts))
        before = np.where(at - 3 >= starts, at - 3, -1)
        labels = np.where(before >= 0, data.split.labels[before], 0)
        return LabeledFeatures(
            Split(data.split.sequences, labels, data.split.used, data.split.sizes), data.features
        )

    train, valid, test = map(shifted, range(3))
    found = {}
    for head in ("linear", "cnn"):
        _, predict = probe_heads.fit(head, 2, train, valid, SETTING[head], 0, accuracy)
        found[head] = accuracy(test.split, predict(test))
    assert found["cnn"] > 0.97 and found["linear"] < 0.8


def test_residues_with_mask_0_neither_train_nor_score():
    """Their labels are wrong; were they used, the head would learn the opposite."""
    train, valid, test = (of_residues(proteins(40, seed)) for seed in range(3))
    rng = np.random.default_rng(0)
    for data in (train, valid, test):
        bad = rng.random(len(data.split.labels)) < 0.7
        data.split.used[:] = ~bad
        data.split.labels[bad] = 1 - data.split.labels[bad]
    _, predict = probe_heads.fit("linear", 2, train, valid, SETTING["linear"], 0, accuracy)
    assert accuracy(test.split, predict(test)) > 0.99
    splits = (data.split for data in (train, valid, test))
    task = labeled_data.Task("secondary_structure", ("C", "H"), *splits, "")
    assert probe.metrics(task, test.split, predict(test))["accuracy"] > 0.99


@pytest.mark.integration
def test_an_mlp_regresses_in_units_of_the_label():
    def made(seed):
        x = np.random.default_rng(seed).normal(size=(400, 5)).astype(np.float32)
        labels = 300 + 50 * x[:, 0] * x[:, 1]
        ones = np.ones(400, np.int64)
        return LabeledFeatures(Split([b"A"] * 400, labels, ones.astype(bool), ones), x)

    train, valid, test = map(made, range(3))

    def score(split, predicted):
        return -np.mean((predicted[:, 0] - split.labels) ** 2)

    errors = {}
    for head in ("linear", "mlp"):
        _, predict = probe_heads.fit(head, 0, train, valid, SETTING[head], 0, score)
        errors[head] = -score(test.split, predict(test))
    assert errors["mlp"] < 0.3 * 50**2 < 0.7 * errors["linear"]


@pytest.mark.integration
def test_the_setting_is_chosen_on_validation(checkpoint, tmp_path, monkeypatch):
    """One of two settings cannot learn at all."""
    monkeypatch.setitem(probe_heads.GRIDS, "mlp", (Setting(0.0, 0.0), Setting(0.0, 1e-2)))
    monkeypatch.setitem(probe_heads.GRIDS, "linear", (Setting(1e6), Setting(1e-3)))
    path = write(tmp_path / "t.csv", three(proteins(80, 2), lambda s: str(s.count("L") / len(s))))
    found = run(checkpoint, "regression", path, tmp_path)
    for row in found["rows"]:
        if row["head"] == "linear":
            assert row["weight_decay"] == 1e-3
        else:
            assert row["learning_rate"] == 1e-2


def test_a_linear_head_is_at_the_optimum():
    """Ridge regression has a closed form; a logistic one has no gradient left at its optimum."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(500, 6)).astype(np.float32) * [1, 1, 1, 3, 3, 0.5]
    ones = np.ones(500, np.int64)
    labels = 5 + x @ rng.normal(size=6) + rng.normal(size=500)
    data = LabeledFeatures(Split([b"A"] * 500, labels, ones.astype(bool), ones), x)
    scale, l2 = Scale.of(data, regression=True), 0.1
    params = probe_heads.fit_linear(0, data, scale, l2)
    z, y = (x - scale.mean) / scale.std, (labels - labels.mean()) / labels.std()
    # Mean squared error + l2 / 2 |w|^2: (2 / n Z'Z + l2) w = 2 / n Z'y, and the bias is 0.
    exact = np.linalg.solve(2 / 500 * z.T @ z + l2 * np.eye(6), 2 / 500 * z.T @ y)
    np.testing.assert_allclose(params["kernel"][:, 0], exact, atol=1e-4)

    classes = (labels > 5).astype(int) + (labels > 7)
    used = rng.random(500) < 0.8
    data = LabeledFeatures(Split([b"A"] * 500, classes, used, ones), x)
    params = probe_heads.fit_linear(3, data, scale, l2 := 0.01)
    logits = z[used] @ params["kernel"].astype(float) + params["bias"]
    p = np.exp(logits - logits.max(1, keepdims=True))
    p /= p.sum(1, keepdims=True)
    slope = z[used].T @ (p - np.eye(3)[classes[used]]) / used.sum() + l2 * params["kernel"]
    assert np.abs(slope).max() < 1e-4 < 0.1 < np.abs(params["kernel"]).max()


def test_batches_hold_every_label_once_and_padding_is_unused():
    data = of_residues(proteins(30, 4, 3, 300))
    seen = np.zeros(len(data.features), int)
    scale = Scale.of(data, regression=False)
    for places, batch in probe_heads.batches(data, np.random.default_rng(0).permutation(30), scale):
        seen[places] += 1
        np.testing.assert_array_equal(batch["x"][batch["real"]], data.features[places])
        np.testing.assert_array_equal(batch["label"][batch["real"]], data.split.labels[places])
        assert not batch["used"][~batch["real"]].any()
    assert (seen == 1).all()


def test_macro_f1_and_mcc_are_their_definitions():
    table = np.array([[5.0, 1, 0], [2, 3, 1], [0, 0, 0]])  # the third class is only ever guessed
    f1 = [2 * 5 / (2 * 5 + 2 + 1), 2 * 3 / (2 * 3 + 1 + 3), 0.0]
    assert label_metrics.macro_f1(table) == pytest.approx(np.mean(f1))
    two = np.array([[6.0, 2], [1, 9]])
    tn, fp, fn, tp = two.ravel()
    expected = (tp * tn - fp * fn) / math.sqrt((tp + fp) * (tp + fn) * (tn + fp) * (tn + fn))
    assert label_metrics.matthews(two) == pytest.approx(expected)
    # For many classes: the correlation of one-hot tables, summed over classes.
    cells = np.repeat(np.arange(9), table.ravel().astype(int))
    a, b = (x - x.mean(axis=0) for x in (np.eye(3)[cells // 3], np.eye(3)[cells % 3]))
    expected = (a * b).sum() / np.sqrt((a**2).sum() * (b**2).sum())
    assert label_metrics.matthews(table) == pytest.approx(expected)
    assert label_metrics.matthews(np.array([[3.0, 0], [2, 0]])) == 0


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    path = tmp_path_factory.mktemp("model") / "model"
    config = encoder.EncoderConfig(layers=1, width=32, heads=2, ffn=64, positions=66)
    params = random_parameters(config, 7)
    model_folder.write(str(path), model_folder.Weights(params, config, {}))
    return str(path)


@pytest.fixture(autouse=True)
def cache_folder(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "esm1nv_jax" / "embeddings"


@pytest.fixture
def one_setting(monkeypatch):
    for head, setting in SETTING.items():
        monkeypatch.setitem(probe_heads.GRIDS, head, (setting,))


def run(checkpoint, task, path, tmp_path, *options):
    out = tmp_path / "out.json"
    argv = ["probe", "--checkpoint", checkpoint, "--task", task, "--csv", path, "--seeds", "2"]
    assert command.run(cli.dispatch, [*argv, "--json", str(out), *options]) == 0
    return json.loads(out.read_text())


@pytest.mark.integration
def test_secondary_structure_from_file_to_figures(checkpoint, tmp_path, one_setting):
    some = proteins(32, 1, 20, 60)
    rows = three(some, lambda s: "".join("H" if a in "LIVMF" else "C" for a in s))
    rows = [(s, label, "1" * len(s), split) for s, label, split in rows]
    path = write(tmp_path / "ss.csv.gz", rows, ("sequence", "label", "mask", "split"))
    found = run(checkpoint, "secondary_structure", path, tmp_path)
    assert [r["head"] for r in found["rows"]] == ["linear"] * 3 + ["cnn"] * 3
    one_hot, untrained, mine = found["rows"][:3]
    assert one_hot["accuracy"] > 0.99 and mine["accuracy"] > 0.9
    gained = found["differences"][0]["difference"]
    assert gained == pytest.approx(mine["accuracy"] - untrained["accuracy"], abs=1e-6)
    assert found["labels_scored"] == sum(len(s) for s, _, _, split in rows if split == "test")
    assert untrained["accuracy_se_seeds"] >= 0 and found["published"] is None


@pytest.mark.integration
@pytest.mark.parametrize(
    ("task", "label", "figure"),
    [
        (
            "localisation",
            lambda s: "nucleus" if s.count("K") > s.count("E") else "membrane",
            "macro_f1",
        ),
        ("regression", lambda s: str(10 * s.count("L") / len(s)), "spearman"),
    ],
)
def test_a_task_of_whole_proteins(checkpoint, tmp_path, one_setting, task, label, figure):
    path = write(tmp_path / "task.csv", three(proteins(240, 2), label))
    found = run(checkpoint, task, path, tmp_path, "--limit", "100")
    assert found["proteins"]["train"] == 100
    rows = {(r["head"], r["features"]): r for r in found["rows"]}
    assert rows["linear", probe_features.ONE_HOT][figure] > 0.75
    assert set(h for h, _ in rows) == {"linear", "mlp"}


PLAIN, MASKED = ("sequence", "label", "split"), ("sequence", "label", "mask", "split")


@pytest.mark.parametrize(
    ("task", "columns", "row", "said"),
    [
        ("regression", ("sequence", "label"), ("MK", "1"), "no column split"),
        ("secondary_structure", PLAIN, ("MKV", "CC", "train"), "line 2: the label has 2"),
        ("secondary_structure", MASKED, ("MK", "CC", "1", "train"), "the mask has 1"),
        ("regression", PLAIN, ("MK", "high", "train"), "not a number"),
        ("localisation", PLAIN, ("", "x", "train"), "sequence is empty"),
        ("localisation", PLAIN, ("MK", "x", "dev"), "'dev'"),
        ("localisation", PLAIN, ("MK", "x", "train"), "1 rows of split train"),
        ("localisation", PLAIN, ('"MK', "x", "train"), "is it CSV, and each quote closed?"),
    ],
)
def test_a_wrong_table_is_one_line(tmp_path, task, columns, row, said):
    path = write(tmp_path / "x.csv", [row], columns)
    with pytest.raises(UserError) as error:
        labeled_data.read(path, task)
    assert said in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("task", "labels", "mask", "said"),
    [
        ("regression", "11", "11", "every label is '11'"),
        ("localisation", "HC", "11", "every label is 'HC'"),
        ("secondary_structure", "HH", "11", "every label is 'H'"),
        ("secondary_structure", "HC", "00", "no residue of split train has mask 1"),
    ],
)
def test_labels_that_teach_nothing_are_one_line(tmp_path, task, labels, mask, said):
    rows = [("MK", labels, mask, split) for split in ("train", "valid", "test") * 2]
    with pytest.raises(UserError, match=said):
        labeled_data.read(write(tmp_path / "x.csv", rows, MASKED), task)


def test_a_table_from_a_spreadsheet_may_begin_with_a_byte_order_mark(tmp_path):
    rows = [("MK", str(i), split) for i in (1, 2) for split in ("train", "valid", "test")]
    path = write(tmp_path / "x.csv", rows, PLAIN)
    text = Path(path).read_text(encoding="utf-8")
    Path(path).write_text(text, encoding="utf-8-sig")
    assert len(labeled_data.read(path, "regression").train.sequences) == 2


@pytest.mark.integration
def test_a_limit_holds_for_every_split_and_one_seed_has_no_error(
    checkpoint, tmp_path, one_setting, capsys
):
    path = write(tmp_path / "t.csv", three(proteins(80, 2), lambda s: str(s.count("L") / len(s))))
    out = tmp_path / "out.json"
    argv = ["probe", "--checkpoint", checkpoint, "--task", "regression", "--csv", path]
    argv += ["--seeds", "1", "--limit", "10", "--precision", "bf16"]
    argv += ["--engine", "xla", "--json", str(out)]
    assert command.run(cli.dispatch, argv) == 0
    found = json.loads(out.read_text())
    assert set(found["proteins"].values()) == {10} and found["precision"] == "bf16"
    printed = capsys.readouterr()
    assert "seed" not in printed.out and "this encoder" in printed.out
    assert "embed by this encoder" in printed.err and "residues" in printed.err


@pytest.fixture
def embedded(monkeypatch):
    """The lengths of all proteins that were embedded."""
    lengths = []
    embed_sequences = probe_features.embed_sequences

    def counted(model, ids, *args):
        lengths.extend(map(len, ids))
        return embed_sequences(model, ids, *args)

    monkeypatch.setattr(probe_features, "embed_sequences", counted)
    return lengths


@pytest.mark.integration
def test_an_encoder_embeds_each_protein_once_in_all_runs(
    checkpoint, tmp_path, one_setting, embedded, cache_folder
):
    sequences = proteins(80, 2)
    path = write(tmp_path / "t.csv", three(sequences, lambda s: str(s.count("L") / len(s))))
    once = sum(map(len, sequences))

    def residues_embedded(*options):
        embedded.clear()
        results.append(run(checkpoint, "regression", path, tmp_path, *options))
        return sum(embedded)

    results = []
    assert residues_embedded() == 3 * once  # this encoder, and two untrained ones
    files = list(cache_folder.iterdir())
    assert len(files) == 3 * 3  # of each split
    damaged = min(files, key=lambda file: (file.stat().st_size, file.name))
    damaged.write_bytes(damaged.read_bytes()[:-100] + bytes(100))
    assert 0 < residues_embedded() < once
    kept = {file: file.stat().st_mtime_ns for file in files}
    assert residues_embedded("--no-cache") == 3 * once
    assert {file: file.stat().st_mtime_ns for file in cache_folder.iterdir()} == kept
    assert results[0] == results[1] == results[2]


def test_what_changes_an_embedding_changes_its_key(checkpoint):
    model = load(checkpoint)
    digest = model_digest(model)
    assert digest == model_digest(load(checkpoint))
    others = {"precision": "bf16", "max_residues": 30, "params": random_parameters(model.config, 8)}
    for name, value in others.items():
        assert model_digest(dataclasses.replace(model, **{name: value})) != digest
    cases = [(b"MK", b"TV"), (b"MKT", b"V"), (b"TV", b"MK")]
    keys = {key_of(digest, case, kind) for case in cases for kind in ("mean", "per_residue")}
    assert len(keys) == 6


def test_a_damaged_or_foreign_array_is_none_and_old_ones_make_room(tmp_path):
    arrays = {name: np.full((10, 10), i, np.float32) for i, name in enumerate("abc")}
    cache = EmbeddingCache(tmp_path / "cache", limit=1200)
    for i, (name, array) in enumerate(arrays.items()):
        cache.write(name, array)
        os.utime(tmp_path / "cache" / f"{name}.npy", (i, i))
    assert cache.read("a") is None  # the oldest
    np.testing.assert_array_equal(cache.read("c"), arrays["c"])
    path = tmp_path / "cache" / "c.npy"
    whole = path.read_bytes()
    for content in (whole[:-1], whole[:200] + b"x" + whole[201:], b"", b"text"):
        path.write_bytes(content)
        assert cache.read("c") is None
    cache.write("large", np.zeros(10_000))
    assert cache.read("large") is None
    (tmp_path / "file").write_text("")
    EmbeddingCache(tmp_path / "file").write("a", arrays["a"])  # no place to write to


@pytest.mark.parametrize(("name", "task"), labeled_data.PROBE_TASKS.items())
def test_the_tasks_of_finetune_go_by_their_names(name, task, monkeypatch):
    def read(path, found, limit):
        raise UserError(found)

    monkeypatch.setattr(labeled_data, "read", read)
    for given in (name, task):
        with pytest.raises(UserError, match=f"^{name}$"):
            probe.main(["--checkpoint", "x", "--csv", "y", "--task", given])
