"""Mutants as people write them: `A4G`, several joined by `:`; checked against the wild type."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence

from esm1nv_jax.common.errors import UserError
from esm1nv_jax.data.tokenizer import RESIDUES, STANDARD

MODES = ("masked-marginals", "wt-marginals", "pseudo-perplexity")  # of scoring them, see `fitness`
AMINO_ACIDS = RESIDUES[:STANDARD]
_SUBSTITUTION = re.compile(r"([A-Za-z])(-?\d+)([A-Za-z])")


@dataclasses.dataclass(frozen=True)
class Mutant:
    """Substitutions of one sequence, by index from 0, ascending: (index, from, to)."""

    name: str
    sites: tuple[tuple[int, str, str], ...]

    @property
    def indices(self) -> tuple[int, ...]:
        return tuple(index for index, _, _ in self.sites)

    def applied(self, wild_type: str) -> str:
        letters = list(wild_type)
        for index, _, to in self.sites:
            letters[index] = to
        return "".join(letters)


def parse(name: str, wild_type: str, offset: int = 0, where: str = "mutant") -> Mutant:
    """Reads `A4G:L10P`; the first residue of the sequence has number 1 + `offset`.

    Raises UserError, beginning with `where`, for anything but substitutions of the residues that
    stand in the sequence by standard amino acids.
    """
    sites = []
    for text in name.strip().split(":"):
        found = _SUBSTITUTION.fullmatch(text.strip())
        if found is None:
            raise UserError(
                f"{where}: {text!r} is no substitution such as A4G; insertions, deletions and "
                "stops cannot be scored"
            )
        old, index, new = found[1].upper(), int(found[2]) - 1 - offset, found[3].upper()
        if not 0 <= index < len(wild_type):
            raise UserError(
                f"{where}: {text} is outside the sequence, whose residues have the numbers "
                f"{1 + offset} to {len(wild_type) + offset}; is --offset right?"
            )
        if wild_type[index] != old:
            raise UserError(
                f"{where}: {text} begins with {old}, but the sequence has {wild_type[index]} "
                "there; is --offset right, is it the right sequence?"
            )
        if new not in AMINO_ACIDS:
            raise UserError(f"{where}: {text} ends in {new}, which is no standard amino acid")
        sites.append((index, old, new))
    if len({index for index, _, _ in sites}) < len(sites):
        raise UserError(f"{where}: {name} changes one residue twice")
    return Mutant(name, tuple(sorted(sites)))


def parse_all(
    names: Sequence[str], wild_type: str, offset: int = 0, first_row: int = 1
) -> list[Mutant]:
    """`parse` for each row of a table."""
    return [
        parse(name, wild_type, offset, f"row {row}") for row, name in enumerate(names, first_row)
    ]


def all_singles(wild_type: str, offset: int = 0) -> list[str]:
    """Every single substitution of a residue by another standard amino acid, by position."""
    return [
        f"{old}{index + 1 + offset}{new}"
        for index, old in enumerate(wild_type)
        for new in AMINO_ACIDS
        if new != old and old in RESIDUES
    ]
