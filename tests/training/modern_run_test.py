"""Runs with the modern encoder, Muon and a rate of masking that falls; runs of older versions."""

import json

import pytest

from esm1nv_jax.checkpoints import model_folder, step_folder
from esm1nv_jax.interchange.hf_config import approximate_config, inexact_reason
from esm1nv_jax.training.optimizer import OptimizerConfig
from esm1nv_jax.training.run_config import flat_with_defaults
from tests.training.processes import assert_same, lines, params

MODERN = (
    "--config.model.position_kind=rotary",
    "--config.model.ffn_activation=swiglu",
    "--config.model.norm_kind=rmsnorm",
    "--config.model.bias=False",
    "--config.model.qk_norm=True",
    "--config.model.tied_head=False",
    "--config.model.branch_scale=1.5",
    "--config.optimizer.kind=muon",
    "--config.optimizer.horizon=12",
    "--config.masking.rate=0.5",
    "--config.masking.final_rate=0.1",
    "--config.log.every=1",
)


@pytest.mark.integration
def test_a_modern_run_resumes_bit_for_bit_and_its_model_opens(tmp_path, train_here):
    straight, resumed = tmp_path / "straight", tmp_path / "resumed"
    done = train_here(f"--workdir={straight}", *MODERN)
    assert done.returncode == 0, done.stderr
    assert "card, 50% of residues, 10% at the end" in done.stderr
    assert "export     model.norm_kind='rmsnorm'" in done.stderr
    for steps in (8, 12):
        done = train_here(f"--workdir={resumed}", *MODERN, f"--config.steps={steps}")
        assert done.returncode == 0, done.stderr
    assert_same(params(resumed, 12), params(straight, 12))
    assert [x["loss"] for x in lines(resumed, "train")] == [
        x["loss"] for x in lines(straight, "train")
    ]
    assert lines(straight, "validation")[-1]["loss"] < lines(straight, "validation")[0]["loss"]
    weights = model_folder.read(str(straight))
    assert "final_norm" in weights.params and "decoder" in weights.params["lm_head"]
    for field in ("norm_kind", "bias", "qk_norm", "tied_head", "branch_scale", "ffn_activation"):
        assert f"model.{field}=" in inexact_reason(weights.model)
    with pytest.raises(ValueError, match=r"qk_norm=True.*cannot be converted"):
        approximate_config(weights.model)


@pytest.mark.integration
def test_a_run_of_an_older_version_goes_on(tmp_path, train_here):
    run, straight = tmp_path / "run", tmp_path / "straight"
    assert train_here(f"--workdir={straight}").returncode == 0
    assert train_here(f"--workdir={run}", "--config.steps=8").returncode == 0
    config = json.loads((run / "config.json").read_text())
    for group, names in (
        ("masking", ["final_rate"]),
        ("model", ["norm_kind", "bias", "qk_norm", "tied_head", "branch_scale"]),
        ("optimizer", ["kind", "muon_beta"]),
    ):
        for name in names:
            del config[group][name]
    (run / "config.json").write_text(json.dumps(config))
    other = train_here(f"--workdir={run}", "--config.optimizer.kind=muon")
    assert other.returncode == 2 and "optimizer.kind: 'adamw' there, 'muon' here" in other.stderr
    assert train_here(f"--workdir={run}").returncode == 0
    assert step_folder.steps(run)[-1] == 12
    assert_same(params(run, 12), params(straight, 12))


def test_fields_that_a_record_lacks_have_their_defaults():
    recorded = {"optimizer": {"peak_lr": 1.0, "kind": "muon"}, "compute": {}, "seed": 3}
    found = flat_with_defaults(recorded)
    assert found["optimizer.peak_lr"] == 1.0 and found["optimizer.kind"] == "muon"
    assert found["optimizer.muon_beta"] == OptimizerConfig.muon_beta and found["seed"] == 3
    assert found["compute.residual_dtype"] == "float32"
    assert not any(name.startswith("model.") for name in found)
