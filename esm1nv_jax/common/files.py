"""Writing files: checked before the work, whole or not at all, refusals as one line."""

from __future__ import annotations

import contextlib
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from etils import epath

from esm1nv_jax.common.console import console
from esm1nv_jax.common.errors import UserError


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
def writing(path: epath.PathLike) -> Iterator[None]:
    """A disk that refuses, as one line that names the file."""
    try:
        yield
    except OSError as error:
        raise UserError(
            f"{path} cannot be written: {error.strerror or error}; choose another place, or free "
            "some space, and run the command again"
        ) from None


def write(path: str, text: str) -> None:
    with writing(path):
        Path(path).write_text(text, encoding="utf-8")


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


def is_remote(path: epath.PathLike) -> bool:
    """Whether a path lies in an object store."""
    return "://" in str(path)
