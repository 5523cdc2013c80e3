"""`esm1nv doctor` on folders that were really damaged."""

import os

import numpy as np
import pytest

from esm1nv_jax.checkpoints import step_folder, verify
from esm1nv_jax.checkpoints.manager import RunCheckpoints
from esm1nv_jax.common.errors import UserError
from tests.checkpoints.policies import checkpoint_config


@pytest.fixture
def run(tmp_path):
    checkpoints = RunCheckpoints(tmp_path, checkpoint_config(keep=10))
    state = ({"a": np.arange(9.0)}, {"step": np.int32(0)}, {}, {})
    for step in (1, 2, 3):
        checkpoints.save(step, *state)
    checkpoints.save_if_best(2.5, 2, *state)
    checkpoints.wait()
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
    os.truncate(run / "checkpoints" / "3" / "data_state" / "data_state.json", 1)
    (run / "checkpoints" / "2" / step_folder.CHECKSUMS).unlink()
    before = sorted(path.stat().st_mtime_ns for path in run.rglob("*"))
    assert verify.main([str(run)]) == verify.EXIT_DAMAGED
    lines = capsys.readouterr().out.splitlines()
    assert (
        lines[1] == "checkpoints/3  DAMAGED: data_state/data_state.json has 1 bytes, 2 were written"
    )
    assert lines[2].startswith("checkpoints/2  leftover")
    assert lines[-1] == "1 damaged; a start of the run goes on from checkpoints/1"
    assert sorted(path.stat().st_mtime_ns for path in run.rglob("*")) == before


def test_no_run(tmp_path):
    with pytest.raises(UserError, match="holds no checkpoints"):
        verify.main([str(tmp_path)])
