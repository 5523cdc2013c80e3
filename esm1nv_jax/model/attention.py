"""Attention over packed rows: no query sees a key of another segment, padding sees nothing.

One function, several backends that give the same numbers. Whatever a backend cannot do is refused
by name (`unfit`), and `choose` takes the first that is fit.
"""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from esm1nv_jax.common.errors import UserError
from esm1nv_jax.model import dropout as dropout_lib
from esm1nv_jax.model.kernels.matmul import laid_out, operand, precision, turned

BACKENDS = ("cudnn", "pallas", "splash", "xla")  # in order of preference
AUTO = "auto"  # the first that is fit, once the device is known
FUSED_ATTENTION = "attention"  # names what a kernel's backward needs, for remat policies

_NEVER = -1e30  # exp(_NEVER - anything seen) is exactly 0 in fp32


@dataclasses.dataclass(frozen=True)
class Case:
    """What the fitness of a backend depends on."""

    platform: str  # cpu, gpu or tpu
    capability: float  # of an NVIDIA GPU, such as 8.0; 0 elsewhere
    dtype: str  # of the operands of both products
    packed: bool  # several sequences a row
    rate: float  # attention dropout
    head_size: int
    row_length: int


def unfit(backend: str, case: Case) -> str:
    """Why `backend` cannot compute `case`; empty if it can."""
    if backend == "xla":
        return ""
    platform = "tpu" if backend == "splash" else "gpu"
    if case.platform != platform:
        return f"it runs on {platform}, not on {case.platform}"
    if platform == "gpu" and case.capability < 8:
        return f"it needs compute capability 8.0 or more, this GPU has {case.capability}"
    if case.dtype != "bfloat16":
        return f"its products are in bfloat16, compute.dtype is {case.dtype}"
    if backend == "pallas":
        if case.head_size not in (16, 32, 64, 128):
            return f"its heads are 16, 32, 64 or 128 wide, these {case.head_size}"
        return ""
    if case.rate:
        return f"it has no attention dropout, model.attention_dropout is {case.rate}"
    if backend == "cudnn":
        if case.packed:
            return "it masks by the length of one sequence a row and would mix packed ones"
        if case.head_size > 128 or case.head_size % 8:
            return f"its heads are at most 128 wide, in eights, these {case.head_size}"
        if case.row_length % 2:
            return f"its rows are of even length, data.row_length is {case.row_length}"
    elif case.row_length % 128:
        return f"its rows are multiples of 128 tokens, data.row_length is {case.row_length}"
    return ""


def choose(name: str, case: Case) -> str:
    """The backend for `name`: itself, or the first that is fit where it is `auto`.

    Raises UserError where the one named is unknown or not fit.
    """
    if name == AUTO:
        return next(backend for backend in BACKENDS if not unfit(backend, case))
    if name not in BACKENDS:
        raise UserError(
            f"compute.attention={name!r} is unknown; there are {', '.join((AUTO, *BACKENDS))}"
        )
    if reason := unfit(name, case):
        raise UserError(
            f"compute.attention={name} cannot be used: {reason}; fit here: "
            f"{', '.join((AUTO, *(b for b in BACKENDS if not unfit(b, case))))}"
        )
    return name


def attention(qkv_BTCNH, segment_ids_BT, dtype, rate=0.0, row_keys_B=None, backend="xla"):
    """Softmax(q k / sqrt(H)) v within each segment.

    Args:
      qkv_BTCNH: queries, keys and values, C = 3.
      segment_ids_BT: int32, 0 in padding.
      dtype: of the operands of both products; scores and softmax are fp32.
      rate: dropout of the attention probabilities, with `row_keys_B` (uint32, one a row): element
        (head T + query) T + key of the row, in every backend.
      backend: one that is fit, as `choose` says; `auto` means xla, which always is.

    Returns:
      [B, T, N, H], fp32 (xla) or `dtype` (the others); 0 in padding.
    """
    rate = rate if row_keys_B is not None else 0.0
    if backend in (AUTO, "xla"):
        return _xla(qkv_BTCNH, segment_ids_BT, dtype, rate, row_keys_B)
    qkv_BTCNH = qkv_BTCNH.astype(dtype)
    if backend == "pallas":
        from esm1nv_jax.model.kernels.flash_gpu import flash_attention

        return flash_attention(qkv_BTCNH, segment_ids_BT, rate, row_keys_B)
    if backend not in BACKENDS or rate:
        raise ValueError(f"attention backend {backend} with dropout {rate}: ask `choose` first")
    return {"cudnn": _cudnn, "splash": _splash}[backend](qkv_BTCNH, segment_ids_BT)


def _xla(qkv_BTCNH, segment_ids_BT, dtype, rate, row_keys_B):
    qkv_CBNTH = jnp.transpose(qkv_BTCNH, (2, 0, 3, 1, 4))
    mixed_BNTH = _mix(qkv_CBNTH, segment_ids_BT, row_keys_B, dtype, rate)
    seen_BT = segment_ids_BT > 0
    return jnp.where(seen_BT[:, :, None, None], jnp.swapaxes(mixed_BNTH, 1, 2), 0)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def _mix(qkv_CBNTH, segment_ids_BT, row_keys_B, dtype, rate):
    """Attention with T x T scores in memory; the weights are normalised after the product with v.

    Its gradient is written out, as a kernel's would be: with autodiff's, XLA's CPU backend merges
    the softmax into the product and takes more than twice the time.
    """
    return _mix_forward(qkv_CBNTH, segment_ids_BT, row_keys_B, dtype, rate)[0]


def _mix_forward(qkv_CBNTH, segment_ids_BT, row_keys_B, dtype, rate):
    q_BNTH, k_BNSH, v_BNSH = qkv_CBNTH
    q_BNTH = q_BNTH * q_BNTH.shape[-1] ** -0.5
    operands = [laid_out(operand(x, dtype)) for x in (q_BNTH, k_BNSH, v_BNSH)]
    q_BNTH, k_BNSH, v_BNSH = operands
    scores_BNTS = _einsum("BNTH,BNSH->BNTS", q_BNTH, k_BNSH, dtype)
    same_BTS = segment_ids_BT[:, :, None] == segment_ids_BT[:, None, :]
    scores_BNTS = jnp.where(same_BTS[:, None], scores_BNTS, _NEVER)
    weights_BNTS = jnp.exp(scores_BNTS - jnp.max(scores_BNTS, axis=-1, keepdims=True))
    total_BNT1 = jnp.sum(weights_BNTS, axis=-1, keepdims=True)
    kept_BNTS = weights_BNTS * _scale(weights_BNTS.shape, rate, row_keys_B)
    mixed_BNTH = _einsum("BNTS,BNSH->BNTH", kept_BNTS, v_BNSH, dtype) / total_BNT1
    like = jnp.zeros((0,), qkv_CBNTH.dtype)
    return mixed_BNTH, (operands, like, row_keys_B, weights_BNTS, total_BNT1, mixed_BNTH)


def _mix_backward(dtype, rate, residuals, g_BNTH):
    operands, like, row_keys_B, weights_BNTS, total_BNT1, mixed_BNTH = residuals
    q_BNTH, k_BNSH, v_BNSH = operands
    g_BNTH = g_BNTH / total_BNT1
    scale_BNTS = _scale(weights_BNTS.shape, rate, row_keys_B)
    through_total_BNT1 = jnp.sum(g_BNTH * mixed_BNTH, axis=-1, keepdims=True)
    g_BNTH = laid_out(operand(g_BNTH, dtype))
    dv_BNSH = _over_queries(weights_BNTS * scale_BNTS, g_BNTH, dtype)
    dkept_BNTS = _einsum("BNTH,BNSH->BNTS", g_BNTH, v_BNSH, dtype)
    dscores_BNTS = weights_BNTS * (dkept_BNTS * scale_BNTS - through_total_BNT1)
    dq_BNTH = _einsum("BNTS,BNSH->BNTH", dscores_BNTS, k_BNSH, dtype) * q_BNTH.shape[-1] ** -0.5
    dk_BNSH = _over_queries(dscores_BNTS, q_BNTH, dtype)
    return jnp.stack([dq_BNTH, dk_BNSH, dv_BNSH]).astype(like.dtype), None, None


_mix.defvjp(_mix_forward, _mix_backward)


def _over_queries(a_BNTS, b_BNTH, dtype):
    """[B, N, S, H], with the small arrays turned, not the large one."""
    return turned(_einsum("BNHT,BNTS->BNHS", turned(b_BNTH), a_BNTS, dtype))


def _einsum(pattern: str, a, b, dtype):
    return jnp.einsum(
        pattern,
        operand(a, dtype),
        operand(b, dtype),
        preferred_element_type=jnp.float32,
        precision=precision(dtype),
    )


def _scale(shape, rate, row_keys_B):
    """What dropout multiplies each weight with: 0 or 1 / (1 - rate); 1 where there is none."""
    if not rate:
        return np.float32(1)
    _, N, T, _ = shape
    kept_BNTS = dropout_lib.keep(row_keys_B[:, None, None, None], _element_NTS(N, T), rate)
    return kept_BNTS * np.float32(1 / (1 - rate))


def _element_NTS(N: int, T: int):
    """uint32: the index of a probability in its row, the dropout element of every backend."""
    n, t, s = (jax.lax.broadcasted_iota(jnp.uint32, (N, T, T), axis) for axis in range(3))
    return (n * np.uint32(T) + t) * np.uint32(T) + s


def _cudnn(qkv_BTCNH, segment_ids_BT):
    # By lengths, never by a mask: cuDNN would take that as a full T x T bias, with a gradient.
    seen_BT11 = (segment_ids_BT > 0)[:, :, None, None]
    length_B = jnp.sum(segment_ids_BT > 0, axis=1, dtype=jnp.int32)
    # It promises nothing of what it writes in padding, gradients included: this makes them zero.
    qkv_BTCNH = jnp.where(seen_BT11[..., None], qkv_BTCNH, 0)
    mixed_BTNH = jax.nn.dot_product_attention(
        *(qkv_BTCNH[:, :, c] for c in range(3)),
        query_seq_lengths=length_B,
        key_value_seq_lengths=length_B,
        implementation="cudnn",
    )
    return jnp.where(seen_BT11, mixed_BTNH, 0)


def _splash(qkv_BTCNH, segment_ids_BT):
    """JAX's own kernel for TPUs."""
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

    _, T, _, N, H = qkv_BTCNH.shape
    kernel = splash.make_splash_mha_single_device(masks.MultiHeadMask([masks.FullMask((T, T))] * N))
    q_BNTH, k_BNTH, v_BNTH = (jnp.moveaxis(qkv_BTCNH[:, :, c], 2, 1) for c in range(3))
    ids = splash.SegmentIds(segment_ids_BT, segment_ids_BT)
    mixed_BNTH = jax.vmap(kernel)(q_BNTH * H**-0.5, k_BNTH, v_BNTH, ids)
    mixed_BTNH = jnp.moveaxis(mixed_BNTH, 1, 2)
    return jnp.where((segment_ids_BT > 0)[:, :, None, None], mixed_BTNH, 0)
