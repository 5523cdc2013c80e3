"""Embeddings kept on disk between runs, so that a second probe of a model embeds nothing.

One file for each (model, proteins, kind of embedding), named by a digest of all that decides its
content: the array as NumPy writes it, then its SHA-256.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Iterable
from pathlib import Path

import jax
import numpy as np

from esm1nv_jax import __version__
from esm1nv_jax.inference.model import Model

LIMIT = 10 << 30  # bytes of all files together; the least recently used are deleted first


class EmbeddingCache:
    """A folder of arrays by key. A disk that fails costs time, never a run."""

    def __init__(self, folder: Path, limit: int = LIMIT):
        self.folder, self.limit = folder, limit

    def read(self, key: str) -> np.ndarray | None:
        """Return the array of `key`; None where there is none, or none that is whole."""
        path = self.folder / f"{key}.npy"
        try:
            with open(path, "rb") as file:
                array = np.load(file, allow_pickle=False)
                if file.read() != _digest(array):
                    return None
            os.utime(path)  # used last
            return array
        except (OSError, ValueError, EOFError):
            return None

    def write(self, key: str, array: np.ndarray) -> None:
        """Keep an array, unless it is larger than the limit or the disk refuses it."""
        if array.nbytes > self.limit:
            return
        path = self.folder / f"{key}.npy"
        part = path.with_suffix(f".{os.getpid()}")
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with open(part, "wb") as file:
                np.save(file, array)
                file.write(_digest(array))
            part.replace(path)
            self._delete_old()
        except OSError:
            with contextlib.suppress(OSError):
                part.unlink()

    def _delete_old(self) -> None:
        status = {path: path.stat() for path in self.folder.iterdir()}
        total = sum(s.st_size for s in status.values())
        for path in sorted(status, key=lambda path: status[path].st_mtime_ns):
            if total <= self.limit:
                return
            path.unlink(missing_ok=True)
            total -= status[path].st_size


def model_digest(model: Model) -> str:
    """Return a digest of what a model computes: parameters, architecture, precision, crop."""
    facts = (__version__, model.config, model.precision, model.longest, jax.default_backend())
    return hashlib.sha256(f"{facts} {model.digest}".encode()).hexdigest()


def key_of(model: str, sequences: Iterable[bytes], kind: str) -> str:
    """Return the key of one kind of embeddings of proteins by a model, given by its digest."""
    digest = hashlib.sha256(f"{model} {kind}".encode())
    for sequence in sequences:
        digest.update(sequence + b"\n")
    return digest.hexdigest()


def _digest(array: np.ndarray) -> bytes:
    return hashlib.sha256(np.ascontiguousarray(array).data).digest()
