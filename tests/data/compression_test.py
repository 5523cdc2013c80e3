"""Compressed files: what they hold, how damage is reported, and that none exhausts memory."""

import contextlib
import gzip
import lzma
import subprocess
import sys
import zlib

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from esm1nv_jax.common.errors import UserError
from esm1nv_jax.data import compression, tables
from esm1nv_jax.data.compression import DamagedFileError, DecompressedFile, text_lines, zstd

PACK = {"gz": gzip.compress, "xz": lzma.compress, "zst": zstd.compress}


@settings(max_examples=400, deadline=None)
@given(
    data=st.binary(max_size=400),
    kind=st.sampled_from(["plain", "gz", "xz", "zst"]),
    cut=st.integers(0, 30),
    flip=st.integers(0, 400),
)
def test_a_damaged_file_is_an_error_of_one_kind(tmp_path_factory, data, kind, cut, flip):
    blob = bytearray(PACK.get(kind, bytes)(b">a\n" + data))
    if flip < len(blob):
        blob[flip] ^= 0x55
    path = tmp_path_factory.mktemp("f") / "x"
    path.write_bytes(bytes(blob[: len(blob) - cut]))
    with contextlib.suppress(DamagedFileError, UserError):
        b"".join(DecompressedFile(path))


@pytest.mark.parametrize("kind", ["gz", "xz", "zst"])
@pytest.mark.parametrize("members", [1, 2])
def test_one_and_several_members(tmp_path, kind, members):
    pack = PACK[kind]
    text = b"".join(b">p%d\nMKV\n" % i for i in range(5000))
    path = tmp_path / "x"
    path.write_bytes(pack(text) * members)
    assert b"".join(DecompressedFile(path)) == text * members
    for cut in (1, 4, 9, 100):
        path.write_bytes((pack(text) * members)[:-cut])
        with pytest.raises(DamagedFileError, match="too early"):
            b"".join(DecompressedFile(path))


@pytest.mark.parametrize("kind", ["gz", "xz", "zst"])
def test_what_follows_a_member_is_read_or_an_error(tmp_path, kind):
    pack = PACK[kind]
    first, second = b">a\nMK\n" * 1000, b">b\nMV\n" * 1000
    damaged = bytes([pack(second)[0] ^ 0x55]) + pack(second)[1:]
    path = tmp_path / "x"
    path.write_bytes(pack(first) + bytes(8) + pack(second) + bytes(8))  # padded, as tapes are
    assert b"".join(DecompressedFile(path)) == first + second
    for wrong in (damaged, second):
        path.write_bytes(pack(first) + wrong)
        blocks = iter(DecompressedFile(path))
        assert next(blocks) == first
        with pytest.raises(DamagedFileError, match="damaged"):
            next(blocks)


def test_frames_without_content(tmp_path):
    """`pzstd` puts one before each other frame."""
    empty = bytes.fromhex("502a4d18") + (4).to_bytes(4, "little") + b"size"
    path = tmp_path / "x"
    path.write_bytes((empty + zstd.compress(b">a\nMK\n")) * 2)
    assert b"".join(DecompressedFile(path)) == b">a\nMK\n" * 2


def bomb(path, kind, megabytes):
    """A file of so many megabytes of one letter, a few kB large."""
    block = b"A" * 1_000_000
    if kind == "zst":
        packer = zstd.ZstdCompressor()
    elif kind == "xz":
        packer = lzma.LZMACompressor(preset=0)
    else:
        packer = zlib.compressobj(1, wbits=31)
    with open(path, "wb") as file:
        file.write(packer.compress(b">bomb\n"))
        for _ in range(megabytes):
            file.write(packer.compress(block))
        file.write(packer.flush())
    return path


@pytest.mark.parametrize(
    "kind", [k if k != "xz" else pytest.param(k, marks=pytest.mark.integration) for k in PACK]
)
def test_a_decompression_bomb_is_refused_in_little_memory(tmp_path, kind):
    """Three times the memory that is allowed, in one record."""
    path = bomb(tmp_path / "bomb", kind, 600)
    assert path.stat().st_size < 5_000_000
    program = (
        "import re, sys\nfrom esm1nv_jax.data.fasta import scan\n"
        "try: scan(sys.argv[1])\nexcept ValueError as error: print(error)\n"
        # Not ru_maxrss, which begins with the memory of the process that forked this one.
        "print(re.search(r'VmHWM:\\s+(\\d+)', open('/proc/self/status').read())[1])"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, path], capture_output=True, text=True, check=True
    )
    message, kilobytes = done.stdout.splitlines()
    assert "line 2: a record of more than 67,108,864 bytes" in message
    assert int(kilobytes) < 300_000


@pytest.mark.parametrize("kind", PACK)
def test_blocks_are_small_however_far_a_file_expands(tmp_path, kind):
    sizes = [len(block) for block in DecompressedFile(bomb(tmp_path / "bomb", kind, 200))]
    assert sum(sizes) == 200_000_006
    assert max(sizes) <= 1 << 20


def test_a_table_that_is_read_as_a_whole_has_a_bound(tmp_path, monkeypatch):
    monkeypatch.setattr(compression, "_MAX_LINE", 1 << 20)
    path = bomb(tmp_path / "bomb", "gz", 2)
    with pytest.raises(UserError, match="more than 1 MiB in one line; give a CSV file with a line"):
        list(text_lines(str(path), "a CSV file"))
    monkeypatch.setattr(tables, "MAX_BYTES", 1 << 20)
    path.write_bytes(gzip.compress(b"a,b\n" + b"1,2\n" * 20_000))
    with pytest.raises(UserError, match="more than 1 MiB of memory; give it in smaller parts"):
        tables.read_csv(str(path))


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("mutant,score\nA1G,1\n".encode("utf-16"), "is UTF-16 text; give a CSV file"),
        (b"BZh91AY", "is bzip2; give a CSV file"),
        (b"a,b\n\xe9,1\n", "not text in UTF-8"),
        (gzip.compress(b"a,b\n" * 100, mtime=0)[:-9], "ends too early"),
        (None, "cannot read"),
    ],
)
def test_what_is_no_text_is_one_line_that_asks_for_the_right_file(tmp_path, content, words):
    path = tmp_path / "x.csv"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError, match=words) as error:
        list(text_lines(str(path), "a CSV file"))
    assert "\n" not in str(error.value) and "FASTA" not in str(error.value)
