"""`esm1nv doctor` on folders that were really damaged."""

import os
import shutil
import tempfile
from pathlib import Path

import numpy as np
import pytest

from esm1nv_jax.checkpoints import model_folder, step_folder
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
    assert step_folder.main([str(run)]) == 0
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
    assert step_folder.main([str(run)]) == step_folder.EXIT_DAMAGED
    lines = capsys.readouterr().out.splitlines()
    assert (
        lines[1] == "checkpoints/3  DAMAGED: data_state/data_state.json has 1 bytes, 2 were written"
    )
    assert lines[2].startswith("checkpoints/2  leftover")
    assert lines[-1] == "1 damaged; a start of the run goes on from checkpoints/1"
    assert sorted(path.stat().st_mtime_ns for path in run.rglob("*")) == before


def test_leftovers_are_told_from_foreign_files(run, capsys):
    for name in ("checkpoints/4.orbax-checkpoint-tmp", "checkpoints/5.damaged", "best/6.earlier"):
        (run / name).mkdir()
    for name in (".DS_Store", "._4.orbax-checkpoint-tmp", ".nfs0001", "notes.txt"):
        (run / "checkpoints" / name).write_text("x")
    assert step_folder.main([str(run)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[3:5] == [
        "checkpoints/4.orbax-checkpoint-tmp  leftover, may be removed: a save was cut short",
        "checkpoints/5.damaged               leftover, may be removed: set aside as damaged",
    ]
    assert lines[6].endswith("leftover, may be removed: of a start that left no checkpoint")
    assert len(lines) == 8 and lines[-1] == "all 4 whole"


@pytest.fixture
def run_of_another(run):
    """A run whose files this process may read only where they say so, even if it is root."""
    root = os.geteuid() == 0
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o755)
        shutil.copytree(run, f"{folder}/run")
        os.chmod(f"{folder}/run", 0o755)
        step_folder.main([f"{folder}/run"])  # imports what it needs, as root
        yield Path(folder) / "run", lambda: os.seteuid(65534) if root else None
        if root:
            os.seteuid(0)
        for path in ("checkpoints", "checkpoints/2", "checkpoints/2/metadata"):
            os.chmod(f"{folder}/run/{path}", 0o755)


@pytest.mark.parametrize(
    ("path", "line"),
    [
        ("checkpoints/2", "DAMAGED: checksums.json cannot be read: Permission denied"),
        ("checkpoints/2/checksums.json", "DAMAGED: checksums.json cannot be read: Permission"),
        ("checkpoints/2/metadata", "metadata/metadata.json cannot be read: Permission denied"),
        ("checkpoints", ""),
    ],
)
def test_what_may_not_be_read(run_of_another, capsys, path, line):
    run, drop_rights = run_of_another
    (run / path).chmod(0)
    drop_rights()
    if not line:
        with pytest.raises(UserError, match="checkpoints cannot be read: Permission denied"):
            step_folder.main([str(run)])
        return
    capsys.readouterr()
    assert step_folder.main([str(run)]) == step_folder.EXIT_DAMAGED
    assert line in capsys.readouterr().out.splitlines()[1]
    with pytest.raises(UserError, match=r"checkpoint 2 of .* is damaged: .*Permission denied"):
        model_folder.read(str(run / "checkpoints" / "2"))


def test_names_from_outside_are_printed_as_they_stand(run, capsys):
    hostile = run / "[red][/x]"
    for folder in ("checkpoints", "best"):
        shutil.copytree(run / folder, hostile / folder)
    (hostile / "checkpoints" / "4.orbax-checkpoint-tmp[bold]").mkdir()
    assert step_folder.main([str(hostile)]) == 0
    assert "checkpoints/4.orbax-checkpoint-tmp[bold]" in capsys.readouterr().out
    os.truncate(hostile / "best" / "2" / "metadata" / "metadata.json", 1)
    RunCheckpoints(hostile, checkpoint_config())
    assert "best/2 of " in (text := capsys.readouterr().err) and "[red][/x] is damaged" in text


def test_no_run(tmp_path):
    with pytest.raises(UserError, match="holds no checkpoints"):
        step_folder.main([str(tmp_path)])
