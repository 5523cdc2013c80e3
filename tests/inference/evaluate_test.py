"""Evaluation against plain loops over proteins, and against itself in another order."""

import dataclasses
import json
import math
import random

import jax
import numpy as np
import pytest
from Bio.Align import substitution_matrices

from esm1nv_jax import cli
from esm1nv_jax.checkpoints import model_folder
from esm1nv_jax.common import command, files
from esm1nv_jax.common.errors import UserError
from esm1nv_jax.data import tokenizer
from esm1nv_jax.data.source import MemorySource, open_split
from esm1nv_jax.data.tokenizer import ESM1NV
from esm1nv_jax.inference import fixed_masks
from esm1nv_jax.inference.evaluate import evaluate_model, read_groups
from esm1nv_jax.inference.evaluation_report import ORDER, blosum62, compare_with_blosum62
from esm1nv_jax.inference.likelihood import pseudo_log_likelihood
from esm1nv_jax.inference.model import Model
from esm1nv_jax.inference.perplexity import GroupedMean
from esm1nv_jax.inference.row_shapes import RowShapes
from esm1nv_jax.model import encoder
from tests.model.parameters import random_parameters

CONFIG = encoder.EncoderConfig(layers=2, width=32, heads=2, ffn=64, positions=130)


@pytest.fixture(scope="module")
def params():
    """Large enough that predictions differ from each other."""
    return jax.tree.map(lambda x: np.asarray(3 * x), random_parameters(CONFIG, 3))


@pytest.fixture(scope="module")
def model(params):
    return Model(CONFIG, params, {})


@pytest.fixture(scope="module")
def proteins():
    source = open_split("sample", "test")
    found = list(zip(source.ids(range(30)), source.sequences(range(30)), strict=True))
    text = b"MKTAYIAKQR" * 20
    edges = [(f"of_{n}", text[:n]) for n in (100, 128)]
    return [*found, ("with_unknowns", b"MKX*BZJAUO" * 7), ("short", b"M"), *edges]


@pytest.fixture(scope="module")
def found(model, proteins, tmp_path_factory):
    """(figures, the masks they were taken on)."""
    path = tmp_path_factory.mktemp("masks") / "masks.jsonl"
    groups = {name: "odd" if i % 2 else "even" for i, (name, _) in enumerate(proteins)}
    source = MemorySource(proteins)
    result = evaluate_model(model, source, groups=groups, masks_out=str(path))
    return result, path, groups


def by_hand(model, path):
    """Per protein: what every figure is made of, one protein a pass, softmax in NumPy."""
    rows = []
    for line in map(json.loads, path.read_text().splitlines()):
        tokens = ["<unk>" if letter == "?" else letter for letter in line["sequence"]]
        truth = [tokens[i] for i in line["positions"]]
        for position, token in zip(line["positions"], line["inputs"], strict=True):
            tokens[position] = token
        text = "".join("J" if t == "<unk>" else t for t in tokens)
        logits = np.float64(model.logits([text])[0])
        logp = logits - np.log(np.exp(logits - logits.max(1, keepdims=True)).sum(1, keepdims=True))
        logp -= logits.max(1, keepdims=True)
        visible = [t for t in tokens if len(t) == 1]
        rows.append((line, truth, logp, visible))
    return rows


def test_every_figure_is_what_a_loop_over_proteins_gives(model, found, proteins):
    result, path, _ = found
    counts = {}
    for _, sequence in proteins:
        for letter in sequence.decode():
            counts[letter] = counts.get(letter, 0) + 1
    total = sum(counts.get(a, 0) + 1 for a in tokenizer.RESIDUES)
    unigram = {a: (counts.get(a, 0) + 1) / total for a in tokenizer.RESIDUES}
    sums = {name: [] for name in ("all", "mask", "right", "20", "unigram", "composition")}
    of_leucine = []
    for line, truth, logp, visible in by_hand(model, path):
        each = {name: [0, 0.0] for name in sums}
        for token, at, true in zip(line["inputs"], line["positions"], truth, strict=True):
            nats = -logp[at][tokenizer.TOKENS.index(true)]

            def add(name, value, each=each):
                each[name][0] += 1
                each[name][1] += value

            add("all", nats)
            if token != "<mask>":
                continue
            add("mask", nats)
            add("right", tokenizer.TOKENS[np.argmax(logp[at])] == true)
            add("unigram", -math.log(unigram[true]))
            own = (visible.count(true) + 100 * unigram[true]) / (len(visible) + 100)
            add("composition", -math.log(own))
            if true == "L":
                of_leucine.append(nats)
            if true in "LASGVERTDIPKNFQYHMCW":
                of_20 = np.exp(logp[at][5:25]).sum()
                add("20", nats + math.log(of_20))
        for name in sums:
            sums[name].append(each[name])

    def mean_and_error(name):
        n, value = np.array(sums[name], np.float64).T
        n, value = n[n > 0], value[n > 0]
        mean = value.sum() / n.sum()
        k = len(n)
        return mean, math.sqrt(k / (k - 1) * ((value - mean * n) ** 2).sum()) / n.sum()

    whole = result["overall"]
    for name, key in (
        ("all", "perplexity"),
        ("mask", "perplexity_mask"),
        ("20", "perplexity_mask_20"),
        ("unigram", "unigram_mask"),
        ("composition", "composition_mask"),
    ):
        mean, error = mean_and_error(name)
        assert whole[key] == pytest.approx(math.exp(mean), rel=2e-6)
        assert whole[f"{key}_se"] == pytest.approx(math.exp(mean) * error, rel=1e-4)
    assert whole["accuracy_mask"] == pytest.approx(mean_and_error("right")[0], rel=1e-9)
    leucine = result["by_residue"]["L"]
    assert leucine["perplexity_mask"] == pytest.approx(math.exp(np.mean(of_leucine)), rel=1e-5)
    assert leucine["positions_mask"] == len(of_leucine)


def test_classes_of_proteins_add_up_to_the_whole(found, proteins):
    result, _, groups = found
    for table in ("by_length", "by_group", "by_residue"):
        rows = result[table].values()
        assert sum(r["positions_mask"] for r in rows) == result["overall"]["positions_mask"]
    assert result["by_group"]["odd"]["sequences"] == sum(g == "odd" for g in groups.values())
    up_to_200 = sum(100 < len(s) <= 200 for _, s in proteins)
    assert result["by_length"]["101-200"]["sequences"] == up_to_200
    assert result["cropped"] == sum(len(s) > 128 for _, s in proteins)


def flat(results):
    whole = results["overall"]
    return [whole[name] for name in sorted(whole)]


def test_order_batch_and_devices_change_nothing(model, params, found, proteins):
    reference = flat(found[0])
    shuffled = random.Random(1).sample(proteins, len(proteins))
    np.testing.assert_allclose(
        flat(evaluate_model(model, MemorySource(shuffled))), reference, rtol=1e-6
    )
    one = Model(CONFIG, params, {})
    placed = one.on_devices
    mesh = jax.make_mesh((1,), ("rows",), (jax.sharding.AxisType.Auto,), devices=jax.devices()[:1])
    alone = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("rows"))
    everywhere = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    one.__dict__["on_devices"] = dataclasses.replace(
        placed,
        params=jax.device_put(params, everywhere),
        row_sharding=alone,
        shapes=RowShapes.up_to(130, 700, 1),
    )
    np.testing.assert_allclose(
        flat(evaluate_model(one, MemorySource(proteins))), reference, rtol=1e-6
    )


def test_another_seed_asks_other_questions(model, found, proteins):
    other = evaluate_model(model, MemorySource(proteins), seed=1)["overall"]
    whole = found[0]["overall"]
    assert other["positions"] == whole["positions"]
    assert abs(other["perplexity_mask"] / whole["perplexity_mask"] - 1) > 1e-4


def test_masks_read_back_ask_the_same(model, found):
    result, path, _ = found
    masks = fixed_masks.read_masks(str(path))
    again = evaluate_model(model, masks.source, mask_file=masks)["overall"]
    for name, value in again.items():
        assert value == pytest.approx(result["overall"][name], rel=1e-6), name


def test_the_unigram_is_counted_in_training_proteins_where_they_are_known(model, proteins):
    source = MemorySource(proteins)
    trained = dataclasses.replace(model, provenance={"config": {"data": {"path": "sample"}}})
    counts = np.zeros(25)
    for sequence in open_split("sample", "train").sequences(range(9_000)):
        counts += [sequence.count(letter.encode()) for letter in tokenizer.RESIDUES]
    frequencies = (counts + 1) / (counts + 1).sum()
    for results in (
        evaluate_model(trained, source),
        evaluate_model(model, source, training_data="sample"),
    ):
        assert results["unigram_of"] == "sample:train"
        whole, rows = results["overall"], results["by_residue"]
        n = {letter: row["positions_mask"] for letter, row in rows.items()}
        nats = [-n[a] * math.log(frequencies[tokenizer.RESIDUES.index(a)]) for a in n]
        assert whole["unigram_mask"] == pytest.approx(math.exp(sum(nats) / sum(n.values())))
    gone = dataclasses.replace(model, provenance={"config": {"data": {"path": "/not/here"}}})
    assert evaluate_model(gone, source)["unigram_of"] == "these proteins"


def test_a_perfect_and_a_constant_predictor():
    tally = GroupedMean(1)
    tally.add(np.zeros(3, int), np.array([5, 1, 9]), np.zeros(3))
    assert tally.perplexity() == (1.0, 0.0)
    tally = GroupedMean(2)
    tally.add(np.ones(3, int), np.array([5, 1, 9]), np.array([5, 1, 9]) * math.log(20))
    assert tally.perplexity(1) == (pytest.approx(20), pytest.approx(0, abs=1e-6))
    assert math.isnan(tally.mean(0)[0])


def test_the_standard_error_is_the_spread_of_repeated_samples():
    """Drawn a thousand times, the mean spreads as the error says, though proteins are lumpy."""
    rng = np.random.default_rng(0)
    means, errors = [], []
    for _ in range(1000):
        n = rng.integers(1, 60, 80)
        total = n * rng.normal(2.8, 0.3, 80) + rng.normal(0, np.sqrt(n))
        tally = GroupedMean(1)
        tally.add(np.zeros(80, int), n, total)
        mean, error = tally.mean()
        means.append(mean)
        errors.append(error)
    assert np.mean(errors) == pytest.approx(np.std(means), rel=0.08)


def test_a_model_of_another_vocabulary_is_asked_only_what_it_can_say(tmp_path):
    config = dataclasses.replace(CONFIG, vocabulary=ESM1NV.removesuffix(" O"))
    model = Model(config, random_parameters(config), {})
    source = MemorySource([("a", b"MKO" * 20), ("b", b"OOOO"), ("c", b"ACDEFGHIKL")])
    found = evaluate_model(model, source, pseudo=True)
    path = str(tmp_path / "masks.jsonl")
    full = Model(CONFIG, random_parameters(CONFIG), {})
    whole = evaluate_model(full, source, masks_out=path)["overall"]
    masks = fixed_masks.read_masks(path)  # that ask for O too
    lines = map(json.loads, (tmp_path / "masks.jsonl").read_text().splitlines())
    asked = [line["sequence"][i] for line in lines for i in line["positions"]]
    again = evaluate_model(model, masks.source, mask_file=masks)["overall"]
    assert again["positions"] == len(asked) - asked.count("O") < whole["positions"] == len(asked)
    assert found["overall"]["perplexity"] < 40 and "O" not in found["by_residue"]
    assert 0 < found["overall"]["positions"] < whole["positions"]
    assert [s["residues"] for s in found["pseudo_perplexity"]["sequences"]] == [40, 0, 10]


def test_pseudo_perplexity_hides_one_residue_at_a_time(model):
    sequences = [b"MKTAYIAKQR", b"GAVXLW", b"M" * 140]
    cut = [sequence[:128] for sequence in sequences]
    residues, pll = pseudo_log_likelihood(model.on_devices, cut, 128)
    each = np.exp(-pll / residues)
    for i, sequence in enumerate(sequences[:2]):
        nats = []
        for at in range(len(sequence)):
            text = sequence.decode()
            (p,) = model.fill_mask(f"{text[:at]}<mask>{text[at + 1 :]}", top=20)
            scores = np.float64(model.logits([f"{text[:at]}<mask>{text[at + 1 :]}"])[0][at])
            logp = scores - np.log(np.exp(scores - scores.max()).sum()) - scores.max()
            assert len(p.residues) == 20
            nats.append(-logp[tokenizer.TOKENS.index(text[at])])
        assert each[i] == pytest.approx(math.exp(np.mean(nats)), rel=1e-5)
    assert residues.tolist() == [10, 6, 128]
    source = MemorySource([(f"p{i}", sequence) for i, sequence in enumerate(sequences)])
    result = evaluate_model(model, source, pseudo=True)["pseudo_perplexity"]
    assert result["median"] == pytest.approx(np.median(each))
    assert result["token_weighted"] == pytest.approx(math.exp(-pll.sum() / 144))


def test_blosum62_is_the_published_matrix():
    theirs = substitution_matrices.load("BLOSUM62")
    mine = blosum62()
    assert all(theirs[a][b] == mine[i, j] for i, a in enumerate(ORDER) for j, b in enumerate(ORDER))


def test_the_log_odds_of_counts_made_from_blosum_are_blosum():
    letters = "LASGVERTDIPKNFQYHMCW"
    # Background frequencies of the 20 amino acids, in ORDER (Robinson and Robinson, 1991).
    p = np.array([78, 51, 45, 54, 19, 43, 63, 74, 22, 51, 91, 57, 22, 39, 52, 71, 58, 13, 32, 64])
    p = p / p.sum()
    joint = np.outer(p, p) * 2 ** (blosum62() / 2)
    mix = [ORDER.index(a) for a in letters]
    found = compare_with_blosum62(joint[np.ix_(mix, mix)], letters)
    assert found["pearson_blosum62"] > 0.98
    log_odds = np.array(found["log_odds_bits"])
    np.testing.assert_allclose(log_odds, log_odds.T)


def test_no_nan_reaches_json():
    text = files.to_json({"a": math.nan, "b": [1.0, math.inf], "c": (1, "x")})
    assert json.loads(text) == {"a": None, "b": [1.0, None], "c": [1, "x"]}


@pytest.fixture
def saved(tmp_path, params):
    model_folder.write(str(tmp_path / "model"), model_folder.Weights(params, CONFIG, {}))
    return tmp_path / "model"


def test_the_command_writes_results_and_a_report(saved, tmp_path, capsys):
    fasta = tmp_path / "some.fasta"
    source = open_split("sample", "test")
    some = source.sequences(range(9))
    fasta.write_text("".join(f">p{i}\n{s.decode()}\n" for i, s in enumerate(some)))
    groups = tmp_path / "groups.tsv"
    groups.write_text("p0\tnear\np1\t[/far] :train: $x^{$\n")
    argv = ["evaluate", "--checkpoint", str(saved), "--fasta", str(fasta), "--groups", str(groups)]
    argv += ["--pseudo", "--json", str(tmp_path / "o.json"), "--report", str(tmp_path / "o.html")]
    assert command.run(cli.dispatch, argv) == 0
    result = json.loads((tmp_path / "o.json").read_text())
    assert result["sequences"] == 9 and set(result["by_group"]) == {"near", "[/far] :train: $x^{$"}
    page = (tmp_path / "o.html").read_text()
    assert "esm1nv_jax " in page and "perplexity" in capsys.readouterr().out
    assert page.count("<svg") >= 3 and "http" not in page.replace("http://www.w3.org", "")


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--fasta", "EMPTY"], "holds no protein"),
        (["--fasta", "ABSENT"], "cannot read"),
        (["--fasta", "UNKNOWN"], "unknown letters"),
        ([], "one of them"),
        (["--fasta", "EMPTY", "--data", "sample"], "one of them"),
        (["--data", "sample:train2"], "no split 'train2'; there are train, validation, test"),
        (["--data", "sample", "--max-residues", "1000"], "130 positions"),
        (["--data", "sample", "--json", "/no/such/folder/x.json"], "there is no folder"),
        (["--data", "sample", "--report", "FOLDER"], "it is a folder"),
        (["--data", "sample", "--masks-out", "FOLDER"], "it is a folder"),
        (["--fasta", "GOOD", "--groups", "GROUPS"], "names none of the 1 proteins, such as a"),
        (["--masks", "EMPTY"], "line 1"),
        (["--masks", "EMPTY", "--seed", "1"], "leave out --seed"),
    ],
)
def test_a_mistake_is_one_line(saved, tmp_path, capsys, options, said):
    (tmp_path / "EMPTY").write_text("no header\n")
    (tmp_path / "UNKNOWN").write_text(">a\nJJJJ\n")
    (tmp_path / "GOOD").write_text(">a\nMKV\n")
    (tmp_path / "GROUPS").write_text("b\tnear\n")
    names = ("EMPTY", "ABSENT", "UNKNOWN", "GOOD", "GROUPS")
    paths = {name: str(tmp_path / name) for name in names} | {"FOLDER": str(tmp_path)}
    argv = ["evaluate", "--checkpoint", str(saved), *(paths.get(o, o) for o in options)]
    assert command.run(cli.dispatch, argv) == 2
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert last.startswith("error: ") and said in last


GOOD = {"id": "a", "sequence": "MKV" * 50, "positions": [1], "inputs": ["<mask>"]}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"id": 5}, "no 'id' that is a str"),
        ({"sequence": 5}, "no 'sequence'"),
        ({"positions": [[1]]}, "integers in 0..149"),
        ({"positions": [1.5]}, "integers in 0..149"),
        ({"positions": [150]}, "integers in 0..149"),
        ({"positions": [1, 1], "inputs": ["A", "A"]}, "twice"),
        ({"inputs": []}, "1 positions, 0 inputs"),
        ({"inputs": ["<pad>"]}, "neither <mask> nor a residue letter"),
        ({"positions": [140]}, "residue 141 is masked, 128 are read"),  # by the model
    ],
)
def test_a_wrong_file_of_masks_is_one_line(saved, tmp_path, capsys, change, said):
    (tmp_path / "masks").write_text(json.dumps(GOOD | change) + "\n")
    argv = ["evaluate", "--checkpoint", str(saved), "--masks", str(tmp_path / "masks")]
    assert command.run(cli.dispatch, argv) == 2
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert last.startswith("error: ") and said in last


def test_a_figure_of_no_positions_is_not_a_number():
    assert all(math.isnan(value) for value in GroupedMean(1).perplexity())


def test_an_empty_run_is_one_line(tmp_path):
    with pytest.raises(UserError, match="holds no model"):
        from esm1nv_jax.inference.model import load

        load(str(tmp_path))


def test_groups_need_a_tab(tmp_path):
    (tmp_path / "g.tsv").write_text("a near\n")
    with pytest.raises(UserError, match="line 1"):
        read_groups(str(tmp_path / "g.tsv"))
