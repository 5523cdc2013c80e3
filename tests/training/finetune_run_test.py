"""Whole runs of fine-tuning: learning, the test split, going on, and the model that comes out."""

import csv
import dataclasses
import errno
import json
import shutil
import signal
import subprocess

import numpy as np
import pytest

from esm1nv_jax import main
from esm1nv_jax.checkpoints import model_folder, step_folder
from esm1nv_jax.common import command, files
from esm1nv_jax.common.errors import EXIT_USER
from esm1nv_jax.data import tokenizer
from esm1nv_jax.inference import average
from esm1nv_jax.interchange.loader import load_weights
from esm1nv_jax.model import encoder
from esm1nv_jax.training import finetune, recorded_run, sharding
from tests.training import processes
from tests.training.processes import lines

MODEL = encoder.EncoderConfig(
    layers=2, width=16, heads=2, ffn=32, positions=64, dropout=0.1, attention_dropout=0.1
)
FIXED = ("--config.optimizer.horizon=1000", "--config.optimizer.warmup=2", "--config.log.every=1")
LETTERS = np.frombuffer(b"ACDEFGHIKLMNPQRSTVWY", np.uint8)
KINDS = {
    "residue_classification": lambda s: "".join("H" if c in "AILMFVWY" else "C" for c in s),
    "protein_regression": lambda s: f"{50 + 100 * sum(c in 'AILMFVWY' for c in s) / len(s):.3f}",
}


def table(path, task: str, n: int = 60) -> str:
    rng = np.random.default_rng(0)
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(("id", "sequence", "label", "split"))
        for i in range(n):
            sequence = rng.choice(LETTERS, rng.integers(8, 60)).tobytes().decode()
            split = ("train", "train", "train", "valid", "test")[i % 5]
            writer.writerow((f"p{i}", sequence, KINDS[task](sequence), split))
    return str(path)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    path = str(tmp_path_factory.mktemp("base") / "model")
    model_folder.write(path, model_folder.Weights(encoder.init(MODEL, 0), MODEL, {}))
    return path


@pytest.fixture
def run(monkeypatch, base, tmp_path):
    """Runs `esm1nv finetune` in this process, on one device."""
    devices_of = sharding.devices_of
    monkeypatch.setattr(sharding, "devices_of", lambda platform: devices_of(platform)[:1])

    def finetune_here(out, *options, task="residue_classification", model=base):
        path = table(tmp_path / f"{task}.csv", task)
        argv = ["--checkpoint", model, "--csv", path, "--task", task, "--out", str(tmp_path / out)]
        argv += ["--batch", "12", "--config.compute.dtype=float32", *options]
        return command.run(finetune.main, argv), tmp_path / out

    return finetune_here


def of_test_split(weights, csv_path):
    """(predictions, labels) of the test split, a protein at a time and by NumPy from its states."""
    with open(csv_path, encoding="utf-8") as file:
        rows = [row for row in csv.DictReader(file) if row["split"] == "test"]
    predicted, labels = [], []
    head = weights.params["head"]["out_proj"]
    for row in rows:
        tokens = tokenizer.encode(row["sequence"]).astype(np.int32)[None]
        positions = np.arange(tokens.shape[1])[None]
        output = encoder.forward(
            weights.model,
            weights.encoder_params,
            tokens,
            np.ones_like(tokens),
            positions,
            hidden_layers=(-1,),
        )
        states = np.asarray(output.hidden[-1])[0, 1:-1]
        if weights.head.level == "protein":
            states = states.mean(axis=0, keepdims=True)
            labels.append(float(row["label"]))
        else:
            labels += [weights.head.classes.index(x) for x in row["label"]]
        predicted.append(states @ head["kernel"] + head["bias"])
    return np.concatenate(predicted), np.array(labels)


@pytest.mark.integration
@pytest.mark.parametrize(
    ("task", "method"),
    [
        ("residue_classification", "lora=4"),
        ("protein_regression", "full"),
        ("protein_regression", "lora=4"),
    ],
)
def test_a_run_is_tested_once_and_its_folder_is_the_tested_model(run, base, task, method):
    options = ("--method", method, "--epochs", "8", "--lr", "0.02")
    status, out = run("run", *options, task=task)
    assert status == 0
    tested = (out / "test.json").read_text()
    metrics = json.loads(tested)["metrics"]
    weights = load_weights(str(out))
    predicted, labels = of_test_split(weights, out.parent / f"{task}.csv")
    if task == "protein_regression":
        assert metrics["mse"] == pytest.approx(np.mean((predicted[:, 0] - labels) ** 2), rel=1e-3)
        assert abs(predicted.mean() - 90) < 20  # in units of the label
    else:
        assert metrics["accuracy"] == pytest.approx(np.mean(predicted.argmax(1) == labels))
        assert weights.head.classes == ("C", "H")
        assert lines(out, "train")[-1]["loss"] < 0.9 * lines(out, "train")[0]["loss"]
    assert set(json.loads(tested)["errors"]) <= set(metrics)
    # A checkpoint holds what was trained; the masked-LM head is that of the base.
    saved = step_folder.read_params(out, step_folder.steps(out)[-1])
    assert saved.keys() == ({"head", "lora"} if method == "lora=4" else saved.keys() - {"lm_head"})
    np.testing.assert_array_equal(
        weights.params["lm_head"]["dense"]["kernel"],
        load_weights(base).params["lm_head"]["dense"]["kernel"],
    )
    # `compare` takes the metric that chose the best checkpoint, at that checkpoint.
    (recorded,) = recorded_run.read([str(out)])
    chosen = step_folder.read_metadata(out, step_folder.steps(out, "best")[-1], "best")
    assert recorded.best() == chosen[recorded.metric[0]]
    # The same command again changes nothing.
    assert run("run", *options, task=task)[0] == 0
    assert (out / "test.json").read_text() == tested
    # Of another checkpoint it is tested anew.
    (out / "test.json").write_text(tested.replace('"step": ', '"step": 1'))
    assert run("run", *options, task=task)[0] == 0
    assert (out / "test.json").read_text() == tested


@pytest.mark.integration
def test_a_disk_that_is_full_at_the_test_is_one_line(run, monkeypatch, capfd):
    write = files.write_atomically

    def full(path, text):
        if path.name == "test.json":
            raise OSError(errno.ENOSPC, "No space left on device")
        write(path, text)

    monkeypatch.setattr(files, "write_atomically", full)
    assert run("run", "--method", "head", "--epochs", "1")[0] == EXIT_USER
    assert "error: no space left to write" in capfd.readouterr().err.splitlines()[-1]


@pytest.mark.integration
def test_a_run_that_begins_anew_is_tested_anew(run, monkeypatch):
    """Its table may be another by now; the best step can be the same."""
    options = ("--method", "head", "--epochs", "1")
    _, out = run("run", *options)
    shutil.rmtree(out / "checkpoints")
    swapped = KINDS["residue_classification"]
    swap = str.maketrans("HC", "CH")
    monkeypatch.setitem(KINDS, "residue_classification", lambda s: swapped(s).translate(swap))
    assert run("run", *options) == (0, out)
    _, fresh = run("fresh", *options)
    assert (out / "test.json").read_text() == (fresh / "test.json").read_text()


@pytest.mark.integration
def test_going_on_equals_straight(run):
    options = ("--method", "last=1", "--config.evaluation.every=4", *FIXED)
    _, straight = run("straight", *options, "--config.steps=8")
    _, stopped = run("stopped", *options, "--config.steps=4")
    (stopped / "test.json").unlink()
    status, _ = run("stopped", *options, "--config.steps=8")
    assert status == 0
    a, b = (model_folder.flatten(step_folder.read_params(x, 8)) for x in (straight, stopped))
    assert a.keys() == b.keys()
    for name in a:
        np.testing.assert_array_equal(a[name], b[name], err_msg=name)
    values = [
        [
            {k: line[k] for k in ("step", "loss", "accuracy", "mcc")}
            for line in lines(x, "validation")
        ]
        for x in (straight, stopped)
    ]
    assert values[0] == values[1]


@pytest.mark.integration
def test_training_stops_when_validation_does_not_improve(run):
    options = ("--method", "head", "--config.evaluation.every=2", *FIXED)
    options += ("--config.finetune.patience=2", "--config.optimizer.peak_lr=0", "--config.steps=50")
    options += ("--config.log.every=5",)
    status, out = run("run", *options)
    assert status == 0
    assert [line["step"] for line in lines(out, "validation")] == [0, 2, 4, 6]
    assert [line["step"] for line in lines(out, "train")] == [5, 6]
    assert (
        step_folder.steps(out) == [6] and json.loads((out / "test.json").read_text())["step"] == 2
    )
    renamed = out.rename(out.parent / "1")  # as a step might be called
    paths = [str(renamed), str(renamed / "best"), str(renamed / "checkpoints")]
    assert [load_weights(path).provenance["steps"] for path in paths] == [[2], [2], [6]]
    renamed.rename(out)
    assert run("run", *options)[0] == 0  # it has ended
    assert lines(out, "validation")[-1]["step"] == 6
    (array,) = (out / "best/2/params/d").glob("*")  # the best damaged: patience begins again
    array.write_bytes(array.read_bytes()[:-1])
    assert run("run", *options)[0] == 0
    assert lines(out, "validation")[-1]["step"] == 12


@pytest.mark.integration
def test_from_scratch_a_checkpoint_needs_no_base(run, base, tmp_path, monkeypatch):
    monkeypatch.setattr(command, "set_up", lambda: None)
    path = table(tmp_path / "t.csv", "residue_classification")
    arg = f"model={base},csv={path},task=residue_classification,scratch,epochs=1,batch=12"
    argv = [f"--config=configs/finetune.py:{arg}", f"--workdir={tmp_path / 'run'}"]
    assert command.run(main.main, [*argv, "--config.compute.dtype=float32"]) == 0
    weights = load_weights(str(tmp_path / "run"))
    assert weights.head.classes == ("C", "H") and weights.provenance["base"] is None
    assert not weights.has_lm_head  # nothing has trained it


def test_a_base_that_has_changed_or_gone_is_named(run, base, tmp_path, capfd):
    model = str(tmp_path / "model")
    model_folder.write(model, load_weights(base))
    options = ("--method", "head", "--epochs", "1")
    status, out = run("run", *options, model=model)
    assert status == 0 and load_weights(str(out)).head.level == "residue"
    model_folder.write(model, model_folder.Weights(encoder.init(MODEL, 1), MODEL, {}))
    with pytest.raises(ValueError, match=f"fine-tuned from {model} with digest .* now has"):
        load_weights(str(out))
    capfd.readouterr()
    assert run("run", *options, model=model)[0] == 2
    assert "was begun from" in capfd.readouterr().err
    (tmp_path / "model").rename(tmp_path / "elsewhere")
    with pytest.raises(ValueError, match=f"fine-tuned from {model}, which cannot be read"):
        load_weights(str(out))


def test_a_base_without_a_masked_lm_head_gives_none(run, base, tmp_path):
    model, options = str(tmp_path / "model"), ("--method", "head", "--epochs", "1")
    bare = dataclasses.replace(load_weights(base), provenance=model_folder.NO_LM_HEAD)
    model_folder.write(model, bare)
    assert load_weights(str(run("run", *options)[1])).has_lm_head
    assert not load_weights(str(run("bare", *options, model=model)[1])).has_lm_head


@pytest.mark.integration
def test_a_fine_tuned_model_may_be_tuned_on(run, base, tmp_path, capfd):
    """A head for the same labels goes on; its start is as good as its end was."""
    out = tmp_path / "fork"
    options = ("--method", "full", "--lr", "0.02")
    _, first = run("first", *options, "--epochs", "6")
    best = max(line["accuracy"] for line in lines(first, "validation"))
    status, second = run("second", "--method", "head", "--epochs", "1", model=str(first))
    assert status == 0
    assert lines(second, "validation")[0]["accuracy"] == pytest.approx(best, abs=1e-6)
    argv = ["--config=tests/configs/tiny.py", f"--config.fork_from={first}", f"--workdir={out}"]
    assert command.run(main.main, [*argv, "--config.data.path=sample"]) == EXIT_USER
    assert "was fine-tuned" in capfd.readouterr().err


@pytest.mark.integration
def test_the_average_of_its_checkpoints_is_that_of_whole_models(run, tmp_path):
    options = ("--method", "lora=4", "--epochs", "3", "--lr", "0.02", "--config.checkpoint.keep=3")
    _, out = run("run", *options)
    members = [load_weights(str(out / "checkpoints" / str(n))) for n in step_folder.steps(out)]
    assert len(members) == 3
    model = str(tmp_path / "model")
    command.run(average.main, ["--workdir", str(out), "--out", model])
    averaged = model_folder.read(model)
    assert averaged.head == members[0].head
    flat = [model_folder.flatten(member.params) for member in members]
    for name, value in model_folder.flatten(averaged.params).items():
        np.testing.assert_allclose(value, np.mean([x[name] for x in flat], axis=0), atol=1e-6)


@pytest.mark.integration
def test_a_grid_is_chosen_on_validation_and_tested_once(run, capfd):
    grid = ("--grid", "lr=1e-6,2e-2", "weight_decay=0")
    options = ("--method", "full", "--epochs", "6", *grid)
    status, out = run("run", *options)
    assert status == 0
    record = json.loads((out / "grid.json").read_text())
    assert record["chosen"] == "lr=0.02_weight_decay=0" and record["metric"] == "accuracy"
    assert list(out.rglob("test.json")) == [out / "test.json"]
    tested = (out / "test.json").read_text()
    assert json.loads((out / "config.json").read_text())["optimizer"]["peak_lr"] == 0.02
    assert run("run", *options)[0] == 0 and (out / "test.json").read_text() == tested
    capfd.readouterr()
    assert run("run", *options[:-3], "--grid", "lr=1")[0] == 2
    assert "is of another grid" in capfd.readouterr().err


@pytest.mark.integration
@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 75), (signal.SIGKILL, -9)])
def test_interrupted_and_gone_on_equals_straight(run, base, tmp_path, number, status):
    path = table(tmp_path / "t.csv", "residue_classification")
    arg = f"model={base},csv={path},task=residue_classification,method=lora=4,batch=12"
    options = ("--config.steps=12", "--config.checkpoint.every=4", "--config.checkpoint.keep=9")
    options += ("--config.compute.dtype=float32", *FIXED)
    config = f"configs/finetune.py:{arg}"
    straight, stopped = tmp_path / "straight", tmp_path / "stopped"
    assert processes.run(f"--workdir={straight}", *options, config=config).returncode == 0
    slow = processes.slow_data(tmp_path / "slow", seconds=0.5)
    process = processes.start(f"--workdir={stopped}", *options, config=config, PYTHONPATH=slow)
    processes.wait_until(lambda: step_folder.steps(stopped), process)
    process.send_signal(number)
    output = process.communicate(timeout=120)[0]
    assert process.returncode == status, output
    assert step_folder.steps(stopped)[-1] < 12
    again = processes.run(f"--workdir={stopped}", *options, config=config, devices=1)
    assert again.returncode == 0, again.stderr
    a, b = (model_folder.flatten(step_folder.read_params(x, 12)) for x in (straight, stopped))
    assert a and a.keys() == b.keys()
    for name in a:
        np.testing.assert_array_equal(a[name], b[name], err_msg=name)
    assert (straight / "test.json").read_text() == (stopped / "test.json").read_text()


@pytest.mark.integration
def test_two_processes_learn_as_one(base, tmp_path):
    path = table(tmp_path / "t.csv", "residue_classification")
    arg = f"model={base},csv={path},task=residue_classification,method=lora=4,epochs=3,lr=0.02"
    options = ("--config.compute.dtype=float32", "--config.batch.rows=2")
    config = f"configs/finetune.py:{arg}"
    one, two = tmp_path / "one", tmp_path / "two"
    assert processes.run(f"--workdir={one}", *options, config=config).returncode == 0
    launcher = [str(processes.ROOT / "launch" / "local.sh"), "-n", "2"]
    done = subprocess.run(
        [*launcher, *processes.command(f"--workdir={two}", *options, config=config)],
        env=processes.environment(),
        cwd=processes.ROOT,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr
    for a, b in zip(lines(one, "validation"), lines(two, "validation"), strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-5)
    results = [json.loads((run / "test.json").read_text()) for run in (one, two)]
    assert results[0]["step"] == results[1]["step"]
    assert results[0]["metrics"] == pytest.approx(results[1]["metrics"], rel=1e-5)
