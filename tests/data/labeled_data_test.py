"""CSV tables of labeled sequences: what is read, and what is refused with its line."""

import pytest

from esm1nv_jax.common.errors import UserError
from esm1nv_jax.data import labeled_data
from esm1nv_jax.data.tables import read_csv

SPLITS = ("train", "valid", "test")


def written(tmp_path, text, encoding="utf-8"):
    path = tmp_path / "x.csv"
    path.write_bytes(text.encode(encoding))
    return str(path)


def table(tmp_path, sequence, label="Nucleus", end="\n"):
    """Two sound rows per split before the one in question, which is line 8."""
    rows = [("sequence", "label", "split")]
    rows += [(f"MK{a}", label_of, split) for split in SPLITS for a, label_of in ("VC", "LN")]
    return written(tmp_path, end.join(",".join(row) for row in [*rows, (sequence, label, "train")]))


def test_spreadsheets_and_hand_written_tables_are_read(tmp_path):
    text = 'mutant, DMS_score ,"a, b"\r\nK2R, 0.5, x\r\n\r\n , ,\r\n R5A ,0.6, "y, z"\r\n'
    for encoding in ("utf-8", "utf-8-sig"):
        columns, rows = read_csv(written(tmp_path, text, encoding))
        assert columns == ["mutant", "DMS_score", "a, b"]
        assert rows == [(2, ["K2R", "0.5", "x"]), (5, ["R5A", "0.6", "y, z"])]


@pytest.mark.parametrize(
    ("text", "encoding", "words"),
    [
        ("", "utf-8", "is empty"),
        ("\n\n", "utf-8", "is empty"),
        ("a,b\n1,2\n\n1,2,3\n", "utf-8", "line 4: 3 fields, the header has 2"),
        ("a,b\n1,2\n", "utf-16", "UTF-16 text; give a CSV file"),
    ],
)
def test_what_is_no_table(tmp_path, text, encoding, words):
    with pytest.raises(UserError, match=words):
        read_csv(written(tmp_path, text, encoding))


@pytest.mark.parametrize("name", ["sequence", "label", "mask"])
def test_a_column_that_stands_twice_is_refused(tmp_path, name):
    text = f"sequence,label,split,{name},{name}\nMKV,1,train,1,1\n"
    with pytest.raises(UserError, match=f"has two columns '{name}'; rename one"):
        labeled_data.read(written(tmp_path, text), "regression")


@pytest.mark.parametrize("end", ["\r\n", "\r"])
def test_sequences_are_normalized_as_in_fasta_files(tmp_path, end):
    read = labeled_data.read(table(tmp_path, "mk--Tv**", end=end), "localisation")
    assert read.train.sequences == [b"MKV", b"MKL", b"MKTV"]


@pytest.mark.parametrize("sequence", ["VCSDG1:|YQ", "MK[MASK]V", "MKλV"])
def test_what_is_no_residue_is_refused_as_in_fasta_files(tmp_path, sequence):
    with pytest.raises(UserError, match=r"line 8: character .* at index [25] of the sequence"):
        labeled_data.read(table(tmp_path, sequence), "localisation")


@pytest.mark.parametrize("label", ["0;5", '"0,5"', "high", "inf"])
def test_numbers_are_written_with_a_point(tmp_path, label):
    text = "sequence,label,split\n" + "".join(
        f"MK{a},0.{n},{s}\n" for s in SPLITS for a, n in ("A1", "C2")
    )
    with pytest.raises(UserError, match=r"line 8: the label .* is not a number such as 0.5"):
        labeled_data.read(written(tmp_path, text + f"MKV,{label},train\n"), "regression")
