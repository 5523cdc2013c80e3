"""What clusters do to a run, done to real processes."""

import json
import os
import re
import signal
import subprocess
import time

import pytest

from esm1nv_jax.checkpoints import step_folder
from tests.cluster.runs import Run, losses, parameters, same_bits
from tests.training import processes

pytestmark = pytest.mark.integration

LONG = ("--config.steps=100000", "--config.checkpoint.every=20")
GONE_WITHIN = 30  # seconds that the others may live on


@pytest.mark.parametrize("victim", [0, 1])
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP])
def test_a_lost_peer_ends_the_others_and_is_named(tmp_path, how, victim):
    with Run(tmp_path / "run", 3, *LONG) as run:
        run.until(lambda: run.steps() >= 3)
        pids = run.pids()
        os.kill(pids[victim], how)
        began = time.monotonic()
        while any(number != victim for number in run.pids()):
            assert time.monotonic() - began < GONE_WITHIN, run.text
            time.sleep(0.2)
        if how == signal.SIGSTOP:
            assert re.search(rf"process {victim}\b.*(no heartbeat|has not answered)", run.text)
            os.kill(pids[victim], signal.SIGKILL)
        assert run.wait(60) not in (0, 2, 75, 130)
        assert f"process {victim} (pid {pids[victim]}) was killed by SIGKILL" in run.text


def test_a_killed_process_costs_nothing_when_the_launcher_restarts(tmp_path):
    """The straight run is the witness; the launcher starts the other again by itself."""
    options = ("--config.steps=40", "--config.checkpoint.every=5")
    with Run(tmp_path / "straight", 2, *options) as run:
        assert run.wait() == 0, run.text
    path, release = processes.held_data(tmp_path / "held", after=20)
    with Run(tmp_path / "killed", 2, *options, restarts=2, PYTHONPATH=path) as run:
        run.until(lambda: step_folder.steps(run.workdir))
        run.signal(1, signal.SIGKILL)
        release.touch()
        assert run.wait() == 0, run.text
        assert "starting again (1 of 2)" in run.text and "resuming" in run.text
    assert same_bits(parameters(tmp_path / "killed", 40), parameters(tmp_path / "straight", 40))
    assert losses(tmp_path / "killed") == losses(tmp_path / "straight")


@pytest.mark.parametrize("n", [1, 2])
def test_sigterm_in_start_up_under_a_launcher_is_not_lost(tmp_path, n):
    """JAX takes it from its initialization on, and the loop asks JAX."""
    with Run(tmp_path / "run", n, *LONG) as run:
        run.until(lambda: any((run.workdir / "logs").glob("*.log")))
        run.signal(0, signal.SIGTERM)
        assert run.wait(120) == 75, run.text


@pytest.mark.parametrize("n", [1, 3])
def test_sigterm_to_one_saves_one_step_and_leaves_with_75(tmp_path, n):
    """With one process the plain handler, with several the preemption service."""
    with Run(tmp_path / "run", n, *LONG) as run:
        run.until(lambda: run.steps() >= 3)
        run.signal(n - 1, signal.SIGTERM)
        assert run.wait(60) == 75, run.text
    (said,) = re.findall(r"saved step (\d+) in", run.text)
    assert step_folder.steps(tmp_path / "run")[-1] == int(said)
    assert step_folder.verify(tmp_path / "run", int(said)) == []
    assert "left with status" not in run.text  # every process left with 75, which is no fault


@pytest.mark.parametrize("n", [1, 2])
def test_ctrl_c_saves_and_leaves_with_130(tmp_path, n):
    """As a terminal does it: to the launcher and to all of its processes at once."""
    with Run(tmp_path / "run", n, *LONG) as run:
        run.until(lambda: run.steps() >= 3)
        os.killpg(run.process.pid, signal.SIGINT)
        assert run.wait(60) == 130, run.text
    (said,) = re.findall(r"saved step (\d+) in", run.text)
    assert step_folder.verify(tmp_path / "run", int(said)) == []
    assert "was killed" not in run.text


def test_a_process_that_stands_still_makes_all_dump_their_stacks_and_leave(tmp_path):
    """A data set on a disk that hangs, for one process: its reads never come back."""
    path = processes.slow_data(tmp_path / "stuck", seconds=1e6, process=1, after=20)
    with Run(tmp_path / "run", 2, *LONG, "--config.cluster.stall_timeout=20", PYTHONPATH=path) as r:
        r.until(lambda: r.steps() >= 15)
        began = time.monotonic()
        assert r.wait(90) == 1, r.text
        assert time.monotonic() - began < 60
    (log,) = (tmp_path / "run" / "logs").iterdir()
    text = log.read_text()
    assert "no progress for 2" in r.text
    assert "process 1 on" in text and "waiting for the batch of step 21" in text
    assert text.count("most recent call first") >= 2 * 3  # threads of both processes


def test_sigusr1_prints_stacks_and_the_run_goes_on(tmp_path):
    with Run(tmp_path / "run", 1, *LONG) as run:
        run.until(lambda: run.steps() >= 2)
        before = run.steps()
        run.signal(0, signal.SIGUSR1)
        run.until(lambda: run.steps() > before + 5)
        (log,) = (tmp_path / "run" / "logs").iterdir()
        assert "in run" in log.read_text() and "most recent call first" in log.read_text()


def test_a_damaged_checkpoint_is_named_and_the_run_falls_back(tmp_path):
    options = ("--config.checkpoint.every=4", "--config.steps=8")
    with Run(tmp_path / "run", 2, *options) as run:
        assert run.wait() == 0, run.text
    right = parameters(tmp_path / "run", 8)
    folder = tmp_path / "run" / "checkpoints" / "8" / "optimizer"
    file = max((p for p in folder.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)
    content = bytearray(file.read_bytes())
    content[-5] ^= 4
    file.write_bytes(content)
    with Run(tmp_path / "run", 2, *options, "--strict") as run:
        assert run.wait() == 2, run.text
    with Run(tmp_path / "run", 2, *options) as run:
        assert run.wait() == 0, run.text
    assert f"{file.name} has other bytes" in run.text and "resuming   from step 4" in run.text
    assert same_bits(parameters(tmp_path / "run", 8), right)
    assert step_folder.verify(tmp_path / "run", 8) == []


def test_an_infinite_loss_stops_all_at_one_step_with_evidence(tmp_path):
    wild = ("--config.optimizer.peak_lr=1e30", "--config.optimizer.warmup=0", "--config.steps=30")
    with Run(tmp_path / "run", 2, *wild) as run:
        assert run.wait() == 1, run.text
    (evidence,) = (tmp_path / "run" / "nonfinite").iterdir()
    assert f"step {evidence.name} is not finite" in run.text
    assert {p.name for p in evidence.glob("batch_*")} == {"batch_0.npz", "batch_1.npz"}
    with Run(tmp_path / "skip", 2, *wild, "--config.skip_nonfinite=3") as run:
        assert run.wait() == 1, run.text
    lines = (tmp_path / "skip" / "metrics.jsonl").read_text().splitlines()
    counts = [r["nonfinite"] for r in map(json.loads, lines) if r["kind"] == "train"]
    assert counts[0] == 0 and counts[-3:] == [1, 2, 3]


# A save takes 43 to 52 pages of 4 KiB and 37 to 44 inodes, for Orbax packs arrays as they come.
# Each of these disks holds the first save and never the last: the first has no room for a second,
# the next two run out of inodes half way, and on the fourth metrics and logs take what is left.
@pytest.mark.parametrize(
    ("policy", "where", "size"),
    [
        ("continue", "checkpoints", "size=320k"),
        ("continue", "checkpoints", "size=1m,nr_inodes=60"),
        ("stop", "checkpoints", "size=1m,nr_inodes=60"),
        ("continue", "", "size=1m"),
    ],
)
def test_a_full_disk_while_saving(tmp_path, policy, where, size):
    """The checkpoints, or all of the run, lie on a disk of their own, full after a save or more."""
    disk = tmp_path / "run" / where
    disk.mkdir(parents=True)
    call = ["mount", "-t", "tmpfs", "-o", size, "tmpfs", str(disk)]
    if os.getuid() or subprocess.run(call, capture_output=True).returncode:
        pytest.skip("a small disk can only be mounted by root")
    often = ("--config.steps=100", "--config.checkpoint.every=5", "--config.checkpoint.keep=100")
    options = (*often, f"--config.checkpoint.on_error={policy}")
    try:
        with Run(tmp_path / "run", 2, *options) as run:
            assert run.wait() == 1, run.text  # the last checkpoint is not on disk either
        assert "No space left on device" in run.text and "Traceback" not in run.text
        steps = step_folder.steps(tmp_path / "run")
        assert steps and all(step_folder.verify(tmp_path / "run", step) == [] for step in steps)
        reached = max(losses(tmp_path / "run"))
        if policy == "continue":
            assert "training goes on" in run.text
            assert "checkpoint 100 could not be written" in run.text
            assert reached == 100 or "found no room and are lost" in run.text
        else:
            assert "mend that and start again" in run.text and reached < 100
    finally:
        subprocess.run(["umount", "-l", str(disk)], check=True)


def test_a_straggler_shows_in_the_figures_of_hosts(tmp_path):
    """Process 1 reads slowly: it waits for data, its peer waits for it."""
    path = processes.slow_data(tmp_path / "slow", seconds=1, process=1)
    options = ("--config.steps=20", "--config.checkpoint.every=8")  # a save lets batches pile up
    with Run(tmp_path / "run", 2, *options, PYTHONPATH=path) as run:
        assert run.wait() == 0, run.text
    lines = map(json.loads, (tmp_path / "run" / "metrics.jsonl").read_text().splitlines())
    found = [line for line in lines if line["kind"] == "hosts" and line["step"] in (14, 15)]

    def mean(name: str) -> float:
        return sum(line[name] for line in found) / len(found)

    assert mean("data_wait/1") > 0.4 > 0.2 > mean("data_wait/0")
    assert mean("device_wait/0") > mean("device_wait/1")
    assert found[-1]["probe_seconds/0"] > 0 and found[-1]["probe_seconds/1"] > 0
