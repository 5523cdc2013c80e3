"""What a command sets up for its process, seen from other processes."""

import itertools
import os
import subprocess
import sys
import threading

import pytest

from esm1nv_jax.common import command
from esm1nv_jax.common.errors import UserError

COMPILE = """
from esm1nv_jax.common import command
command.set_up()
import jax, jax.numpy as jnp
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
jax.jit(lambda x: jnp.sin(x) @ x)(jnp.ones((64, 64))).block_until_ready()
"""
# Faults of pages while a large block is filled and dropped again and again.
FAULTS = """
import resource, sys
from esm1nv_jax.common import command
if sys.argv[1]:
    command.keep_freed_memory()
if sys.argv[1] == "returned":
    command.return_freed_memory()
def work():
    return b"x" * 100_000_000
work()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(5):
    work()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def python(code, *arguments, **env):
    base = {k: v for k, v in os.environ.items() if not k.startswith(("JAX_", "XDG_", "MALLOC_"))}
    return subprocess.run(
        [sys.executable, "-c", code, *arguments],
        env=base | env,
        capture_output=True,
        text=True,
        check=True,
    ).stdout


@pytest.mark.parametrize("variable", ["HOME", "XDG_CACHE_HOME", "JAX_COMPILATION_CACHE_DIR"])
def test_compiled_programs_are_kept(tmp_path, variable):
    python(COMPILE, **{"HOME": str(tmp_path / "other"), variable: str(tmp_path / "here")})
    below = {"HOME": ".cache/esm1nv_jax", "XDG_CACHE_HOME": "esm1nv_jax"}.get(variable, "")
    assert list((tmp_path / "here" / below).rglob("*-cache"))
    assert not (tmp_path / "other").exists()


NO_HOME = """
from pathlib import Path
def fails():
    raise RuntimeError("Could not determine home directory.")
Path.home = fails
from esm1nv_jax.common import command
command.set_up()
"""


def test_without_a_home_folder_nothing_is_kept():
    assert python(NO_HOME) == ""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the allocator of glibc")
def test_freed_memory_is_kept_until_it_is_returned_or_turned_off():
    kept, given_back, returned = (int(python(FAULTS, how)) for how in ("kept", "", "returned"))
    off = int(python(FAULTS, "kept", ESM1NV_KEEP_FREED_MEMORY="0"))
    assert kept < 1000 < 50_000 < min(given_back, returned, off)


def test_a_program_that_works_in_much_of_the_memory_keeps_none_unless_told_to(monkeypatch):
    monkeypatch.setattr(command, "has_accelerator", lambda: False)
    monkeypatch.setattr(command, "machine_memory", lambda: 24 * 2**30)
    assert [command.keeps(gib * 2**30) for gib in (4, 7)] == [True, False]
    monkeypatch.setenv(command.KEEP, "1")
    assert command.keeps(7 * 2**30)
    monkeypatch.setenv(command.KEEP, "0")
    assert not command.keeps(1)


@pytest.mark.parametrize(
    "line, limit",
    [
        ("0::/", "memory.max"),  # a container
        ("0::/slurm/job_7/step_0", "slurm/job_7/memory.max"),
        ("4:memory:/slurm/job_7", "memory/slurm/memory.limit_in_bytes"),
        ("4:memory:/docker/7", "memory/memory.limit_in_bytes"),  # seen from inside
    ],
)
def test_a_container_or_a_job_has_the_memory_that_it_is_allowed(tmp_path, line, limit):
    groups, path = tmp_path / "cgroup", tmp_path / limit
    groups.write_text(f"9:name=systemd:/\n{line}\n", encoding="utf-8")
    machine = command.machine_memory(str(groups), str(tmp_path))
    path.parent.mkdir(parents=True, exist_ok=True)
    for text, bytes_ in (("max\n", machine), (f"{1 << 62}\n", machine), ("1048576\n", 1 << 20)):
        path.write_text(text, encoding="utf-8")
        assert command.machine_memory(str(groups), str(tmp_path)) == bytes_


def test_a_machine_without_proc_is_one_line(monkeypatch):
    monkeypatch.setattr(command, "has_accelerator", lambda: False)
    if sys.platform.startswith("linux"):
        with pytest.raises(UserError, match="there is no /nowhere/cpuinfo"):
            command.check_machine("/nowhere/cpuinfo")


def test_too_few_threads_are_one_line_and_none_is_left(monkeypatch):
    before, start, started = threading.active_count(), threading.Thread.start, itertools.count()

    def limited(thread):
        if next(started) == 20:
            raise RuntimeError("can't start new thread")
        start(thread)

    monkeypatch.setattr(threading.Thread, "start", limited)
    with pytest.raises(UserError, match=r"cannot start the 64 threads .* \(ulimit -u"):
        command.check_machine()
    assert threading.active_count() == before


def test_a_terminal_gets_its_first_line_before_jax_is_imported(monkeypatch, capsys):
    for name in (
        "check_machine",
        "hide_unusable_plugins",
        "keep_compiled_programs",
        "keep_freed_memory",
    ):
        monkeypatch.setattr(command, name, lambda: None)
    command.set_up()
    assert capsys.readouterr().err == ""  # a log
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    monkeypatch.setattr(sys, "argv", ["esm1nv", "embed", "--help"])
    command.set_up()
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(sys, "argv", ["esm1nv", "embed"])
    command.set_up()
    assert capsys.readouterr().err == "starting JAX\n"
