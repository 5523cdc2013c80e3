"""Files that a verb writes at its end: looked at in its beginning."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from etils import epath

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
def writing(path: str) -> Iterator[None]:
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
        Path(path).write_text(text)


def open_append(path: epath.Path) -> IO[bytes]:
    """Open a file for appending; without a buffer, where it is on a file system of this host."""
    return path.open("ab") if "://" in str(path) else open(path, "ab", buffering=0)
