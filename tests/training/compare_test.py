"""Runs side by side, from folders as a run leaves them."""

import csv
import json
import math
import statistics
from pathlib import Path

import numpy as np
import pytest

from esm1nv_jax import cli
from esm1nv_jax.common import command, config_file
from esm1nv_jax.common.console import stdout
from esm1nv_jax.common.errors import UserError
from esm1nv_jax.training.compare import (
    differing_fields,
    not_comparable,
    over_seeds,
    plot_curves,
    read,
    report,
)


def write(folder, arg, figures, lr=2e-4):
    """`figures`: step to validation perplexity."""
    folder.mkdir(parents=True)
    config = config_file.load("configs/pretrain_small.py", arg)
    with config.unlocked():
        config.optimizer.peak_lr = lr
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
    ((row,), (other,)) = over_seeds(read(runs))
    assert other.runs == ["shipped/0"] and math.isnan(other.spread)
    assert row.seeds == [0, 1, 2] and row.step == 100
    assert row.mean == pytest.approx(statistics.fmean([17.0, 17.4, 17.1]))
    assert row.spread == pytest.approx(statistics.stdev([17.0, 17.4, 17.1]))


def test_a_rate_of_masking_that_changes_validates_at_its_last(tmp_path):
    schedule = write(tmp_path / "schedule", "seed=0", {0: 30, 100: 16.5})
    path = Path(schedule) / "config.json"
    config = json.loads(path.read_text())
    config["masking"] |= {"rate": 0.3, "final_rate": 0.15}
    path.write_text(json.dumps(config))
    fixed, shipped = (
        write(tmp_path / name, arg, {0: 30, 100: 17.0})
        for name, arg in (("fixed", "seed=0"), ("shipped", "shipped"))
    )
    ((first, second),) = over_seeds(read([schedule, fixed]))
    assert second.difference == pytest.approx(0.5) and first.runs == ["schedule"]
    text = not_comparable(read([schedule, shipped]))
    assert "masking.rate, masking.recipe differ" in text and "final_rate" not in text


def test_recipes_differ_by_so_much_with_an_error_over_seeds(runs, tmp_path, capsys, monkeypatch):
    figures = {0: 30, 100: 16.0, 150: 15.5}, {0: 30, 100: 16.6}, {0: 30, 100: 16.2}
    better = [
        write(tmp_path / f"lr/{seed}", f"seed={seed}", x, lr=1e-3) for seed, x in enumerate(figures)
    ]
    ((first, second),) = over_seeds(read([*runs[:3], *better]))
    assert first.runs[0] == "lr/0" and math.isnan(first.difference)
    a, b = [17.0, 17.4, 17.1], [16.0, 16.6, 16.2]  # at step 100, which all have
    assert second.difference == pytest.approx(np.mean(a) - np.mean(b))
    assert second.difference_se == pytest.approx(
        np.sqrt((np.var(a, ddof=1) + np.var(b, ddof=1)) / 3)
    )
    ((_, alone),) = over_seeds(read([runs[0], better[0]]))
    assert alone.difference == pytest.approx(1.0) and math.isnan(alone.difference_se)
    monkeypatch.setattr(stdout, "_width", 60)  # a narrow terminal cuts nothing off
    assert command.run(cli.dispatch, ["compare", *runs[:3], *better]) == 0
    text = capsys.readouterr().out
    assert "--against RUN" in text and "optimizer.peak_lr" in text and "…" not in text
    monkeypatch.undo()
    assert command.run(cli.dispatch, ["compare", *runs[:3], *better]) == 0
    assert "0.900 ± 0.213" in capsys.readouterr().out


def test_recipes_are_ranked_only_if_validation_asks_them_the_same(runs, tmp_path, capsys):
    rate = write(tmp_path / "higher", "seed=0", {0: 30, 100: 16.0, 200: 15.0}, lr=1e-3)
    ((best, second),) = over_seeds(read([*runs[:2], rate]))
    assert best.runs == ["higher"] and second.seeds == [0, 1]
    assert command.run(cli.dispatch, ["compare", *runs]) == 0
    assert "cannot be compared: data.max_residues, masking.rate" in capsys.readouterr().out
    for run, fingerprint in ((runs[0], "a"), (runs[1], "b")):
        (Path(run) / "data.json").write_text(json.dumps({"train": "t", "validation": fingerprint}))
    assert len(over_seeds(read(runs[:2]))) == 2


def test_what_is_untrained_is_not_compared(tmp_path):
    first = write(tmp_path / "a", "seed=0", {0: 30, 3: 25.0})
    second = write(tmp_path / "b", "seed=1", {0: 31, 4: 24.0})
    with pytest.raises(UserError, match="no step after which a and b validated, which are one rec"):
        over_seeds(read([first, second]))
    higher = write(tmp_path / "c", "seed=0", {0: 30, 4: 20.0}, lr=1e-3)
    ((best, second_best),) = over_seeds(read([first, higher]))
    assert best.runs == ["c"] and math.isnan(second_best.difference)


def test_runs_on_other_training_data_are_no_seeds_of_one_recipe(runs):
    for run, fingerprint in ((runs[0], "a"), (runs[1], "b")):
        (Path(run) / "data.json").write_text(json.dumps({"train": fingerprint, "validation": "v"}))
    (rows,) = over_seeds(read(runs[:2]))
    assert sorted(row.seeds for row in rows) == [[0], [1]]


def test_copies_of_a_seed_are_refused(runs, tmp_path):
    again = write(tmp_path / "copy", "seed=1", {0: 30, 100: 17.4})
    with pytest.raises(UserError, match=r"card/1 and .*copy are one recipe with one seed, 1"):
        over_seeds(read([*runs, again]))


def test_the_table_as_json_and_csv(runs, tmp_path):
    out = [str(tmp_path / name) for name in ("table.json", "table.csv")]
    call = ["compare", *runs[:2], "--json", out[0], "--csv", out[1]]
    assert command.run(cli.dispatch, call) == 0
    (row,) = json.loads(Path(out[0]).read_text(encoding="utf-8"))
    assert row["seeds"] == [0, 1] and row["mean"] == pytest.approx(16.25)
    with open(out[1], encoding="utf-8", newline="") as file:
        (line,) = csv.DictReader(file)
    assert line["seeds"] == "0 1" and float(line["mean"]) == pytest.approx(16.25)


def test_an_infinite_perplexity_counts_as_missing(tmp_path, capsys):
    figures = {0: 30, 100: 17.0}, {0: 30, 100: math.inf}, {0: 30, 100: math.nan}
    runs = [write(tmp_path / f"a/{seed}", f"seed={seed}", x) for seed, x in enumerate(figures)]
    runs += [write(tmp_path / "b", "seed=0", figures[0], lr=1e-3)]
    out = str(tmp_path / "page.html")
    assert command.run(cli.dispatch, ["compare", *runs, "--out", out]) == 0
    capsys.readouterr()
    ((best, last),) = over_seeds(read(runs))
    assert best.runs == ["b"] and best.cells()["mean"] == "17.000"
    cells = last.cells()
    assert [cells[x] for x in ("mean", "spread", "above the first")] == ["-", "-", "-"]


def test_only_what_differs_is_shown(runs):
    found = differing_fields(read(runs))
    assert found["seed"] == [0, 1, 2, 0] and found["masking.recipe"][3] == "shipped"
    assert found["steps"] == [1_000_000, 1_000_000, 100, 1_000_000]
    assert "optimizer.peak_lr" not in found
    assert differing_fields(read(runs[:1] * 2)) == {}


def test_the_values_of_many_runs_are_all_shown(runs, tmp_path, capsys, monkeypatch):
    def cells(paths, first, width):
        monkeypatch.setattr(stdout, "_width", width)
        assert command.run(cli.dispatch, ["compare", *paths]) == 0
        lines = capsys.readouterr().out.splitlines()
        line = next(x for x in lines if x.startswith(f"│ {first} "))
        return [cell.strip() for cell in line.split("│")[1:-1]]

    assert cells(runs, "seed", width=20) == ["seed", "0", "1", "2", "0"]  # fields are more
    many = [
        write(tmp_path / f"many-{i}", f"seed={i}", {0: 30, 100: 17.0}, lr=i / 1000)
        for i in range(30)
    ]
    assert cells(many, "many-29", width=80) == ["many-29", "0.029", "29"]


def test_the_command_draws_every_run(runs, tmp_path, capsys):
    out = tmp_path / "page.html"
    assert command.run(cli.dispatch, ["compare", *runs, "--out", str(out)]) == 0
    page = out.read_text()
    assert "mean of 3 seeds, card/0 ..." in page  # matplotlib's comment beside a text
    assert "<svg" in page and "masking.recipe" in page and "0.208" in page
    assert "card/1" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("config.json", "config.json cannot be read"),
        ("metrics.jsonl", "metrics.jsonl cannot be read"),
    ],
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
    with open(f"{runs[0]}/metrics.jsonl", "a", encoding="utf-8") as file:
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
    (rows,) = over_seeds(read(runs[:3]))
    assert sorted(row.seeds for row in rows) == [[0], [1], [2]]
    again = write(Path(runs[0]).parent / "3", "seed=3", {0: 30, 100: 17.2})
    ((row,),) = over_seeds(read([runs[0], again]))
    assert row.seeds == [0, 3]


def test_baselines_that_all_runs_share_are_lines_of_the_plot(runs):
    baselines = {"unigram": 17.98, "composition": 17.33}
    for run in runs[:2]:
        (Path(run) / "baselines.json").write_text(json.dumps(baselines))
    (axis,) = plot_curves(read(runs[:2])).axes
    lines = {line.get_label(): set(line.get_ydata()) for line in axis.lines}
    assert lines["baseline: unigram"] == {17.98} and lines["baseline: composition"] == {17.33}
    low, high = axis.get_ylim()
    assert low < 16 and high > 17.98
    (axis,) = plot_curves(read(runs[:3])).axes  # the third has none: was it asked the same?
    assert not any(str(line.get_label()).startswith("baseline") for line in axis.lines)


def test_the_page_carries_the_config(runs):
    read_runs = read(runs[:2])
    page = report(read_runs, differing_fields(read_runs), over_seeds(read_runs)).to_html()
    assert "Config of 0" in page and "<td>optimizer.peak_lr</td><td>0.0002</td>" in page
