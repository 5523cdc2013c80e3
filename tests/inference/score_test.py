"""Scores against a slow, literal reading of their definitions over the NumPy reference."""

import csv
import errno
import os
import subprocess
import sys
import tracemalloc
from collections import Counter

import jax
import numpy as np
import pytest
from matplotlib.image import imread
from scipy.stats import spearmanr

from esm1nv_jax import cli, load
from esm1nv_jax.common import command, files
from esm1nv_jax.common.errors import UserError
from esm1nv_jax.data import tokenizer
from esm1nv_jax.inference import likelihood, variant_table
from esm1nv_jax.inference import mutants as mutants_lib
from esm1nv_jax.inference.score import read_measured, spearman
from esm1nv_jax.inference.variant_table import SavedScores
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


MUTANTS = ["M1A", "K2R", "K2W:R5A", "G17D", "R5A", "V4G", "V4A:Q6L:G17C", "A15A"]


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
    for sites in (far, ":".join(far.split(":")[::-1])):
        with pytest.raises(UserError, match="65 residues apart, the model reads 64"):
            model.score_variants(wild, [sites])
    one_by_one = model.score_variants(wild, [far], additive=True)
    alone = model.score_variants(wild, far.split(":"))
    assert abs(one_by_one[0] - alone.sum()) < 1e-4
    with pytest.raises(UserError, match="additive scores are of mode masked-marginals"):
        model.score_variants(wild, [far], mode="pseudo-perplexity", additive=True)


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
    return command.run(cli.dispatch, [*argv, *options])


def test_the_command_keeps_the_table_and_compares_by_rank(model, model_path, tmp_path, capsys):
    measured = [0.3, -1.0, 2.0, 0.0, 0.5, 0.7, 1.5, 0.1]
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
    assert f"spearman {rank:.4f} with DMS_score over 8 mutants" in capsys.readouterr().out
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
        (["--mutants", str(tmp_path / "good.csv"), "--all-singles"], "--mutants, --all-singles"),
        ([], "--mutants, --all-singles"),
        (["--all-singles", "--additive", "--mode", "wt-marginals"], "--additive is for"),
        (["--all-singles", "--target", "x"], "--target=x is no column; there are mutant"),
        (["--mutants", str(tmp_path / "good.csv"), "--target", "x"], "no three numbers"),
        (["--all-singles", "--out", str(tmp_path), "--overwrite"], "it is a folder"),
        (["--all-singles", "--out", str(tmp_path / "s.csv.gz")], "let it end in .csv or .tsv"),
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


@pytest.mark.parametrize("text", ["K2R,R5A", "K2R/R5A", "K2R; R5A", "K2R R5A", "K2R+R5A"])
def test_several_substitutions_are_joined_by_a_colon(model, text):
    with pytest.raises(UserError, match="join them by ':', as K2R:R5A"):
        model.score_variants(WILD, [text])


def test_rows_without_a_score_are_counted_by_kind_on_request(model, model_path, tmp_path, capsys):
    names = ["WT", "K2R", "_wt", "K2*", "", "V4A", "A4G", "M99A", "V4del", "K2R,R5A", "K2X"]
    rows = [f'"{name}",{i}' for i, name in enumerate(names)]
    (tmp_path / "m.csv").write_text("\n".join(["mutant,DMS_score", *rows]) + "\n")
    mutants = ["--mutants", str(tmp_path / "m.csv")]
    assert score(model_path, tmp_path, *mutants) == 2
    error = capsys.readouterr().err
    assert "row 2: 'WT' is no substitution" in error and "--on-error=skip" in error
    assert score(model_path, tmp_path, *mutants, "--on-error", "skip") == 0
    told = capsys.readouterr().err
    assert "9 rows without a score" in told
    for kind in (
        "wild type 2",
        "stop 1",
        "blank 1",
        "another residue in the sequence 1",
        "outside the sequence 1",
        "no substitution 1",
        "not joined by ':' 1",
        "no standard amino acid 1",
    ):
        assert kind in told
    with open(tmp_path / "s.csv", encoding="utf-8") as file:
        table = list(csv.DictReader(file))
    assert [row["mutant"] for row in table if row["score"]] == ["K2R", "V4A"]
    expected = model.score_variants(WILD, ["K2R", "V4A"])
    np.testing.assert_allclose([float(table[i]["score"]) for i in (1, 5)], expected, rtol=1e-4)


@pytest.mark.parametrize(
    ("table", "told", "ranked"),
    [
        ("mutant, DMS_score\nK2R, 0.5\nR5A, 0.6\nR5G, 0.7\n", "", True),
        ('mutant,DMS_score\nK2R,"0,5"\nR5A,"0,6"\nR5G,"0,9"\n', "'0,5', which is no number", False),
        ("mutant,DMS_score\nK2R,1\nR5A,1\nR5G,1\n", "no three numbers that differ", False),
        ("mutant,DMS_score\nK2R,1\nR5A,2\nR5G,4\nV4A,NA\n", "'NA', which is no number", True),
    ],
)
def test_measurements_are_compared_or_it_is_said_why_not(
    model_path, tmp_path, capsys, table, told, ranked
):
    (tmp_path / "m.csv").write_text(table)
    assert score(model_path, tmp_path, "--mutants", str(tmp_path / "m.csv")) == 0
    printed = capsys.readouterr()
    assert told in printed.err
    assert ("spearman" in printed.out) == ranked


def test_a_killed_pseudo_perplexity_goes_on(model_path, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(variant_table, "BLOCK", 2)
    (tmp_path / "m.csv").write_text("mutant\n" + "\n".join(MUTANTS) + "\n")
    options = ["--mutants", str(tmp_path / "m.csv"), "--mode", "pseudo-perplexity"]
    assert score(model_path, tmp_path, *options) == 0
    whole = (tmp_path / "s.csv").read_text()
    (tmp_path / "s.csv").unlink()
    scored = []
    compute = likelihood.score_mutants

    def counted(*args, **kwargs):
        if len(scored) == 4:
            raise KeyboardInterrupt
        scored.extend(mutant.name for mutant in args[2])
        return compute(*args, **kwargs)

    monkeypatch.setattr(likelihood, "score_mutants", counted)
    assert score(model_path, tmp_path, *options) == 130
    partial = tmp_path / "s.csv.partial"
    partial.write_text(partial.read_text() + '{"mutant": "G1')  # the line that was being written
    assert score(model_path, tmp_path, *options, "--offset", "0", "--precision", "bf16") == 2
    with monkeypatch.context() as other:
        other.setattr("tests.inference.score_test.WILD", WILD + "M")
        assert score(model_path, tmp_path, *options) == 2
    assert score(model_path, tmp_path, *options, "--max-residues", "60") == 2
    assert capsys.readouterr().err.count("unfinished work with other settings") == 3
    monkeypatch.setattr(likelihood, "score_mutants", compute)
    calls = []
    monkeypatch.setattr(
        likelihood,
        "score_mutants",
        lambda *args, **kwargs: calls.extend(m.name for m in args[2]) or compute(*args, **kwargs),
    )
    assert score(model_path, tmp_path, *options) == 0
    assert scored == MUTANTS[:4] and calls == MUTANTS[4:]
    assert "4 mutants done" in capsys.readouterr().err
    assert (tmp_path / "s.csv").read_text() == whole and not partial.exists()


def test_a_rank_correlation_needs_two_values():
    scores, equal = np.array([1.0, 2, 3, np.nan]), np.array([2.0, 2, 2, 5])
    for some in (spearman(scores, equal), spearman(equal, scores)):
        assert np.isnan(some[0]) and some[1] == 3


def test_saved_scores_survive_a_disk_that_refuses(tmp_path, monkeypatch):
    out, settings = tmp_path / "s.csv", {"model": "a"}
    path = tmp_path / "s.csv.partial"
    SavedScores(out, settings, overwrite=False).append({"A1G": 0.5})
    whole = path.read_text()

    def full(path, text):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(files, "write_atomically", full)
        with pytest.raises(UserError, match="no space left to write"):
            SavedScores(out, settings, overwrite=False)
    assert path.read_text() == whole
    path.write_bytes(path.read_bytes() + b"7\n\xff\n")  # damage is passed over
    assert SavedScores(out, settings, overwrite=False).scores == {"A1G": 0.5}
    path.write_text("")  # killed before the first line
    assert SavedScores(out, settings, overwrite=False).scores == {}


def test_many_mutants_share_one_table_of_log_probabilities(model):
    """What is held for each mutant does not grow with the protein."""
    wild = "".join(s for _, s in make_proteins(3, seed=9))[:60]
    names = mutants_lib.all_singles(wild)
    model.score_variants(wild, names, mode="wt-marginals")  # compiles
    tracemalloc.start()
    found = model.score_variants(wild, names * 20, mode="wt-marginals")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 200 * len(found)
    np.testing.assert_array_equal(found[: len(names)], found[-len(names) :])


def test_the_rows_of_a_table_are_not_held_in_memory(tmp_path):
    names = mutants_lib.all_singles(WILD) * 30
    rows = "".join(f"{name},{'A' * 1000},{i},x\n" for i, name in enumerate(names))
    path = tmp_path / "m.csv"
    path.write_text("mutant,mutated_sequence,DMS_score,note\n" + rows)
    tracemalloc.start()
    columns, mutants = variant_table.read_mutants(path, WILD, 0, False)
    n, measured = mutants.total, read_measured(path, columns, None)
    variant_table.write_scores(
        tmp_path / "s.csv", columns, variant_table.rows_of(path), {"score": np.zeros(n)}
    )
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert path.stat().st_size > 9_000_000 and peak < 6_000_000
    assert [m.name for m in mutants[-2:]] == names[-2:] and mutants[5].name == names[5]
    assert measured.values.tolist() == list(range(n))
    with open(tmp_path / "s.csv", encoding="utf-8") as file:
        assert sum(1 for _ in file) == n + 1


def test_slices_of_a_table_of_mutants_are_tables():
    names = ["K2R:R5A", "M1A", "V4A:Q6L:G17C", "G17D", "r5a"]
    table = mutants_lib.parse_mutants(names, WILD)
    assert [mutant.name for mutant in table] == [*names[:4], "R5A"]
    for first in range(6):
        for last in range(6):
            assert list(table[first:last]) == list(table)[first:last]
    assert table[2].apply_to(WILD) == "MKTARLERLKSIVRALC"


def test_rows_that_are_not_missense_are_counted_by_kind():
    names = ["_wt", "wt", "WT", "_sy", "K2=", "K2K", "K2R:R5R", "K2*", "K2Ter", "", "R5A"]
    skipped = Counter()
    table = mutants_lib.parse_mutants(names, WILD, skipped=skipped, missense=True)
    assert skipped == {"wild type": 3, "synonymous": 3, "stop": 2, "blank": 1}
    assert [m.name for m in table] == ["K2R:R5R", "R5A"] and table.rows.tolist() == [6, 10]


def test_results_are_written_whatever_the_locale(model_path, tmp_path):
    fasta = write_fasta(tmp_path / "wt.fasta", [("größe", WILD)])
    (tmp_path / "m.csv").write_bytes("mutant,ΔG\nK2R,0.1\n".encode())
    out = tmp_path / "s.csv"
    argv = ["score", "--checkpoint", model_path, "--fasta", fasta, "--out", str(out)]
    argv += ["--mutants", str(tmp_path / "m.csv")]
    env = {k: v for k, v in os.environ.items() if k not in ("LC_ALL", "LANG", "PYTHONUTF8")}
    env |= {"LC_ALL": "POSIX", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"}
    job = subprocess.run(
        [sys.executable, "-m", "esm1nv_jax", *argv], env=env, capture_output=True, text=True
    )
    assert job.returncode == 0, job.stderr
    assert out.read_text(encoding="utf-8").startswith("mutant,ΔG,score\nK2R,0.1,")
