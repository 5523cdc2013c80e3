"""What a run refuses at its start, with real processes that really differ."""

import os
import re
import shutil
import subprocess
import sys
import types

import jax
import pytest

from esm1nv_jax.training import distributed, process_group
from tests.cluster.runs import Run
from tests.training import processes

FEW = ("--config.steps=3",)
# Process 1 is started by this in place of Python; "$@" is what it would have been given.
DIFFERS = """#!/usr/bin/env bash
[ "${{JAX_PROCESS_ID:-}}" = 1 ] || exec "{python}" "$@"
{instead}
"""


def differing(folder, instead: str) -> str:
    """A Python that does something else in process 1."""
    script = folder / "python"
    script.write_text(DIFFERS.format(python=sys.executable, instead=instead))
    script.chmod(0o755)
    return str(script)


def refused(tmp_path, instead: str, words: str, n: int = 2, **env):
    """Every process leaves with 2, and the message is there."""
    python = differing(tmp_path, instead)
    with Run(tmp_path / "run", n, *FEW, python=python, **env) as run:
        assert run.wait() == 2, run.text
    assert re.search(words, run.text), run.text
    assert "Traceback" not in run.text
    return run.text


@pytest.mark.integration
def test_another_config(tmp_path):
    refused(
        tmp_path,
        f'exec "{sys.executable}" "$@" --config.seed=7',
        r"error: process 1 on \S+ has config.seed=7, process 0 on \S+ has 0",
    )


@pytest.fixture
def copy(tmp_path):
    """A second checkout of the package."""
    there = tmp_path / "checkout"
    shutil.copytree(
        processes.ROOT / "esm1nv_jax",
        there / "esm1nv_jax",
        ignore=shutil.ignore_patterns("__pycache__"),
    )
    return there


def from_copy(copy) -> str:
    return f'cd "{copy}" && PYTHONPATH="{copy}" exec "{sys.executable}" "$@"'


@pytest.mark.integration
def test_another_version_of_the_code(tmp_path, copy):
    with (copy / "esm1nv_jax" / "model" / "loss.py").open("a") as file:
        file.write("# changed\n")
    refused(tmp_path, from_copy(copy), r"error: process 1 .*another version of the code")


@pytest.mark.integration
def test_other_data(tmp_path, copy):
    """The same code, another sample: one protein is missing."""
    import gzip

    (sample,) = (copy / "esm1nv_jax" / "data" / "sample").glob("*.fasta.gz")
    text = gzip.decompress(sample.read_bytes())
    sample.write_bytes(gzip.compress(text[: text.rindex(b">")]))
    refused(tmp_path, from_copy(copy), r"error: process 1 .*other data")


@pytest.mark.integration
def test_a_workdir_that_is_not_shared(tmp_path):
    """Process 1 sees another folder under the same name, in a mount namespace of its own."""
    (tmp_path / "run").mkdir()
    if subprocess.run(["unshare", "-m", "true"], capture_output=True).returncode:
        pytest.skip("unshare is not allowed here")
    refused(
        tmp_path,
        f'exec unshare -m bash -c \'mount -t tmpfs tmpfs "{tmp_path / "run"}" && '
        f'exec "{sys.executable}" "$@"\' bash "$@"',
        r"error: workdir \S+ on \S+ is not the folder that process 0 sees",
    )


@pytest.mark.integration
def test_fewer_devices_than_promised(tmp_path):
    words = "found 2 devices in 2 processes, the launcher promised 8; .* set ESM1NV_DEVICES=2"
    refused(tmp_path, f'exec "{sys.executable}" "$@"', words, ESM1NV_DEVICES="8")


def test_what_slurm_promises():
    environ = {"SLURM_GPUS_ON_NODE": "8", "SLURM_STEP_NUM_NODES": "22"}
    assert process_group.promised_devices(22, environ) == 176
    assert process_group.promised_devices(4, {}) == 4


@pytest.mark.integration
def test_a_live_run_is_named_and_unharmed(tmp_path):
    with Run(tmp_path / "run", 1, "--config.steps=100000") as first:
        first.until(lambda: first.steps() >= 2)
        pid = first.pids()[0]
        assert Run(tmp_path / "run", 1, "--config.steps=100000").wait() == 2
        assert f"in use by a live run (process {pid} on " in first.text  # both write there
        before = first.steps()
        first.until(lambda: first.steps() > before)


@pytest.mark.integration
def test_a_process_that_never_comes_ends_the_start(tmp_path):
    python = differing(tmp_path, "exec sleep 600")
    with Run(tmp_path / "run", 2, *FEW, "--config.cluster.start_timeout=15", python=python) as run:
        assert run.wait(200) not in (0, 2, 75)
        assert "did not find each other in 15 s" in run.text and "stack trace" not in run.text


def test_a_process_that_is_told_to_end_does_so_when_the_coordinator_has_gone(monkeypatch, capsys):
    def gone(*_, **__):
        raise jax.errors.JaxRuntimeError("UNAVAILABLE")

    class Ended(BaseException):
        pass

    def end(status):
        raise Ended(status)

    client = types.SimpleNamespace(key_value_set=gone)
    group = types.SimpleNamespace(client=client, index=1, host="here")
    monkeypatch.setattr(os, "_exit", end)
    with pytest.raises(Ended, match="2"):
        distributed.Watchdog(group, 60, 60)._exit(2, "the config differs", received=True)
    assert "process 1 on here, starting: the config differs" in capsys.readouterr().err


def test_alone_every_note_comes_back_at_once():
    group = process_group.ProcessGroup()
    assert group.gather("a", "message") == ["message"]
    assert group.broadcast("b", lambda: "made") == "made"
    group.barrier("c")
    facts = (group, 1, {"seed": 1}, "data")
    assert process_group.assert_equal_across_processes(*facts) == [group.host]


def test_time_in_which_a_process_was_stopped_is_no_standstill(monkeypatch):
    """By Ctrl-Z, or by `scontrol suspend`: it goes on where it was, and then may stand still."""
    now, times = [0.0], iter([1.0, 2.0, 4000.0, *range(4001, 4200)])
    watchdog = distributed.Watchdog(process_group.ProcessGroup(), stall_timeout=60, lost_after=18)
    watchdog.activity_since, ended = 0.0, []

    def wait(seconds):
        now[0] = next(times)

    def end(*_):
        ended.append(now[0])
        watchdog._closed.set()

    monkeypatch.setattr(distributed.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(watchdog._abort_received, "wait", wait)
    monkeypatch.setattr(watchdog, "_exit", end)
    watchdog._watch()
    assert ended == [4059]
