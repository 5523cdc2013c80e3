"""Whole runs in processes of their own: learning, interruption, going on, refusing."""

import json
import os
import shutil
import signal
import subprocess

import jax
import numpy as np
import pytest

from esm1nv_jax.checkpoints import model_folder, step_folder
from esm1nv_jax.checkpoints.manager import RunCheckpoints
from esm1nv_jax.common import config_file
from esm1nv_jax.data import tokenizer
from esm1nv_jax.data.packing import stream_config
from esm1nv_jax.data.source import MemorySource
from esm1nv_jax.training import summary
from esm1nv_jax.training.run_config import RunConfig
from tests.training import processes
from tests.training.processes import assert_same, lines, params


def test_the_start_names_a_rate_of_attention_dropout_that_is_rounded():
    assert "attention_dropout=0.1 is 26/256 = 0.1016" in summary.describe_attention_rate(0.1)
    assert summary.describe_attention_rate(0.0) == summary.describe_attention_rate(0.25) == ""


def test_baselines_are_asked_what_the_model_is_asked():
    """Not for a letter that its vocabulary lacks."""
    config = config_file.load(processes.TINY).unlock()
    config.model.vocabulary = " ".join(x for x in tokenizer.TOKENS if x != "X")
    config = RunConfig.from_config_dict(config)
    train, validation = (MemorySource([("p", letters)]) for letters in (b"A" * 75, b"AX" * 30))
    stream = stream_config(config, rows=1)
    found = summary.baseline_perplexities(config, stream, train, validation)
    assert found["unigram"] == pytest.approx(100 / 76)  # each letter is counted once more


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    """Twelve steps without interruption."""
    run = tmp_path_factory.mktemp("straight") / "run"
    process = processes.run(f"--workdir={run}")
    assert process.returncode == 0, process.stderr
    return run, process


def test_a_run_leaves_what_it_promises(straight):
    run, process = straight
    assert step_folder.steps(run) == [4, 8, 12]
    assert json.loads((run / "config.json").read_text())["model"]["width"] == 16
    assert list((run / "tensorboard").glob("events.out.tfevents.*"))
    assert [line["step"] for line in lines(run, "train")] == [2, 4, 6, 8, 10, 12]
    validated = lines(run, "validation")
    assert [line["step"] for line in validated] == [0, 6, 12]
    assert validated[0]["perplexity_mask"] == pytest.approx(30, rel=0.15)
    assert validated[-1]["perplexity_mask"] < validated[0]["perplexity_mask"]
    for name in (
        "perplexity",
        "perplexity_mask",
        "accuracy_mask",
        "gradient_norm",
        "update_norm",
        "parameter_norm",
        "learning_rate",
        "tokens_per_second",
        "sequences_per_step",
        "padding_share",
    ):
        assert np.isfinite(lines(run, "train")[0][name]), name
    for words in (
        "untrained model",
        "unigram",
        "composition",
        "this model, step 12",
        "export     model.ffn_activation='gelu_tanh' cannot be converted exactly",
        "train with the config's argument hf",
        "metrics.jsonl",
        "--config.steps=24",
        "tokens/s",
    ):
        assert words in process.stderr, words


@pytest.mark.parametrize(
    ("number", "status"),
    [
        pytest.param(signal.SIGTERM, 75, marks=pytest.mark.integration),
        pytest.param(signal.SIGINT, 130, marks=pytest.mark.integration),
        pytest.param(signal.SIGHUP, 75, marks=pytest.mark.integration),  # a lost terminal
        pytest.param(signal.SIGKILL, -9, marks=pytest.mark.integration),
    ],
)
def test_interrupted_and_gone_on_equals_straight(tmp_path, straight, number, status):
    if signal.getsignal(number) == signal.SIG_IGN:
        pytest.skip("the tests run under nohup")
    run = tmp_path / "run"
    path, release = processes.held_data(tmp_path / "held", after=10)
    process = processes.start(f"--workdir={run}", PYTHONPATH=path)
    processes.wait_until(lambda: step_folder.steps(run), process)
    process.send_signal(number)
    release.touch()
    output = process.communicate(timeout=120)[0]
    assert process.returncode == status, output
    reached = step_folder.steps(run)[-1]
    assert 4 <= reached < 12, f"too late to prove anything: {reached}"
    if number != signal.SIGKILL:
        assert f"saved step {reached}" in output
    again = processes.run(f"--workdir={run}")
    assert again.returncode == 0, again.stderr
    assert f"from step {reached} of 12" in again.stderr
    assert_same(params(run, 12), params(straight[0], 12))
    figures = ("step", "kind", "loss", "perplexity_mask", "gradient_norm")
    expected = [[line.get(f) for f in figures] for line in lines(straight[0], "validation")]
    assert [[line.get(f) for f in figures] for line in lines(run, "validation")] == expected
    steps = [line["step"] for line in lines(run, "train")]
    assert steps == sorted(set(steps)) and steps[-1] == 12


@pytest.mark.integration
def test_a_sigterm_does_not_cut_the_last_save(tmp_path, train_here, monkeypatch):
    wait, unhandled = RunCheckpoints.wait, []

    def wait_after_a_signal(checkpoints):
        os.kill(os.getpid(), signal.SIGTERM)
        wait(checkpoints)

    monkeypatch.setattr(RunCheckpoints, "wait", wait_after_a_signal)
    before = signal.signal(signal.SIGTERM, lambda *_: unhandled.append("it would end the process"))
    try:
        assert train_here(f"--workdir={tmp_path}", "--config.steps=4").returncode == 0
    finally:
        signal.signal(signal.SIGTERM, before)
    assert not unhandled and step_folder.steps(tmp_path) == [4]


@pytest.mark.integration
def test_a_run_that_died_before_its_first_checkpoint_begins_anew(tmp_path):
    run = tmp_path / "run"
    path, _ = processes.held_data(tmp_path / "held", after=2)
    process = processes.start(f"--workdir={run}", PYTHONPATH=path)
    metrics = run / "metrics.jsonl"
    processes.wait_until(lambda: metrics.exists() and metrics.stat().st_size, process)
    process.kill()
    process.communicate(timeout=120)
    assert not step_folder.steps(run) and lines(run, "validation")
    assert processes.run(f"--workdir={run}").returncode == 0
    assert [line["step"] for line in lines(run, "validation")] == [0, 6, 12]


@pytest.mark.integration
def test_a_console_whose_reader_left_does_not_end_a_run(tmp_path, straight):
    run = tmp_path / "run"
    process = subprocess.Popen(
        processes.command(f"--workdir={run}"),
        env=processes.environment(),
        cwd=processes.ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    process.stderr.close()
    process.stdout.close()
    assert process.wait(300) == 0
    assert_same(params(run, 12), params(straight[0], 12))


@pytest.mark.integration
def test_steps_may_be_extended_and_other_fields_not(tmp_path, straight):
    run = tmp_path / "run"
    assert processes.run(f"--workdir={run}", "--config.steps=4").returncode == 0
    longer = processes.run(f"--workdir={run}", "--config.data.workers=2")
    assert longer.returncode == 0, longer.stderr
    assert_same(params(run, 12), params(straight[0], 12))
    other = processes.run(
        f"--workdir={run}", "--config.optimizer.peak_lr=0.01", "--config.model.heads=4"
    )
    assert other.returncode == 2
    assert "model.heads: 2 there, 4 here" in other.stderr
    assert "optimizer.peak_lr: 0.004 there, 0.01 here" in other.stderr
    assert step_folder.steps(run)[-1] == 12


@pytest.mark.integration
def test_starting_from_another_model(tmp_path, straight):
    run = tmp_path / "run"
    origin = f"--config.init_from={straight[0]}"
    process = processes.run(f"--workdir={run}", origin, "--config.steps=2", "--config.seed=5")
    assert process.returncode == 0, process.stderr
    assert "before this run" in process.stderr and "untrained" not in process.stderr
    start = lines(run, "validation")[0]
    assert start["step"] == 0
    # Masks depend on the seed, weights do not: better than any untrained model.
    assert start["perplexity_mask"] < 0.95 * lines(straight[0], "validation")[0]["perplexity_mask"]
    assert lines(run, "train")[0]["learning_rate"] == pytest.approx(0.004 / 2)
    # Its own checkpoints are enough to go on.
    away = f"--config.init_from={tmp_path / 'origin'}"
    shutil.copytree(straight[0], tmp_path / "origin")
    begun = (f"--workdir={tmp_path / 'c'}", away)
    assert processes.run(*begun, "--config.steps=2").returncode == 0
    shutil.rmtree(tmp_path / "origin")
    process = processes.run(*begun, "--config.steps=3")
    assert process.returncode == 0, process.stderr
    wrong = processes.run(f"--workdir={tmp_path / 'b'}", origin, "--config.model.width=32")
    assert wrong.returncode == 2 and "needs (" in wrong.stderr


@pytest.mark.integration
def test_a_live_run_is_not_disturbed(tmp_path):
    run = tmp_path / "run"
    first = processes.start(f"--workdir={run}", "--config.steps=100000")
    processes.wait_until(lambda: step_folder.steps(run), first)
    second = processes.run(f"--workdir={run}", "--config.steps=100000")
    first.kill()
    first.communicate()
    assert second.returncode == 2
    assert f"in use by a live run (process {first.pid}" in second.stderr


@pytest.mark.integration
def test_a_loss_that_is_not_finite_stops_with_evidence(tmp_path, straight):
    weights = model_folder.read(str(straight[0]))
    block = weights.params["blocks"]["0"]["qkv"]
    block["bias"] = np.full_like(block["bias"], np.inf)
    model_folder.write(str(tmp_path / "broken"), weights)
    run = tmp_path / "run"
    process = processes.run(f"--workdir={run}", f"--config.init_from={tmp_path / 'broken'}")
    assert process.returncode == 1, process.stderr
    assert "step 1 is not finite" in process.stderr
    assert "none saved yet" in process.stderr
    with np.load(run / "nonfinite" / "1" / "batch_0.npz") as batch:
        assert batch["tokens"].shape == (8, 64)
        examples = set(np.unique(batch["example_ids"])) - {-1}
    saved = json.loads((run / "nonfinite" / "1" / "examples_0.json").read_text())
    assert examples == set(saved)


@pytest.mark.integration
def test_a_profile_of_some_steps(tmp_path, straight):
    run = tmp_path / "run"
    done = processes.run(f"--workdir={run}", "--config.profile=3-4")
    assert done.returncode == 0 and "profile    of steps 3 to 4" in done.stderr
    (path,) = (run / "profile").rglob("*.xplane.pb")
    planes = jax.profiler.ProfileData.from_file(str(path)).planes
    events = (dict(e.stats) for plane in planes for line in plane.lines for e in line.events)
    assert len({e["run_id"] for e in events if e.get("hlo_module") == "jit_train_step"}) == 2
    assert_same(params(run, 12), params(straight[0], 12))
