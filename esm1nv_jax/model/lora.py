"""LoRA (Hu et al., 2022): a low-rank product added to chosen linear layers of a frozen encoder.

The parameters of a projection are `lora_a/kernel` [in, rank] and `lora_b/kernel` [rank, out]; their
product, times alpha / rank, is added to the layer's kernel. `lora_b` starts at zero, so that the
adapted encoder starts at the bits of its base. Training keeps the product apart from the kernel,
whose gradient is then never computed; `merge` adds it for use.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from esm1nv_jax.common.errors import UserError
from esm1nv_jax.common.hashing import fold_all, purpose
from esm1nv_jax.model.dropout import FFN_OUTPUT, DropoutKey, dropout
from esm1nv_jax.model.encoder_config import EncoderConfig
from esm1nv_jax.model.kernels.matmul import matmul

FUSED = ("query", "key", "value")  # thirds of the columns of the kernel of `qkv`, in this order
PROJECTIONS = (*FUSED, "out_proj", "fc1", "fc2")


@dataclasses.dataclass(frozen=True)
class LoraConfig:
    """Rank, scale, dropout of the input, and the projections of every block that are adapted."""

    rank: int = 8
    alpha: float = 16.0
    dropout: float = 0.0
    projections: tuple[str, ...] = (*FUSED, "out_proj")

    def __post_init__(self):
        object.__setattr__(self, "projections", tuple(self.projections))  # JSON has lists
        if self.rank < 1:
            raise UserError(f"LoRA rank {self.rank} must be at least 1")
        if not 0 <= self.dropout < 1:
            raise UserError(f"LoRA dropout {self.dropout} is not in [0, 1)")
        if not self.projections or set(self.projections) - set(PROJECTIONS):
            raise UserError(
                f"LoRA projections {', '.join(self.projections) or 'none'}: take some of "
                f"{', '.join(PROJECTIONS)}"
            )

    @property
    def scale(self) -> float:
        return self.alpha / self.rank


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LoraBlock:
    """The adapted projections of one block, for use inside a jitted function."""

    params: dict
    config: LoraConfig = dataclasses.field(metadata={"static": True})

    def delta(self, name: str, x_BTK, key: DropoutKey | None, layer: int, dtype):
        """Return what LoRA adds to the output of a projection of `x_BTK`; None where it does not
        adapt it. `dtype` is that of the operands of products."""
        if name not in self.params:
            return None
        site = FFN_OUTPUT + 1 + PROJECTIONS.index(name)
        x_BTK = dropout(x_BTK, self.config.dropout, key, layer, site)
        x_BTR = matmul(x_BTK, self.params[name]["lora_a"]["kernel"], dtype, False)
        return self.config.scale * matmul(
            x_BTR, self.params[name]["lora_b"]["kernel"], dtype, False
        )

    def add(self, name: str, y_BTN, x_BTK, key: DropoutKey | None, layer: int, dtype):
        """Return the output `y_BTN` of the layer `name` (qkv, out_proj, fc1 or fc2) with LoRA's
        product added, in the dtype of `y_BTN`."""
        if name == "qkv":
            parts = [self.delta(part, x_BTK, key, layer, dtype) for part in FUSED]
            if all(part is None for part in parts):
                return y_BTN
            zeros = jnp.zeros(x_BTK.shape, jnp.float32)
            added = jnp.concatenate([zeros if p is None else p for p in parts], axis=-1)
        else:
            added = self.delta(name, x_BTK, key, layer, dtype)
        return y_BTN if added is None else y_BTN + added.astype(y_BTN.dtype)


def init(model: EncoderConfig, config: LoraConfig, seed: int) -> dict:
    """Return fresh parameters: {block: {projection: {lora_a, lora_b}}}.

    `lora_a` is uniform within 1 / sqrt(in), as in PEFT; `lora_b` is zero. Raises UserError where
    the rank exceeds the width of the model.
    """
    if config.rank > model.width:
        raise UserError(f"LoRA rank {config.rank} exceeds the width of the model, {model.width}")
    sizes = {"fc1": (model.width, model.fc1_width), "fc2": (model.ffn, model.width)}

    def projection(layer: int, name: str) -> dict:
        inputs, outputs = sizes.get(name, (model.width, model.width))
        key = jax.random.key(fold_all(seed, purpose("lora"), layer, PROJECTIONS.index(name)))
        bound = inputs**-0.5
        a = jax.random.uniform(key, (inputs, config.rank), minval=-bound, maxval=bound)
        return {"lora_a": {"kernel": a}, "lora_b": {"kernel": jnp.zeros((config.rank, outputs))}}

    return {
        str(layer): {name: projection(layer, name) for name in config.projections}
        for layer in range(model.layers)
    }


def merge(params: dict, lora_params: dict, config: LoraConfig) -> dict:
    """Return encoder parameters with LoRA's products added to the kernels, on the host in fp32."""
    merged = params | {"blocks": dict(params["blocks"])}
    for layer, projections in lora_params.items():
        block = dict(merged["blocks"][layer])
        for name, pair in projections.items():
            a, b = (np.asarray(pair[side]["kernel"], np.float64) for side in ("lora_a", "lora_b"))
            target = "qkv" if name in FUSED else name
            kernel = np.array(block[target]["kernel"], np.float64)
            size = b.shape[1]
            start = size * FUSED.index(name) if name in FUSED else 0
            kernel[:, start : start + size] += config.scale * (a @ b)
            block[target] = block[target] | {"kernel": kernel.astype(np.float32)}
        merged["blocks"][layer] = block
    return merged
