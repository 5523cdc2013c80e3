"""A file of made-up proteins, and a data set prepared from it, for the tests of data."""

import pytest

from esm1nv_jax.data import prepare
from tests.data.made_up import fasta, made_up
from tests.data.preparing import SIZES


@pytest.fixture(scope="session")
def proteins():
    return made_up(15_000)


@pytest.fixture(scope="session")
def fasta_file(tmp_path_factory, proteins):
    path = tmp_path_factory.mktemp("fasta") / "made_up.fasta"
    path.write_bytes(fasta(proteins))
    return path


@pytest.fixture(scope="session")
def small_chunks():
    """Several chunks, and so shards, of a small file."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(prepare, "_SMALLEST_CHUNK", 1 << 20)
        yield


@pytest.fixture(scope="session")
def folder(tmp_path_factory, fasta_file, small_chunks):
    out = tmp_path_factory.mktemp("made") / "set"
    prepare.prepare(prepare.Preparation((str(fasta_file),), str(out), **SIZES))
    return out
