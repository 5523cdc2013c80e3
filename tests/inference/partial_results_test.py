"""Work of `embed` that is shared, killed or damaged, and taken up again."""

import errno
import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
import time
import warnings
import zipfile

import h5py
import numpy as np
import pytest

from esm1nv_jax.checkpoints import model_folder
from esm1nv_jax.common.errors import UserError
from esm1nv_jax.inference import fasta_job
from esm1nv_jax.inference.embed import embed, merge
from esm1nv_jax.inference.partial_results import PartialResults
from tests.inference.embed_jobs import PROTEINS, RUN, read_npz, request, start
from tests.inference.models import write_fasta


def test_shards_merge_into_the_file_of_one_job(model_path, tmp_path, small_parts):
    (tmp_path / "one").mkdir()
    alone = embed(request(model_path, tmp_path / "one", include=("mean", "per_residue")))
    for i in (3, 1):
        part = request(model_path, tmp_path, include=("mean", "per_residue"), shard=(i, 3))
        assert embed(part) is None
    with pytest.raises(UserError, match="parts are missing"):
        merge(str(tmp_path / "out.npz"))
    embed(request(model_path, tmp_path, include=("mean", "per_residue"), shard=(2, 3)))
    assert merge(str(tmp_path / "out.npz")) == alone
    assert read_npz(tmp_path / "out.npz")["id"].tolist() == [name for name, _ in PROTEINS]


@pytest.mark.integration
def test_killed_and_started_again_the_contents_are_the_same(model_path, tmp_path):
    fasta = write_fasta(tmp_path / "in.fasta", PROTEINS)

    def argv(out):
        return [
            "embed",
            "--checkpoint",
            model_path,
            "--fasta",
            fasta,
            "--out",
            str(out),
            "--include",
            "mean,per_residue",
            "--layers",
            "-1,1",
        ]

    undisturbed = start(argv(tmp_path / "a.h5"))
    killed = start(argv(tmp_path / "b.h5"), pause=0.5)
    parts = tmp_path / "b.h5.parts"
    deadline = time.monotonic() + 120
    while len(list(parts.glob("part-*.npz"))) < 2 and time.monotonic() < deadline:
        time.sleep(0.05)
    killed.send_signal(signal.SIGKILL)
    assert killed.wait() == -signal.SIGKILL
    assert not (tmp_path / "b.h5").exists()
    before = {path.name: path.stat().st_mtime_ns for path in parts.glob("part-*.npz")}
    assert 2 <= len(before) < json.loads((parts / "settings.json").read_text())["parts"]
    resumed = start(argv(tmp_path / "b.h5"))
    out, err = resumed.communicate()
    assert resumed.returncode == 0, err
    assert "going on with" in err
    expected, err = undisturbed.communicate()
    assert undisturbed.returncode == 0, err
    assert out == expected and out.startswith("contents ")
    with h5py.File(tmp_path / "a.h5") as a, h5py.File(tmp_path / "b.h5") as b:
        assert a["per_residue_1"][:].tobytes() == b["per_residue_1"][:].tobytes()


@pytest.mark.integration
def test_sigterm_says_what_is_kept(model_path, tmp_path):
    fasta, out = write_fasta(tmp_path / "in.fasta", PROTEINS), tmp_path / "o.npz"
    argv = ["embed", "--checkpoint", model_path, "--fasta", fasta, "--out", str(out)]
    job = start(argv, pause=60)
    parts, deadline = tmp_path / "o.npz.parts", time.monotonic() + 120
    while not list(parts.glob("part-*.npz")) and time.monotonic() < deadline:
        time.sleep(0.05)
    job.send_signal(signal.SIGTERM)
    err = job.communicate()[1]
    assert job.returncode == 75 and err.splitlines()[-1].startswith("stopped; "), err
    assert str(parts) in err


@pytest.mark.integration
def test_a_full_disk_keeps_what_is_finished(model_path, tmp_path):
    fasta = write_fasta(tmp_path / "in.fasta", PROTEINS)
    argv = [
        "embed",
        "--checkpoint",
        model_path,
        "--fasta",
        fasta,
        "--out",
        str(tmp_path / "o.npz"),
        "--include",
        "per_residue",
    ]
    # Files may grow to 100 kB: parts of 300 residues fit, the joined file does not.
    limit = "import resource, signal; signal.signal(signal.SIGXFSZ, signal.SIG_IGN);"
    limit += "resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))\n"
    code = limit + RUN.format(pause=0)
    done = subprocess.run(
        [sys.executable, "-c", code, *argv],
        capture_output=True,
        text=True,
        env=os.environ | {"JAX_PLATFORMS": "cpu"},
    )
    assert done.returncode == 2, done.stderr
    assert "no space left" in done.stderr and "o.npz.parts" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "o.npz").exists() and not list(tmp_path.glob("*.tmp"))
    assert list((tmp_path / "o.npz.parts").glob("part-*.npz"))
    again = start(argv)
    assert again.wait() == 0, again.stderr.read()


def test_other_settings_do_not_mix_with_unfinished_work(model_path, tmp_path, small_parts):
    embed(request(model_path, tmp_path, shard=(1, 2)))
    with pytest.raises(UserError, match=r"dtype: 'float32' there, 'float16' here"):
        embed(request(model_path, tmp_path, shard=(2, 2), dtype="float16"))
    for name, option, value in (
        ("longest", "max_residues", 20),
        ("long", "long", "truncate"),
        ("deterministic", "deterministic", True),
        ("layers", "layers", (1,)),
        ("include", "include", ("cls",)),
    ):
        with pytest.raises(UserError, match=rf"other settings \({name}: .* there, .* here\);"):
            embed(request(model_path, tmp_path, shard=(2, 2), **{option: value}))
    with pytest.raises(UserError, match="proteins"):
        embed(request(model_path, tmp_path, PROTEINS[:-1], shard=(2, 2)))
    weights = model_folder.read(model_path)
    layer = weights.params["blocks"]["0"]["qkv"]
    layer["bias"] = layer["bias"] + 1
    model_folder.write(str(tmp_path / "other"), weights)
    with pytest.raises(UserError, match=r"other settings \(model: "):
        embed(request(str(tmp_path / "other"), tmp_path, shard=(2, 2)))
    (tmp_path / "one").mkdir()
    alone = embed(request(model_path, tmp_path / "one"))
    assert embed(request(model_path, tmp_path)) == alone  # one job finishes what shards began


def test_ids_are_whole_whichever_part_has_the_longest(model_path, tmp_path, small_parts):
    proteins = [("a_name_that_is_long", "MKTAYIAKQR" * 41), ("b", "MKV" * 20)]
    embed(request(model_path, tmp_path, proteins, include=("mean",)))
    assert read_npz(tmp_path / "out.npz")["id"].tolist() == [name for name, _ in proteins]


def test_jobs_that_begin_together_share_one_folder(model_path, tmp_path, small_parts, monkeypatch):
    """A job that found no folder meets that of another, with a part in it."""
    (tmp_path / "one").mkdir()
    alone = embed(request(model_path, tmp_path / "one"))
    seen, write = [], PartialResults._write_settings

    def late(self, settings):
        if not seen:
            seen.append(None)
            embed(request(model_path, tmp_path, shard=(1, 2)))
        write(self, settings)

    monkeypatch.setattr(PartialResults, "_write_settings", late)
    embed(request(model_path, tmp_path, shard=(2, 2)))
    assert merge(str(tmp_path / "out.npz")) == alone


def test_what_is_left_of_a_removed_folder_does_not_count(model_path, tmp_path):
    parts = tmp_path / "out.npz.parts"
    parts.mkdir()
    (parts / "part-000000.npz").write_bytes(b"old")
    embed(request(model_path, tmp_path))


def test_work_begun_on_other_devices_goes_on_in_its_parts(
    model_path, tmp_path, small_parts, monkeypatch
):
    (tmp_path / "one").mkdir()
    alone = embed(request(model_path, tmp_path / "one"))
    embed(request(model_path, tmp_path, shard=(1, 2)))
    monkeypatch.setattr(fasta_job, "PART_RESIDUES", 800)  # as more devices would have it
    assert embed(request(model_path, tmp_path)) == alone


def test_the_same_model_elsewhere_goes_on(model_path, tmp_path, small_parts):
    embed(request(model_path, tmp_path, shard=(1, 2)))
    moved = shutil.copytree(model_path, tmp_path / "moved")
    assert embed(request(str(moved), tmp_path))


def test_a_damaged_part_is_found(model_path, tmp_path, small_parts):
    embed(request(model_path, tmp_path, shard=(1, 2)))
    embed(request(model_path, tmp_path, shard=(2, 2)))
    part = tmp_path / "out.npz.parts" / "part-000001.npz"
    content = bytearray(part.read_bytes())
    at = content.index(b"mean_-1.npy") + 300
    content[at] ^= 1
    part.write_bytes(content)
    with pytest.raises(UserError, match=r"part-000001\.npz is damaged"):
        merge(str(tmp_path / "out.npz"))


@pytest.fixture
def shards(model_path, tmp_path, small_parts):
    """The folder of parts that two shards have made, ready to be merged."""
    for i in (1, 2):
        embed(request(model_path, tmp_path, shard=(i, 2)))
    return tmp_path / "out.npz.parts"


def change_settings(folder, **changes):
    path = folder / "settings.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def swap(folder):
    one, two = folder / "part-000000.npz", folder / "part-000001.npz"
    content = one.read_bytes()
    one.write_bytes(two.read_bytes())
    two.write_bytes(content)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (swap, r"part-000000\.npz is no part 0 of this work"),
        (lambda f: change_settings(f, dtype="float16"), r"part-000000\.npz is no part 0"),
        (lambda f: change_settings(f, parts=2, count=3), r"part-000000\.npz is no part 0"),
        (lambda f: (f / "part-000001.npz").unlink(), r"parts are missing \(1\)"),
        (lambda f: (f / "settings.json").write_text("[1]"), "holds no settings of unfinished work"),
        (lambda f: change_settings(f, parts="2"), "holds no settings of unfinished work"),
        (lambda f: change_settings(f, parts=-1), "holds no settings of unfinished work"),
        (lambda f: (f / "settings.json").write_text("{" * 9999), "cannot be read"),
    ],
)
def test_merge_refuses_what_is_not_the_parts_of_one_work(shards, change, message):
    change(shards)
    with pytest.raises(UserError, match=message):
        merge(str(shards.parent / "out.npz"))
    assert not (shards.parent / "out.npz").exists()


def test_a_part_that_claims_a_huge_array_is_damaged(shards):
    with zipfile.ZipFile(shards / "part-000000.npz", "a") as file:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of the second member of one name
            out = file.open("rows.npy", "w")
        with out:
            header = {"descr": "<i8", "fortran_order": False, "shape": (10**15,)}
            np.lib.format.write_array_header_2_0(out, header)
    with pytest.raises(UserError, match=r"part-000000\.npz is damaged"):
        merge(str(shards.parent / "out.npz"))


def test_a_part_of_other_work_is_made_again(model_path, tmp_path, small_parts):
    (tmp_path / "one").mkdir()
    alone = embed(request(model_path, tmp_path / "one"))
    (tmp_path / "other").mkdir()
    embed(request(model_path, tmp_path / "other", layers=(1,), shard=(1, 2)))
    embed(request(model_path, tmp_path, shard=(1, 2)))
    for name in ("part-000000.npz", "part-000002.npz"):
        other = tmp_path / "other" / "out.npz.parts" / name
        shutil.copy(other, tmp_path / "out.npz.parts" / name)
    assert embed(request(model_path, tmp_path)) == alone


def test_overwriting_leaves_the_files_of_others(shards, model_path):
    (shards / "notes.txt").write_text("mine")
    (shards / "part-000000.npz.bak").write_text("mine")
    embed(request(model_path, shards.parent, layers=(1,), overwrite=True))
    assert sorted(path.name for path in shards.iterdir()) == ["notes.txt", "part-000000.npz.bak"]
    embed(request(model_path, shards.parent, layers=(0,), overwrite=True))
    assert (shards / "notes.txt").read_text() == "mine"


def test_a_second_job_of_the_same_share_is_refused(model_path, tmp_path, small_parts):
    embed(request(model_path, tmp_path, shard=(1, 2)))
    with open(tmp_path / "out.npz.parts" / "job-1-of-2.lock", "w", encoding="utf-8") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(UserError, match="written by another live job"):
            embed(request(model_path, tmp_path, shard=(1, 2)))


def test_a_folder_of_parts_that_cannot_be_written_is_one_line(model_path, tmp_path, small_parts):
    embed(request(model_path, tmp_path, shard=(1, 2)))
    (tmp_path / "out.npz.parts" / "job-2-of-2.lock").mkdir()
    with pytest.raises(UserError, match=r"job-2-of-2\.lock cannot be written: Is a directory"):
        embed(request(model_path, tmp_path, shard=(2, 2)))


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS])
def test_without_locks_it_says_so_and_goes_on(model_path, tmp_path, monkeypatch, capsys, number):
    def flock(*_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", flock)
    assert embed(request(model_path, tmp_path))
    assert "cannot be locked" in capsys.readouterr().err


def test_a_long_id_takes_its_own_room_only(model_path, tmp_path):
    """All ids as wide as the longest would be 8 MB in the part."""
    proteins = [("long" * 240, "MKV"), *((f"p{i}", "MKV") for i in range(2_000))]
    embed(request(model_path, tmp_path, proteins, shard=(1, 1)))
    (part,) = (tmp_path / "out.npz.parts").glob("part-*.npz")
    assert part.stat().st_size < 600_000
    merge(str(tmp_path / "out.npz"))
    assert read_npz(tmp_path / "out.npz")["id"].tolist() == [name for name, _ in proteins]
