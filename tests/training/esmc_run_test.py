"""Training that begins from an ESMC of transformers."""

import json

import pytest

from esm1nv_jax.checkpoints import model_folder
from esm1nv_jax.inference.model import load
from tests.training.processes import ROOT, lines

transformers = pytest.importorskip("transformers")
pytest.importorskip("torch", reason="pip install -e '.[interchange-test]'")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    if not hasattr(transformers, "EsmcForMaskedLM"):
        pytest.skip("this transformers has no ESMC")
    folder = tmp_path_factory.mktemp("esmc")
    config = transformers.EsmcConfig(
        hidden_size=16, num_attention_heads=2, intermediate_size=24, num_hidden_layers=1
    )
    transformers.EsmcForMaskedLM(config).save_pretrained(folder)
    return folder


@pytest.mark.integration
def test_pretraining_continues_from_esmc(folder, tmp_path, train_here):
    run = tmp_path / "run"
    done = train_here(
        f"--workdir={run}",
        *("--config.data.path=sample", "--config.data.max_residues=62"),
        *("--config.data.row_length=64", "--config.compute.dtype=float32"),
        *("--config.evaluation.sequences=20", "--config.log.every=1"),
        *("--config.optimizer.peak_lr=1e-2", "--config.optimizer.warmup=0"),
        config=f"{ROOT}/configs/continue_from.py:model={folder},batch=4,steps=20",
    )
    assert done.returncode == 0, done.stderr
    before, *_, after = lines(run, "validation")
    assert after["loss"] < before["loss"]
    model = model_folder.read(str(run))
    assert model.model.branch_scale == 6.0 and "decoder" in model.params["lm_head"]


@pytest.mark.integration
def test_esmc_is_fine_tuned_by_lora(folder, tmp_path, train_here):
    table, run = tmp_path / "t.csv", tmp_path / "run"
    rows = [f"MKT{'AW'[n % 2] * (5 + n)}L,{'HE'[n % 2] * (9 + n)}" for n in range(24)]
    table.write_text("sequence,label\n" + "\n".join(rows) + "\n")
    config = f"{ROOT}/configs/finetune.py:model={folder},csv={table}"
    config += ",task=residue_classification,method=lora=2,epochs=4,batch=8,lr=1e-2"
    options = "--config.finetune.lora_projections=query,fc1,fc2", "--config.compute.dtype=float32"
    done = train_here(f"--workdir={run}", *options, config=config)
    assert done.returncode == 0, done.stderr
    assert json.loads((run / "test.json").read_text())["metrics"]["loss"] < 0.7
    (predicted,) = load(str(run)).predict(["MKTAAAAAAAAAL"]).values
    assert len(predicted) == 13
