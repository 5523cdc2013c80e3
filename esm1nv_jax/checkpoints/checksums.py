"""Digests of the files of a folder, written last: whether they still are what was written."""

from __future__ import annotations

import hashlib
import json
import os

from etils import epath

NAME = "checksums.json"
BLOCK = 1 << 20


def write(folder: epath.Path) -> None:
    """Makes a written folder exist: one SHA-256 for each of its files, put there by rename."""
    sums = {}
    for file in _files(folder):
        size, digest = _digest(file)
        sums[str(file.relative_to(folder))] = {"bytes": size, "digest": digest}
    write_atomically(folder / NAME, json.dumps({"sha256": sums}, indent=1))


def wrong(folder: epath.Path, item: str = "") -> list[str]:
    """What is wrong with a folder, a phrase each; empty where every file is as it was written.

    Reads every byte, or only those below the folder `item`. A folder without checksums was cut
    short and is one wrong thing.
    """
    try:
        expected = json.loads((folder / NAME).read_text())["sha256"]
    except FileNotFoundError:
        return [f"no {NAME}: it was never finished"]
    except (ValueError, KeyError, TypeError):
        return [f"{NAME} cannot be read"]
    found = {str(file.relative_to(folder)): file for file in _files(folder)}
    if item:
        found = {name: file for name, file in found.items() if name.startswith(f"{item}/")}
        expected = {name: r for name, r in expected.items() if name.startswith(f"{item}/")}
    wrong = []
    for name, record in expected.items():
        if name not in found:
            wrong.append(f"{name} is missing")
            continue
        size, digest = _digest(found[name])
        if size != record["bytes"]:
            wrong.append(f"{name} has {size} bytes, {record['bytes']} were written")
        elif digest != record["digest"]:
            wrong.append(f"{name} has other bytes than were written")
    return wrong + [f"{name} does not belong there" for name in found.keys() - expected.keys()]


def write_atomically(path: epath.Path, text: str) -> None:
    """The whole text or the old file, whenever the process dies."""
    new = path.parent / f".{path.name}.new"
    if "://" in str(path):  # object stores write whole objects
        path.write_text(text)
        return
    with open(new, "w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(new, path)


def _files(folder: epath.Path) -> list[epath.Path]:
    """Every file of a folder, at any depth, in order, apart from the checksums."""
    found = []
    for path in sorted(folder.iterdir()):
        if path.is_dir():
            found += _files(path)
        elif path.name not in (NAME, f".{NAME}.new"):
            found.append(path)
    return found


def _digest(file: epath.Path) -> tuple[int, str]:
    digest, size = hashlib.sha256(), 0
    with file.open("rb") as stream:
        while block := stream.read(BLOCK):
            digest.update(block)
            size += len(block)
    return size, digest.hexdigest()
