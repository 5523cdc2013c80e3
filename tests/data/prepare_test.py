"""A prepared data set: what other programs and ours read from it, and how damage is found."""

import os
import re
import shutil
import subprocess

import grain
import numpy as np
import pytest
import tensorflow_datasets as tfds
from Bio import SeqIO
from tensorflow_datasets.proto import tf_example_pb2

from esm1nv_jax.cli import dispatch
from esm1nv_jax.common import command
from esm1nv_jax.common.errors import EXIT_USER, UserError
from esm1nv_jax.data import manifest, prepare, records
from esm1nv_jax.data.fasta import Records
from esm1nv_jax.data.prepare import Preparation
from esm1nv_jax.data.source import open_split
from tests.data.preparing import SIZES, read_back

pytestmark = pytest.mark.usefixtures("small_chunks")


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


def test_the_metadata_of_tfds_agree_with_the_manifest(folder):
    info = tfds.builder_from_directory(folder).info
    splits = manifest.read(folder)["splits"]
    assert set(info.splits) == set(splits)
    for name, split in splits.items():
        shards = split["shards"]
        assert list(info.splits[name].filenames) == [shard["file"] for shard in shards]
        assert info.splits[name].shard_lengths == [shard["examples"] for shard in shards]
        assert info.splits[name].num_bytes == sum(shard["bytes"] for shard in shards)
    assert {k: type(v) for k, v in info.features.items()} == dict.fromkeys(
        ("id", "sequence", "description"), tfds.features.Text
    )


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


def test_progress_ends_at_the_end(fasta_file, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(prepare, "_SMALLEST_CHUNK", 1 << 24)  # one chunk: a worker reports seldom
    prepare.prepare(Preparation((str(fasta_file),), str(tmp_path / "set"), **SIZES))
    assert re.search(r"read (\d+)/\1 \(100 %\) MB", capsys.readouterr().err)


def test_the_manifest_describes_the_data(folder, fasta_file, proteins):
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
    assert command.run(dispatch, ["prepare", "--verify", str(copy)]) == 0
    path = damage(copy)
    assert command.run(dispatch, ["prepare", "--verify", str(copy)]) == EXIT_USER
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


def test_a_bucket_is_no_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a").write_bytes(b">A\nMK\n>B\nMV\n>C\nML\n")
    with pytest.raises(UserError, match="--out gs://bucket/set is no folder on a disk"):
        prepare.prepare(Preparation(("a",), "gs://bucket/set"))
    assert [p.name for p in tmp_path.iterdir()] == ["a"]
    with pytest.raises(UserError, match="gs://bucket/set is no folder on a disk"):
        open_split("gs://bucket/set", "train")


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


def test_records_are_what_protobuf_writes():
    for name, sequence, description in [
        (b"a", b"M", b""),
        (b"UniRef50_A", b"MK" * 100, b"x" * 200),
        (b"\xe9", b"K" * 70_000, b"d"),
    ]:
        example = tf_example_pb2.Example()
        for key, value in (("id", name), ("sequence", sequence), ("description", description)):
            example.features.feature[key].bytes_list.value.append(value)
        parsed = Records([b"before", name], [b"d", description], [b"MKV", sequence])
        record = records.encode(parsed)[1]
        assert record == example.SerializeToString(deterministic=True)
        assert records.decode(record) == (name, sequence, description)
        assert records.sequence_of(record, len(sequence)) == sequence
        assert records.sequence_of(record, len(sequence) - 1) is None
        assert records.sequence_of(record, len(sequence) + 1) is None


def test_as_many_workers_as_cores_that_the_process_may_use(monkeypatch, capsys):
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: {1, 4, 5}, raising=False)
    with pytest.raises(SystemExit):
        prepare.main(["--help"])
    assert "default here: 3)" in capsys.readouterr().out
