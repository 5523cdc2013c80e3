"""Tables of clusters: formats, and the ids that they are looked up by."""

import numpy as np
import pytest

from esm1nv_jax.common.errors import UserError
from esm1nv_jax.data import prepare, splits
from esm1nv_jax.data.prepare import Preparation
from tests.data.made_up import fasta, made_up


def table(tmp_path, text, name="clusters.tsv"):
    path = tmp_path / name
    path.write_bytes(text)
    return path


@pytest.mark.parametrize(
    ("name", "accession"),
    [
        (b"P12345", b"P12345"),
        (b"UniRef50_P12345", b"P12345"),
        (b"sp|P12345|AATM_RABIT", b"P12345"),
        (b"tr|A0A024|A0A024_MOUSE", b"A0A024"),
        (b"gnl|extdb|pgaptmp_000001", b"pgaptmp_000001"),
        (b"lcl|contig_1", b"contig_1"),
        (b"ref|NP_001234.1|", b"NP_001234.1"),
        (b"ref|NP_001234.1|", b"NP_001234"),
        (b"gi|129295|sp|P01013.1|", b"P01013"),
        (b"gi|129295|ref|NP_001.1|", b"NP_001.1"),
        (b"gi|129295", b"129295"),
        (b"WP_012345678.1", b"WP_012345678"),
        (b"pdb|1ABC|A", b"1ABC_A"),
        (b"pir||A12345", b"A12345"),
    ],
)
def test_ids_are_found_by_their_accessions(tmp_path, name, accession):
    mapped, _ = splits.load_table(table(tmp_path, accession + b"\tC\nX1\tD\n"))
    cluster, found = splits.look_up(mapped, [b"other", name])
    assert found.tolist() == [False, True]
    assert cluster[1] == splits.digests([b"C"])[0]


@pytest.mark.parametrize(
    "name", [b"gnl|extdb|x", b"|", b"a||", b"sp|", b"gi|", b"AATM_RABIT", b"."]
)
def test_ids_that_the_table_does_not_name_are_not_found(tmp_path, name):
    mapped, _ = splits.load_table(table(tmp_path, b"extdb\tC\nsp\tD\nAATM\tD\n"))
    assert not splits.look_up(mapped, [name])[1].any()


def test_the_whole_id_goes_before_its_accession(tmp_path):
    mapped, _ = splits.load_table(table(tmp_path, b"P1\tA\nsp|P1|X\tB\n"))
    cluster, _ = splits.look_up(mapped, [b"sp|P1|X", b"sp|P1|Y"])
    assert cluster.tolist() == splits.digests([b"B", b"A"]).tolist()


@pytest.mark.parametrize("name", ["out_cluster.tsv", "any.tsv"])
def test_the_columns_of_mmseqs2_are_recognized(tmp_path, name):
    text = b"".join(b"P%d\tP%d\n" % (i // 4 * 4, i) for i in range(40))
    mapped, swapped = splits.load_table(table(tmp_path, text, name))
    assert swapped
    cluster, found = splits.look_up(mapped, [b"sp|P%d|X" % i for i in range(40)])
    assert found.all()
    assert len(np.unique(cluster)) == 10
    assert (cluster.reshape(10, 4) == cluster[::4, None]).all()


def test_the_documented_order_is_not_taken_for_mmseqs2(tmp_path):
    text = b"".join(b"P%d\tP%d\n" % (i, i // 4 * 4) for i in range(40))
    _, swapped = splits.load_table(table(tmp_path, text))
    assert not swapped


def test_a_byte_order_mark_is_no_part_of_the_first_accession(tmp_path):
    mapped, _ = splits.load_table(table(tmp_path, b"\xef\xbb\xbfA1\tC1\nA2\tC1\n"))
    assert splits.look_up(mapped, [b"A1", b"A2"])[1].all()


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (b"C1\tA1\nC1\tA2\n", "are the columns swapped"),  # no cluster is named by a member
        (b"A1\tC1\nA1\tC2\nA2\tC1\n", "give each one cluster"),
        (b"A1\tC1\nA2\t\nA3\t\n", "line 2: no cluster for 'A2'; give lines"),
        (b"A1\tx\tC1\nA1\tx\tC2\n", "give each one cluster"),
        (b"A" * (3 << 20), "a line of more than 1,048,576 bytes"),
        ("A1\tC1\n".encode("utf-16"), "is UTF-16 text; give a table"),
    ],
)
def test_tables_that_cannot_be_used(tmp_path, text, words):
    with pytest.raises(UserError, match=words):
        splits.load_table(table(tmp_path, text))


def prepare_with(tmp_path, listed, of=40):
    """Prepares `of` proteins, `listed` of which are in the table."""
    (tmp_path / "a").write_bytes(fasta(made_up(of, mean=40)))
    rows = b"".join(b"A%05d\tC%d\n" % (i, i // 3) for i in range(listed))
    options = {"validation": 8, "test": 8, "groups": str(table(tmp_path, rows))}
    return prepare.prepare(Preparation((str(tmp_path / "a"),), str(tmp_path / "set"), **options))


def test_a_join_that_matches_most_is_counted(tmp_path, capsys):
    assert prepare_with(tmp_path, 39)["clusters"]["sequences_without"] == 1
    assert "are not in" not in capsys.readouterr().err


def test_a_join_that_misses_some_is_a_warning(tmp_path, capsys):
    assert prepare_with(tmp_path, 30)["clusters"]["sequences_without"] == 10
    assert "warning: 10 of 40 sequences are not in" in capsys.readouterr().err


@pytest.mark.parametrize("listed", [1, 19])
def test_a_join_that_misses_most_is_an_error(tmp_path, listed):
    with pytest.raises(UserError, match=f"{40 - listed} of 40 sequences are not in"):
        prepare_with(tmp_path, listed)
    assert not (tmp_path / "set").exists()


def test_clusters_larger_than_a_split_do_not_leave_it_empty(tmp_path):
    (tmp_path / "a").write_bytes(fasta(made_up(40, mean=40)))
    rows = b"".join(b"A%05d\tC%d\n" % (i, i // 4) for i in range(40))
    options = Preparation(
        (str(tmp_path / "a"),), str(tmp_path / "set"), 1, 1, groups=str(table(tmp_path, rows))
    )
    content = prepare.prepare(options)
    sizes = {name: split["examples"] for name, split in content["splits"].items()}
    assert sizes == {"train": 32, "validation": 4, "test": 4}


def test_two_clusters_do_not_make_three_splits(tmp_path):
    (tmp_path / "a").write_bytes(fasta(made_up(20, mean=40)))
    rows = table(tmp_path, b"".join(b"A%05d\tC%d\n" % (i, i // 10) for i in range(20)))
    options = Preparation((str(tmp_path / "a"),), str(tmp_path / "set"), 1, 1, groups=str(rows))
    with pytest.raises(UserError, match="too large: whole ones for validation and test"):
        prepare.prepare(options)


def test_sizes_are_exact_whatever_stands_twice():
    """A cluster that is divided for validation is no candidate for test."""
    random = np.random.default_rng(0)
    for _ in range(300):
        key = np.repeat(np.arange(40), random.integers(2, 4, 40))
        sizes = random.integers(1, 6, 2).tolist()
        split = splits.assign(random.permutation(key), *sizes, whole=False)
        assert np.bincount(split).tolist() == [len(key) - sum(sizes), *sizes]
