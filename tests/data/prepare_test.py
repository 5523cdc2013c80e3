"""Preparation: what comes out, that it can be trusted, and what a mistake is answered with."""

import gzip
import json
import lzma
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import grain
import numpy as np
import pytest
import tensorflow_datasets as tfds
import zstandard
from Bio import SeqIO
from tensorflow_datasets.proto import tf_example_pb2

from esm1nv_jax.cli import dispatch
from esm1nv_jax.common import arguments
from esm1nv_jax.common.errors import EXIT_USER, UserError
from esm1nv_jax.data import manifest, prepare, records, splits
from esm1nv_jax.data.prepare import Preparation
from esm1nv_jax.data.source import open_split
from tests.data.made_up import fasta, made_up

SIZES = {"validation": 100, "test": 500}


def esm1nv(*words):
    """A verb in a process of its own: (exit status, stdout + stderr)."""
    done = subprocess.run(
        [sys.executable, "-m", "esm1nv_jax", *map(str, words)], capture_output=True, text=True
    )
    return done.returncode, done.stdout + done.stderr


def read_back(folder):
    """{split: {id: (sequence, description)}}, read by TFDS."""
    builder = tfds.builder_from_directory(folder)
    return {
        split: {r["id"]: (r["sequence"], r["description"]) for r in builder.as_data_source(split)}
        for split in builder.info.splits
    }


@pytest.fixture(scope="module", autouse=True)
def small_units():
    """Several units, and so shards, of a small file."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(prepare, "_SMALLEST", 1 << 20)
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory, fasta_file):
    out = tmp_path_factory.mktemp("made") / "set"
    prepare.prepare(Preparation((str(fasta_file),), str(out), **SIZES))
    return out


def test_tfds_reads_what_biopython_reads(folder, fasta_file):
    found = read_back(folder)
    assert {split: len(found[split]) for split in found} == {
        "train": 14_400,
        "validation": 100,
        "test": 500,
    }
    together = {}
    for split in found.values():
        together.update(split)
    expected = {
        r.id.encode(): (str(r.seq).encode(), r.description.split(None, 1)[1].encode())
        for r in SeqIO.parse(fasta_file, "fasta")
    }
    assert together == expected


def test_the_metadata_is_what_tfds_writes(folder, tmp_path):
    copy = tmp_path / "set"
    shutil.copytree(folder, copy)
    own = {name: (copy / name).read_text() for name in ("dataset_info.json", "features.json")}
    info = json.loads(own["dataset_info.json"])
    for name in own:
        (copy / name).unlink()
    tfds.folder_dataset.write_metadata(
        data_dir=copy,
        features=tfds.features.FeaturesDict(
            {name: tfds.features.Text() for name in ("id", "sequence", "description")}
        ),
        split_infos=[
            tfds.core.SplitInfo(
                name=split["name"],
                shard_lengths=[int(n) for n in split["shardLengths"]],
                num_bytes=sum(p.stat().st_size for p in copy.glob(f"proteins-{split['name']}.*")),
            )
            for split in info["splits"]
        ],
        check_data=False,
        description=info["description"],
    )
    assert own == {name: (copy / name).read_text() for name in own}


def test_our_own_reader_agrees(folder):
    for split, expected in read_back(folder).items():
        source = open_split(str(folder), split)
        index = np.random.default_rng(0).permutation(len(source))
        ids = [name.encode() for name in source.ids(index)]
        sequences = source.sequences(index)
        assert {i: s for i, s in zip(ids, sequences, strict=True)} == {
            i: s for i, (s, _) in expected.items()
        }
        assert [len(s) for s in sequences] == source.lengths[index].tolist()
        assert source.lengths.dtype == np.uint16
    assert grain.MapDataset.source(source)[3]["id"].decode() == source.ids([3])[0]


def test_the_folder_does_not_depend_on_the_workers(folder, fasta_file, tmp_path):
    for workers in (2, 5):
        out = tmp_path / str(workers)
        prepare.prepare(Preparation((str(fasta_file),), str(out), workers=workers, **SIZES))
        assert sorted(p.name for p in out.iterdir()) == sorted(p.name for p in folder.iterdir())
        for path in folder.iterdir():
            if path.name != manifest.FILE:
                assert path.read_bytes() == (out / path.name).read_bytes(), path
        assert manifest.read(out)["splits"] == manifest.read(folder)["splits"]
    assert len(manifest.read(folder)["splits"]["train"]["shards"]) > 4


def held_out(folder):
    return {split: set(open_split(str(folder), split).ids(range(n))) for split, n in SIZES.items()}


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


def test_the_manifest_tells_the_truth(folder, fasta_file, proteins):
    content = manifest.verify(folder)
    lengths = [len(s) for _, _, s in proteins]
    assert sum(s["residues"] for s in content["splits"].values()) == sum(lengths)
    assert sum(s["examples"] for s in content["splits"].values()) == len(proteins)
    letters = b"".join(s for _, _, s in proteins)
    for letter in "LKWX":
        found = sum(s["composition"].get(letter, 0) for s in content["splits"].values())
        assert found == letters.count(letter.encode())
    histogram = {}
    for split in content["splits"].values():
        for key, n in split["length_histogram"].items():
            histogram[key] = histogram.get(key, 0) + n
    assert histogram["128-191"] == sum(128 <= n < 192 for n in lengths)
    md5 = subprocess.run(["md5sum", fasta_file], capture_output=True, text=True).stdout.split()[0]
    assert content["sources"] == [
        {
            "file": str(fasta_file),
            "bytes": fasta_file.stat().st_size,
            "md5": md5,
            "sequences": 15_000,
        }
    ]


def damage_byte(folder):
    path = sorted(folder.glob("*train*"))[2]
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    return path


def damage_cut(folder):
    path = sorted(folder.glob("proteins-train*"))[-1]
    os.truncate(path, path.stat().st_size // 2)
    return path


def damage_gone(folder):
    path = sorted(folder.glob("proteins-test*"))[0]
    path.unlink()
    return path


def damage_lengths(folder):
    path = folder / "lengths-train.npy"
    np.save(path, np.load(path)[::-1])
    return path


@pytest.mark.parametrize("damage", [damage_byte, damage_cut, damage_gone, damage_lengths])
def test_verify_finds_damage(folder, tmp_path, damage, capsys):
    copy = tmp_path / "set"
    shutil.copytree(folder, copy)
    assert arguments.run(dispatch, ["prepare", "--verify", str(copy)]) == 0
    path = damage(copy)
    assert arguments.run(dispatch, ["prepare", "--verify", str(copy)]) == EXIT_USER
    assert path.name in capsys.readouterr().err


def test_a_cut_shard_is_refused_at_the_start(folder, tmp_path):
    copy = tmp_path / "set"
    shutil.copytree(folder, copy)
    path = damage_cut(copy)
    with pytest.raises(UserError, match=rf"{path.name} holds 0 records, the manifest says"):
        open_split(str(copy), "train")


def test_a_source_knows_when_lengths_do_not_fit(folder, tmp_path):
    copy = tmp_path / "set"
    shutil.copytree(folder, copy)
    damage_lengths(copy)
    with pytest.raises(UserError, match="--verify"):
        open_split(str(copy), "train").sequences(range(50))


@pytest.mark.parametrize("name", ["nothing", "empty"])
def test_no_data_set(tmp_path, name):
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="make one: esm1nv prepare"):
        open_split(str(tmp_path / name), "train")


@pytest.mark.parametrize("text", ["[]", "{}", "", "not JSON"])
def test_a_manifest_that_is_none(tmp_path, text):
    (tmp_path / "manifest.json").write_text(text)
    with pytest.raises(UserError, match="prepare it again"):
        open_split(str(tmp_path), "train")


def test_a_split_without_sequences(tmp_path):
    path = tmp_path / "a"
    path.write_bytes(fasta(made_up(20)))
    prepare.prepare(Preparation((str(path),), str(tmp_path / "set"), validation=0, test=5))
    with pytest.raises(UserError, match="prepare it again with --validation"):
        open_split(str(tmp_path / "set"), "validation")


def test_records_are_what_protobuf_writes():
    for name, sequence, description in [
        (b"a", b"M", b""),
        (b"UniRef50_A", b"MK" * 100, b"x" * 200),
        (b"\xe9", b"K" * 70_000, b"d"),
    ]:
        example = tf_example_pb2.Example()
        for key, value in (("id", name), ("sequence", sequence), ("description", description)):
            example.features.feature[key].bytes_list.value.append(value)
        record = records.encode(name, sequence, description)
        assert record == example.SerializeToString(deterministic=True)
        assert records.decode(record) == (name, sequence, description)
        assert records.sequence_of(record, len(sequence)) == sequence
        assert records.sequence_of(record, len(sequence) - 1) is None
        assert records.sequence_of(record, len(sequence) + 1) is None


@pytest.mark.parametrize("kind", ["gz", "zst", "xz", "several", "-"])
def test_every_kind_of_input(tmp_path, kind):
    proteins = made_up(300)
    text = fasta(proteins)
    pack = {"gz": gzip.compress, "zst": zstandard.compress, "xz": lzma.compress}.get(kind, bytes)
    paths = [tmp_path / "a"]
    paths[0].write_bytes(pack(text))
    if kind == "several":
        half = text.index(b">UniRef50_A00150")
        paths = [tmp_path / "a", tmp_path / "b"]
        paths[0].write_bytes(text[:half])
        paths[1].write_bytes(gzip.compress(text[half:]))
    words = ["--out", tmp_path / "set", "--validation", 10, "--test", 20]
    if kind == "-":
        done = subprocess.run(
            [sys.executable, "-m", "esm1nv_jax", "prepare", "--fasta", "-", *map(str, words)],
            input=gzip.compress(text),
            capture_output=True,
        )
        status, said = done.returncode, done.stderr.decode()
    else:
        status, said = esm1nv("prepare", "--fasta", *paths, *words)
    assert status == 0, said
    found = read_back(tmp_path / "set")
    assert {i: s for split in found.values() for i, (s, _) in split.items()} == {
        i: s for i, _, s in proteins
    }
    assert sum(s["sequences"] for s in manifest.read(tmp_path / "set")["sources"]) == 300
    assert sorted(p.name for p in tmp_path.iterdir() if p.name.startswith(".")) == []


def with_line(text, at, line):
    lines = text.split(b"\n")
    return b"\n".join([*lines[:at], line, *lines[at:]])


TEXT = fasta(made_up(200, mean=50), width=10_000)  # two lines a record
BAD = {  # name: (content, line in the message, words in it, counted as)
    "no_sequence": (with_line(TEXT, 4, b">lonely"), "line 5", "'lonely'", "no sequence"),
    "no_header": (b"MKV\n" + TEXT, "line 1", "'MKV", "text before the first header"),
    "no_id": (with_line(TEXT, 4, b">\nMKV"), "line 5", "without an id", "header without an id"),
    "digit": (with_line(TEXT, 5, b"MK7V"), "line 6", "'7'", "bad character"),
    "lost_line_end": (with_line(TEXT, 5, b"MK>x y"), "line 6", "'>'", "bad character"),
    "non_ascii": (with_line(TEXT, 5, "MKé".encode()), "line 6", r"'\xc3'", "bad character"),
    "empty": (b"", "line 1", "empty", "empty file"),
    "binary": (
        os.urandom(1000).replace(b">", b"").replace(b"\n", b""),
        "line 1",
        "FASTA?",
        "text before the first header",
    ),
    "cut_gzip": (gzip.compress(TEXT)[:-200], "line", "too early", "broken archive"),
    "cut_zstd": (zstandard.compress(TEXT)[:-200], "line", "too early", "broken archive"),
    "cut_xz": (lzma.compress(TEXT)[:-200], "line", "too early", "broken archive"),
    "bad_gzip": (
        gzip.compress(TEXT)[:3000] + b"xxxxxxxx" + gzip.compress(TEXT)[3008:],
        "line",
        "compressed file",
        "broken archive",
    ),
    "twice": (
        TEXT + b">UniRef50_A00007 again\nMKV\n",
        "line 401",
        "line 15",
        "duplicate id, other sequence",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_stops_with_file_line_and_reason_or_is_counted(tmp_path, name, capsys):
    content, line, words, counted = BAD[name]
    good, bad = tmp_path / "good.fasta", tmp_path / "bad.fasta"
    good.write_bytes(fasta([(b"x" + i, d, s) for i, d, s in made_up(200, seed=1)]))
    bad.write_bytes(content)
    argv = [
        "prepare",
        "--fasta",
        str(good),
        str(bad),
        "--out",
        str(tmp_path / "set"),
        "--validation",
        "5",
        "--test",
        "5",
    ]
    assert arguments.run(dispatch, argv) == EXIT_USER
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert str(bad) in said and line in said and words in said and "--on_error=skip" in said
    assert sorted(p.name for p in tmp_path.iterdir()) == ["bad.fasta", "good.fasta"]

    assert arguments.run(dispatch, [*argv, "--on_error=skip"]) == 0
    content = manifest.verify(tmp_path / "set")
    assert content["skipped"][counted] == 1
    kept = sum(split["examples"] for split in content["splits"].values())
    assert kept >= 200
    if counted in ("no sequence", "header without an id", "duplicate id, other sequence"):
        assert kept == 400
    if counted == "bad character":
        assert kept == 399


def test_of_several_faults_the_first_is_told(tmp_path, proteins):
    lines = fasta(proteins).split(b"\n")
    faults = [len(lines) // 5 * i for i in (2, 3, 4)]
    for at in faults:
        lines[at] = b"MK9"
    path = tmp_path / "a"
    path.write_bytes(b"\n".join(lines))
    wanted = Preparation((str(path),), str(tmp_path / "set"), workers=4, **SIZES)
    with pytest.raises(UserError, match=f"line {faults[0] + 1}: '9'"):
        prepare.prepare(wanted)


def test_pipes_are_read_once_even_of_one_name(tmp_path):
    fifos = [tmp_path / folder / "fifo" for folder in "ab"]
    writers = []
    for i, fifo in enumerate(fifos):
        fifo.parent.mkdir()
        os.mkfifo(fifo)
        proteins = [(b"%d" % i + name, d, s) for name, d, s in made_up(100, seed=i)]
        writers.append(threading.Thread(target=fifo.write_bytes, args=(fasta(proteins),)))
        writers[-1].start()
    wanted = Preparation(tuple(map(str, fifos)), str(tmp_path / "set"), 5, 5, workers=2)
    content = prepare.prepare(wanted)
    for writer in writers:
        writer.join()
    assert sum(split["examples"] for split in content["splits"].values()) == 200
    assert not content["skipped"]
    assert not list((tmp_path / "set").glob("copy*"))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (b">a\nMK\n>b\n", "standard input, line 3: no sequence for 'b'"),
        (b">a\nMK\n>a\nMK\n>a\nMV\n", "standard input, line 5: id 'a' stood before"),
        (b">x\nMK\n>>c\nMK\n>>c\nMV\n", "line 5: id '>c' stood before"),
        (b"BZh9", "standard input is bzip2"),
        (None, "standard input is closed"),
    ],
)
def test_mistakes_in_standard_input_are_told_by_that_name(tmp_path, text, words):
    command = f"{sys.executable} -m esm1nv_jax prepare --fasta - --out {tmp_path / 'set'}"
    command += " --validation 0 --test 0" + (" <&-" if text is None else "")
    done = subprocess.run(command, shell=True, input=text, capture_output=True)
    assert done.returncode == EXIT_USER
    assert one_error(done.stderr.decode()) and words in done.stderr.decode()
    assert list(tmp_path.iterdir()) == []


def test_the_folder_may_be_a_link_but_not_the_current_one(tmp_path, monkeypatch):
    path = tmp_path / "a"
    path.write_bytes(fasta(made_up(20)))
    (tmp_path / "large disk").mkdir()
    (tmp_path / "set").symlink_to("large disk")
    prepare.prepare(Preparation((str(path),), str(tmp_path / "set"), 1, 1))
    manifest.verify(tmp_path / "large disk")
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    with pytest.raises(UserError, match="current folder; name a new folder in it: --out NAME"):
        prepare.prepare(Preparation((str(path),), ".", 1, 1))


def test_leftovers_are_found_whatever_the_name(tmp_path):
    path = tmp_path / "a"
    path.write_bytes(fasta(made_up(20)))
    (tmp_path / ".set[1].unfinished-killed").mkdir()
    prepare.prepare(Preparation((str(path),), str(tmp_path / "set[1]"), 1, 1))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a", "set[1]"]


def test_what_can_be_mended_is_counted(tmp_path):
    path = tmp_path / "a"
    giant = b"MKVLAWGGRT" * 4000
    path.write_bytes(
        b"\xef\xbb\xbf"
        + fasta(made_up(100), end=b"\r\n")
        + b">giant\n"
        + giant
        + b"\n>low\nmkv\n>gap\nM-K..V\n>stop\nMKV*\n>both\nMKV\n>both\nMKV\n"
    )
    wanted = Preparation((str(path),), str(tmp_path / "set"), validation=5, test=5)
    content = prepare.prepare(wanted)
    assert content["mended"]["lower case"] == 1
    assert content["mended"]["gaps"] == 1
    assert content["mended"]["final stop"] == 1
    assert content["mended"]["carriage returns"] > 200
    assert content["skipped"] == {"duplicate record": 1}
    found = {i: s for split in read_back(tmp_path / "set").values() for i, (s, _) in split.items()}
    assert [found[i] for i in (b"low", b"gap", b"stop", b"both")] == [b"MKV"] * 4
    assert found[b"giant"] == giant
    manifest.verify(tmp_path / "set")


def test_a_single_line_of_100_megabytes(tmp_path):
    path = tmp_path / "a"
    giant = b"MKVLAWGGRT" * 10_000_000
    path.write_bytes(fasta(made_up(100)) + b">giant\n" + giant + b"\n>last\nMKV\n")
    status, said = esm1nv(
        "prepare", "--fasta", path, "--out", tmp_path / "set", "--validation", 5, "--test", 5
    )
    assert status == 0, said
    sources = [open_split(str(tmp_path / "set"), split) for split in splits.NAMES]
    source = max(sources, key=lambda source: source.lengths.max())
    assert source.lengths.dtype == np.uint32
    assert source.sequences([int(source.lengths.argmax())]) == [giant]


def test_lengths_out_of_bounds_are_left_out(tmp_path):
    proteins = made_up(300)
    path = tmp_path / "a"
    path.write_bytes(fasta(proteins))
    content = prepare.prepare(
        Preparation((str(path),), str(tmp_path / "set"), 5, 5, min_length=100, max_length=200)
    )
    lengths = np.array([len(s) for _, _, s in proteins])
    assert content["skipped"] == {
        "shorter than 100": (lengths < 100).sum(),
        "longer than 200": (lengths > 200).sum(),
    }
    manifest.verify(tmp_path / "set")


def test_sizes_that_do_not_fit_are_answered_with_some_that_do(fasta_file, tmp_path, capsys):
    argv = ["prepare", "--fasta", str(fasta_file), "--out", str(tmp_path / "set")]
    assert arguments.run(dispatch, argv) == EXIT_USER
    said = capsys.readouterr().err
    assert "15,000 sequences" in said
    words = said.split("for instance ")[1].split(" fit")[0].split()
    assert arguments.run(dispatch, [*argv, *words]) == 0


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
def test_clusters_are_not_divided(tmp_path, workers):
    proteins = made_up(15_000)
    path, table = tmp_path / "a", tmp_path / "clusters.tsv.gz"
    path.write_bytes(fasta(proteins))
    numbers = [int(i[-5:]) for i, _, _ in proteins]
    names = [b"C%d" % (n // 3 if n < 6000 else n // 20 + 10_000) for n in numbers]
    cluster = {i: name for (i, _, _), name in zip(proteins, names, strict=True)}
    table.write_bytes(
        gzip.compress(b"".join(b"%b\tx\t%b\n" % (i[9:], c) for i, c in cluster.items()))
    )
    wanted = Preparation(
        (str(path),), str(tmp_path / "set"), groups=str(table), workers=workers, **SIZES
    )
    content = prepare.prepare(wanted)
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


@pytest.mark.parametrize(
    ("table", "words"),
    [
        (b"P1\tC1\n", "no sequence is named in"),
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
    wanted = Preparation(
        (str(tmp_path / "a"),), str(tmp_path / "set"), 5, 5, groups=str(tmp_path / "table")
    )
    with pytest.raises(UserError, match=words):
        prepare.prepare(wanted)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a", "table"]


def group_lives(group):
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True


@pytest.mark.parametrize("after", [0.7, 1.2, 2.0, 3.0])
def test_killed_at_any_moment_and_run_again(tmp_path, fasta_file, after):
    out = tmp_path / "set"
    words = [
        "prepare",
        "--fasta",
        fasta_file,
        "--out",
        out,
        "--workers",
        2,
        "--validation",
        100,
        "--test",
        500,
    ]
    process = subprocess.Popen(
        [sys.executable, "-m", "esm1nv_jax", *map(str, words)],
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    time.sleep(after)
    process.send_signal(signal.SIGKILL)
    process.wait()
    deadline = time.monotonic() + 10
    while group_lives(process.pid) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not group_lives(process.pid)  # its workers see that they are alone
    if out.exists():  # it was done, and then it must be whole
        manifest.verify(out)
    else:
        for left in tmp_path.glob(".set*"):
            with pytest.raises(UserError, match="make one"):
                open_split(str(left), "train")
        status, said = esm1nv(*words)
        assert status == 0, said
    manifest.verify(out)
    assert [p.name for p in tmp_path.iterdir()] == ["set"]


def one_error(said):
    """Whether there is one line about an error, beside lines of progress."""
    *progress, last = said.strip().splitlines()
    return last.startswith("error: ") and all(line.startswith("read ") for line in progress)


def run_with_little_space(words, limit):
    import resource

    return subprocess.run(
        [sys.executable, "-m", "esm1nv_jax", *map(str, words)],
        capture_output=True,
        text=True,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)),
    )


def test_a_file_too_large_for_the_disk(tmp_path, fasta_file):
    done = run_with_little_space(
        [
            "prepare",
            "--fasta",
            fasta_file,
            "--out",
            tmp_path / "set",
            "--validation",
            100,
            "--test",
            500,
        ],
        1 << 20,
    )
    assert done.returncode == EXIT_USER
    assert one_error(done.stderr) and "no space left" in done.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can mount a small disk")
@pytest.mark.parametrize("size", ["1m", "5m", "7m"])
def test_a_full_disk(tmp_path, fasta_file, size):
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", tmp_path], capture_output=True
    )
    if mounted.returncode:
        pytest.skip("mount is not allowed here")
    try:
        status, said = esm1nv(
            "prepare",
            "--fasta",
            fasta_file,
            "--out",
            tmp_path / "set",
            "--validation",
            100,
            "--test",
            500,
        )
        assert status == EXIT_USER
        assert one_error(said) and "no space left" in said
        assert list(tmp_path.iterdir()) == []
    finally:
        subprocess.run(["umount", tmp_path], check=True)


def test_two_at_once(tmp_path, fasta_file):
    words = [
        "prepare",
        "--fasta",
        fasta_file,
        "--out",
        tmp_path / "set",
        "--validation",
        "100",
        "--test",
        "500",
    ]
    first = subprocess.Popen(
        [sys.executable, "-m", "esm1nv_jax", *map(str, words)], stderr=subprocess.DEVNULL
    )
    while not list(tmp_path.glob(".set*")):
        time.sleep(0.01)
    time.sleep(0.2)
    status, said = esm1nv(*words)
    assert first.wait() == 0
    assert status == EXIT_USER
    assert "another preparation" in said or "exists already" in said
    manifest.verify(tmp_path / "set")


def test_the_real_headers_of_uniref(tmp_path):
    corpus = Path(__file__).parents[3] / "shared" / "data" / "corpus"
    path = corpus / "uniref_202104_real_sample_ur50-00.fasta.gz"
    if not path.exists():
        pytest.skip("the sample of UniRef is not here")
    content = prepare.prepare(Preparation((str(path),), str(tmp_path / "set"), 100, 200))
    assert sum(s["examples"] for s in content["splits"].values()) == 5001
    assert json.loads((tmp_path / "set" / "features.json").read_text())
