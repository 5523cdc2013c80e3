"""Two threads beside a run, so that no process hangs for ever and none vanishes without a name.

One exchanges heartbeats with the other processes through the key-value store, where calls may
block; the other only reads clocks, and so can always act.
"""

from __future__ import annotations

import faulthandler
import json
import os
import signal
import sys
import threading
import time
from typing import Any, TextIO

import jax

from esm1nv_jax.training.process_group import ABORT_KEY, ProcessGroup

EXIT_LOST = 1
PERIOD = 1.0  # seconds between two checks


class Watchdog:
    """Ends this process when it makes no progress, or when a peer is lost; a context manager.

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
        self.enabled = True
        self._closed = threading.Event()
        self._abort_received = threading.Event()
        self._store_answered = time.monotonic()
        self._abort: tuple[int, str] | None = None  # status, message
        self._peers: dict[str, tuple[str, float]] = {}  # process: (last heartbeat, its time)

    def heartbeat(self, activity: str) -> None:
        """Note that this process makes progress and begins `activity`."""
        self.activity, self.activity_since = activity, time.monotonic()

    def disable(self) -> None:
        """Stop treating a standstill as a fault."""
        self.enabled = False

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
        while not self._closed.is_set():
            self._abort_received.wait(PERIOD)
            now = time.monotonic()
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
            self.group.client.key_value_set(f"left/{self.group.index}", "", allow_overwrite=True)
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
