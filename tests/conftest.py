"""Every test runs on eight CPU devices, unless it starts a process of its own.

In this process `--engine auto` is XLA, or ONNX Runtime for int8: the same on every CPU.
Compiled programs are kept for the next test and the next session, apart for each kind of CPU: most
of the time of these tests is compilation. A program from the cache computes the same bits.
"""

import os

from esm1nv_jax.common import command

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
command.keep_compiled_programs()

import jax  # noqa: E402, it reads the environment

jax.config.update("jax_num_cpu_devices", 8)

import pytest  # noqa: E402


@pytest.fixture(scope="session", autouse=True)
def engines_of_every_cpu():
    from esm1nv_jax.inference import cpu_engines

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cpu_engines, "cpu_features", frozenset)
        yield
