"""`esm1nv doctor` on folders that were really damaged."""

import os

import numpy as np
import pytest

from esm1nv_jax.checkpoints import manager, verify
from esm1nv_jax.common.errors import UserError


@pytest.fixture
def run(tmp_path):
    for folder, steps in ((manager.FOLDER, (1, 2, 3)), (manager.BEST, (2,))):
        saver = manager.Checkpoints(tmp_path, 10, folder=folder)
        for step in steps:
            saver.save(step, {"a": np.arange(9.0)}, {"step": np.int32(step)}, {}, {})
        saver.close()
    return tmp_path


def test_a_whole_run(run, capsys):
    assert verify.main([str(run)]) == 0
    assert capsys.readouterr().out.splitlines() == [
        "checkpoints/1  whole",
        "checkpoints/2  whole",
        "checkpoints/3  whole",
        "best/2         whole",
        "all 4 whole",
    ]


def test_damage_and_leftovers(run, capsys):
    place = run / "checkpoints" / "3" / "place" / "metadata"
    os.truncate(place, 1)
    (run / "checkpoints" / "2" / manager.CHECKSUMS).unlink()
    before = sorted(path.stat().st_mtime_ns for path in run.rglob("*"))
    assert verify.main([str(run)]) == verify.EXIT_DAMAGED
    lines = capsys.readouterr().out.splitlines()
    assert lines[1] == "checkpoints/3  DAMAGED: place/metadata has 1 bytes, 2 were written"
    assert lines[2].startswith("checkpoints/2  leftover")
    assert lines[-1] == "1 damaged; a start of the run goes on from checkpoints/1"
    assert sorted(path.stat().st_mtime_ns for path in run.rglob("*")) == before


def test_no_run(tmp_path):
    with pytest.raises(UserError, match="holds no checkpoints"):
        verify.main([str(tmp_path)])
