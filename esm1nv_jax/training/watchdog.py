"""Two threads beside a run: no process may hang for ever, and none may vanish without a name.

One keeps in touch with the other processes through the key-value store, where calls may block; the
other only looks at clocks, and so can always act.
"""

from __future__ import annotations

import faulthandler
import json
import os
import signal
import sys
import threading
import time
from typing import TYPE_CHECKING, TextIO

import jax

if TYPE_CHECKING:
    from esm1nv_jax.training.process_group import Team

EXIT_LOST = 1
END = "end"  # key under which the first process that fails says why, for all
PERIOD = 1.0  # seconds between two looks


class Watchdog:
    """Ends this process when it stands still, or when another is lost; while open.

    limit: seconds without `beat`, after which every thread's stack is dumped and the process
    leaves; start-up has one of its own. lost_after: seconds without a sign of life from another
    process. SIGUSR1 dumps the stacks at any time.
    """

    def __init__(self, team: Team, limit: float, lost_after: float):
        self.team, self.limit, self.lost_after = team, limit, lost_after
        self.log: TextIO = sys.stderr
        self.doing, self.since = "starting", time.monotonic()
        self.hosts: list[str] = []  # known to process 0 once all have said who they are
        self.watching = True
        self._closed = threading.Event()
        self._heard_of_end = threading.Event()
        self._heard = time.monotonic()  # when the store last answered
        self._lost: tuple[int, str] | None = None  # status, message
        self._signs: dict[str, tuple[str, float]] = {}  # process: (its last sign, when it came)

    def beat(self, doing: str) -> None:
        """This process makes progress, and is about to do something new."""
        self.doing, self.since = doing, time.monotonic()

    def rest(self) -> None:
        """From here on standing still is no fault."""
        self.watching = False

    def log_to(self, file: TextIO) -> None:
        """Where stacks go from now on."""
        self.log = file
        faulthandler.register(signal.SIGUSR1, file=file, all_threads=True)

    def __enter__(self) -> Watchdog:
        faulthandler.register(signal.SIGUSR1, file=sys.stderr, all_threads=True)
        threading.Thread(target=self._look, name="watchdog", daemon=True).start()
        if self.team.client is not None:
            threading.Thread(target=self._keep_in_touch, name="signs of life", daemon=True).start()
        return self

    def __exit__(self, *_) -> None:
        self._closed.set()

    def _look(self) -> None:
        while not self._closed.is_set():
            self._heard_of_end.wait(PERIOD)
            now = time.monotonic()
            silent = now - self._heard
            if self._lost is not None:
                self._leave(*self._lost, heard=True)
            if self.team.client is not None and silent > self.lost_after:
                self._leave(
                    EXIT_LOST,
                    "process 0, which holds the coordination service, has not "
                    f"answered for {silent:.0f} s: lost, and this run with it",
                )
            if self.watching and now - self.since > self.limit:
                self._stalled(now - self.since)

    def _stalled(self, seconds: float) -> None:
        reason = (
            f"no progress for {seconds:.0f} s while {self.doing}; the stacks of every process are "
            "in its log; started again, the run goes on from its newest checkpoint"
        )
        threading.Thread(target=self.team.end_all, args=(EXIT_LOST, reason), daemon=True).start()
        self._leave(EXIT_LOST, reason)

    def _leave(self, status: int, message: str, heard: bool = False) -> None:
        """Ends this process: nothing orderly can be waited for."""
        me = f"process {self.team.process} on {self.team.host}, {self.doing}: "
        for file in {self.log, sys.stderr}:
            print(me + message, file=file, flush=True)
        if status == EXIT_LOST:  # a mistake of the user's needs no stacks
            faulthandler.dump_traceback(self.log, all_threads=True)
        if heard:
            self.team.client.key_value_set(f"left/{self.team.process}", "", allow_overwrite=True)
        elif self.team.client is not None:
            time.sleep(3 * PERIOD)  # the others hear the reason first, and then see this one go
        os._exit(status)

    def _keep_in_touch(self) -> None:
        """Signs of life to process 0, and from it the word that one was lost or has given up."""
        client, me = self.team.client, self.team.process
        count = 0
        while not self._closed.is_set():
            count += 1
            try:
                client.key_value_set(f"alive/{me}", str(count), allow_overwrite=True)
                said = self.team.ended()
                if said is not None and said["process"] != me and self._lost is None:
                    self._lost = said["status"], told(said)
                    self._heard_of_end.set()
                if me == 0:
                    self._look_for_lost(dict(client.key_value_dir_get("alive/")))
                self._heard = time.monotonic()
            except jax.errors.JaxRuntimeError:
                pass  # the clock of `_heard` decides
            self._closed.wait(PERIOD)

    def _look_for_lost(self, signs: dict[str, str]) -> None:
        now = time.monotonic()
        lost = []
        for key, sign in signs.items():
            process = key.rpartition("/")[2]
            last, when = self._signs.get(process, ("", now))
            if last != sign:
                self._signs[process] = (sign, now)
            elif now - when > self.lost_after and process != "0":
                lost.append(int(process))
        if lost and self._lost is None:
            who = ", ".join(self._name(process) for process in sorted(lost)[:6])
            reason = (
                f"{who}: no sign of life for {self.lost_after:.0f} s, lost; started again, the run "
                "goes on from its newest checkpoint"
            )
            note = {"process": 0, "host": self.team.host, "status": EXIT_LOST, "reason": reason}
            self.team.client.key_value_set(END, json.dumps(note))
            self._leave(EXIT_LOST, reason)

    def _name(self, process: int) -> str:
        host = f" on {self.hosts[process]}" if process < len(self.hosts) else ""
        return f"process {process}{host}"


def told(said: dict) -> str:
    """One line for what the first process that failed said to all."""
    return f"process {said['process']} on {said['host']} ended the run: {said['reason']}"
