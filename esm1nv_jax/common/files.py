"""Writing files: checked before the work, whole or not at all, refusals as one line."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from etils import epath

from esm1nv_jax.common.console import console
from esm1nv_jax.common.errors import UserError

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_LFS_POINTER = b"version https://git-lfs"
_FULL_TEXT = ("No space left", "quota", "File too large")


def check(*paths: str | None) -> None:
    """Raises UserError where a file cannot be written, before the work; None asks for none."""
    for path in map(Path, filter(None, paths)):
        folder = path.absolute().parent
        if not folder.is_dir():
            raise UserError(f"{path} cannot be written: there is no folder {folder}; make it first")
        if path.is_dir():
            raise UserError(f"{path} cannot be written: it is a folder; name a file in it")
        if not os.access(path if path.exists() else folder, os.W_OK):
            raise UserError(f"{path} cannot be written: permission denied; choose another place")


@contextlib.contextmanager
def writing(
    path: epath.PathLike, kept: Path | None = None, errors: tuple[type[Exception], ...] = (OSError,)
) -> Iterator[None]:
    """A disk that refuses, as one line that names the file, and the folder of what is `kept`.

    `errors` are what the writer of the file raises then, in words where it has no `errno`.
    """
    try:
        yield
    except errors as error:
        reason = getattr(error, "strerror", None) or " ".join(str(error).split())[:200]
        what = f"{path} cannot be written: {reason}"
        if getattr(error, "errno", None) in _FULL or any(t in str(error) for t in _FULL_TEXT):
            what = f"no space left to write {path}"
        if kept is not None and kept.is_dir():
            what += f"; finished parts are kept in {kept}"
        raise UserError(
            f"{what}; choose another place, or free some space, and run the command again"
        ) from None


@contextlib.contextmanager
def beside(path: Path, kept: Path | None = None) -> Iterator[Path]:
    """A new file to write, which takes the place of `path` when all went well; a device or a pipe
    is written itself. What the disk refuses before is the writer's to say, by `writing`."""
    is_special = path.exists() and not path.is_file()
    new = path if is_special else path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        yield new
        with writing(path, kept):
            os.replace(new, path)
    finally:
        if not is_special:
            new.unlink(missing_ok=True)


@contextlib.contextmanager
def replacing(path: Path, kept: Path | None = None) -> Iterator[Path]:
    """As `beside`, and as `writing`: for files that are written at once."""
    with writing(path, kept), beside(path, kept) as new:
        yield new


def parse_json(text: str) -> Any:
    """As `json.loads`, but raises ValueError too where the nesting is deeper than it can follow."""
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("nested too deeply") from None


def to_json(value: Any, indent: int | None = 1) -> str:
    """JSON has no NaN: numbers that do not exist become null."""
    plain = json.loads(json.dumps(value), parse_constant=lambda _: None)
    return json.dumps(plain, indent=indent)


def write(path: str, text: str) -> None:
    with writing(path):
        Path(path).write_text(text, encoding="utf-8")


def open_weights(path: epath.Path) -> IO[bytes]:
    """Opens a file of weights; raises UserError where it is a pointer of Git LFS."""
    file = path.open("rb")
    if file.read(len(_LFS_POINTER)) == _LFS_POINTER:
        file.close()
        raise UserError(
            f"{path} is a Git LFS pointer, not the file itself; fetch that with: git lfs pull"
        )
    file.seek(0)
    return file


def read_weights(path: epath.Path) -> bytes:
    """The bytes of a file of weights; raises as `open_weights`."""
    with open_weights(path) as file:
        return file.read()


def open_append(path: epath.Path) -> IO[bytes]:
    """Open a file for appending; without a buffer, where it is on a file system of this host."""
    return path.open("ab") if is_remote(path) else open(path, "ab", buffering=0)


def try_lock(descriptor: int, path: object) -> bool | None:
    """Locks an open file, called `path`, against other processes, without waiting.

    Returns False where another process holds the lock. A file system without locks is reported, the
    result is None, and the caller goes on.
    """
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        console.print(
            f"{path} cannot be locked ({error.strerror}): nothing stops another process from "
            "writing there too"
        )
        return None
    return True


@contextlib.contextmanager
def locked(path: Path, refusal: str) -> Iterator[None]:
    """Holds the lock of a file. Raises UserError, which says `refusal`, where another process does,
    and where the file cannot be written."""
    with writing(path):
        file = open(path, "w", encoding="utf-8")  # noqa: SIM115, closed below
    with file:
        if try_lock(file.fileno(), path.parent) is False:
            raise UserError(refusal)
        yield


def write_atomically(path: epath.Path, text: str) -> None:
    """Write a file so that a process that dies leaves the whole text or the old file."""
    if is_remote(path):  # object stores write whole objects
        path.write_text(text)
        return
    new = path.parent / f".{path.name}.new"
    with open(new, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(new, path)


def absolute(path: epath.PathLike) -> epath.Path:
    """A path that holds in any folder; links in it stay."""
    return epath.Path(path if is_remote(path) else os.path.abspath(path))


def is_remote(path: epath.PathLike) -> bool:
    """Whether a path lies in an object store."""
    return "://" in str(path)
