"""LoRA of a fine-tuned model as an adapter folder of `peft`, beside a folder of its base model."""

from __future__ import annotations

import json
import re

import numpy as np
from etils import epath
from safetensors.numpy import save as save_safetensors

from esm1nv_jax.checkpoints.model_folder import Weights, flatten
from esm1nv_jax.common.errors import UserError
from esm1nv_jax.interchange import head_tensors, huggingface
from esm1nv_jax.interchange.hf_config import BERT, ESM
from esm1nv_jax.model.lora import LoraConfig

CONFIG, ADAPTER, BASE = "adapter_config.json", "adapter_model.safetensors", "base"
TASKS = {"residue": "TOKEN_CLS", "protein": "SEQ_CLS"}


def write(
    path: str, base: Weights, tuned: Weights, lora: LoraConfig, adapters: dict, difference: str = ""
) -> None:
    """Writes the adapter, and `base` as a folder of `transformers` in it.

    Args:
      base: the model that was fine-tuned.
      tuned: what came of it, for its head.
      adapters: parameters of LoRA, as `lora.init` returns them.
      difference: from the model here, if there is one, for the model card of the base.

    Raises UserError where `transformers` has no such model or head.
    """
    head = tuned.head
    if head is None:
        raise UserError("only a fine-tuned model has an adapter")
    params = base.encoder_params | {"head": tuned.params["head"]}
    with_head = Weights(params, tuned.model, base.provenance, head)
    folder = epath.Path(path)
    huggingface.write(str(folder / BASE), with_head, difference)

    family = ESM if tuned.model.norm == "pre" else BERT
    names, layers = family.block_modules, family.layers
    weights = head_tensors.to_hf_tensors(family, head, flatten(tuned.params["head"]))
    for layer, projections in adapters.items():
        for name, pair in projections.items():
            for ours, theirs in (("lora_a", "lora_A"), ("lora_b", "lora_B")):
                kernel = np.asarray(pair[ours]["kernel"])
                weights[f"{layers}.{layer}.{names[name]}.{theirs}.weight"] = kernel.T
    content = {
        f"base_model.model.{name}": np.ascontiguousarray(value, np.float32)
        for name, value in weights.items()
    }
    (folder / ADAPTER).write_bytes(save_safetensors(content, metadata={"format": "pt"}))
    adapted = "|".join(re.escape(names[name]) for name in lora.projections)
    pooler = [n.removesuffix(".weight") for n in weights if n.endswith("pooler.dense.weight")]
    config = {
        "peft_type": "LORA",
        "task_type": TASKS[head.level],
        "base_model_name_or_path": str(folder / BASE),
        "r": lora.rank,
        "lora_alpha": int(lora.alpha) if lora.alpha == int(lora.alpha) else lora.alpha,
        "lora_dropout": lora.dropout,
        "target_modules": rf"{re.escape(layers)}\.\d+\.({adapted})",
        "modules_to_save": ["classifier", *pooler],
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
    }
    (folder / CONFIG).write_text(json.dumps(config, indent=2))
    auto = f"AutoModelFor{head_tensors.ENDINGS[head.level].removeprefix('For')}"
    (folder / "README.md").write_text(
        f"---\nlibrary_name: peft\nbase_model: {BASE}\ntags: [protein]\n---\n\n"
        f"# A LoRA adapter, written by esm1nv_jax\n\n```python\nfrom peft import PeftModel\n"
        f"from transformers import {auto}, AutoTokenizer\n\n"
        f'base = {auto}.from_pretrained("THIS_FOLDER/{BASE}")\n'
        'model = PeftModel.from_pretrained(base, "THIS_FOLDER").eval()\n'
        f'tokenizer = AutoTokenizer.from_pretrained("THIS_FOLDER/{BASE}")\n```\n',
        encoding="utf-8",
    )
