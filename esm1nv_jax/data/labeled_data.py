"""Labeled data: CSV tables, and the splits of a downstream task that one of them holds."""

from __future__ import annotations

import dataclasses
import hashlib
import math
import zlib
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np

from esm1nv_jax.common.errors import UserError
from esm1nv_jax.common.hashing import fold, fold_all, permute, purpose
from esm1nv_jax.data import tokenizer
from esm1nv_jax.data.source import Labels, MemorySource
from esm1nv_jax.data.tables import check_unique, read_csv

SPLITS = {"train": "train", "valid": "valid", "validation": "valid", "val": "valid", "test": "test"}
LARGEST = 1e30  # of a number to learn: float32 must hold it, and what is predicted for it
# The level and kind of the labels of each task.
TASKS = {
    "residue_classification": ("residue", "classification"),
    "residue_regression": ("residue", "regression"),
    "protein_classification": ("protein", "classification"),
    "protein_multilabel": ("protein", "multilabel"),
    "protein_regression": ("protein", "regression"),
}
PROBE_TASKS = {  # the names that `esm1nv probe` knows
    "secondary_structure": "residue_classification",
    "localisation": "protein_classification",
    "regression": "protein_regression",
}


@dataclasses.dataclass(frozen=True)
class Split:
    """n proteins and k labels, one per residue or one per protein, in order.

    labels: int64 [k], indices of classes, or float64 [k]; with several labels a protein int64
    [k, classes], 0 or 1. used: bool [k]; the other labels take part neither in training nor in
    scores. sizes: int64 [n], labels of each protein. ids: [n], or none.
    """

    sequences: list[bytes]
    labels: np.ndarray
    used: np.ndarray
    sizes: np.ndarray
    ids: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class Task:
    """`classes` is empty for regression; `fingerprint` is a digest of the test set; `shared` counts
    the sequences that stand in more than one split."""

    name: str
    classes: tuple[str, ...]
    train: Split
    valid: Split
    test: Split
    fingerprint: str
    shared: int = 0

    @property
    def level(self) -> str:
        return TASKS[PROBE_TASKS.get(self.name, self.name)][0]

    @property
    def kind(self) -> str:
        return TASKS[PROBE_TASKS.get(self.name, self.name)][1]

    @property
    def per_residue(self) -> bool:
        return self.level == "residue"

    def source(self, split: str) -> MemorySource:
        """The split `train`, `valid` or `test` as a source of the input stream."""
        part: Split = getattr(self, split)
        is_float = part.labels.dtype.kind == "f"
        values = part.labels.astype(np.float32 if is_float else np.int32)
        values[~part.used] = np.nan if is_float else -1
        offsets = np.concatenate(([0], np.cumsum(part.sizes))) if self.per_residue else None
        records = list(zip(part.ids, part.sequences, strict=True))
        return MemorySource(records, Labels(values, offsets))


@dataclasses.dataclass(frozen=True)
class SplitFractions:
    """How a table without a column `split` is split: by a hash of (seed, sequence)."""

    valid: float = 0.1
    test: float = 0.1
    seed: int = 0

    def __post_init__(self):
        if not (0 < self.valid < 1 and 0 < self.test < 1 and self.valid + self.test < 1):
            raise UserError(
                f"fractions valid={self.valid} and test={self.test} must be above 0 and sum to "
                "less than 1"
            )

    def split_of(self, sequence: bytes) -> str:
        key = fold_all(self.seed, purpose("labeled split"))
        share = float(fold(key, np.uint32(zlib.crc32(sequence)))) / 2**32
        if share < self.test:
            return "test"
        return "valid" if share < self.test + self.valid else "train"


@dataclasses.dataclass(frozen=True)
class _Row:
    line: int
    id: str
    sequence: bytes
    labels: Sequence[Any]  # of each residue, or one: letters, numbers, a class, a tuple of classes
    mask: str  # 1 for each label that is used
    text: str  # the label as it stands in the table


def read(
    path: str, name: str, limit: int | None = None, fractions: SplitFractions | None = None
) -> Task:
    """Reads columns `sequence`, `label`, `split`, and if there `id` and, for residues, `mask`.

    Args:
      path: CSV, plain or compressed.
      name: one of TASKS or PROBE_TASKS. A label is a letter per residue, or numbers separated by
        spaces; of a protein, a class, classes separated by `;`, or a number.
      limit: the largest number of proteins of each split; they are the same in every call.
      fractions: how to split a table without a column `split`; None: it must have one.

    Raises UserError that names the line at fault.
    """
    task = PROBE_TASKS.get(name, name)
    if task not in TASKS:
        known = ", ".join((*TASKS, *PROBE_TASKS))
        raise UserError(f"--task {name} is unknown; there are {known}")
    level, kind = TASKS[task]
    columns, table = read_csv(path)
    needed = ("sequence", "label", *(() if fractions else ("split",)))
    if missing := [c for c in needed if c not in columns]:
        raise UserError(f"{path} has no column {', '.join(missing)}; it has {', '.join(columns)}")
    check_unique(path, columns, ("id", "sequence", "label", "split", "mask"))
    rows: dict[str, list[_Row]] = {"train": [], "valid": [], "test": []}
    for line, fields in table:
        text = dict(zip(columns, fields, strict=True))
        row = _row(f"{path}, line {line}", line, text, level, kind)
        if "split" in columns:
            split = SPLITS.get(text["split"].lower(), "")
            if not split:
                raise UserError(
                    f"{path}, line {line}: split {text['split']!r} is not train/valid/test"
                )
        elif fractions is not None:
            split = fractions.split_of(row.sequence)
        rows[split].append(row)
    for split, content in rows.items():
        if len(content) < 2:
            fix = "give a column split, or other fractions or another seed of the split"
            fix = "give more" if "split" in columns else fix
            raise UserError(
                f"{path} has {len(content)} rows of split {split}, which needs 2 or more; {fix}"
            )
        if not any("1" in row.mask for row in content):
            raise UserError(f"{path}: no residue of split {split} has mask 1; give some")
    _check_ids(path, [row for content in rows.values() for row in content])
    splits_of = Counter(s for content in rows.values() for s in {row.sequence for row in content})
    shared = sum(n > 1 for n in splits_of.values())
    digest = hashlib.sha256()
    for row in rows["test"]:
        digest.update(b"%b %b\n" % (row.sequence, row.text.encode()))
    for split, content in rows.items():
        n = len(content)
        if limit is not None and limit < n:
            chosen = permute(np.arange(n), n, fold_all(0, purpose("probe limit")))[:limit]
            rows[split] = [content[i] for i in sorted(chosen.tolist())]
    labels = {
        x
        for content in rows.values()
        for row in content
        for x, bit in zip(row.labels, row.mask, strict=True)
        if bit == "1"
    }
    distinct = sorted(set().union(*labels) if kind == "multilabel" else labels)
    if len(distinct) < 2:
        only = "".join(f"{x:g}" if isinstance(x, float) else x for x in distinct)
        raise UserError(f"{path}: every label is {only!r}; there is nothing to learn")
    classes = tuple(distinct) if kind != "regression" else ()
    splits = {split: _split(content, kind, classes) for split, content in rows.items()}
    return Task(name, classes, **splits, fingerprint=digest.hexdigest()[:16], shared=shared)


def check_classes(path: str, task: Task) -> None:
    """Raises UserError where a class cannot be learned: it has at most one example to train on."""
    if not task.classes:
        return
    k = len(task.classes)

    def examples(split: Split) -> np.ndarray:
        labels = split.labels[split.used]
        return labels.sum(axis=0) if labels.ndim == 2 else np.bincount(labels, minlength=k)

    train = examples(task.train)
    for name in ("valid", "test"):
        unknown = (train == 0) & (examples(getattr(task, name)) > 0)
        if unknown.any():
            listed = ", ".join(repr(task.classes[i]) for i in np.flatnonzero(unknown)[:8])
            raise UserError(
                f"{path}: split {name} has labels of class {listed}, of which split train has none"
            )
    if (train == 1).any():
        rare = ", ".join(repr(task.classes[i]) for i in np.flatnonzero(train == 1)[:8])
        raise UserError(
            f"{path}: split train has one example of class {rare}; a class needs two or more: "
            "join it with another, or leave it out"
        )


def check_values(path: str, task: Task, ranked: bool) -> None:
    """Raises UserError where the numbers of a regression cannot be learned: they do not differ, or
    too little for float32. `ranked`: nor may those of validation all be equal."""
    for name in ("train", *(("valid",) if ranked else ())):
        split: Split = getattr(task, name)
        values = split.labels[split.used]
        mean, std = values.mean(), values.std()
        rounding = np.abs(values.astype(np.float32) - values).max()
        if not np.ptp(values):
            what = f"every label of split {name} is {mean:g}"
            fix = (
                "split otherwise"
                if name == "train"
                else "split otherwise, or set finetune.metric=mse"
            )
        elif name == "train" and (rounding > std / 100 or std < 1 / LARGEST):
            what = f"the labels {mean:g} ± {std:g} cannot be told apart in float32"
            fix = "subtract their mean, or give them in another unit"
        else:
            continue
        raise UserError(f"{path}: {what}; {fix}")


def _row(where: str, line: int, text: dict[str, str], level: str, kind: str) -> _Row:
    """A line of the table, checked."""
    try:
        sequence = tokenizer.normalize(text["sequence"]).sequence
    except tokenizer.InvalidResidueError as error:
        raise UserError(f"{where}: {error}") from None
    if not sequence:
        raise UserError(f"{where}: the sequence is empty")
    label, n = text["label"], len(sequence)
    mask = text.get("mask", "1" * n) if level == "residue" else "1"
    labels: Sequence[Any] = label if level == "residue" else [label]
    if level == "residue":
        numbers = label.split()
        size, unit = (
            (len(numbers), "numbers") if kind == "regression" else (len(label), "characters")
        )
        for what, count, of in (("label", size, unit), ("mask", len(mask), "characters")):
            if count != n:
                raise UserError(
                    f"{where}: the {what} has {count} {of}, the sequence "
                    f"{n} residues; they must be equally long"
                )
        if set(mask) - {"0", "1"}:
            raise UserError(f"{where}: the mask holds more than 0 and 1")
        if kind == "regression":
            used = [x if bit == "1" else "0" for x, bit in zip(numbers, mask, strict=True)]
            labels = [_number(where, x) for x in used]
    elif kind == "regression":
        labels = [_number(where, label)]
    elif kind == "multilabel":
        labels = [tuple(sorted({x.strip() for x in label.split(";")} - {""}))]
    elif not label:
        raise UserError(f"{where}: the label is empty")
    return _Row(line, text.get("id") or f"line_{line}", sequence, labels, mask, label)


def _number(where: str, text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not abs(value) <= LARGEST:
        what = f"beyond {LARGEST:g}; give it in another unit"
        what = what if math.isfinite(value) else "not a number such as 0.5"
        raise UserError(f"{where}: the label {text!r} is {what}")
    return value


def _check_ids(path: str, rows: list[_Row]) -> None:
    seen: dict[str, _Row] = {}
    for row in rows:
        first = seen.setdefault(row.id, row)
        if first.labels != row.labels:
            lines = sorted((first.line, row.line))
            raise UserError(
                f"{path}, line {lines[1]}: id {row.id!r} has another label than in line {lines[0]}"
            )


def _split(rows: list[_Row], kind: str, classes: tuple[str, ...]) -> Split:
    flat = [x for row in rows for x in row.labels]
    if kind == "regression":
        labels = np.array(flat)
    elif kind == "multilabel":
        labels = np.array([[name in x for name in classes] for x in flat], np.int64)
    else:
        index = {name: i for i, name in enumerate(classes)}  # letters of masked residues have none
        labels = np.array([index.get(x, 0) for x in flat])
    used = np.frombuffer("".join(row.mask for row in rows).encode(), np.uint8) == ord("1")
    sizes, ids = np.array([len(row.mask) for row in rows]), tuple(row.id for row in rows)
    return Split([row.sequence for row in rows], labels, used, sizes, ids)
