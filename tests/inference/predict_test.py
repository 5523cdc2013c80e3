"""Predictions of fine-tuned models: files and arrays, beside heads computed in NumPy."""

import csv
import dataclasses
import json

import h5py
import jax
import numpy as np
import pyarrow.parquet as pq
import pytest

from esm1nv_jax import cli, load
from esm1nv_jax.checkpoints import model_folder
from esm1nv_jax.common import command
from esm1nv_jax.common.errors import UserError
from esm1nv_jax.inference import fasta_job
from esm1nv_jax.inference.embedding_files import writer_for
from esm1nv_jax.inference.fasta_job import FastaRequest
from esm1nv_jax.inference.partial_results import PartialResults
from esm1nv_jax.inference.predict import WRITERS, predict
from esm1nv_jax.model.heads import POOLINGS, HeadConfig
from tests.inference.embed_jobs import PROTEINS
from tests.inference.models import make_tuned, write_fasta

CLASSES = ("E", "H, or G", "id")
SEQUENCES = [sequence for _, sequence in PROTEINS]  # some longer than one window
RESIDUE = HeadConfig("residue", "classification", CLASSES)
PROTEIN = {
    pooling: HeadConfig("protein", kind, () if kind == "regression" else CLASSES, pooling)
    for pooling, kind in zip(POOLINGS, ("multilabel", "classification", "regression"), strict=True)
}
HEADS = [RESIDUE, *PROTEIN.values()]
name_of = "{0.level}-{0.kind}-{0.pooling}".format


@pytest.fixture(scope="module")
def tuned(model_path, tmp_path_factory):
    """Folders of fine-tuned models, by head."""
    folder = tmp_path_factory.mktemp("tuned")
    return {h: make_tuned(folder / str(i), h, model_path) for i, h in enumerate(HEADS)}


def request(checkpoint, folder, out, proteins=PROTEINS, **options):
    fasta = write_fasta(folder / "in.fasta", proteins)
    return FastaRequest(checkpoint, fasta, str(folder / out), **options)


def witness(model, head):
    """Predictions in NumPy and fp64, from the embeddings that have tests of their own."""
    params = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), model.head_params)
    embeddings = model.embed(SEQUENCES)
    if head.level == "residue":
        states = embeddings.per_residue
    elif head.pooling == "mean":
        states = embeddings.mean
    elif head.pooling == "cls":
        states = np.tanh(embeddings.cls @ params["dense"]["kernel"] + params["dense"]["bias"])
    else:
        scores = [x @ params["score"]["kernel"][:, 0] for x in embeddings.per_residue]
        weights = [np.exp(s) / np.exp(s).sum() for s in scores]
        states = [w @ x for w, x in zip(weights, embeddings.per_residue, strict=True)]
    out = params["out_proj"]
    logits = [np.asarray(x, np.float64) @ out["kernel"] + out["bias"] for x in states]
    if head.kind == "regression":
        return logits
    if head.kind == "multilabel":
        return [1 / (1 + np.exp(-x)) for x in logits]
    return [np.exp(x) / np.exp(x).sum(axis=-1, keepdims=True) for x in logits]


@pytest.mark.parametrize("head", HEADS, ids=name_of)
def test_predictions_are_those_of_the_head_on_the_embeddings(tuned, head):
    model = load(tuned[head])
    predicted = model.predict(SEQUENCES)
    assert predicted.head == head and len(predicted.values) == len(SEQUENCES)
    for value, expected in zip(predicted.values, witness(model, head), strict=True):
        assert value.shape == expected.shape and value.dtype == np.float32
        np.testing.assert_allclose(value, expected, atol=2e-5)
    if head.kind == "classification":
        for labels, value in zip(predicted.labels, predicted.values, strict=True):
            best = np.atleast_2d(value).argmax(axis=1)
            assert labels == [CLASSES[k] for k in best]
    else:
        with pytest.raises(UserError, match="no likeliest class"):
            _ = predicted.labels


@pytest.mark.parametrize("head", [RESIDUE, PROTEIN["attention"]], ids=name_of)
def test_deterministic_predictions_have_the_same_bits_whatever_else_is_there(tuned, head):
    model = load(tuned[head])
    longest = max(range(8), key=lambda i: len(SEQUENCES[i]))
    together = model.predict(SEQUENCES[:8], deterministic=True).values
    for i in {0, longest}:
        alone = model.predict([SEQUENCES[i]], deterministic=True).values[0]
        assert alone.tobytes() == together[i].tobytes()


def test_no_sequences_have_no_predictions(tuned):
    assert load(tuned[RESIDUE]).predict([]).values == []


@pytest.mark.parametrize("head", HEADS, ids=name_of)
def test_the_three_formats_hold_the_same_in_the_order_of_the_fasta(
    tuned, head, tmp_path, small_parts
):
    for ending in ("csv", "h5", "parquet"):
        predict(request(tuned[head], tmp_path, f"o.{ending}"))
    values = load(tuned[head]).predict(SEQUENCES).values
    table = pq.read_table(tmp_path / "o.parquet")
    with open(tmp_path / "o.csv", encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    names = [f"p_{name}" for name in head.classes] or ["value"]
    if head.level == "residue":
        keys = [(n, i, c) for n, s in PROTEINS for i, c in enumerate(s, 1)]
        columns = ("id", "position", "residue")
        expected = np.concatenate(values)
    else:
        keys, columns, expected = [(n,) for n, _ in PROTEINS], ("id",), np.array(values)
    assert list(zip(*(table[c].to_pylist() for c in columns), strict=True)) == keys
    assert [tuple(row[c] for c in columns) for row in rows] == [tuple(map(str, k)) for k in keys]
    stored = np.stack([table[name].to_numpy() for name in names], axis=1)
    np.testing.assert_allclose(stored, expected, atol=2e-6)
    from_csv = np.array([[row[name] for name in names] for row in rows], np.float32)
    np.testing.assert_array_equal(from_csv, stored)
    assert ("label" in table.column_names) == (head.kind == "classification")
    if head.kind == "classification":
        labels = [CLASSES[k] for k in stored.argmax(axis=1)]
        assert table["label"].to_pylist() == labels == [row["label"] for row in rows]
    with h5py.File(tmp_path / "o.h5") as file:
        described = json.loads(file.attrs["esm1nv_jax"])
        assert HeadConfig(**described["head"]) == head
        assert [i.decode() for i in file["id"]] == [name for name, _ in PROTEINS]
        if head.level == "residue":
            np.testing.assert_array_equal(file["per_residue_prediction"][:], stored)
            letters = b"".join(file["per_residue_letter"][:])
            assert letters.decode() == "".join(SEQUENCES)
            assert file["offsets"][-1] == len(letters)
        else:
            np.testing.assert_array_equal(file["prediction"][:], stored)
    assert not list(tmp_path.glob("*.parts")) and not list(tmp_path.glob("*.tmp"))


def test_a_residue_is_written_as_the_letter_of_the_fasta(tuned, tmp_path):
    predict(request(tuned[RESIDUE], tmp_path, "o.csv", [("a", "MJx*K")]))
    with open(tmp_path / "o.csv", encoding="utf-8", newline="") as file:
        assert [row["residue"] for row in csv.DictReader(file)] == [*"MJX*K"]


def test_interrupted_work_goes_on(tuned, tmp_path, small_parts, monkeypatch, capsys):
    (tmp_path / "one").mkdir()
    alone = predict(request(tuned[RESIDUE], tmp_path / "one", "o.csv"))
    write = PartialResults.write

    def stop(self, part, *args):
        if part == 3:
            raise KeyboardInterrupt
        write(self, part, *args)

    monkeypatch.setattr(PartialResults, "write", stop)
    with pytest.raises(KeyboardInterrupt):
        predict(request(tuned[RESIDUE], tmp_path, "o.csv"))
    assert len(list((tmp_path / "o.csv.parts").glob("part-*.npz"))) == 3
    assert not (tmp_path / "o.csv").exists()
    monkeypatch.setattr(PartialResults, "write", write)
    assert predict(request(tuned[RESIDUE], tmp_path, "o.csv")) == alone
    assert "going on with" in capsys.readouterr().err
    assert (tmp_path / "o.csv").read_bytes() == (tmp_path / "one" / "o.csv").read_bytes()


def test_shards_merge_into_the_file_of_one_job(tuned, tmp_path, small_parts):
    (tmp_path / "one").mkdir()
    checkpoint = tuned[PROTEIN["attention"]]
    alone = predict(request(checkpoint, tmp_path / "one", "o.h5"))
    for i in (2, 1):
        assert predict(request(checkpoint, tmp_path, "o.h5", shard=(i, 2))) is None
    out = tmp_path / "o.h5"
    assert fasta_job.merge(str(out), writer_for(out, WRITERS)) == alone


def test_another_head_does_not_mix_with_unfinished_work(tuned, tmp_path, small_parts):
    predict(request(tuned[RESIDUE], tmp_path, "o.csv", shard=(1, 2)))
    weights = model_folder.read(tuned[RESIDUE])
    weights.params["head"]["out_proj"]["bias"] += 1
    model_folder.write(str(tmp_path / "other"), weights)
    with pytest.raises(UserError, match="head_parameters"):
        predict(request(str(tmp_path / "other"), tmp_path, "o.csv", shard=(2, 2)))


def test_the_command_and_its_mistakes(tuned, model_path, tmp_path, capsys):
    fasta, out = write_fasta(tmp_path / "in.fasta", PROTEINS[:3]), str(tmp_path / "o.csv")

    def run(*argv):
        return command.run(cli.dispatch, ["predict", "--fasta", fasta, *argv])

    checkpoint = tuned[PROTEIN["cls"]]
    assert run("--checkpoint", checkpoint, "--out", out) == 0
    assert len((tmp_path / "o.csv").read_text().splitlines()) == 4
    capsys.readouterr()
    for argv, message in [
        (("--checkpoint", model_path, "--out", out, "--overwrite"), "esm1nv finetune"),
        (("--checkpoint", checkpoint, "--out", out), "add --overwrite"),
        (("--checkpoint", checkpoint, "--out", f"{out}.npz"), ".parquet, .csv, .h5"),
        (("--out", out), "--checkpoint is missing"),
        (("--checkpoint", checkpoint, "--out", f"{out}.h5", "--long", "cut"), "--long=cut"),
    ]:
        assert run(*argv) == 2
        err = capsys.readouterr().err
        assert err.rstrip("\n").splitlines()[-1].startswith("error: ") and message in err
    assert len((tmp_path / "o.csv").read_text().splitlines()) == 4


def test_a_head_in_a_model_folder_is_read_back_or_refused(tuned, model_path, tmp_path):
    head = PROTEIN["cls"]
    weights = model_folder.read(tuned[head])
    assert weights.head == head and "base" in weights.provenance
    assert model_folder.read(model_path).head is None
    wrong = dataclasses.replace(weights, head=dataclasses.replace(head, pooling="attention"))
    model_folder.write(str(tmp_path / "wrong"), wrong)
    with pytest.raises(UserError, match="head/dense/bias has shape"):
        model_folder.read(str(tmp_path / "wrong"))
    del weights.params["head"]
    model_folder.write(str(tmp_path / "none"), weights)
    with pytest.raises(UserError, match=r"head/dense/bias has shape none \(missing\)"):
        model_folder.read(str(tmp_path / "none"))


@pytest.mark.integration
def test_other_verbs_ignore_the_head(tuned, model_path, tmp_path):
    fasta = write_fasta(tmp_path / "in.fasta", PROTEINS[:6])
    wild_type = write_fasta(tmp_path / "wt.fasta", PROTEINS[1:2])
    first = SEQUENCES[1][0]
    (tmp_path / "mutants.csv").write_text(f"mutant\n{first}1{'A' if first != 'A' else 'G'}\n")
    splits = ("train", "valid", "test")
    rows = [f"{SEQUENCES[3 * i + k]},{i + k},{s}" for k, s in enumerate(splits) for i in range(5)]
    (tmp_path / "labels.csv").write_text("\n".join(["sequence,label,split", *rows]))
    commands = {
        "embed.h5": ["embed", "--fasta", fasta, "--out"],
        "evaluate.json": ["evaluate", "--fasta", fasta, "--json"],
        "score.csv": [
            "score",
            "--fasta",
            wild_type,
            "--mutants",
            tmp_path / "mutants.csv",
            "--out",
        ],
        "probe.json": ["probe", "--csv", tmp_path / "labels.csv", "--seeds", "1", "--json"],
    }
    commands["probe.json"][1:1] = ["--task", "regression"]
    results = []
    for checkpoint in (tuned[PROTEIN["attention"]], model_path):
        for name, argv in commands.items():
            verb, *options = map(str, [*argv, tmp_path / name])
            argv = [verb, "--checkpoint", checkpoint, *options]
            assert command.run(cli.dispatch, argv) == 0
        with h5py.File(tmp_path / "embed.h5") as file:
            means = file["mean_-1"][:].tobytes()
        evaluation, probed = (
            json.loads((tmp_path / f"{verb}.json").read_text()) for verb in ("evaluate", "probe")
        )
        evaluation = {k: v for k, v in evaluation.items() if k not in ("checkpoint", "provenance")}
        scores = (tmp_path / "score.csv").read_text()
        results.append((means, evaluation, scores, probed["rows"]))
        (tmp_path / "embed.h5").unlink(), (tmp_path / "score.csv").unlink()
    assert results[0] == results[1]


def test_bf16_products_leave_the_head_in_fp32(tuned):
    params = load(tuned[RESIDUE], "bf16", engine="xla").on_devices.params
    assert params["blocks"]["0"]["fc1"]["kernel"].dtype == "bfloat16"
    assert params["head"]["out_proj"]["kernel"].dtype == "float32"
