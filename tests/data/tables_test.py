"""Tables of proteins give what the same FASTA gives."""

import gzip
import json
import os
import threading

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from esm1nv_jax import cli
from esm1nv_jax.common import command
from esm1nv_jax.common.errors import UserError
from esm1nv_jax.data import tables
from esm1nv_jax.data.fasta import scan
from esm1nv_jax.data.tables import open_csv, parse_columns, protein_file

PROTEINS = [("P1", "MKTV"), ("sp|P2|X", "mk-t\nV*"), ("größe", "ACDEFGHIKL"), ("P1", "MKTV")]


def fasta(folder):
    path = folder / "p.fasta"
    path.write_text("".join(f">{name}\n{s}\n" for name, s in PROTEINS), encoding="utf-8")
    return path


def table(folder, kind):
    path = folder / f"p.{kind}"
    ids, sequences = zip(*PROTEINS, strict=True)
    if kind == "parquet":
        columns = {"n": [1, 2, 3, 4], "seq": sequences, "accession": ids}
        pq.write_table(pa.table(columns), path)
    else:
        divider = "\t" if "tsv" in kind else ","
        rows = [
            ("n", "seq", "accession"),
            *((f"{i}", f'"{s}"', n) for i, (n, s) in enumerate(PROTEINS)),
        ]
        text = "".join(divider.join(row) + "\r\n" for row in rows).encode()
        path.write_bytes(gzip.compress(text) if kind.endswith("gz") else text)
    return path


KINDS = ("csv", "csv.gz", "tsv", "parquet")


@pytest.mark.parametrize("kind", KINDS)
def test_a_table_is_read_as_its_fasta(tmp_path, kind, monkeypatch):
    monkeypatch.setattr(tables, "_BATCH", 2)
    expected = scan(str(fasta(tmp_path)))
    found = scan(str(table(tmp_path, kind)), columns=("accession", "seq"))
    assert list(found) == list(expected) and len(list(found)) == 3
    assert (found.digest, found.skipped) == (expected.digest, expected.skipped)


@pytest.mark.parametrize("kind", ("csv", "parquet"))
def test_prepare_makes_the_same_data_set(tmp_path, kind):
    written = []
    for path in (fasta(tmp_path), table(tmp_path, kind)):
        out = tmp_path / f"out{len(written)}"
        argv = ["prepare", "--fasta", str(path), "--out", str(out), "--columns", "accession,seq"]
        argv += ["--validation", "1", "--test", "1", "--workers", "1"]
        assert command.run(cli.dispatch, argv) == 0
        manifest = json.loads(next(out.glob("*manifest*.json")).read_text())
        written.append(manifest["splits"])
        assert not list(out.glob("esm1nv-input-*"))
    assert written[0] == written[1]


def test_embed_reads_a_table(tmp_path, capsys):
    path = table(tmp_path, "csv")
    argv = ["embed", "--checkpoint", str(tmp_path), "--out", str(tmp_path / "e.npz")]
    argv += ["--fasta", str(path), "--columns", "accession,seq"]
    assert command.run(cli.dispatch, argv) == 2  # there is no model; the proteins were read
    printed = capsys.readouterr().err
    assert "3 proteins, 18 residues" in printed and "holds no model" in printed


def test_what_is_no_table_of_proteins(tmp_path):
    def refused(text, words, name="x.csv", columns=tables.COLUMNS):
        (tmp_path / name).write_bytes(text)
        with pytest.raises(UserError, match=words) as error:
            scan(str(tmp_path / name), columns=columns)
        assert "\n" not in str(error.value)

    refused(b"a,b\n1,2\n", "has no column id, sequence; it has a, b: name those of ids and")
    refused(b"id,sequence\nmy id,MK\n", "row 1: id 'my id' is not one word")
    refused(b"id,sequence\nA,MK\n,MK\n", "row 2: id '' is not one word")
    refused(b"id,sequence\nA,>MK\n", "row 1: '>MK' is no sequence")
    refused(b"id,sequence\nA,MK\nB,M1K\n", r"two lines a row\), line 4: '1' in the sequence of 'B'")
    refused(b"id,sequence\nA,MK\nA,MV\n", "two lines a row")
    refused(b"PAR1 is not enough", "cannot be read as Parquet", "x.parquet")
    pq.write_table(pa.table({"id": [1, 2], "sequence": ["MK", None]}), tmp_path / "n.parquet")
    refused((tmp_path / "n.parquet").read_bytes(), "no sequence for '2'", "m.parquet")
    refused(b"id,sequence,sequence\nA,MK,MV\n", "has two columns 'sequence'; rename one")
    arrays = [pa.array(["A"]), pa.array(["B"]), pa.array(["MK"])]
    pq.write_table(pa.Table.from_arrays(arrays, ["id", "id", "sequence"]), tmp_path / "n.parquet")
    refused((tmp_path / "n.parquet").read_bytes(), "has two columns 'id'", "m.parquet")
    offsets, latin = pa.py_buffer(b"\0\0\0\0\1\0\0\0"), pa.py_buffer(b"\xff")
    arrays = [pa.StringArray.from_buffers(1, offsets, latin), pa.array(["MK"])]
    pq.write_table(pa.Table.from_arrays(arrays, ["id", "sequence"]), tmp_path / "n.parquet")
    refused((tmp_path / "n.parquet").read_bytes(), "cannot be read as Parquet", "m.parquet")
    with pytest.raises(UserError, match="is not ID,SEQUENCE"):
        parse_columns("id")
    assert parse_columns(" a , b") == ("a", "b")


def test_fasta_stays_as_it_is(tmp_path):
    path = fasta(tmp_path)
    assert protein_file(str(path)) == (path, None)


def test_a_fasta_may_be_named_after_the_table_it_was_made_of(tmp_path):
    path = fasta(tmp_path).rename(tmp_path / "p.csv.fasta")
    assert protein_file(str(path)) == (path, None)


def test_fields_of_a_tsv_may_hold_commas_and_be_long(tmp_path):
    (tmp_path / "x.tsv").write_text(f"id\tnote\nA\tone, two\nB\t{'M' * 200_000}\n")
    columns, rows = open_csv(str(tmp_path / "x.tsv"))
    assert columns == ["id", "note"]
    assert list(rows) == [(2, ["A", "one, two"]), (3, ["B", "M" * 200_000])]


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("end.csv", 'id,sequence,note\nA,MK,"x\nB,ML,y\n'),
        ("pair.csv", 'id,sequence,note\nA,MK,"x\nB,ML,"y\nC,MV,z\n'),
        ("end.tsv", 'id\tsequence\tnote\nA\tMK\t"x\nB\tML\ty\n'),
        ("pair.tsv", 'note\tid\tsequence\n"x\tA\tMK\ny\tB\tML\nz"\tC\tMV\n'),
    ],
)
def test_a_quote_that_is_not_closed_swallows_no_row(tmp_path, name, text):
    (tmp_path / name).write_text(text)
    with pytest.raises(UserError, match="each quote closed"):
        scan(str(tmp_path / name))


def test_quotes_within_a_tsv_and_fields_of_several_lines_are_read(tmp_path):
    (tmp_path / "x.tsv").write_text('id\tnote\nA\t"Candidatus X" sp.\nB\t"one\n""two"""\n')
    assert list(open_csv(str(tmp_path / "x.tsv"))[1]) == [
        (2, ["A", "Candidatus X sp."]),
        (4, ["B", 'one\n"two"']),
    ]


def test_a_table_comes_through_a_pipe(tmp_path):
    content = table(tmp_path, "tsv").read_bytes()
    os.mkfifo(tmp_path / "pipe.tsv")
    writer = threading.Thread(target=(tmp_path / "pipe.tsv").write_bytes, args=(content,))
    writer.start()
    found = scan(str(tmp_path / "pipe.tsv"), columns=("accession", "seq"))
    writer.join()
    assert list(found) == list(scan(str(fasta(tmp_path))))
