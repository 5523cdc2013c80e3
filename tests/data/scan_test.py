"""One scan of a FASTA file for the verbs that compute."""

import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from esm1nv_jax.common.errors import UserError
from esm1nv_jax.data import fasta as fasta_lib
from esm1nv_jax.data.fasta import scan
from tests.data.made_up import fasta, made_up


def written(tmp_path, content):
    path = tmp_path / "x.fasta"
    path.write_bytes(content)
    return str(path)


BAD = {  # name: (content, line, words of the message, counted as, ids kept)
    "latin-1": (b">prot\xe9\nMK\n>prot\xe8\nMV\n>ok\nMA\n", 1, "not UTF-8", "bad id", ["ok"]),
    "NUL": (b">ok\nMK\n>nul\0 x\nMV\n", 3, r"'nul\\x00'", "bad id", ["ok"]),
    "control": (b">A\x01B x\nMK\n>ok\nMV\n", 1, r"'A\\x01B'", "bad id", ["ok"]),
    "escape": (b">a\x1b[31m\nMK\n>ok\nMV\n", 1, r"\\x1b", "bad id", ["ok"]),
    "C1 control": ("\n>a\x9bb\nMK\n>ok\nMV\n".encode(), 2, "cannot be printed", "bad id", ["ok"]),
    "long": (b">" + b"x" * 1001 + b"\nMK\n>ok\nMV\n", 1, "1,001 bytes", "long id", ["ok"]),
    "PIR": (
        b">ok\nMA\n>P1;CRAB_ANAPL\nALPHA CRYSTALLIN B CHAIN\n  MDITIHNPLI RRPLF\n  SRIF*\n",
        3,
        "'P1;CRAB_ANAPL' begins a record of PIR",
        "PIR format",
        ["ok"],
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_ids_that_cannot_be_kept_apart_are_refused_with_their_line(tmp_path, name):
    content, line, words, counted, kept = BAD[name]
    path = written(tmp_path, content)
    with pytest.raises(UserError, match=f"line {line}: .*{words}.*; fix it$") as error:
        scan(path)
    assert str(error.value).isprintable()
    found = scan(path, skip=True)
    assert [name for name, _ in found] == kept
    assert found.skipped[counted] == content.count(b">") - 1


def test_ids_in_utf_8_and_of_the_largest_length_are_kept(tmp_path):
    ids = ["protéine-α", "x" * fasta_lib.MAX_ID, "a;size=3;", "P1;"[:2], "sp|P1;|x"]
    path = written(tmp_path, "".join(f">{name} d\nMK\n" for name in ids).encode())
    assert [name for name, _ in scan(path)] == ids


@pytest.mark.parametrize("end", [b"\n", b"\r\n", b"\r"])
def test_byte_order_marks_of_joined_files_lose_no_record(tmp_path, end):
    mark = b"\xef\xbb\xbf"
    one, two = (
        fasta([(b"%b%d" % (n, i), b"", b"MKV") for i in range(3)], end=end) for n in (b"a", b"b")
    )
    found = scan(
        written(tmp_path, mark + one + mark + two + mark + mark + b">c" + end + b"MK" + end)
    )
    assert [name for name, _ in found] == ["a0", "a1", "a2", "b0", "b1", "b2", "c"]
    assert found.normalized["byte order marks"] == 4
    assert not found.skipped


def test_a_byte_order_mark_may_lie_between_two_blocks_of_a_file(tmp_path):
    text = fasta(made_up(4000))
    at = text.index(b"\n>", 1 << 20) + 1
    for shift in (0, 1, 2, 3):
        padding = b">pad\n" + b"M" * ((1 << 21) - at - 6 - shift) + b"\n"
        found = scan(written(tmp_path, padding + text[:at] + b"\xef\xbb\xbf" + text[at:]))
        assert len(found.lengths) == 4001
        assert found.normalized["byte order marks"] == 1


def test_a_fifo_is_read_once_and_its_copy_removed(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "tmp"))
    (tmp_path / "tmp").mkdir()
    os.mkfifo(tmp_path / "fifo")
    proteins = made_up(500)
    writer = threading.Thread(target=(tmp_path / "fifo").write_bytes, args=(fasta(proteins),))
    writer.start()
    found = scan(str(tmp_path / "fifo"))
    writer.join()
    for _ in range(2):
        assert [(i.encode(), s) for i, s in found] == [(i, s) for i, _, s in proteins]
    assert len(list((tmp_path / "tmp").iterdir())) == 1
    del found
    assert list((tmp_path / "tmp").iterdir()) == []


PROGRAM = """
import sys
from esm1nv_jax.data.fasta import scan
found = scan(sys.argv[1])
print(found, [name for name, _ in found], [name for name, _ in found])
"""


@pytest.mark.parametrize(
    "command",
    ["cat {0} | {1} -", "cat {0} | {1} /dev/stdin", "{1} /dev/stdin < {0}", "{1} <(cat {0})"],
)
def test_pipes_of_a_shell(tmp_path, command):
    path = written(tmp_path, b">a\nMKV\n>b\nMA\n")
    program = f"{sys.executable} -c '{PROGRAM}'"
    done = subprocess.run(
        ["bash", "-c", command.format(path, program)], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == (
        "2 proteins, 5 residues, the longest has 3 ['a', 'b'] ['a', 'b']"
    )


@pytest.mark.parametrize(("path", "words"), [("absent", "No such file"), (".", "it is a folder")])
def test_what_is_no_file(tmp_path, path, words):
    with pytest.raises(UserError, match=f"^cannot read .*{words}"):
        scan(str(Path(tmp_path, path)))
