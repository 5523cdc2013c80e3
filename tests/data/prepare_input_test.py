"""What preparation reads: kinds of files, and what becomes of faults in them."""

import gzip
import json
import lzma
import os
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest

from esm1nv_jax.cli import dispatch
from esm1nv_jax.common import command
from esm1nv_jax.common.errors import EXIT_USER, UserError
from esm1nv_jax.data import manifest, prepare, splits
from esm1nv_jax.data.compression import zstd
from esm1nv_jax.data.prepare import Preparation
from esm1nv_jax.data.source import open_split
from tests.data.made_up import fasta, made_up
from tests.data.preparing import SIZES, esm1nv, one_error, read_back

pytestmark = pytest.mark.usefixtures("small_chunks")


@pytest.mark.parametrize("kind", ["gz", "zst", "xz", "several", "-"])
def test_every_kind_of_input(tmp_path, kind):
    proteins = made_up(300)
    text = fasta(proteins)
    pack = {"gz": gzip.compress, "zst": zstd.compress, "xz": lzma.compress}.get(kind, bytes)
    paths = [tmp_path / "a"]
    paths[0].write_bytes(pack(text))
    words = ["--out", tmp_path / "set", "--validation", 10, "--test", 20]
    if kind == "several":
        third, half = (text.index(b">UniRef50_A00%d" % n) for n in (100, 150))
        paths = [tmp_path / "a", tmp_path / "b", tmp_path / "c"]
        paths[0].write_bytes(text[:third])
        paths[1].write_bytes(text[third:half])
        paths[2].write_bytes(gzip.compress(text[half:]))
        words += ["--fasta", paths.pop()]
    if kind == "-":
        done = subprocess.run(
            [sys.executable, "-m", "esm1nv_jax", "prepare", "--fasta", "-", *map(str, words)],
            input=gzip.compress(text),
            capture_output=True,
        )
        status, output = done.returncode, done.stderr.decode()
    else:
        status, output = esm1nv("prepare", "--fasta", *paths, *words)
    assert status == 0, output
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
    "cut_gzip": (gzip.compress(TEXT)[:-200], "line", "too early", "damaged file"),
    "cut_zstd": (zstd.compress(TEXT)[:-200], "line", "too early", "damaged file"),
    "cut_xz": (lzma.compress(TEXT)[:-200], "line", "too early", "damaged file"),
    "bad_gzip": (
        gzip.compress(TEXT)[:3000] + b"xxxxxxxx" + gzip.compress(TEXT)[3008:],
        "line",
        "compressed file",
        "damaged file",
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
    assert command.run(dispatch, [*argv, "--workers=1"]) == EXIT_USER
    output = capsys.readouterr().err.strip().splitlines()[-1]
    assert str(bad) in output and line in output and words in output and "--on-error=skip" in output
    assert sorted(p.name for p in tmp_path.iterdir()) == ["bad.fasta", "good.fasta"]

    assert command.run(dispatch, [*argv, "--workers=2", "--on-error=skip"]) == 0
    content = manifest.verify(tmp_path / "set")
    assert content["skipped"][counted] == 1
    kept = sum(split["examples"] for split in content["splits"].values())
    assert kept >= 200
    if counted in ("no sequence", "header without an id", "duplicate id, other sequence"):
        assert kept == 400
    if counted == "bad character":
        assert kept == 399


def test_of_several_faults_the_first_is_reported(tmp_path, proteins):
    lines = fasta(proteins).split(b"\n")
    faults = [len(lines) // 5 * i for i in (2, 3, 4)]
    for at in faults:
        lines[at] = b"MK9"
    path = tmp_path / "a"
    path.write_bytes(b"\n".join(lines))
    options = Preparation((str(path),), str(tmp_path / "set"), workers=4, **SIZES)
    with pytest.raises(UserError, match=f"line {faults[0] + 1}: '9'"):
        prepare.prepare(options)


def test_pipes_are_read_once_even_of_one_name(tmp_path):
    fifos = [tmp_path / folder / "fifo" for folder in "ab"]
    writers = []
    for i, fifo in enumerate(fifos):
        fifo.parent.mkdir()
        os.mkfifo(fifo)
        proteins = [(b"%d" % i + name, d, s) for name, d, s in made_up(100, seed=i)]
        writers.append(threading.Thread(target=fifo.write_bytes, args=(fasta(proteins),)))
        writers[-1].start()
    options = Preparation(tuple(map(str, fifos)), str(tmp_path / "set"), 5, 5, workers=2)
    content = prepare.prepare(options)
    for writer in writers:
        writer.join()
    assert sum(split["examples"] for split in content["splits"].values()) == 200
    assert not content["skipped"]
    assert not list((tmp_path / "set").glob("copy*"))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (b">a\nMK\n>b\n", "standard input, line 3: no sequence for 'b'"),
        (b">a\nMK\n>a\nMK\n>a\nMV\n", "standard input, line 5: id 'a' occurred before"),
        (b">x\nMK\n>>c\nMK\n>>c\nMV\n", "line 5: id '>c' occurred before"),
        (b"BZh9", "standard input is bzip2"),
        (None, "standard input is closed"),
    ],
)
def test_mistakes_in_standard_input_are_reported_by_that_name(tmp_path, text, words):
    command = f"{sys.executable} -m esm1nv_jax prepare --fasta - --out {tmp_path / 'set'}"
    command += " --validation 0 --test 0" + (" <&-" if text is None else "")
    done = subprocess.run(command, shell=True, input=text, capture_output=True)
    assert done.returncode == EXIT_USER
    assert one_error(done.stderr.decode()) and words in done.stderr.decode()
    assert list(tmp_path.iterdir()) == []


def test_what_is_normalized_is_counted(tmp_path):
    path = tmp_path / "a"
    giant = b"MKVLAWGGRT" * 4000
    path.write_bytes(
        b"\xef\xbb\xbf"
        + fasta(made_up(100), end=b"\r\n")
        + b">giant\n"
        + giant
        + b"\n>low\nmkv\n>gap\nM-K..V\n>stop\nMKV*\n>both\nMKV\n>both\nMKV\n"
    )
    options = Preparation((str(path),), str(tmp_path / "set"), validation=5, test=5)
    content = prepare.prepare(options)
    assert content["normalized"]["lower case"] == 1
    assert content["normalized"]["gaps"] == 1
    assert content["normalized"]["final stop"] == 1
    assert content["normalized"]["carriage returns"] > 200
    assert content["skipped"] == {"duplicate record": 1}
    found = {i: s for split in read_back(tmp_path / "set").values() for i, (s, _) in split.items()}
    assert [found[i] for i in (b"low", b"gap", b"stop", b"both")] == [b"MKV"] * 4
    assert found[b"giant"] == giant
    manifest.verify(tmp_path / "set")


@pytest.mark.integration
def test_a_single_line_of_50_megabytes(tmp_path):
    path = tmp_path / "a"
    giant = b"MKVLAWGGRT" * 5_000_000
    path.write_bytes(fasta(made_up(100)) + b">giant\n" + giant + b"\n>last\nMKV\n")
    status, output = esm1nv(
        "prepare", "--fasta", path, "--out", tmp_path / "set", "--validation", 5, "--test", 5
    )
    assert status == 0, output
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


def test_the_real_headers_of_uniref(tmp_path):
    corpus = Path(__file__).parents[3] / "shared" / "data" / "corpus"
    path = corpus / "uniref_202104_real_sample_ur50-00.fasta.gz"
    if not path.exists():
        pytest.skip("the sample of UniRef is not here")
    content = prepare.prepare(Preparation((str(path),), str(tmp_path / "set"), 100, 200))
    assert sum(s["examples"] for s in content["splits"].values()) == 5001
    assert json.loads((tmp_path / "set" / "features.json").read_text())
