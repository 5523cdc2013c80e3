"""Labels and models that do not fit are answered with one line and status 2, before training."""

import dataclasses

import numpy as np
import pytest

from esm1nv_jax.checkpoints import model_folder
from esm1nv_jax.common import command
from esm1nv_jax.common.errors import UserError
from esm1nv_jax.data import labeled_data
from esm1nv_jax.model import encoder, heads
from esm1nv_jax.model.heads import HeadConfig
from esm1nv_jax.training import finetune, run_data, sharding
from tests.model.parameters import random_parameters

MODEL = encoder.EncoderConfig(layers=1, width=16, heads=2, ffn=32, positions=64)
SPLITS = ("train", "train", "train", "train", "valid", "valid", "test", "test")
CLASSES = "a,b,a,b,a,b,a,b".split(",")


def rows(labels, **columns) -> str:
    """A table of eight proteins; `columns` replace or add columns, a value a protein."""
    sequences = [f"MKV{'ACDEFGHI'[i]}L" for i in range(8)]
    table = {"sequence": sequences, "label": labels, "split": SPLITS} | columns
    lines = [
        ",".join(table),
        *(",".join(map(str, row)) for row in zip(*table.values(), strict=True)),
    ]
    return "\n".join(lines) + "\n"


def replaced(values, index, value):
    return [value if i == index else x for i, x in enumerate(values)]


RESIDUES = ["CCHHC"] * 8
NUMBERS = [f"{i}.5" for i in range(8)]
SERIES = ["1 2 3 4 5"] * 8


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    params = random_parameters(MODEL)
    head = HeadConfig("protein", "classification", ("x", "y"))
    tuned = params | {"head": heads.init(head, MODEL.width, 0)}
    model_folder.write(str(folder / "base"), model_folder.Weights(params, MODEL, {}))
    model_folder.write(str(folder / "tuned"), model_folder.Weights(tuned, MODEL, {}, head))
    return folder


@pytest.fixture
def refusal(monkeypatch, models, tmp_path, capfd):
    """The one line with which `esm1nv finetune` refuses a table."""
    devices_of = sharding.devices_of
    monkeypatch.setattr(sharding, "devices_of", lambda platform: devices_of(platform)[:1])

    def refuse(text, task="protein_classification", *options, model="base"):
        (tmp_path / "t.csv").write_text(text, encoding="utf-8")
        argv = ["--checkpoint", str(models / model), "--csv", str(tmp_path / "t.csv")]
        argv += ["--task", task, "--out", str(tmp_path / "run"), *options]
        status = command.run(finetune.main, argv)
        errors = capfd.readouterr().err.strip().splitlines()
        assert status == 2 and len(errors) == 1 and errors[0].startswith("error: "), errors
        assert not (tmp_path / "run" / "config.json").exists()
        return errors[0]

    return refuse


@pytest.mark.parametrize(
    ("text", "task", "words"),
    [
        (rows(replaced(RESIDUES, 3, "CCHH")), "residue_classification", "line 5: the label has 4"),
        (rows(replaced(RESIDUES, 3, "CCHHCC")), "residue_classification", "the label has 6 char"),
        (rows(replaced(SERIES, 0, "1 2 3 4")), "residue_regression", "the label has 4 numbers"),
        (rows(replaced(SERIES, 2, "1 2 nan 4 5")), "residue_regression", "line 4: the label 'nan'"),
        (rows(replaced(NUMBERS, 7, "nan")), "protein_regression", "line 9: the label 'nan' is not"),
        (rows(["1.5"] * 8), "protein_regression", "every label is '1.5'"),
        (rows(replaced(NUMBERS, 7, "1e39")), "protein_regression", "label '1e39' is beyond 1e+30"),
        (rows([f"{i}e-33" for i in range(8)]), "protein_regression", "told apart in float32"),
        (rows([100000000 + i / 99 for i in range(8)]), "protein_regression", "told apart in float"),
        (rows(["1.5"] * 4 + NUMBERS[4:]), "protein_regression", "label of split train is 1.5"),
        (rows([*"12345567"]), "protein_regression", "label of split valid is 5; split otherwise"),
        (rows(RESIDUES, mask=["00000"] * 8), "residue_classification", "has mask 1"),
        (rows(RESIDUES, mask=["11x11"] * 8), "residue_classification", "more than 0 and 1"),
        (
            rows(replaced(CLASSES, 7, "c")),
            "protein_classification",
            "split test has labels of class 'c', of which split train has none",
        ),
        (
            rows(replaced(CLASSES, 2, "b")),
            "protein_classification",
            "split train has one example of class 'a'",
        ),
        (
            rows(replaced([f"{x};z" for x in CLASSES], 0, "b;q")),
            "protein_multilabel",
            "one example of class 'a', 'q'",
        ),
        (rows([""] * 8), "protein_multilabel", "every label is ''"),
        (
            rows(CLASSES, id=["p", "q", "p", "p", *range(4)]),
            "protein_classification",
            "line 5: id 'p' has another label than in line 2",
        ),
        (rows(CLASSES, split=["train"] * 8), "protein_classification", "0 rows of split valid"),
        (rows(CLASSES, sequence=[""] * 8), "protein_classification", "the sequence is empty"),
    ],
)
def test_of_tables(refusal, text, task, words):
    assert words in refusal(text, task)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--method", "last=2"), "the model has 1 blocks"),
        (("--method", "lora=17"), "rank 17 exceeds the width of the model, 16"),
        (("--method", "most"), "there are full, last=BLOCKS, lora=RANK or head"),
        (("--config.finetune.lora_projections=q",), "take some of query, key"),
        (("--config.finetune.metric=mse",), "unknown for classification; there are auto, loss"),
        (("--config.finetune.pooling=max",), "there are mean, attention, cls"),
        (("--config.finetune.frozen_dtype=int8",), "there are float32, bfloat16"),
        (("--config.finetune.patience=-1",), "patience=-1 must be at least 0"),
        (("--config.finetune.test_fraction=1",), "sum to less than 1"),
        (("--config.init_from=", "--method", "head"), "method=head needs a model"),
        (("--config.fork_from=runs/x",), "exclude each other"),
        (("--config.model.width=32",), "the model needs"),
        (("--epochs", "0"), "epochs=0 must be at least 1"),
        (("--lr", "-1"), "optimizer.min_lr"),
        (("--grid", "rate=1"), "with a name of lr, weight_decay"),
        (("--grid", "lr=fast"), "--grid 'lr=fast' is not NAME=VALUE"),
    ],
)
def test_of_options(refusal, options, words):
    assert words in refusal(rows(CLASSES), "protein_classification", *options)


def test_of_a_head_for_other_labels(refusal):
    line = refusal(rows(CLASSES), model="tuned")
    assert "classes x, y; the table needs one for" in line and "classes a, b" in line


@pytest.mark.parametrize("level", ["residue", "protein"])
def test_a_head_for_the_same_labels_goes_on_whatever_their_order(
    monkeypatch, models, tmp_path, refusal, level
):
    """A folder of transformers names classes in any order, and pooling `cls` of residues, too."""
    head = HeadConfig(level, "classification", ("b", "a"), "cls")
    base = model_folder.read(str(models / "base"))
    params = base.params | {"head": heads.init(head, MODEL.width, 0)}
    tuned = model_folder.Weights(params, MODEL, {}, head)
    model_folder.write(str(models / level), tuned)
    labels = [x * 5 for x in CLASSES] if level == "residue" else CLASSES
    task = f"{level}_classification"
    if level == "protein":
        line = refusal(rows(labels), task, model=level)
        assert "set finetune.pooling=cls, or begin from" in line
    monkeypatch.setattr(finetune, "train", lambda config, out: config)
    argv = ["--checkpoint", str(models / level), "--csv", str(tmp_path / "t.csv"), "--task", task]
    argv += ["--out", "run", f"--config.finetune.pooling={'cls' if level == 'protein' else 'mean'}"]
    (tmp_path / "t.csv").write_text(rows(labels), encoding="utf-8")
    initial = run_data.open_data(finetune.main(argv)).initial["head"]["out_proj"]
    for name, leaf in params["head"]["out_proj"].items():
        np.testing.assert_array_equal(initial[name], np.asarray(leaf)[..., ::-1])


def test_of_paths(refusal, models):
    assert "has a comma" in refusal(rows(CLASSES), "protein_classification", "--csv", "a,b.csv")
    assert "/nowhere does not exist" in refusal(
        rows(CLASSES), "protein_classification", "--checkpoint", "/nowhere"
    )


def test_a_grid_may_be_given_in_parts(monkeypatch, models, tmp_path):
    monkeypatch.setattr(finetune, "search", lambda config, grid, out: len(grid))
    (tmp_path / "t.csv").write_text(rows(CLASSES), encoding="utf-8")
    argv = ["--checkpoint", str(models / "base"), "--csv", str(tmp_path / "t.csv"), "--out", "run"]
    argv += ["--task", "protein_classification"]
    for lr in ("lr=1,2", "lr=3"):
        argv += ["--grid", lr, "weight_decay=0"]
    assert finetune.main([*argv[:-1], "weight_decay=1"]) == 6


def test_a_sequence_in_two_splits_is_counted(tmp_path):
    sequences = ["MKVA", "MKVC", "MKVD", "MKVE", "MKVA", "MKVG", "MKVA", "MKVC"]
    (tmp_path / "t.csv").write_text(rows(CLASSES, sequence=sequences), encoding="utf-8")
    task = labeled_data.read(str(tmp_path / "t.csv"), "protein_classification")
    assert task.shared == 2  # MKVA in all three splits, MKVC in two


def test_without_a_column_split_equal_sequences_stay_together(tmp_path):
    rng = np.random.default_rng(0)
    letters = np.frombuffer(b"ACDEFGHIKLMNPQRSTVWY", np.uint8)
    sequences = [rng.choice(letters, 20).tobytes().decode() for _ in range(200)]
    lines = [f"{s},{'ab'[i % 2]}" for i, s in enumerate(sequences)] * 2
    (tmp_path / "t.csv").write_text("\n".join(["sequence,label", *lines]), encoding="utf-8")

    def split(seed):
        fractions = labeled_data.SplitFractions(0.2, 0.3, seed)
        return labeled_data.read(str(tmp_path / "t.csv"), "protein_classification", None, fractions)

    task = split(0)
    sizes = [len(x.sequences) for x in (task.train, task.valid, task.test)]
    assert sum(sizes) == 400 and task.shared == 0
    assert 160 < sizes[0] < 240 and 50 < sizes[1] < 110 and 80 < sizes[2] < 160
    assert split(0).test.sequences == task.test.sequences != split(1).test.sequences


def test_an_epoch_is_of_the_split_that_is_asked_for(monkeypatch, models, tmp_path):
    """By the default fractions these ten proteins have one to validate on, which is refused."""
    monkeypatch.setattr(finetune, "train", lambda config, out: config)
    lines = [f"MKV{'ACDEFGHIKL'[i]}L,{i}" for i in range(10)]
    (tmp_path / "t.csv").write_text("\n".join(["sequence,label", *lines]), encoding="utf-8")
    argv = ["--checkpoint", str(models / "base"), "--csv", str(tmp_path / "t.csv"), "--out", "run"]
    argv += ["--task", "protein_regression", "--batch", "1", "--epochs", "3"]
    with pytest.raises(UserError, match="needs 2 or more; give a column split, or other fractions"):
        finetune.main(argv)
    options = ("valid_fraction=0.3", "test_fraction=0.4", "split_seed=1")
    config = finetune.main([*argv, *(f"--config.finetune.{option}" for option in options)])
    fractions = labeled_data.SplitFractions(0.3, 0.4, 1)
    assert config.finetune.fractions == fractions
    task = labeled_data.read(str(tmp_path / "t.csv"), "protein_regression", fractions=fractions)
    epoch = len(task.train.sequences)
    assert (config.evaluation.every, config.steps) == (epoch, 3 * epoch)
    assert config.data.row_length == 8  # of one protein, so that a step reads no more


def test_the_masking_of_the_base_stays_known(monkeypatch, models, tmp_path):
    """Trained by `shipped` a model is refused wt-marginals, and so it is after fine-tuning."""
    monkeypatch.setattr(finetune, "train", lambda config, out: config)
    made = {"config": {"masking": {"recipe": "shipped", "rate": 0.1}}}
    weights = dataclasses.replace(model_folder.read(str(models / "base")), provenance=made)
    model_folder.write(str(tmp_path / "shipped"), weights)
    (tmp_path / "t.csv").write_text(rows(CLASSES), encoding="utf-8")
    argv = ["--csv", str(tmp_path / "t.csv"), "--out", "run", "--task", "protein_classification"]
    masking = finetune.main([*argv, "--checkpoint", str(tmp_path / "shipped")]).masking
    assert (masking.recipe, masking.rate) == ("shipped", 0.1)
    assert finetune.main([*argv, "--checkpoint", str(models / "base")]).masking.recipe == "card"
