"""ProteinGym: metrics by their definitions, averages by hand, and a folder from end to end."""

import csv
import math
import types

import numpy as np
import pytest

from esm1nv_jax import cli
from esm1nv_jax.common import command
from esm1nv_jax.common.errors import UserError
from esm1nv_jax.inference import likelihood, proteingym_summary
from esm1nv_jax.inference.proteingym import read_assays
from esm1nv_jax.inference.proteingym_summary import METRICS, average, metrics_of
from tests.inference.score_test import WILD, additive, pll

OTHER = "GSHMLEDPVACDEFGHIK"


def test_metrics_are_their_definitions():
    rng = np.random.default_rng(0)
    measured = rng.normal(size=87).round(1)
    is_fit = (measured > 0.2).astype(float)
    scores = (measured + rng.normal(size=87)).round(1)
    scores[::2] = np.unique(scores).repeat(2)[:44]  # ties
    found = metrics_of(measured, is_fit, scores)
    fit, unfit = scores[is_fit == 1], scores[is_fit == 0]
    wins = sum((a > b) + (a == b) / 2 for a in fit for b in unfit)
    assert found["AUC"] == pytest.approx(wins / len(fit) / len(unfit))
    predicted = (scores >= np.median(scores)).astype(float)
    assert found["MCC"] == pytest.approx(np.corrcoef(is_fit, predicted)[0, 1])
    distinct = scores + np.linspace(0, 1e-6, 87)  # no ties: the benchmark leaves their order open
    gains = (measured - measured.min()) / (measured.max() - measured.min())
    ranked = sorted(zip(distinct.tolist(), gains.tolist(), strict=True), reverse=True)
    gained = sum(g / math.log2(rank + 1) for rank, (_, g) in enumerate(ranked[:8], 1))
    ideal = sum(g / math.log2(r + 1) for r, g in enumerate(sorted(gains)[::-1][:8], 1))
    found = metrics_of(measured, is_fit, distinct)
    assert found["NDCG"] == pytest.approx(gained / ideal)
    top, high = measured >= np.quantile(measured, 0.9), distinct >= np.quantile(distinct, 0.9)
    assert found["Top_recall"] == pytest.approx((top & high).sum() / top.sum())


def test_the_top_tenth_includes_its_bound():
    """As the benchmark has it since 2024; of 11 mutants these are two."""
    measured = np.arange(11.0)
    is_fit, scores = (measured > 5).astype(float), measured.copy()
    scores[9], scores[0] = scores[0], scores[9]
    assert metrics_of(measured, is_fit, scores)["Top_recall"] == 0.5
    measured = np.minimum(measured, 3)  # eight share the highest measurement
    assert metrics_of(measured, is_fit, scores)["Top_recall"] == 1 / 8


def test_what_was_not_measured_or_scored_takes_no_part():
    rng = np.random.default_rng(1)
    measured, scores = rng.normal(size=(2, 40))
    is_fit = (measured > 0).astype(float)
    whole = metrics_of(measured, is_fit, scores)
    gaps = [np.append(x, extra) for x, extra in ((measured, [0, np.nan]), (scores, [np.nan, 5]))]
    assert metrics_of(gaps[0], np.append(is_fit, [1, 1]), gaps[1]) == whole
    unknown = metrics_of(measured, np.full(40, np.nan), scores)
    assert math.isnan(unknown["AUC"]) and math.isnan(unknown["MCC"])
    assert unknown["Spearman"] == whole["Spearman"]
    assert all(map(math.isnan, metrics_of(np.ones(40), is_fit, scores).values()))


def assay(protein, function="", taxon=""):
    return types.SimpleNamespace(name="", protein=protein, function=function, taxon=taxon)


def test_assays_are_averaged_by_protein_then_by_function():
    assays = [
        assay("A", "Stability", "Human"),
        assay("A", "Stability", "Human"),
        assay("A", "Binding", "Human"),
        assay("B", "Stability", "Virus"),
        assay("C", "Binding", "Virus"),
        assay("D", "Binding", "Virus"),
    ]
    values = [0.2, 0.4, 0.8, 0.1, 0.2, math.nan]
    functions, taxa, mean, _ = average(assays, values)
    assert functions["Stability"] == pytest.approx((0.3 + 0.1) / 2)
    assert functions["Binding"] == pytest.approx((0.8 + 0.2) / 2)
    assert mean == pytest.approx((0.2 + 0.5) / 2)
    assert taxa["Human"] == pytest.approx((0.2 + 0.4 + 0.8) / 3)
    assert taxa["Virus"] == pytest.approx((0.1 + 0.2) / 2)
    mean = average([assay("A"), assay("A"), assay("B")], [0.1004, 0.3, 0.6])[2]
    assert mean == pytest.approx(0.4)  # no functions: over proteins, of three decimals


def test_the_standard_error_is_that_of_a_bootstrap_of_proteins():
    rng = np.random.default_rng(0)
    assays, values = [], []
    for function, n in (("Binding", 9), ("Stability", 25), ("Activity", 14)):
        assays += [assay(f"{function}{i}", function) for i in range(n)]
        values += rng.normal(0.4, 0.2, n).round(3).tolist()
    values = np.array(values)
    draws = []
    for _ in range(4000):
        chosen = (rng.choice(values[a:b], b - a) for a, b in ((0, 9), (9, 34), (34, 48)))
        draws.append(np.mean([x.mean() for x in chosen]))
    assert average(assays, values.tolist())[3] == pytest.approx(np.std(draws), rel=0.05)


ROWS = {  # name of the assay: (protein, function, taxon, wild type, mutants)
    "TOY_HUMAN_Doe_2020": ("TOY_HUMAN", "Stability", "Human", WILD, "K2R K2W:R5A WT K2K M1A _wt"),
    "TOY_HUMAN_Roe_2021": ("TOY_HUMAN", "Binding", "Human", WILD, "V4A R5A G17D Q6L R5*"),
    "TOY_VIRUS_Poe_2022": ("TOY_VIRUS", "Binding", "Virus", OTHER, "G1A S2T E6D:D7E H3K"),
}


def mutated(wild, name):
    letters = list(wild)
    for part in name.split(":"):
        if part[1:-1].isdigit() and part[-1] != "*":
            letters[int(part[1:-1]) - 1] = part[-1]
    return "".join(letters)


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "gym").mkdir()
    reference = ["DMS_id,DMS_filename,UniProt_ID,taxon,target_seq,coarse_selection_type"]
    for name, (protein, function, taxon, wild, mutants) in ROWS.items():
        rows = ["mutant,mutated_sequence,DMS_score,DMS_score_bin"]
        rows += [f"{m},{mutated(wild, m)},{i / 7},{i % 2}" for i, m in enumerate(mutants.split())]
        (tmp_path / "gym" / f"{name}.csv").write_text("\n".join(rows) + "\n")
        reference.append(f"{name},{name}.csv,{protein},{taxon},{wild},{function}")
    reference.append(f"ABSENT,ABSENT.csv,X,Human,{WILD},Activity")
    (tmp_path / "reference.csv").write_text("\n".join(reference) + "\n")
    return tmp_path


def gym(model_path, folder, *options):
    argv = ["score", "--checkpoint", model_path, "--proteingym", str(folder / "gym")]
    return command.run(cli.dispatch, [*argv, "--out", str(folder / "out"), *options])


def read(path):
    with open(path, encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_a_folder_of_substitutions_by_shards(model, model_path, folder, capsys, monkeypatch):
    reference = ["--reference", str(folder / "reference.csv")]
    assert gym(model_path, folder, *reference, "--shard", "1/2") == 0
    printed = capsys.readouterr()
    assert "3 of 4 assays of" in printed.err and "1 assay of 3 left to other shards" in printed.err
    assert not printed.out and len(list((folder / "out").glob("TOY*.csv"))) == 2
    scored = []
    compute = likelihood.score_mutants

    def counted(*args, **kwargs):
        scored.append(args[1])
        return compute(*args, **kwargs)

    monkeypatch.setattr(likelihood, "score_mutants", counted)
    assert gym(model_path, folder, *reference) == 0
    assert len(scored) == 1  # the assays of the first shard are there
    values = {metric: [] for metric in METRICS}
    for name, (_, _, _, wild, mutants) in ROWS.items():
        table = read(folder / "out" / f"{name}.csv")
        assert [row["mutant"] for row in table] == mutants.split()
        assert [*table[0]] == ["mutant", "mutated_sequence", "DMS_score", "DMS_score_bin", "score"]
        rows = [row for row in table if row["score"]]
        assert [r["mutant"] for r in table if not r["score"]] == [
            m for m in mutants.split() if m in ("WT", "_wt", "K2K", "R5*")
        ]
        found = np.array([float(row["score"]) for row in rows])
        expected = [additive(model, wild, row["mutant"]) for row in rows]
        np.testing.assert_allclose(found, expected, atol=1e-4)
        measured, is_fit = (
            np.array([float(row[c]) for row in rows]) for c in ("DMS_score", "DMS_score_bin")
        )
        for metric, value in metrics_of(measured, is_fit, found).items():
            values[metric].append(round(value, 3))
    (summary,) = read(folder / "out" / "substitutions_summary.csv")
    doe, roe, poe = values["Spearman"]
    assert float(summary["Average_Spearman"]) == pytest.approx(
        (doe + (roe + poe) / 2) / 2, abs=2e-3
    )
    assert float(summary["Function_Stability"]) == pytest.approx(doe, abs=1e-3)
    assert float(summary["Taxa_Virus"]) == pytest.approx(poe, abs=1e-3)
    assert float(summary["Without_viruses"]) == pytest.approx((doe + roe) / 2, abs=2e-3)
    by_assay = {row["DMS_id"]: row for row in read(folder / "out" / "substitutions_assays.csv")}
    assert by_assay["TOY_HUMAN_Doe_2020"]["number_mutants"] == "3"
    printed = capsys.readouterr()
    assert "ESM-2 8M (published)" in printed.out and "0.226" in printed.out
    rows = [line.split("│")[1:3] for line in printed.out.splitlines() if line.count("│") == 3]
    shown = {name.strip(): value.strip() for name, value in rows}
    assert shown["Virus"] == summary["Taxa_Virus"] != summary["Without_viruses"]
    assert shown["Without viruses"] == summary["Without_viruses"]


def test_rows_that_are_not_missense_are_counted(model_path, folder, capsys):
    assert gym(model_path, folder) == 0  # wild types from the first mutants
    told = capsys.readouterr().err
    assert "TOY_HUMAN_Doe_2020: 3 rows without a score: synonymous 1, wild type 2" in told
    assert "TOY_HUMAN_Roe_2021: 1 row without a score: stop 1" in told


def test_insertions_and_deletions_are_scored_whole(model, model_path, folder, capsys):
    for path in (folder / "gym").iterdir():
        path.unlink()
    sequences = [WILD, WILD[:5] + WILD[6:], WILD[:9] + "AA" + WILD[9:], WILD[2:], "MK*V", ""]
    rows = [f"{s},{i / 7},{i % 2}" for i, s in enumerate(sequences)]
    text = "\n".join(["mutated_sequence,DMS_score,DMS_score_bin", *rows]) + "\n"
    (folder / "gym" / "TOY_HUMAN_Doe_2020_indels.csv").write_text(text)
    assert gym(model_path, folder, "--mode", "pseudo-perplexity") == 0
    printed = capsys.readouterr()
    assert "2 rows without a score: blank 1, stop 1" in printed.err
    assert "67 forward passes, one a residue (--mode=one-pass: 4)" in printed.err
    table = read(folder / "out" / "TOY_HUMAN_Doe_2020_indels.csv")
    for row, sequence in zip(table[:4], sequences, strict=False):
        exact = pll(model, sequence)
        assert float(row["score"]) == pytest.approx(exact, abs=1e-3)
        assert float(row["score_per_residue"]) == pytest.approx(exact / len(sequence), abs=1e-4)
    assert [row["score"] for row in table[4:]] == ["", ""]
    by_score = read(folder / "out" / "indels_summary.csv")
    assert [row["Model_name"] for row in by_score] == ["score", "score_per_residue"]
    assert "published" not in printed.out
    assert gym(model_path, folder, "--overwrite") == 0
    assert "by one-pass, 4 forward passes, one a sequence" in capsys.readouterr().err


def test_mistakes_are_one_line(model_path, folder, capsys):
    path = folder / "gym" / "TOY_HUMAN_Doe_2020.csv"
    whole = path.read_text()
    (folder / "nothing").mkdir()
    reference = folder / "reference.csv"
    cases = [
        (["--proteingym", str(folder / "none")], "is no folder"),
        (["--proteingym", str(folder / "nothing")], "holds no assay; they are files such as"),
        (["--reference", str(path)], "no column DMS_id or UniProt_ID"),
        (["--shard", "3/2"], "--shard=3/2 is not i/n"),
        (["--fasta", str(path)], "--fasta has no meaning here"),
        (["--mode", "one-pass"], "is for --sequences"),
        (["--mutants", str(path)], "give one of --mutants"),
        (["--target", "DMS_score"], "--target has no meaning here"),
    ]
    for options, expected in cases:
        assert gym(model_path, folder, *options) == 2
        error = [x for x in capsys.readouterr().err.splitlines() if x.startswith("error: ")]
        assert len(error) == 1 and expected in error[0], error
    for text, options, expected in [
        (whole.replace("DMS_score,", "fitness,"), [], "is no assay: it needs DMS_score"),
        (whole.replace("DMS_score_bin", "score"), [], "column 'score' already"),
        (whole.replace(mutated(WILD, "K2R"), "MMMM"), [], "does not fit its mutated sequence"),
        (whole.replace(mutated(WILD, "K2R"), "MRéV"), [], "csv: character '\\xe9' at index 2 of"),
        (whole, ["--reference", str(reference)], "names no mutant of TOY_HUMAN"),
    ]:
        path.write_text(text)
        if options:
            reference.write_text(reference.read_text().replace(WILD, OTHER))
        assert gym(model_path, folder, *options) == 2
        assert expected in capsys.readouterr().err
    assert gym(model_path, folder) == 0
    assert gym(model_path, folder, "--mode", "wt-marginals") == 2
    assert "holds scores of other settings (mode)" in capsys.readouterr().err


def test_an_assay_is_one_file_and_one_line_of_the_reference(model_path, folder, capsys):
    path, reference = folder / "gym" / "TOY_HUMAN_Doe_2020.csv", folder / "reference.csv"
    path.with_name(f"{path.name}.bak").write_text("an older file")
    (folder / "gym" / "more.csv").mkdir()
    assert gym(model_path, folder, "--shard", "9/9") == 0
    assert "3 assays of 3 left to other shards" in capsys.readouterr().err
    header, first, *_ = text = reference.read_text().splitlines()
    name = first.partition(",")[0]
    for lines, expected in [
        ([*text, first], f"line 6: DMS_id '{name}' is in line 2, too"),
        ([header, first.replace(name, "", 1)], "line 2: DMS_id '' is no file name"),
        ([header, first.replace(name, "a/b", 1)], "DMS_id 'a/b' is no file name"),
        ([header, first.replace(name, "a\0b", 1)], "DMS_id 'a\\x00b' is no file name"),
        ([header, first.replace(name, 250 * "a", 1)], "aaa' is no file name"),
    ]:
        reference.write_text("\n".join(lines))
        assert gym(model_path, folder, "--reference", str(reference)) == 2
        assert expected in capsys.readouterr().err
    path.with_name(f"{path.name}.gz").write_bytes(path.read_bytes())
    assert gym(model_path, folder) == 2
    assert "Doe_2020.csv.gz are one assay by their names" in capsys.readouterr().err


def test_a_wild_type_that_cannot_be_found_is_told_before_any_assay_is_scored(folder):
    path = folder / "gym" / "TOY_VIRUS_Poe_2022.csv"
    path.write_text(path.read_text().replace(mutated(OTHER, "G1A"), "MKTV"))
    with pytest.raises(UserError, match=r"Poe_2022\.csv: G1A does not fit its mutated sequence"):
        read_assays(str(folder / "gym"), None)
    read_assays(str(folder / "gym"), str(folder / "reference.csv"))  # which has the wild types


def test_an_assay_that_begins_with_stops_is_one_of_substitutions(folder):
    path = folder / "gym" / "TOY_HUMAN_Doe_2020.csv"
    header, *rows = path.read_text().splitlines()
    stops = [f"K{i}*,MKTV,0,0" for i in range(1, 200)] + [f"A{'9' * 5000}G,MKTV,0,0"]
    path.write_text("\n".join([header, *stops, *rows]))
    assert not any(assay.is_indels for assay in read_assays(str(folder / "gym"), None))


def test_an_assay_without_a_correlation_is_named(tmp_path, capsys):
    assays = []
    for name, measured in (("x", "{}"), ("y", "n/a")):
        rows = (f"A{i}G,{measured.format(i)},{i % 2},{i}\n" for i in range(1, 21))
        text = "mutant,DMS_score,DMS_score_bin,score\n" + "".join(rows)
        (tmp_path / f"{name}.csv").write_text(text)
        assays.append(assay(name, "Binding"))
        assays[-1].name = name
    proteingym_summary.summarize(assays, tmp_path, "substitutions")
    printed = capsys.readouterr().out
    assert "y takes no part in the mean of Spearman" in printed and "x takes" not in printed


def test_published_values_stand_beside(monkeypatch, tmp_path, capsys):
    table = "mutant,DMS_score,DMS_score_bin,score\n" + "".join(
        f"A{i}G,{i},{i % 2},{i}\n" for i in range(1, 21)
    )
    (tmp_path / "x.csv").write_text(table)
    one = assay("A", "Binding", "Human")
    one.name = "x"
    proteingym_summary.summarize([one], tmp_path, "substitutions")
    printed = capsys.readouterr().out
    assert "over 217 assays, not these" in printed and "1.000" in printed
    monkeypatch.setattr(proteingym_summary, "PUBLISHED_ASSAYS", 1)
    proteingym_summary.summarize([one], tmp_path, "substitutions")
    assert "not these" not in capsys.readouterr().out


def test_scores_of_other_settings_never_enter_a_summary(model_path, folder, capsys):
    out = folder / "out"
    assert gym(model_path, folder) == 0
    old = {path.name: path.read_text() for path in out.glob("TOY*.csv")}
    other = ["--mode", "wt-marginals", "--overwrite", "--shard"]
    assert gym(model_path, folder, *other, "1/2") == 0
    assert len(list(out.glob("TOY*.csv"))) == 2  # the third, of the other mode, is gone
    assert gym(model_path, folder, *other, "2/2") == 0
    assert "published" in capsys.readouterr().out
    for path in out.glob("TOY*.csv"):
        assert path.read_text() != old[path.name]


def test_scores_of_an_assay_that_has_changed_are_refused(model_path, folder, capsys):
    assert gym(model_path, folder) == 0
    path, scores = (folder / f / "TOY_HUMAN_Doe_2020.csv" for f in ("gym", "out"))
    whole, scored = path.read_text(), scores.read_text()
    *most, last = whole.splitlines(keepends=True)
    for table, done in [
        ("".join(most), scored),
        (whole + last.replace("_wt", "K2A"), scored),
        (whole.replace("DMS_score_bin", "bin"), scored),
        (whole.replace("K2W:R5A", "K2W:R5G"), scored),
        (whole, scored[: scored.rindex("_wt")]),
    ]:
        path.write_text(table)
        scores.write_text(done)
        assert gym(model_path, folder) == 2
        assert "TOY_HUMAN_Doe_2020.csv has other rows than" in capsys.readouterr().err
    scores.unlink()
    path.write_text(whole)
    assert gym(model_path, folder) == 0 and scores.read_text() == scored


def test_what_was_not_written_here_stays(model_path, folder, capsys):
    assays = {path: path.read_text() for path in (folder / "gym").iterdir()}
    assert gym(model_path, folder, "--out", str(folder / "gym"), "--overwrite") == 2
    assert "is the folder of the assays" in capsys.readouterr().err
    assert {path: path.read_text() for path in (folder / "gym").iterdir()} == assays
    (folder / "out").mkdir()
    mine = folder / "out" / "TOY_HUMAN_Doe_2020.csv"
    mine.write_text("mine")
    for options in ([], ["--overwrite"]):
        assert gym(model_path, folder, *options) == 2
        assert "was not written by this command" in capsys.readouterr().err
    assert mine.read_text() == "mine"


def test_a_killed_overwrite_goes_on(model_path, folder, monkeypatch, capsys):
    assert gym(model_path, folder) == 0
    scored, compute = [], likelihood.score_mutants

    def counted(*args, **kwargs):
        scored.append(args[1])
        if len(scored) == 2:
            raise KeyboardInterrupt
        return compute(*args, **kwargs)

    monkeypatch.setattr(likelihood, "score_mutants", counted)
    assert gym(model_path, folder, "--overwrite") == 130
    assert gym(model_path, folder, "--overwrite") == 0 and len(scored) == 4
    (folder / "out" / "job-1-of-1.lock").unlink()
    (folder / "out" / "job-1-of-1.lock").mkdir()
    assert gym(model_path, folder) == 2
    assert "job-1-of-1.lock cannot be written: Is a directory" in capsys.readouterr().err
