"""The launchers, with the real Open MPI and the real Slurm, and a cluster's faults played on it."""

import os
import re
import shutil
import subprocess
import sys
import time

import pytest

from esm1nv_jax.checkpoints import step_folder
from esm1nv_jax.common.errors import UserError
from esm1nv_jax.training import process_group
from tests.cluster import slurm as real_slurm
from tests.cluster.runs import SAME, losses
from tests.training import processes

MPIRUN = shutil.which("mpirun")
OPTIONS = (*SAME, "--config.steps=6", "--config.checkpoint.every=3")


def test_xla_flags_are_known_to_this_jax_and_keep_what_the_caller_set():
    show = "import jax, os; jax.numpy.zeros(2).sum(); print(os.environ['XLA_FLAGS'])"
    done = subprocess.run(
        ["bash", "-c", f'source launch/xla_flags.sh; {sys.executable} -c "{show}"'],
        cwd=processes.ROOT,
        capture_output=True,
        text=True,
        env=processes.environment() | {"XLA_FLAGS": "--xla_gpu_autotune_level=1"},
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip().endswith("--xla_gpu_autotune_level=1")
    assert "latency_hiding" in done.stdout


ALONE = [
    {},
    {"SLURM_JOB_ID": "7", "SLURM_NTASKS": "4", "SLURM_PROCID": "0", "SLURM_LOCALID": "0"},  # salloc
    {
        "SLURM_JOB_ID": "7",
        "SLURM_NTASKS": "4",
        "SLURM_PROCID": "0",
        "SLURM_LOCALID": "0",
        "SLURM_STEP_NODELIST": "a",
        "SLURM_STEP_NUM_TASKS": "1",
    },  # its shell as a step; srun --pty
    {"OMPI_COMM_WORLD_SIZE": "1", "OMPI_COMM_WORLD_RANK": "0"},
]


@pytest.mark.parametrize("environ", ALONE)
def test_off_a_cluster_nothing_is_initialised(environ):
    assert process_group.initialize_arguments(environ) is None


HAND = {"JAX_COORDINATOR_ADDRESS": "a:1234", "JAX_NUM_PROCESSES": "4", "JAX_PROCESS_ID": "3"}


@pytest.mark.parametrize(
    "change",
    [
        *({name: None} for name in HAND),
        {"JAX_COORDINATOR_ADDRESS": "a"},
        {"JAX_NUM_PROCESSES": "four"},
        {"JAX_PROCESS_ID": "4"},
    ],
)
def test_variables_set_by_hand_are_all_needed(change):
    """Else a process would take itself for the whole run."""
    assert process_group.initialize_arguments(HAND)["process_id"] == 3
    environ = {name: value for name, value in (HAND | change).items() if value is not None}
    with pytest.raises(UserError, match="each process needs all three"):
        process_group.initialize_arguments(environ)


def test_a_promise_that_is_no_number():
    with pytest.raises(UserError, match="ESM1NV_DEVICES=many"):
        process_group.promised_devices(4, {"ESM1NV_DEVICES": "many"})


@pytest.mark.parametrize(
    "arguments",
    [
        ("-n",),
        ("-n", "0", "true"),
        ("-n", "2"),
        ("-n", "2", "--restarts"),
        ("-n", "1", "--restarts", "often", "true"),
        ("--nodes", "2", "true"),
    ],
)
def test_mistakes_in_the_options_of_local_sh(arguments):
    done = subprocess.run(
        ["launch/local.sh", *arguments],
        cwd=processes.ROOT,
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )
    (line,) = done.stderr.splitlines()
    assert done.returncode == 2 and line.startswith("error: ")


def test_open_mpi_5_needs_an_address_and_says_so():
    five = {
        "OMPI_COMM_WORLD_SIZE": "4",
        "OMPI_COMM_WORLD_RANK": "2",
        "OMPI_COMM_WORLD_LOCAL_RANK": "0",
    }
    with pytest.raises(UserError, match="JAX_COORDINATOR_ADDRESS"):
        process_group.initialize_arguments(five)
    found = process_group.initialize_arguments(five | {"JAX_COORDINATOR_ADDRESS": "a:1234"})
    assert found == {
        "coordinator_address": "a:1234",
        "num_processes": 4,
        "process_id": 2,
        "local_device_ids": 0,
    }


@pytest.mark.integration
@pytest.mark.skipif(not MPIRUN, reason="mpirun not installed (apt-get install openmpi-bin)")
def test_mpirun(tmp_path):
    """Without the variables of launch/local.sh: the processes must find each other."""
    env = processes.environment() | {
        "PYTHON": sys.executable,
        "OMPI_ALLOW_RUN_AS_ROOT": "1",
        "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
    }
    run = processes.command(f"--workdir={tmp_path / 'run'}", *OPTIONS)[3:]
    done = subprocess.run(
        ["launch/mpirun.sh", "--oversubscribe", "-n", "2", "--", *run],
        cwd=processes.ROOT,
        env=env,
        capture_output=True,
        text=True,
        timeout=500,
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("2 x cpu in 2 process(es) on 1 host(s)") == 1
    assert sorted(losses(tmp_path / "run")) == list(range(1, 7))


@pytest.fixture(scope="module")
def slurm(tmp_path_factory):
    why = real_slurm.missing()
    if why:
        pytest.skip(why)
    with real_slurm.Slurm(tmp_path_factory.mktemp("slurm")) as slurm:
        yield slurm


def submit(slurm, workdir, tasks, *options, sbatch=()):
    """The job's number and its log."""
    log = workdir.parent / f"{workdir.name}.log"
    env = {k: v for k, v in processes.environment().items() if os.environ.get(k) != v}
    said = slurm.call(
        "sbatch",
        f"--ntasks={tasks}",
        f"--output={log}",
        *sbatch,
        "launch/slurm.sbatch",
        *processes.command(f"--workdir={workdir}", *SAME, *options)[3:],
        PYTHON=sys.executable,
        **env,
    )
    return said.split()[-1], log


def updates(workdir):
    path = workdir / "metrics.jsonl"
    return max(losses(workdir), default=0) if path.exists() else 0


def begin_now(slurm, job, log, restarts):
    """Slurm waits two minutes before it starts a requeued job; a test a few seconds.

    With none at all, slurmd may still hold the credential of the job's last start for revoked.
    """
    slurm.until(job, lambda state: state == "PENDING" and log.exists())
    time.sleep(4)
    slurm.call("scontrol", "update", f"JobId={job}", "StartTime=now", check=False)
    slurm.until(job, lambda state: log.read_text().count("workdir  ") > restarts, log=log)


@pytest.mark.integration
def test_slurm_preemption_requeue_and_fewer_tasks(slurm, tmp_path):
    """One job through it all: SIGTERM, requeued by 75; requeued by force; then with one task."""
    workdir = tmp_path / "run"
    options = (
        "--config.batch.rows=0",
        "--config.batch.sequences_per_device=4",
        "--config.checkpoint.every=10",
    )
    job, log = submit(slurm, workdir, 2, *options, "--config.steps=1000000")
    slurm.until(job, lambda state: updates(workdir) >= 3)
    slurm.call("scancel", "--signal=TERM", job)
    slurm.until(job, lambda state: state == "PENDING")
    (saved,) = map(int, re.findall(r"saved step (\d+) in", log.read_text()))
    assert step_folder.steps(workdir)[-1] == saved
    assert "status 75, requeueing (restart 1)" in log.read_text()

    begin_now(slurm, job, log, 1)
    assert f"resuming   from step {saved:,} of" in log.read_text()
    slurm.until(job, lambda state: updates(workdir) >= saved + 12)
    slurm.call("scontrol", "requeue", job)  # as after a lost node: no time to save
    begin_now(slurm, job, log, 2)
    slurm.until(job, lambda state: updates(workdir) >= saved + 15)
    slurm.call("scancel", "--signal=KILL", "--full", job)
    slurm.until(job, lambda state: state not in ("RUNNING", "COMPLETING"))
    slurm.call("scancel", job, check=False)

    newest = step_folder.steps(workdir)[-1]
    job, log = submit(slurm, workdir, 1, *options, f"--config.steps={newest + 2}")
    slurm.until(job, lambda state: state == "COMPLETED")
    text = log.read_text()
    assert re.search(r"changed +from \d+ rows on 2 device.* to \d+ rows on 1 device", text)
    data_state = step_folder.read_data_state(workdir, newest + 2)
    assert data_state["stream"]["parent"]["next_index"] < 5  # windows of the first epoch


@pytest.mark.integration
def test_slurm_time_limit(slurm, tmp_path):
    """The signal comes before the limit, the run saves, and the job goes back into the queue."""
    workdir = tmp_path / "run"
    job, log = submit(
        slurm, workdir, 2, "--config.steps=1000000", sbatch=("--time=2", "--signal=TERM@60")
    )
    slurm.until(job, lambda state: log.exists() and "requeueing" in log.read_text(), 400)
    (saved,) = map(int, re.findall(r"saved step (\d+) in", log.read_text()))
    assert step_folder.steps(workdir)[-1] == saved
    slurm.until(job, lambda state: state == "PENDING")
    slurm.call("scancel", job)
