"""Files of embeddings: their contents, and what they do not depend on."""

import dataclasses
import gzip
import hashlib
import json
import subprocess
import sys
import tracemalloc

import h5py
import jax
import numpy as np
import pyarrow.parquet as pq
import pytest

from esm1nv_jax import cli, load
from esm1nv_jax.checkpoints import model_folder
from esm1nv_jax.common import command
from esm1nv_jax.common.errors import UserError
from esm1nv_jax.data.fasta import scan
from esm1nv_jax.inference.embed import EmbedRequest, embed
from tests.inference.embed_jobs import EVERYTHING, PROTEINS, by_protein, read_npz, request
from tests.inference.models import make_proteins, write_fasta


def test_the_three_formats_hold_the_same_in_the_order_of_the_fasta(
    model, model_path, tmp_path, small_parts
):
    digests = {
        out: embed(request(model_path, tmp_path, out=out, include=EVERYTHING, layers=(-1, 1)))
        for out in ("o.npz", "o.h5", "o.parquet")
    }
    assert len(set(digests.values())) == 1
    found = read_npz(tmp_path / "o.npz")
    names, sequences = zip(*PROTEINS, strict=True)
    lengths = [len(s) for s in sequences]
    assert found["id"].tolist() == list(names)
    assert found["length"].tolist() == lengths
    assert found["offsets"].tolist() == [0, *np.cumsum(lengths).tolist()]
    assert found["checksum"].tolist() == [hashlib.md5(s.encode()).hexdigest() for s in sequences]
    expected = model.embed(sequences)
    np.testing.assert_allclose(found["mean_-1"], expected.mean, atol=1e-5)
    np.testing.assert_allclose(found["cls_-1"], expected.cls, atol=1e-5)
    np.testing.assert_allclose(
        found["per_residue_-1"], np.concatenate(expected.per_residue), atol=1e-5
    )
    assert found["logits"].shape == (sum(lengths), 30)
    arrays = [n for n in found if n.startswith(("mean", "per", "cls", "log"))]
    assert len(arrays) == 7
    with h5py.File(tmp_path / "o.h5") as file:
        assert [i.decode() for i in file["id"]] == list(names)
        assert json.loads(file.attrs["esm1nv_jax"])["contents"] == digests["o.h5"]
        for name in [*arrays, "length", "offsets"]:
            np.testing.assert_array_equal(file[name][:], found[name])
    table = pq.read_table(tmp_path / "o.parquet")
    assert table["id"].to_pylist() == list(names)
    stored = pq.read_metadata(tmp_path / "o.parquet").metadata
    assert json.loads(stored[b"esm1nv_jax"])["contents"] == digests["o.parquet"]
    for name in arrays:
        flat = table[name].combine_chunks()
        while not hasattr(flat, "to_numpy") or flat.type.num_fields:
            flat = flat.flatten()
        np.testing.assert_array_equal(flat.to_numpy().reshape(found[name].shape), found[name])
    assert not list(tmp_path.glob("*.parts")) and not list(tmp_path.glob("*.tmp"))


def test_a_protein_does_not_depend_on_what_else_is_in_the_file(model_path, tmp_path):
    rng = np.random.default_rng(5)
    others = [PROTEINS[i] for i in rng.permutation(len(PROTEINS))[:17]]
    for deterministic in (False, True):
        options = {"include": ("mean", "per_residue"), "deterministic": deterministic}
        for name, proteins in (("all", PROTEINS), ("some", others)):
            folder = tmp_path / f"{name}{deterministic}"
            folder.mkdir()
            embed(request(model_path, folder, proteins, **options))
        for field in ("mean_-1", "per_residue_-1"):
            everything = by_protein(tmp_path / f"all{deterministic}" / "out.npz", field)
            some = by_protein(tmp_path / f"some{deterministic}" / "out.npz", field)
            assert len(some) == 17
            for name, value in some.items():
                if deterministic:
                    assert value.tobytes() == everything[name].tobytes()
                np.testing.assert_allclose(value, everything[name], atol=1e-5)


def test_bf16_does_not_depend_on_neighbours_beyond_its_stated_bound(model_path, tmp_path):
    for name, proteins in (("all", PROTEINS), ("some", PROTEINS[::-3])):
        (tmp_path / name).mkdir()
        embed(request(model_path, tmp_path / name, proteins, precision="bf16"))
    everything = by_protein(tmp_path / "all" / "out.npz", "mean_-1")
    for name, value in by_protein(tmp_path / "some" / "out.npz", "mean_-1").items():
        np.testing.assert_allclose(value, everything[name], atol=2e-2)


def test_long_proteins_by_each_policy(model, model_path, tmp_path, capsys):
    options = {"include": ("per_residue",)}
    embed(request(model_path, tmp_path, out="w.npz", **options))
    assert "trained on prefixes" in capsys.readouterr().err
    assert len(read_npz(tmp_path / "w.npz")["per_residue_-1"]) == sum(len(s) for _, s in PROTEINS)
    embed(request(model_path, tmp_path, out="t.npz", long="truncate", **options))
    cut = by_protein(tmp_path / "t.npz", "per_residue_-1")
    whole = [hashlib.md5(sequence.encode()).hexdigest() for _, sequence in PROTEINS]
    assert read_npz(tmp_path / "t.npz")["checksum"].tolist() == whole
    for name, sequence in PROTEINS:
        expected = model.embed([sequence[:64]]).per_residue[0] if len(sequence) > 140 else None
        assert len(cut[name]) == min(64, len(sequence))
        if expected is not None:
            np.testing.assert_allclose(cut[name], expected, atol=1e-5)
    with pytest.raises(UserError, match=r"longer than the 64 residues"):
        embed(request(model_path, tmp_path, out="e.npz", long="error", **options))


def test_float16_is_stored_and_overflow_is_not(model, model_path, tmp_path):
    exact = request(model_path, tmp_path, out="a.npz", include=("mean", "logits"))
    half = request(model_path, tmp_path, out="b.npz", include=("mean", "logits"), dtype="float16")
    embed(exact), embed(half)
    a, b = read_npz(exact.out), read_npz(half.out)
    for name in ("mean_-1", "logits"):
        assert b[name].dtype == np.float16
        np.testing.assert_allclose(a[name], b[name].astype(np.float32), rtol=2e-3, atol=1e-3)
    params = jax.tree.map(np.array, model.params)
    params["final_norm"]["scale"] *= 1e6
    large = str(tmp_path / "large")
    model_folder.write(large, model_folder.Weights(params, model.config, {}))
    embed(dataclasses.replace(exact, checkpoint=large, include=("mean",), overwrite=True))
    with pytest.raises(UserError, match=r"mean_-1 of .* is not finite in float16"):
        embed(dataclasses.replace(half, checkpoint=large, include=("mean",), overwrite=True))


def test_records_are_mended_counted_or_refused_as_in_preparation(model_path, tmp_path, capsys):
    text = b">A first\r\nmk-v*\r\n>B\nMKLV\n>A again\nMKV\n>C\nMJK\n"
    path = tmp_path / "in.fasta.gz"
    path.write_bytes(gzip.compress(text))
    out = str(tmp_path / "o.npz")
    embed(EmbedRequest(model_path, str(path), out, include=("per_residue",)))
    found = read_npz(out)
    assert found["id"].tolist() == ["A", "B", "C"] and found["length"].tolist() == [3, 4, 3]
    told = capsys.readouterr().err
    assert "duplicate record 1" in told and "lower case 1" in told
    path.write_bytes(gzip.compress(text + b">D\n\n>E\nMKV\n"))
    with pytest.raises(UserError, match=r"in\.fasta\.gz, line 9: no sequence for 'D'"):
        embed(EmbedRequest(model_path, str(path), out, overwrite=True))
    embed(EmbedRequest(model_path, str(path), out, overwrite=True, on_error="skip"))
    assert read_npz(out)["id"].tolist() == ["A", "B", "C", "E"]


def test_an_id_with_two_sequences_is_told_with_both_lines(model_path, tmp_path):
    path = tmp_path / "twice.fasta"
    path.write_text(">a\nMKV\n>b\nMK\n>a\nMKV\n>a\nMV\n")
    with pytest.raises(UserError, match=r"fasta, line 7: id 'a' occurred before.*fasta, line 1"):
        embed(EmbedRequest(model_path, str(path), str(tmp_path / "out.parquet")))


def test_mistakes_are_one_line_and_status_2(model_path, tmp_path, capsys):
    fasta = write_fasta(tmp_path / "in.fasta", PROTEINS[:3])
    binary, there = tmp_path / "binary.fasta", tmp_path / "there.npz"
    binary.write_bytes(bytes(range(256)) * 20)
    there.write_bytes(b"precious")
    folder_there = tmp_path / "folder.npz"
    folder_there.mkdir()
    good = {"checkpoint": model_path, "fasta": fasta, "out": str(tmp_path / "o.npz")}
    for change, expected in [
        ({"checkpoint": str(tmp_path / "none")}, "does not exist"),
        ({"checkpoint": str(tmp_path)}, "holds no model"),
        ({"fasta": str(tmp_path / "none.fasta")}, "No such file"),
        ({"fasta": str(binary)}, "is this FASTA?"),
        ({"fasta": str(tmp_path)}, "is a folder"),
        ({"out": str(there)}, "exists; add --overwrite"),
        ({"out": str(tmp_path / "o.csv")}, ".parquet, .h5, .npz"),
        ({"out": str(tmp_path / "no" / "o.npz")}, "there is no folder"),
        ({"out": str(folder_there)}, "it is a folder"),
        ({"shard": "1/0"}, "i from 1 to n"),
        ({"layers": "-1,3"}, "layer 3 is unknown"),
        ({"layers": "last"}, "--layers=last"),
        ({"include": "mean,contacts"}, "--include=contacts"),
        ({"precision": "fp8"}, "fp32, bf16"),
        ({"dtype": "int8"}, "float32, float16"),
        ({"shard": "4/3"}, "--shard=4/3"),
        ({"shard": "second"}, "--shard=second is not i/n, such as 1/4"),
        ({"shard": "3"}, "1/4"),
    ]:
        argv = [x for k, v in (good | change).items() for x in (f"--{k}", v)]
        assert command.run(cli.dispatch, ["embed", *argv]) == 2, change
        told = [x for x in capsys.readouterr().err.splitlines() if x.startswith("error: ")]
        assert len(told) == 1 and expected in told[0], told
    assert there.read_bytes() == b"precious"
    assert command.run(cli.dispatch, ["embed", "--merge", "--out", good["out"]]) == 2


def test_checking_a_file_holds_little_of_each_record(tmp_path):
    peaks = []
    for n in (20_000, 60_000):
        fasta = write_fasta(tmp_path / "in.fasta", [(f"p{i}", "MKV" * 100) for i in range(n)])
        tracemalloc.start()
        scan(fasta)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] - peaks[0] < 40 * 40_000


PEAK = """
import re, sys
from esm1nv_jax.inference import embed, fasta_job
fasta_job.PART_BYTES, fasta_job.PART_RESIDUES, fasta_job.PART_BATCHES = 1 << 22, 1 << 14, 0
checkpoint, fasta, out = sys.argv[1:]
embed.embed(embed.EmbedRequest(checkpoint, fasta, out, include=("per_residue", "mean")))
# Not ru_maxrss, which begins with the memory of the process that forked this one.
print(int(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1]) * 1024)
"""


@pytest.mark.integration
@pytest.mark.parametrize("ending", ["parquet", "h5", "npz"])
def test_memory_does_not_grow_with_the_file(model_path, tmp_path, ending):
    """Six times the proteins, 100 MB more to write: the peak of the process hardly moves."""
    peaks, sizes = [], []
    for times in (1, 6):
        proteins = make_proteins(5_000 * times, longest=60)
        named = [(f"{name}x{i}", sequence) for i, (name, sequence) in enumerate(proteins)]
        fasta = write_fasta(tmp_path / f"{times}.fasta", named)
        out = tmp_path / f"{times}.{ending}"
        done = subprocess.run(
            [sys.executable, "-c", PEAK, model_path, fasta, str(out)],
            capture_output=True,
            text=True,
            check=True,
        )
        peaks.append(int(done.stdout.split()[-1]))
        sizes.append(out.stat().st_size)
    assert sizes[1] - sizes[0] > 90e6
    assert peaks[1] - peaks[0] < 25e6, (peaks, sizes)


def run_embed(model_path, fasta, out, *options):
    argv = ["embed", "--checkpoint", model_path, "--fasta", fasta, "--out", str(out), *options]
    assert command.run(cli.dispatch, argv) == 0
    return read_npz(out)


def test_the_options_of_esm_extract_are_understood(model, model_path, tmp_path, capsys):
    fasta = write_fasta(tmp_path / "in.fasta", PROTEINS[:8])
    theirs = ["--repr_layers", "0", "1", "2", "--include", "mean", "per_tok", "bos"]
    theirs += ["--truncation_seq_length", "20", "--toks_per_batch", "4096"]
    found = run_embed(model_path, fasta, tmp_path / "esm.npz", *theirs)
    assert "--toks-per-batch is ignored" in capsys.readouterr().err
    ours = ["--layers", "0,1,-1", "--include", "mean,per_residue,cls"]
    ours += ["--max-residues", "20", "--long", "truncate"]
    expected = run_embed(model_path, fasta, tmp_path / "ours.npz", *ours)
    assert found.keys() == expected.keys() >= {"mean_0", "mean_1", "mean_-1", "cls_-1"}
    for name in found:
        if name != "esm1nv_jax":
            np.testing.assert_array_equal(found[name], expected[name])
    assert np.diff(found["offsets"]).max() == 20 < max(len(s) for _, s in PROTEINS[:8])
    means = model.embed([s[:20] for _, s in PROTEINS[:8]]).mean
    np.testing.assert_allclose(found["mean_-1"], means, atol=1e-5)
    last = run_embed(model_path, fasta, tmp_path / "last.npz", "--repr-layers", "-1", "-2")
    assert {"mean_-1", "mean_1"} < last.keys()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--repr-layers", "3"], "--repr-layers 3 is unknown; there are 0 (embeddings) to 2"),
        (["--repr-layers", "0", "-4"], "--repr-layers -4 is unknown; there are 0"),
        (["--repr-layers", ","], "--repr-layers names none"),
        (["--layers", ","], "--layers names none"),
        (["--include", ","], "--include= is unknown; there are mean"),
        (["--layers", "0", "--layers", "-1", "0"], "--layers names one twice: 0, -1, 0"),
    ],
)
def test_layers_that_are_not_there_are_told(model_path, tmp_path, capsys, options, said):
    fasta = write_fasta(tmp_path / "in.fasta", PROTEINS[:2])
    argv = ["embed", "--checkpoint", model_path, "--fasta", fasta, "--out", f"{tmp_path}/o.npz"]
    assert command.run(cli.dispatch, [*argv, *options]) == 2
    assert said in capsys.readouterr().err.splitlines()[-1]


def test_an_option_is_given_in_one_of_its_two_names(model_path, tmp_path, capsys):
    fasta = write_fasta(tmp_path / "in.fasta", PROTEINS[:2])
    argv = ["embed", "--checkpoint", model_path, "--fasta", fasta]
    argv += ["--out", str(tmp_path / "o.npz"), "--layers", "1", "--repr_layers", "1"]
    assert command.run(cli.dispatch, argv) == 2
    assert "give one of them" in capsys.readouterr().err


def test_shorter_windows_can_be_asked_for(model_path, tmp_path, capsys):
    embed(request(model_path, tmp_path, include=("per_residue",), max_residues=20))
    told = capsys.readouterr().err
    first = next(name for name, s in PROTEINS if len(s) > 20)
    assert "longer than the 20 residues" in told and f"the first is {first}" in told
    found = by_protein(tmp_path / "out.npz", "per_residue_-1")
    assert [len(found[name]) for name, _ in PROTEINS] == [len(s) for _, s in PROTEINS]
    short = load(model_path, max_residues=20).embed([s for _, s in PROTEINS])
    for (name, _), expected in zip(PROTEINS, short.per_residue, strict=True):
        np.testing.assert_allclose(found[name], expected, atol=1e-5)
