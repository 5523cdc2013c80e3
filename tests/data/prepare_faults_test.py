"""Preparation on machines that fail: killed, out of space, out of memory, without locks."""

import os
import signal
import subprocess
import sys
import time

import pytest

from esm1nv_jax.common.errors import EXIT_USER, UserError
from esm1nv_jax.data import manifest, prepare
from esm1nv_jax.data.prepare import Preparation
from esm1nv_jax.data.source import open_split
from tests.data.made_up import fasta, made_up
from tests.data.preparing import esm1nv, one_error

pytestmark = pytest.mark.usefixtures("small_chunks")


def test_the_folder_may_be_a_link_but_not_the_current_one(tmp_path, monkeypatch):
    path = tmp_path / "a"
    path.write_bytes(fasta(made_up(20)))
    (tmp_path / "large disk").mkdir()
    (tmp_path / "set").symlink_to("large disk")
    prepare.prepare(Preparation((str(path),), str(tmp_path / "set"), 1, 1))
    manifest.verify(tmp_path / "large disk")
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    with pytest.raises(UserError, match="current folder; name a new folder in it: --out NAME"):
        prepare.prepare(Preparation((str(path),), ".", 1, 1))


def test_leftovers_are_found_whatever_the_name(tmp_path):
    path = tmp_path / "a"
    path.write_bytes(fasta(made_up(20)))
    (tmp_path / ".set[1].unfinished-killed").mkdir()
    prepare.prepare(Preparation((str(path),), str(tmp_path / "set[1]"), 1, 1))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a", "set[1]"]


def group_lives(group):
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True


@pytest.mark.parametrize("after", [0.7, 1.2, 2.0, 3.0])
def test_killed_at_any_moment_and_run_again(tmp_path, fasta_file, after):
    out = tmp_path / "set"
    words = [
        "prepare",
        "--fasta",
        fasta_file,
        "--out",
        out,
        "--workers",
        2,
        "--validation",
        100,
        "--test",
        500,
    ]
    process = subprocess.Popen(
        [sys.executable, "-m", "esm1nv_jax", *map(str, words)],
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    time.sleep(after)
    process.send_signal(signal.SIGKILL)
    process.wait()
    deadline = time.monotonic() + 10
    while group_lives(process.pid) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not group_lives(process.pid)  # its workers see that they are alone
    if out.exists():  # it was done, and then it must be whole
        manifest.verify(out)
    else:
        for left in tmp_path.glob(".set*"):
            with pytest.raises(UserError, match="make one"):
                open_split(str(left), "train")
        status, output = esm1nv(*words)
        assert status == 0, output
    manifest.verify(out)
    assert [p.name for p in tmp_path.iterdir()] == ["set"]


def run_with_little_space(words, limit):
    import resource

    return subprocess.run(
        [sys.executable, "-m", "esm1nv_jax", *map(str, words)],
        capture_output=True,
        text=True,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)),
    )


def test_a_file_too_large_for_the_disk(tmp_path, fasta_file):
    done = run_with_little_space(
        [
            "prepare",
            "--fasta",
            fasta_file,
            "--out",
            tmp_path / "set",
            "--validation",
            100,
            "--test",
            500,
        ],
        1 << 20,
    )
    assert done.returncode == EXIT_USER
    assert one_error(done.stderr) and "no space left" in done.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can mount a small disk")
@pytest.mark.parametrize("size", ["1m", "5m", "7m"])
def test_a_full_disk(tmp_path, fasta_file, size):
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", tmp_path], capture_output=True
    )
    if mounted.returncode:
        pytest.skip("mount is not allowed here")
    try:
        status, output = esm1nv(
            "prepare",
            "--fasta",
            fasta_file,
            "--out",
            tmp_path / "set",
            "--validation",
            100,
            "--test",
            500,
        )
        assert status == EXIT_USER
        assert one_error(output) and "no space left" in output
        assert list(tmp_path.iterdir()) == []
    finally:
        subprocess.run(["umount", tmp_path], check=True)


def test_two_at_once(tmp_path, fasta_file):
    words = [
        "prepare",
        "--fasta",
        fasta_file,
        "--out",
        tmp_path / "set",
        "--validation",
        "100",
        "--test",
        "500",
    ]
    first = subprocess.Popen(
        [sys.executable, "-m", "esm1nv_jax", *map(str, words)], stderr=subprocess.DEVNULL
    )
    while not list(tmp_path.glob(".set*")):
        time.sleep(0.01)
    time.sleep(0.2)
    status, output = esm1nv(*words)
    assert first.wait() == 0
    assert status == EXIT_USER
    assert "another preparation" in output or "exists already" in output
    manifest.verify(tmp_path / "set")
