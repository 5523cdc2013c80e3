"""`benchmarks/gpu.py` end to end on a CPU, before an hour on a chip is spent on it."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def benchmark(*arguments: str) -> subprocess.CompletedProcess:
    command = [sys.executable, ROOT / "benchmarks/gpu.py", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def rehearsed(folder: Path, names: str) -> dict:
    """Parts by name, all of which must have ended well."""
    ended = benchmark("--rehearse", "--out", str(folder), "--parts", names)
    assert ended.returncode == 0, ended.stdout[-3000:] + ended.stderr[-3000:]
    parts = json.loads((folder / "gpu.json").read_text())["parts"]
    assert set(parts) == set(names.split(","))
    for name, part in parts.items():
        assert part["status"] == "done" and part["records"], name
        assert not [record for record in part["records"] if name != "device" and "error" in record]
    return parts


@pytest.mark.slow
def test_a_rehearsal_of_the_comparisons(tmp_path):
    rehearsed(tmp_path, "torch_train,embed,torch_embed,step_xla,step_padded")


@pytest.mark.integration
def test_a_rehearsal_of_the_parts_about_our_own_programs(tmp_path):
    parts = rehearsed(tmp_path, "plan,reference,cpu,deterministic,device,step,attention,blocks")
    records = {(part, r["name"]): r for part in parts for r in parts[part]["records"]}
    assert all(r["good"] for (part, _), r in records.items() if part == "reference" and "good" in r)
    assert records["deterministic", "deterministic"]["equal"]
    assert records["cpu", "this chip, float32"]["apart"] < 1e-5
    assert records["step", "measured"]["ms"] > 0
    # The trace names kernels of the program: hardly any time is of unknown origin.
    kernels = records["step", "profile"]["kernels"]
    known = sum(k["ms"] for k in kernels if k["phase"] != "unknown")
    assert known > 0.9 * records["step", "profile"]["busy_ms"]
    page = (tmp_path / "gpu.md").read_text()
    assert "esm1nv plan" in page and "| gemm, backward |" in page
    assert "cudnn, padded, dropout 0.0: cuDNN needs a GPU" in page  # what was skipped, and why


@pytest.mark.integration
def test_a_part_that_runs_out_of_time_ends_no_other(tmp_path):
    ended = benchmark("--rehearse", "--out", str(tmp_path), "--parts", "device,attention",
                      "--minutes", "0.05")  # fmt: skip
    assert ended.returncode == 1
    parts = json.loads((tmp_path / "gpu.json").read_text())["parts"]
    assert set(parts) == {"device", "attention"}
    assert parts["attention"]["status"].startswith(("stopped", "skipped"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [(("--parts", "steps"), "--parts=steps is unknown; there are plan, reference"), ((), "--out")],
)
def test_a_wrong_command_is_one_line(tmp_path, arguments, message):
    out = ("--out", str(tmp_path)) if arguments else ()
    ended = benchmark(*out, *arguments)
    assert ended.returncode == 2 and message in ended.stderr
    assert len(ended.stderr.strip().splitlines()) == 1
