"""Every reading of the recipe, held against the published values; every ablation, one change."""

import json
from pathlib import Path

import jax
import numpy as np
import pytest

from esm1nv_jax.common import config_file
from esm1nv_jax.common.errors import UserError
from esm1nv_jax.model.encoder import EncoderConfig, parameter_count
from esm1nv_jax.training import optimizer, sharding, step
from esm1nv_jax.training.run_config import RunConfig
from esm1nv_jax.training.train import train

ROOT = Path(__file__).parents[1]
RECIPE = ROOT / "configs/pretrain_small.py"
QUICK = (
    "--config.data.path=sample",
    "--config.compute.dtype=float32",
    "--config.log.every=1",
    "--config.evaluation.sequences=20",
    "--config.data.row_length=64",
)


def run_config(path, arg=""):
    return RunConfig.from_config_dict(config_file.load(path, arg))


# What the card and the framework's configuration say, as plain values.
PUBLISHED = {
    "model.layers": 6,
    "model.width": 768,
    "model.heads": 12,
    "model.ffn": 3072,
    "model.norm": "pre",
    "model.norm_epsilon": 1e-5,
    "model.ffn_activation": "gelu_tanh",
    "model.head_activation": "gelu_erf",
    "model.dropout": 0.1,
    "model.attention_dropout": 0.1,
    "optimizer.peak_lr": 2e-4,
    "optimizer.min_lr": 2e-5,
    "optimizer.warmup": 500,
    "optimizer.constant": 50_000,
    "optimizer.constant_at": "min_lr",
    "optimizer.horizon": 1_000_000,
    "optimizer.beta1": 0.9,
    "optimizer.beta2": 0.98,
    "optimizer.weight_decay": 0.01,
    "optimizer.clip_norm": 1.0,
    "batch.sequences_per_device": 370,
    "data.crop": "prefix",
    "checkpoint.keep": 47,
    "evaluation.every": 1500,
}
CARD = {
    "masking.recipe": "card",
    "masking.rate": 0.15,
    "data.max_residues": 1024,
    "model.positions": 1026,
    "data.packed": True,
    "steps": 1_000_000,
}
SHIPPED = CARD | {
    "masking.recipe": "shipped",
    "masking.rate": 0.10,
    "data.max_residues": 510,
    "model.positions": 512,
}
READINGS = {
    "": CARD,
    "card": CARD,
    "shipped": SHIPPED,
    "phase1": CARD | {"steps": 349_500},
    "phase2": CARD | {"steps": 957_610},
    "shipped,phase2": SHIPPED | {"steps": 957_610},
    "padded": CARD | {"data.packed": False},
}


@pytest.mark.parametrize("reading", READINGS)
def test_a_reading_resolves_to_the_published_values(reading):
    found = config_file.flat(config_file.load(RECIPE, reading))
    print(f"{RECIPE.name}:{reading}\n{json.dumps(found, indent=1)}")
    expected = PUBLISHED | READINGS[reading]
    assert {name: found[name] for name in expected} == expected


@pytest.mark.parametrize(("reading", "parameters"), [("card", 44_007_296), ("shipped", 43_612_544)])
def test_the_parameter_counts_are_those_of_the_original(reading, parameters):
    assert parameter_count(EncoderConfig(**config_file.load(RECIPE, reading).model)) == parameters


def test_the_rate_at_the_points_the_card_names():
    rate = optimizer.schedule(run_config(RECIPE).optimizer)
    cosine = 2e-5 + 0.5 * 1.8e-4 * (1 + np.cos(np.pi * (349_500 - 500) / (950_000 - 500)))
    expected = {0: 0, 250: 1e-4, 500: 2e-4, 349_500: cosine, 950_000: 2e-5, 957_610: 2e-5}
    np.testing.assert_allclose([rate(n) for n in expected], list(expected.values()), rtol=1e-5)


def test_a_device_sees_370_sequences_packed_or_padded():
    lengths = np.full(5000, 286)
    for reading, rows in (("card", round(370 * 288 / 1152)), ("padded", 370)):
        assert run_config(RECIPE, reading).global_rows(lengths, num_devices=176) == 176 * rows


@pytest.mark.parametrize(
    ("arg", "expected"),
    [
        (
            "max_length=254",
            {"data.max_residues": 254, "model.positions": 256, "data.row_length": 256},
        ),
        ("batch=32,steps=7,seed=3", {"batch.rows": 32, "steps": 7, "seed": 3}),
        (
            "width=256,layers=2",
            {"model.width": 256, "model.heads": 4, "model.ffn": 1024, "model.layers": 2},
        ),
    ],
)
def test_an_argument_sets_its_fields_and_no_other(arg, expected):
    base, found = (config_file.flat(config_file.load(RECIPE, a)) for a in ("", arg))
    assert {k: v for k, v in found.items() if base[k] != v} == expected


@pytest.mark.parametrize(
    ("arg", "said"),
    [
        ("card,shipped", "exclude"),
        ("phase1,phase2", "exclude"),
        ("width=x", "int"),
        ("cards", "unknown"),
    ],
)
def test_a_wrong_argument_is_one_line(arg, said):
    with pytest.raises(UserError, match=said) as error:
        config_file.load(RECIPE, arg)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(("steps", "warmup"), [(450, 40), (20, 2), (1, 0)])
def test_a_quickstart_may_be_short(steps, warmup):
    config = run_config(ROOT / "configs/quickstart.py", f"steps={steps}")
    assert config.optimizer.warmup == warmup


@pytest.mark.parametrize(
    ("size", "parameters"),
    # Those of fair-esm's models, less their contact heads of layers x heads + 1; 650M has
    # 651,043,254 with it. Of 128 rows of our vocabulary 33 are ESM-2's.
    [("8m", 7_512_353), ("35m", 33_501_153), ("150m", 148_139_553), ("650m", 651_042_593)],
)
def test_esm2_has_its_published_sizes(size, parameters):
    config = run_config(ROOT / "configs/esm2.py", size)
    unread = (128 - 33) * (config.model.width + 1) + config.model.head_size // 2
    assert parameter_count(config.model) - unread == parameters
    assert config.batch.rows * config.data.row_length == 2**21
    rate = optimizer.schedule(config.optimizer)
    expected = {0: 0, 1000: 2e-4, 2000: 4e-4, 226_000: 2.2e-4, 450_000: 4e-5, 500_000: 4e-5}
    np.testing.assert_allclose([rate(n) for n in expected], list(expected.values()), rtol=1e-5)


def test_esm2_has_one_size():
    with pytest.raises(UserError, match="8m and 35m exclude"):
        config_file.load(ROOT / "configs/esm2.py", "8m,35m")


ABLATIONS = {
    "masking_rate": {"masking.rate"},
    "post_norm": {"model.norm"},
    "no_dropout": {"model.dropout", "model.attention_dropout"},
    "constant_at_peak": {"optimizer.constant_at"},
    "padded": {"data.packed"},
    "random_crop": {"data.crop"},
    "rotary": {"model.position_kind"},
    "swiglu": {"model.ffn_activation", "model.ffn"},
    "muon": {"optimizer.kind"},
    "shipped_masking": {"masking.recipe", "masking.rate"},
    "masking_schedule": {"masking.rate", "masking.final_rate"},
    "rmsnorm": {"model.norm_kind", "model.bias"},
    "qk_norm": {"model.qk_norm"},
}


def test_every_ablation_is_known_here():
    assert {p.stem for p in (ROOT / "configs/ablations").glob("*.py")} == set(ABLATIONS)


@pytest.mark.parametrize("name", ABLATIONS)
def test_an_ablation_changes_one_thing_and_can_be_trained(name):
    parent = config_file.flat(config_file.load(RECIPE, "max_length=510,width=64"))
    config = config_file.load(ROOT / f"configs/ablations/{name}.py", "max_length=510,width=64")
    found = config_file.flat(config)
    assert {k for k in found if found[k] != parent[k]} == ABLATIONS[name]
    step.create_state(RunConfig.from_config_dict(config).step_config(jax.devices()[0]))


@pytest.mark.integration
def test_two_phases_on_fewer_devices_are_one_run(tmp_path, monkeypatch):
    """Scaled down: 4 devices to step 3, then 3 devices to step 5, in one workdir."""
    tiny = "batch=0,width=32,layers=1,max_length=62"
    losses = {}
    for phase, devices, stop in (("phase1", 4, 3), ("phase2", 3, 5)):
        monkeypatch.setattr(sharding, "devices_of", lambda _, n=devices: jax.devices("cpu")[:n])
        config = config_file.override(
            config_file.load(RECIPE, f"{phase},{tiny}"),
            [*QUICK, f"--config.steps={stop}", "--config.batch.sequences_per_device=4"],
        )
        assert train(RunConfig.from_config_dict(config), str(tmp_path)) == 0
    for line in map(json.loads, (tmp_path / "metrics.jsonl").read_text().splitlines()):
        if line["kind"] == "train":
            losses[line["step"]] = line["sequences_per_step"]
    assert sorted(losses) == [1, 2, 3, 4, 5]
    # As in the original, fewer devices are a smaller batch: 4 rows' worth a device.
    assert np.mean([losses[4], losses[5]]) < np.mean([losses[1], losses[2], losses[3]])
