"""Checkpoints: all or nothing, verified, and retired by what is whole."""

import json
import logging
import os
import subprocess

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest

from esm1nv_jax.checkpoints import manager, step_folder
from esm1nv_jax.checkpoints.manager import RunCheckpoints
from esm1nv_jax.common.errors import UserError
from tests.checkpoints.policies import checkpoint_config

PARAMS = {"blocks": {"0": {"kernel": np.arange(600, dtype=np.float32).reshape(20, 30)}}}
OPTIMIZER = {"step": np.int32(7), "mu": np.full(5, -0.0, np.float32)}


def save(run, *steps, keep=100, keep_every=0):
    config = checkpoint_config(keep=keep, keep_every=keep_every)
    checkpoints = RunCheckpoints(run, config)
    for step in steps:
        checkpoints.save(step, PARAMS, OPTIMIZER, {"row": step}, {"config": {"seed": 1}})
    checkpoints.wait()
    return checkpoints


def restore(checkpoints, step, params=PARAMS):
    layout = jax.sharding.SingleDeviceSharding(jax.devices()[3])
    shapes = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=layout), (params, OPTIMIZER)
    )
    return manager.restore_from(checkpoints.workdir, step, step_folder.FOLDER, *shapes)


def data_file(run, step):
    """The largest file of the parameters."""
    files = [p for p in (run / "checkpoints" / str(step) / "params").rglob("*") if p.is_file()]
    return max(files, key=lambda path: path.stat().st_size)


def test_what_is_saved_comes_back_bit_for_bit_where_it_is_wanted(tmp_path):
    checkpoints = save(tmp_path, 3)
    params, optimizer, data_state = restore(checkpoints, 3)
    kernel = params["blocks"]["0"]["kernel"]
    assert kernel.devices() == {jax.devices()[3]}
    assert np.asarray(kernel).tobytes() == PARAMS["blocks"]["0"]["kernel"].tobytes()
    assert np.asarray(optimizer["mu"]).tobytes() == OPTIMIZER["mu"].tobytes()
    assert (int(optimizer["step"]), data_state) == (7, {"row": 3})
    read = step_folder.read_params(tmp_path, 3)
    np.testing.assert_array_equal(read["blocks"]["0"]["kernel"], PARAMS["blocks"]["0"]["kernel"])
    assert step_folder.read_metadata(tmp_path, 3) == {"config": {"seed": 1}}
    assert step_folder.read_data_state(tmp_path, 3) == {"row": 3}


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"blocks": {"0": {"weight": np.zeros((20, 30), np.float32)}}}, "blocks.0.kernel"),
        ({"blocks": {"0": {"kernel": np.zeros((20, 31), np.float32)}}}, r"\(20, 31\)"),
    ],
)
def test_a_checkpoint_of_other_arrays_is_refused_in_one_line(tmp_path, params, message):
    checkpoints = save(tmp_path, 3)
    with pytest.raises(UserError, match=rf"checkpoint 3 of .* another version.*{message}") as error:
        restore(checkpoints, 3, params)
    assert "\n" not in str(error.value)


def test_orbax_alone_reads_a_checkpoint(tmp_path):
    """What a user without this package does; a witness for `read_params`, too."""
    save(tmp_path, 3)
    with ocp.StandardCheckpointer() as reader:
        read = reader.restore(tmp_path / "checkpoints" / "3" / "params")
    np.testing.assert_array_equal(read["blocks"]["0"]["kernel"], PARAMS["blocks"]["0"]["kernel"])


def test_a_run_may_be_named_by_a_relative_path(tmp_path, monkeypatch):
    (tmp_path / "run").mkdir()
    save(tmp_path / "run", 3)
    monkeypatch.chdir(tmp_path)
    read = step_folder.read_params("run", 3)
    np.testing.assert_array_equal(read["blocks"]["0"]["kernel"], PARAMS["blocks"]["0"]["kernel"])


def test_a_save_may_be_followed_by_donation(tmp_path):
    """What is written is a copy made before `save` returns, not a view of the device's buffer."""
    x = jax.numpy.arange(1 << 18, dtype="float32")
    update = jax.jit(lambda x: x * 0 - 1, donate_argnums=0)
    checkpoints = RunCheckpoints(tmp_path, checkpoint_config())
    checkpoints.save(1, {"x": x}, OPTIMIZER, {}, {})
    update(x).block_until_ready()
    checkpoints.wait()
    np.testing.assert_array_equal(
        step_folder.read_params(tmp_path, 1)["x"], np.arange(1 << 18, dtype=np.float32)
    )


def test_checksums_are_those_of_sha256sum(tmp_path):
    """Of every file in the folder, apart from that of the checksums."""
    save(tmp_path, 1)
    folder = tmp_path / "checkpoints" / "1"
    records = json.loads((folder / step_folder.CHECKSUMS).read_text())["sha256"]
    listed = subprocess.run(
        ["sha256sum", *records], cwd=folder, capture_output=True, text=True, check=True
    ).stdout.split("\n")
    assert dict(reversed(line.split()) for line in listed if line) == {
        name: record["digest"] for name, record in records.items()
    }
    files = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
    assert files == {*records, step_folder.CHECKSUMS}
    assert step_folder.verify(tmp_path, 1) == []


def flip(file):
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


DAMAGE = {
    "other bytes": flip,
    "were written": lambda file: os.truncate(file, file.stat().st_size - 1),
    "is missing": lambda file: file.unlink(),
}


@pytest.mark.parametrize("words", DAMAGE)
def test_a_damaged_file_is_named_and_the_run_falls_back(tmp_path, capsys, words):
    save(tmp_path, 1, 2, 3)
    file = data_file(tmp_path, 3)
    DAMAGE[words](file)
    (wrong,) = step_folder.verify(tmp_path, 3)
    assert words in wrong and file.name in wrong
    with pytest.raises(UserError, match="doctor"):
        RunCheckpoints(tmp_path, checkpoint_config(), strict=True).latest_valid_step()
    assert RunCheckpoints(tmp_path, checkpoint_config()).latest_valid_step() == 2
    told = capsys.readouterr().err
    assert told.count("is damaged") == 1 and words in told and "checkpoint 3" in told
    for step in (1, 2):
        DAMAGE[words](data_file(tmp_path, step))
    with pytest.raises(UserError, match="all 2 checkpoints"):
        RunCheckpoints(tmp_path, checkpoint_config()).latest_valid_step()
    assert step_folder.steps(tmp_path) == [1, 2]  # nothing was set aside


def test_a_damaged_step_is_set_aside_and_made_anew(tmp_path):
    checkpoints = save(tmp_path, 1, 2)
    for _ in range(2):  # the second takes the place of the first
        flip(data_file(tmp_path, 2))
        assert checkpoints.latest_valid_step() == 1
        assert sorted(os.listdir(tmp_path / "checkpoints")) == ["1", "2.damaged"]
        save(tmp_path, 2)
    assert step_folder.verify(tmp_path, 2) == []


def test_broken_checksums_are_damage(tmp_path):
    save(tmp_path, 1)
    (tmp_path / "checkpoints" / "1" / step_folder.CHECKSUMS).write_text("{")
    assert "cannot be read" in step_folder.verify(tmp_path, 1)[0]


FOREIGN = (".nfs0001", "params/.DS_Store", "params/d/._x", "params/stray")


def test_foreign_files_are_no_damage(tmp_path):
    """Finder and NFS put files anywhere: they may come after a save, or be gone after it."""
    save(tmp_path, 1)
    for name in FOREIGN:
        (tmp_path / "checkpoints" / "1" / name).write_text("x")
    (tmp_path / "checkpoints" / ".DS_Store").write_text("x")
    assert step_folder.verify(tmp_path, 1) == []
    folder = tmp_path / "checkpoints" / "1"
    (folder / step_folder.CHECKSUMS).unlink()
    step_folder.write_checksums(folder)  # as if they had been there during the save
    for name in FOREIGN[:-1]:
        (folder / name).unlink()
    assert step_folder.verify(tmp_path, 1) == []
    assert save(tmp_path, 2).latest_valid_step() == 2
    assert step_folder.steps(tmp_path) == [1, 2]


def test_what_cannot_be_read_is_named(tmp_path):
    """Links in a circle, a folder for a file and a file for a folder: they stop root, too."""
    save(tmp_path, 1, 2, 3)
    checkpoints = tmp_path / "checkpoints"
    metadata = checkpoints / "3" / "metadata" / "metadata.json"
    metadata.unlink()
    metadata.symlink_to(metadata)
    assert step_folder.verify(tmp_path, 3) == [
        "metadata/metadata.json cannot be read: Too many levels of symbolic links"
    ]
    (checkpoints / "2" / step_folder.CHECKSUMS).unlink()
    (checkpoints / "2" / step_folder.CHECKSUMS).mkdir()
    assert step_folder.verify(tmp_path, 2) == ["checksums.json cannot be read: Is a directory"]
    assert RunCheckpoints(tmp_path, checkpoint_config()).latest_valid_step() == 1
    checkpoints.rename(tmp_path / "elsewhere")
    checkpoints.write_text("a file")
    with pytest.raises(UserError, match=r"checkpoints cannot be read: Not a directory"):
        step_folder.steps(tmp_path)


def test_a_step_without_checksums_does_not_exist(tmp_path):
    save(tmp_path, 1, 2, 3)
    (tmp_path / "checkpoints" / "3" / step_folder.CHECKSUMS).unlink()
    (tmp_path / "checkpoints" / "4.orbax-checkpoint-tmp").mkdir()
    assert step_folder.steps(tmp_path) == [1, 2]
    assert "never finished" in step_folder.verify(tmp_path, 3)[0]
    save(tmp_path, 3)  # may be saved again, and what was left over is gone
    assert step_folder.verify(tmp_path, 3) == []
    assert sorted(os.listdir(tmp_path / "checkpoints")) == ["1", "2", "3"]


def test_retention_counts_whole_steps_only(tmp_path):
    save(tmp_path, *range(1, 6), keep=2)
    assert step_folder.steps(tmp_path) == [4, 5]
    (tmp_path / "checkpoints" / "5" / step_folder.CHECKSUMS).unlink()
    save(tmp_path, 6, keep=2)
    assert step_folder.steps(tmp_path) == [4, 6]  # 5 never was, so 4 is the second newest


def test_every_mth_stays_and_the_best_lives_apart(tmp_path):
    checkpoints = save(tmp_path, 1)
    checkpoints.save_if_best(2.5, 2, PARAMS, OPTIMIZER, {}, {})
    checkpoints.wait()
    save(tmp_path, *range(2, 8), keep=1, keep_every=3)
    assert step_folder.steps(tmp_path) == [3, 6, 7]
    assert step_folder.verify(tmp_path, 2, step_folder.BEST) == []


@pytest.mark.parametrize("moment", ["write", "delete"])
def test_old_steps_stay_until_the_new_one_counts(tmp_path, monkeypatch, moment):
    """A run that keeps one checkpoint is killed before the new one has its checksums, or while the
    old one is deleted: at no moment is there none, nor one that only looks whole."""
    checkpoints = save(tmp_path, 1, keep=1)

    def die(*_):
        raise SystemExit

    if moment == "write":
        monkeypatch.setattr(step_folder, "write_checksums", die)
    else:
        monkeypatch.setattr(ocp.path.deleter.PathDeleter, "delete", die)
    checkpoints.save(2, PARAMS, OPTIMIZER, {}, {})
    with pytest.raises(SystemExit):
        checkpoints.wait()
    assert sorted(os.listdir(tmp_path / "checkpoints")) == ["1", "2"]
    assert step_folder.steps(tmp_path) == [1 if moment == "write" else 2]
    monkeypatch.undo()
    save(tmp_path, 3, keep=1)
    assert sorted(os.listdir(tmp_path / "checkpoints")) == ["3"]


def test_a_failed_save_is_told_and_leaves_the_older_steps(tmp_path):
    """A file where the folder of the step should be: the plainest way to fail for any user."""
    checkpoints = save(tmp_path, 1)
    (tmp_path / "checkpoints" / "2").write_text("in the way")
    checkpoints.save(2, PARAMS, OPTIMIZER, {}, {})
    with pytest.raises(manager.SaveError, match="checkpoint 2 could not be written"):
        checkpoints.wait()
    checkpoints.wait()  # told once
    assert step_folder.verify(tmp_path, 1) == []
    assert step_folder.steps(tmp_path) == [1]


def test_preemption_is_asked_for_by_the_loop_alone(tmp_path, monkeypatch):
    """A question with a step that has passed would move the step at which all processes stop."""
    asked = []
    monkeypatch.setattr(
        "jax.experimental.multihost_utils.reached_preemption_sync_point", asked.append
    )
    checkpoints = save(tmp_path, 1)
    checkpoints.should_save(2)
    assert asked == []


def test_the_log_of_others_is_heard_and_that_of_orbax_is_not(tmp_path):
    """Orbax writes through absl's logger, which is not ours alone."""
    heard = []
    handler = logging.Handler()
    handler.emit = lambda record: heard.append(record.getMessage())
    logger = logging.getLogger("absl")
    before = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        save(tmp_path, 1)
        logger.warning("mind the step")
    finally:
        logger.setLevel(before)
        logger.removeHandler(handler)
    assert heard == ["mind the step"]
