"""Labeled data: CSV tables, and the splits of a downstream task that one of them holds."""

from __future__ import annotations

import csv
import dataclasses
import hashlib
import io
import math

import numpy as np

from esm1nv_jax.common.errors import UserError
from esm1nv_jax.common.hashing import fold_all, permute, purpose
from esm1nv_jax.data import tokenizer
from esm1nv_jax.data.compression import read_text

SPLITS = {"train": "train", "valid": "valid", "validation": "valid", "val": "valid", "test": "test"}
TASKS = ("secondary_structure", "localisation", "regression")


@dataclasses.dataclass(frozen=True)
class Split:
    """n proteins and k labels, one per residue or one per protein, in order.

    labels: int64 [k], indices of classes, or float64 [k]. used: bool [k]; the other labels take
    part neither in training nor in scores. sizes: int64 [n], labels of each protein.
    """

    sequences: list[bytes]
    labels: np.ndarray
    used: np.ndarray
    sizes: np.ndarray


@dataclasses.dataclass(frozen=True)
class Task:
    """`classes` is empty for regression; `fingerprint` is a digest of the test set."""

    name: str
    classes: tuple[str, ...]
    train: Split
    valid: Split
    test: Split
    fingerprint: str

    @property
    def per_residue(self) -> bool:
        return self.name == "secondary_structure"


def read_csv(path: str) -> tuple[list[str], list[tuple[int, list[str]]]]:
    """Reads a CSV file in UTF-8, plain or compressed, with a header.

    Returns the names of the columns, and (line number, fields) of each row that is not blank;
    white space around names and fields is removed. Raises UserError.
    """
    reader = csv.reader(io.StringIO(read_text(path, "a CSV file")), skipinitialspace=True)
    try:
        columns, *rows = [
            (reader.line_num, [field.strip() for field in row]) for row in reader if any(row)
        ] or [(1, [])]
    except csv.Error as error:
        raise UserError(f"{path}, line {reader.line_num}: {error}; is it CSV?") from None
    if not columns[1]:
        raise UserError(f"{path} is empty; give a CSV file with names of columns in its first line")
    for line, fields in rows:
        if len(fields) != len(columns[1]):
            raise UserError(
                f"{path}, line {line}: {len(fields)} fields, the header has {len(columns[1])}"
            )
    return columns[1], rows


def read(path: str, name: str, limit: int | None = None) -> Task:
    """Reads columns `sequence`, `label`, `split`, and for secondary structure `mask` if there.

    Args:
      path: CSV, plain or compressed.
      name: one of TASKS. A label is a letter per residue, a class, or a number.
      limit: the largest number of proteins of each split; they are the same in every call.

    Raises UserError that names the line at fault.
    """
    if name not in TASKS:
        raise UserError(f"--task {name} is unknown; there are {', '.join(TASKS)}")
    rows: dict[str, list[tuple[bytes, str, str]]] = {"train": [], "valid": [], "test": []}
    columns, table = read_csv(path)
    if missing := [c for c in ("sequence", "label", "split") if c not in columns]:
        raise UserError(f"{path} has no column {', '.join(missing)}; it has {', '.join(columns)}")
    for line, fields in table:
        row = dict(zip(columns, fields, strict=True))
        split = SPLITS.get(row["split"].lower())
        if split is None:
            raise UserError(f"{path}, line {line}: split {row['split']!r} is not train/valid/test")
        try:
            sequence = tokenizer.normalize(row["sequence"]).sequence
        except tokenizer.InvalidResidueError as error:
            raise UserError(f"{path}, line {line}: {error}") from None
        label, mask = row["label"], row.get("mask")
        if not sequence:
            raise UserError(f"{path}, line {line}: the sequence is empty")
        if name == "secondary_structure":
            mask = "1" * len(sequence) if mask is None else mask
            for what, text in (("label", label), ("mask", mask)):
                if len(text) != len(sequence):
                    raise UserError(
                        f"{path}, line {line}: the {what} has {len(text)} characters, the sequence "
                        f"{len(sequence)} residues; they must be equally long"
                    )
            if set(mask) - {"0", "1"}:
                raise UserError(f"{path}, line {line}: the mask holds more than 0 and 1")
        elif name == "regression" and not _is_number(label):
            raise UserError(f"{path}, line {line}: the label {label!r} is not a number such as 0.5")
        elif not label:
            raise UserError(f"{path}, line {line}: the label is empty")
        rows[split].append((sequence, label, mask or ""))
    for split, content in rows.items():
        if len(content) < 2:
            raise UserError(f"{path} has {len(content)} rows of split {split}; a probe needs more")
        if name == "secondary_structure" and not any("1" in mask for _, _, mask in content):
            raise UserError(f"{path}: no residue of split {split} has mask 1; a probe needs some")
    digest = hashlib.sha256()
    for sequence, label, _ in rows["test"]:
        digest.update(b"%b %b\n" % (sequence, label.encode()))
    for split, content in rows.items():
        n = len(content)
        if limit is not None and limit < n:
            chosen = permute(np.arange(n), n, fold_all(0, purpose("probe limit")))[:limit]
            rows[split] = [content[i] for i in sorted(chosen.tolist())]
    labels = (row[1] for content in rows.values() for row in content)
    kinds = tuple(sorted(set("".join(labels) if name == TASKS[0] else labels)))
    if len(kinds) < 2:
        raise UserError(f"{path}: every label is {kinds[0]!r}; there is nothing to learn")
    classes = kinds if name != "regression" else ()
    splits = {split: _split(content, name, classes) for split, content in rows.items()}
    return Task(name, classes, **splits, fingerprint=digest.hexdigest()[:16])


def _split(rows: list[tuple[bytes, str, str]], name: str, classes: tuple[str, ...]) -> Split:
    sequences = [row[0] for row in rows]
    if name == "secondary_structure":
        place = np.zeros(0x110000 if any(ord(c) > 127 for c in classes) else 128, np.int64)
        place[[ord(c) for c in classes]] = range(len(classes))
        text = "".join(row[1] for row in rows)
        labels = place[np.fromiter(map(ord, text), np.int64, len(text))]
        used = np.frombuffer("".join(row[2] for row in rows).encode(), np.uint8) == ord("1")
        return Split(sequences, labels, used, np.array([len(s) for s in sequences]))
    if name == "regression":
        labels = np.array([float(row[1]) for row in rows])
    else:
        labels = np.array([classes.index(row[1]) for row in rows])
    ones = np.ones(len(rows), np.int64)
    return Split(sequences, labels, ones.astype(bool), ones)


def _is_number(text: str) -> bool:
    try:
        return math.isfinite(float(text))
    except ValueError:
        return False
