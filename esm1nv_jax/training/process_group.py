"""The processes of a run: what their launcher says of them, the small messages that they exchange,
and the check that all of them run the same thing.

Messages go through the key-value store of JAX's coordination service, never through a collective
of the devices: waiting for one has a timeout, and a missing one can be named.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import json
import os
import re
import socket
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax

from esm1nv_jax.common.errors import UserError

ABORT_KEY = "abort"  # under which the first process that fails publishes why
MAX_LISTED = 6  # processes named in a message
# Set by launch/local.sh, or by hand where there is no launcher.
MANUAL = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
SLURM_STEP = ("SLURM_NTASKS", "SLURM_PROCID", "SLURM_LOCALID", "SLURM_JOB_ID")  # JAX reads these


class ProcessGroup:
    """The processes of this run, seen from one of them; with one process every call returns at
    once. Each `key` can be used once."""

    def __init__(self, timeout: float = 300.0):
        self.index, self.size = jax.process_index(), jax.process_count()
        self.host, self.timeout = socket.gethostname(), timeout
        self.client: Any = None  # of JAX's coordination service; None in a single process
        if self.size > 1:
            from jax._src import distributed  # the key-value store has no public name yet

            self.client = distributed.global_state.client

    @property
    def is_primary(self) -> bool:
        """Whether this is process 0, which alone writes to the run's folder and the terminal."""
        return self.index == 0

    def gather(self, key: str, message: str, timeout: float | None = None) -> list[str]:
        """Return every process's message, in order, on process 0; an empty list elsewhere.

        Raises TimeoutError that names the processes which sent none.
        """
        if self.client is None:
            return [message]
        if self.index:
            self.client.key_value_set(f"{key}/{self.index}", message)
            return []
        deadline = time.monotonic() + (self.timeout if timeout is None else timeout)
        messages, missing = [message], []
        for process in range(1, self.size):
            remaining_ms = max(1, int(1000 * (deadline - time.monotonic())))
            try:
                messages.append(
                    self.client.blocking_key_value_get(f"{key}/{process}", remaining_ms)
                )
            except jax.errors.JaxRuntimeError:
                missing.append(process)
        if missing:
            listed = ", ".join(map(str, missing[:MAX_LISTED]))
            more = f" and {len(missing) - MAX_LISTED} more" if len(missing) > MAX_LISTED else ""
            raise TimeoutError(f"no message ({key}) from processes {listed}{more} of {self.size}")
        return messages

    def broadcast(self, key: str, make: Callable[[], str], timeout: float | None = None) -> str:
        """Return on every process what `make` returns on process 0."""
        if self.client is None:
            return make()
        if self.is_primary:
            message = make()
            self.client.key_value_set(key, message)
            return message
        timeout_ms = int(1000 * (self.timeout if timeout is None else timeout))
        try:
            return self.client.blocking_key_value_get(key, timeout_ms)
        except jax.errors.JaxRuntimeError:
            raise TimeoutError(f"process 0 did not broadcast: {key}") from None

    def barrier(self, key: str, timeout: float | None = None) -> None:
        """Wait until every process has reached this barrier."""
        self.gather(f"{key} reached", "", timeout)
        self.broadcast(f"{key} passed", str, timeout)

    def abort_all(self, status: int, reason: str) -> None:
        """Publish why this process ends the run; the others read it within a second and exit."""
        if self.client is None:
            return
        abort = {"process": self.index, "host": self.host, "status": status, "reason": reason}
        with contextlib.suppress(jax.errors.JaxRuntimeError):  # another was first, or none listens
            self.client.key_value_set(ABORT_KEY, json.dumps(abort))
            deadline = time.monotonic() + 5
            while self.is_primary and time.monotonic() < deadline:  # it serves the store
                if len(self.client.key_value_dir_get("left/")) >= self.size - 1:
                    break
                time.sleep(0.1)

    def abort_record(self) -> dict[str, Any] | None:
        """Return what the first process that aborted the run published, if one did."""
        if self.client is None:
            return None
        try:
            return json.loads(self.client.key_value_try_get(ABORT_KEY))
        except jax.errors.JaxRuntimeError:
            return None


def assert_equal_across_processes(
    group: ProcessGroup, num_devices: int, config: dict[str, object], data_fingerprint: str
) -> list[str]:
    """Check that all processes are about to run the same thing; return their hosts on process 0.

    `num_devices` is over all processes, `config` has dotted field names, and `data_fingerprint` is
    that of all splits which are read.

    Raises UserError, on process 0, that names the first process which differs, and in what.
    """
    mine = {"host": group.host, "code": code_digest(), "data": data_fingerprint, "config": config}
    mine = json.loads(json.dumps(mine))  # tuples become lists, as in the messages of the others
    records = [json.loads(message) for message in group.gather("facts", json.dumps(mine))]
    for process, record in enumerate(records):
        where = f"process {process} on {record['host']}"
        for name in sorted(mine["config"].keys() | record["config"].keys()):
            here, there = mine["config"].get(name), record["config"].get(name)
            if here != there and name != "data.path":  # each host may have a copy of its own
                raise UserError(
                    f"{where} has config.{name}={there!r}, process 0 on {group.host} has "
                    f"{here!r}; start all with the same command"
                )
        for name, what in (("code", "another version of the code"), ("data", "other data")):
            if record[name] != mine[name]:
                raise UserError(
                    f"{where} has {what} (hash {record[name][:12]}) than process 0 on "
                    f"{group.host} ({mine[name][:12]}); give all hosts the same, best from one "
                    "shared folder"
                )
    promised = promised_devices(group.size)
    if records and num_devices < promised:
        raise UserError(
            f"found {num_devices} devices in {group.size} processes, the launcher promised "
            f"{promised}; start one process for each GPU (see docs/clusters.md) and check that "
            f"all drivers work; to use no more than these, set ESM1NV_DEVICES={num_devices}"
        )
    return [record["host"] for record in records]


def code_digest() -> str:
    """Return a digest of every Python file of the package: two checkouts differ, copies do not."""
    package = Path(__file__).resolve().parent.parent
    digest = hashlib.sha256()
    for file in sorted(package.rglob("*.py")):
        digest.update(str(file.relative_to(package)).encode() + file.read_bytes())
    return digest.hexdigest()


def initialize_arguments(environ: Mapping[str, str] = os.environ) -> dict[str, Any] | None:
    """Return the arguments of `jax.distributed.initialize`, or None for a single process.

    A process is single off a cluster, in a job of one task, and in an interactive allocation
    without `srun`. An empty dictionary means that JAX detects the cluster by itself.

    Raises UserError where the launcher's variables are incomplete or malformed.
    """
    managed = "OMPI_COMM_WORLD_SIZE" in environ or "SLURM_JOB_ID" in environ
    # Under Slurm or Open MPI the address alone may be given; the numbers are theirs.
    manual = MANUAL[1:] if managed else MANUAL
    if any(name in environ for name in manual):
        return _manual_arguments(environ)
    # Set by launch/tpu_pod.sh and launch/jobset.yaml.
    if launcher := environ.get("ESM1NV_LAUNCHER"):
        if launcher not in ("tpu_pod", "kubernetes"):
            raise UserError(f"ESM1NV_LAUNCHER={launcher} is unknown; it may be tpu_pod, kubernetes")
        if launcher == "kubernetes" and importlib.util.find_spec("kubernetes") is None:
            raise UserError(
                "ESM1NV_LAUNCHER=kubernetes needs the package kubernetes, by which JAX asks for "
                "its job; install the extra k8s"
            )
        return {}
    if _integer(environ, "OMPI_COMM_WORLD_SIZE", 1) > 1:
        return _open_mpi_arguments(environ)
    # A shell of `salloc` counts as a step of its own in some versions of Slurm, with one task,
    # while SLURM_NTASKS describes the whole allocation.
    if "SLURM_STEP_NODELIST" in environ and _integer(environ, "SLURM_STEP_NUM_TASKS", 1) > 1:
        for name in SLURM_STEP:
            _integer(environ, name)
        if not environ["SLURM_STEP_NODELIST"]:
            raise UserError("SLURM_STEP_NODELIST is empty; start the processes with srun")
        return {}
    return None


def promised_devices(processes: int, environ: Mapping[str, str] = os.environ) -> int:
    """Return the number of devices, over all processes, that the launcher promised."""
    if environ.get("ESM1NV_DEVICES"):
        return _integer(environ, "ESM1NV_DEVICES")
    if environ.get("SLURM_GPUS_ON_NODE", "").isdigit() and "SLURM_STEP_NUM_NODES" in environ:
        return int(environ["SLURM_GPUS_ON_NODE"]) * _integer(environ, "SLURM_STEP_NUM_NODES")
    return processes  # at least one each


def _manual_arguments(environ: Mapping[str, str]) -> dict[str, Any]:
    address, count, process = (environ.get(name, "") for name in MANUAL)
    numbers = count.isdecimal() and process.isdecimal() and int(process) < int(count)
    if not numbers or not re.fullmatch(r".+:\d+", address):
        raise UserError(
            f"{', '.join(f'{name}={environ.get(name)}' for name in MANUAL)}: each process needs "
            "all three, HOST:PORT of process 0, the number of processes, and its own index from "
            "0; unset them to run a single process"
        )
    return {"coordinator_address": address, "num_processes": int(count), "process_id": int(process)}


def _open_mpi_arguments(environ: Mapping[str, str]) -> dict[str, Any]:
    if "OMPI_MCA_orte_hnp_uri" in environ:  # Open MPI 4, which JAX detects
        return {}
    address = environ.get("JAX_COORDINATOR_ADDRESS")
    if not address:
        raise UserError(
            "Open MPI 5 does not tell JAX where process 0 is; start with launch/mpirun.sh, or "
            "add -x JAX_COORDINATOR_ADDRESS=FIRST_HOST:PORT to mpirun"
        )
    return {
        "coordinator_address": address,
        "num_processes": _integer(environ, "OMPI_COMM_WORLD_SIZE"),
        "process_id": _integer(environ, "OMPI_COMM_WORLD_RANK"),
        "local_device_ids": _integer(environ, "OMPI_COMM_WORLD_LOCAL_RANK"),
    }


def _integer(environ: Mapping[str, str], name: str, default: int | None = None) -> int:
    text = environ.get(name)
    if text is None and default is not None:
        return default
    if text is None or not text.isdecimal():
        found = "is not set" if text is None else f"={text} is not a number"
        raise UserError(
            f"{name}{' ' if text is None else ''}{found}, so the launcher's variables are "
            "incomplete; start with srun, mpirun or launch/local.sh, or unset them to run a "
            "single process"
        )
    return int(text)
