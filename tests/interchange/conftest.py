"""Folders that `transformers` saved, one of each kind."""

import shutil

import pytest


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A folder of each kind, made once; tests change a copy."""
    witness = pytest.importorskip(
        "tests.interchange.witness", reason="needs torch and transformers"
    )
    made = {}
    for kind in ("esm", "esm2", "bert"):
        made[kind] = tmp_path_factory.mktemp(kind)
        witness.save(witness.make(kind), kind, made[kind])
    return made


@pytest.fixture
def copy(saved, tmp_path):
    def copied(kind):
        return shutil.copytree(saved[kind], tmp_path / kind)

    return copied
