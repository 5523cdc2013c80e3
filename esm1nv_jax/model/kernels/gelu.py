"""GELU whose backward also sums up the gradient of the bias inside its operand.

XLA writes the gradient of the operand, then reads all of it again for the sum over tokens: 6,144
bytes a token of the card's FFN in bf16. Here one kernel does both (docs/performance.md).
"""

from __future__ import annotations

import functools
import math

import jax
import jax.numpy as jnp

from esm1nv_jax.model.kernels.token_kernel import token_kernel

_SLOPE, _CUBIC = math.sqrt(8 / math.pi), 0.044715


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def gelu_of_biased(backend: str, x_BTF, bias_F):
    """Returns GELU of x in its tanh form, computed in fp32, in the dtype of x.

    `bias_F` is part of x already, as a constant: only its gradient comes from here. `backend` is
    pallas (GPUs) or pallas_tpu.
    """
    del backend, bias_F
    return jax.nn.gelu(x_BTF.astype(jnp.float32), approximate=True).astype(x_BTF.dtype)


def _forward(backend, x_BTF, bias_F):
    return gelu_of_biased(backend, x_BTF, bias_F), x_BTF


def _backward(backend, x_BTF, g_BTF):
    dx_BTF, sums = token_kernel(
        backend,
        "gelu_backward",
        _backward_tokens,
        jnp.zeros(len(x_BTF), jnp.uint32),
        (x_BTF, g_BTF),
        (),
        (x_BTF.dtype,),
        num_sums=1,
        split_columns=True,
    )
    return dx_BTF, jnp.sum(sums, axis=(0, 1, 2))


gelu_of_biased.defvjp(_forward, _backward)


def _backward_tokens(place, x, g):
    """The gradient of x, which is that of the bias by each token, too."""
    del place
    # (1 + tanh(z)) / 2 is the sigmoid of 2 z; powers of two are what a GPU computes.
    z = _SLOPE * (x + _CUBIC * x * x * x)
    gate = 1 / (1 + jnp.exp2(-math.log2(math.e) * z))
    dz = _SLOPE * (1 + 3 * _CUBIC * x * x)
    dx = g * (gate + x * gate * (1 - gate) * dz)
    return (dx,), (dx,)
