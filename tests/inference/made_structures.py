"""Small synthetic structures, written letter by letter as PDB and mmCIF."""

import numpy as np

NAMES = dict(
    zip(
        "ARNDCQEGHILKMFPSTWYV",
        "ALA ARG ASN ASP CYS GLN GLU GLY HIS ILE LEU LYS MET PHE PRO SER THR TRP TYR VAL".split(),
        strict=True,
    )
)


def make_coordinates(residues, seed=0):
    """(C-alpha, C-beta) in Å, each [residues, 3]: a random walk in a small box, so that residues
    far apart in the sequence touch."""
    rng = np.random.default_rng(seed)
    steps = rng.normal(size=(residues, 3))
    walk = np.cumsum(3.8 * steps / np.linalg.norm(steps, axis=1, keepdims=True), axis=0)
    side = 4.0 * max(residues, 8) ** (1 / 3)
    folded = np.abs((walk + side) % (2 * side) - side)
    beta = folded + rng.normal(0, 1.0, folded.shape)
    return folded.round(3), beta.round(3)


def contacts_of(sequence, alpha, beta, missing=()):
    """bool [residues, residues], pair by pair."""
    L = len(sequence)
    found = np.zeros((L, L), bool)
    for i in range(L):
        for j in range(L):
            if i not in missing and j not in missing:
                a, b = (alpha[k] if sequence[k] == "G" else beta[k] for k in (i, j))
                found[i, j] = np.sqrt(((a - b) ** 2).sum()) < 8
    return found


def atoms(sequence, alpha, beta, missing=()):
    for i, letter in enumerate(sequence):
        if i in missing:
            continue
        yield i, "CA", letter, alpha[i]
        if letter != "G":
            yield i, "CB", letter, beta[i]


def pdb_text(sequence, alpha, beta, missing=(), chain="A", seqres=True, names=NAMES):
    lines = []
    three = [names[letter] for letter in sequence]
    for k in range(0, len(three), 13) if seqres else ():
        row = " ".join(three[k : k + 13])
        lines.append(f"SEQRES {k // 13 + 1:3d} {chain} {len(three):4d}  {row}")
    for n, (i, atom, letter, (x, y, z)) in enumerate(atoms(sequence, alpha, beta, missing), 1):
        record = "HETATM" if names[letter] == "MSE" else "ATOM  "
        lines.append(
            f"{record}{n:5d}  {atom:<3s} {names[letter]} {chain}{i + 7:4d}    "
            f"{x:8.3f}{y:8.3f}{z:8.3f}  1.00  0.00           C"
        )
    return "\n".join([*lines, "TER", ""])


def cif_text(sequence, alpha, beta, missing=(), chain="A", scheme=True):
    lines = ["data_made", "#"]
    if scheme:
        columns = "asym_id seq_id mon_id pdb_strand_id".split()
        lines += ["loop_", *(f"_pdbx_poly_seq_scheme.{c}" for c in columns)]
        lines += [f"Z {i + 1} {NAMES[letter]} {chain}" for i, letter in enumerate(sequence)]
    columns = (
        "group_PDB id type_symbol label_atom_id label_alt_id label_comp_id label_asym_id "
        "label_seq_id pdbx_PDB_ins_code Cartn_x Cartn_y Cartn_z occupancy B_iso_or_equiv "
        "auth_seq_id auth_comp_id auth_asym_id auth_atom_id pdbx_PDB_model_num"
    ).split()
    lines += ["#", "loop_", *(f"_atom_site.{c}" for c in columns)]
    for n, (i, atom, letter, (x, y, z)) in enumerate(atoms(sequence, alpha, beta, missing), 1):
        name = NAMES[letter]
        lines.append(
            f"ATOM {n} C {atom} . {name} Z {i + 1} ? {x:.3f} {y:.3f} {z:.3f} 1.0 0.0 {i + 7} "
            f"{name} {chain} {atom} 1"
        )
    return "\n".join([*lines, "#", ""])


def write_structures(folder, sequences, suffix=".pdb", seed=0):
    """Writes `p0.pdb`, ... and returns the folder's path as text."""
    folder.mkdir(exist_ok=True)
    for k, sequence in enumerate(sequences):
        alpha, beta = make_coordinates(len(sequence), seed + k)
        text = (pdb_text if suffix == ".pdb" else cif_text)(sequence, alpha, beta)
        (folder / f"p{k}{suffix}").write_text(text)
    return str(folder)
