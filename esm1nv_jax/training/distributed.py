"""How the processes of a run start, how they are watched, and how they end together."""

from __future__ import annotations

import contextlib
import faulthandler
import json
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from typing import Any, TextIO

import jax

from esm1nv_jax.checkpoints.manager import SaveError
from esm1nv_jax.common.errors import EXIT_INTERRUPTED, EXIT_USER, UserError
from esm1nv_jax.training.process_group import ABORT_KEY, ProcessGroup, initialize_arguments
from esm1nv_jax.training.run_config import ClusterConfig

EXIT_LOST = 1
PERIOD = 1.0  # seconds between two checks of the watchdog
LOST_AFTER = 18  # seconds without a heartbeat, then a process counts as lost
# Seconds; then JAX itself aborts, should the watchdog fail to act. It counts from a heartbeat that
# was sent up to half of this before a peer fell silent: half must be well above LOST_AFTER.
JAX_HEARTBEAT_TIMEOUT = 60
# Faults of the environment, whose message is complete without a traceback.
ENVIRONMENT_ERRORS = (TimeoutError, SaveError)


@contextlib.contextmanager
def join(timeouts: ClusterConfig) -> Iterator[tuple[ProcessGroup, Watchdog]]:
    """Start JAX on the cluster, if there is one, and watch the process while the body runs.

    An exception that leaves the body ends the whole run: with several processes this one publishes
    the reason and exits at once, since an orderly shutdown would wait for those that are gone.
    """
    arguments = initialize_arguments()
    if arguments is not None:
        _initialize(arguments, timeouts.start_timeout)
    group = ProcessGroup(timeouts.start_timeout)
    longest = max(timeouts.start_timeout, timeouts.stall_timeout)
    with Watchdog(group, longest, LOST_AFTER) as watchdog:
        try:
            yield group, watchdog
        except BaseException as error:
            if group.size > 1:
                _exit_group(group, error)
            if isinstance(error, ENVIRONMENT_ERRORS):
                print(f"error: {error}", file=sys.stderr)
                raise SystemExit(1) from None
            raise


def _initialize(arguments: dict[str, Any], start_timeout: float) -> None:
    def give_up(reason: str) -> None:
        print(
            f"the processes did not find each other in {start_timeout:.0f} s: {reason}; look for "
            "one that did not start, and see docs/clusters.md",
            file=sys.stderr,
            flush=True,
        )
        os._exit(1)

    # JAX would abort the process, with a stack of C++ in place of words.
    timer = threading.Timer(start_timeout, give_up, ["one is missing or cannot be reached"])
    timer.daemon = True
    timer.start()
    try:
        jax.distributed.initialize(
            **arguments,
            initialization_timeout=int(start_timeout) + 10,
            heartbeat_timeout_seconds=JAX_HEARTBEAT_TIMEOUT,
            shutdown_timeout_seconds=600,  # the others wait while process 0 summarises the run
        )
    except (jax.errors.JaxRuntimeError, RuntimeError) as error:
        give_up(str(error).splitlines()[0])
    finally:
        timer.cancel()


def _exit_group(group: ProcessGroup, error: BaseException) -> None:
    """End this process of several because of `error`, telling the others why."""
    status, reason = 1, f"{type(error).__name__}: {error}"
    if isinstance(error, UserError):
        status, reason = EXIT_USER, str(error)
    elif isinstance(error, KeyboardInterrupt):
        status, reason = EXIT_INTERRUPTED, "Ctrl-C"
    elif isinstance(error, SystemExit):
        status = error.code if isinstance(error.code, int) else 1
    abort = group.abort_record()
    if abort is not None and abort["process"] != group.index:
        print(abort_message(abort), file=sys.stderr, flush=True)
        os._exit(abort["status"])
    if isinstance(error, (UserError, *ENVIRONMENT_ERRORS)):
        print(f"error: {error}", file=sys.stderr)
    elif not isinstance(error, KeyboardInterrupt):
        traceback.print_exception(error)
    # An exception of a collective only says that a peer is gone, so that the cause is elsewhere.
    if any(word in str(error) for word in ("Gloo", "gloo", "NCCL", "coordination service")):
        print(
            f"process {group.index} on {group.host} lost its connection to a peer; the launcher "
            "names the one that died. Started again, the run resumes from its newest checkpoint",
            file=sys.stderr,
        )
    else:
        group.abort_all(status, reason)
    sys.stderr.flush()
    os._exit(status)


class Watchdog:
    """Ends this process when it makes no progress, or when a peer is lost; a context manager.

    No process hangs for ever, and none vanishes without a name. One thread exchanges heartbeats
    with the other processes through the key-value store, where calls may block; another only reads
    clocks, and so can always act.

    Args:
      group: the processes of the run.
      stall_timeout: seconds without `heartbeat`, after which every thread's stack is dumped and
        the process exits. The run lowers it once it has started.
      lost_after: seconds without a heartbeat from another process.

    SIGUSR1 dumps the stacks at any time.
    """

    def __init__(self, group: ProcessGroup, stall_timeout: float, lost_after: float):
        self.group, self.stall_timeout, self.lost_after = group, stall_timeout, lost_after
        self.log: TextIO = sys.stderr
        self.activity, self.activity_since = "starting", time.monotonic()
        self.hosts: list[str] = []  # known to process 0 once all have sent their names
        self.enabled = True  # whether a standstill is a fault
        self._closed = threading.Event()
        self._abort_received = threading.Event()
        self._store_answered = time.monotonic()
        self._abort: tuple[int, str] | None = None  # status, message
        self._peers: dict[str, tuple[str, float]] = {}  # process: (last heartbeat, its time)

    def heartbeat(self, activity: str) -> None:
        """Note that this process makes progress and begins `activity`."""
        self.activity, self.activity_since = activity, time.monotonic()

    def log_to(self, file: TextIO) -> None:
        """Dump stacks into `file` from now on."""
        self.log = file
        faulthandler.register(signal.SIGUSR1, file=file, all_threads=True)

    def __enter__(self) -> Watchdog:
        faulthandler.register(signal.SIGUSR1, file=sys.stderr, all_threads=True)
        threading.Thread(target=self._watch, name="watchdog", daemon=True).start()
        if self.group.client is not None:
            threading.Thread(target=self._exchange, name="heartbeats", daemon=True).start()
        return self

    def __exit__(self, *_) -> None:
        self._closed.set()

    def _watch(self) -> None:
        now = time.monotonic()
        while not self._closed.is_set():
            self._abort_received.wait(PERIOD)
            before, now = now, time.monotonic()
            if now - before > LOST_AFTER:  # by Ctrl-Z, say, all of this process stood still
                self.activity_since = min(now, self.activity_since + now - before)
            silent, stalled = now - self._store_answered, now - self.activity_since
            if self._abort is not None:
                self._exit(*self._abort, received=True)
            if self.group.client is not None and silent > self.lost_after:
                reason = (
                    "process 0, which holds the coordination service, has not answered for "
                    f"{silent:.0f} s: lost, and this run with it"
                )
                self._exit(EXIT_LOST, reason)
            if self.enabled and stalled > self.stall_timeout:
                reason = (
                    f"no progress for {stalled:.0f} s while {self.activity}; the stacks of every "
                    "process are in its log; started again, the run resumes from its newest "
                    "checkpoint"
                )
                publish = threading.Thread(
                    target=self.group.abort_all, args=(EXIT_LOST, reason), daemon=True
                )
                publish.start()
                self._exit(EXIT_LOST, reason)

    def _exit(self, status: int, message: str, received: bool = False) -> None:
        """End this process at once: nothing orderly can be waited for."""
        prefix = f"process {self.group.index} on {self.group.host}, {self.activity}: "
        for file in {self.log, sys.stderr}:
            print(prefix + message, file=file, flush=True)
        if status == EXIT_LOST:  # a user's mistake needs no stacks
            faulthandler.dump_traceback(self.log, all_threads=True)
        if received:
            client, key = self.group.client, f"left/{self.group.index}"
            with contextlib.suppress(jax.errors.JaxRuntimeError):  # process 0 has gone
                client.key_value_set(key, "", allow_overwrite=True)
        elif self.group.client is not None:
            time.sleep(3 * PERIOD)  # the others receive the reason before they see this one go
        os._exit(status)

    def _exchange(self) -> None:
        """Send heartbeats to process 0, and receive from it that the run is aborted."""
        client, index = self.group.client, self.group.index
        count = 0
        while not self._closed.is_set():
            count += 1
            try:
                client.key_value_set(f"alive/{index}", str(count), allow_overwrite=True)
                abort = self.group.abort_record()
                if abort is not None and abort["process"] != index and self._abort is None:
                    self._abort = abort["status"], abort_message(abort)
                    self._abort_received.set()
                if index == 0:
                    self._check_peers(dict(client.key_value_dir_get("alive/")))
                self._store_answered = time.monotonic()
            except jax.errors.JaxRuntimeError:
                pass  # the time of the last answer decides
            self._closed.wait(PERIOD)

    def _check_peers(self, heartbeats: dict[str, str]) -> None:
        now = time.monotonic()
        lost = []
        for key, heartbeat in heartbeats.items():
            process = key.rpartition("/")[2]
            last, when = self._peers.get(process, ("", now))
            if last != heartbeat:
                self._peers[process] = (heartbeat, now)
            elif now - when > self.lost_after and process != "0":
                lost.append(int(process))
        if lost and self._abort is None:
            names = ", ".join(self._name(process) for process in sorted(lost)[:6])
            reason = (
                f"{names}: no heartbeat for {self.lost_after:.0f} s, lost; started again, the run "
                "resumes from its newest checkpoint"
            )
            abort = {"process": 0, "host": self.group.host, "status": EXIT_LOST, "reason": reason}
            self.group.client.key_value_set(ABORT_KEY, json.dumps(abort))
            self._exit(EXIT_LOST, reason)

    def _name(self, process: int) -> str:
        host = f" on {self.hosts[process]}" if process < len(self.hosts) else ""
        return f"process {process}{host}"


def abort_message(abort: dict[str, Any]) -> str:
    """Return one line about the process that aborted the run."""
    return f"process {abort['process']} on {abort['host']} ended the run: {abort['reason']}"
