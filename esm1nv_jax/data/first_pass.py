"""One worker's part of a preparation: it reads all of the input and keeps every N-th stretch of it.

A gzip file cannot be entered in the middle. Each worker therefore decompresses everything, which is
a tenth of the work, and parses, checks and writes its own units only; nothing but digests and
counts passes between processes, and what a unit holds does not depend on the number of workers.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import os
import string
import threading
import time
from collections import Counter
from pathlib import Path

import numpy as np

from esm1nv_jax.common.errors import UserError
from esm1nv_jax.data import clusters, fasta, splits
from esm1nv_jax.data.compression import Archive
from esm1nv_jax.data.records import Writer, disk_error, encode
from esm1nv_jax.data.tokenizer import RESIDUES

LETTERS = string.ascii_uppercase + "*"
_CODES = np.frombuffer(LETTERS.encode(), np.uint8)
_COMMON_FIRST = [LETTERS.index(a) for a in RESIDUES] + [LETTERS.index(a) for a in "J*"]
_CACHED = 1 << 16  # bytes looked at again and again
_SHOWN = 20  # faults that the manifest names one by one


@dataclasses.dataclass(frozen=True)
class Job:
    """What every worker is told.

    `names`: what the person calls the sources. `held_below`: sequences with smaller keys may be
    held out, and go to shards of their own. Only when all is read is it known which of them are;
    the others are never written twice.
    """

    sources: tuple[Path, ...]
    names: tuple[str, ...]
    folder: Path
    workers: int
    unit_bytes: int
    seed: int
    held_below: int
    min_length: int
    max_length: int | None
    skip: bool
    map: Path | None


@dataclasses.dataclass
class Unit:
    """What one stretch of the input came to. Arrays [kept], in the order of the input."""

    number: int
    ids: list[np.ndarray] = dataclasses.field(default_factory=list)
    contents: list[np.ndarray] = dataclasses.field(default_factory=list)
    keys: list[np.ndarray] = dataclasses.field(default_factory=list)
    lengths: list[np.ndarray] = dataclasses.field(default_factory=list)
    sources: Counter = dataclasses.field(default_factory=Counter)
    letters: np.ndarray = dataclasses.field(
        default_factory=lambda: np.zeros(len(LETTERS), np.int64)
    )
    skipped: Counter = dataclasses.field(default_factory=Counter)
    mended: Counter = dataclasses.field(default_factory=Counter)
    faults: list[str] = dataclasses.field(default_factory=list)
    without_cluster: int = 0
    checksum: str = ""  # of the shard for training

    def join(self) -> None:
        for name, dtype in (("ids", "u8"), ("contents", "u8"), ("keys", "u8"), ("lengths", "u4")):
            setattr(self, name, np.concatenate([*getattr(self, name), np.zeros(0, dtype)]))


def shard(folder: Path, unit: int) -> Path:
    """The part of a unit that is surely for training."""
    return folder / f"train-{unit:06d}"


def maybe_shard(folder: Path, unit: int) -> Path:
    """The part of a unit that may be held out."""
    return folder / f"maybe-{unit:06d}"


def composition(sequences: bytes) -> np.ndarray:
    """How often each of LETTERS occurs: int64 [27]."""
    counts = np.zeros(len(LETTERS), np.int64)
    for start in range(0, len(sequences), _CACHED):
        letters = np.frombuffer(sequences[start : start + _CACHED], np.uint8)
        left = len(letters)
        for i in _COMMON_FIRST:
            if not left:  # most often before the rare letters' turn
                break
            n = np.count_nonzero(letters == _CODES[i])
            counts[i] += n
            left -= n
    return counts


def checksum(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def work(job: Job, worker: int, done, stop, results, parent: int, leave: tuple[int, ...]) -> None:
    """Runs in a process of its own. Puts (kind, ...) into `results`, last of all ('end', worker).

    `done[worker]` is the bytes read so far. No unit past `stop` is begun: there is an error in it.
    It ends when the process `parent` does. `leave` are file descriptors of the parent's that this
    process must not keep open.
    """
    for descriptor in leave:
        os.close(descriptor)
    threading.Thread(target=_end_with, args=(parent,), daemon=True).start()
    with contextlib.suppress(KeyboardInterrupt):
        _Worker(job, worker, done, stop, results).run()
        results.put(("end", worker))


def _end_with(parent: int) -> None:
    """A parent that was killed cannot end its workers, and they would wait for it for ever."""
    while os.getppid() == parent:
        time.sleep(0.2)
    os._exit(1)


class _Worker:
    def __init__(self, job: Job, worker: int, done, stop, results):
        self.job, self.worker = job, worker
        self.done, self.stop, self.results = done, stop, results
        self.map = None if job.map is None else np.load(job.map, mmap_mode="r")
        self.unit: Unit | None = None
        self.train: Writer | None = None
        self.maybe: Writer | None = None
        self.checksums: list[str] = []
        # Faults of whole files are seen by all workers, and told by the first.
        self.of_files = Unit(-1)

    def run(self) -> None:
        self.source, self.line, self.number, seen, behind = 0, 1, 0, 0, 0
        try:
            for source, path in enumerate(self.job.sources):
                self.source, self.line = source, 1
                archive = Archive(path, self.worker == 0, self.job.names[source])
                chunks = fasta.chunks(archive, self._file_fault, self.of_files.mended)
                for line, text in chunks:
                    self.line = line
                    self.number, seen = seen // self.job.unit_bytes, seen + len(text)
                    self.done[self.worker] = behind + archive.read_bytes
                    if self.number > self.stop.value:
                        return
                    if self.number % self.job.workers == self.worker:
                        self._take(line, text)
                if self.worker == 0:
                    self.checksums.append(archive.md5())
                behind += archive.read_bytes
            self._end_unit()
        except UserError as error:
            with self.stop.get_lock():
                self.stop.value = min(self.stop.value, self.number)
            self.results.put(("error", (self.source, self.line), str(error)))
            return
        if self.worker == 0:
            self.results.put(("files", self.of_files, self.checksums))

    def _file_fault(self, line: int, kind: str, fault: str) -> None:
        self._fault(self.of_files, line, kind, fault)

    def _record_fault(self, line: int, kind: str, fault: str) -> None:
        self._fault(self.unit, line, kind, fault)

    def _fault(self, unit: Unit, line: int, kind: str, fault: str) -> None:
        where = f"{self.job.names[self.source]}, line {line}: {fault}"
        self.line = line
        if not self.job.skip:
            raise UserError(f"{where}; mend it, or pass over such faults with --on_error=skip")
        unit.skipped[kind] += 1
        if len(unit.faults) < _SHOWN:
            unit.faults.append(where)

    def _take(self, line: int, text: bytes) -> None:
        """Parses a chunk and writes its records into the shards of its unit."""
        if self.unit is None or self.unit.number != self.number:
            self._end_unit()
            self.unit = Unit(self.number)
            self.train = Writer(shard(self.job.folder, self.number))
            self.maybe = Writer(maybe_shard(self.job.folder, self.number))
        unit, job = self.unit, self.job
        records = fasta.parse(text, line, self._record_fault, unit.mended)
        records, lengths = self._of_fitting_length(records)
        if not records.ids:
            return
        ids = clusters.digests(records.ids)
        contents = clusters.checksums(records.sequences)
        together = contents
        if self.map is not None:
            cluster, known = clusters.look_up(self.map, records.ids)
            together = np.where(known, cluster, contents)
            unit.without_cluster += int(np.count_nonzero(~known))
        keys = splits.keys(together, job.seed)
        encoded = list(map(encode, records.ids, records.sequences, records.descriptions))
        maybe = keys < np.uint64(job.held_below)
        if maybe.any():
            self.maybe.write_all([encoded[i] for i in np.flatnonzero(maybe).tolist()])
            encoded = [encoded[i] for i in np.flatnonzero(~maybe).tolist()]
        self.train.write_all(encoded)
        unit.ids.append(ids)
        unit.contents.append(contents)
        unit.keys.append(keys)
        unit.lengths.append(lengths)
        unit.letters += composition(b"".join(records.sequences))
        unit.sources[self.source] += len(ids)

    def _of_fitting_length(self, records: fasta.Records) -> tuple[fasta.Records, np.ndarray]:
        job = self.job
        lengths = np.fromiter(map(len, records.sequences), np.uint32, len(records.sequences))
        short = lengths < job.min_length
        long = np.zeros_like(short) if job.max_length is None else lengths > job.max_length
        if not (short.any() or long.any()):
            return records, lengths
        self.unit.skipped[f"shorter than {job.min_length}"] += int(short.sum())
        self.unit.skipped[f"longer than {job.max_length}"] += int(long.sum())
        fit = np.flatnonzero(~(short | long))
        return fasta.Records(*([part[i] for i in fit.tolist()] for part in records)), lengths[fit]

    def _end_unit(self) -> None:
        if self.unit is None:
            return
        for writer in (self.train, self.maybe):
            writer.close()
            if writer.count == 0:
                writer.path.unlink()
        self.unit.join()
        if self.train.count:
            try:
                self.unit.checksum = checksum(self.train.path)
            except OSError as failure:
                raise disk_error(self.train.path, failure) from failure
        self.results.put(("unit", self.unit))
        self.unit = None
