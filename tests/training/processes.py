"""Real training processes for tests."""

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from esm1nv_jax.checkpoints import model_folder, step_folder

ROOT = Path(__file__).resolve().parents[2]
TINY = ROOT / "tests" / "configs" / "tiny.py"
CACHE = Path(tempfile.gettempdir()) / "esm1nv_jax_test_compilations"


def command(*options: str, config: str | Path = TINY) -> list[str]:
    return [sys.executable, "-m", "esm1nv_jax.main", f"--config={config}", *options]


def environment(devices: int = 1, **extra: str) -> dict[str, str]:
    """One CPU platform, compilations shared by all tests (a cached one computes the same bits)."""
    env = {k: v for k, v in os.environ.items() if not k.startswith(("XLA_", "JAX_"))}
    return env | {
        "JAX_PLATFORMS": "cpu",
        "JAX_NUM_CPU_DEVICES": str(devices),
        "JAX_COMPILATION_CACHE_DIR": str(CACHE),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "PYTHONPATH": str(ROOT),
        **extra,
    }


def slow_data(folder: Path, seconds: float, process: int = 0, after: int = 0) -> str:
    """A PYTHONPATH under which `process` waits `seconds` for each batch but the first `after`.

    What is in the batches stays as it is.
    """
    return _before_each_batch(folder, process, after, f"time.sleep({seconds})")


def held_data(folder: Path, after: int) -> tuple[str, Path]:
    """A PYTHONPATH under which process 0 gets no batch but the first `after`, and a file.

    Once the file is there, all batches come.
    """
    release = folder / "release"
    wait = f"while not os.path.exists({str(release)!r}): time.sleep(0.05)"
    return _before_each_batch(folder, 0, after, wait), release


def _before_each_batch(folder: Path, process: int, after: int, statement: str) -> str:
    folder.mkdir()
    (folder / "sitecustomize.py").write_text(
        "import itertools, os, time\n"
        f"if os.environ.get('JAX_PROCESS_ID', '0') == '{process}':\n"
        "    from esm1nv_jax.data import pipeline\n"
        "    real, count = pipeline.train_dataset, itertools.count()\n"
        "    def drag(batch):\n"
        f"        if next(count) >= {after}:\n"
        f"            {statement}\n"
        "        return batch\n"
        "    pipeline.train_dataset = lambda *args: real(*args).map(drag)\n"
    )
    return f"{folder}:{ROOT}"


def run(*options: str, config: str | Path = TINY, cwd=None, **env) -> subprocess.CompletedProcess:
    """Runs training to its end."""
    return subprocess.run(
        command(*options, config=config),
        env=environment(**env),
        cwd=cwd or ROOT,
        capture_output=True,
        text=True,
        timeout=600,
    )


def start(*options: str, config: str | Path = TINY, **env) -> subprocess.Popen:
    return subprocess.Popen(
        command(*options, config=config),
        env=environment(**env),
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def wait_until(ready, process: subprocess.Popen, seconds: float = 300) -> None:
    """Until `ready()` is true; fails if the process ends or time runs out before."""
    end = time.monotonic() + seconds
    while not ready():
        if process.poll() is not None:
            raise AssertionError(f"ended with {process.returncode}: {process.stdout.read()}")
        if time.monotonic() > end:
            process.kill()
            raise AssertionError(f"not ready after {seconds} s: {process.stdout.read()}")
        time.sleep(0.02)


def lines(run, kind=None):
    found = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [line for line in found if kind in (None, line["kind"])]


def params(run, step):
    return model_folder.flatten(step_folder.read_params(run, step))


def assert_same(a, b):
    assert a.keys() == b.keys()
    for name in a:
        np.testing.assert_array_equal(a[name], b[name], err_msg=name)
