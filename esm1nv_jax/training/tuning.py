"""Which parameters fine-tuning trains, and which stay as they are: two trees.

The optimizer, the gradient and its reduction over devices, and the checkpoint are of the first
alone. Together they are one tree again, of the encoder's names with `head` and `lora` beside them.
"""

from __future__ import annotations

import dataclasses
import re

import jax.numpy as jnp

from esm1nv_jax.checkpoints.model_folder import flatten, unflatten
from esm1nv_jax.common.errors import UserError, check_choices
from esm1nv_jax.data.labeled_data import TASKS, SplitFractions
from esm1nv_jax.model.encoder_config import DTYPES, EncoderConfig
from esm1nv_jax.model.heads import POOLINGS
from esm1nv_jax.model.lora import LoraConfig


@dataclasses.dataclass(frozen=True)
class FinetuneConfig:
    """The fields of the config's group `finetune`."""

    task: str
    method: str
    pooling: str
    class_weights: bool
    metric: str
    patience: int
    test: bool
    valid_fraction: float
    test_fraction: float
    split_seed: int
    lora_alpha: float
    lora_dropout: float
    lora_projections: str
    frozen_dtype: str

    def __post_init__(self):
        check_choices("finetune", self, task=TASKS, pooling=POOLINGS, frozen_dtype=DTYPES)
        if self.patience < 0:
            raise UserError(f"finetune.patience={self.patience} must be at least 0")
        _ = self.tuning, self.fractions  # raises UserError

    @property
    def tuning(self) -> Tuning:
        """What is trained. Raises UserError for an unknown method."""
        projections = tuple(filter(None, self.lora_projections.split(",")))
        lora = LoraConfig(alpha=self.lora_alpha, dropout=self.lora_dropout, projections=projections)
        return Tuning.parse(self.method, lora, self.frozen_dtype)

    @property
    def fractions(self) -> SplitFractions:
        return SplitFractions(self.valid_fraction, self.test_fraction, self.split_seed)


METHODS = "full, last=BLOCKS, lora=RANK or head"


@dataclasses.dataclass(frozen=True)
class Tuning:
    """What is trained beside the head: everything, the last blocks, LoRA's factors, or nothing.

    frozen_dtype: of the frozen kernels. With products in bf16 they are rounded to it in any case,
    so that `bfloat16` changes no bit and halves their memory.
    """

    method: str
    blocks: int = 0
    lora: LoraConfig | None = None
    frozen_dtype: str = "float32"

    @classmethod
    def parse(cls, text: str, lora: LoraConfig, frozen_dtype: str = "float32") -> Tuning:
        """Return what a method such as `lora=8` names; `lora` has the rest of LoRA's fields."""
        match = re.fullmatch(r"(full|head|(last|lora)=(\d+))", text)
        number = int(match[3] or 1) if match else 0
        if match is None or number < 1:
            raise UserError(f"finetune.method={text!r} is unknown; there are {METHODS}")
        if match[2] == "last":
            return cls("last", blocks=number, frozen_dtype=frozen_dtype)
        if match[2] == "lora":
            return cls(
                "lora", lora=dataclasses.replace(lora, rank=number), frozen_dtype=frozen_dtype
            )
        return cls(text, frozen_dtype=frozen_dtype)

    def check(self, model: EncoderConfig) -> None:
        """Raise UserError for more blocks than the model has."""
        if self.blocks > model.layers:
            raise UserError(
                f"finetune.method=last={self.blocks}: the model has {model.layers} blocks"
            )

    def split(self, params: dict, model: EncoderConfig) -> tuple[dict, dict]:
        """Return (trained, frozen) parameters. The masked-LM head, which no label reads, is frozen:
        weight decay would shrink it."""
        self.check(model)
        trained = {name: params[name] for name in ("head", "lora") if name in params}
        if self.method == "full":
            trained |= {name: x for name, x in params.items() if name != "lm_head"}
        elif self.method == "last":
            last = map(str, range(model.layers - self.blocks, model.layers))
            trained["blocks"] = {name: params["blocks"][name] for name in last}
            trained |= {name: x for name, x in params.items() if name == "final_norm"}
        kept, dtype = flatten(trained), DTYPES[self.frozen_dtype]
        frozen = {
            name: x.astype(dtype) if name.endswith("/kernel") else jnp.asarray(x)
            for name, x in flatten(params).items()
            if name not in kept
        }
        return trained, unflatten(frozen)


def merge_trees(a: dict, b: dict) -> dict:
    """Return the leaves of two nested dictionaries, which share none, as one."""
    return unflatten(flatten(a) | flatten(b)) if b else a
