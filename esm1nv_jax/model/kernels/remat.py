"""What the backward pass keeps, casts and computes again, where XLA by itself would keep more.

Measured on programs compiled for an A100 (docs/performance.md): the barrier of `cast_with_gradient`
took a third of the bytes of a step away; the order that `checkpoint_block` imposes, 14.2 GB of
temporary memory to 7.1 (3 layers, 105 rows of 1,152); the gather in the backward of
`gather_positions`, 3 KB a token.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from esm1nv_jax.model.kernels import is_plain, with_gradient

# Names (`checkpoint_name`) of values that are expensive to compute again: results of the two widest
# products of a block, and what the backward of an attention kernel needs.
QKV, FC1, FUSED_ATTENTION = "qkv", "fc1", "attention"
# What is kept of a block, besides its input, by `compute.remat`; with "none" all is kept.
KEPT = {"dots": (QKV, FC1, FUSED_ATTENTION), "block": ()}


def _cast_backward(dtype, _, g):
    return (jax.lax.optimization_barrier(g).astype(jnp.float32),)


@with_gradient("remat", _cast_backward, nondiff_argnums=(1,))
def cast_with_gradient(x, dtype):
    """fp32 x in `dtype`, and so its gradient: really written as `dtype`, and read so by all.

    XLA keeps an fp32 copy beside a bf16 one where it may ("excess precision"), at three times the
    bytes. It may not across the barrier.
    """
    return x.astype(dtype), None


@with_gradient("remat", lambda _, g: _cast_backward(None, None, g))
def round_to_bfloat16(x):
    """fp32 x in bf16, and so its gradient. x is rounded for certain: without `reduce_precision` XLA
    may take the fp32 values where it computes on, and without the barrier write them, too."""
    x = jax.lax.reduce_precision(x, 8, 7)
    return jax.lax.optimization_barrier(x.astype(jnp.bfloat16)), None


def checkpoint_block(run, remat: str):
    """`jax.checkpoint` of `run((params, x_BTD, rope), others)` that keeps the values `KEPT[remat]`
    and computes gradients in order. Others get no gradient.

    XLA's latency-hiding scheduler undoes a plain checkpoint: it puts all products for weights off
    to the end of the backward, and what they read is kept. So `run` is not computed again before
    its gradient is there, and no gradient is passed on before those of the parameters are there.
    """
    policy = jax.checkpoint_policies.save_only_these_names(*KEPT[remat])
    checkpointed = jax.checkpoint(run, policy=policy)
    if is_plain("remat"):
        return checkpointed

    def forward(differentiable, others):
        return jax.vjp(lambda differentiable: checkpointed(differentiable, others), differentiable)

    def backward(pullback, g_BTD):
        def wait(residual):
            # Activations [B, T, *]; not QKV, which an attention kernel reads in place.
            is_activation = jnp.issubdtype(residual.dtype, jnp.floating) and residual.ndim == 3
            return after(residual, g_BTD) if is_activation else residual

        ((dparams, dx_BTD, drope),) = jax.tree.map(wait, pullback)(g_BTD)
        return (dparams, after(dx_BTD, *jax.tree.leaves(dparams)), drope), None

    in_order = jax.custom_vjp(lambda differentiable, others: checkpointed(differentiable, others))
    in_order.defvjp(forward, backward)
    return in_order


def after(x, *others):
    """x, which XLA cannot schedule before `others` (floats of any value) are computed.

    It removes barriers before it schedules, so x waits for a sum with a zero that XLA does not know
    to be one: a count of at most 32 bits, shifted by 6. Zero times a value would be NaN where that
    value is infinite, and a gradient that overflows in one leaf would spread to all.
    """
    zero = jnp.uint32(0)
    for other in others:
        bits = jax.lax.bitcast_convert_type(other.ravel()[0].astype(jnp.float32), jnp.uint32)
        zero += jax.lax.population_count(bits) >> 6
    return x + zero.astype(x.dtype)


def spread_positions(y_BMD, positions_BM, T: int):
    """[B, T, D]: y at columns `positions_BM` of each row, the first of equal ones; 0 elsewhere."""
    B, M, _ = y_BMD.shape
    rows_B1, entries_M = jnp.arange(B)[:, None], jnp.arange(M, dtype=jnp.int32)
    source_BT = jnp.full((B, T), M, jnp.int32).at[rows_B1, positions_BM].min(entries_M)
    x_BTD = jnp.take_along_axis(y_BMD, jnp.minimum(source_BT, M - 1)[..., None], axis=1)
    return jnp.where((source_BT < M)[..., None], x_BTD, 0)


def _gather_backward(residuals, g_BMD):
    positions_BM, like_T = residuals
    return spread_positions(g_BMD, positions_BM, like_T.shape[0]), None


@with_gradient("remat", _gather_backward)
def gather_positions(x_BTD, positions_BM):
    """Columns `positions_BM` of each row: [B, M, D].

    The positions of a row ascend. Of equal ones only the first passes a gradient on: the others, as
    in `masking.Masked`, predict nothing. The backward gathers, too: a scatter would first write
    zeros to memory.
    """
    y_BMD = jnp.take_along_axis(x_BTD, positions_BM[..., None], axis=1)
    return y_BMD, (positions_BM, jnp.zeros((x_BTD.shape[1], 0)))
