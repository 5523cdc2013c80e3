"""Which sequences are held out, and how clusters stay together."""

import gzip

import pytest

from esm1nv_jax.cli import dispatch
from esm1nv_jax.common import command
from esm1nv_jax.common.errors import EXIT_USER, UserError
from esm1nv_jax.data import manifest, prepare, splits
from esm1nv_jax.data.prepare import Preparation
from esm1nv_jax.data.source import open_split
from tests.data.made_up import fasta, made_up
from tests.data.preparing import SIZES, held_out, read_back

pytestmark = pytest.mark.usefixtures("small_chunks")


def test_splits_follow_from_seed_and_input_alone(folder, fasta_file, proteins, tmp_path):
    backwards = tmp_path / "backwards.fasta.gz"
    backwards.write_bytes(gzip.compress(fasta(proteins[::-1], width=70, end=b"\r\n"), 1))
    for name, source, seed in (("a", backwards, 0), ("b", fasta_file, 1)):
        prepare.prepare(Preparation((str(source),), str(tmp_path / name), seed=seed, **SIZES))
    assert held_out(tmp_path / "a") == held_out(folder)
    assert held_out(tmp_path / "b")["test"] != held_out(folder)["test"]
    assert len(held_out(tmp_path / "b")["test"] & held_out(folder)["test"]) < 60  # 17 by chance


def test_a_wrong_guess_of_the_number_reads_again(fasta_file, folder, tmp_path, monkeypatch):
    monkeypatch.setattr(prepare, "_MARGIN", 0.01)
    prepare.prepare(Preparation((str(fasta_file),), str(tmp_path / "set"), **SIZES))
    assert held_out(tmp_path / "set") == held_out(folder)
    manifest.verify(tmp_path / "set")


def test_a_split_without_sequences(tmp_path):
    path = tmp_path / "a"
    path.write_bytes(fasta(made_up(20)))
    prepare.prepare(Preparation((str(path),), str(tmp_path / "set"), validation=0, test=5))
    with pytest.raises(UserError, match="prepare it again with --validation"):
        open_split(str(tmp_path / "set"), "validation")


def test_sizes_that_do_not_fit_are_answered_with_some_that_do(fasta_file, tmp_path, capsys):
    argv = ["prepare", "--fasta", str(fasta_file), "--out", str(tmp_path / "set"), "--workers=1"]
    assert command.run(dispatch, [*argv, "--validation=5000", "--test=10000"]) == EXIT_USER
    output = capsys.readouterr().err
    assert "15,000 sequences" in output
    words = output.split("for instance ")[1].split(" fit")[0].split()
    assert words == ["--validation", "750", "--test", "750"]  # enough to measure something
    assert command.run(dispatch, [*argv, *words]) == 0


@pytest.mark.parametrize(
    ("sequences", "options", "expected"),
    [
        (52_000_000, (None, None), (5_000, 1_000_000)),  # the sizes of the card
        (1_000_000, (None, None), (5_000, 50_000)),
        (15_000, (None, None), (750, 750)),
        (3, (None, None), (1, 1)),
        (2, (None, None), (0, 0)),
        (15_000, (0.01, 0.1), (150, 1_500)),
        (15_000, (0, 0.2), (0, 3_000)),
        (15_000, (20, None), (20, 750)),
    ],
)
def test_sizes_are_numbers_shares_or_a_sensible_default(sequences, options, expected):
    assert splits.resolve_sizes(sequences, *options) == expected


def test_shares_and_defaults_on_the_command_line(tmp_path, capsys):
    path = tmp_path / "a"
    path.write_bytes(fasta(made_up(1000, mean=40)))
    argv = ["prepare", "--fasta", str(path), "--validation", "0.1", "--out", str(tmp_path / "set")]
    assert command.run(dispatch, argv) == 0
    assert "--test 50: 5% of 1,000 sequences" in capsys.readouterr().err
    sizes = {name: s["examples"] for name, s in manifest.read(tmp_path / "set")["splits"].items()}
    assert sizes == {"train": 850, "validation": 100, "test": 50}
    for wrong in ("1.5", "-0.1", "some", "nan"):
        assert command.run(dispatch, [*argv, f"--test={wrong}"]) == EXIT_USER
        assert f"{wrong!r} is neither a number" in capsys.readouterr().err


def test_an_identical_sequence_does_not_lie_on_both_sides(tmp_path):
    proteins = made_up(400, mean=60)
    twins = proteins + [(b"twin_" + i, d, s) for i, d, s in proteins]
    path = tmp_path / "a"
    path.write_bytes(fasta(twins))
    prepare.prepare(Preparation((str(path),), str(tmp_path / "set"), validation=50, test=100))
    split_of = {}
    for split, content in read_back(tmp_path / "set").items():
        for _, (sequence, _) in content.items():
            split_of.setdefault(sequence, set()).add(split)
    assert len(read_back(tmp_path / "set")["validation"]) == 50
    assert all(len(splits) == 1 for splits in split_of.values())


@pytest.mark.parametrize("workers", [1, 3])
def test_clusters_are_not_divided(proteins, fasta_file, tmp_path, workers):
    table = tmp_path / "clusters.tsv.gz"
    numbers = [int(i[-5:]) for i, _, _ in proteins]
    names = [b"C%d" % (n // 3 if n < 6000 else n // 20 + 10_000) for n in numbers]
    cluster = {i: name for (i, _, _), name in zip(proteins, names, strict=True)}
    table.write_bytes(
        gzip.compress(b"".join(b"%b\tx\t%b\n" % (i[9:], c) for i, c in cluster.items()))
    )
    options = Preparation(
        (str(fasta_file),), str(tmp_path / "set"), groups=str(table), workers=workers, **SIZES
    )
    content = prepare.prepare(options)
    found = read_back(tmp_path / "set")
    clusters = {split: {cluster[i] for i in found[split]} for split in found}
    assert sum(map(len, clusters.values())) == len(set(cluster.values()))
    for split, size in SIZES.items():
        assert abs(content["splits"][split]["examples"] - size) <= 1
        assert content["clusters"][split] == len(clusters[split])
    source = open_split(str(tmp_path / "set"), "train")
    ids = source.ids(range(len(source)))
    groups = source.groups
    assert len(groups.first) - 1 == len(clusters["train"])
    for c in range(0, len(groups.first) - 1, 50):
        members = groups.member[groups.first[c] : groups.first[c + 1]]
        assert len({cluster[ids[m].encode()] for m in members}) == 1
    manifest.verify(tmp_path / "set")


def test_clusters_held_out_do_not_depend_on_compression_or_headers(tmp_path):
    proteins = made_up(3000, mean=60)
    table = tmp_path / "clusters.tsv"
    names = [b"C%d" % (n // 10 if n < 2800 else n // 3) for n in range(3000)]
    pairs = zip(proteins, names, strict=True)
    table.write_bytes(b"".join(b"%b\t%b\n" % (i, name) for (i, _, _), name in pairs))
    plain, bare = tmp_path / "plain", tmp_path / "bare"
    plain.write_bytes(fasta([(i, d * 2, s) for i, d, s in proteins]))
    bare.write_bytes(gzip.compress(fasta([(i, b"", s) for i, _, s in proteins])))
    found = {}
    for path in (plain, bare):
        out = tmp_path / f"{path.name}-set"
        prepare.prepare(Preparation((str(path),), str(out), 26, 13, groups=str(table)))
        found[path] = held_out(out, {"validation": 26, "test": 13})
    assert found[plain] == found[bare]


@pytest.mark.parametrize(
    ("table", "words"),
    [
        (b"P1\tC1\n", "50 of 50 sequences are not in"),
        (b"UniRef50_A00001\n", "line 1: one column"),
        (b"", "holds no line"),
        (b"A2\tC1\nA1\tC1\n\nA3\tC1\nA1\tC2\n", "two clusters, in lines 2 and 5"),
        (gzip.compress(b"A1\tC1\n" * 999)[:-20], "too early"),
    ],
    ids=["unknown ids", "one column", "empty", "two clusters", "cut short"],
)
def test_a_wrong_table_of_clusters(tmp_path, table, words):
    (tmp_path / "a").write_bytes(fasta(made_up(50)))
    (tmp_path / "table").write_bytes(table)
    options = Preparation(
        (str(tmp_path / "a"),), str(tmp_path / "set"), 5, 5, groups=str(tmp_path / "table")
    )
    with pytest.raises(UserError, match=words):
        prepare.prepare(options)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a", "table"]
