"""A disk that is full or read-only while a checkpoint is written: a real one, half a megabyte."""

import os
import subprocess

import numpy as np
import pytest

from esm1nv_jax.checkpoints import manager


@pytest.fixture
def small_disk(tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    call = ["mount", "-t", "tmpfs", "-o", "size=600k", "tmpfs", str(disk)]
    if os.getuid() or subprocess.run(call, capture_output=True).returncode:
        pytest.skip("a small disk can only be mounted by root")
    yield disk
    subprocess.run(["umount", "-l", str(disk)], check=True)


def save(saver, step):
    noise = np.random.default_rng(step).normal(size=40_000).astype(np.float32)  # 160 kB
    saver.save(step, {"x": noise}, {"n": np.int32(step)}, {}, {})
    saver.wait()


@pytest.mark.parametrize("seen", [True, False])
def test_a_full_disk(small_disk, monkeypatch, seen):
    """Seen before a byte is written; and, as under a quota, only in the midst of it."""
    if not seen:
        monkeypatch.setattr(manager.Checkpoints, "_look_for_room", lambda *_: None)
    saver = manager.Checkpoints(small_disk, keep=100)
    with pytest.raises(manager.SaveError, match="No space left on device") as told:
        for step in range(1, 9):
            save(saver, step)
    assert ("needed" in str(told.value)) == seen
    assert "\n" not in str(told.value) and f"checkpoint {step} could not" in str(told.value)
    assert manager.steps(small_disk) == list(range(1, step))
    for whole in range(1, step):
        assert manager.verify(small_disk, whole) == []
    (small_disk / "checkpoints" / "1" / manager.CHECKSUMS).unlink()  # room, once it is cleaned
    save(saver, 9)
    assert manager.steps(small_disk)[-1] == 9 and manager.verify(small_disk, 9) == []


def test_a_read_only_disk(small_disk):
    saver = manager.Checkpoints(small_disk, keep=100)
    save(saver, 1)
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    with pytest.raises(manager.SaveError, match="Read-only file system"):
        save(saver, 2)
    assert manager.steps(small_disk) == [1] and manager.verify(small_disk, 1) == []
