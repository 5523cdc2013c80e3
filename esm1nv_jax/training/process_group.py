"""Many processes, one run: how they find each other, compare notes, and end together.

Notes go through the key-value store of JAX's coordination service, never through a collective of
the devices: a note can be waited for with a time-out, and a missing one has a name.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import socket
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import jax

from esm1nv_jax.checkpoints.manager import SaveError
from esm1nv_jax.common.errors import EXIT_INTERRUPTED, EXIT_USER, UserError
from esm1nv_jax.training.watchdog import END, Watchdog, told

LOST_AFTER = 18  # seconds without a sign of life, then a process counts as lost
# Seconds; then JAX itself aborts, should the watchdog fail to act. It counts from a heartbeat that
# was sent up to half of this before a peer fell silent: half must be well above LOST_AFTER.
HEARTBEAT = 60
FEW = 6  # names shown in a message
BY_HAND = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")  # and launch/local.sh
PLAIN = (TimeoutError, SaveError)  # faults of the surroundings, whose message says it all


class Team:
    """The processes of this run, seen from one of them. Alone, every call returns at once."""

    def __init__(self, start_timeout: float = 300.0):
        self.process, self.processes = jax.process_index(), jax.process_count()
        self.host, self.timeout = socket.gethostname(), start_timeout
        self.client = None
        if self.processes > 1:
            from jax._src import distributed  # the store has no public name yet

            self.client = distributed.global_state.client

    def gather(self, name: str, note: str, timeout: float | None = None) -> list[str]:
        """The notes of all processes, in order, on process 0; elsewhere an empty list.

        Each `name` serves once. Raises TimeoutError that names the processes not heard of.
        """
        if self.client is None:
            return [note]
        if self.process:
            self.client.key_value_set(f"{name}/{self.process}", note)
            return []
        deadline = time.monotonic() + (self.timeout if timeout is None else timeout)
        notes, missing = [note], []
        for process in range(1, self.processes):
            left = max(1, int(1000 * (deadline - time.monotonic())))
            try:
                notes.append(self.client.blocking_key_value_get(f"{name}/{process}", left))
            except jax.errors.JaxRuntimeError:
                missing.append(process)
        if missing:
            raise TimeoutError(
                f"no word ({name}) from processes {listed(missing)} of {self.processes}"
            )
        return notes

    def announce(self, name: str, make: Callable[[], str], timeout: float | None = None) -> str:
        """What `make` returns on process 0, on every process. Each `name` serves once."""
        if self.client is None:
            return make()
        if self.process == 0:
            note = make()
            self.client.key_value_set(name, note)
            return note
        left = int(1000 * (self.timeout if timeout is None else timeout))
        try:
            return self.client.blocking_key_value_get(name, left)
        except jax.errors.JaxRuntimeError:
            raise TimeoutError(f"process 0 did not announce: {name}") from None

    def together(self, name: str, timeout: float | None = None) -> None:
        """Waits until every process is here. Each `name` serves once."""
        self.gather(f"{name} reached", "", timeout)
        self.announce(f"{name} passed", str, timeout)

    def end_all(self, status: int, reason: str) -> None:
        """Says why this process leaves early; the others read it within a second and follow."""
        if self.client is None:
            return
        note = json.dumps(
            {"process": self.process, "host": self.host, "status": status, "reason": reason}
        )
        with contextlib.suppress(jax.errors.JaxRuntimeError):  # another was first, or none hears
            self.client.key_value_set(END, note)
            deadline = time.monotonic() + 5
            while self.process == 0 and time.monotonic() < deadline:  # it holds the store
                if len(self.client.key_value_dir_get("left/")) >= self.processes - 1:
                    break
                time.sleep(0.1)

    def ended(self) -> dict | None:
        """What the first process that failed said, if one did."""
        if self.client is None:
            return None
        try:
            return json.loads(self.client.key_value_try_get(END))
        except jax.errors.JaxRuntimeError:
            return None


def launched(environ: Mapping[str, str] = os.environ) -> dict | None:
    """Arguments for `jax.distributed.initialize` that the launcher's variables ask for.

    None where this process is alone: off a cluster, in a job of one task, or in an interactive
    allocation without `srun`. An empty dictionary where JAX finds everything by itself.
    Raises UserError where the launcher says too little.
    """
    address = environ.get("JAX_COORDINATOR_ADDRESS")
    managed = "OMPI_COMM_WORLD_SIZE" in environ or "SLURM_JOB_ID" in environ
    if any(name in environ for name in BY_HAND[managed:]):  # a manager needs the address at most
        return _by_hand(environ)
    if environ.get("ESM1NV_LAUNCHER") == "tpu_pod":
        return {}
    if int(environ.get("OMPI_COMM_WORLD_SIZE", 1)) > 1:
        if "OMPI_MCA_orte_hnp_uri" in environ:  # Open MPI 4, which JAX knows
            return {}
        if not address:
            raise UserError(
                "Open MPI 5 does not tell JAX where process 0 is; start with launch/mpirun.sh, or "
                "add -x JAX_COORDINATOR_ADDRESS=FIRST_HOST:PORT to mpirun"
            )
        return {
            "coordinator_address": address,
            "num_processes": int(environ["OMPI_COMM_WORLD_SIZE"]),
            "process_id": int(environ["OMPI_COMM_WORLD_RANK"]),
            "local_device_ids": int(environ["OMPI_COMM_WORLD_LOCAL_RANK"]),
        }
    # A shell of `salloc` counts as a step of its own in some versions of Slurm, with one task,
    # while SLURM_NTASKS speaks of the whole allocation.
    if "SLURM_STEP_NODELIST" in environ and int(environ.get("SLURM_STEP_NUM_TASKS", 1)) > 1:
        return {}
    return None


def _by_hand(environ: Mapping[str, str]) -> dict:
    address, count, process = (environ.get(name, "") for name in BY_HAND)
    numbers = count.isdecimal() and process.isdecimal() and int(process) < int(count)
    if not numbers or not re.fullmatch(r".+:\d+", address):
        raise UserError(
            f"{', '.join(f'{name}={environ.get(name)}' for name in BY_HAND)}: each process needs "
            "all three, HOST:PORT of process 0, the number of processes, and its own from 0; unset "
            "them to run one process alone"
        )
    return {"coordinator_address": address, "num_processes": int(count), "process_id": int(process)}


def promised_devices(processes: int, environ: Mapping[str, str] = os.environ) -> int:
    """Devices that the launcher promised over all processes: at least one a process."""
    said = environ.get("ESM1NV_DEVICES", "")
    if said.isdecimal():
        return int(said)
    if said:
        raise UserError(f"ESM1NV_DEVICES={said} is no number; set it to that of all devices")
    if environ.get("SLURM_GPUS_ON_NODE", "").isdigit() and "SLURM_STEP_NUM_NODES" in environ:
        return int(environ["SLURM_GPUS_ON_NODE"]) * int(environ["SLURM_STEP_NUM_NODES"])
    return processes


@contextlib.contextmanager
def join(start_timeout: float, stall_timeout: float) -> Iterator[tuple[Team, Watchdog]]:
    """Starts JAX on the cluster, if there is one, and keeps watch while the run lasts.

    An exception that leaves the body ends the whole run: with several processes this one tells the
    others why and goes at once, for an orderly shutdown would wait for those that are gone.
    """
    arguments = launched()
    if arguments is not None:
        _initialize(arguments, start_timeout)
    team = Team(start_timeout)
    with Watchdog(team, max(start_timeout, stall_timeout), LOST_AFTER) as watchdog:
        try:
            yield team, watchdog
        except BaseException as error:
            if team.processes > 1:
                _leave(team, error)
            if isinstance(error, PLAIN):
                print(f"error: {error}", file=sys.stderr)
                raise SystemExit(1) from None
            raise


def _initialize(arguments: dict, start_timeout: float) -> None:
    try:
        jax.distributed.initialize(
            **arguments,
            initialization_timeout=int(start_timeout),
            heartbeat_timeout_seconds=HEARTBEAT,
            shutdown_timeout_seconds=600,  # the others wait while process 0 sums up the run
        )
    except (jax.errors.JaxRuntimeError, RuntimeError) as error:
        first = str(error).splitlines()[0]
        print(
            f"the processes did not find each other in {start_timeout:.0f} s: {first}; look for "
            "one that did not start, and see docs/clusters.md",
            file=sys.stderr,
        )
        os._exit(1)


def _leave(team: Team, error: BaseException) -> None:
    status, reason = 1, f"{type(error).__name__}: {error}"
    if isinstance(error, UserError):
        status, reason = EXIT_USER, str(error)
    elif isinstance(error, KeyboardInterrupt):
        status, reason = EXIT_INTERRUPTED, "Ctrl-C"
    elif isinstance(error, SystemExit):
        status = error.code if isinstance(error.code, int) else 1
    said = team.ended()
    if said is not None and said["process"] != team.process:
        print(told(said), file=sys.stderr, flush=True)
        os._exit(said["status"])
    if isinstance(error, (UserError, *PLAIN)):
        print(f"error: {error}", file=sys.stderr)
    elif not isinstance(error, KeyboardInterrupt):
        traceback.print_exception(error)
    if _from_a_peer(error):
        print(
            f"process {team.process} on {team.host} lost its connection to a peer; the launcher "
            "names the one that died. Started again, the run goes on from its newest checkpoint",
            file=sys.stderr,
        )
    else:
        team.end_all(status, reason)
    sys.stderr.flush()
    os._exit(status)


def _from_a_peer(error: BaseException) -> bool:
    """Whether an exception only says that a collective failed, so that the cause is elsewhere."""
    return any(word in str(error) for word in ("Gloo", "gloo", "NCCL", "coordination service"))


def listed(numbers: list[int]) -> str:
    shown = ", ".join(map(str, numbers[:FEW]))
    return shown + (f" and {len(numbers) - FEW} more" if len(numbers) > FEW else "")


def agree(team: Team, devices: int, config: dict[str, object], data: str) -> list[str]:
    """Compares what all processes are about to run; returns their hosts, in order, on process 0.

    devices: over all processes. config: its fields under dotted names. data: fingerprint.
    Raises UserError, on process 0, that names the first process which differs, and in what.
    """
    mine = {"host": team.host, "code": code_version(), "data": data, "config": config}
    notes = team.gather("facts", json.dumps(mine))
    everyone = [json.loads(note) for note in notes]
    for process, its in enumerate(everyone):
        where = f"process {process} on {its['host']}"
        for name in sorted(config.keys() | its["config"].keys()):
            here, there = mine_json(config.get(name)), its["config"].get(name)
            if here != there and name != "data.path":  # a host may have its own copy
                raise UserError(
                    f"{where} has config.{name}={there!r}, process 0 on {team.host} "
                    f"has {here!r}; start all with the same command"
                )
        for name, what in (("code", "another version of the code"), ("data", "other data")):
            if its[name] != mine[name]:
                raise UserError(
                    f"{where} has {what} (hash {its[name][:12]}) than process 0 on {team.host} "
                    f"({mine[name][:12]}); give all hosts the same, best from one shared folder"
                )
    promised = promised_devices(team.processes)
    if everyone and devices < promised:
        raise UserError(
            f"found {devices} devices in {team.processes} processes, the launcher promised "
            f"{promised}; start one process for each GPU (see docs/clusters.md) and look whether "
            "all drivers work"
        )
    return [its["host"] for its in everyone]


def mine_json(value: object) -> object:
    """A value as it looks after a journey as JSON: tuples are lists."""
    return json.loads(json.dumps(value))


def code_version() -> str:
    """A digest of every Python file of the package: two checkouts differ, two copies do not."""
    package = Path(__file__).resolve().parent.parent
    digest = hashlib.sha256()
    for file in sorted(package.rglob("*.py")):
        digest.update(str(file.relative_to(package)).encode() + file.read_bytes())
    return digest.hexdigest()
