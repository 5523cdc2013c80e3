"""HDF5 as protspace and biotrainer read it, by readers like theirs, and biotrainer's autoeval."""

import hashlib

import h5py
import numpy as np
import pytest

from esm1nv_jax import cli
from esm1nv_jax.common import command
from esm1nv_jax.inference import biotrainer, fasta_job
from tests.inference.models import make_proteins, write_fasta

PROTEINS = [*make_proteins(30, seed=1), ("sp|P12345|X_HUMAN", "MKTVRQERLK"), ("TWIN", "MKTVRQERLK")]


def embed(model_path, folder, *options, proteins=PROTEINS):
    fasta = write_fasta(folder / "p.fasta", proteins)
    argv = ["embed", "--checkpoint", model_path, "--fasta", fasta, "--out", str(folder / "e.h5")]
    return command.run(cli.dispatch, [*argv, *options])


def test_one_data_set_a_protein_named_by_its_id(model, model_path, tmp_path, small_parts):
    """As protspace reads it: flat or one level of groups, vectors, a name of the model."""
    assert embed(model_path, tmp_path, "--layout", "per-protein") == 0
    read = {}
    with h5py.File(tmp_path / "e.h5") as file:
        assert file.attrs["model_name"] == "tiny"
        for name, item in file.items():
            assert isinstance(item, h5py.Dataset) and item.ndim == 1
            assert item.attrs["original_id"] == name
            read[name] = item[:]
    assert set(read) == {name for name, _ in PROTEINS}
    expected = model.embed([sequence for _, sequence in PROTEINS]).mean
    for (name, _), vector in zip(PROTEINS, expected, strict=True):
        np.testing.assert_allclose(read[name], vector, atol=1e-5)


def test_one_data_set_a_sequence_named_by_its_hash(model, model_path, tmp_path, small_parts):
    """As biotrainer reads it: embeddings by SHA-256 of the sequence and its length."""
    options = ["--layout", "biotrainer", "--include", "per_residue", "--layers", "1"]
    assert embed(model_path, tmp_path, *options) == 0
    sequences = dict.fromkeys(sequence for _, sequence in PROTEINS)
    with h5py.File(tmp_path / "e.h5") as file:
        assert len(file) == len(sequences) == len(PROTEINS) - 1
        for sequence in sequences:
            name = hashlib.sha256(f"{sequence}_{len(sequence)}".encode()).hexdigest()
            expected = model.embed([sequence], layer=1).per_residue[0]
            np.testing.assert_allclose(file[name][:], expected, atol=1e-5)
            assert file[name].attrs["original_id"] in dict(PROTEINS)


def test_a_killed_job_and_shards_keep_the_layout(model_path, tmp_path, small_parts, monkeypatch):
    options = ["--layout", "biotrainer"]
    assert embed(model_path, tmp_path, *options) == 0
    with h5py.File(tmp_path / "e.h5") as file:
        whole = {name: item[:] for name, item in file.items()}
    (tmp_path / "e.h5").unlink()
    for shard in ("1/2", "2/2"):
        assert embed(model_path, tmp_path, *options, "--shard", shard) == 0
    argv = ["embed", "--merge", "--out", str(tmp_path / "e.h5")]
    assert command.run(cli.dispatch, argv) == 0
    with h5py.File(tmp_path / "e.h5") as file:
        assert {*file} == {*whole}
        for name, value in whole.items():
            np.testing.assert_array_equal(file[name][:], value)


@pytest.mark.parametrize(
    ("options", "proteins", "words"),
    [
        (["--layout", "flat"], PROTEINS, "--layout=flat is unknown; there are joined, per-protein"),
        (["--layers", "0", "1"], PROTEINS, "one array for each protein"),
        (["--include", "mean", "cls"], PROTEINS, "one array for each protein"),
        (["--include", "logits"], PROTEINS, "no logits"),
        (["--out", "e.npz"], PROTEINS, "let --out end in .h5"),
        ([], [("PF1/2-9", "MK")], "id 'PF1/2-9' cannot name a data set of HDF5"),
        ([], [(".", "MK")], "id '.' cannot name a data set of HDF5"),
    ],
)
def test_what_a_layout_cannot_hold_is_one_line_before_the_work(
    model_path, tmp_path, capsys, monkeypatch, options, proteins, words
):
    monkeypatch.setattr(fasta_job, "_Job", None)  # nothing is computed
    options = ["--layout", "per-protein", *options]
    assert embed(model_path, tmp_path, *options, proteins=proteins) == 2
    error = [x for x in capsys.readouterr().err.splitlines() if x.startswith("error: ")]
    assert len(error) == 1 and words in error[0]


def test_the_functions_that_autoeval_asks_for(model, monkeypatch):
    monkeypatch.setattr(biotrainer, "CHUNK", 4)
    sequences = [sequence for _, sequence in PROTEINS[:10]]
    per_residue, per_sequence = biotrainer.embedding_functions(model, layer=1)
    expected = model.embed(sequences, layer=1)
    for function, values in ((per_residue, expected.per_residue), (per_sequence, expected.mean)):
        found = list(function(iter(sequences)))
        assert [sequence for sequence, _ in found] == sequences
        for (sequence, value), other in zip(found, values, strict=True):
            assert value.ndim == 1 or value.shape[0] == len(sequence)
            np.testing.assert_allclose(value, other, atol=1e-5)
