"""Checkpoints: all or nothing, verified, and retired by what is whole."""

import json
import os
import subprocess

import jax
import numpy as np
import pytest

from esm1nv_jax.checkpoints import manager
from esm1nv_jax.common.errors import UserError

PARAMS = {"blocks": {"0": {"kernel": np.arange(600, dtype=np.float32).reshape(20, 30)}}}
OPTIMIZER = {"step": np.int32(7), "mu": np.full(5, -0.0, np.float32)}


def save(run, *steps, keep=100, keep_every=0, folder=manager.FOLDER):
    saver = manager.Checkpoints(run, keep, keep_every, folder)
    for step in steps:
        saver.save(step, PARAMS, OPTIMIZER, {"row": step}, {"config": {"seed": 1}})
    saver.close()
    return saver


def restore(saver, step):
    layout = jax.sharding.SingleDeviceSharding(jax.devices()[3])
    return saver.restore(step, *(manager.abstract(tree, layout) for tree in (PARAMS, OPTIMIZER)))


def data_file(run, step):
    """The largest file of the parameters."""
    files = [p for p in (run / "checkpoints" / str(step) / "params").rglob("*") if p.is_file()]
    return max(files, key=lambda path: path.stat().st_size)


def test_what_is_saved_comes_back_bit_for_bit_where_it_is_wanted(tmp_path):
    saver = save(tmp_path, 3)
    params, optimizer, place = restore(saver, 3)
    kernel = params["blocks"]["0"]["kernel"]
    assert kernel.devices() == {jax.devices()[3]}
    assert np.asarray(kernel).tobytes() == PARAMS["blocks"]["0"]["kernel"].tobytes()
    assert np.asarray(optimizer["mu"]).tobytes() == OPTIMIZER["mu"].tobytes()
    assert (int(optimizer["step"]), place) == (7, {"row": 3})
    read = manager.read_params(tmp_path, 3)
    np.testing.assert_array_equal(read["blocks"]["0"]["kernel"], PARAMS["blocks"]["0"]["kernel"])
    assert manager.read_config(tmp_path, 3) == {"config": {"seed": 1}}


def test_a_run_may_be_named_by_a_relative_path(tmp_path, monkeypatch):
    save(tmp_path / "run", 3)
    monkeypatch.chdir(tmp_path)
    read = manager.read_params("run", 3)
    np.testing.assert_array_equal(read["blocks"]["0"]["kernel"], PARAMS["blocks"]["0"]["kernel"])


def test_a_save_may_be_followed_by_donation(tmp_path):
    """What is written is a copy made before `save` returns, not a view of the device's buffer."""
    x = jax.numpy.arange(1 << 18, dtype="float32")
    update = jax.jit(lambda x: x * 0 - 1, donate_argnums=0)
    saver = manager.Checkpoints(tmp_path, keep=1)
    saver.save(1, {"x": x}, OPTIMIZER, {}, {})
    update(x).block_until_ready()
    saver.close()
    np.testing.assert_array_equal(
        manager.read_params(tmp_path, 1)["x"], np.arange(1 << 18, dtype=np.float32)
    )


def test_checksums_are_those_of_sha256sum(tmp_path):
    save(tmp_path, 1)
    folder = tmp_path / "checkpoints" / "1"
    sums = json.loads((folder / manager.CHECKSUMS).read_text())["sha256"]
    listed = subprocess.run(
        ["sha256sum", *sums], cwd=folder, capture_output=True, text=True, check=True
    ).stdout.split("\n")
    assert dict(reversed(line.split()) for line in listed if line) == {
        name: record["digest"] for name, record in sums.items()
    }
    assert manager.verify(tmp_path, 1) == []


def flip(file):
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


DAMAGE = {
    "other bytes": flip,
    "were written": lambda file: os.truncate(file, file.stat().st_size - 1),
    "is missing": lambda file: file.unlink(),
}


@pytest.mark.parametrize("words", DAMAGE)
def test_a_damaged_file_is_named_and_the_run_falls_back(tmp_path, words):
    save(tmp_path, 1, 2, 3)
    file = data_file(tmp_path, 3)
    DAMAGE[words](file)
    (wrong,) = manager.verify(tmp_path, 3)
    assert words in wrong and file.name in wrong
    heard = []
    assert manager.newest_good(tmp_path, strict=False, tell=heard.append) == 2
    assert len(heard) == 1 and words in heard[0] and "checkpoint 3" in heard[0]
    with pytest.raises(UserError, match="doctor"):
        manager.newest_good(tmp_path, strict=True, tell=heard.append)
    for step in (1, 2):
        DAMAGE[words](data_file(tmp_path, step))
    with pytest.raises(UserError, match="all 3 checkpoints"):
        manager.newest_good(tmp_path, strict=False, tell=heard.append)


def test_an_added_file_and_broken_checksums_are_damage(tmp_path):
    save(tmp_path, 1)
    folder = tmp_path / "checkpoints" / "1"
    (folder / "params" / "stray").write_text("x")
    assert manager.verify(tmp_path, 1) == ["params/stray does not belong there"]
    (folder / manager.CHECKSUMS).write_text("{")
    assert "cannot be read" in manager.verify(tmp_path, 1)[0]


def test_a_step_without_checksums_does_not_exist(tmp_path):
    save(tmp_path, 1, 2, 3)
    (tmp_path / "checkpoints" / "3" / manager.CHECKSUMS).unlink()
    (tmp_path / "checkpoints" / "4.orbax-checkpoint-tmp").mkdir()
    assert manager.steps(tmp_path) == [1, 2]
    assert manager.newest_good(tmp_path, strict=True, tell=print) == 2
    assert "never finished" in manager.verify(tmp_path, 3)[0]
    save(tmp_path, 3)  # may be saved again, and what was left over is gone
    assert manager.verify(tmp_path, 3) == []
    assert sorted(os.listdir(tmp_path / "checkpoints")) == ["1", "2", "3"]


def test_retention_counts_whole_steps_only(tmp_path):
    save(tmp_path, *range(1, 6), keep=2)
    assert manager.steps(tmp_path) == [4, 5]
    (tmp_path / "checkpoints" / "5" / manager.CHECKSUMS).unlink()
    save(tmp_path, 6, keep=2)
    assert manager.steps(tmp_path) == [4, 6]  # 5 never was, so 4 is the second newest


def test_every_mth_stays_and_the_best_lives_apart(tmp_path):
    save(tmp_path, 2, keep=1, folder=manager.BEST)
    save(tmp_path, *range(1, 8), keep=1, keep_every=3)
    assert manager.steps(tmp_path) == [3, 6, 7]
    assert manager.verify(tmp_path, 2, manager.BEST) == []


def test_a_failed_save_is_told_and_leaves_the_older_steps(tmp_path):
    """A file where the folder of the step should be: the plainest way to fail for any user."""
    saver = save(tmp_path, 1)
    (tmp_path / "checkpoints" / "2").write_text("in the way")
    saver.save(2, PARAMS, OPTIMIZER, {}, {})
    with pytest.raises(manager.SaveError, match="checkpoint 2 could not be written"):
        saver.wait()
    saver.wait()  # told once
    assert manager.verify(tmp_path, 1) == []
    assert manager.steps(tmp_path) == [1]
