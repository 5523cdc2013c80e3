"""When a run saves, and which checkpoint it keeps apart."""

import os
import time

import numpy as np
import pytest

from esm1nv_jax.checkpoints import manager
from esm1nv_jax.common.errors import UserError
from esm1nv_jax.training.checkpoint_policy import CheckpointConfig, Saving

POLICY = {"every": 100, "minutes": 0, "keep": 2, "keep_every": 0, "on_error": "continue"}
STATE = ({"x": np.ones(3, np.float32)}, {"step": np.int32(1)}, {"row": 1}, {"config": {}})


def saving(folder, **changes):
    return Saving(folder, CheckpointConfig(**(POLICY | changes)))


def test_every_so_many_updates_or_minutes(tmp_path, monkeypatch):
    now = time.monotonic()
    monkeypatch.setattr(time, "monotonic", lambda: now)
    by_steps, by_clock = saving(tmp_path), saving(tmp_path, minutes=10)
    assert [n for n in range(1, 301) if by_steps.due(n)] == [100, 200, 300]
    now += 599
    assert not by_clock.due(7)
    now += 2
    assert by_clock.due(7) and not by_steps.due(7)
    by_clock.save(7, *STATE)
    assert not by_clock.due(8)  # the clock starts anew
    by_clock.close()


def test_the_best_is_kept_apart_and_known_after_a_restart(tmp_path):
    first = saving(tmp_path)
    for step, loss in ((1, 3.0), (2, 2.5), (3, 2.7)):
        first.save_if_best(loss, step, *STATE)
        first.save(step, *STATE)
    first.close()
    assert manager.steps(tmp_path, manager.BEST) == [2]
    assert manager.steps(tmp_path) == [2, 3]
    second = saving(tmp_path)
    second.save_if_best(2.6, 4, *STATE)
    second.save_if_best(float("nan"), 5, *STATE)
    second.close()
    assert manager.steps(tmp_path, manager.BEST) == [2]
    second.save_if_best(2.4, 6, *STATE)
    second.close()
    assert manager.steps(tmp_path, manager.BEST) == [6]
    found = manager.read_config(tmp_path, 6, manager.BEST)
    assert found == {"config": {}, "loss_mask": 2.4}


def test_a_damaged_best_is_told_and_set_aside(tmp_path, capsys):
    first = saving(tmp_path)
    first.save_if_best(2.5, 3, *STATE)
    first.close()
    os.truncate(tmp_path / "best" / "3" / "config" / "metadata", 3)
    with pytest.raises(UserError, match=r"best/3 .*config/metadata has 3 bytes"):
        Saving(tmp_path, CheckpointConfig(**POLICY), strict=True)
    second = saving(tmp_path)
    assert "best/3" in capsys.readouterr().err
    assert manager.steps(tmp_path, manager.BEST) == []
    second.save_if_best(2.7, 4, *STATE)
    second.close()
    assert manager.steps(tmp_path, manager.BEST) == [4]


@pytest.mark.parametrize("policy", ["continue", "stop"])
def test_a_save_that_failed_is_told_and_ends_the_run_only_if_asked(tmp_path, capsys, policy):
    saves = saving(tmp_path, on_error=policy)
    saves.save(1, *STATE)
    saves.close()
    (tmp_path / "checkpoints" / "2").write_text("in the way")
    saves.save(2, *STATE)
    saves.checkpoints._thread.join()
    if policy == "stop":
        with pytest.raises(manager.SaveError, match="the newest whole one is 1; make room"):
            saves.check()
    else:
        saves.check()
        assert "training goes on" in capsys.readouterr().err
    saves.save(3, *STATE)  # the next one is tried as if nothing had been
    saves.close()
    assert manager.steps(tmp_path) == [1, 3]


def test_an_unknown_policy(tmp_path):
    with pytest.raises(UserError, match="there are continue, stop"):
        saving(tmp_path, on_error="pray")
