"""Scores against a slow, literal reading of their definitions over the NumPy reference."""

import csv

import jax
import numpy as np
import pytest
from matplotlib.image import imread
from scipy.stats import spearmanr

from esm1nv_jax import cli, load
from esm1nv_jax.common import arguments
from esm1nv_jax.common.errors import UserError
from esm1nv_jax.data import tokenizer
from tests.inference.models import make_model, make_proteins, write_fasta
from tests.model import reference

WILD = "MKTVRQERLKSIVRALG"


def log_p(model, sequence, masked):
    """log softmax at every residue of one sequence with <mask> at indices `masked`: NumPy, fp64."""
    ids = tokenizer.encode(sequence)
    ids[[i + 1 for i in masked]] = tokenizer.MASK
    params = jax.tree.map(lambda x: np.asarray(x, np.float64), model.params)
    logits = reference.forward(params, ids, model.config.heads)[1][1:-1]
    return np.log(reference.softmax(logits))


def take(row, letter):
    return row[tokenizer.TOKENS.index(letter)]


def split(mutant):
    return [(m[0], int(m[1:-1]) - 1, m[-1]) for m in mutant.split(":")]


def masked_marginal(model, wild, mutant, window=slice(None)):
    shift = window.start or 0
    sites = [(old, i - shift, new) for old, i, new in split(mutant)]
    p = log_p(model, wild[window], [i for _, i, _ in sites])
    return sum(take(p[i], new) - take(p[i], old) for old, i, new in sites)


def additive(model, wild, mutant):
    return sum(masked_marginal(model, wild, part) for part in mutant.split(":"))


def wild_type_marginal(model, wild, mutant):
    p = log_p(model, wild, [])
    return sum(take(p[i], new) - take(p[i], old) for old, i, new in split(mutant))


def pll(model, sequence):
    return sum(take(log_p(model, sequence, [i])[i], s) for i, s in enumerate(sequence))


def pseudo(model, wild, mutant):
    letters = list(wild)
    for _, i, new in split(mutant):
        letters[i] = new
    return pll(model, "".join(letters)) - pll(model, wild)


MUTANTS = ["M1A", "K2R", "K2W:R5A", "G17D", "R5A", "V4A:Q6L:G17C", "A15A"]


@pytest.mark.parametrize(
    "options,literal",
    [
        ({}, masked_marginal),
        ({"additive": True}, additive),
        ({"mode": "wt-marginals"}, wild_type_marginal),
        ({"mode": "pseudo-perplexity"}, pseudo),
    ],
)
def test_scores_equal_the_literal_ones(model, options, literal):
    found = model.score_variants(WILD, MUTANTS, **options)
    expected = [literal(model, WILD, mutant) for mutant in MUTANTS]
    np.testing.assert_allclose(found, expected, atol=1e-4)
    assert np.ptp(expected) > 0.1


def test_a_long_protein_is_read_in_a_window_centred_on_the_sites(model):
    wild = "".join(s for _, s in make_proteins(9, seed=4))
    assert len(wild) > 3 * model.longest
    half = model.longest // 2

    def name(i):
        return f"{wild[i]}{i + 1}A"

    for i, start in ((0, 0), (100, 100 - half), (len(wild) - 3, len(wild) - model.longest)):
        found = model.score_variants(wild, [name(i)])
        window = slice(start, start + model.longest)
        assert abs(found[0] - masked_marginal(model, wild, name(i), window)) < 1e-4
    far = f"{name(10)}:{name(10 + model.longest)}"
    with pytest.raises(UserError, match="65 residues apart, the model reads 64"):
        model.score_variants(wild, [far])
    one_by_one = model.score_variants(wild, [far], additive=True)
    alone = model.score_variants(wild, far.split(":"))
    assert abs(one_by_one[0] - alone.sum()) < 1e-4


@pytest.mark.parametrize(
    "mutant,expected",
    [
        ("A4G", "begins with A, but the sequence has V"),
        ("V40G", "have the numbers 1 to 17"),
        ("V0G", "have the numbers 1 to 17"),
        ("V4del", "insertions, deletions"),
        ("V4GG", "insertions, deletions"),
        ("4", "insertions, deletions"),
        ("", "insertions, deletions"),
        ("V4*", "insertions, deletions"),
        ("V4X", "no standard amino acid"),
        ("V4A:V4G", "changes one residue twice"),
    ],
)
def test_what_cannot_be_scored_is_refused_with_its_row(model, mutant, expected):
    with pytest.raises(UserError, match=expected) as caught:
        model.score_variants(WILD, ["M1A", mutant])
    assert str(caught.value).startswith("row 2: ")


def test_wild_type_marginals_are_refused_where_they_mean_nothing(tmp_path):
    shipped = load(make_model(tmp_path / "shipped", recipe="shipped"))
    with pytest.raises(UserError, match="without unchanged targets"):
        shipped.score_variants(WILD, ["M1A"], mode="wt-marginals")
    assert shipped.score_variants(WILD, ["M1A"], mode="wt-marginals", force=True).shape == (1,)
    assert shipped.score_variants(WILD, ["M1A"]).shape == (1,)


def score(model_path, folder, *options):
    fasta = write_fasta(folder / "wt.fasta", [("WT", WILD)])
    argv = ["score", "--checkpoint", model_path, "--fasta", fasta, "--out", str(folder / "s.csv")]
    return arguments.run(cli.dispatch, [*argv, *options])


def test_the_command_keeps_the_table_and_compares_by_rank(model, model_path, tmp_path, capsys):
    measured = [0.3, -1.0, 2.0, 0.0, 0.5, 1.5, 0.1]
    shifted = [":".join(f"{a}{i + 24}{b}" for a, i, b in split(m)) for m in MUTANTS]
    rows = [f"{m},{x},note" for m, x in zip(shifted, measured, strict=True)]
    (tmp_path / "m.csv").write_text("\n".join(["mutant,DMS_score,other", *rows]) + "\n")
    options = ["--mutants", str(tmp_path / "m.csv"), "--offset", "23"]
    assert score(model_path, tmp_path, *options) == 0
    with open(tmp_path / "s.csv", encoding="utf-8") as file:
        table = list(csv.DictReader(file))
    assert [row["mutant"] for row in table] == shifted and table[0]["other"] == "note"
    expected = model.score_variants(WILD, MUTANTS)
    np.testing.assert_allclose([float(row["score"]) for row in table], expected, rtol=1e-4)
    rank = spearmanr(expected, measured).statistic
    assert f"spearman {rank:.4f} with DMS_score over 7 mutants" in capsys.readouterr().out
    assert score(model_path, tmp_path, *options) == 2
    assert "exists; add --overwrite" in capsys.readouterr().err
    assert score(model_path, tmp_path, "--mutants", str(tmp_path / "m.csv"), "--overwrite") == 2
    told = capsys.readouterr().err.strip().splitlines()[-1]
    assert told.startswith("error: row 2: M24A is outside") and "--offset" in told


def test_all_singles_and_their_heat_map(model, model_path, tmp_path):
    assert score(model_path, tmp_path, "--all-singles") == 0
    with open(tmp_path / "s.csv", encoding="utf-8") as file:
        table = {row["mutant"]: float(row["score"]) for row in csv.DictReader(file)}
    assert len(table) == 19 * len(WILD)
    for mutant in ("M1A", "G17D"):
        assert abs(table[mutant] - masked_marginal(model, WILD, mutant)) < 1e-4
    picture = imread(tmp_path / "s.png")
    assert picture.shape[0] > 200 and len(np.unique(picture.reshape(-1, 4), axis=0)) > 100


def test_mistakes_of_the_command_are_one_line(model_path, tmp_path, capsys):
    (tmp_path / "m.csv").write_text("variant,x\nM1A,2\n")
    (tmp_path / "ragged.csv").write_text("mutant,x\nM1A,2,3\n")
    (tmp_path / "good.csv").write_text("mutant,x\nM1A,2\n")
    for options, expected in [
        (["--mutants", str(tmp_path / "m.csv")], "no column 'mutant'"),
        (["--mutants", str(tmp_path / "ragged.csv")], "line 2: 3 fields"),
        (["--mutants", str(tmp_path / "none.csv")], "No such file"),
        (["--mutants", str(tmp_path / "good.csv"), "--mode", "best"], "invalid choice"),
        (["--mutants", str(tmp_path / "good.csv"), "--all-singles"], "--mutants or --all-singles"),
        ([], "--mutants or --all-singles"),
        (["--all-singles", "--additive", "--mode", "wt-marginals"], "--additive is for"),
        (["--all-singles", "--target", "x"], "--target=x is no column; there are mutant"),
        (["--mutants", str(tmp_path / "good.csv"), "--target", "x"], "no three numbers"),
        (["--all-singles", "--out", str(tmp_path), "--overwrite"], "it is a folder"),
    ]:
        assert score(model_path, tmp_path, *options) == 2
        told = [x for x in capsys.readouterr().err.splitlines() if x.startswith("error: ")]
        assert len(told) == 1 and expected in told[0], told
        assert not (tmp_path / "s.csv").exists()  # told before the work


def test_a_mutant_too_wide_for_a_window_is_told_before_any_is_computed(model):
    wild = WILD * 20
    name = [f"{a}{i}{'G' if a != 'G' else 'A'}" for i, a in enumerate(wild, 1)]
    done = []
    mutants = [*name[:100], f"{name[0]}:{name[-1]}"]  # more than are planned together
    with pytest.raises(UserError, match=f"{len(wild)} residues apart"):
        model.score_variants(wild, mutants, mode="pseudo-perplexity", on_progress=done.append)
    assert not done
