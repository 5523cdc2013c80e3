"""What one protein may take: windows by default, and a line that names it where it is too much."""

import jax
import numpy as np
import pytest

from esm1nv_jax import cli, load
from esm1nv_jax.checkpoints import model_folder
from esm1nv_jax.common import command
from esm1nv_jax.common.errors import UserError
from esm1nv_jax.inference import engine, loaded_model
from esm1nv_jax.model import encoder
from tests.inference.models import make_proteins, write_fasta
from tests.model.parameters import random_parameters

CONFIG = encoder.EncoderConfig(
    layers=1, width=32, heads=4, ffn=64, positions=4098, dropout=0.0, attention_dropout=0.0
)
LONG = ("TITIN_PART", "ACDEFGHIKLMNPQRSTVWY" * 20)


@pytest.fixture(scope="module")
def long_model(tmp_path_factory):
    path = tmp_path_factory.mktemp("model") / "long"
    params = random_parameters(CONFIG, 7)
    model_folder.write(str(path), model_folder.Weights(params, CONFIG, {}))
    return str(path)


def embed(model_path, folder, *options):
    fasta = write_fasta(folder / "p.fasta", [*make_proteins(3, seed=1), LONG])
    argv = ["embed", "--checkpoint", model_path, "--fasta", fasta, "--out", str(folder / "e.npz")]
    return command.run(cli.dispatch, [*argv, *options])


def test_windows_are_the_default_where_one_pass_is_too_large(
    long_model, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(loaded_model, "SCORES_BYTES", 4 * 4 * 102**2)
    assert load(long_model).longest == 100
    assert embed(long_model, tmp_path) == 0
    assert "the first is TITIN_PART: read in overlapping windows" in capsys.readouterr().err
    found = np.load(tmp_path / "e.npz")
    windows = load(long_model, max_residues=100).embed([LONG[1]])
    np.testing.assert_allclose(found["mean_-1"][3], windows.mean[0], atol=1e-5)


def test_a_protein_that_does_not_fit_is_named_before_the_work(
    long_model, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(command, "machine_memory", lambda: 3 * 4 * 4 * 300**2)
    assert embed(long_model, tmp_path, "--max-residues", "400") == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: TITIN_PART has 400 residues: to read 400 at once takes")
    enough = error.split("--max-residues ")[1].split()[0]
    assert 100 < int(enough) < 300
    assert embed(long_model, tmp_path, "--max-residues", enough) == 0
    with pytest.raises(UserError, match="sequence 1 has 400 residues"):
        load(long_model, max_residues=400).embed(["MK", LONG[1]])
    argv = ["score", "--checkpoint", long_model, "--fasta", write_fasta(tmp_path / "l", [LONG])]
    argv += ["--all-singles", "--out", str(tmp_path / "s.csv"), "--max-residues", "400"]
    capsys.readouterr()
    assert command.run(cli.dispatch, argv) == 2
    assert "error: TITIN_PART has 400 residues" in capsys.readouterr().err
    (tmp_path / "t.csv").write_text(f"sequence\nMK\n{LONG[1]}\n")
    argv = ["score", "--checkpoint", long_model, "--sequences", str(tmp_path / "t.csv")]
    argv += ["--out", str(tmp_path / "s.csv"), "--max-residues", "400"]
    assert command.run(cli.dispatch, argv) == 2
    assert "error: row 3 of t.csv has 400 residues" in capsys.readouterr().err
    argv = ["evaluate", "--checkpoint", long_model, "--fasta", str(tmp_path / "l")]
    assert command.run(cli.dispatch, [*argv, "--max-residues", "400"]) == 2
    assert "error: rows of 416 tokens do not fit into the memory" in capsys.readouterr().err
    with pytest.raises(UserError, match="rows of 416 tokens do not fit"):
        load(long_model, max_residues=400).score_sequences([LONG[1]])


def test_a_device_without_memory_is_one_line_that_names_the_protein(
    long_model, tmp_path, monkeypatch, capsys
):
    def forward(*args):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 9 bytes")

    monkeypatch.setattr(engine, "forward", forward)
    assert embed(long_model, tmp_path) == 2
    error = capsys.readouterr().err.splitlines()
    told = [line for line in error if line.startswith("error: ")]
    assert len(told) == 1 and told[0].startswith("error: TITIN_PART has 400 residues: rows of ")

    def other(*args):
        raise jax.errors.JaxRuntimeError("INTERNAL: something else")

    monkeypatch.setattr(engine, "forward", other)
    with pytest.raises(jax.errors.JaxRuntimeError, match="something else"):
        load(long_model).embed(["MK"])
