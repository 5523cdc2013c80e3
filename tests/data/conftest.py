"""A file of made-up proteins for the tests of preparation."""

import pytest

from tests.data.made_up import fasta, made_up


@pytest.fixture(scope="session")
def proteins():
    return made_up(15_000)


@pytest.fixture(scope="session")
def fasta_file(tmp_path_factory, proteins):
    path = tmp_path_factory.mktemp("fasta") / "made_up.fasta"
    path.write_bytes(fasta(proteins))
    return path
