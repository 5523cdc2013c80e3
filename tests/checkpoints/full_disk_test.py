"""A disk that is full or read-only while a checkpoint is written: a real one, half a megabyte."""

import os
import subprocess

import numpy as np
import pytest

from esm1nv_jax.checkpoints import manager, step_folder
from esm1nv_jax.checkpoints.manager import RunCheckpoints
from tests.checkpoints.policies import checkpoint_config


@pytest.fixture
def small_disk(tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    call = ["mount", "-t", "tmpfs", "-o", "size=600k", "tmpfs", str(disk)]
    if os.getuid() or subprocess.run(call, capture_output=True).returncode:
        pytest.skip("a small disk can only be mounted by root")
    yield disk
    subprocess.run(["umount", "-l", str(disk)], check=True)


def save(checkpoints, step):
    noise = np.random.default_rng(step).normal(size=40_000).astype(np.float32)  # 160 kB
    checkpoints.save(step, {"x": noise}, {"n": np.int32(step)}, {}, {})
    checkpoints.wait()


@pytest.mark.parametrize("seen", [True, False])
def test_a_full_disk(small_disk, monkeypatch, seen):
    """Seen before a byte is written; and, as under a quota, only in the midst of it."""
    if not seen:
        monkeypatch.setattr(manager, "_check_free_space", lambda *_: None)
    checkpoints = RunCheckpoints(small_disk, checkpoint_config())
    with pytest.raises(manager.SaveError, match="No space left on device") as told:
        for step in range(1, 9):
            save(checkpoints, step)
    assert ("needed" in str(told.value)) == seen
    assert "\n" not in str(told.value) and f"checkpoint {step} could not" in str(told.value)
    assert step_folder.steps(small_disk) == list(range(1, step))
    for whole in range(1, step):
        assert step_folder.verify(small_disk, whole) == []
    (small_disk / "checkpoints" / "1" / step_folder.CHECKSUMS).unlink()  # room, once it is cleaned
    save(checkpoints, 9)
    assert step_folder.steps(small_disk)[-1] == 9 and step_folder.verify(small_disk, 9) == []


def test_a_read_only_disk(small_disk):
    checkpoints = RunCheckpoints(small_disk, checkpoint_config())
    save(checkpoints, 1)
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    with pytest.raises(manager.SaveError, match="Read-only file system"):
        save(checkpoints, 2)
    assert step_folder.steps(small_disk) == [1] and step_folder.verify(small_disk, 1) == []
