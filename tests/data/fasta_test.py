"""The reader against Biopython's, on whatever hypothesis can think of."""

import contextlib
import io
import itertools
import re
from collections import Counter

import pytest
from Bio.SeqIO.FastaIO import SimpleFastaParser
from hypothesis import example, given, settings
from hypothesis import strategies as st

from esm1nv_jax.data import fasta, tokenizer


def read(blocks, size=fasta.TEXT_SIZE):
    """(records, reports, normalized) of a whole text given in `blocks`."""
    reports, normalized, records = [], Counter(), []

    def on_fault(line, kind, fault):
        reports.append((line, fault))

    for line, text in fasta.whole_records(blocks, on_fault, normalized, size):
        part = fasta.parse(text, line, on_fault, normalized)
        records += zip(part.ids, part.descriptions, part.sequences, strict=True)
    return records, reports, normalized


def witness(text: bytes):
    """(title, sequence) of every record, by Biopython, which reads text."""
    handle = io.TextIOWrapper(io.BytesIO(text), encoding="latin-1")  # any line end
    return list(SimpleFastaParser(handle))


def split(text: bytes, at: list[int]) -> list[bytes]:
    cuts = sorted({min(a, len(text)) for a in at} | {0, len(text)})
    return [text[a:b] for a, b in itertools.pairwise(cuts)]


# The other reader also strips what Unicode, not ASCII, calls white space.
ANY = st.binary(max_size=6).map(lambda b: b.translate(None, b"\x1c\x1d\x1e\x1f\x85\xa0"))
LINE = st.one_of(
    st.sampled_from(b"|MKV|mkv|M-K.V|MKV*|M*K|*|--|MJX|M1|K\xe9| M K".split(b"|")), ANY
)
HEAD = st.one_of(
    st.sampled_from(
        [
            b">UniRef50_A0A007 TaxID=67581.0 RepID=A0A007_STRVD",
            b">sp|P12345|AATM_RABIT Aspartate aminotransferase OS=Oryctolagus",
            b">gi|129295|sp|P01013.1| GENE X",
            b">a",
            b">",
            b"> ",
            b"> b c ",
            b">>c",
        ]
    ),
    ANY.map(lambda b: b">" + b),
)
END = st.sampled_from([b"\n", b"\r\n", b"\r", b"\n\n", b""])
TEXT = st.lists(st.tuples(st.one_of(HEAD, LINE, LINE), END), max_size=12).map(
    lambda lines: b"".join(a + b for a, b in lines)
)


def is_an_id(title: str) -> bool:
    """Whether the first word of a title, read as Latin-1, is printable UTF-8 and not PIR's."""
    words = title.encode("latin-1").split()
    try:
        word = words[0].decode("utf-8")
    except (UnicodeDecodeError, IndexError):
        return False
    return word.isprintable() and not re.match("(P1|F1|DL|DC|RL|RC|N1|N3|XX);", word)


@settings(max_examples=1500, deadline=None)
@given(text=TEXT, at=st.lists(st.integers(0, 120), max_size=6), size=st.integers(1, 40))
@example(text=b">a\nMK\n>b\r\nMV\r\n", at=[8], size=1)
@example(text=b"\xef\xbb\xbf>a\nMK", at=[], size=1)
def test_never_loses_or_merges_a_record(text, at, size):
    """Every title of the other reader is either a record here, with its sequence, or a report."""
    records, reports, normalized = read(split(text, at), size)
    whole = read([text])
    assert (records, normalized) == (whole[0], whole[2])
    assert [line for line, _ in reports] == [line for line, _ in whole[1]]
    reports = [r for r in reports if not r[1].startswith(("text before", "the file is empty"))]
    plain = text.replace(b"\r\n", b"\n").replace(b"\r", b"\n")
    plain = re.sub(rb"^(\xef\xbb\xbf)+", b"", plain, flags=re.MULTILINE)
    lines = plain.lstrip().split(b"\n") if plain.strip() else []
    assert len(records) + len(reports) == sum(line.startswith(b">") for line in lines)

    left = iter(records)
    passed = 0
    theirs = witness(plain.lstrip())
    for title, sequence in theirs:
        body = re.sub(rb"[-. \t\v\f]", b"", sequence.encode("latin-1").upper()).rstrip(b"*")
        letters = re.fullmatch(rb"[A-Z*]+", body)
        if letters and is_an_id(title):
            name, description, own = next(left)
            assert (name, own) == (title.encode("latin-1").split()[0], body)
            assert description.split() == title.encode("latin-1").split()[1:]
        else:
            passed += 1
    assert next(left, None) is None
    assert passed == len(reports)


@settings(max_examples=300, deadline=None)
@given(body=st.binary(max_size=30))
def test_stored_sequences_are_clean(body):
    """What normalization returns, it would not change again."""
    with contextlib.suppress(tokenizer.InvalidResidueError):
        plain = tokenizer.normalize(body).sequence
        assert tokenizer.normalize(plain).sequence == plain


@pytest.mark.parametrize(
    ("text", "line", "reason"),
    [
        (b"", 1, "empty"),
        (b"\n\n", 3, "empty"),
        (b"MKV\n>a\nMK\n", 1, "before the first header"),
        (b">a\nMK\n>b\n>c\nMV\n", 3, "no sequence for 'b'"),
        (b">a\nMK\n>  \nMV\n", 3, "without an id"),
        (b">a\nMK\nMV>b desc\nMV\n", 3, "'>' in the sequence of 'a'"),
        (b">a\nMK\nM\xc3\xa9V\n", 3, "'\\xc3' in the sequence of 'a'"),
        (b">a\r\nMK\r\nM\0V\r\n", 3, "'\\x00' in the sequence of 'a'"),
        (b">a\nMK\n>b\nMV\n1 mkv\n", 5, "'1' in the sequence of 'b'"),
    ],
)
def test_a_report_names_the_line_and_the_reason(text, line, reason):
    _, reports, _ = read([text])
    assert len(reports) == 1
    assert reports[0][0] == line
    assert reason in reports[0][1]


def test_what_is_normalized_is_counted():
    text = b">a\r\nmkv\r\n>b\r\nM-K.V\r\n>c\r\nMKV*\r\n>d\r\nM KV\r\n>e\r\nM*J\r\n"
    records, reports, normalized = read([text])
    assert [r[2] for r in records] == [b"MKV"] * 4 + [b"M*J"]
    assert not reports
    assert normalized == {
        "carriage returns": 10,
        "lower case": 1,
        "gaps": 1,
        "final stop": 1,
        "white space": 1,
        "inner stop, kept as <unk>": 1,
        "letter J, kept as <unk>": 1,
    }


def test_a_giant_on_one_line():
    giant = b"MKVLAW" * (60_000_000 // 6)
    text = b">a\nMK\n>giant\n" + giant + b"\n>b\nMV\n"
    blocks = [text[i : i + (1 << 20)] for i in range(0, len(text), 1 << 20)]
    records, reports, _ = read(blocks)
    assert [(r[0], len(r[2])) for r in records] == [(b"a", 2), (b"giant", len(giant)), (b"b", 2)]
    assert not reports


def test_a_record_too_long_is_reported_and_those_before_it_kept(monkeypatch):
    monkeypatch.setattr(fasta, "MAX_RECORD", 1000)
    text = b">a\nMK\n>b\nMV\n>giant\n" + b"MKVLAW" * 1000
    records, reports, _ = read([text[i : i + 50] for i in range(0, len(text), 50)], size=40)
    assert [name for name, _, _ in records] == [b"a", b"b"]
    assert reports == [(6, "a record of more than 1,000 bytes")]


def test_the_sample():
    records = list(fasta.sample())
    assert len(records) == 10_000
    assert sum(len(s) for _, s in records) == 3_558_558
    assert all(tokenizer.normalize(s) == (s, ()) for _, s in records)
