"""Reads files, plain or compressed by gzip, zstd or xz: recognized by content, not by name.

However far a file expands, a few tens of megabytes of it are held at a time.
"""

from __future__ import annotations

import codecs
import contextlib
import errno
import hashlib
import io
import lzma
import shutil
import sys
import tempfile
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

from isal import igzip_lib

from esm1nv_jax.common.errors import UserError

if sys.version_info >= (3, 14):
    from compression import zstd
else:
    from backports import zstd

BLOCK = 1 << 20  # bytes of text read or decompressed at a time
_COMPRESSED = 1 << 17  # compressed bytes read at a time: at most so much is lost before a damage
_MAX_LINE = 1 << 25  # characters of a line of text
_GZIP, _ZSTD, _XZ = b"\x1f\x8b", b"\x28\xb5\x2f\xfd", b"\xfd7zXZ\x00"
_GZIP_FLAG = igzip_lib.DECOMP_GZIP
_ZSTD_OPTIONS: dict[int, int] = {zstd.DecompressionParameter.window_log_max: 31}
_SKIPPABLE = b"\x2a\x4d\x18"  # bytes 1 to 3 of a zstd frame without content; pzstd writes them
_UNSUPPORTED = {
    b"BZh": "bzip2",
    b"PK\x03\x04": "zip",
    b"7z\xbc\xaf": "7-zip",
    b"\xff\xfe": "UTF-16 text",
    b"\xfe\xff": "UTF-16 text",
    b"%PDF": "PDF",
}


class DamagedFileError(Exception):
    """A compressed file that is truncated or damaged, or a record too long to be held in memory."""


class DecompressedFile:
    """Iterates over the decompressed bytes of a file in blocks of about a megabyte.

    Args:
      path: the file.
      md5: whether to compute the checksum of the file as it is on the disk.
      name: what messages call the file, where that is not its path.
      expected: what messages ask for, where the file is of another kind.

    `read_bytes` is the number of bytes read so far, before decompression. Opening raises UserError,
    iterating UserError or DamagedFileError.
    """

    def __init__(self, path: Path, md5: bool = False, name: str = "", expected: str = "FASTA"):
        self.name, self.expected, self.read_bytes = name or str(path), expected, 0
        self._md5 = hashlib.md5(usedforsecurity=False) if md5 else None
        try:
            self._file = io.BufferedReader(open(path, "rb", 0), BLOCK)  # noqa: SIM115
        except OSError as error:
            raise UserError(f"cannot read {self.name}: {error.strerror}") from error

    def _read(self, size: int) -> bytes:
        data = self._file.read(size)
        self.read_bytes += len(data)
        if self._md5 is not None:
            self._md5.update(data)
        return data

    def md5(self) -> str:
        """The checksum of the whole file; reads what follows a damage that was skipped."""
        assert self._md5 is not None
        while self._read(BLOCK):
            pass
        return self._md5.hexdigest()

    def __iter__(self) -> Iterator[bytes]:
        head = self._file.peek(8)[:8]
        for magic, kind in _UNSUPPORTED.items():
            if head.startswith(magic):
                raise UserError(
                    f"{self.name} is {kind}; give {self.expected}, plain or compressed by gzip, "
                    "zstd or xz"
                )
        try:
            if head.startswith(_GZIP):
                yield from self._members(lambda: igzip_lib.IgzipDecompressor(flag=_GZIP_FLAG))
            elif head.startswith(_ZSTD) or head[1:4] == _SKIPPABLE:
                yield from self._members(lambda: zstd.ZstdDecompressor(options=_ZSTD_OPTIONS))
            elif head.startswith(_XZ):
                yield from self._members(lambda: lzma.LZMADecompressor(lzma.FORMAT_XZ))
            else:
                while block := self._read(BLOCK):
                    yield block
        except EOFError as error:
            raise DamagedFileError("the compressed file ends too early") from error
        except (igzip_lib.IsalError, lzma.LZMAError, zstd.ZstdError, OSError) as error:  # type: ignore[misc]
            if isinstance(error, OSError) and error.errno is not None:  # the disk, not the data
                raise UserError(f"cannot read {self.name}: {error.strerror}") from error
            raise DamagedFileError(f"the compressed file is damaged ({error})") from error

    def _members(self, new_decompressor: Callable[[], Any]) -> Iterator[bytes]:
        """Yields the content of the members of a file in blocks, one member after another.

        The file readers of these libraries take what follows a member of xz, and a truncated zstd
        file, for the end. Here whatever follows a member is another member, zeros, or an error.
        """
        member = None
        while data := self._read(_COMPRESSED):
            while data:
                if member is None:
                    data = data.lstrip(b"\0")  # padding, which gzip and xz allow
                    if not data:
                        break
                    member = new_decompressor()
                yield member.decompress(data, BLOCK)
                while not (member.needs_input or member.eof):
                    yield member.decompress(b"", BLOCK)
                if not member.eof:
                    break
                data, member = member.unused_data, None
        if member is not None:
            raise EOFError


def text_lines(path: str, expected: str) -> Iterator[str]:
    r"""The lines of a UTF-8 file, plain or compressed, with `\n` for their ends of any kind; errors
    ask for `expected`.

    Neither the file nor a line that never ends is held in memory.
    """
    utf8 = codecs.getincrementaldecoder("utf-8-sig")()
    decoder = io.IncrementalNewlineDecoder(utf8, translate=True)  # old Macs', too
    left = ""
    try:
        for block in DecompressedFile(Path(path), expected=expected):
            *lines, left = (left + decoder.decode(block)).split("\n")
            for line in lines:
                yield line + "\n"
            if len(left) > _MAX_LINE:
                most = f"more than {_MAX_LINE >> 20} MiB in one line"
                raise UserError(f"{path} holds {most}; give {expected} with a line for each row")
        left += decoder.decode(b"", final=True)
        if left:
            yield left
    except DamagedFileError as error:
        raise UserError(f"{path}: {error}; fetch or write it again") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not text in UTF-8 ({error}); give {expected}") from error


def regular_file(name: str, folder: Path | None = None) -> tuple[Path, IO[bytes] | None]:
    """A file that can be read more than once: `name` itself, or a copy of what a pipe holds.

    Args:
      name: a path, or "-" for standard input.
      folder: where a copy is made; the system's temporary folder by default.

    Returns (path, copy): the copy is removed with that object; it is None where none was made.
    """
    path = Path(name)
    if name == "-" and sys.stdin is None:
        raise UserError("standard input is closed; - reads what is piped into it")
    if name != "-" and path.is_file():
        return path, None
    if name != "-" and path.is_dir():
        raise UserError(f"cannot read {name}: it is a folder; give a file")
    with (
        temporary_file(name, folder) as copy,
        open(0 if name == "-" else name, "rb", closefd=name != "-") as pipe,
    ):
        shutil.copyfileobj(pipe, copy, BLOCK)
    return Path(copy.name), copy


@contextlib.contextmanager
def temporary_file(name: str, folder: Path | None) -> Iterator[IO[bytes]]:
    """A file to be filled from the input `name`, which is removed with that object."""
    try:
        suffix = "".join(Path(name).suffixes[-2:])  # by which tables are told apart
        copy = tempfile.NamedTemporaryFile(  # noqa: SIM115
            prefix="esm1nv-input-", suffix=suffix, dir=folder, delete=False
        )
        # By itself it would complain where the folder was removed before it.
        weakref.finalize(copy, Path(copy.name).unlink, missing_ok=True)
        yield copy
        copy.flush()
    except OSError as error:
        where = folder or tempfile.gettempdir()
        hint = f"; no space is left in {where}" if error.errno == errno.ENOSPC else ""
        raise UserError(f"cannot read {name}: {error.strerror}{hint}") from error
