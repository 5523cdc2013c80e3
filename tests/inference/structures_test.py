"""Contacts of synthetic structures against distances pair by pair."""

import gzip
import sys
from pathlib import Path

import numpy as np
import pytest

from esm1nv_jax.common.errors import UserError
from esm1nv_jax.inference.structures import find_structures, read_structure
from tests.inference.made_structures import (
    NAMES,
    cif_text,
    contacts_of,
    make_coordinates,
    pdb_text,
    write_structures,
)

SEQUENCE = "MKTVRQERLKSIVRILERSKEPVSGAQLAGERTDIPKNFGYHMCWLLASGEE"
ALPHA, BETA = make_coordinates(len(SEQUENCE))
MISSING = (0, 1, 20, 21, 22, 51)  # both ends, and a loop


def write(path, text):
    path.write_text(text)
    return path


@pytest.mark.parametrize("text", [pdb_text, cif_text], ids=["pdb", "cif"])
@pytest.mark.parametrize("zipped", [False, True])
def test_contacts_are_distances_of_beta_carbons(text, zipped, tmp_path):
    path = tmp_path / f"a.{text.__name__[:3]}"
    path.write_text(text(SEQUENCE, ALPHA, BETA, MISSING))
    if zipped:
        content, path = path.read_bytes(), path.with_name(path.name + ".gz")
        path.write_bytes(gzip.compress(content))
    found = read_structure(path)
    assert (found.name, found.sequence) == ("a", SEQUENCE)
    assert [*np.flatnonzero(~found.is_resolved)] == [*MISSING]
    expected = contacts_of(SEQUENCE, ALPHA, BETA, MISSING)
    np.testing.assert_array_equal(found.is_contact, expected)
    assert 20 < np.triu(expected, 6).sum() < 400


def test_without_a_declared_sequence_it_is_that_of_the_atoms_or_the_one_given(tmp_path):
    path = write(tmp_path / "a.pdb", pdb_text(SEQUENCE, ALPHA, BETA, MISSING, seqres=False))
    assert read_structure(path).sequence == "TVRQERLKSIVRILERSKSGAQLAGERTDIPKNFGYHMCWLLASGE"
    found = read_structure(path, sequence=SEQUENCE)
    assert found.sequence == SEQUENCE
    np.testing.assert_array_equal(found.is_contact, contacts_of(SEQUENCE, ALPHA, BETA, MISSING))
    cif = write(tmp_path / "a.cif", cif_text(SEQUENCE, ALPHA, BETA, MISSING, scheme=False))
    assert len(read_structure(cif).sequence) == 46
    text = cif_text(SEQUENCE, ALPHA, BETA, MISSING)
    lines = text.replace("_pdbx_poly_seq_scheme.pdb_strand_id", "_pdbx_poly_seq_scheme.other")
    assert len(read_structure(write(tmp_path / "b.cif", lines)).sequence) == 46
    twice = text.replace("Z 5 VAL A\n", "Z 5 VAL A\nZ 5 ILE A\n")
    assert read_structure(write(tmp_path / "c.cif", twice)).sequence == SEQUENCE


def test_selenomethionine_is_methionine_and_other_chains_can_be_named(tmp_path):
    modified = NAMES | {"M": "MSE"}
    first = pdb_text(SEQUENCE, ALPHA, BETA, names=modified)
    second = pdb_text("GAVLI", ALPHA, BETA, chain="B")
    path = write(tmp_path / "two.pdb", first + second)
    assert read_structure(path).sequence == SEQUENCE
    assert find_structures([f"{path}:B"]) == [(path, "B")]
    assert read_structure(path, "B").sequence == "GAVLI"
    assert read_structure(path, "B").name == "two_B"
    with pytest.raises(UserError, match="no chain 'C' of protein; there are A, B"):
        read_structure(path, "C")


@pytest.mark.parametrize("text", [pdb_text, cif_text], ids=["pdb", "cif"])
def test_a_free_amino_acid_is_no_residue_of_the_chain(text, tmp_path):
    if text is pdb_text:
        lines = [
            f"HETATM 900{k}  CA  GLU A 90{k}       1.000   2.000   3.000  1.00  0.00           C"
            for k in range(2)
        ]
        chain = text(SEQUENCE, ALPHA, BETA, MISSING)
    else:
        lines = [
            f"HETATM 900{k} C CA . GLU Y . ? 1.0 2.0 3.0 1.0 0.0 90{k} GLU A CA 1" for k in range(2)
        ]
        chain = text(SEQUENCE, ALPHA, BETA, MISSING).rstrip().removesuffix("#")
    path = write(tmp_path / f"a.{text.__name__[:3]}", chain + "\n".join([*lines, ""]))
    found = read_structure(path)
    assert (found.sequence, [*np.flatnonzero(~found.is_resolved)]) == (SEQUENCE, [*MISSING])
    np.testing.assert_array_equal(found.is_contact, contacts_of(SEQUENCE, ALPHA, BETA, MISSING))
    modified = pdb_text(SEQUENCE + "M", *make_coordinates(53), names=NAMES | {"M": "MSE"})
    path = write(tmp_path / "b.pdb", modified)  # the last residue is a HETATM, too
    assert read_structure(path).is_resolved.all()


LINKER = "MKLGSGSGSGSGSGSVEDPQTH" * 2
ISLAND = (4, 5, 6, 7, 8, 11, 12, 13)  # 9 and 10 have coordinates, between two gaps


def holes(seed):
    rng = np.random.default_rng(seed)
    starts, lengths = rng.integers(0, len(LINKER) - 8, 3), rng.integers(1, 8, 3)
    return sorted({k for i, n in zip(starts, lengths, strict=True) for k in range(i, i + n)})


def expect(found, missing, sequence=LINKER, before=0):
    """That `missing`, and what is before and after the sequence, is unresolved in what was found"""
    alpha, beta = make_coordinates(len(sequence))
    L, end = len(found.sequence), before + len(sequence)
    resolved = np.full(L, False)
    resolved[before:end] = ~np.isin(np.arange(len(sequence)), missing)
    assert [*np.flatnonzero(found.is_resolved)] == [*np.flatnonzero(resolved)]
    contacts = np.zeros((L, L), bool)
    contacts[before:end, before:end] = contacts_of(sequence, alpha, beta, missing)
    np.testing.assert_array_equal(found.is_contact, contacts)


@pytest.mark.parametrize("text", [pdb_text, cif_text], ids=["pdb", "cif"])
def test_unresolved_residues_of_repeats_are_where_the_numbers_skip(text, tmp_path):
    path = tmp_path / f"a.{text.__name__[:3]}"
    for missing in (range(7, 13), ISLAND, *map(holes, range(30))):
        written = text(LINKER, *make_coordinates(len(LINKER)), missing)
        expect(read_structure(write(path, written)), missing)
        tagged = f"MGSSHHHHHH{LINKER}GSGSGS"
        expect(read_structure(path, sequence=tagged), missing, before=10)


def with_backbone(sequence, numbers):
    """PDB text with N and C, 0.5 Å apart in a bond, and residue numbers as `52` and `52A`"""
    alpha, beta = make_coordinates(len(sequence))
    lines = [x for x in pdb_text(sequence, alpha, beta).splitlines() if x.startswith("SEQRES")]
    for i, number in numbers.items():
        following = alpha[min(i + 1, len(alpha) - 1)] + [0.5, 0, 0]
        atoms = {"N": alpha[i], "CA": alpha[i], "C": following, "CB": beta[i]}
        number = f"{number:>4} " if number.isdigit() else f"{number:>5}"
        for name, (x, y, z) in atoms.items():
            lines.append(
                f"ATOM  {len(lines):5d}  {name:<3s} {NAMES[sequence[i]]} A{number}   "
                f"{x:8.3f}{y:8.3f}{z:8.3f}  1.00  0.00           C"
            )
    return "\n".join([*lines, ""])


@pytest.mark.parametrize("missing", [range(7, 13), range(20, 30), [41, 42, 43]])
@pytest.mark.parametrize("numbering", ["on", "skips", "inserts", "backwards"])
def test_a_peptide_bond_overrules_the_numbers(numbering, missing, tmp_path):
    there = [i for i in range(len(LINKER)) if i not in missing]
    numbers = {i: str(i + 1) for i in there}
    if numbering == "on":  # as if nothing were missing
        numbers = {i: str(k + 1) for k, i in enumerate(there)}
    elif numbering == "skips":
        numbers = {i: str(i + 1 if i < 5 else i + 501) for i in there}
    elif numbering == "inserts":
        numbers |= {4: "4A", 5: "4B", 6: "4C"}
    else:
        numbers |= {i: str(i + 501) for i in range(5)}
    path = write(tmp_path / "a.pdb", with_backbone(LINKER, numbers))
    expect(read_structure(path), missing)
    tail, missing = "MKLVGSGSGSGSGS", range(10, 14)
    numbers = {i: str(i + 1 if i < 6 else i + 3) for i in range(10)}  # two more would fit here
    expect(read_structure(write(path, with_backbone(tail, numbers))), missing, tail)


def test_a_jump_of_the_numbers_beyond_the_sequence_is_no_gap(tmp_path):
    numbers = {i: str(i + 1 if i < 5 else i + 501) for i in range(len(LINKER))}
    lines = with_backbone(LINKER, numbers).splitlines()
    path = write(tmp_path / "a.pdb", "\n".join(x for x in lines if x[12:16].strip() not in "NC"))
    expect(read_structure(path), ())


def either(text, position, name, shift):
    """`text` with another amino acid of the name, `shift` Å away, after the one at the position"""
    lines, added, end = [], [], 0
    for line in text.splitlines():
        fields = line.split()
        is_pdb = len(fields) < 15
        at = (fields[5] if is_pdb else fields[14]) if fields[:1] == ["ATOM"] else ""
        if at == str(position + 7):
            if is_pdb:
                x = float(line[30:38]) + shift
                added.append(f"{line[:16]}B{name}{line[20:30]}{x:8.3f}{line[38:]}")
                line = f"{line[:16]}A{line[17:]}"
            else:
                alternative = [name if f == fields[5] else f for f in fields]
                alternative[4], alternative[9] = "B", str(float(fields[9]) + shift)
                added.append(" ".join(alternative))
                line = line.replace(" . ", " A ", 1)
            end = len(lines) + 1
        lines.append(line)
    return "\n".join([*lines[:end], *added, *lines[end:], ""])


@pytest.mark.parametrize("text", [pdb_text, cif_text], ids=["pdb", "cif"])
def test_of_two_amino_acids_in_one_place_that_of_the_sequence_is_read(text, tmp_path):
    ser = SEQUENCE[:10] + "S" + SEQUENCE[11:]
    thr = ser[:10] + "T" + ser[11:]
    moved = BETA + 30.0 * (np.arange(len(ser)) == 10)[:, None] * [1, 0, 0]
    path = tmp_path / f"a.{text.__name__[:3]}"
    made = either(text(ser, ALPHA, BETA, MISSING), 10, "THR", 30.0)
    path = write(path, made)
    here, there = (contacts_of(ser, ALPHA, beta, MISSING) for beta in (BETA, moved))
    assert (here != there).any()
    for sequence, expected in ((None, here), (thr, there), (ser, here)):
        found = read_structure(path, sequence=sequence)
        assert found.sequence == (sequence or ser)
        np.testing.assert_array_equal(found.is_contact, expected)
    names = {pdb_text: {"seqres": False}, cif_text: {"scheme": False}}
    bare = write(path, either(text(ser, ALPHA, BETA, **names[text]), 10, "THR", 30.0))
    assert read_structure(bare).sequence == ser


def test_an_amino_acid_and_its_modification_in_one_place_are_one_residue(tmp_path):
    made = either(pdb_text(SEQUENCE, ALPHA, BETA), 0, "MSE", 9.0).splitlines()
    text = "\n".join(line.replace("ATOM  ", "HETATM") if "MSE" in line else line for line in made)
    found = read_structure(write(tmp_path / "a.pdb", text))
    np.testing.assert_array_equal(found.is_contact, contacts_of(SEQUENCE, ALPHA, BETA))


def test_a_list_of_contacts_needs_the_sequence(tmp_path):
    path = write(tmp_path / "a.tsv", "i\tj\tdistance\n2\t9\t5.1\n# none\n\n12,3\n")
    found = read_structure(path, sequence=SEQUENCE)
    assert {*zip(*np.nonzero(found.is_contact), strict=True)} == {(1, 8), (8, 1), (11, 2), (2, 11)}
    assert found.is_resolved.all()
    path.write_text("2\t9\n", encoding="utf-8-sig")
    assert read_structure(path, sequence=SEQUENCE).is_contact.sum() == 2
    with pytest.raises(UserError, match="give the sequence of a by --fasta"):
        read_structure(path)
    path.write_text("1\t" + "9" * 5000)
    with pytest.raises(UserError, match="line 1 is"):
        read_structure(path, sequence=SEQUENCE)
    for line in ("2\t99", "0\t4", "2", "2 x"):
        write(path, f"1 7\n{line}\n")
        with pytest.raises(UserError, match=r"line 2 is .* two residues from 1 to 52"):
            read_structure(path, sequence=SEQUENCE)


def test_a_structure_of_another_sequence_is_refused(tmp_path):
    path = write(tmp_path / "a.pdb", pdb_text(SEQUENCE, ALPHA, BETA))
    mutant = SEQUENCE[:9] + "W" + SEQUENCE[10:]
    with pytest.raises(UserError, match=r"a does not match .* 1 of its 52 .* \(residue 10 is K\)"):
        read_structure(path, sequence=mutant)
    with pytest.raises(UserError, match="a does not match the sequence: "):
        read_structure(path, sequence=SEQUENCE[:-5])
    unknown = SEQUENCE[:9] + "X" + SEQUENCE[10:]
    assert read_structure(path, sequence=unknown).is_resolved.all()


@pytest.mark.parametrize(
    ("name", "content", "error"),
    [
        ("a.pdb", "", "holds no amino acid|cannot be read as a structure"),
        ("a.pdb", "HETATM    1  O   HOH A   1       0.000   0.000   0.000", "holds no amino acid"),
        ("a.pdb", "ATOM      1  CA  ALA A   1       x.000   0.000   0.000", "cannot be read as a"),
        ("a.cif", "data_\nloop_\n_atom_site.id\n1 2", "cannot be read as a structure"),
        ("a.cif", "\xff\x00", "cannot be read as a structure"),
        ("a.pdb.gz", "not gzip", "a.pdb.gz cannot be read"),
    ],
)
def test_a_damaged_file_is_named(name, content, error, tmp_path):
    path = tmp_path / name
    path.write_text(content, encoding="latin-1")
    with pytest.raises(UserError, match=error):
        read_structure(path)


def test_paths_are_files_chains_and_folders(tmp_path):
    folder = Path(write_structures(tmp_path / "pdbs", [SEQUENCE, SEQUENCE]))
    (folder / "notes.txt").write_text("")
    assert find_structures([str(folder)]) == [(folder / "p0.pdb", ""), (folder / "p1.pdb", "")]
    (tmp_path / "empty").mkdir()
    for path, error in (
        (tmp_path / "none.pdb", "does not exist"),
        (folder / "notes.txt", "no structure by its name"),
        (tmp_path / "empty", "holds no structure"),
    ):
        with pytest.raises(UserError, match=error):
            find_structures([str(path)])


def test_without_biopython_the_extra_is_named(tmp_path, monkeypatch):
    path = write(tmp_path / "a.pdb", pdb_text(SEQUENCE, ALPHA, BETA))
    monkeypatch.setitem(sys.modules, "Bio", None)
    with pytest.raises(UserError, match=r"esm1nv_jax\[structures\]"):
        read_structure(path)
