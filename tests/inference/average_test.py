"""The mean of checkpoints against a plain mean of what Orbax itself reads; a test paired by protein
decides whether it is better than its members."""

import dataclasses
import json
import shutil
import tracemalloc
from pathlib import Path

import jax
import numpy as np
import pytest

from esm1nv_jax import cli
from esm1nv_jax.checkpoints import model_folder, step_folder
from esm1nv_jax.checkpoints.manager import RunCheckpoints
from esm1nv_jax.common import command
from esm1nv_jax.common.errors import UserError
from esm1nv_jax.data.source import MemorySource, open_split
from esm1nv_jax.inference.average import (
    Member,
    average,
    evaluate_models,
    paired_difference,
    select,
    verdict,
)
from esm1nv_jax.model import encoder
from esm1nv_jax.training import sharding
from tests.checkpoints.policies import checkpoint_config
from tests.model.parameters import random_parameters

CONFIG = encoder.EncoderConfig(layers=1, width=16, heads=2, ffn=32, positions=64)


def save(run, steps, config=CONFIG, devices=1, params=None, **data):
    """Checkpoints of fresh parameters, one seed a step, laid over so many devices."""
    mesh = sharding.make_mesh(jax.devices()[:devices])
    metadata = {
        "config": {"model": dataclasses.asdict(config), "data": {"path": "sample"} | data},
        "code": "test",
    }
    data_state = {"epoch": 0, "window": 0, "row": 0, "data": "fingerprint"}
    checkpoints = RunCheckpoints(run, checkpoint_config())
    for step in steps:
        value = params or random_parameters(config, step)
        value = jax.device_put(value, sharding.sharding(mesh, "state"))
        checkpoints.save(step, value, {"step": np.int32(step)}, data_state, metadata)
    checkpoints.wait()
    return str(run)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """One run saved on four devices, one on three."""
    base = tmp_path_factory.mktemp("runs")
    return save(base / "a", (1, 2, 3, 10, 20), devices=4), save(base / "b", (5, 6), devices=3)


def same(one, other):
    return all(
        np.array_equal(x, y)
        for x, y in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True)
    )


def test_it_is_the_mean_that_numpy_takes(runs):
    members = select(runs)
    found = average(members).params
    read = [model_folder.flatten(step_folder.read_params(m.run, m.step)) for m in members]
    assert len(members) == 7
    for name, value in model_folder.flatten(found).items():
        expected = np.mean([r[name].astype(np.float64) for r in read], axis=0).astype(np.float32)
        assert value.dtype == np.float32
        np.testing.assert_array_equal(value, expected, err_msg=name)


def test_sums_are_kept_in_fp64(tmp_path):
    """In fp32 the small one would be lost beside the large ones."""
    zeros = jax.tree.map(np.zeros_like, random_parameters(CONFIG))
    for step, value in ((1, 2.0**25), (2, 1.0), (3, -(2.0**25))):
        save(tmp_path, [step], params=jax.tree.map(lambda x, v=value: x + np.float32(v), zeros))
    found = average(select([str(tmp_path)])).params
    assert all(np.all(x == np.float32(1 / 3)) for x in jax.tree.leaves(found))


def test_the_order_of_arguments_cannot_matter(runs, monkeypatch):
    one = average(select(runs))
    other = average(list(reversed(select([runs[1], runs[0]]))))
    monkeypatch.chdir(Path(runs[0]).parent)
    relative = average(select(["b", "./a", "a"]))
    assert same(one.params, other.params) and same(one.params, relative.params)
    assert one.provenance == other.provenance == relative.provenance


@pytest.mark.parametrize(
    ("options", "steps"),
    [
        ({}, [1, 2, 3, 10, 20]),
        ({"last": 2}, [10, 20]),
        ({"every": 2}, [1, 3, 20]),
        ({"every": 2, "last": 2}, [3, 20]),
        ({"steps": (20, 1)}, [1, 20]),
    ],
)
def test_members_are_chosen_as_asked(runs, options, steps):
    assert [m.step for m in select([runs[0]], **options)] == steps


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"last": 47}, "5 checkpoints"),
        ({"steps": (1, 4)}, "no checkpoint 4"),
        ({"every": 3, "last": 3}, "2 checkpoints"),
        ({"last": -1}, "1 or more"),
    ],
)
def test_too_few_is_told(runs, options, said):
    with pytest.raises(UserError, match=said):
        select([runs[0]], **options)


def test_an_empty_or_absent_run_is_told(tmp_path):
    with pytest.raises(UserError, match="no finished checkpoint"):
        select([str(tmp_path)])
    with pytest.raises(UserError, match="does not exist"):
        select([str(tmp_path / "absent")])


def test_a_flipped_byte_is_found_and_named(tmp_path):
    save(tmp_path, (1, 2))
    params = tmp_path / "checkpoints/2/params"
    large = max(params.rglob("d/*"), key=lambda path: path.stat().st_size)
    content = bytearray(large.read_bytes())
    content[len(content) // 2] ^= 1
    large.write_bytes(content)
    for use in (lambda: average(select([str(tmp_path)])), lambda: model_folder.read(str(tmp_path))):
        with pytest.raises(UserError, match=r"checkpoint 2 of .* is damaged: params/"):
            use()


def test_a_member_without_its_data_state_is_named(tmp_path):
    save(tmp_path, (1, 2))
    (tmp_path / "checkpoints/2/data_state/data_state.json").unlink()
    with pytest.raises(UserError, match=r"checkpoint 2 of .* cannot be read .*leave it out"):
        average(select([str(tmp_path)]))


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--last", "0"], "--last 0 names no checkpoint"),
        (["--steps", ","], "not a list of steps"),
        (["--report", "."], "it is a folder"),
        (["--out", "/proc/none/model"], "cannot be written"),
    ],
)
def test_a_mistake_of_the_command_is_one_line(runs, tmp_path, capsys, options, said):
    argv = ["average", "--workdir", runs[0], "--out", str(tmp_path / "model"), *options]
    assert command.run(cli.dispatch, argv) == 2
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert last.startswith("error: ") and said in last
    assert not (tmp_path / "model").exists()


def test_a_checkpoint_without_checksums_is_no_member(tmp_path):
    save(tmp_path, (1, 2))
    (tmp_path / "checkpoints/2" / step_folder.CHECKSUMS).unlink()
    assert [m.step for m in select([str(tmp_path)])] == [1]


def test_a_checkpoint_is_found_by_its_run_its_step_and_as_the_best(tmp_path):
    run = save(tmp_path, (1, 2))
    shutil.copytree(tmp_path / "checkpoints/1", tmp_path / "best/1")
    paths = {"": 2, "checkpoints": 2, "checkpoints/1": 1, "best": 1, "best/1": 1}
    for path, step in paths.items():
        assert same(
            model_folder.read(f"{run}/{path}").params, step_folder.read_params(run, step)
        ), path
    (tmp_path / "checkpoints/1" / step_folder.CHECKSUMS).unlink()
    with pytest.raises(UserError, match=r"checkpoint 1 of .* was never finished"):
        model_folder.read(f"{run}/checkpoints/1")
    (tmp_path / "best/1/params/_METADATA").unlink()
    with pytest.raises(UserError, match=r"checkpoint 1 of .* is damaged: params/_METADATA is miss"):
        model_folder.read(f"{run}/best")


def test_another_architecture_is_named(runs, tmp_path):
    other = save(tmp_path / "wide", (7,), dataclasses.replace(CONFIG, norm="post"))
    with pytest.raises(UserError, match=r"checkpoint 7 of .*wide has model.norm=post"):
        average([*select(runs), Member(other, 7)])


def test_a_leaf_of_another_shape_is_named(runs, tmp_path):
    params = random_parameters(CONFIG)
    params["lm_head"]["bias"] = params["lm_head"]["bias"][:64]
    other = save(tmp_path / "short", (7,), params=params)
    with pytest.raises(UserError, match=r"checkpoint 7 .*short: parameter lm_head/bias .*\(64,\)"):
        average([*select(runs), Member(other, 7)])


@pytest.mark.integration
def test_memory_does_not_grow_with_the_number_of_members(tmp_path):
    config = dataclasses.replace(CONFIG, width=256, heads=4, ffn=1024)
    run = save(tmp_path, range(1, 13), config)
    peaks = []
    for last in (2, 2, 12):
        tracemalloc.start()
        average(select([run], last=last))
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[2] < 1.5 * peaks[1]  # all twelve in memory would be 3.5
    assert peaks[1] > 8 * encoder.parameter_count(config)  # the sums themselves were seen


def test_the_command_writes_a_model_that_knows_where_it_came_from(runs, tmp_path, capsys):
    out, report = tmp_path / "model", tmp_path / "report.html"
    argv = ["average", "--workdir", runs[0], "--last", "2", "--out", str(out)]
    options = ["--report", str(report), "--proteins", "20"]
    assert command.run(cli.dispatch, argv + options) == 0
    weights = model_folder.read(str(out))
    assert same(weights.params, average(select([runs[0]], last=2)).params)
    assert weights.provenance["steps"] == [10, 20]
    assert weights.provenance["data"] == ["fingerprint"]
    assert len({m["sha256"] for m in weights.provenance["members"]}) == 2
    assert weights.provenance["metrics"]["perplexity_mask"] > 1
    assert "<svg" in report.read_text() and "checkpoint 10 of" in report.read_text()
    assert "paired by protein" in capsys.readouterr().out
    json.loads((out / "model.json").read_text())
    assert command.run(cli.dispatch, argv) == 2
    assert "is there already" in capsys.readouterr().err


def test_members_are_asked_what_the_average_is(tmp_path):
    """Of one member: the same, where the run was trained on shorter crops than it has positions."""
    members = select([save(tmp_path / "run", (1,), max_residues=20)])
    source = open_split("sample", "test")
    proteins = list(zip(source.ids(range(9)), source.sequences(range(9)), strict=True))
    member, mean = evaluate_models(average(members), members, MemorySource(proteins))
    for name in ("positions_mask", "perplexity_mask"):
        assert member["metrics"][name] == mean["metrics"][name]
    assert paired_difference(mean, member)[0] == 0


COUNTS = np.array([12, 40, 7, 0, 25, 90, 33, 18])


def row(losses, name="average of 2", run=""):
    """A model with these mean losses of each protein."""
    proteins = {
        f"p{i}": {"positions_mask": int(n), "perplexity_mask": float(np.exp(x)) if n else np.nan}
        for i, (n, x) in enumerate(zip(COUNTS, losses, strict=True))
    }
    overall = {"perplexity_mask": float(np.exp(COUNTS @ losses / COUNTS.sum()))}
    return {"name": name, "run": run, "metrics": overall, "by_protein": proteins}


def jackknife(a, b):
    """Mean and standard error of a ratio of sums, by leaving out one protein at a time."""
    keep = COUNTS > 0
    n, d = COUNTS[keep], ((a - b) * COUNTS)[keep]
    left_out = np.array([np.delete(d, i).sum() / np.delete(n, i).sum() for i in range(len(n))])
    k = len(n)
    error = np.sqrt((k - 1) / k * ((left_out - left_out.mean()) ** 2).sum())
    return d.sum() / n.sum(), error


def test_a_difference_is_that_of_sums_over_proteins():
    rng = np.random.default_rng(0)
    a, b = rng.normal(2.5, 0.3, 8), rng.normal(2.6, 0.3, 8)
    mean, error = paired_difference(row(a), row(b))
    expected = jackknife(a, b)
    assert mean == pytest.approx(expected[0], rel=1e-9)
    assert error == pytest.approx(expected[1], rel=0.35)  # two estimates of one error, 7 proteins


HARD = np.random.default_rng(1).normal(2.5, 0.5, 8)  # proteins differ far more than models
NOISE = np.array([1, -1, 1, 1, -1, 1, -1, -1])


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (-0.02 + 0.002 * NOISE, "is better than the best member, checkpoint 2"),
        (0.02 + 0.002 * NOISE, "is worse than the best member, checkpoint 2"),
        (-0.0004 + 0.01 * NOISE, "cannot be told apart from the best member, checkpoint 2"),
        (0 * NOISE, "cannot be told apart from the best member, checkpoint 2"),
    ],
)
def test_only_what_is_larger_than_its_error_is_a_difference(change, words):
    members = [row(HARD + 0.3, "checkpoint 1", "r"), row(HARD, "checkpoint 2", "r")]
    text = verdict([*members, row(HARD + change)])
    assert words in text and "paired by protein" in text
    assert ("train longer" in text) == ("worse" in words)


def test_runs_of_other_weights_have_no_common_mean():
    members = [row(HARD, "checkpoint 1", "r"), row(HARD, "checkpoint 2", "s")]
    assert "average within each run" in verdict([*members, row(HARD + 1)])
