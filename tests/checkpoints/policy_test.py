"""When a run saves, and which checkpoint it keeps apart."""

import concurrent.futures
import os
import time

import numpy as np
import pytest

from esm1nv_jax.checkpoints import manager, step_folder
from esm1nv_jax.checkpoints.manager import RunCheckpoints
from esm1nv_jax.common.errors import UserError
from tests.checkpoints.policies import checkpoint_config

STATE = ({"x": np.ones(3, np.float32)}, {"step": np.int32(1)}, {"row": 1}, {"config": {}})


def checkpoints_of(run, strict=False, **changes):
    return RunCheckpoints(run, checkpoint_config(**{"every": 100, "keep": 2} | changes), strict)


def test_every_so_many_steps_or_minutes(tmp_path, monkeypatch):
    now = time.monotonic()
    monkeypatch.setattr(time, "monotonic", lambda: now)
    by_steps, by_clock = checkpoints_of(tmp_path), checkpoints_of(tmp_path, minutes=10)
    assert [n for n in range(1, 301) if by_steps.should_save(n)] == [100, 200, 300]
    now += 599
    assert not by_clock.should_save(7)
    now += 2
    assert by_clock.should_save(7) and not by_steps.should_save(7)
    by_clock.save(7, *STATE)
    assert not by_clock.should_save(8)  # the clock starts anew
    by_clock.wait()


def test_a_step_that_was_cut_short_is_saved_again(tmp_path):
    """Orbax asks for no step that is not later than all it knows."""
    first = checkpoints_of(tmp_path)
    first.save(100, *STATE)
    first.save(200, *STATE)
    first.wait()
    (tmp_path / "checkpoints" / "200" / step_folder.CHECKSUMS).unlink()
    second = checkpoints_of(tmp_path)
    assert second.latest_valid_step() == 100
    assert second.should_save(200)


def test_the_best_is_kept_apart_and_known_after_a_restart(tmp_path):
    first = checkpoints_of(tmp_path)
    for step, loss in ((1, 3.0), (2, 2.5), (3, 2.7)):
        first.save_if_best(loss, step, *STATE)
        first.save(step, *STATE)
    first.wait()
    assert step_folder.steps(tmp_path, step_folder.BEST) == [2]
    assert step_folder.steps(tmp_path) == [2, 3]
    second = checkpoints_of(tmp_path)
    second.save_if_best(2.6, 4, *STATE)
    second.save_if_best(float("nan"), 5, *STATE)
    second.wait()
    assert step_folder.steps(tmp_path, step_folder.BEST) == [2]
    second.save_if_best(2.4, 6, *STATE)
    second.wait()
    assert step_folder.steps(tmp_path, step_folder.BEST) == [6]
    found = step_folder.read_metadata(tmp_path, 6, step_folder.BEST)
    assert found == {"config": {}, "loss_mask": 2.4}


def test_a_checkpoint_is_there_only_once_the_best_of_its_step_is(tmp_path, monkeypatch):
    """A run that is killed between the two, and resumes, does not validate that step again."""
    write, order = step_folder.write_checksums, []

    def slowly_the_best(path):
        time.sleep(0.5 if path.parent.name == step_folder.BEST else 0)
        write(path)
        order.append(path.parent.name)

    monkeypatch.setattr(step_folder, "write_checksums", slowly_the_best)
    saves = checkpoints_of(tmp_path)
    saves.save_if_best(2.5, 100, *STATE)
    saves.save(100, *STATE)
    saves.wait()
    assert order == [step_folder.BEST, step_folder.FOLDER]


def test_the_highest_is_the_best_after_a_restart_too(tmp_path):
    def highest():
        return RunCheckpoints(tmp_path, checkpoint_config(), metric="mcc", maximize=True)

    first = highest()
    for step, mcc in ((1, 0.6), (2, 0.8)):
        first.save_if_best(mcc, step, *STATE)
    first.save(2, *STATE)
    first.wait()
    second = highest()
    for step, mcc in ((3, 0.7), (4, 0.1)):
        second.save_if_best(mcc, step, *STATE)
    second.wait()
    assert step_folder.steps(tmp_path, step_folder.BEST) == [2] == [second.best_step]


def test_the_best_of_a_start_that_left_no_checkpoint_does_not_count(tmp_path, capsys):
    """The run begins anew, and data or weights may be others by now."""
    first = checkpoints_of(tmp_path)
    first.save_if_best(0.5, 100, *STATE)
    first.wait()
    second = checkpoints_of(tmp_path)
    assert "best/100 of" in capsys.readouterr().err and second.best_step == 0
    second.save_if_best(0.7, 60, *STATE)
    second.wait()
    assert sorted(os.listdir(tmp_path / "best")) == ["100.earlier", "60"]


def test_a_damaged_best_is_told_and_set_aside(tmp_path, capsys):
    first = checkpoints_of(tmp_path)
    first.save_if_best(2.5, 3, *STATE)
    first.save(3, *STATE)
    first.wait()
    os.truncate(tmp_path / "best" / "3" / "metadata" / "metadata.json", 3)
    with pytest.raises(UserError, match=r"best/3 .*metadata/metadata.json has 3 bytes"):
        checkpoints_of(tmp_path, strict=True)
    second = checkpoints_of(tmp_path)
    assert "best/3" in capsys.readouterr().err
    assert step_folder.steps(tmp_path, step_folder.BEST) == []
    second.save_if_best(2.7, 4, *STATE)
    second.wait()
    assert step_folder.steps(tmp_path, step_folder.BEST) == [4]


@pytest.mark.parametrize("policy", ["continue", "stop"])
def test_a_save_that_failed_is_told_and_ends_the_run_only_if_asked(tmp_path, capsys, policy):
    saves = checkpoints_of(tmp_path, on_error=policy)
    saves.save(1, *STATE)
    saves.wait()
    (tmp_path / "checkpoints" / "2").write_text("in the way")
    saves.save(2, *STATE)
    concurrent.futures.wait(saves._writes.values())
    if policy == "stop":
        with pytest.raises(manager.SaveError, match="the newest whole one is 1; mend that"):
            saves.check()
    else:
        saves.check()
        assert "training goes on" in capsys.readouterr().err
    saves.save(3, *STATE)  # the next one is tried as if nothing had been
    saves.wait()
    assert step_folder.steps(tmp_path) == [1, 3]


def test_the_end_of_a_run_tells_every_save_that_failed_once_all_have_ended(tmp_path, monkeypatch):
    saves = checkpoints_of(tmp_path)
    (tmp_path / "best").write_text("in the way")
    write, ended = saves._write, []

    def slowly(folder, *args):
        time.sleep(0.5 if folder == step_folder.FOLDER else 0)
        write(folder, *args)
        ended.append(folder)

    monkeypatch.setattr(saves, "_write", slowly)
    saves.save_if_best(2.5, 100, *STATE)
    saves.save(100, *STATE)
    with pytest.raises(
        manager.SaveError, match=r"to .*best: .*; the newest whole one is 100; mend"
    ):
        saves.wait()
    assert ended == [step_folder.FOLDER]
    (tmp_path / "checkpoints" / "200").write_text("in the way")
    saves.save_if_best(2.0, 200, *STATE)
    saves.save(200, *STATE)
    with pytest.raises(manager.SaveError, match=r"to .*best: .*to .*checkpoints: .* one is 100; "):
        saves.wait()


def test_a_workdir_that_was_deleted_is_not_made_anew(tmp_path, capsys):
    """What is in it would have no config, and another run could take its lock."""
    run = tmp_path / "run"
    run.mkdir()
    saves = checkpoints_of(run)
    run.rmdir()
    saves.save(100, *STATE)
    with pytest.raises(manager.SaveError, match="No such file or directory; there is none yet"):
        saves.wait()
    assert not run.exists()


def test_a_best_that_could_not_be_written_does_not_count_as_written(tmp_path):
    saves = checkpoints_of(tmp_path, on_error="continue")
    saves.save_if_best(2.5, 100, *STATE)
    saves.wait()
    (tmp_path / "best" / "200").write_text("in the way")
    for step, loss in ((200, 2.0), (300, 2.1), (400, 2.2)):
        saves.save_if_best(loss, step, *STATE)
    saves.wait()
    assert step_folder.steps(tmp_path, step_folder.BEST) == [300]
    assert saves.best_step == 200  # from which patience counts, in every process


def test_all_processes_know_the_best_after_a_restart(tmp_path, monkeypatch):
    """Process 0 alone reads it."""
    first = checkpoints_of(tmp_path)
    first.save_if_best(0.5, 30, *STATE)
    first.save(30, *STATE)
    first.wait()
    processes = []
    for index in (0, 1):
        monkeypatch.setattr("jax.process_index", lambda index=index: index)
        processes.append(checkpoints_of(tmp_path))
    sent = []
    processes[0].broadcast_best(lambda make: sent.append(make()) or sent[0])
    processes[1].broadcast_best(lambda make: sent[0])
    for step, loss, best in ((60, 0.6, 30), (90, 0.4, 90)):
        for checkpoints in processes:
            checkpoints.save_if_best(loss, step, *STATE)
        assert [checkpoints.best_step for checkpoints in processes] == [best, best]


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("on_error", "pray", "there are continue, stop"),
        ("every", 0, "checkpoint.every=0 must be at least 1"),
        ("keep", 0, "checkpoint.keep=0 must be at least 1"),
        ("minutes", -1, "checkpoint.minutes=-1 must be at least 0"),
    ],
)
def test_an_unknown_policy(field, value, message):
    with pytest.raises(UserError, match=message):
        checkpoint_config(**{field: value})
