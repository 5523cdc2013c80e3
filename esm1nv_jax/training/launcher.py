"""What the launcher's environment variables say about the processes of a run."""

from __future__ import annotations

import importlib.util
import os
import re
from collections.abc import Mapping
from typing import Any

from esm1nv_jax.common.errors import UserError

# Set by launch/local.sh, or by hand where there is no launcher.
MANUAL = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
SLURM_STEP = ("SLURM_NTASKS", "SLURM_PROCID", "SLURM_LOCALID", "SLURM_JOB_ID")  # JAX reads these


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
