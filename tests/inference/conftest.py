"""Models that the tests of this folder share."""

import pytest

from tests.inference.models import make_model


@pytest.fixture(scope="session")
def model_path(tmp_path_factory):
    return make_model(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture(scope="session")
def model(model_path):
    from esm1nv_jax import load

    return load(model_path)


@pytest.fixture
def small_parts(monkeypatch):
    from esm1nv_jax.inference import fasta_job

    monkeypatch.setattr(fasta_job, "PART_RESIDUES", 400)
    monkeypatch.setattr(fasta_job, "PART_BATCHES", 0)
