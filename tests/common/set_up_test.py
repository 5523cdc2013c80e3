"""What a command sets up for its process, seen from other processes."""

import os
import subprocess
import sys

import pytest

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
if sys.argv[1] == "kept":
    from esm1nv_jax.common import command
    command.keep_freed_memory()
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


def test_freed_memory_is_kept():
    if not sys.platform.startswith("linux"):
        pytest.skip("the allocator of glibc")
    kept, given_back = (int(python(FAULTS, how)) for how in ("kept", "given back"))
    assert kept < 1000 < 50_000 < given_back
