"""`esm1nv compare` of a folder: recipes against a baseline, paired by seed."""

import json
import math
from pathlib import Path

import numpy as np
import pytest

from esm1nv_jax import cli
from esm1nv_jax.common import command
from esm1nv_jax.common.errors import UserError
from esm1nv_jax.training.sweep_report import read_sweep, runs_in
from tests.training import compare_finetuned_test as finetuned
from tests.training.compare_test import write

LOSSES = {  # by seed, at the same masks
    "baseline": (2.80, 2.85, 2.90),
    "better": (2.75, 2.81, 2.85),  # less by 0.05, 0.04, 0.05
    "equal": (2.82, 2.84, 2.89),
}


def make(folder, losses=LOSSES, evaluated=True):
    lrs = dict(zip(losses, (2e-4, 1e-3, 5e-4, 7e-4), strict=False))
    for name, values in losses.items():
        for seed, loss in enumerate(values):
            figures = {0: 30.0, 100: math.exp(loss + 0.1), 200: math.exp(loss)}
            arg = f"seed={seed},steps=200"
            run = Path(write(folder / f"{name}-{seed}", arg, figures, lr=lrs[name]))
            train = {"kind": "train", "tokens_per_second": 50.0, "seconds_per_step": 2.0}
            lines = [{"step": step, "flops_per_step": 1e6} | train for step in (50, 200)]
            with open(run / "metrics.jsonl", "w", encoding="utf-8") as file:
                validation = [
                    {"step": s, "kind": "validation", "perplexity_mask": x}
                    for s, x in figures.items()
                ]
                file.writelines(json.dumps(line) + "\n" for line in [*lines, *validation])
            if evaluated:
                overall = {"perplexity_mask": math.exp(loss), "positions_mask": 1000}
                asked = {"data": "t:test", "masking": "card", "seed": 0, "max_residues": 510}
                (run / "evaluation.json").write_text(json.dumps(asked | {"overall": overall}))
    return folder


@pytest.mark.parametrize("evaluated", [True, False])
def test_differences_are_paired_by_seed_and_judged_by_their_interval(tmp_path, evaluated):
    sweep = read_sweep(runs_in(str(make(tmp_path / "s", evaluated=evaluated))))
    rows = {row.name: row for row in sweep.rows}
    assert [row.name for row in sweep.rows] == ["baseline", "better", "equal"]
    for name in ("better", "equal"):
        d = np.subtract(LOSSES[name], LOSSES["baseline"])
        error = d.std(ddof=1) / np.sqrt(3)
        assert rows[name].difference == pytest.approx(d.mean())
        assert rows[name].difference_se == pytest.approx(error)
        # Student's t of two degrees of freedom, 97.5 %, from a printed table.
        assert rows[name].half_width == pytest.approx(4.302653 * error, rel=1e-6)
    assert rows["better"].exceeds_noise is True and rows["equal"].exceeds_noise is False
    assert rows["baseline"].exceeds_noise is None
    # The spread over seeds, 0.05, would have hidden a difference of 0.047.
    assert rows["better"].record()["loss_se"] == pytest.approx(
        np.std(LOSSES["better"], ddof=1) / 3**0.5
    )
    assert (rows["better"].tokens, rows["better"].flops) == (20_000.0, 2e8)
    assert rows["better"].seconds == 400.0


def test_only_what_was_asked_alike_is_compared(tmp_path):
    folder = make(tmp_path / "s")
    file = folder / "better-1" / "evaluation.json"
    other = json.loads(file.read_text()) | {"masking": "shipped"}
    file.write_text(json.dumps(other))
    rows = {row.name: row for row in read_sweep(runs_in(str(folder))).rows}
    assert rows["better"].difference == pytest.approx(-0.05)  # of seeds 0 and 2
    file.write_text("{}")
    with pytest.raises(UserError, match=r"better-1/evaluation\.json cannot be read"):
        read_sweep(runs_in(str(folder)))


def test_what_is_not_finished_is_named_and_another_baseline_is_taken(tmp_path, capsys):
    folder = make(tmp_path / "s")
    (folder / "equal-2" / "evaluation.json").unlink()
    (folder / "equal-2.log").write_text("")
    assert command.run(cli.dispatch, ["compare", str(folder), "--baseline", "equal"]) == 0
    shown = capsys.readouterr()
    assert "left out: equal-2 (not evaluated)" in shown.err
    assert "1,000 <mask> positions of t:test" in shown.out
    assert command.run(cli.dispatch, ["compare", str(folder), "--baseline", "none"]) == 2
    assert "--baseline names another: baseline, better, equal" in capsys.readouterr().err


def edit_lines(run, edit):
    path = run / "metrics.jsonl"
    lines = [edit(json.loads(line)) for line in path.read_text().splitlines()]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines if line))


def test_a_run_that_diverged_is_shown_and_not_judged(tmp_path, capsys):
    def diverge(line):
        last = line["kind"] == "validation" and line["step"] == 200
        return line | {"perplexity_mask": math.nan} if last else line

    folder = make(tmp_path / "s", evaluated=False)
    edit_lines(folder / "better-1", diverge)
    sweep = read_sweep(runs_in(str(folder)))
    assert [row.name for row in sweep.rows] == ["baseline", "equal", "better"]
    assert math.isnan(sweep.rows[2].difference) and sweep.rows[2].exceeds_noise is None
    page = str(tmp_path / "page.html")
    assert command.run(cli.dispatch, ["compare", str(folder), "--out", page]) == 0
    capsys.readouterr()


def test_an_evaluation_of_a_run_that_diverged_has_no_perplexity(tmp_path):
    folder = make(tmp_path / "s")
    file = folder / "better-1" / "evaluation.json"
    results = json.loads(file.read_text())
    results["overall"]["perplexity_mask"] = None  # as `evaluate` writes NaN
    file.write_text(json.dumps(results))
    sweep = read_sweep(runs_in(str(folder)))
    assert [row.name for row in sweep.rows] == ["baseline", "equal", "better"]
    assert sweep.rows[2].losses[0] == pytest.approx(2.75) and math.isnan(sweep.rows[2].losses[1])
    assert math.isnan(sweep.rows[2].difference)


def edit_config(run, **changes):
    path = run / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_a_fork_costs_the_steps_that_it_took_itself(tmp_path):
    folder = make(tmp_path / "s", {"baseline": (2.8,), "fork": (2.7,)}, evaluated=False)
    edit_config(folder / "fork-0", fork_from="trunk")
    edit_lines(folder / "fork-0", lambda line: line if line["step"] >= 100 else None)
    base, fork = read_sweep(runs_in(str(folder))).rows
    assert (base.tokens, base.flops, base.seconds) == (20_000.0, 2e8, 400.0)
    assert (fork.tokens, fork.flops, fork.seconds) == (10_000.0, 1e8, 200.0)  # of steps 101 to 200


@pytest.mark.parametrize("evaluated", [True, False])
def test_seeds_of_a_recipe_are_one_recipe(tmp_path, evaluated):
    """A list that was edited while half of its runs were done leaves both under one name."""
    folder = make(tmp_path / "s", evaluated=evaluated)
    edit_config(folder / "better-1", fork_from="trunk-1", init_from="m")  # each may have its own
    assert read_sweep(runs_in(str(folder))).rows[1].difference == pytest.approx(-0.14 / 3)
    edit_config(folder / "better-2", steps=100)
    if evaluated:  # at another end than better-0
        with pytest.raises(UserError, match=r"better-0 and better-2 .* differ in steps; move"):
            read_sweep(runs_in(str(folder)))
    else:
        assert read_sweep(runs_in(str(folder))).rows[1].losses.keys() == {0, 1, 2}
    edit_config(folder / "better-2", steps=200, skip_nonfinite=1)
    with pytest.raises(UserError, match=r"better-0 and better-2 .* differ in skip_nonfinite; move"):
        read_sweep(runs_in(str(folder)))


def test_fine_tuned_runs_are_compared_by_name(tmp_path):
    tuned = Path(finetuned.write(tmp_path / "s" / "full-0", 0, {0: 0.1, 10: 0.5}))
    with pytest.raises(UserError, match=r"s are fine-tuned.*: esm1nv compare .*/s/\*-\*/"):
        read_sweep(runs_in(str(tmp_path / "s")))
    folder = make(tmp_path / "pretrained", evaluated=False)
    tuned.rename(folder / "full-0")
    assert read_sweep(runs_in(str(folder))).left_out == ["full-0 (fine-tuned)"]


def test_a_run_under_way_is_left_out(tmp_path):
    """It would have all runs compared at its last step."""
    folder = make(tmp_path / "s", evaluated=False)
    edit_lines(folder / "better-1", lambda line: line if line["step"] <= 100 else None)
    sweep = read_sweep(runs_in(str(folder)))
    assert sweep.question == "validation after 200 steps" and sweep.left_out == [
        "better-1 (not finished)"
    ]


def test_a_run_of_some_minutes_is_finished_once_it_has_baselines(tmp_path):
    folder = make(tmp_path / "s", evaluated=False)
    for run in folder.iterdir():  # ended before their last step
        edit_config(run, minutes=5.0, steps=10_000)
        (run / "baselines.json").write_text('{"unigram": 18.0, "composition": 17.4}')
    assert read_sweep(runs_in(str(folder))).left_out == []
    (folder / "better-1" / "baselines.json").unlink()
    edit_lines(folder / "better-1", lambda line: line if line["step"] <= 100 else None)
    sweep = read_sweep(runs_in(str(folder)))
    assert sweep.question == "validation after 200 steps"
    assert sweep.left_out == ["better-1 (not finished)"]


def test_two_runs_of_one_seed_are_refused(tmp_path):
    folder = make(tmp_path / "s")
    edit_config(folder / "better-1", seed=0)
    with pytest.raises(UserError, match="better-0 and better-1 are one recipe with one seed, 0"):
        read_sweep(runs_in(str(folder)))


def test_one_page_and_the_table_as_json_and_csv(tmp_path, capsys):
    folder = make(tmp_path / "s")
    out = [str(tmp_path / name) for name in ("page.html", "table.json", "table.csv")]
    call = ["compare", str(folder), "--out", out[0], "--json", out[1], "--csv", out[2]]
    assert command.run(cli.dispatch, call) == 0
    assert "-0.0467 ± 0.0033" in capsys.readouterr().out
    page = Path(out[0]).read_text(encoding="utf-8")
    assert "<svg" in page and "optimizer.peak_lr=0.001" in page and "<td>yes</td>" in page
    rows = {row["name"]: row for row in json.loads(Path(out[1]).read_text(encoding="utf-8"))}
    assert rows["better"]["exceeds_noise"] is True and rows["baseline"]["difference"] is None
    assert "better,2.75 2.81 2.85" in Path(out[2]).read_text(encoding="utf-8")


def test_a_baseline_is_for_a_folder(tmp_path):
    run = write(tmp_path / "run", "", {0: 30, 100: 17.0})
    assert command.run(cli.dispatch, ["compare", run, "--baseline", "x"]) == 2
