"""What an encoder is, and how it is evaluated: frozen values that validate themselves."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp

from esm1nv_jax.common.errors import UserError
from esm1nv_jax.data.vocabulary import ESM1NV, vocabulary
from esm1nv_jax.model.attention import AUTO, BACKENDS
from esm1nv_jax.model.kernels.matmul import ROUNDED

ACTIVATIONS = {
    "gelu_tanh": functools.partial(jax.nn.gelu, approximate=True),
    "gelu_erf": functools.partial(jax.nn.gelu, approximate=False),
}
NORMS = ("pre", "post")
POSITION_KINDS = ("learned", "rotary")
DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}
REMATS = ("none", "dots", "block")


@dataclasses.dataclass(frozen=True)
class EncoderConfig:
    """The architecture. The defaults are ESM-1nv with room for 1,024 residues and two specials."""

    layers: int = 6
    width: int = 768
    heads: int = 12
    ffn: int = 3072
    positions: int = 1026
    norm: str = "pre"
    ffn_activation: str = "gelu_tanh"
    head_activation: str = "gelu_erf"
    dropout: float = 0.1  # of embeddings and residual branches
    attention_dropout: float = 0.1
    norm_epsilon: float = 1e-5
    # What models from elsewhere need (docs/interchange.md).
    position_kind: str = "learned"
    embedding_norm: bool = False  # a LayerNorm on the embeddings too, as ESM-1b; post has it always
    token_dropout: bool = False  # as ESM-1b and ESM-2: no embedding at <mask>, the others scaled
    vocabulary: str = ESM1NV  # the model's tokens in the order of its own ids; ids here are ours

    def __post_init__(self):
        for name in ("layers", "width", "heads", "ffn"):
            if getattr(self, name) < 1:
                raise UserError(f"model.{name}={getattr(self, name)} must be at least 1")
        if self.positions < 3:
            raise UserError(
                f"model.positions={self.positions} must be at least 3: <s>, one residue, </s>"
            )
        if self.width % self.heads:
            fitting = [h for h in range(1, self.width + 1) if self.width % h == 0 and h <= 64]
            raise UserError(
                f"model.heads={self.heads} does not divide model.width={self.width}; "
                f"heads may be {', '.join(map(str, fitting))}"
            )
        for name, allowed in (
            ("norm", NORMS),
            ("position_kind", POSITION_KINDS),
            ("ffn_activation", tuple(ACTIVATIONS)),
            ("head_activation", tuple(ACTIVATIONS)),
        ):
            if getattr(self, name) not in allowed:
                raise UserError(
                    f"model.{name}={getattr(self, name)!r} is unknown; there are "
                    f"{', '.join(allowed)}"
                )
        for name in ("dropout", "attention_dropout"):
            if not 0 <= getattr(self, name) < 1:
                raise UserError(f"model.{name}={getattr(self, name)} is not in [0, 1)")
        if self.norm_epsilon <= 0:
            raise UserError(f"model.norm_epsilon={self.norm_epsilon} must be above 0")
        if self.position_kind == "rotary" and self.width // self.heads % 2:
            raise UserError(
                f"model.position_kind='rotary' turns pairs: a head of {self.width // self.heads} "
                "(model.width / model.heads) must be even"
            )
        if self.embedding_norm and self.norm == "post":
            raise UserError("model.embedding_norm=True is for norm='pre'; 'post' has it anyway")
        vocabulary(self.vocabulary)  # raises UserError


@dataclasses.dataclass(frozen=True)
class Compute:
    """How the encoder is evaluated; none of it changes what is computed, rounding apart."""

    dtype: str = "float32"  # of the operands of matrix products
    activations: str = "float32"  # in which results are kept between products; the residual is fp32
    remat: str = "none"  # what the backward computes again: nothing, all but products, each block
    native: bool = True  # whether the device multiplies `dtype`; else rounded operands, as fp32
    attention: str = AUTO  # a backend that `attention.choose` found fit; auto is xla here

    @property
    def operands(self):
        """What `products.product` takes for a dtype."""
        emulated = self.dtype == "bfloat16" and not self.native
        return ROUNDED if emulated else DTYPES[self.dtype]

    def __post_init__(self):
        for name, allowed in (
            ("dtype", tuple(DTYPES)),
            ("activations", tuple(DTYPES)),
            ("remat", REMATS),
            ("attention", (AUTO, *BACKENDS)),
        ):
            if getattr(self, name) not in allowed:
                raise UserError(
                    f"compute.{name}={getattr(self, name)!r} is unknown; there are "
                    f"{', '.join(allowed)}"
                )
