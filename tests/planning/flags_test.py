"""The flags of launch/xla_flags.sh are known to the JAX that is installed."""

import os
import subprocess
import sys
from pathlib import Path

from esm1nv_jax.planning.chips import launch_flags

SCRIPT = Path(__file__).parents[2] / "launch" / "xla_flags.sh"


def start_jax(flags: str) -> int:
    """Exit status of a process that starts a backend under these flags."""
    return subprocess.run(
        [sys.executable, "-c", "import jax; jax.numpy.ones(3).sum().block_until_ready()"],
        env={**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags},
        capture_output=True,
        check=False,
    ).returncode


def test_jax_starts_with_every_flag():
    flags = launch_flags()
    assert flags
    assert start_jax(" ".join(flags)) == 0


def test_a_flag_that_does_not_exist_is_noticed():
    assert start_jax("--xla_gpu_no_such_flag=true") != 0


def test_what_the_caller_set_stays_and_comes_last():
    shown = subprocess.run(
        ["bash", "-euc", f'. "{SCRIPT}"; echo "$XLA_FLAGS"'],
        env={"PATH": os.environ["PATH"], "XLA_FLAGS": "--xla_cpu_enable_fast_math=false"},
        capture_output=True,
        text=True,
        check=True,
    ).stdout.split()
    assert shown == [*launch_flags(), "--xla_cpu_enable_fast_math=false"]
