"""Preparation on machines that fail: killed, out of space, out of memory, without locks."""

import os
import shutil
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


@pytest.mark.parametrize(
    "after", [0.7, *(pytest.param(s, marks=pytest.mark.integration) for s in (0.4, 1.2, 2.0))]
)
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
@pytest.mark.parametrize(
    "size", ["5m", *(pytest.param(s, marks=pytest.mark.integration) for s in ("1m", "7m"))]
)
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


def prepare_patched(tmp_path, patch, limit=""):
    """`prepare` in a process whose code `patch` has changed; its forked workers inherit that."""
    path = tmp_path / "a"
    path.write_bytes(fasta(made_up(4000)))
    imports = "from esm1nv_jax import cli\nfrom esm1nv_jax.data import first_pass"
    program = f"{imports}\n{patch}\ncli.main()"
    words = ["prepare", "--fasta", path, "--out", tmp_path / "set", "--workers", 2]
    command = [sys.executable, "-c", program, *map(str, words)]
    if limit:
        command = ["bash", "-c", f'{limit}; exec "$@"', "bash", *command]
    # NumPy's BLAS takes memory by the core, and dies without a word where it gets none.
    environment = os.environ | {"OPENBLAS_NUM_THREADS": "1"}
    return subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment)


SHORT = "first_pass.records.check_threads.__defaults__ = (5,)"


def one_line(done, words):
    output = done.stdout + done.stderr
    assert done.returncode == EXIT_USER, output
    assert one_error(output) and words in output, output


def test_a_worker_without_memory_ends_the_command_with_one_line(tmp_path):
    patch = "def fail(*_): raise MemoryError\nfirst_pass._Worker._add = fail"
    one_line(prepare_patched(tmp_path, patch), "a worker ran out of memory; try fewer --workers")
    assert [p.name for p in tmp_path.iterdir()] == ["a"]


def test_a_killed_worker_ends_the_command_with_one_line(tmp_path):
    patch = (
        "import os\nadd = first_pass._Worker._add\n"
        "def fail(self, *a): os.kill(os.getpid(), 9) if self.worker else add(self, *a)\n"
        "first_pass._Worker._add = fail\n"
        "from esm1nv_jax.data import prepare\nprepare._SMALLEST_CHUNK = 1 << 19"
    )
    one_line(prepare_patched(tmp_path, patch), "a worker was killed by signal 9; if memory ran out")
    assert [p.name for p in tmp_path.iterdir()] == ["a"]


def test_the_parent_without_memory_ends_the_command_with_one_line(tmp_path):
    patch = "def fail(*_): raise MemoryError\nfirst_pass.FirstPass.take = fail"
    one_line(prepare_patched(tmp_path, patch), "memory ran out; free some")
    assert [p.name for p in tmp_path.iterdir()] == ["a"]


def test_a_limit_on_virtual_memory_is_one_line_and_no_hang(tmp_path):
    """array_record's reader waits for ever for threads that it does not get."""
    one_line(prepare_patched(tmp_path, SHORT, "ulimit -v 1000000"), "raise the limits on memory")
    assert [p.name for p in tmp_path.iterdir()] == ["a"]


@pytest.mark.skipif(os.geteuid() != 0 or not shutil.which("setpriv"), reason="needs another user")
@pytest.mark.parametrize(
    ("processes", "words"),
    [
        (2, "cannot start 2 workers"),
        pytest.param(40, "raise the limits on memory", marks=pytest.mark.integration),
    ],
)
def test_a_limit_on_processes_is_one_line_and_no_hang(tmp_path, processes, words):
    """As another user: root has no such limit. It may still read the program, by a capability."""
    for path in (tmp_path, *tmp_path.parents[:2]):
        path.chmod(0o777)
    allowed = "--inh-caps +dac_override --ambient-caps +dac_override"
    limit = "export OPENBLAS_NUM_THREADS=1; exec setpriv --reuid=54321 --clear-groups "
    limit += f"{allowed} bash -c 'ulimit -u {processes}"
    limit += '; exec "$@"\' bash "$@"'
    done = prepare_patched(tmp_path, SHORT, limit)
    if "setpriv" in done.stderr:
        pytest.skip(done.stderr)
    one_line(done, words)


def test_a_file_system_without_locks_is_reported_and_prepared_on(tmp_path):
    left = tmp_path / ".set.unfinished-other"
    left.mkdir()
    patch = (
        "import fcntl\ndef fail(*_): raise OSError(37, 'No locks available')\nfcntl.flock = fail"
    )
    done = prepare_patched(tmp_path, patch)
    assert done.returncode == 0, done.stderr
    assert "cannot be locked (No locks available): nothing stops another process" in done.stderr
    assert f"{left} is left from another preparation; remove it if none is running" in done.stderr
    assert left.exists()
    manifest.verify(tmp_path / "set")


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can mount")
def test_no_shared_memory_is_needed(tmp_path):
    """A container may have no /dev/shm, or none that can be written."""
    done = subprocess.run(["unshare", "-m", "true"], capture_output=True)
    if done.returncode:
        pytest.skip("a name space of mounts is not allowed here")
    (tmp_path / "a").write_bytes(fasta(made_up(100)))
    command = f"mount -t tmpfs -o ro,size=4k none /dev/shm && exec {sys.executable} -m esm1nv_jax"
    command += f" prepare --fasta {tmp_path / 'a'} --out {tmp_path / 'set'} --workers 2"
    done = subprocess.run(["unshare", "-m", "sh", "-c", command], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    manifest.verify(tmp_path / "set")
