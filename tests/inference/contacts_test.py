"""`esm1nv contacts` from structures on disk to maps, tables and a model with a contact head."""

import csv
import dataclasses
import math
import shutil

import numpy as np
import pytest
from matplotlib.image import imread

from esm1nv_jax import load
from esm1nv_jax.checkpoints import model_folder
from esm1nv_jax.common import command
from esm1nv_jax.common.errors import UserError
from esm1nv_jax.inference import contact_maps, structures
from esm1nv_jax.inference.contacts import main
from tests.inference.made_structures import write_structures
from tests.inference.models import make_proteins, write_fasta

SEQUENCES = [s for _, s in make_proteins(30, seed=2) if 30 <= len(s) <= 50][:4]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """(two structures to fit, two others)."""
    root = tmp_path_factory.mktemp("structures")
    names = (
        write_structures(root / "fit", SEQUENCES[:2]),
        write_structures(root / "test", SEQUENCES[2:], ".cif", seed=5),
    )
    return names


def contacts(*arguments):
    main([str(a) for a in arguments])


def test_maps_and_precision_of_structures_by_the_jacobian(
    model_path, model, folders, tmp_path, capsys
):
    contacts("--checkpoint", model_path, "--structures", folders[1], "--out", tmp_path / "out")
    assert {p.name for p in (tmp_path / "out").iterdir()} == {
        "precision.tsv", *(f"p{k}.{suffix}" for k in (0, 1) for suffix in ("npz", "tsv", "png"))
    }  # fmt: skip
    with open(tmp_path / "out/precision.tsv", encoding="utf-8") as file:
        table = list(csv.DictReader(file, delimiter="\t"))
    assert len(table) == 2 * 3 * 3  # proteins, methods, ranges
    for k, sequence in enumerate(SEQUENCES[2:]):
        arrays = np.load(tmp_path / f"out/p{k}.npz")
        np.testing.assert_allclose(arrays["scores"], model.contacts(sequence), atol=1e-5)
        assert (str(arrays["sequence"]), str(arrays["id"])) == (sequence, f"p{k}")
        with open(tmp_path / f"out/p{k}.tsv", encoding="utf-8") as file:
            pairs = list(csv.DictReader(file, delimiter="\t"))
        L = len(sequence)
        assert len(pairs) == (L - 6) * (L - 5) // 2
        values = [float(pair["score"]) for pair in pairs]
        assert values == sorted(values, reverse=True)
        for pair in pairs:
            i, j = int(pair["i"]) - 1, int(pair["j"]) - 1
            assert (pair["residue_i"], pair["residue_j"]) == (sequence[i], sequence[j])
            assert int(pair["contact"]) == arrays["is_contact"][i, j]
        short = [p for p in pairs if 6 <= int(p["j"]) - int(p["i"]) < 12]
        expected = np.mean([int(p["contact"]) for p in short[: L // 2]])
        [row] = [
            r
            for r in table
            if (r["protein"], r["method"], r["range"]) == (f"p{k}", "jacobian", "short")
        ]
        assert math.isclose(float(row["P@L/2"]), expected, abs_tol=1e-6)
        assert int(row["residues"]) == L
        picture = imread(tmp_path / f"out/p{k}.png")[..., :3]
        assert picture.shape[0] > 400 and (picture.max(axis=-1) < 0.1).sum() > 1000  # contacts
    shown = capsys.readouterr().out
    assert "mean ± s.e. over 2 proteins" in shown and "by separation" in shown
    of_long = [float(r["P@L"]) for r in table if (r["method"], r["range"]) == ("random", "long")]
    mean, error, _ = structures.mean_and_error(of_long)
    assert f"{mean:.3f} ± {error:.3f}" in shown


def test_maps_without_structures_leave_no_precision_of_an_earlier_run(model_path, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out/precision.tsv").write_text("of other maps")
    fasta = write_fasta(tmp_path / "p.fasta", [("a", "MKTV")])
    arguments = ["--checkpoint", model_path, "--fasta", fasta, "--out", tmp_path / "out"]
    contacts(*arguments, "--formats", "npz", "--overwrite")
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["a.npz"]


def test_a_protein_named_as_the_table_keeps_its_maps(model_path, tmp_path):
    fasta = write_fasta(tmp_path / "p.fasta", [("Precision", "MKTV")])
    arguments = ["--checkpoint", model_path, "--fasta", fasta, "--out", tmp_path / "out"]
    contacts(*arguments, "--formats", "tsv")
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["Precision-2.tsv"]


def test_a_fitted_head_is_used_saved_and_used_again(model_path, folders, tmp_path, capsys):
    saved = tmp_path / "model"
    contacts(
        "--checkpoint", model_path, "--fit", folders[0], "--structures", folders[1],
        "--save-model", saved, "--out", tmp_path / "a", "--formats", "npz",
    )  # fmt: skip
    assert "contact head fitted to 2 structures" in capsys.readouterr().err
    fasta = write_fasta(tmp_path / "p.fasta", [("p1", SEQUENCES[3]), ("../x|y", SEQUENCES[2])])
    contacts(
        "--checkpoint", saved, "--fasta", fasta, "--structures", f"{folders[1]}/p1.cif",
        "--method", "attention", "--out", tmp_path / "b", "--formats", "npz",
    )  # fmt: skip
    assert {p.name for p in (tmp_path / "b").iterdir()} == {
        "p1.npz", "___x_y.npz", "precision.tsv"
    }  # fmt: skip
    once, again = np.load(tmp_path / "a/p1.npz"), np.load(tmp_path / "b/p1.npz")
    np.testing.assert_allclose(once["scores"], again["scores"], atol=1e-6)
    np.testing.assert_array_equal(once["is_contact"], again["is_contact"])
    assert "is_contact" not in np.load(tmp_path / "b/___x_y.npz")
    assert load(str(saved)).digest == load(model_path).digest  # that of the encoder


@pytest.mark.parametrize("method", ["jacobian", "attention"])
def test_a_protein_too_large_for_its_maps_is_named_before_any_work(
    method, model_path, folders, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(contact_maps, "ARRAY_BYTES", 1 << 12)
    fasta = write_fasta(tmp_path / "p.fasta", [("a", "M"), ("longer", SEQUENCES[3])])
    arguments = ["--checkpoint", model_path, "--fasta", fasta, "--out", str(tmp_path / "out")]
    if method == "attention":
        saved = tmp_path / "model"
        weights = model_folder.read(model_path)
        head = {"kernel": np.ones((8, 1), np.float32), "bias": np.zeros(1, np.float32)}
        model_folder.write(str(saved), dataclasses.replace(weights, contact_head=head))
        arguments[1] = str(saved)
    assert command.run(main, [*arguments, "--method", method]) == 2
    assert f"protein longer has {len(SEQUENCES[3])} residues, its" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        ("--out OUT", "give proteins: --fasta, --structures or both"),
        ("--fasta FASTA", "give --out, a folder for the maps, or --fit with --save-model"),
        ("--fasta FASTA --out OUT --save-model OUT2", "--save-model goes with --fit"),
        ("--fasta FASTA --out OUT --formats npz,pdf", "--formats=pdf is unknown; there are npz"),
        ("--fasta FASTA --out FULL", "exists and is not empty"),
        ("--fasta FASTA --out none/OUT", "there is no folder"),
        ("--fasta FASTA --out OUT --method attention", "this model has no contact head; fit one"),
        ("--fit TEST/p0.cif --save-model OUT", "--fit names 1 structure; give 2 to 20"),
        ("--fit FIT --structures FIT --out OUT", "of --fit, so its precision would mean"),
        ("--fasta FASTA --structures FIT/p0.pdb --out OUT", "p0 has the name of no protein in"),
        ("--fasta WRONG --structures TEST/p1.cif --out OUT", "p1 does not match the sequence"),
        ("--fasta FASTA --out OUT --max-residues 20", "protein b has .* and the model reads 20"),
        ("--structures FIT TEST --out OUT", "two structures of --structures have one name"),
        ("--structures none.pdb --out OUT", "structure none.pdb does not exist"),
        ("--structures FIT:A --out OUT", "FIT:A names a chain of a folder; give FILE:A"),
        ("--fasta FASTA --out OUT --formats ,", "--formats= is unknown; there are npz"),
    ],
)
def test_mistakes_are_answered_by_one_line(
    arguments, error, model_path, folders, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "FULL").mkdir()
    (tmp_path / "FULL/file").write_text("")
    write_fasta(tmp_path / "FASTA", [("a", "MKTV"), ("b", SEQUENCES[0])])
    write_fasta(tmp_path / "WRONG", [("p1", SEQUENCES[2])])
    for name, folder in zip(("FIT", "TEST"), folders, strict=True):
        shutil.copytree(folder, tmp_path / name)
    status = command.run(main, ["--checkpoint", model_path, *arguments.split()])
    printed = capsys.readouterr().err.strip()
    assert status == 2 and "\n" not in printed
    with pytest.raises(UserError, match=error):
        raise UserError(printed)
    assert not (tmp_path / "OUT").exists()
