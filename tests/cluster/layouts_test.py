"""The same run on any devices: real processes, real layouts, one witness that never moved."""

import json

import numpy as np
import pytest

from esm1nv_jax.checkpoints import step_folder
from esm1nv_jax.data.packing import StreamConfig
from esm1nv_jax.data.pipeline import train_dataset
from esm1nv_jax.data.source import open_split
from tests.cluster.runs import Run, losses, parameters

pytestmark = pytest.mark.integration
LAYOUTS = {"1x8": (1, 8), "2x2": (2, 2), "4x1": (4, 1)}  # processes x devices of each
STEPS = 50
SPY = """
import hashlib, os
from esm1nv_jax.data import pipeline
real = pipeline.train_dataset
def spied(source, config, rows, workers):
    def record(batch):
        with open(os.environ["SPY"] + f"/{rows.start}", "a") as file:
            for number in range(rows.stop - rows.start):
                row = b"".join(batch[name][number].tobytes() for name in sorted(batch))
                print(hashlib.sha256(row).hexdigest(), file=file)
        return batch
    return real(source, config, rows, workers).map(record)
pipeline.train_dataset = spied
"""


def options(steps=STEPS, dtype="float32"):
    return (
        f"--config.steps={steps}",
        "--config.checkpoint.every=50",
        f"--config.compute.dtype={dtype}",
    )


def relative(a: dict, b: dict) -> float:
    """Relative L2 distance, key biases apart: their true gradient is zero, Adam amplifies noise."""

    def vector(params):
        parts = []
        for name, value in sorted(params.items()):
            if name.endswith("qkv/bias"):
                value = np.delete(value.reshape(3, -1), 1, axis=0)
            parts.append(np.ravel(value))
        return np.concatenate(parts)

    x, y = vector(a), vector(b)
    return float(np.linalg.norm(x - y) / np.linalg.norm(y))


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    """50 steps on one device in one process, with a hash of every row of every batch."""
    return spied_run(tmp_path_factory.mktemp("straight"), 1, 1)


def spied_run(folder, processes, devices, steps=STEPS, dtype="float32"):
    spy = folder / "spy"
    spy.mkdir(parents=True)
    (spy / "sitecustomize.py").write_text(SPY)
    from tests.training.processes import ROOT

    env = {"SPY": str(spy), "PYTHONPATH": f"{spy}:{ROOT}"}
    with Run(folder / "run", processes, *options(steps, dtype), devices=devices, **env) as run:
        assert run.wait() == 0, run.text
    return folder


def rows_seen(folder, steps):
    """Hashes of the rows of the first batches, in order, whoever made them."""
    files = sorted(
        (path for path in (folder / "spy").iterdir() if path.name.isdigit()),
        key=lambda path: int(path.name),
    )
    each = 8 // len(files)
    made = [path.read_text().split() for path in files]
    return [row for n in range(steps) for part in made for row in part[n * each : (n + 1) * each]]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_see_the_same_batches_and_learn_the_same(tmp_path, straight, layout):
    other = spied_run(tmp_path, *LAYOUTS[layout])
    assert rows_seen(other, STEPS) == rows_seen(straight, STEPS)
    a, b = losses(other / "run"), losses(straight / "run")
    difference = {n: abs(a[n] - b[n]) / b[n] for n in range(1, STEPS + 1)}
    print(f"{layout}: loss {max(difference.values()):.1e}")
    assert max(difference[n] for n in range(1, 11)) < 1e-5
    assert max(difference.values()) < 1e-4
    assert relative(parameters(other / "run", STEPS), parameters(straight / "run", STEPS)) < 1e-4


def test_a_run_that_moves_three_times_learns_the_same(tmp_path, straight):
    """1x8, then 2x2, 4x1, 1x1: each part of it goes on from the checkpoint of another layout."""
    layouts = (*LAYOUTS.values(), (1, 1))
    for steps, (processes, devices) in zip((12, 24, 36, 50), layouts, strict=True):
        with Run(tmp_path / "run", processes, *options(steps), devices=devices) as run:
            assert run.wait() == 0, run.text
    assert run.text.count("changed    from") == 3
    a, b = losses(tmp_path / "run"), losses(straight / "run")
    assert a.keys() == b.keys()
    assert max(abs(a[n] - b[n]) / b[n] for n in a) < 1e-4
    moved, stayed = parameters(tmp_path / "run", STEPS), parameters(straight / "run", STEPS)
    assert relative(moved, stayed) < 1e-4


def test_in_bfloat16_losses_agree_within_a_thousandth(tmp_path):
    for name, (processes, devices) in {"one": (1, 1), "two": (2, 2)}.items():
        with Run(tmp_path / name, processes, *options(dtype="bfloat16"), devices=devices) as run:
            assert run.wait() == 0, run.text
    a, b = losses(tmp_path / "one"), losses(tmp_path / "two")
    assert max(abs(a[n] - b[n]) / b[n] for n in range(1, STEPS + 1)) < 1e-3


def test_a_batch_given_per_device_shrinks_with_the_devices_and_skips_nothing(tmp_path):
    """Four devices, then three: the state is that of a stream of single rows."""
    sizes = ("--config.batch.rows=0", "--config.batch.sequences_per_device=3")
    for steps, devices in ((5, 4), (9, 3)):
        with Run(tmp_path / "run", 1, *sizes, *options(steps), devices=devices) as run:
            assert run.wait() == 0, run.text
    layouts = [step_folder.read_metadata(tmp_path / "run", s)["layout"] for s in (5, 9)]
    rows = [layout["rows"] for layout in layouts]
    assert rows[0] * 3 == rows[1] * 4
    assert f"from {rows[0]} rows on 4 device(s)" in run.text
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    data = config["data"]
    single = StreamConfig(
        seed=config["seed"],
        rows=1,
        row_length=data["row_length"],
        max_residues=data["max_residues"],
        crop=data["crop"],
    )
    walk = iter(train_dataset(open_split("sample", "train"), single))
    for _ in range(5 * rows[0] + 4 * rows[1]):
        next(walk)
    saved = step_folder.read_data_state(tmp_path / "run", 9)
    assert saved["stream"] == walk.get_state()
    assert sorted(losses(tmp_path / "run")) == list(range(1, 10))
