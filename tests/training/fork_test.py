"""Runs that end by the clock, and runs that are forked from a step of another."""

import itertools
import types

import pytest

from esm1nv_jax.checkpoints import step_folder
from esm1nv_jax.training import monitor
from esm1nv_jax.training.optimizer import OptimizerConfig, schedule
from tests.cluster.runs import Run
from tests.data.preparing import esm1nv
from tests.training.processes import assert_same, lines, params


def train(train_here, run, *options):
    done = train_here(f"--workdir={run}", *options)
    assert done.returncode == 0, done.stderr
    return done.stderr


@pytest.mark.integration
def test_a_run_ends_by_time_as_by_steps_and_goes_on_bit_for_bit(tmp_path, train_here, monkeypatch):
    straight, run = tmp_path / "straight", tmp_path / "run"
    train(train_here, straight)
    ticks = itertools.count(step=10)  # every look at the clock takes ten seconds
    clock = types.SimpleNamespace(monotonic=lambda: next(ticks))
    monkeypatch.setattr(monitor, "time", clock)
    output = train(train_here, run, "--config.minutes=1")
    last = step_folder.steps(run)[-1]
    assert 1 < last < 12 and "--config.minutes=2" in output
    assert [lines(run, kind)[-1]["step"] for kind in ("train", "validation")] == [last, last]
    assert step_folder.read_metadata(run, last)["seconds"] >= 60
    train(train_here, run, "--config.minutes=1")
    assert step_folder.steps(run)[-1] == last
    train(train_here, run, "--config.minutes=1000")
    assert step_folder.steps(run)[-1] == 12
    assert_same(params(run, 12), params(straight, 12))


@pytest.mark.integration
def test_two_processes_end_by_time_after_the_same_step(tmp_path):
    limit = ("--config.minutes=0.02", "--config.steps=1000000", "--config.checkpoint.every=1000000")
    with Run(tmp_path / "run", 2, *limit) as run:
        assert run.wait() == 0, run.text
    assert "--config.minutes=0.04" in run.text
    last = lines(run.workdir, "validation")[-1]["step"]
    assert step_folder.steps(run.workdir) == ([last] if last else [])


@pytest.mark.integration
def test_a_fork_keeps_the_whole_state_under_a_new_schedule(tmp_path, train_here, monkeypatch):
    origin = tmp_path / "origin"
    monkeypatch.chdir(tmp_path)
    train(train_here, origin)
    before = sorted((str(p), p.stat().st_mtime_ns) for p in origin.rglob("*"))
    fork = "--config.fork_from=origin/checkpoints/8"
    output = train(train_here, tmp_path / "same", fork)
    assert "the data stream goes on there" in output
    assert_same(params(tmp_path / "same", 12), params(origin, 12))
    assert [x["step"] for x in lines(tmp_path / "same", "validation")] == [8, 12]

    cooled = tmp_path / "cooled"
    options = (fork, "--config.optimizer.horizon=1", "--config.optimizer.min_lr=0")
    train(train_here, cooled, *options, "--config.steps=10")
    whole = schedule(OptimizerConfig(4e-3, 0.0, warmup=2, constant=0, horizon=10))
    rates = [line["learning_rate"] for line in lines(cooled, "train")]
    assert rates == pytest.approx([float(whole(9))])
    resumed = train_here(f"--workdir={cooled}", *options, "--config.steps=12")
    assert resumed.returncode == 2 and "optimizer.horizon: 10 there, 12 here" in resumed.stderr
    assert f"--config.fork_from={cooled}" in resumed.stderr

    others = ("--config.seed=1", "--config.masking.recipe=shipped", "--config.steps=9")
    output = train(train_here, tmp_path / "seed", fork, *others)
    assert "the data stream begins anew" in output
    assert "shipped, 15% of residues (the original's rate: 10%)" in output
    proteins = "".join(
        f">p{i}\nMKTAYIAKQR{'ACDEFGHIKL'[: i % 10]}{i % 7 * 'V'}\n" for i in range(90)
    )
    (tmp_path / "p.fasta").write_text(proteins)
    prepare = ("--fasta", tmp_path / "p.fasta", "--out", tmp_path / "data", "--validation=10")
    status, text = esm1nv("prepare", *prepare, "--test=10")
    assert status == 0, text
    elsewhere = (fork, f"--config.data.path={tmp_path / 'data'}")
    output = train(train_here, tmp_path / "elsewhere", *elsewhere, "--config.steps=9")
    assert "the data stream begins anew" in output
    (tmp_path / "same" / "data.json").unlink()
    resumed = train_here(f"--workdir={tmp_path / 'same'}", *elsewhere, "--config.steps=13")
    assert resumed.returncode == 2 and "the training split is not the one" in resumed.stderr
    for field, there, here in (("model.width", 16, 32), ("optimizer.kind", "adamw", "muon")):
        option = f"--config.{field}={here}"
        other = train_here(f"--workdir={tmp_path / 'other'}", fork, option)
        assert other.returncode == 2 and f"{field}: {there!r} there, {here!r} here" in other.stderr
        assert not (tmp_path / "other").exists()
        again = train_here(f"--workdir={cooled}", option)
        assert again.returncode == 2 and "to go on from its state" not in again.stderr
    assert sorted((str(p), p.stat().st_mtime_ns) for p in origin.rglob("*")) == before
