"""The first pass over the input: worker processes parse it and write every sequence to a shard.

A gzip file cannot be entered in the middle. So each of N workers decompresses everything, which is
a tenth of the work, and parses, checks and writes every N-th chunk of the text. Only digests and
counts are sent to the parent, and the content of a chunk does not depend on the number of workers.
"""

from __future__ import annotations

import dataclasses
import multiprocessing
import os
import sys
import time
from collections import Counter
from functools import partial
from itertools import compress
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import numpy as np

from esm1nv_jax.common import files
from esm1nv_jax.common.console import bar
from esm1nv_jax.common.errors import UserError
from esm1nv_jax.data import fasta, records, splits
from esm1nv_jax.data.compression import DecompressedFile
from esm1nv_jax.data.tokenizer import LETTERS

EVERY_KEY = (1 << 64) - 1  # `holdout_below` where every sequence is a holdout candidate
_FIRST_FAULTS = 20  # faults of a chunk that are kept one by one
_NO_MEMORY = 77  # exit status of a worker
_PROGRESS_SECONDS = 0.1


@dataclasses.dataclass(frozen=True)
class WorkerTask:
    """What all workers do.

    names: what messages call the sources. holdout_below: sequences with smaller keys are holdout
    candidates and go to shards of their own; only when all is read is it known which of them are
    held out. cluster_table: file of the array of `splits.load_table`.
    """

    sources: tuple[Path, ...]
    names: tuple[str, ...]
    folder: Path
    workers: int
    chunk_bytes: int
    seed: int
    holdout_below: int
    min_length: int
    max_length: int | None
    skip: bool
    cluster_table: Path | None


class Chunk:
    """The outcome of one chunk of text: columns of its sequences, in pieces, and counts.

    ids, contents: digests, uint64. keys: see `splits`, uint64. lengths: residues, uint32.
    sources: number of sequences by source. letters: composition, int64 [27]. candidates: number of
    holdout candidates. sha256: of the training shard.
    """

    def __init__(self, number: int):
        self.number = number
        self.ids: list[np.ndarray] = []
        self.contents: list[np.ndarray] = []
        self.keys: list[np.ndarray] = []
        self.lengths: list[np.ndarray] = []
        self.sources: Counter[int] = Counter()
        self.letters = np.zeros(len(LETTERS), np.int64)
        self.skipped: Counter[str] = Counter()
        self.normalized: Counter[str] = Counter()
        self.faults: list[str] = []
        self.candidates = self.without_cluster = 0
        self.sha256 = ""

    @property
    def sequences(self) -> int:
        return sum(self.sources.values())

    def train_file(self, folder: Path) -> Path:
        """The shard of the sequences that are certainly for training."""
        return folder / f"train-{self.number:06d}"

    def candidate_file(self, folder: Path) -> Path:
        """The shard of the holdout candidates."""
        return folder / f"candidates-{self.number:06d}"

    def files(self, folder: Path) -> list[tuple[Path, int]]:
        """Both shards, with the number of their sequences; one of none has no file."""
        train, candidates = self.train_file(folder), self.candidate_file(folder)
        return [(train, self.sequences - self.candidates), (candidates, self.candidates)]


@dataclasses.dataclass
class FirstPass:
    """All chunks in the order of the input; faults and checksums (MD5) of whole files."""

    chunks: list[Chunk]
    whole_files: Chunk
    md5: list[str]

    def take(self, column: str) -> np.ndarray:
        """One column of all chunks, [n]; the chunks give it up, so that it is held only once."""
        pieces = [piece for chunk in self.chunks for piece in getattr(chunk, column)]
        for chunk in self.chunks:
            setattr(chunk, column, [])
        return np.concatenate(pieces) if pieces else np.zeros(0, np.uint64)


def run(task: WorkerTask, lock: int, size: int) -> FirstPass:
    """Starts the workers, shows their progress through `size` bytes and waits for them.

    `lock` is a file descriptor that workers must not keep open. Raises UserError: of several faults
    the first in the input, whichever worker found it.

    The processes talk through pipes alone: a queue's locks and threads would make it hang when a
    worker dies or gets no memory, and need /dev/shm.
    """
    import tensorflow_datasets.proto  # noqa: F401  0.3 s: once, not in each forked worker

    # A fork starts at once, but would break the threads of JAX where it is loaded.
    fork = sys.platform == "linux" and "jax" not in sys.modules
    context: Any = multiprocessing.get_context("fork" if fork else "spawn")
    processes, connections = [], []
    chunks: list[Chunk] = []
    errors: list[tuple[int, tuple[int, int], str]] = []  # (chunk, (source, line), message)
    whole_files, md5 = Chunk(-1), []
    at = [(0, 0)] * task.workers  # (chunk, bytes) that a worker has reached
    try:
        for worker in range(task.workers):
            ours, theirs = context.Pipe(duplex=False)
            arguments = (task, worker, theirs, os.getpid(), (lock, ours.fileno()) if fork else ())
            process = context.Process(target=_work, args=arguments, daemon=True)
            try:
                process.start()
            except OSError as error:  # no process or no memory left
                failed = f"cannot start {task.workers} workers: {error.strerror}"
                raise UserError(f"{failed}; try fewer --workers") from error
            theirs.close()  # the end of a worker is the end of its pipe
            processes.append(process)
            connections.append(ours)
        if fork:
            records.check_threads(context, task.folder)
        running: dict[Any, int] = {connection: i for i, connection in enumerate(connections)}
        with bar("read", size / 1e6, "MB") as shown:
            while running:
                ready: list[Any] = wait(list(running))
                for connection in ready:
                    worker = running[connection]
                    try:
                        message = connection.recv()
                    except EOFError:
                        raise _death(processes[worker]) from None
                    match message:
                        case "progress", number, done:
                            at[worker] = number, done
                            shown.update(sum(done for _, done in at) / task.workers / 1e6)
                        case "chunk", chunk:
                            for path, count in chunk.files(task.folder):
                                if count:
                                    records.check_shard(path, count)
                            chunks.append(chunk)
                        case "error", number, position, text:
                            errors.append((number, position, text))
                            del running[connection]
                        case "end", faults, checksums:
                            if checksums:
                                whole_files, md5 = faults, checksums
                            del running[connection]
                if errors and all(at[worker][0] > min(errors)[0] for worker in running.values()):
                    break  # no running worker can find an earlier fault
            if not errors:
                shown.update(size / 1e6)
    finally:
        for process in processes:
            process.kill()
            process.join()
    if errors:
        raise UserError(min(errors)[2])
    return FirstPass(sorted(chunks, key=lambda chunk: chunk.number), whole_files, md5)


def _death(process) -> Exception:
    """The error for a worker that ended without a result."""
    process.join()
    if process.exitcode == _NO_MEMORY:
        return UserError("a worker ran out of memory; try fewer --workers")
    if process.exitcode < 0:
        killed = f"a worker was killed by signal {-process.exitcode}"
        return UserError(f"{killed}; if memory ran out, try fewer --workers")
    return RuntimeError("a worker failed; its error is printed above")


def _work(
    task: WorkerTask, number: int, connection: Connection, parent: int, close: tuple[int, ...]
) -> None:
    """Runs in a process of its own; sends (kind, ...), at last "error" or "end"."""
    for descriptor in close:
        os.close(descriptor)
    worker = _Worker(task, number, connection, parent)
    try:
        worker.run()
    except UserError as error:
        connection.send(("error", worker.number, (worker.source, worker.line), str(error)))
    except MemoryError:
        os._exit(_NO_MEMORY)
    except (KeyboardInterrupt, BrokenPipeError):
        os._exit(1)  # the parent ends, and says why


class _Worker:
    def __init__(self, task: WorkerTask, worker: int, connection: Connection, parent: int):
        self.task, self.worker, self.parent, self.connection = task, worker, parent, connection
        self.source, self.line, self.number = 0, 1, 0
        self.table = None
        if task.cluster_table is not None:
            self.table = np.load(task.cluster_table, mmap_mode="r")
        self.chunk: Chunk | None = None
        # All workers see the faults of whole files; the first worker reports them.
        self.whole_files = Chunk(-1)

    def run(self) -> None:
        md5, seen, behind, sent = [], 0, 0, 0.0
        for source, path in enumerate(self.task.sources):
            self.source, self.line = source, 1
            file = DecompressedFile(path, self.worker == 0, self.task.names[source])
            on_fault = partial(self._fault, self.whole_files)
            texts = fasta.whole_records(file, on_fault, self.whole_files.normalized)
            for line, text in texts:
                number, seen = seen // self.task.chunk_bytes, seen + len(text)
                if number != self.number or time.monotonic() > sent + _PROGRESS_SECONDS:
                    self.connection.send(("progress", number, behind + file.read_bytes))
                    sent = time.monotonic()
                    if os.getppid() != self.parent:  # it was killed
                        os._exit(1)
                self.line, self.number = line, number
                if number % self.task.workers == self.worker:
                    self._add(line, text)
            if self.worker == 0:
                md5.append(file.md5())
            behind += file.read_bytes
        self._end_chunk()
        self.connection.send(("end", self.whole_files, md5))

    def _fault(self, chunk: Chunk, line: int, kind: str, message: str) -> None:
        message = f"{self.task.names[self.source]}, line {line}: {message}"
        self.line = line
        if not self.task.skip:
            raise UserError(f"{message}; fix it, or skip such records with --on-error=skip")
        chunk.skipped[kind] += 1
        if len(chunk.faults) < _FIRST_FAULTS:
            chunk.faults.append(message)

    def _add(self, line: int, text: bytes) -> None:
        """Parses a text and writes its records into the shards of its chunk."""
        task = self.task
        if self.chunk is None or self.chunk.number != self.number:
            self._end_chunk()
            self.chunk = Chunk(self.number)
            self.train = records.ShardWriter(self.chunk.train_file(task.folder))
            self.candidates = records.ShardWriter(self.chunk.candidate_file(task.folder))
        chunk = self.chunk
        parsed = fasta.parse(text, line, partial(self._fault, chunk), chunk.normalized)
        parsed = self._select_lengths(parsed, chunk)
        if not parsed.ids:
            return
        contents = splits.checksums(parsed.sequences)
        group = contents
        if self.table is not None:
            cluster, found = splits.look_up(self.table, parsed.ids)
            group = np.where(found, cluster, contents)
            chunk.without_cluster += int(np.count_nonzero(~found))
        keys = splits.keys(group, task.seed)
        encoded = records.encode(parsed)
        candidate = keys < np.uint64(task.holdout_below)
        self.candidates.write_all(list(compress(encoded, candidate.tolist())))
        self.train.write_all(list(compress(encoded, (~candidate).tolist())))
        chunk.ids.append(splits.digests(parsed.ids))
        chunk.contents.append(contents)
        chunk.keys.append(keys)
        chunk.lengths.append(np.fromiter(map(len, parsed.sequences), np.uint32))
        chunk.letters += records.composition(b"".join(parsed.sequences))
        chunk.sources[self.source] += len(keys)

    def _select_lengths(self, parsed: fasta.Records, chunk: Chunk) -> fasta.Records:
        """The records between the bounds on lengths; the others are counted."""
        least, most = self.task.min_length, self.task.max_length or fasta.MAX_RECORD
        lengths = list(map(len, parsed.sequences))
        if least <= min(lengths, default=least) and max(lengths, default=0) <= most:
            return parsed
        chunk.skipped[f"shorter than {least}"] += sum(n < least for n in lengths)
        chunk.skipped[f"longer than {most}"] += sum(n > most for n in lengths)
        fits = [least <= n <= most for n in lengths]
        return fasta.Records(*(list(compress(part, fits)) for part in parsed))

    def _end_chunk(self) -> None:
        if self.chunk is None:
            return
        for writer in (self.train, self.candidates):
            writer.close()
            if writer.count == 0:
                writer.path.unlink()
        self.chunk.candidates = self.candidates.count
        if self.train.count:
            with files.writing(self.train.path):
                self.chunk.sha256 = records.file_checksum(self.train.path)
        self.connection.send(("chunk", self.chunk))
        self.chunk = None
