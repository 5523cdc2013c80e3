"""Attention over packed rows: no query attends to a key of another segment, or to padding.

One function and several backends that return the same numbers. `unsupported_reason` says what a
backend cannot do, and `select_backend` takes the first that can do what a run needs. A new backend
is a name in BACKENDS, a reason or none in `unsupported_reason`, and a branch of `attention`.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from esm1nv_jax.common.errors import UserError
from esm1nv_jax.model.kernels.attention_xla import xla_attention
from esm1nv_jax.model.kernels.remat import gather_positions

BACKENDS = ("cudnn", "pallas", "pallas_tpu", "splash", "xla")  # in order of preference
_MAX_TPU_LENGTH = 16384  # of a row: the backward of pallas_tpu keeps 2 KiB a token on the chip
AUTO = "auto"  # the first that is supported, once the device is known


@dataclasses.dataclass(frozen=True)
class AttentionSpec:
    """What a backend must support."""

    platform: str  # cpu, gpu or tpu
    capability: float  # of an NVIDIA GPU, such as 8.0; 0 elsewhere
    dtype: str  # of the operands of both products
    packed: bool  # several sequences a row
    rate: float  # attention dropout
    head_size: int
    row_length: int


def unsupported_reason(backend: str, spec: AttentionSpec) -> str:
    """Why `backend` cannot compute `spec`; empty if it can."""
    if backend == "xla":
        return ""
    platform = "tpu" if backend in ("pallas_tpu", "splash") else "gpu"
    if spec.platform != platform:
        return f"it runs on {platform}, not on {spec.platform}"
    if platform == "gpu" and spec.capability < 8:
        return f"it needs compute capability 8.0 or more, this GPU has {spec.capability}"
    if spec.dtype != "bfloat16":
        return f"its products are in bfloat16, compute.dtype is {spec.dtype}"
    if backend in ("pallas", "pallas_tpu"):
        if backend == "pallas_tpu" and spec.row_length > _MAX_TPU_LENGTH:
            return f"it needs rows of at most {_MAX_TPU_LENGTH}, data.row_length={spec.row_length}"
        if spec.head_size > 128:
            return f"it needs heads of at most 128, not {spec.head_size}"
        return ""
    if spec.rate:
        return f"it has no attention dropout, model.attention_dropout is {spec.rate}"
    if backend == "cudnn":
        if spec.packed:
            return "it masks by the length of one sequence a row and would mix packed ones"
        if spec.head_size > 128 or spec.head_size % 8:
            return f"it needs heads of at most 128, a multiple of 8, not {spec.head_size}"
        if spec.row_length % 2:
            return f"it needs rows of even length, data.row_length is {spec.row_length}"
    elif spec.row_length % 128:
        return f"it needs rows of a multiple of 128, data.row_length is {spec.row_length}"
    return ""


def select_backend(name: str, spec: AttentionSpec) -> str:
    """The backend for `name`: itself, or the first that is supported where it is `auto`.

    Raises UserError where the one named is unknown or not supported.
    """
    supported = [backend for backend in BACKENDS if not unsupported_reason(backend, spec)]
    if name == AUTO:
        return supported[0]
    if name not in BACKENDS:
        raise UserError(
            f"compute.attention={name!r} is unknown; there are {', '.join((AUTO, *BACKENDS))}"
        )
    if name not in supported:
        raise UserError(
            f"compute.attention={name} cannot be used: {unsupported_reason(name, spec)}; "
            f"supported here: {', '.join((AUTO, *supported))}"
        )
    return name


def attention(
    qkv_BTCNH,
    segment_ids_BT,
    dtype,
    rate=0.0,
    row_keys_B=None,
    backend="xla",
    chip: str = "",
    queries_BM=None,
):
    """softmax(q k / sqrt(H)) v within each segment.

    Args:
      qkv_BTCNH: queries, keys and values, C = 3.
      segment_ids_BT: int32, 0 in padding.
      dtype: of the operands of both products; scores and softmax are fp32.
      rate: dropout of the attention probabilities, with `row_keys_B` (uint32, one a row), by
        `dropout.attention_mask` in every backend.
      backend: as `select_backend` returns it; `auto` means xla, which supports everything.
      chip: the `device_kind` of a GPU whose measured tile sizes the kernel should take.
      queries_BM: int32, the columns of each row that attend, ascending; by default all.

    Returns:
      [B, T, N, H], or [B, M, N, H] of `queries_BM`, fp32 (xla) or `dtype` (the others); 0 in
      padding.
    """
    rate = rate if row_keys_B is not None else 0.0
    if backend in (AUTO, "xla"):
        return xla_attention(qkv_BTCNH, segment_ids_BT, dtype, rate, row_keys_B, queries_BM)
    if queries_BM is not None:  # kernels compute tiles of queries: all of them
        out_BTNH = attention(qkv_BTCNH, segment_ids_BT, dtype, rate, row_keys_B, backend, chip)
        return jax.vmap(gather_positions, (2, None), 2)(out_BTNH, queries_BM)
    qkv_BTCNH = qkv_BTCNH.astype(dtype)
    # Pallas takes 0.1 s to import, and a CPU never needs it.
    if backend == "pallas":
        from esm1nv_jax.model.kernels import flash_gpu

        blocks = flash_gpu.Blocks.of(chip)
        return flash_gpu.flash_attention(qkv_BTCNH, segment_ids_BT, rate, row_keys_B, blocks)
    if backend == "pallas_tpu":
        from esm1nv_jax.model.kernels import flash_tpu

        return flash_tpu.flash_attention(qkv_BTCNH, segment_ids_BT, rate, row_keys_B)
    if backend not in BACKENDS or rate:
        raise ValueError(f"{backend} attention with dropout {rate}: call select_backend first")
    return {"cudnn": _cudnn, "splash": _splash}[backend](qkv_BTCNH, segment_ids_BT)


def _cudnn(qkv_BTCNH, segment_ids_BT):
    """cuDNN's kernel, by JAX."""
    # By lengths, never by a mask: cuDNN would take that as a full T x T bias, with a gradient.
    is_real_BT11 = (segment_ids_BT > 0)[:, :, None, None]
    length_B = jnp.sum(segment_ids_BT > 0, axis=1, dtype=jnp.int32)
    # What it writes in padding is undefined, gradients included: both `where` make it zero.
    qkv_BTCNH = jnp.where(is_real_BT11[..., None], qkv_BTCNH, 0)
    out_BTNH = jax.nn.dot_product_attention(
        *(qkv_BTCNH[:, :, c] for c in range(3)),
        query_seq_lengths=length_B,
        key_value_seq_lengths=length_B,
        implementation="cudnn",
    )
    return jnp.where(is_real_BT11, out_BTNH, 0)


def _splash(qkv_BTCNH, segment_ids_BT):
    """JAX's kernel for TPUs."""
    # Pallas again, for TPUs.
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

    _, T, _, N, H = qkv_BTCNH.shape
    kernel = splash.make_splash_mha_single_device(masks.MultiHeadMask([masks.FullMask((T, T))] * N))
    q_BNTH, k_BNTH, v_BNTH = (jnp.moveaxis(qkv_BTCNH[:, :, c], 2, 1) for c in range(3))
    ids = splash.SegmentIds(segment_ids_BT, segment_ids_BT)
    out_BNTH = jax.vmap(kernel)(q_BNTH * H**-0.5, k_BNTH, v_BNTH, ids)
    out_BTNH = jnp.moveaxis(out_BNTH, 1, 2)
    return jnp.where((segment_ids_BT > 0)[:, :, None, None], out_BTNH, 0)
