"""Where the figures of a run are kept: metrics.jsonl, and TensorBoard's events."""

from __future__ import annotations

import json
import math
import os
import time

from etils import epath

from esm1nv_jax.common import metrics_log
from esm1nv_jax.common.console import console
from esm1nv_jax.training import workdir


class Writer:
    """Appends figures to both; only the first process writes.

    Lines after `step`, left by a run that died after its last checkpoint, are dropped first, so
    that each figure stands once. A full disk does not end the run: lines wait in memory until there
    is room again.
    """

    def __init__(self, folder: epath.Path, step: int, enabled: bool):
        self.enabled = enabled
        if not enabled:
            return
        self.path = folder / metrics_log.FILE
        lines = self.path.read_text().splitlines() if self.path.exists() else []
        kept = [line for line in lines if _step(line) <= step]
        if len(kept) < len(lines):
            self.path.write_text("".join(f"{line}\n" for line in kept))
        self.file = workdir.appending(self.path)
        self.waiting, self.told = b"", False
        self.events, self.events_folder = None, folder / "tensorboard"
        self._tell(step + 1, {"session_log": {"status": 1}})  # hides what a run that died left

    def write(self, step: int, kind: str, values: dict[str, float]) -> None:
        """One line: `kind` is 'train', 'validation' or 'hosts'."""
        if not self.enabled:
            return
        from tensorboardX.summary import scalar

        line = {"step": step, "kind": kind, "time": round(time.time(), 3)}
        self.waiting += json.dumps(line | values).encode() + b"\n"
        self._append()
        named = values.items()
        self._tell(step, *({"summary": scalar(f"{kind}/{name}", x)} for name, x in named))

    def __enter__(self) -> Writer:
        return self

    def __exit__(self, *_) -> None:
        if not self.enabled:
            return
        self._append()
        self.file.close()
        if self.waiting:
            lost = self.waiting.count(b"\n")
            console.print(f"{lost} lines of {self.path} found no room and are lost")
            os.truncate(self.path, self.path.read_bytes().rfind(b"\n") + 1)  # whole lines only

    def _append(self) -> None:
        try:
            while self.waiting:
                self.waiting = self.waiting[self.file.write(self.waiting) :]
        except OSError as error:
            if not self.told:
                console.print(
                    f"{self.path} cannot be written ({error.strerror}): figures wait in "
                    "memory until there is room"
                )
            self.told = True

    def _tell(self, step: int, *contents: dict) -> None:
        """Events; where they cannot be written they are lost, and the next begin another file."""
        from tensorboardX.event_file_writer import EventsWriter
        from tensorboardX.proto.event_pb2 import Event

        try:
            if self.events is None:
                self.events_folder.mkdir(parents=True, exist_ok=True)
                self.events = EventsWriter(str(self.events_folder / "events"))
            for content in contents:
                self.events.write_event(Event(wall_time=time.time(), step=step, **content))
            self.events.flush()
        except OSError:
            self.events = None


def _step(line: str) -> float:
    """The step of a line; infinite for one cut short by a crash, so that it is dropped."""
    try:
        return json.loads(line)["step"]
    except (ValueError, KeyError, TypeError):
        return math.inf
