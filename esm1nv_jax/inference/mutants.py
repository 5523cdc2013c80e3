"""Mutants of a protein: reading their names, and holding many of them in little memory."""

from __future__ import annotations

import dataclasses
import re
from array import array
from collections import Counter
from collections.abc import Iterable, Sequence

import numpy as np

from esm1nv_jax.common.errors import UserError
from esm1nv_jax.data.tokenizer import RESIDUES, STANDARD

AMINO_ACIDS = RESIDUES[:STANDARD]
_SUBSTITUTION = re.compile(r"([A-Za-z])(-?\d{1,9})([A-Za-z])")

Sites = tuple[tuple[int, str, str], ...]  # ascending: (index from 0, old letter, new letter)


class MutantError(UserError):
    """What is not a mutant that can be scored; `kind` says in two words why, to be counted."""

    def __init__(self, kind: str, message: str):
        super().__init__(message)
        self.kind = kind


@dataclasses.dataclass(frozen=True, slots=True)
class Mutant:
    """Substitutions of one sequence."""

    name: str
    sites: Sites

    def apply_to(self, wild_type: str) -> str:
        letters = list(wild_type)
        for index, _, new in self.sites:
            letters[index] = new
        return "".join(letters)


class MutantTable(Sequence[Mutant]):
    """n mutants of one sequence, some ten bytes for each of their k substitutions.

    rows: int64 [n], the row of the table that a mutant stands in. ends: int64 [n], one past its
    last substitution. residues: int32 [k], indices from 0, ascending in a mutant. old, new: uint8
    [k], ASCII. offset: the first residue has number 1 + offset in names. total: rows of the table.
    """

    def __init__(self, rows, ends, residues, old, new, offset: int, total: int):
        self.rows, self.ends = np.asarray(rows, np.int64), np.asarray(ends, np.int64)
        self.residues, self.old, self.new = residues, old, new
        self.offset, self.total = offset, total

    @property
    def starts(self) -> np.ndarray:
        """int64 [n]: the first substitution of each mutant."""
        return np.concatenate(([0], self.ends[:-1])).astype(np.int64)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, key):
        """A mutant, or the table of a slice of them."""
        if isinstance(key, slice):
            first, last, _ = key.indices(len(self))
            begin = int(self.ends[first - 1]) if first else 0
            span = slice(begin, int(self.ends[last - 1]) if last > first else begin)
            rows, ends = self.rows[first:last], self.ends[first:last] - begin
            arrays = (rows, ends, self.residues[span], self.old[span], self.new[span])
            return MutantTable(*arrays, self.offset, self.total)
        key = range(len(self))[key]
        span = slice(int(self.ends[key - 1]) if key else 0, int(self.ends[key]))
        columns = (self.residues[span].tolist(), self.old[span].tolist(), self.new[span].tolist())
        sites = tuple((i, chr(old), chr(new)) for i, old, new in zip(*columns, strict=True))
        name = ":".join(f"{old}{i + 1 + self.offset}{new}" for i, old, new in sites)
        return Mutant(name, sites)


def parse_mutants(
    names: Iterable[str],
    wild_type: str,
    offset: int = 0,
    first_row: int = 1,
    skipped: Counter[str] | None = None,
    missense: bool = False,
) -> MutantTable:
    """Reads `A4G:L10P` from each row of a table; the first residue has number 1 + `offset`.

    Args:
      names: drawn one by one, so that they need not be in memory.
      first_row: the number of the first row in messages.
      skipped: counts by kind what cannot be scored, which is then left out; None: it is refused.
      missense: whether a mutant that changes nothing is such a row.

    Raises MutantError that names the first row that is refused.
    """
    rows, ends, index, old, new = (array(kind) for kind in "qqiBB")
    row = -1
    for row, name in enumerate(names):
        try:
            sites = _parse(name, wild_type, offset, missense)
        except MutantError as error:
            if skipped is None:
                raise MutantError(error.kind, f"row {row + first_row}: {error}") from None
            skipped[error.kind] += 1
            continue
        for i, before, after in sites:
            index.append(i)
            old.append(ord(before))
            new.append(ord(after))
        rows.append(row)
        ends.append(len(index))
    letters = np.array(old, np.uint8), np.array(new, np.uint8)
    return MutantTable(rows, ends, np.array(index, np.int32), *letters, offset, row + 1)


def is_mutant(name: str) -> bool:
    """Whether a name has the form of `A4G:L10P`."""
    return all(_SUBSTITUTION.fullmatch(text.strip()) for text in name.split(":"))


def undo(name: str, mutated: str) -> str:
    """The wild type of a mutated sequence. Raises UserError where it is not that of the mutant."""
    letters = list(mutated)
    for text in name.split(":"):
        match = _SUBSTITUTION.fullmatch(text.strip())
        index = int(match[2]) - 1 if match else -1
        if not match or not 0 <= index < len(letters) or letters[index] != match[3].upper():
            raise UserError(f"{name} does not fit its mutated sequence {mutated[:40]}...")
        letters[index] = match[1].upper()
    return "".join(letters)


def _parse(name: str, wild_type: str, offset: int, missense: bool) -> Sites:
    """The substitutions of a mutant. Raises MutantError for anything but substitutions of residues
    that stand in the sequence by standard amino acids."""
    sites = []
    if not isinstance(name, str):
        raise MutantError("blank", f"{name!r} is no text, such as A4G")
    for text in map(str.strip, name.split(":")):
        match = _SUBSTITUTION.fullmatch(text)
        if match is None:
            raise MutantError(*why_no_substitution(text))
        old, index, new = match[1].upper(), int(match[2]) - 1 - offset, match[3].upper()
        if not 0 <= index < len(wild_type):
            raise MutantError(
                "outside the sequence",
                f"{text} is outside the sequence, whose residues have the numbers {1 + offset} to "
                f"{len(wild_type) + offset}; is --offset right?",
            )
        if wild_type[index] != old:
            raise MutantError(
                "another residue in the sequence",
                f"{text} begins with {old}, but the sequence has {wild_type[index]} there; is "
                "--offset right, is it the right sequence?",
            )
        if new not in AMINO_ACIDS:
            raise MutantError(
                "no standard amino acid", f"{text} ends in {new}, which is no standard amino acid"
            )
        sites.append((index, old, new))
    if len(sites) > 1:
        if len({index for index, _, _ in sites}) < len(sites):
            raise MutantError("one residue twice", f"{name} changes one residue twice")
        sites.sort()
    if missense and all(old == new for _, old, new in sites):
        raise MutantError("synonymous", f"{name} changes nothing")
    return tuple(sites)


def why_no_substitution(text: str) -> tuple[str, str]:
    """(kind, message) of what is no `A4G`: "wild type", "synonymous", "stop", "blank", ..."""
    parts = re.split(r"\s*[,;/+&\s]\s*", text)
    if len(parts) > 1 and all(map(_SUBSTITUTION.fullmatch, parts)):
        return "not joined by ':'", (
            f"{text!r} has several substitutions; join them by ':', as {':'.join(parts)}"
        )
    kind, plain = "no substitution", text.lower().strip("_")
    if not text:
        kind = "blank"
    elif plain in ("wt", "wildtype", "wild-type", "wild_type"):
        kind = "wild type"
    elif plain in ("sy", "syn", "synonymous") or text.endswith("="):
        kind = "synonymous"
    elif text.endswith(("*", "Ter")):
        kind = "stop"
    return kind, (
        f"{text!r} is no substitution such as A4G; insertions, deletions and stops cannot be scored"
    )


def all_singles(wild_type: str, offset: int = 0, letters: str = RESIDUES) -> list[str]:
    """Every single substitution of a residue, one of `letters`, by another standard amino acid, by
    position."""
    return [
        f"{old}{index + 1 + offset}{new}"
        for index, old in enumerate(wild_type)
        for new in AMINO_ACIDS
        if new != old and old in letters
    ]
