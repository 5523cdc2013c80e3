"""One protein as one record: a `tf.train.Example` in an ArrayRecord shard, as TFDS reads it.

Records are not compressed: a protein compresses by a quarter only, which triples the cost of
writing it and doubles that of reading it at random.
"""

from __future__ import annotations

import functools
import hashlib
import os
import resource
import threading
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
from array_record.python.array_record_module import ArrayRecordReader, ArrayRecordWriter

from esm1nv_jax.common import files
from esm1nv_jax.common.errors import UserError
from esm1nv_jax.data.fasta import Records
from esm1nv_jax.data.tokenizer import LETTERS

FEATURES = ("id", "sequence", "description")
_OPTIONS = "group_size:1,uncompressed"  # records are read one at a time, at random
_ERRORS = (OSError, RuntimeError, ValueError)  # that array_record raises where a disk fails
_RANDOM_ACCESS = "readahead_buffer_size:0,max_parallelism:0"
_LETTER_CODES = np.frombuffer(LETTERS.encode(), np.uint8)
_IMPORT = threading.Lock()


@functools.cache
def _tf_example_pb2():
    """TFDS's protobuf module, which takes 0.3 s to import.

    By one thread at a time: threads that import TFDS at once can wait for each other for ever, and
    Grain's DataLoader reads the first records in sixteen.
    """
    with _IMPORT:
        from tensorflow_datasets.proto import tf_example_pb2

        return tf_example_pb2


def encode(records: Records) -> list[bytes]:
    """Serialized Examples. Map entries are sorted by key, so that the sequence comes last."""
    tf_example_pb2 = _tf_example_pb2()
    # Reusing one message is three times as fast. It frees no value before it is freed itself, so
    # it serves one call only.
    example = tf_example_pb2.Example()
    values = [example.features.feature[name].bytes_list.value for name in FEATURES]
    for value in values:
        value.append(b"")
    (id_value, sequence_value, description_value), encoded = values, []
    for name, description, sequence in zip(*records, strict=True):
        id_value[0], sequence_value[0], description_value[0] = name, sequence, description
        encoded.append(example.SerializePartialToString(deterministic=True))
    return encoded


def decode(record: bytes) -> tuple[bytes, bytes, bytes]:
    """(id, sequence, description) of a record."""
    feature = _tf_example_pb2().Example.FromString(record).features.feature
    name, sequence, description = (feature[k].bytes_list.value[0] for k in FEATURES)
    return name, sequence, description


@functools.cache
def _sequence_head(length: int) -> bytes:
    """The bytes that precede a sequence of `length` residues in its record."""
    features = _tf_example_pb2().Example().features
    features.feature["sequence"].bytes_list.value.append(bytes(length))
    return features.SerializeToString()[: -length or None]


def sequence_of(record: bytes, length: int) -> bytes | None:
    """The sequence of a record if it has `length` residues, else None; 6 times as fast as `decode`.

    The sequence is the last entry of a record, and the bytes before it depend on its length only.
    """
    start = len(record) - length
    return record[start:] if record.endswith(_sequence_head(length), 0, start) else None


def open_shard(path: Path) -> ArrayRecordReader:
    """A reader for random access. Raises UserError where the file cannot be opened."""
    try:
        return ArrayRecordReader(str(path), _RANDOM_ACCESS, file_reader_buffer_size=32_768)
    except _ERRORS as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"cannot read {path}: {reason}; run esm1nv prepare --verify") from error


class ShardWriter:
    """Writes one shard. Raises UserError where the disk fails."""

    def __init__(self, path: Path):
        self.path, self.count = path, 0
        with files.writing(path, errors=_ERRORS):
            self._writer = ArrayRecordWriter(str(path), _OPTIONS)

    def write_all(self, records: Sequence[bytes]) -> None:
        with files.writing(self.path, errors=_ERRORS):
            for record in records:
                self._writer.write(record)
        self.count += len(records)

    def close(self) -> None:
        with files.writing(self.path, errors=_ERRORS):
            self._writer.close()


def check_shard(path: Path, count: int) -> None:
    """Raises UserError where a shard does not read back with as many records as were written."""
    with files.writing(path, errors=_ERRORS):
        found = ArrayRecordReader(str(path), _RANDOM_ACCESS).num_records()
    if found != count:
        raise UserError(f"{path} holds {found} of {count} records; no space left on its disk?")


def check_threads(context: Any, folder: Path, seconds: float = 30) -> None:
    """Raises UserError where this process could not read a shard, and would wait for ever.

    The first reader of a process starts 64 threads (array_record 0.8), and never returns where it
    gets fewer. They take 64 stacks and, once they allocate, up to 16 arenas of malloc: a trial may
    get by with less than the next reader, so that a limit on memory is compared with it all.
    `context`: of multiprocessing, with fork. `seconds`: it takes milliseconds.
    """
    refusal = UserError(
        "cannot start the 64 threads that reading a shard takes, of 1.6 GB of virtual memory; "
        "raise the limits on memory and processes (ulimit -v, ulimit -u)"
    )
    limit = resource.getrlimit(resource.RLIMIT_AS)[0]
    if limit != resource.RLIM_INFINITY:
        pages = int(Path("/proc/self/statm").read_text(encoding="utf-8").split()[0])
        if limit - pages * resource.getpagesize() < 1.6e9:
            raise refusal
    path = folder / "trial"
    writer = ShardWriter(path)
    writer.write_all([b"trial"])
    writer.close()
    process = context.Process(target=_exit_after_reading, args=(path,), daemon=True)
    with suppress(OSError):
        process.start()
        process.join(seconds)
        path.unlink()
        if process.exitcode == 0:
            return
        process.kill()
        process.join()
    raise refusal


def _exit_after_reading(path: Path) -> None:
    with suppress(UserError):
        check_shard(path, 1)
        os._exit(0)
    os._exit(1)


def composition(sequences: bytes) -> np.ndarray:
    """How often each of LETTERS occurs: int64 [27]."""
    return np.bincount(np.frombuffer(sequences, np.uint8), minlength=256)[_LETTER_CODES]


def file_checksum(path: Path) -> str:
    """The SHA-256 of a file."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
