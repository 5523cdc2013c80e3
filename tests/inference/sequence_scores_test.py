"""Whole sequences: exact pseudo-log-likelihoods read literally, and what one pass approximates."""

import csv
import dataclasses

import numpy as np
import pytest

from esm1nv_jax import cli, load
from esm1nv_jax.common import command
from esm1nv_jax.common.errors import UserError
from esm1nv_jax.data import tokenizer
from esm1nv_jax.data.tables import open_csv
from esm1nv_jax.data.tokenizer import ESM1NV
from esm1nv_jax.inference import likelihood, variant_table
from esm1nv_jax.inference.likelihood import copy_log_odds
from esm1nv_jax.inference.variant_table import SavedScores
from esm1nv_jax.model.masking import RECIPES, MaskingConfig
from tests.inference.models import CONFIG, make_model, make_proteins, write_fasta
from tests.inference.score_test import WILD, log_p, pll, take
from tests.inference.windows_test import farthest


def test_sequences_of_any_length_are_scored_literally(model):
    sequences = [WILD, WILD[:4] + WILD[7:], "MXK", WILD[:9] + "GG" + WILD[9:]]
    found = model.score_sequences(sequences)
    expected = [pll(model, s) if "X" not in s else np.nan for s in sequences]
    np.testing.assert_allclose(found[[0, 1, 3]], [expected[i] for i in (0, 1, 3)], atol=1e-4)
    assert np.isfinite(found).all() and model.score_sequences([]).shape == (0,)


def test_a_long_sequence_is_read_in_windows(model):
    """Every residue is predicted in the window in which it is farthest from a cut."""
    long = "".join(s for _, s in make_proteins(9, seed=4))[:100]
    limit = model.longest
    assert len(long) > limit
    windows = np.array([w.start for w in likelihood.split_into_windows(len(long), limit)])
    expected = 0.0
    for i, window in enumerate(farthest(len(long), limit)):
        start = int(windows[window])
        row = log_p(model, long[start : start + limit], [i - start])[i - start]
        expected += take(row, long[i])
    assert model.score_sequences([long])[0] == pytest.approx(expected, abs=2e-3)


def visible(masking: MaskingConfig, q: np.ndarray, x: int) -> float:
    """p(residue is x | x is visible and a target) of a perfect model, by the rule of corruption;
    q[y] is the probability of residue y by its context."""
    joint = np.zeros(len(q))
    for y in range(masking.letters):
        joint[y] += q[y] * (1 - masking.mask - masking.random) * (x == y)
        choices = [z for z in range(masking.letters) if masking.may_repeat or z != y]
        joint[y] += q[y] * masking.random * (x in choices) / len(choices)
    return joint[x] / joint.sum()


@pytest.mark.parametrize(
    "masking",
    [
        RECIPES["card"],
        MaskingConfig(0.15, 0.5, 0.2, letters=25, may_repeat=False),
        MaskingConfig(0.15, 0.0, 0.9, letters=20, may_repeat=True),
    ],
)
def test_what_a_visible_residue_says_of_itself_is_taken_off(masking):
    rng = np.random.default_rng(0)
    q = rng.dirichlet(np.full(masking.letters, 0.3))
    for x in range(0, masking.letters, 3):
        p = visible(masking, q, x)
        odds = np.log(p / (1 - p)) - copy_log_odds(masking)
        assert odds == pytest.approx(np.log(q[x] / (1 - q[x])), abs=1e-6)


def test_one_pass_is_the_log_probability_without_what_is_copied(model):
    sequences = [s for _, s in make_proteins(20, seed=3, longest=40)]
    sequences.append("MKJVJ")  # unknown letters are not scored
    found = model.score_sequences(sequences, exact=False)
    for sequence, value in zip(sequences, found, strict=True):
        p = np.exp(log_p(model, sequence, []))
        own = np.array([take(p[i], x) for i, x in enumerate(sequence) if x != "J"])
        odds = own / (1 - own) / np.exp(copy_log_odds(RECIPES["card"]))
        assert value == pytest.approx(np.log(odds / (1 + odds)).sum(), abs=1e-3)


def test_one_pass_is_refused_where_visible_residues_mean_nothing(tmp_path):
    shipped = load(make_model(tmp_path / "shipped", recipe="shipped"))
    with pytest.raises(UserError, match=r"one-pass: .* take pseudo-perplexity"):
        shipped.score_sequences([WILD], exact=False)
    assert shipped.score_sequences([WILD]).shape == (1,)


def score(model_path, folder, *options):
    argv = ["score", "--checkpoint", model_path, "--sequences", str(folder / "t.csv")]
    return command.run(cli.dispatch, [*argv, "--out", str(folder / "s.csv"), *options])


def write(folder, sequences):
    rows = "".join(f"{s},{i / 3}\n" for i, s in enumerate(sequences))
    (folder / "t.csv").write_text("sequence,fitness\n" + rows)


@pytest.mark.parametrize("mode", likelihood.SEQUENCE_MODES)
def test_a_killed_job_goes_on(model, model_path, tmp_path, monkeypatch, capsys, mode):
    monkeypatch.setattr(variant_table, "BLOCK", 2)
    monkeypatch.setattr(variant_table, "BLOCK_RESIDUES", 60)
    sequences = [s for _, s in make_proteins(9, seed=5, longest=30)]
    write(tmp_path, sequences)
    name = "pseudo_log_likelihood" if mode == likelihood.EXACT else "one_pass_log_likelihood"
    compute = getattr(likelihood, name)
    scored = []

    def counted(model, block, *rest):
        if len(scored) >= 4:
            raise KeyboardInterrupt
        scored.extend(block)
        return compute(model, block, *rest)

    monkeypatch.setattr(likelihood, name, counted)
    assert score(model_path, tmp_path, "--mode", mode) == 130
    first = len(scored)
    assert 0 < first < len(sequences)
    scored.clear()
    write(tmp_path, sequences[::-1])
    assert score(model_path, tmp_path, "--mode", mode) == 2
    assert "unfinished work with other settings" in capsys.readouterr().err
    write(tmp_path, sequences)
    assert score(model_path, tmp_path, "--mode", mode, "--max-residues", "20") == 2
    assert "unfinished work with other settings" in capsys.readouterr().err
    monkeypatch.setattr(likelihood, name, lambda *args: scored.extend(args[1]) or compute(*args))
    assert score(model_path, tmp_path, "--mode", mode) == 0
    assert len(scored) == len(sequences) - first
    printed, told = capsys.readouterr()
    assert f"{first} sequences done" in told
    assert "score: spearman" in printed and "score_per_residue: spearman" in printed
    with open(tmp_path / "s.csv", encoding="utf-8") as file:
        table = list(csv.DictReader(file))
    expected = model.score_sequences(sequences, exact=mode == likelihood.EXACT)
    np.testing.assert_allclose([float(row["score"]) for row in table], expected, rtol=1e-4)
    assert not (tmp_path / "s.csv.partial").exists()


def test_sequences_that_cannot_be_scored(model_path, tmp_path, capsys):
    write(tmp_path, ["MK*V", "MK", "", "M1K", "mk-v*"])
    assert score(model_path, tmp_path) == 2
    assert "row 2: the sequence cannot be scored (stop)" in capsys.readouterr().err
    assert score(model_path, tmp_path, "--on-error", "skip") == 0
    assert "3 rows without a score: blank 1, no residue letters 1, stop 1" in (
        capsys.readouterr().err
    )
    (tmp_path / "t.csv").write_text("protein,x\nMK,1\n")
    assert score(model_path, tmp_path, "--overwrite") == 2
    assert "no column mutated_sequence or sequence; it has protein, x" in capsys.readouterr().err
    assert score(model_path, tmp_path, "--mode", "wt-marginals") == 2
    assert "there are pseudo-perplexity, one-pass" in capsys.readouterr().err


def test_a_mask_in_a_sequence_stays_a_mask(model):
    p = [log_p(model, "MKAV", [2, i])[i] for i in range(4)]
    expected = sum(take(p[i], "MKAV"[i]) for i in (0, 1, 3))
    assert model.score_sequences(["MK<mask>V"])[0] == pytest.approx(expected, abs=1e-4)
    once = model.score_sequences(["MK<mask>V"], exact=False)
    assert once != model.score_sequences(["MKJV"], exact=False)
    change = p[1][tokenizer.TOKENS.index("R")] - take(p[1], "K")
    found = model.score_variants("MK<mask>V", ["K2R"])
    assert found[0] == pytest.approx(change, abs=1e-4)


def test_unknown_letters_are_not_predicted(model):
    known = model.score_sequences(["MKJV"])[0]
    p = [log_p(model, "MKJV", [i])[i] for i in range(4)]
    expected = sum(take(p[i], "MKJV"[i]) for i in (0, 1, 3))
    assert known == pytest.approx(expected, abs=1e-4)
    assert tokenizer.residue_ids(b"J")[0] == tokenizer.UNK


WITHOUT_O = dataclasses.replace(CONFIG, vocabulary=ESM1NV.removesuffix(" O"))


def test_mutants_are_compared_by_the_letters_that_are_predicted(tmp_path):
    path = make_model(tmp_path / "m", config=WITHOUT_O)
    model = load(path)
    for wild in ("MKOV", "MKJV", "MK<mask>V"):
        found = model.score_variants(wild, ["K2R", "V4A"], mode="pseudo-perplexity")
        whole = model.score_sequences([wild, wild.replace("K", "R"), wild.replace("V", "A")])
        np.testing.assert_allclose(found, whole[1:] - whole[0], atol=1e-5)
    for mode in likelihood.MODES:
        for wild, name in (("MKOV", "O3A"), ("MKJV", "K2R:J3A")):
            with pytest.raises(UserError, match=f"{name}: this model has no token for {wild[2]}"):
                model.score_variants(wild, ["K2R", name], mode=mode)
    argv = ["score", "--checkpoint", path, "--fasta", write_fasta(tmp_path / "w", [("w", "MKOV")])]
    assert command.run(cli.dispatch, [*argv, "--all-singles", "--out", f"{tmp_path}/s.csv"]) == 0
    rows = (tmp_path / "s.csv").read_text().splitlines()[1:]
    assert len(rows) == 3 * 19 and not any(row.startswith("O") for row in rows)


def test_each_window_of_a_long_protein_has_its_own_wild_type(model):
    wild = "".join(s for _, s in make_proteins(9, seed=4))
    names = [f"{wild[i]}{i + 1}W" for i in (0, 100)]
    found = model.score_variants(wild, names, mode="pseudo-perplexity")
    for i, start, value in zip((0, 100), (0, 100 - model.longest // 2), found, strict=True):
        mutated = f"{wild[:i]}W{wild[i + 1 :]}"
        cut = [text[start : start + model.longest] for text in (mutated, wild)]
        after, before = model.score_sequences(cut)
        assert value == pytest.approx(after - before, abs=1e-4)


def test_a_table_named_tsv_has_tabs(model_path, tmp_path):
    (tmp_path / "t.csv").write_text('sequence,note\nMKV,"a,b"\n')
    out = tmp_path / "s.tsv"
    assert score(model_path, tmp_path, "--out", str(out)) == 0
    assert open_csv(str(out))[0] == ["sequence", "note", "score", "score_per_residue"]
    assert out.read_text().splitlines()[1].startswith("MKV\ta,b\t")


def test_a_column_that_stands_twice_is_refused(model_path, tmp_path, capfd):
    (tmp_path / "t.csv").write_text("sequence,sequence\nMKV,MKL\n")
    assert score(model_path, tmp_path, "--out", str(tmp_path / "s.csv")) == 2
    assert "has two columns 'sequence'; rename one" in capfd.readouterr().err


def test_saved_scores_are_kept_by_overwrite_where_settings_are_the_same(tmp_path):
    out = tmp_path / "s.csv"
    SavedScores(out, {"model": "a"}, True).append({"A1G": 0.5})
    assert SavedScores(out, {"model": "a"}, True).scores == {"A1G": 0.5}
    assert SavedScores(out, {"model": "b"}, True).scores == {}
