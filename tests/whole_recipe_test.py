"""The recipe of the model card from end to end, small, by the public commands alone.

Prepare, train on 4 devices, go on with 3, average the last 47 checkpoints, evaluate, probe.
"""

import gzip
import json
import os
import subprocess
import sys
from importlib import resources
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow
SAMPLE = resources.files("esm1nv_jax.data") / "sample/swissprot_nr50_sample.fasta.gz"
RECIPE = "configs/pretrain_small.py:{phase},width=32,layers=1,max_length=126,batch=12,steps={steps}"


def esm1nv(*arguments, devices=1):
    done = subprocess.run(
        [sys.executable, "-m", "esm1nv_jax", *arguments],
        env=os.environ | {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": str(devices)},
        capture_output=True,
        text=True,
        timeout=1800,
    )
    assert done.returncode == 0, f"{arguments}: {done.stderr}"
    return done.stderr


def test_the_whole_recipe(tmp_path):
    records = gzip.decompress(SAMPLE.read_bytes()).split(b">")[1:501]
    proteins = tmp_path / "proteins.fasta"
    proteins.write_bytes(b"".join(b">" + record for record in records))
    data, run, model = (str(tmp_path / name) for name in ("data", "run", "model"))
    esm1nv("prepare", "--fasta", str(proteins), "--out", data, "--validation", "40", "--test", "60")

    options = [
        f"--workdir={run}",
        f"--config.data.path={data}",
        "--config.checkpoint.every=1",
        "--config.optimizer.warmup=5",
        "--config.evaluation.sequences=200",
    ]
    for phase, devices, steps in (("phase1", 4, 30), ("phase2", 3, 60)):
        config = RECIPE.format(phase=phase, steps=steps)
        said = esm1nv("train", f"--config={config}", *options, devices=devices)
        assert f"{devices} x cpu" in said
    metrics = Path(run, "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    lines = [json.loads(line) for line in metrics]
    assert [x["step"] for x in lines if x["kind"] == "validation"][-1] == 60

    said = esm1nv("average", "--workdir", run, "--last", "47", "--out", model)
    assert "47 checkpoints, steps 14 to 60" in said
    found = tmp_path / "evaluation.json"
    page = tmp_path / "evaluation.html"
    esm1nv(
        "evaluate",
        "--checkpoint",
        model,
        "--data",
        f"{data}:test",
        "--json",
        str(found),
        "--report",
        str(page),
        devices=2,
    )
    result = json.loads(found.read_text())
    assert result["sequences"] == 60 and 10 < result["overall"]["perplexity_mask"] < 31
    assert result["provenance"]["steps"] == list(range(14, 61))
    assert "Learning curves" in page.read_text()

    table = tmp_path / "task.csv"
    rows = [r.partition(b"\n")[2].replace(b"\n", b"").decode()[:60] for r in records[:80]]
    splits = ["train"] * 40 + ["valid"] * 20 + ["test"] * 20
    text = [f"{r},{r.count('L') / len(r)},{s}" for r, s in zip(rows, splits, strict=True)]
    table.write_text("\n".join(["sequence,label,split", *text]))
    found = tmp_path / "probe.json"
    esm1nv(
        "probe",
        "--checkpoint",
        model,
        "--task",
        "regression",
        "--csv",
        str(table),
        "--seeds",
        "1",
        "--json",
        str(found),
    )
    rows = {(r["head"], r["features"]): r for r in json.loads(found.read_text())["rows"]}
    assert rows["linear", "one-hot"]["spearman"] > 0.8
