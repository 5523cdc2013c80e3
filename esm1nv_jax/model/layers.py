"""Flax's layers with the kernels of this package, and what stands between them."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx

from esm1nv_jax.model.dropout import DropoutKey, dropout
from esm1nv_jax.model.encoder_config import DTYPES, FFN_ACTIVATIONS, ComputeConfig, EncoderConfig
from esm1nv_jax.model.kernels.layer_norm import layer_norm
from esm1nv_jax.model.kernels.matmul import matmul
from esm1nv_jax.model.kernels.remat import cast_with_gradient


class Linear(nnx.Linear):
    """`nnx.Linear` by our `matmul`: fp32 sums and gradients, results in the activation dtype."""

    def __init__(self, D_in: int, D_out: int, compute: ComputeConfig, rngs: nnx.Rngs, bias=True):
        def dot_general(x, kernel, *_, **__):
            return matmul(x, kernel, compute.operand_dtype, False)

        def keep_dtypes(arrays, **_):  # `matmul` casts its operands itself
            return arrays

        super().__init__(
            D_in,
            D_out,
            use_bias=bias,
            dot_general=dot_general,
            promote_dtype=keep_dtypes,
            rngs=rngs,
        )
        self.activation_dtype = compute.activation_dtype

    def __call__(self, inputs, out_sharding=None):
        y = super().__call__(inputs, out_sharding)
        if self.activation_dtype == "float32":
            return y
        return cast_with_gradient(y, DTYPES[self.activation_dtype])


class LayerNorm(nnx.LayerNorm):
    """`nnx.LayerNorm` in fp32, with the gradient of `kernels.layer_norm`; the result in `dtype`.
    By `config.norm_kind` without its bias, or without its mean, too (RMSNorm)."""

    def __init__(self, config: EncoderConfig, dtype: str, rngs: nnx.Rngs, bias=True):
        super().__init__(
            config.width,
            epsilon=config.norm_epsilon,
            dtype=DTYPES[dtype],
            use_bias=bias and config.norm_kind == "layernorm",
            rngs=rngs,
        )
        self.centered = config.norm_kind != "rmsnorm"

    def __call__(self, x):  # type: ignore[override]  # Flax's has a mask
        assert self.scale is not None
        scale = self.scale[...]
        bias = jnp.zeros_like(scale) if self.bias is None else self.bias[...]
        return layer_norm(x, scale, bias, self.epsilon, self.dtype, self.centered)


def activate(name: str, x):
    """An activation in fp32, returned in the dtype of x. With bf16 x the backward keeps x only.

    Under `jax.checkpoint` XLA cannot find the two computations equal and store the first, so tanh,
    and below the mask of dropout, are never written to memory.
    """
    activation = FFN_ACTIVATIONS[name]
    if x.dtype == jnp.float32:
        return activation(x)
    return jax.checkpoint(lambda x: activation(x.astype(jnp.float32)).astype(x.dtype))(x)


def add_residual(x_BTD, branch_BTD, rate: float, key: DropoutKey | None, layer: int, site: int):
    """The fp32 residual plus a branch under dropout, whose mask the backward draws again."""

    def dropped(branch_BTD, key):
        return dropout(branch_BTD.astype(jnp.float32), rate, key, layer, site)

    return x_BTD + jax.checkpoint(dropped)(branch_BTD, key)
