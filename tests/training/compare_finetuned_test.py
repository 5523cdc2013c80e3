"""Fine-tuned runs side by side, from folders as a run leaves them."""

import csv
import json
import math
import statistics
from pathlib import Path

import pytest

from esm1nv_jax import cli
from esm1nv_jax.common import command, config_file
from esm1nv_jax.common.errors import UserError
from esm1nv_jax.training.compare import over_seeds
from esm1nv_jax.training.recorded_run import read


def write(folder, seed, values, *, method="full", task="residue_classification", **changes):
    """A run with these values of the metric, by step; `tested` is the accuracy of its test."""
    metric, tested = changes.get("metric", "auto"), changes.get("tested")
    folder.mkdir(parents=True)
    config = config_file.load("configs/pretrain_small.py", f"seed={seed}").to_dict()
    config["finetune"] = {"task": task, "method": method, "metric": metric, "patience": seed}
    config["data"]["max_residues"] = changes.get("max_residues", 1022)
    (folder / "config.json").write_text(json.dumps(config))
    prints = {"train": "t", "validation": changes.get("validation", "v"), "test": f"{seed}"}
    (folder / "data.json").write_text(json.dumps(prints))
    names = {"auto": "spearman" if "regression" in task else "accuracy"}
    lines = [
        {"step": step, "kind": "validation", "loss": 9 - step / 100, names.get(metric, metric): x}
        for step, x in values.items()
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    if tested is not None:
        metrics = {"loss": 1.0, "accuracy": tested, "mcc": None}
        test = {"metrics": metrics, "test_set": changes.get("test_set", "same")}
        (folder / "test.json").write_text(json.dumps(test))
    return str(folder)


@pytest.fixture
def runs(tmp_path):
    """Two seeds of `full`, stopped at different steps, and three of `lora`."""
    return [
        write(tmp_path / "full/0", 0, {0: 0.9, 10: 0.50, 20: 0.60, 30: 0.55}, tested=0.5),
        write(tmp_path / "full/1", 1, {0: 0.1, 10: 0.70, 20: 0.65}, tested=0.6),
        *(
            write(tmp_path / f"lora/{i}", i, {0: 0.1, 10: x}, method="lora=8", tested=0.7 + i / 10)
            for i, x in enumerate((0.80, 0.84, 0.76))
        ),
    ]


def test_the_best_validation_of_each_run_counts_and_the_highest_recipe_is_first(runs):
    ((lora, full),) = over_seeds(read(runs))
    assert lora.runs == ["lora/0", "lora/1", "lora/2"] and full.seeds == [0, 1]
    assert full.step is None and full.mean == pytest.approx(0.65)  # step 0 is not trained
    spread = statistics.stdev((0.6, 0.7))
    assert (full.spread, full.se) == pytest.approx((spread, spread / math.sqrt(2)))
    assert full.difference == pytest.approx(0.65 - 0.8)
    assert full.difference_se == pytest.approx(math.hypot(0.04 / math.sqrt(3), full.se))
    assert full.test["accuracy"] == pytest.approx((0.55, 0.05)) and math.isnan(full.test["mcc"][0])
    assert lora.test["accuracy"] == pytest.approx((0.8, 0.1 / math.sqrt(3)))


def test_of_a_metric_where_lower_is_better_the_lowest(tmp_path):
    folders = [
        write(tmp_path / name, 0, x, method=name, task="protein_regression", metric="mse")
        for name, x in (("full", {10: 3.0, 20: 2.0}), ("head", {10: 1.0, 20: 4.0}))
    ]
    ((first, second),) = over_seeds(read(folders))
    assert (first.runs, first.mean, second.mean) == (["head"], 1.0, 2.0)


def test_the_command_writes_tables_and_a_page(runs, tmp_path, capsys):
    out = [str(tmp_path / name) for name in ("page.html", "table.json", "table.csv")]
    call = ["compare", *runs, "--out", out[0], "--json", out[1], "--csv", out[2]]
    assert command.run(cli.dispatch, call) == 0
    printed, page = capsys.readouterr().out, Path(out[0]).read_text(encoding="utf-8")
    assert "Validation accuracy, by recipe" in printed and "-0.150 ±" in printed  # cells wrap
    assert "0.650 ± 0.050" in page and "0.550 ± 0.050" in page and "validation accuracy" in page
    assert "perplexity" not in printed + page
    first, second = json.loads(Path(out[1]).read_text(encoding="utf-8"))
    assert first["test_accuracy"] == pytest.approx(0.8) and second["step"] is None
    with open(out[2], encoding="utf-8", newline="") as file:
        assert [float(row["test_accuracy_se"]) for row in csv.DictReader(file)][1] == pytest.approx(
            0.05
        )


def test_metrics_of_a_test_that_a_seed_lacks_are_left_out(runs):
    (Path(runs[1]) / "test.json").unlink()
    ((lora, full),) = over_seeds(read(runs))
    assert lora.test and not full.test


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"task": "protein_classification"}, "finetune.task is residue_classification in the"),
        ({"metric": "macro_f1"}, "metric is accuracy in the first, macro_f1 in the second"),
        ({"test_set": "other"}, "test_set is same in the first, other in the second"),
        ({"validation": "w"}, "data.fingerprint.validation is v in the first, w in the second"),
        ({"max_residues": 510}, "data.max_residues is 1022 in the first, 510 in the second"),
    ],
)
def test_runs_that_answer_different_questions_are_refused(runs, tmp_path, changes, words):
    other = write(tmp_path / "other", 5, {10: 0.5}, tested=0.5, **changes)
    with pytest.raises(UserError, match=f"0 and other cannot be compared: .*{words}"):
        read([runs[0], other])


def test_a_fine_tuned_run_beside_one_of_pretraining_is_refused(runs, tmp_path):
    other = tmp_path / "pretrained"
    other.mkdir()
    config = config_file.load("configs/pretrain_small.py", "")
    (other / "config.json").write_text(config_file.to_json(config))
    line = {"step": 10, "kind": "validation", "perplexity_mask": 9.0}
    (other / "metrics.jsonl").write_text(json.dumps(line) + "\n")
    with pytest.raises(UserError, match="one is of residue_classification, the other of pretrain"):
        read([runs[0], str(other)])


def test_a_run_that_cannot_be_read_is_one_line(runs, tmp_path):
    young = write(tmp_path / "young", 7, {0: 0.5})
    with pytest.raises(UserError, match="young has no validation metrics yet"):
        read([young])
    with pytest.raises(UserError, match=r"odd: .* cannot be read \('x'\)"):
        read([write(tmp_path / "odd", 7, {10: 0.5}, task="x")])
    (Path(runs[0]) / "test.json").write_text("{")
    with pytest.raises(UserError, match=r"test\.json cannot be read"):
        read(runs[:1])
