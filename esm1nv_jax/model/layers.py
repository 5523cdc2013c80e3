"""Flax's layers with the kernels of this package, and what stands between them."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx

from esm1nv_jax.model.dropout import DropoutKey, dropout
from esm1nv_jax.model.encoder_config import DTYPES, FFN_ACTIVATIONS, ComputeConfig, EncoderConfig
from esm1nv_jax.model.kernels.layer_norm import layer_norm
from esm1nv_jax.model.kernels.matmul import matmul
from esm1nv_jax.model.kernels.remat import cast_with_gradient, round_to_bfloat16


class Linear(nnx.Linear):
    """`nnx.Linear` by our `matmul`: fp32 sums and gradients, results in the activation dtype."""

    def __init__(self, D_in: int, D_out: int, compute: ComputeConfig, rngs: nnx.Rngs, bias=True):
        super().__init__(D_in, D_out, use_bias=bias, rngs=rngs)
        self.operand_dtype, self.activation_dtype = compute.operand_dtype, compute.activation_dtype

    def __call__(self, x, bias="trained"):  # Flax's has a sharding in the second place
        """`bias`: trained, constant (a kernel that follows has its gradient) or none."""
        y = matmul(x, self.kernel[...], self.operand_dtype, False)
        if bias != "none" and self.bias is not None:
            b = self.bias[...]
            y = y + (jax.lax.stop_gradient(b) if bias == "constant" else b)
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
        return layer_norm(x, *self.parameters(), self.epsilon, self.dtype, self.centered)

    def parameters(self):
        """Scale and bias; zeros in place of a bias that is not there."""
        assert self.scale is not None
        scale = self.scale[...]
        return scale, jnp.zeros_like(scale) if self.bias is None else self.bias[...]


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
    """The residual plus a branch under dropout, whose mask the backward draws again: summed in
    fp32, returned in the dtype of the residual."""

    def dropped(branch_BTD, key):
        return dropout(branch_BTD.astype(jnp.float32), rate, key, layer, site)

    def rounded(x_BTD, branch_BTD, key):
        return round_to_bfloat16(x_BTD.astype(jnp.float32) + dropped(branch_BTD, key))

    if x_BTD.dtype == jnp.float32:
        return x_BTD + jax.checkpoint(dropped)(branch_BTD, key)
    # All of it, or the checkpoint would write the gradient in fp32.
    return jax.checkpoint(rounded)(x_BTD, branch_BTD, key)


def add_residual_and_norm(
    x_BTD, branch_BTD, branch_bias, norm: LayerNorm, row_keys_B, rate, branch_scale, backend: str
):
    """(residual, its LayerNorm) as of `add_residual` and `norm`, in one kernel: of a GPU (`backend`
    pallas) or TPU (pallas_tpu). The kernel adds the branch's bias, too, where that is not None."""
    # Pallas takes 0.1 s to import, and a CPU never needs it.
    from esm1nv_jax.model.kernels.residual_norm import ResidualNorm, residual_norm

    if row_keys_B is None:
        rate, row_keys_B = 0.0, jnp.zeros(len(x_BTD), jnp.uint32)
    config = ResidualNorm(backend, norm.dtype, norm.epsilon, norm.centered, rate, branch_scale)
    scale, bias = norm.parameters()
    branch_bias = jnp.zeros_like(scale) if branch_bias is None else branch_bias[...]
    return residual_norm(config, x_BTD, branch_BTD, branch_bias, scale, bias, row_keys_B)
