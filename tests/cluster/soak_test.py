"""The soak in short; `python tests/soak.py` is the long one."""

import pytest

from tests import soak


@pytest.mark.integration
def test_two_kills(tmp_path, monkeypatch):
    """One while a checkpoint is written, one in the next start."""
    monkeypatch.setattr(soak, "MOMENTS", ("save", "restore"))
    assert soak.soak(tmp_path, kills=2, processes=2, seed=1) == {"save": 1, "restore": 1}


@pytest.mark.slow
def test_eight_kills_at_any_moment(tmp_path):
    assert sum(soak.soak(tmp_path, kills=8, processes=2, seed=2).values()) == 8
