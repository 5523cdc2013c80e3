"""Figures on a disk: each once, whole, and none lost to a disk that was full for a while."""

import json
import os
import subprocess

import pytest
from etils import epath

from esm1nv_jax.training.curves import Writer


@pytest.fixture
def small_disk(tmp_path):
    call = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(tmp_path)]
    if os.getuid() or subprocess.run(call, capture_output=True).returncode:
        pytest.skip("a small disk can only be mounted by root")
    yield epath.Path(tmp_path)
    subprocess.run(["umount", "-l", str(tmp_path)], check=True)


def steps(folder):
    return [json.loads(line)["step"] for line in (folder / "metrics.jsonl").open()]


def test_lines_wait_until_a_full_disk_has_room(small_disk, capsys):
    writer = Writer(small_disk, 0, True)
    writer.write(1, "train", {"loss": 3.0})
    ballast = small_disk / "ballast"
    with pytest.raises(OSError), open(ballast, "wb", buffering=0) as file:
        while True:
            file.write(b"x" * 4096)
    for step in range(2, 200):
        writer.write(step, "train", {"loss": 3.0})
    assert (small_disk / "metrics.jsonl").read_text().count("\n") < 199
    ballast.unlink()
    writer.write(200, "train", {"loss": 3.0})
    assert steps(small_disk) == list(range(1, 201))
    writer.close()
    assert capsys.readouterr().err.count("figures wait in memory") == 1


def test_lines_after_the_checkpoint_are_dropped(tmp_path):
    folder = epath.Path(tmp_path)
    for start in (0, 3):
        writer = Writer(folder, start, True)
        for step in range(start + 1, start + 6):
            writer.write(step, "train", {"loss": float(step)})
        writer.close()
    assert steps(folder) == list(range(1, 9))


def test_tensorboard_reads_the_events(tmp_path):
    from tensorboardX.proto.event_pb2 import Event

    writer = Writer(epath.Path(tmp_path), 0, True)
    writer.write(7, "train", {"loss": 2.5})
    writer.close()
    (path,) = (tmp_path / "tensorboard").iterdir()
    data, found = path.read_bytes(), []
    while data:
        size = int.from_bytes(data[:8], "little")
        found.append(Event.FromString(data[12 : 12 + size]))
        data = data[16 + size :]
    (value,) = found[-1].summary.value
    assert (found[-1].step, value.tag, value.simple_value) == (7, "train/loss", 2.5)
