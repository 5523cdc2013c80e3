"""Results on their way to a file: parts beside it, each whole or not there.

`OUT.parts/` holds `settings.json` and a `part-N.npz` for every stretch of the FASTA. A part appears
by rename when all of it is on the disk, so a killed job has lost at most one. It carries the digest
of the settings and its number, so that no other file is ever taken for it. Jobs that
share the work write into the same folder; which proteins form a part does not depend on them.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from esm1nv_jax.common import files
from esm1nv_jax.common.errors import UserError

SETTINGS = "settings.json"
ORIGIN = ("checkpoint", "run", "steps")  # settings on which the contents do not depend
HASHES = "hashes"  # SHA-256 of SEQUENCE_LENGTH, by which biotrainer names proteins
PER_PROTEIN = ("ids", "lengths", "checksums", "rows")  # in every part: [proteins]
_OURS = re.compile(r"settings\.json|part-\d{6,}\.npz|job-\d+-of-\d+\.lock|[\w.-]+\.\d+\.tmp")


class PartialResults:
    """The parts of one output file. `total` is how many there are when all is done."""

    def __init__(self, out: Path):
        self.out = out
        self.folder = out.with_name(out.name + ".parts")
        self.total = 0
        self.digest = ""  # of the settings

    def begin(self, settings: dict[str, Any], overwrite: bool) -> None:
        """Makes the folder, or takes up the work of a job with the same settings.

        Raises UserError where OUT is there already, or where other settings began the work.
        """
        old = self.settings()
        if old is not None and overwrite and _differences(old, settings):
            self.clear()
            old = None
        if old is None:
            if self.out.exists() and not overwrite:
                raise UserError(f"{self.out} exists; add --overwrite, or choose another --out")
            with files.writing(self.out, self.folder):
                self._write_settings(settings)
            old = self.resume()  # made by another job, where that was faster
        if changed := _differences(old, settings):
            raise UserError(
                f"{self.folder} holds unfinished work with other settings ({'; '.join(changed)}); "
                "finish it with those, or begin anew with --overwrite"
            )
        self.resume()

    def _write_settings(self, settings: dict[str, Any]) -> None:
        """Jobs of an array start in the same second: the first one's settings stay."""
        self.folder.mkdir(exist_ok=True)
        new = self.folder / f"{SETTINGS}.{os.getpid()}.tmp"
        try:
            new.write_text(json.dumps(settings, indent=1), encoding="utf-8")
            try:
                os.link(new, self.folder / SETTINGS)
            except FileExistsError:
                pass
            except OSError:  # a file system without hard links
                os.replace(new, self.folder / SETTINGS)
        finally:
            new.unlink(missing_ok=True)

    def resume(self) -> dict[str, Any]:
        """The settings of work that is there already. Raises UserError where there is none."""
        settings = self.settings()
        if settings is None:
            raise UserError(f"{self.folder} holds no parts to merge; run with --shard i/n first")
        self.total = settings["parts"]
        contents = {name: value for name, value in settings.items() if name not in ORIGIN}
        text = json.dumps(contents, sort_keys=True)
        self.digest = hashlib.sha256(text.encode()).hexdigest()
        return settings

    def settings(self) -> dict[str, Any] | None:
        """What is in the settings file, None where there is none."""
        path = self.folder / SETTINGS
        try:
            settings = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            return None
        except (OSError, ValueError, RecursionError) as error:
            raise UserError(f"{path} cannot be read: {error}") from None
        counts = ("parts", "part_residues", "count")
        if not isinstance(settings, dict) or not all(
            type(settings.get(name)) is int and settings[name] > 0 for name in counts
        ):
            raise UserError(f"{path} holds no settings of unfinished work; remove {self.folder}")
        return settings

    def lock(self, name: str) -> contextlib.AbstractContextManager[None]:
        """Keeps a second job from doing the same share of the work."""
        refusal = "is being written by another live job; wait for it, or choose another --out"
        return files.locked(self.folder / f"{name}.lock", f"{self.folder} {refusal}")

    def path(self, part: int) -> Path:
        return self.folder / f"part-{part:06d}.npz"

    def missing(self) -> list[int]:
        """Parts that are not there, or are those of other work."""
        return [part for part in range(self.total) if not self.has(part)]

    def has(self, part: int) -> bool:
        """Whether a part is there. Settings and number fix its proteins."""
        with contextlib.suppress(UserError):
            return str(self.load(part, ("of",))["of"]) == f"{self.digest} {part}"
        return False

    def write(self, part: int, ids: Sequence[str], arrays: dict[str, Any]) -> None:
        """Writes a part: the ids of its proteins, and their arrays."""
        encoded = [name.encode() for name in ids]
        arrays = arrays | {
            "of": np.array(f"{self.digest} {part}"),
            "ids": np.frombuffer(b"".join(encoded), np.uint8),  # as wide as each is
            "id_ends": np.cumsum([len(name) for name in encoded]),
        }
        with files.replacing(self.path(part), self.folder) as new, open(new, "wb") as file:
            np.savez(file, **arrays)
            file.flush()
            os.fsync(file.fileno())

    def load(self, part: int, names: Sequence[str] | None = None) -> dict[str, Any]:
        """The arrays `names` of a part, or all; `ids` as a list of texts."""
        path = self.path(part)
        try:
            with np.load(path) as file:
                arrays = {name: file[name] for name in names or file.files}
                if "ids" in arrays:
                    ends = file["id_ends"].tolist()
                    text = arrays["ids"].tobytes()
                    starts = [0, *ends[:-1]]
                    arrays["ids"] = [text[a:b].decode() for a, b in zip(starts, ends, strict=True)]
                return arrays
        except Exception as error:  # there is no end to what a damaged archive can raise
            raise UserError(
                f"{path} is damaged ({error}); remove it and run the same command again"
            ) from None

    def clear(self) -> None:
        """Removes what was written here, and the folder if that is all there is in it."""
        for path in self.folder.glob("*"):
            if _OURS.fullmatch(path.name):
                path.unlink(missing_ok=True)
        with contextlib.suppress(OSError):
            self.folder.rmdir()


class PartReader:
    """Reads finished parts, each array of them once, and sums up what went by.

    Raises UserError where a part is not of this work.
    """

    def __init__(self, results: PartialResults):
        self.results = results
        self._sums: dict[str, Any] = {}
        self.proteins = self.residues = self.longest_id = 0
        for part in range(results.total):
            arrays = results.load(part, ("rows", "ids"))
            if not results.has(part):
                raise UserError(
                    f"{results.path(part)} is no part {part} of this work: it was moved, or made "
                    "with other settings; remove it and run the same command again"
                )
            self.proteins += len(arrays["rows"])
            self.residues += int(arrays["rows"].sum())
            self.longest_id = max(self.longest_id, *map(len, arrays["ids"]))
        first = results.load(0)
        self.fields = [n for n in first if n not in (*PER_PROTEIN, "of", "id_ends", HASHES)]
        self.like = {name: (first[name].dtype, first[name].shape[1:]) for name in self.fields}

    def parts(self, *names: str) -> Iterator[dict[str, Any]]:
        """The arrays `names` of every part, in the order of the FASTA; texts as lists."""
        for part in range(self.results.total):
            arrays = self.results.load(part, names)
            for name, value in arrays.items():
                if name == "checksums":
                    value = arrays[name] = [text.decode() for text in value.tolist()]
                if isinstance(value, list):
                    content = "\n".join([*value, ""]).encode()
                else:
                    content = np.ascontiguousarray(value).tobytes()
                self._sums.setdefault(name, hashlib.sha256()).update(content)
            yield arrays

    def digest(self) -> str:
        """SHA-256 of all contents read so far: names and values, however cut into parts."""
        total = hashlib.sha256()
        for name in sorted(self._sums):
            kind = {"ids": "text", "checksums": "text"}.get(name, "int64 ()")
            if name in self.like:
                kind = "{} {}".format(*self.like[name])
            total.update(f"{name} {kind} {self._sums[name].hexdigest()}\n".encode())
        return total.hexdigest()


def _differences(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """How settings differ, a phrase each, apart from where the model lies."""
    return [
        f"{name}: {old.get(name)!r} there, {new.get(name)!r} here"
        for name in sorted(old.keys() | new.keys())
        if old.get(name) != new.get(name) and name not in ORIGIN
    ]
