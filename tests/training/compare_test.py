"""Runs side by side, from folders as a run leaves them."""

import json
import math
import statistics
from pathlib import Path

import pytest

from esm1nv_jax import cli
from esm1nv_jax.common import arguments, config_file
from esm1nv_jax.common.errors import UserError
from esm1nv_jax.training.compare import differing_fields, over_seeds, read


def write(folder, arg, figures):
    """`figures`: step to validation perplexity."""
    folder.mkdir(parents=True)
    config = config_file.load("configs/pretrain_small.py", arg)
    (folder / "config.json").write_text(config_file.to_json(config))
    lines = [{"step": 1, "kind": "train", "perplexity_mask": 30.0}]
    lines += [{"step": s, "kind": "validation", "perplexity_mask": p} for s, p in figures.items()]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return str(folder)


@pytest.fixture
def runs(tmp_path):
    return [
        write(tmp_path / "card/0", "seed=0", {0: 30, 100: 17.0, 200: 16.0}),
        write(tmp_path / "card/1", "seed=1", {0: 30, 100: 17.4, 200: 16.5}),
        write(tmp_path / "card/2", "seed=2,steps=100", {0: 30, 100: 17.1}),
        write(tmp_path / "shipped/0", "shipped", {0: 30, 100: 16.0}),
    ]


def test_seeds_of_a_recipe_are_one_row_at_the_last_step_they_share(runs):
    first, second = over_seeds(read(runs))
    assert first["runs"] == ["shipped/0"] and math.isnan(first["spread"])
    assert second["seeds"] == [0, 1, 2] and second["step"] == 100
    assert second["mean"] == pytest.approx(statistics.fmean([17.0, 17.4, 17.1]))
    assert second["spread"] == pytest.approx(statistics.stdev([17.0, 17.4, 17.1]))


def test_only_what_differs_is_shown(runs):
    found = differing_fields(read(runs))
    assert found["seed"] == [0, 1, 2, 0] and found["masking.recipe"][3] == "shipped"
    assert found["steps"] == [1_000_000, 1_000_000, 100, 1_000_000]
    assert "optimizer.peak_lr" not in found
    assert differing_fields(read(runs[:1] * 2)) == {}


def test_the_command_draws_every_run(runs, tmp_path, capsys):
    out = tmp_path / "page.html"
    assert arguments.run(cli.dispatch, ["compare", *runs, "--out", str(out)]) == 0
    page = out.read_text()
    assert "<svg" in page and "masking.recipe" in page and "0.208" in page
    assert "card/1" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "said"),
    [("config.json", "config.json is not there"), ("metrics.jsonl", "metrics.jsonl is not there")],
)
def test_a_partial_run_is_one_line(runs, tmp_path, name, said):
    (tmp_path / "card/1" / name).unlink()
    with pytest.raises(UserError, match=said):
        read(runs)


def test_a_run_without_validation_is_one_line(tmp_path):
    run = write(tmp_path / "new", "", {})
    with pytest.raises(UserError, match="no validation metrics yet"):
        read([run])


def test_a_run_that_was_cut_short_while_it_wrote_is_compared_by_its_whole_lines(runs):
    with open(f"{runs[0]}/metrics.jsonl", "a") as file:
        file.write('{"step": 300, "kind": "valid')
    assert max(x["step"] for x in read(runs[:1])[0].validation) == 200


def test_fields_that_do_not_change_what_is_learned_do_not_split_a_recipe(runs):
    """Seeds of a recipe may be computed, logged and launched in other ways."""
    same = {"profile": "3-4", "cluster": {"stall_timeout": 9}, "compute": {"remat": "block"}}
    other = {"skip_nonfinite": 3}, {"init_from": "elsewhere"}
    for run, change in zip(runs, (same, *other), strict=False):
        config = json.loads((Path(run) / "config.json").read_text())
        for name, value in change.items():
            config[name] = config[name] | value if isinstance(value, dict) else value
        (Path(run) / "config.json").write_text(json.dumps(config))
    assert sorted(row["seeds"] for row in over_seeds(read(runs[:3]))) == [[0], [1], [2]]
    again = write(Path(runs[0]).parent / "3", "seed=3", {0: 30, 100: 17.2})
    assert sorted(row["seeds"] for row in over_seeds(read([runs[0], again]))) == [[0, 3]]
