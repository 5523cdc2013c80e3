"""Results on their way to a file: parts beside it, each whole or not there.

`OUT.parts/` holds `settings.json` and one `part-N.npz` for every stretch of the FASTA. A part
appears by rename when all of it is on the disk, so a killed job has lost at most one. Jobs that
share the work write into the same folder; which proteins form a part does not depend on them.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import shutil
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from esm1nv_jax.common.errors import UserError

SETTINGS = "settings.json"
ORIGIN = ("checkpoint", "run", "steps")  # settings on which the contents do not depend
ALWAYS = ("ids", "lengths", "checksums", "rows")  # in every part: [proteins]


class Spool:
    """The parts of one output file. `total` is how many there are when all is done."""

    def __init__(self, out: Path):
        self.out = out
        self.folder = out.with_name(out.name + ".parts")
        self.total = 0

    def begin(self, settings: dict[str, Any], overwrite: bool) -> None:
        """Makes the folder, or takes up the work of a job with the same settings.

        Raises UserError where OUT is there already, or where other settings began the work.
        """
        old = self._settings()
        if old is not None and overwrite and _changed(old, settings):
            self.clear()
            old = None
        if old is None:
            if self.out.exists() and not overwrite:
                raise UserError(f"{self.out} exists; add --overwrite, or choose another --out")
            with disk(self.out, self.folder):
                self._make(settings)
            old = self.resume()  # made by another job, where that was faster
        if changed := _changed(old, settings):
            raise UserError(
                f"{self.folder} holds unfinished work with other settings ({'; '.join(changed)}); "
                "finish it with those, or begin anew with --overwrite"
            )
        self.total = settings["parts"]

    def _make(self, settings: dict[str, Any]) -> None:
        """The folder and the settings in it, at once: jobs of an array start in the same second."""
        new = self.folder.with_name(f"{self.folder.name}.{os.getpid()}.tmp")
        try:
            new.mkdir()
            (new / SETTINGS).write_text(json.dumps(settings, indent=1))
            if self.folder.exists() and self._settings() is None:
                self.clear()  # what was left while it was removed
            try:
                os.rename(new, self.folder)
            except OSError as error:
                if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                    raise
        finally:
            shutil.rmtree(new, ignore_errors=True)

    def resume(self) -> dict[str, Any]:
        """The settings of work that is there already. Raises UserError where there is none."""
        settings = self._settings()
        if settings is None:
            raise UserError(f"{self.folder} holds no parts to merge; run with --shard i/n first")
        self.total = settings["parts"]
        return settings

    def part_residues(self) -> int | None:
        """How work that is there already is cut into parts."""
        return (self._settings() or {}).get("part_residues")

    def _settings(self) -> dict[str, Any] | None:
        try:
            return json.loads((self.folder / SETTINGS).read_text())
        except FileNotFoundError:
            return None
        except (OSError, ValueError) as error:
            raise UserError(f"{self.folder / SETTINGS} cannot be read: {error}") from None

    @contextlib.contextmanager
    def hold(self, name: str) -> Iterator[None]:
        """Keeps a second job from doing the same share of the work."""
        with open(self.folder / f"{name}.lock", "w") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                raise UserError(
                    f"{self.folder} is being written by another live job; wait for it, or "
                    "choose another --out"
                ) from None
            yield

    def path(self, part: int) -> Path:
        return self.folder / f"part-{part:06d}.npz"

    def missing(self) -> list[int]:
        return [part for part in range(self.total) if not self.path(part).exists()]

    def write(self, part: int, arrays: dict[str, np.ndarray]) -> None:
        with disk(self.out, self.folder):
            temporary = self.path(part).with_suffix(f".{os.getpid()}.tmp")
            try:
                with open(temporary, "wb") as file:
                    np.savez(file, **arrays)
                    file.flush()
                    os.fsync(file.fileno())
                os.replace(temporary, self.path(part))
            finally:
                temporary.unlink(missing_ok=True)

    def clear(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)


class Reader:
    """Reads finished parts, each array of them once, and sums up what went by."""

    def __init__(self, spool: Spool):
        self.spool = spool
        self._sums: dict[str, Any] = {}
        first = self._load(0, None)
        self.like = {name: (value.dtype, value.shape[1:]) for name, value in first.items()}
        self.fields = [name for name in first if name not in ALWAYS]
        self.proteins = self.residues = 0
        for part in range(spool.total):
            rows = self._load(part, ("rows",))["rows"]
            self.proteins += len(rows)
            self.residues += int(rows.sum())

    def parts(self, *names: str) -> Iterator[dict[str, np.ndarray]]:
        """The arrays `names` of every part, in the order of the FASTA."""
        for part in range(self.spool.total):
            arrays = self._load(part, names)
            for name, value in arrays.items():
                self._sums.setdefault(name, hashlib.sha256()).update(_content(value))
            yield arrays

    def digest(self) -> str:
        """SHA-256 of all contents read so far: names and values, however cut into parts."""
        total = hashlib.sha256()
        for name in sorted(self._sums):
            dtype, shape = self.like[name]
            kind = "text" if dtype.kind in "US" else f"{dtype} {shape}"
            total.update(f"{name} {kind} {self._sums[name].hexdigest()}\n".encode())
        return total.hexdigest()

    def _load(self, part: int, names) -> dict[str, np.ndarray]:
        path = self.spool.path(part)
        try:
            with np.load(path) as file:
                return {name: file[name] for name in names or file.files}
        except (OSError, ValueError, KeyError, zipfile.BadZipFile, EOFError) as error:
            raise UserError(
                f"{path} is damaged ({error}); remove it and run the same command again"
            ) from None


def _content(value: np.ndarray) -> bytes:
    if value.dtype.kind == "U":  # its width is that of the longest in the part
        return "\n".join([*value.tolist(), ""]).encode()
    return np.ascontiguousarray(value).tobytes()


def _changed(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """How settings differ, a phrase each, apart from where the model lies."""
    return [
        f"{name}: {old.get(name)!r} there, {new.get(name)!r} here"
        for name in sorted(old.keys() | new.keys())
        if old.get(name) != new.get(name) and name not in ORIGIN
    ]


@contextlib.contextmanager
def disk(out: Path, kept: Path) -> Iterator[None]:
    """Failures to write as one line that names what is kept."""
    try:
        yield
    except OSError as error:
        where = f"; finished parts are kept in {kept}" if kept.is_dir() else ""
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise UserError(
                f"no space left to write {out}{where}; free some and run the same command again"
            ) from None
        raise UserError(f"cannot write {out}: {error.strerror or error}{where}") from None
