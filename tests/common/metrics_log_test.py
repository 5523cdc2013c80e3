"""Metrics on a disk: each once, whole, and none lost to a disk that was full for a while."""

import json
import os
import subprocess

import pytest
from etils import epath

from esm1nv_jax.common import metrics_log
from esm1nv_jax.common.errors import UserError
from esm1nv_jax.common.metrics_log import MetricsWriter


@pytest.fixture
def small_disk(tmp_path):
    call = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(tmp_path)]
    if os.getuid() or subprocess.run(call, capture_output=True).returncode:
        pytest.skip("a small disk can only be mounted by root")
    yield epath.Path(tmp_path)
    subprocess.run(["umount", "-l", str(tmp_path)], check=True)


def steps(folder):
    return [json.loads(line)["step"] for line in (folder / "metrics.jsonl").open()]


def fill(folder):
    with pytest.raises(OSError), open(folder / "ballast", "wb", buffering=0) as file:
        while True:
            file.write(b"x" * 4096)


def test_lines_wait_until_a_full_disk_has_room(small_disk, capsys):
    with MetricsWriter(small_disk, 0, True) as writer:
        writer.write(1, "train", {"loss": 3.0})
        fill(small_disk)
        for step in range(2, 200):
            writer.write(step, "train", {"loss": 3.0})
        assert (small_disk / "metrics.jsonl").read_text().count("\n") < 199
        (small_disk / "ballast").unlink()
        writer.write(200, "train", {"loss": 3.0})
        assert steps(small_disk) == list(range(1, 201))
    assert capsys.readouterr().err.count("metrics wait in memory") == 1


@pytest.mark.parametrize("room", [True, False])
def test_the_end_of_a_run_leaves_whole_lines(small_disk, capsys, room):
    """Also of one that failed: its last metrics follow if there is room, else none is cut."""
    with pytest.raises(RuntimeError), MetricsWriter(small_disk, 0, True) as writer:
        writer.write(1, "train", {"loss": 3.0})  # the rest of its page is room for some more
        fill(small_disk)
        for step in range(2, 200):
            writer.write(step, "train", {"loss": 3.0})
        text = (small_disk / "metrics.jsonl").read_text()
        assert text.count("\n") > 1 and not text.endswith("\n")
        if room:
            (small_disk / "ballast").unlink()
        raise RuntimeError
    found = steps(small_disk)
    assert found == list(range(1, len(found) + 1)) and (len(found) == 199) == room
    assert ("found no room" in capsys.readouterr().err) != room


def test_lines_after_the_checkpoint_are_dropped(tmp_path):
    folder = epath.Path(tmp_path)
    for start in (0, 3):
        with MetricsWriter(folder, start, True) as writer:
            for step in range(start + 1, start + 6):
                writer.write(step, "train", {"loss": float(step)})
    assert steps(folder) == list(range(1, 9))


def test_lines_are_dropped_by_rename(tmp_path):
    """A start that is killed meanwhile leaves all that were there."""
    folder = epath.Path(tmp_path)
    text = "".join(f'{{"step": {step}, "kind": "train"}}\n' for step in range(1, 4))
    (folder / "metrics.jsonl").write_text(text)
    with (folder / "metrics.jsonl").open() as before, MetricsWriter(folder, 2, True):
        assert steps(folder) == [1, 2]
        assert before.read() == text


def test_a_last_line_without_its_end_takes_no_other_with_it(tmp_path):
    folder = epath.Path(tmp_path)
    (folder / "metrics.jsonl").write_text('{"step": 1, "kind": "train"}')  # as a full disk cut it
    with MetricsWriter(folder, 1, True) as writer:
        writer.write(2, "train", {"loss": 3.0})
    assert steps(folder) == [1, 2]


def test_damaged_lines_are_left_out(tmp_path):
    whole = b'{"step": 1, "kind": "train"}\n'
    damaged = b'\xff\n{"step": null, "kind": "train"}\n{"step": "a", "kind": "train"}\n7\n{"ste\n'
    (tmp_path / "metrics.jsonl").write_bytes(whole + damaged)
    assert metrics_log.read(tmp_path) == [{"step": 1, "kind": "train"}]
    (tmp_path / "metrics.jsonl").write_bytes(whole + damaged[2:])
    with MetricsWriter(epath.Path(tmp_path), 5, True):
        assert (tmp_path / "metrics.jsonl").read_bytes() == whole


@pytest.mark.parametrize("make", [os.mkdir, lambda path: path.write_bytes(b"\xff\xfe")])
def test_what_is_no_file_of_metrics_is_one_line(tmp_path, make):
    make(tmp_path / "metrics.jsonl")
    with pytest.raises(UserError, match=r"metrics\.jsonl cannot be written: "):
        MetricsWriter(epath.Path(tmp_path), 0, True)


def test_tensorboard_reads_the_events(tmp_path):
    from tensorboardX.proto.event_pb2 import Event

    with MetricsWriter(epath.Path(tmp_path), 0, True) as writer:
        writer.write(7, "train", {"loss": 2.5})
    (path,) = (tmp_path / "tensorboard").iterdir()
    data, found = path.read_bytes(), []
    while data:
        size = int.from_bytes(data[:8], "little")
        found.append(Event.FromString(data[12 : 12 + size]))
        data = data[16 + size :]
    (value,) = found[-1].summary.value
    assert (found[-1].step, value.tag, value.simple_value) == (7, "train/loss", 2.5)
