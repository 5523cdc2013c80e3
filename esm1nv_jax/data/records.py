"""One protein as one record of a shard: a `tf.train.Example` in an ArrayRecord file.

The three features are what TFDS reads back as `id`, `sequence` and `description`. Encoding by hand
what the protobuf library would write, byte for byte, is six times as fast, and spares each worker
the import of TFDS; a test compares the two.

Records are not compressed: a protein compresses by a quarter only, which triples the cost of
writing it and doubles that of reading it at random.
"""

from __future__ import annotations

import errno
from collections.abc import Sequence
from pathlib import Path

from array_record.python.array_record_module import ArrayRecordReader, ArrayRecordWriter

from esm1nv_jax.common.errors import UserError

_OPTIONS = "group_size:1,uncompressed"  # records are read one at a time, at random
_RANDOM_ACCESS = "readahead_buffer_size:0,max_parallelism:0"


def _varint(n: int) -> bytes:
    """Protobuf's little-endian integer, seven bits a byte."""
    out = bytearray()
    while n > 0x7F:
        out.append(n & 0x7F | 0x80)
        n >>= 7
    out.append(n)
    return bytes(out)


def _delimited(field: int, length: int) -> bytes:
    """The head of a length-delimited field."""
    return bytes([field << 3 | 2]) + _varint(length)


class _Heads(dict):
    """What comes before a feature's value, by the length of the value."""

    def __init__(self, name: bytes):
        self.name = _delimited(1, len(name)) + name

    def __missing__(self, length: int) -> bytes:
        value = _delimited(1, length)  # BytesList.value
        listed = _delimited(1, len(value) + length) + value  # Feature.bytes_list
        feature = _delimited(2, len(listed) + length) + listed  # the map entry's value
        entry = self.name + feature
        self[length] = head = _delimited(1, len(entry) + length) + entry  # Features.feature
        return head


class _Wholes(dict):
    """What comes before all features, by the length of them all."""

    def __missing__(self, length: int) -> bytes:
        self[length] = head = _delimited(1, length)
        return head


_DESCRIPTION, _ID, _SEQUENCE = _Heads(b"description"), _Heads(b"id"), _Heads(b"sequence")
_WHOLE = _Wholes()


def encode(name: bytes, sequence: bytes, description: bytes) -> bytes:
    """The serialised Example, as `SerializeToString(deterministic=True)` gives it."""
    features = b"".join(
        (
            _DESCRIPTION[len(description)],
            description,
            _ID[len(name)],
            name,
            _SEQUENCE[len(sequence)],
            sequence,
        )
    )
    return _WHOLE[len(features)] + features


def sequence_of(record: bytes, length: int) -> bytes | None:
    """The sequence of a record, known to have `length` residues; None where it has not.

    The sequence comes last in a record, and what stands before it follows from its length.
    """
    head = _SEQUENCE[length]
    start = len(record) - length
    return record[start:] if record.endswith(head, 0, start) else None


def decode(record: bytes) -> tuple[bytes, bytes, bytes]:
    """(id, sequence, description) of a record."""
    from tensorflow_datasets.proto import tf_example_pb2  # a second to import

    feature = tf_example_pb2.Example.FromString(record).features.feature
    return tuple(feature[k].bytes_list.value[0] for k in ("id", "sequence", "description"))


class Writer:
    """Writes one shard. Every failure of the disk becomes a UserError of one line."""

    def __init__(self, path: Path):
        self.path, self.count = path, 0
        try:
            self._writer = ArrayRecordWriter(str(path), _OPTIONS)
        except (RuntimeError, ValueError, OSError) as failure:
            raise disk_error(path, failure) from failure

    def write_all(self, records: Sequence[bytes]) -> None:
        write = self._writer.write
        try:
            for record in records:
                write(record)
        except (RuntimeError, ValueError, OSError) as failure:
            raise disk_error(self.path, failure) from failure
        self.count += len(records)

    def close(self) -> None:
        """Ends the file and checks that it reads back with as many records as were written."""
        try:
            self._writer.close()
            found = ArrayRecordReader(str(self.path), _RANDOM_ACCESS).num_records()
        except (RuntimeError, ValueError, OSError) as failure:
            raise disk_error(self.path, failure) from failure
        if found != self.count:
            raise UserError(f"{self.path} holds {found} of {self.count} records: is the disk full?")


def disk_error(path: Path, failure: Exception) -> UserError:
    """A failure to write as one line that says what to do."""
    full = getattr(failure, "errno", None) in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG) or any(
        word in str(failure) for word in ("No space left", "quota", "File too large")
    )
    if full:
        return UserError(
            f"no space left to write {path}; free some, or give --out on a larger disk"
            " (UniRef50 takes about 30 GB)"
        )
    return UserError(f"cannot write {path}: {str(failure).splitlines()[0]}")


def open_shard(path: Path) -> ArrayRecordReader:
    """A reader for random access. Raises UserError where the file cannot be opened."""
    try:
        return ArrayRecordReader(str(path), _RANDOM_ACCESS, file_reader_buffer_size=32_768)
    except (RuntimeError, ValueError, OSError) as failure:
        reason = str(failure).splitlines()[0]
        raise UserError(f"cannot read {path}: {reason}; run esm1nv prepare --verify") from failure
