"""What is written by hand for speed. Each module says why, with what was measured.

    ESM1NV_PLAIN_KERNELS=all python -m esm1nv_jax.main ...

turns it off, to find out whether a kernel is at fault, and `=layer_norm,matmul` only these:
JAX then derives the gradients, and XLA chooses layouts and schedule. The variable is read when a
function is traced. Attention kernels (`flash_gpu`, `flash_tpu` and JAX's own) are turned off by
`--config.compute.attention=xla`. `tests/model/kernels_test.py` holds both forms against each other.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable

import jax

from esm1nv_jax.common.errors import UserError

VARIABLE = "ESM1NV_PLAIN_KERNELS"
NAMES = (
    "attention_xla",
    "gelu",
    "layer_norm",
    "matmul",
    "remat",
    "residual_norm",
)  # modules of this package


def is_plain(name: str) -> bool:
    """Whether the environment asks for JAX's own form of a kernel.

    Raises UserError where the variable names no kernel.
    """
    plain = [word for word in os.environ.get(VARIABLE, "").split(",") if word]
    if unknown := set(plain) - {"all", *NAMES}:
        raise UserError(
            f"{VARIABLE}={min(unknown)} is unknown; there are all, {', '.join(NAMES)}, or several "
            "joined by commas"
        )
    return name in plain or "all" in plain


def token_backend(platform: str, capability: float) -> str:
    """Where a device of this platform runs `residual_norm` and `gelu`: xla has other forms of them.

    `capability` is that of an NVIDIA GPU.
    """
    if platform == "gpu" and capability < 8:
        return "xla"
    return {"gpu": "pallas", "tpu": "pallas_tpu"}.get(platform, "xla")


def with_gradient(name: str, backward: Callable, nondiff_argnums: tuple[int, ...] = ()) -> Callable:
    """A decorator of functions that return (result, residuals of `backward`): calls return the
    result. By `jax.custom_vjp`; differentiated by JAX where the kernel `name` is plain."""

    def decorate(forward: Callable) -> Callable:
        def plain(*args):
            return forward(*args)[0]

        custom = jax.custom_vjp(plain, nondiff_argnums=nondiff_argnums)
        custom.defvjp(forward, backward)

        @functools.wraps(forward)
        def call(*args):
            return plain(*args) if is_plain(name) else custom(*args)

        return call

    return decorate
