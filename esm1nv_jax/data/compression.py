"""The text of a file, whatever compressed it: told by its first bytes, not by its name."""

from __future__ import annotations

import hashlib
import io
import lzma
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

import zstandard
from isal import isal_zlib

from esm1nv_jax.common.errors import UserError

_READ = 1 << 20
_PACKED = 1 << 17  # compressed bytes at a time: what is lost before a damaged place is less
_GZIP, _ZSTD, _XZ = b"\x1f\x8b", b"\x28\xb5\x2f\xfd", b"\xfd7zXZ\x00"
_GZIP_HEADER = 16 + 15  # zlib's wbits: a gzip header, and the largest window
_SKIPPABLE = b"\x2a\x4d\x18"  # bytes 1 to 3 of a frame of zstd without content; pzstd begins so
_UNREADABLE = {
    b"BZh": "bzip2",
    b"PK\x03\x04": "zip",
    b"7z\xbc\xaf": "7-zip",
    b"\xff\xfe": "UTF-16 text",
    b"\xfe\xff": "UTF-16 text",
    b"%PDF": "PDF",
}


class BrokenArchive(Exception):
    """A compressed file that ends too early or is damaged; the message says which."""


class Raw(io.RawIOBase):
    """A file that counts the bytes read from it and, where asked, sums them up."""

    def __init__(self, file: BinaryIO, checksum: bool):
        self._file, self.read_bytes = file, 0
        self.md5 = hashlib.md5(usedforsecurity=False) if checksum else None

    def readable(self) -> bool:
        return True

    def readinto(self, buffer) -> int:
        n = self._file.readinto(buffer)
        self.read_bytes += n
        if self.md5 is not None:
            self.md5.update(memoryview(buffer)[:n])
        return n


class Archive:
    """Iterates over the decompressed bytes of `path` in blocks of about a megabyte.

    `read_bytes` is how far it has come in the file as it lies on the disk; `md5()` the checksum of
    the file once it has been read to its end, if `checksum`; `name` what messages call the file, if
    not by its path. Iterating raises BrokenArchive.
    """

    def __init__(self, path: Path, checksum: bool = False, name: str = ""):
        self.name = name or path
        try:
            self._raw = Raw(open(path, "rb", buffering=0), checksum)  # noqa: SIM115
        except OSError as failure:
            raise UserError(f"cannot read {self.name}: {failure.strerror}") from failure
        self._file = io.BufferedReader(self._raw, _READ)

    @property
    def read_bytes(self) -> int:
        return self._raw.read_bytes

    def md5(self) -> str:
        while self._file.read(_READ):  # what follows a damaged place, where that was passed over
            pass
        return self._raw.md5.hexdigest()

    def __iter__(self) -> Iterator[bytes]:
        head = self._file.peek(8)[:8]
        for magic, what in _UNREADABLE.items():
            if head.startswith(magic):
                raise UserError(
                    f"{self.name} is {what}; give FASTA, plain or compressed by gzip, zstd or xz"
                )
        try:
            if head.startswith(_GZIP):
                yield from _unpacked(self._file, lambda: isal_zlib.decompressobj(_GZIP_HEADER))
            elif head.startswith(_ZSTD) or head[1:4] == _SKIPPABLE:
                yield from _unpacked(self._file, _zstd)
            elif head.startswith(_XZ):
                yield from _unpacked(self._file, lambda: lzma.LZMADecompressor(lzma.FORMAT_XZ))
            else:
                while block := self._file.read(_READ):
                    yield block
        except EOFError as failure:
            raise BrokenArchive("the compressed file ends too early") from failure
        except (isal_zlib.error, lzma.LZMAError, zstandard.ZstdError, OSError) as failure:
            if isinstance(failure, OSError) and failure.errno is not None:  # the disk, not the data
                raise UserError(f"cannot read {self.name}: {failure.strerror}") from failure
            raise BrokenArchive(f"the compressed file is damaged ({failure})") from failure


def _zstd():
    return zstandard.ZstdDecompressor(max_window_size=1 << 31).decompressobj()


def _unpacked(file: BinaryIO, member: Callable[[], Any]) -> Iterator[bytes]:
    """What the members of a file hold, one after another; `member` makes a decompressor of one.

    The readers of files that come with these libraries take what follows a member of xz, and a file
    of zstd cut short, for its end. Here whatever follows is another member, or zeros, or a fault.
    """
    current = None
    while data := file.read(_PACKED):
        while data:
            if current is None:
                data = data.lstrip(b"\0")  # padding, which gzip and xz allow
                if not data:
                    break
                current = member()
            yield current.decompress(data)
            if not current.eof:
                break
            data, current = current.unused_data, None
    if current is not None:
        raise EOFError
