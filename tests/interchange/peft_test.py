"""LoRA in `peft`: the adapter folder gives the numbers of the merged model here."""

import dataclasses
import os
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from esm1nv_jax.checkpoints import model_folder
from esm1nv_jax.common.errors import UserError
from esm1nv_jax.interchange import convert, huggingface
from esm1nv_jax.interchange.loader import load_weights
from esm1nv_jax.model import heads, lora
from esm1nv_jax.model.heads import HeadConfig
from esm1nv_jax.model.lora import PROJECTIONS, LoraConfig

pytest.importorskip("torch", reason="pip install -e '.[interchange-test]'")
transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")

from tests.interchange import heads_test as there  # noqa: E402, needs torch

ROOT = Path(__file__).parents[2]
RESIDUE, PROTEIN = there.HEADS[0], there.HEADS[2]
CASES = [
    (RESIDUE, there.ESM, LoraConfig(rank=3)),
    (PROTEIN, there.ESM, LoraConfig(rank=2, alpha=3.5, projections=PROJECTIONS)),
    (PROTEIN, there.BERT, LoraConfig(rank=4, projections=("fc2", "value"))),
]


@pytest.mark.parametrize("head, config, adapter", CASES, ids=["residue", "protein", "bert"])
def test_the_adapter_there_gives_the_numbers_of_the_merged_model(head, config, adapter, tmp_path):
    tuned = load_weights(there.make(tmp_path / "tuned", head, config))
    base = dataclasses.replace(tuned, params=tuned.encoder_params, head=None)
    rng = np.random.default_rng(5)
    adapters = jax.tree.map(
        lambda x: np.float32(x + rng.normal(0, 0.1, x.shape)), lora.init(config, adapter, 0)
    )
    merged = lora.merge(tuned.params, adapters, adapter)
    model_folder.write(str(tmp_path / "merged"), dataclasses.replace(tuned, params=merged))
    folder = tmp_path / "adapter"
    huggingface.write_adapter(str(folder), base, tuned, adapter, adapters)

    kind = "Token" if head.level == "residue" else "Sequence"
    auto = getattr(peft, f"AutoPeftModelFor{kind}Classification")
    model = auto.from_pretrained(folder).eval()
    adapted = {
        n for n, m in model.named_modules() if hasattr(m, "lora_A") and hasattr(m, "scaling")
    }
    assert len(adapted) == config.layers * len(adapter.projections)
    ids = transformers.AutoTokenizer.from_pretrained(folder / "base")(
        there.SEQUENCES, padding=True, return_tensors="pt"
    )
    with there.torch.no_grad():
        logits = model(**ids).logits.numpy()
        with model.disable_adapter():
            without = model(**ids).logits.numpy()
    assert np.abs(logits - without).max() > 1e-2
    predicted = there.load(str(tmp_path / "merged")).predict(there.SEQUENCES).values
    for i, value in enumerate(predicted):
        theirs = logits[i, 1 : 1 + len(there.SEQUENCES[i])] if kind == "Token" else logits[i]
        np.testing.assert_allclose(value, heads.to_predictions(head, theirs), atol=1e-5)


def test_the_head_of_the_adapter_is_that_of_the_tuned_model(tmp_path):
    """Another head in the base does not matter: `peft` takes the saved one."""
    head = HeadConfig("protein", "regression", (), "cls")
    tuned = load_weights(there.make(tmp_path / "tuned", head))
    adapters = lora.init(there.ESM, LoraConfig(rank=2), 0)
    folder = tmp_path / "adapter"
    huggingface.write_adapter(str(folder), tuned, tuned, LoraConfig(rank=2), adapters)
    base = transformers.AutoModelForSequenceClassification.from_pretrained(folder / "base")
    with there.torch.no_grad():
        base.classifier.out_proj.bias.zero_()
    model = peft.PeftModel.from_pretrained(base, folder).eval()
    ids = transformers.AutoTokenizer.from_pretrained(folder / "base")("MKTL", return_tensors="pt")
    with there.torch.no_grad():
        theirs = model(**ids).logits.numpy()[0]
    ours = there.load(str(tmp_path / "tuned")).predict(["MKTL"]).values[0]
    np.testing.assert_allclose(ours, theirs, atol=1e-5)


@pytest.mark.integration
def test_a_run_becomes_an_adapter_or_a_whole_model(tmp_path):
    base = load_weights(there.make(tmp_path / "tuned", RESIDUE))
    base = dataclasses.replace(base, params=base.encoder_params, head=None)
    model_folder.write(str(tmp_path / "base"), base)
    rng = np.random.default_rng(1)
    rows = ["sequence,label,split"]
    for i in range(24):
        sequence = "".join(rng.choice(list("ACDEFGHIK"), 20))
        label = "".join("h" if c in "AEK" else "c" for c in sequence)
        rows.append(f"{sequence},{label},{('train', 'valid', 'test')[i % 3]}")
    (tmp_path / "labels.csv").write_text("\n".join(rows))
    config = f"model={tmp_path / 'base'},csv={tmp_path / 'labels.csv'},task=residue_classification"
    config = f"{ROOT / 'configs' / 'finetune.py'}:{config},method=lora=2,epochs=3,batch=4,lr=0.05"
    run = tmp_path / "run"
    argv = [sys.executable, "-m", "esm1nv_jax.main", f"--config={config}", f"--workdir={run}"]
    subprocess.run(argv, check=True, capture_output=True, env=os.environ | {"JAX_PLATFORMS": "cpu"})

    assert convert.to_peft(str(run), str(tmp_path / "adapter")) == ""
    assert convert.to_hf(str(run), str(tmp_path / "whole")) == ""
    sequence = there.SEQUENCES[0][:20]  # as long as training has seen: read at once
    predicted = there.load(str(run)).predict([sequence])
    adapted = peft.AutoPeftModelForTokenClassification.from_pretrained(tmp_path / "adapter").eval()
    whole = transformers.AutoModelForTokenClassification.from_pretrained(tmp_path / "whole").eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "whole")
    for model in (adapted, whole):
        with there.torch.no_grad():
            logits = model(**tokenizer(sequence, return_tensors="pt")).logits.numpy()[0, 1:-1]
        theirs = heads.to_predictions(predicted.head, logits)
        np.testing.assert_allclose(predicted.values[0], theirs, atol=1e-5)
    card = (tmp_path / "whole" / "README.md").read_text()
    assert f"Fine-tuned on labels, from `{tmp_path / 'base'}`" in card
    assert "accuracy 0." in card and "AutoModelForTokenClassification" in card
    with pytest.raises(UserError, match=r"base holds no LoRA.*--to hf"):
        convert.to_peft(str(tmp_path / "base"), str(tmp_path / "none"))
