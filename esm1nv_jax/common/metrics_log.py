"""The metrics of a run: `metrics.jsonl` in its folder, one JSON object a line, and TensorBoard."""

from __future__ import annotations

import json
import os
import time
from typing import Any

from etils import epath

from esm1nv_jax.common.console import console
from esm1nv_jax.common.files import open_append, write_atomically, writing

FILE = "metrics.jsonl"


def read(run_dir: epath.PathLike) -> list[dict[str, Any]]:
    """Return every line in order, but for those that a crash or a full disk has damaged.

    Raises OSError where the file cannot be read.
    """
    lines = (epath.Path(run_dir) / FILE).read_bytes().splitlines()
    return [record for record in map(_record, lines) if record is not None]


class MetricsWriter:
    """Appends metrics to both files, on process 0 only; a context manager.

    Lines after `step`, left by a run that died after its last checkpoint, are dropped first, so
    that every step stands once. A full disk does not end the run: lines wait in memory until there
    is room again.
    """

    def __init__(self, run_dir: epath.Path, step: int, enabled: bool):
        self.enabled = enabled
        if not enabled:
            return
        self.path = run_dir / FILE
        with writing(self.path, errors=(OSError, UnicodeDecodeError)):  # a folder, no permission
            text = self.path.read_text() if self.path.exists() else ""
            lines = text.splitlines()
            kept = [f"{line}\n" for line in lines if (x := _record(line)) and x["step"] <= step]
            if "".join(kept) != text:
                write_atomically(self.path, "".join(kept))
            self._file = open_append(self.path)
        self._pending, self._warned = b"", False
        self._events: Any = None
        self._events_dir = run_dir / "tensorboard"
        self._write_events(step + 1, {"session_log": {"status": 1}})  # hides what was dropped

    def write(self, step: int, kind: str, metrics: dict[str, float]) -> None:
        """Append one line. `kind` is 'train', 'validation' or 'hosts'."""
        if not self.enabled:
            return
        from tensorboardX.summary import scalar

        record = {"step": step, "kind": kind, "time": round(time.time(), 3)} | metrics
        self._pending += json.dumps(record).encode() + b"\n"
        self._append()
        summaries = ({"summary": scalar(f"{kind}/{name}", x)} for name, x in metrics.items())
        self._write_events(step, *summaries)

    def __enter__(self) -> MetricsWriter:
        return self

    def __exit__(self, *_) -> None:
        if not self.enabled:
            return
        self._append()
        self._file.close()
        if self._pending:
            lost = self._pending.count(b"\n")
            console.print(f"{lost} lines of {self.path} found no room and are lost")
            os.truncate(self.path, self.path.read_bytes().rfind(b"\n") + 1)  # whole lines only

    def _append(self) -> None:
        try:
            while self._pending:
                self._pending = self._pending[self._file.write(self._pending) :]
        except OSError as error:
            if not self._warned:
                console.print(
                    f"{self.path} cannot be written ({error.strerror}): metrics wait in memory "
                    "until there is room"
                )
            self._warned = True

    def _write_events(self, step: int, *contents: dict) -> None:
        """Write TensorBoard events; after a failure the next ones begin another file."""
        from tensorboardX.event_file_writer import EventsWriter
        from tensorboardX.proto.event_pb2 import Event

        try:
            if self._events is None:
                self._events_dir.mkdir(parents=True, exist_ok=True)
                self._events = EventsWriter(str(self._events_dir / "events"))
            for content in contents:
                self._events.write_event(Event(wall_time=time.time(), step=step, **content))
            self._events.flush()
        except OSError:
            self._events = None


def _record(line: str | bytes) -> dict[str, Any] | None:
    """What a line says; None of a damaged one, such as one cut short by a crash."""
    try:
        record = json.loads(line)
    except ValueError:
        return None
    whole = isinstance(record, dict) and "kind" in record and isinstance(record.get("step"), int)
    return record if whole else None
