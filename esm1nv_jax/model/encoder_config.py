"""The architecture of an encoder and how it is computed: frozen values that validate themselves."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp

from esm1nv_jax.common.errors import UserError, check_choices
from esm1nv_jax.data.tokenizer import ESM1NV, vocabulary
from esm1nv_jax.model.attention import AUTO, BACKENDS
from esm1nv_jax.model.kernels import is_plain
from esm1nv_jax.model.kernels.matmul import EMULATED_BFLOAT16
from esm1nv_jax.model.kernels.remat import KEPT


def _gelu_erf(x):
    """x (1 + erf(x / sqrt(2))) / 2, as PyTorch computes it. JAX's own, by erfc, is three passes
    over x on a CPU, one of them of exponentials: docs/performance.md#training."""
    return 0.5 * x * (1 + jax.lax.erf(x * math.sqrt(0.5)))


ACTIVATIONS: dict[str, Callable] = {
    "gelu_tanh": functools.partial(jax.nn.gelu, approximate=True),
    "gelu_erf": _gelu_erf,
}
# Of the FFN also SwiGLU (Shazeer 2020): fc1 makes a gate beside each value.
FFN_ACTIVATIONS = ACTIVATIONS | {
    "swiglu": lambda x: jax.nn.silu(x[..., : x.shape[-1] // 2]) * x[..., x.shape[-1] // 2 :]
}
NORMS = ("pre", "post")
NORM_KINDS = ("layernorm", "layernorm_no_bias", "rmsnorm")
POSITION_KINDS = ("learned", "rotary")
DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}
REMATS = ("none", *KEPT)


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
    attention_dropout: float = 0.1  # the nearest multiple of 1/256 is used
    norm_epsilon: float = 1e-5
    # What models from elsewhere need (docs/interchange.md).
    position_kind: str = "learned"
    embedding_norm: bool = False  # a LayerNorm on the embeddings too, as ESM-1b; post has it always
    token_dropout: bool = False  # as ESM-1b and ESM-2: no embedding at <mask>, the others scaled
    bias_kv: bool = False  # as ESM-1: each head has a key and a value of its own in place of </s>'s
    bare_head: bool = False  # as ESM-1: no final norm; the LM head is its output matrix and bias
    vocabulary: str = ESM1NV  # the model's tokens in the order of its own ids; ids here are ours
    # What encoders since 2023 do otherwise (configs/modern.py, ESMC).
    norm_kind: str = "layernorm"
    bias: bool = True  # of the linear layers of the blocks and of the final norm, as ESMC has none
    qk_norm: bool = False  # queries and keys normalized over the whole width, before the rotation
    tied_head: bool = True  # whether the LM head's output matrix is the token embedding
    branch_scale: float = 1.0  # factor of each residual branch

    @property
    def head_size(self) -> int:
        return self.width // self.heads

    @property
    def final_norm(self) -> bool:
        """Whether a LayerNorm stands after the last block."""
        return self.norm == "pre" and not self.bare_head

    @property
    def fc1_width(self) -> int:
        """Columns of the first layer of the FFN: gates and values, or values alone."""
        return 2 * self.ffn if self.ffn_activation == "swiglu" else self.ffn

    def __post_init__(self):
        for name in ("layers", "width", "heads", "ffn"):
            if getattr(self, name) < 1:
                raise UserError(f"model.{name}={getattr(self, name)} must be at least 1")
        if self.positions < 3:
            raise UserError(
                f"model.positions={self.positions} must be at least 3: <s>, one residue, </s>"
            )
        if self.width % self.heads:
            divisors = [h for h in range(1, min(self.width, 64) + 1) if self.width % h == 0]
            raise UserError(
                f"model.heads={self.heads} does not divide model.width={self.width}; "
                f"heads may be {', '.join(map(str, divisors))}"
            )
        check_choices(
            "model",
            self,
            norm=NORMS,
            norm_kind=NORM_KINDS,
            position_kind=POSITION_KINDS,
            ffn_activation=FFN_ACTIVATIONS,
            head_activation=ACTIVATIONS,
        )
        for name in ("dropout", "attention_dropout"):
            if not 0 <= getattr(self, name) < 1:
                raise UserError(f"model.{name}={getattr(self, name)} is not in [0, 1)")
        for name in ("norm_epsilon", "branch_scale"):
            if not 0 < getattr(self, name) < math.inf:
                raise UserError(f"model.{name}={getattr(self, name)} must be above 0, and finite")
        if self.position_kind == "rotary" and self.head_size % 2:
            raise UserError(
                f"model.position_kind='rotary' rotates pairs: the head size {self.head_size} "
                "(model.width / model.heads) must be even"
            )
        if self.embedding_norm and self.norm == "post":
            raise UserError("model.embedding_norm=True is for norm='pre'; 'post' has it anyway")
        if self.bare_head and self.norm == "post":
            raise UserError(
                "model.bare_head=True is for norm='pre'; 'post' has no final norm anyway"
            )
        vocabulary(self.vocabulary)  # raises UserError


@dataclasses.dataclass(frozen=True)
class ComputeConfig:
    """How the encoder is evaluated; none of it changes what is computed, rounding apart."""

    dtype: str = "float32"  # of the operands of matrix products
    activation_dtype: str = "float32"  # of results between products, but the residual stream
    residual_dtype: str = "float32"  # of the residual stream and its gradient, between sums in fp32
    remat: str = "none"  # what the backward computes again: none, dots or block (kernels/remat.py)
    emulate_bfloat16: bool = False  # bf16 operands as rounded fp32, where a CPU lacks instructions
    attention: str = AUTO  # a backend that `select_backend` returned; auto is xla here
    token_kernels: str = "xla"  # where `residual_norm` and `gelu` run: pallas (GPU), pallas_tpu
    chip: str = ""  # `device_kind` of a GPU, for tile sizes that were measured on it

    @property
    def operand_dtype(self):
        """What `matmul` takes for a dtype."""
        emulated = self.dtype == "bfloat16" and self.emulate_bfloat16
        return EMULATED_BFLOAT16 if emulated else DTYPES[self.dtype]

    def backend(self, kernel: str) -> str:
        """`token_kernels`, or xla where the environment asks for the plain form of the kernel."""
        return "xla" if is_plain(kernel) else self.token_kernels

    def __post_init__(self):
        check_choices(
            "compute",
            self,
            dtype=DTYPES,
            activation_dtype=DTYPES,
            residual_dtype=DTYPES,
            remat=REMATS,
            attention=(AUTO, *BACKENDS),
            token_kernels=("xla", "pallas", "pallas_tpu"),
        )
