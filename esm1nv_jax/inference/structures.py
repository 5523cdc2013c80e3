"""Which residues of a protein touch each other: from a PDB or mmCIF file, or a list of contacts;
and the precision of predictions of them, by range of sequence separation.

Two residues are in contact where their C-beta atoms (C-alpha of glycine, or where C-beta is not
resolved) are less than 8 Å apart. Residues without coordinates take no part in any evaluation.

P@L/k is the share of true contacts among the L/k pairs with the highest scores, of L residues, in
one range. Ties count as if broken at random, so a constant score gives the base rate exactly.
"""

from __future__ import annotations

import codecs
import dataclasses
import gzip
import importlib.util
import io
import math
import zlib
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from esm1nv_jax.common.errors import UserError
from esm1nv_jax.data.fasta import scan
from esm1nv_jax.model.label_metrics import standard_error

CONTACT_DISTANCE = 8.0  # Å
PEPTIDE_BOND = 2.5  # Å, from C to N; it is 1.3, and that across a missing residue at least 4
PDB, MMCIF, CONTACTS = (".pdb", ".ent"), (".cif", ".mmcif"), (".contacts", ".tsv", ".csv")
FORMATS = (*PDB, *MMCIF, *CONTACTS)
RANGES = {"short": (6, 12), "medium": (12, 24), "long": (24, None)}  # |i - j|, first to before last
CUTOFFS = {"P@L": 1, "P@L/2": 2, "P@L/5": 5}
MIN_SEPARATION = 6


@dataclasses.dataclass(frozen=True)
class Structure:
    """A protein whose contacts are known.

    name: of the file, and the chain where one was named.
    sequence: normalized residue letters, those without coordinates included.
    is_resolved: bool [residues]. is_contact: bool [residues, residues], symmetric.
    """

    name: str
    sequence: str
    is_resolved: np.ndarray
    is_contact: np.ndarray


@dataclasses.dataclass(frozen=True)
class Protein:
    """What to predict contacts of; with its structure, where that is known."""

    name: str
    sequence: str
    structure: Structure | None = None


def read_proteins(fasta: str | None, paths: list[str]) -> list[Protein]:
    """Proteins of a FASTA file, with the structures that have their names; without a FASTA file,
    those of the structures.

    Raises UserError where a structure belongs to no protein, or is not of its sequence.
    """
    found = find_structures(paths)
    named = {name_of(*one): one for one in found}
    if len(named) < len(found):
        raise UserError("two structures of --structures have one name; rename the file of one")
    if fasta is None:
        structures = [read_structure(*one) for one in found]
        return [Protein(s.name, s.sequence, s) for s in structures]
    proteins = []
    for name, letters in scan(fasta):
        sequence = letters.decode()
        one = named.pop(name, None)
        structure = read_structure(*one, sequence) if one else None
        proteins.append(Protein(name, sequence, structure))
    if named:
        raise UserError(
            f"structure {next(iter(named))} has the name of no protein in {fasta}; name its file "
            "as its id there"
        )
    return proteins


def find_structures(paths: list[str]) -> list[tuple[Path, str]]:
    """(file, chain or '') of each of `paths`: files, FILE:CHAIN, or folders of files.

    Raises UserError where one does not exist, or a folder holds none.
    """
    files: list[tuple[Path, str]] = []
    for text in paths:
        path, chain = Path(text), ""
        if not path.exists() and ":" in text:
            head, _, chain = text.rpartition(":")
            path = Path(head)
        if path.is_dir():
            if chain:
                raise UserError(f"{text} names a chain of a folder; give FILE:{chain}")
            inside = sorted(p for p in path.iterdir() if _suffix(p) in FORMATS)
            if not inside:
                raise UserError(f"{path} holds no structure; there are {', '.join(FORMATS)}")
            files += [(p, "") for p in inside]
        elif not path.exists():
            raise UserError(f"structure {path} does not exist; give files or a folder of them")
        elif _suffix(path) not in FORMATS:
            raise UserError(
                f"{path} is no structure by its name; it must end in {', '.join(FORMATS)}, or one "
                "of these and .gz"
            )
        else:
            files.append((path, chain))
    return files


def name_of(path: Path, chain: str) -> str:
    """The name of a structure: that of its file without endings, and of a chain that was named."""
    stem = path.name.removesuffix(".gz")
    return stem[: -len(Path(stem).suffix)] + (f"_{chain}" if chain else "")


def _suffix(path: Path) -> str:
    return Path(path.name.removesuffix(".gz")).suffix.lower()


def read_structure(path: Path, chain: str = "", sequence: str | None = None) -> Structure:
    """The contacts of one chain: the one named, else the first of protein.

    Args:
      sequence: the residues of the protein; by default those that the file names, resolved or not
        (SEQRES, `_pdbx_poly_seq_scheme`), else those that have coordinates. A list of contacts
        needs one.

    Raises UserError where the file is damaged, or its residues are not those of the sequence.
    """
    try:
        content = path.read_bytes()
        content = gzip.decompress(content) if path.suffix == ".gz" else content
        text = content.removeprefix(codecs.BOM_UTF8).decode("latin-1")
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"{path} cannot be read: {error}") from None
    name = name_of(path, chain)
    if _suffix(path) in CONTACTS:
        if sequence is None:
            raise UserError(
                f"{path} lists contacts; give the sequence of {name} by --fasta, and to --fit "
                "structures with coordinates"
            )
        is_contact = _read_pairs(text, len(sequence), str(path))
        return Structure(name, sequence, np.ones(len(sequence), bool), is_contact)
    residues, steps, declared = _read_chain(path, text, chain)
    sequence = sequence or declared or "".join(next(iter(one)) for one in residues)
    index = _place([*map("".join, residues)], steps, sequence, name)
    L = len(sequence)
    positions = np.array(
        [
            one.get(sequence[i], next(iter(one.values())))
            for i, one in zip(index, residues, strict=True)
        ]
    )
    is_resolved = np.isin(np.arange(L), index)
    is_contact = np.zeros((L, L), bool)
    distance = np.linalg.norm(positions[:, None] - positions, axis=-1)
    is_contact[np.ix_(index, index)] = distance < CONTACT_DISTANCE
    return Structure(name, sequence, is_resolved, is_contact)


def _read_pairs(text: str, residues: int, source: str) -> np.ndarray:
    """bool [residues, residues] of lines `i j ...`, from 1; a first line of words is a header."""
    is_contact = np.zeros((residues, residues), bool)
    for number, line in enumerate(text.replace(",", " ").splitlines(), 1):
        fields = line.partition("#")[0].split()
        if not fields or (number == 1 and not fields[0].isdecimal()):
            continue
        pair = [int(f) for f in fields[:2] if f.isdecimal() and len(f) < 10]
        if len(pair) != 2 or not all(1 <= i <= residues for i in pair):
            raise UserError(
                f"{source}: line {number} is {line[:40]!r}; each line names two residues from 1 to "
                f"{residues}, the length of the sequence"
            )
        i, j = pair
        is_contact[i - 1, j - 1] = is_contact[j - 1, i - 1] = True
    return is_contact


def _read_chain(
    path: Path, text: str, chain: str
) -> tuple[list[dict[str, np.ndarray]], list[int], str]:
    """(C-beta in Å of each residue with coordinates, by its letter: several where it is modelled as
    one amino acid or another; how many places each is after the one before it, see `_place`; the
    letters of the whole chain, '' where the file does not say)."""
    if importlib.util.find_spec("Bio") is None:
        raise UserError(
            "PDB and mmCIF files are read by Biopython, which is not installed: "
            "pip install 'esm1nv_jax[structures]'"
        )
    from Bio import SeqIO
    from Bio.Data.PDBData import protein_letters_3to1_extended as one_letter
    from Bio.PDB.MMCIF2Dict import MMCIF2Dict
    from Bio.PDB.MMCIFParser import MMCIFParser
    from Bio.PDB.PDBParser import PDBParser

    is_pdb = _suffix(path) in PDB
    try:
        declared: dict[str, str] = {}
        is_counted = False  # residue numbers are places in the declared sequence
        if is_pdb:
            models = PDBParser(QUIET=True).get_structure("", io.StringIO(text))
            for record in SeqIO.parse(io.StringIO(text), "pdb-seqres"):
                declared[record.annotations["chain"]] = str(record.seq)
        else:
            fields = MMCIF2Dict(io.StringIO(text))
            columns = [
                fields.get(f"_pdbx_poly_seq_scheme.{name}", [])
                for name in ("pdb_strand_id", "seq_id", "mon_id")
            ]
            scheme: dict[tuple[str, str], str] = {}
            for c, number, residue in zip(*columns, strict=False):  # any may be absent
                scheme.setdefault((c, number), residue)  # of alternatives the first
            for (c, _), residue in scheme.items():
                declared[c] = declared.get(c, "") + one_letter.get(residue, "X")
            labels = fields.get("_atom_site.label_seq_id", [])
            is_counted = bool(declared) and "?" not in labels and any(map(str.isdecimal, labels))
            cif_parser = MMCIFParser(QUIET=True, auth_residues=not is_counted)
            models = cif_parser.get_structure("", io.StringIO(text))
        chains = {
            c.id: found
            for c in next(iter(models), ())
            if (found := [r for r in c.get_unpacked_list() if _is_residue(r, one_letter)])
        }
    except Exception as error:  # Biopython raises many kinds for what it cannot parse
        reason = " ".join(str(error).split())[:120] or type(error).__name__
        raise UserError(f"{path} cannot be read as a structure: {reason}") from None
    if not chains:
        raise UserError(f"{path} holds no amino acid with coordinates; give the file of a protein")
    if chain and chain not in chains:
        raise UserError(f"{path} has no chain {chain!r} of protein; there are {', '.join(chains)}")
    chain = chain or next(iter(chains))
    found = chains[chain]
    found = sorted(found, key=_number) if is_counted else _without_ligands(found)
    residues: dict[tuple[int, str], dict[str, np.ndarray]] = {}
    steps = []
    for k, r in enumerate(found):
        if r.id[1:] not in residues:
            number = _number(r) - (_number(found[k - 1]) if k else 0)
            steps.append(number if is_counted or not k else _step(found[k - 1], r, number))
        atom = r["CB" if "CB" in r and r.get_resname() != "GLY" else "CA"]
        letter = one_letter[r.get_resname()]
        residues.setdefault(r.id[1:], {}).setdefault(letter, atom.coord.astype(np.float64))
    return [*residues.values()], steps, declared.get(chain, "")


def _number(residue) -> int:
    return residue.id[1]


def _step(before, residue, by_number: int) -> int:
    """As in `_place`; author's numbers may skip, repeat and run backwards along peptide bonds."""
    if "C" not in before or "N" not in residue:
        return max(1, by_number)
    if before["C"] - residue["N"] < PEPTIDE_BOND:
        return 1
    return by_number if by_number > 1 else 0


def _without_ligands(residues: list) -> list:
    """Residues of a chain without free amino acids, which follow it under numbers of their own."""
    is_atom = [r.id[0] == " " for r in residues]
    first = len(residues) - is_atom[::-1].index(True) if any(is_atom) else len(residues)
    for k in range(first, len(residues)):
        if residues[k].id[1] > residues[k - 1].id[1] + 1:
            return residues[:k]
    return residues


def _is_residue(residue, one_letter: dict[str, str]) -> bool:
    return residue.get_resname() in one_letter and "CA" in residue


def _place(letters: list[str], steps: list[int], sequence: str, name: str) -> np.ndarray:
    """Index in the sequence of each residue with coordinates, which is one of its letters.

    steps: how many places it is after the one before, 0 for a break of unknown length; of the first
      its number.

    Of the placements where every letter is that of the sequence, the one with the fewest gaps and
    steps that are not as given. Raises UserError where there is none.
    """
    place = np.arange(len(sequence), dtype=np.int32)
    residue_at = np.array(list(sequence))
    origins = []
    cost = np.where(place == steps[0] - 1, 0.0, 1.0)
    for k, (options, step) in enumerate(zip(letters, steps, strict=True)):
        if k:  # comes as it should, or next to the one before, or after a gap of any length
            best = np.where(cost == np.minimum.accumulate(cost), place, 0)
            best = np.maximum.accumulate(best)
            step = min(step, len(sequence))
            origin = np.stack([place - step, place - 1, best[place - 1]])
            # A gap costs 2, and another step than the one given 4.
            as_counted = {0: math.inf, 1: 0}.get(step, 2)
            price = [[as_counted], [4], [6 if step else 2]]
            total = np.where(place < [[step], [1], [1]], math.inf, cost[origin] + price)
            origins.append(origin[total.argmin(0), place])
            cost = total.min(0)
        if "X" not in options:
            cost[~np.isin(residue_at, [*options, "X"])] = math.inf
    if not np.isfinite(cost).any():
        raise _mismatch("".join(one[0] for one in letters), sequence, name)
    index = [int(cost.argmin())]
    for origin in reversed(origins):
        index.append(int(origin[index[-1]]))
    return np.array(index[::-1])


def _mismatch(letters: str, sequence: str, name: str) -> UserError:
    """Says which residues are not those of the sequence, by an alignment of letters alone."""
    from Bio.Align import PairwiseAligner

    aligner = PairwiseAligner(
        mode="global", match_score=1, mismatch_score=-1, open_gap_score=-1, extend_gap_score=0
    )
    aligner.end_insertion_score = aligner.end_deletion_score = 0
    pairs = [
        (i, j)
        for (i, _), (j, end) in zip(*aligner.align(sequence, letters)[0].aligned, strict=True)
        for i, j in zip(range(i, i + end - j), range(j, end), strict=True)
    ]
    known = [(i, j) for i, j in pairs if "X" not in (sequence[i], letters[j])]
    wrong = [(i, j) for i, j in known if sequence[i] != letters[j]]
    others = len(letters) - len(pairs) + len(wrong)
    where = f" (residue {wrong[0][0] + 1} is {letters[wrong[0][1]]})" if wrong else ""
    return UserError(
        f"structure {name} does not match the sequence: {others} of its {len(letters)} "
        f"residues are others{where}; give its own sequence, or leave it out"
    )


def expected_precision(scores: np.ndarray, is_contact: np.ndarray, top: int) -> float:
    """The share of contacts among the `top` highest scores, in expectation over the order of ties;
    among all where they are fewer, NaN where there are none."""
    top = min(top, len(scores))
    if not top:
        return math.nan
    lowest = np.partition(scores, len(scores) - top)[len(scores) - top]
    above, tied = scores > lowest, scores == lowest
    hits = is_contact[above].sum() + (top - above.sum()) * is_contact[tied].mean()
    return float(hits / top)


def contact_precision(scores: np.ndarray, structure: Structure) -> dict[tuple[str, str], float]:
    """By (range, cutoff): the precision of scores [residues, residues], higher is likelier."""
    L = len(structure.sequence)
    i, j = np.triu_indices(L, MIN_SEPARATION)
    resolved = structure.is_resolved[i] & structure.is_resolved[j]
    i, j = i[resolved], j[resolved]
    values = {}
    for name, (first, end) in RANGES.items():
        used = (j - i >= first) & (j - i < (end or L))
        pairs = i[used], j[used]
        for cutoff, k in CUTOFFS.items():
            ranked = scores[pairs], structure.is_contact[pairs]
            values[name, cutoff] = expected_precision(*ranked, max(1, L // k))
    return values


def baseline_scores(residues: int) -> dict[str, np.ndarray]:
    """Scores [residues, residues] that no model is needed for: all pairs alike, and pairs that are
    nearer in the sequence first."""
    index = np.arange(residues)
    separation = np.abs(index[:, None] - index)
    return {"random": np.zeros((residues, residues)), "by separation": -separation.astype(float)}


def mean_and_error(values: Iterable[float]) -> tuple[float, float, int]:
    """(mean over proteins, its standard error, number of proteins), leaving out NaN."""
    numbers = np.array([value for value in values if not math.isnan(value)])
    if not len(numbers):
        return math.nan, math.nan, 0
    return float(numbers.mean()), standard_error(numbers), len(numbers)
