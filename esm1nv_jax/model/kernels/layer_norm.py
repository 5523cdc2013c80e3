"""What lies between matrix products, with backward passes that move few bytes.

On an accelerator these are bound by memory. Plain autodiff writes every intermediate of the forward
for the backward to read (the tanh of a GELU and each dropout mask at four bytes and one byte an
element), and XLA then cannot fuse what is left. Here the backward reads the inputs and computes the
rest again. `docs/performance.md` has the bytes before and after.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def layer_norm(x, scale, bias, epsilon: float, dtype):
    """LayerNorm over the last axis, computed in fp32 and given in `dtype`.

    Kept for the backward: x as it came, and two numbers a token.
    """
    return _norm_forward(x, scale, bias, epsilon, dtype)[0]


def _norm_forward(x, scale, bias, epsilon, dtype):
    wide = x.astype(jnp.float32)
    mean = jnp.mean(wide, axis=-1, keepdims=True)
    centred = wide - mean
    spread = jax.lax.rsqrt(jnp.mean(jnp.square(centred), axis=-1, keepdims=True) + epsilon)
    return (centred * spread * scale + bias).astype(dtype), (x, mean, spread, scale)


def _norm_backward(epsilon, dtype, residuals, g):
    x, mean, spread, scale = residuals
    normal = (x.astype(jnp.float32) - mean) * spread
    scaled = g.astype(jnp.float32) * scale
    along = jnp.mean(scaled * normal, axis=-1, keepdims=True)
    dx = spread * (scaled - jnp.mean(scaled, axis=-1, keepdims=True) - normal * along)
    rows = tuple(range(x.ndim - 1))
    # Apart from dx, or XLA writes g * normal to memory between the sums over rows and columns.
    x, g, mean, spread = jax.lax.optimization_barrier((x, g, mean, spread))
    normal = (x.astype(jnp.float32) - mean) * spread
    g = g.astype(jnp.float32)
    return dx.astype(x.dtype), jnp.sum(g * normal, axis=rows), jnp.sum(g, axis=rows)


layer_norm.defvjp(_norm_forward, _norm_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def stored(x, dtype):
    """x in `dtype`, and its gradient, too: really written so, and read so by all that need it.

    XLA keeps fp32 beside a bf16 copy where it may ("excess precision"), at three times the bytes.
    """
    return x.astype(dtype)


stored.defvjp(
    lambda x, dtype: (x.astype(dtype), None),
    lambda dtype, _, g: (jax.lax.optimization_barrier(g).astype(jnp.float32),),
)


def recomputed(function):
    """`function`, of which the backward keeps the inputs only and computes it again.

    `jax.checkpoint` also stops XLA from finding the two computations equal and keeping the first.
    """
    return jax.checkpoint(function)


def rematerialised(run, kept: tuple[str, ...]):
    """`run((weights, x, turn), others)`; the backward keeps its inputs and the values named `kept`.

    Sums with zero keep XLA's latency-hiding scheduler from undoing it: `run` is not computed again
    before its gradient is there, and no gradient is passed on before those of the weights are
    there. Otherwise all products for weights are put off to the end, and what they read is kept:
    14.2 GB for 7.1 GB (3 layers, 105 rows of 1,152). Barriers do not help, for XLA takes them away
    before it schedules. Others (integers) get no gradient.
    """
    checkpointed = jax.checkpoint(run, policy=jax.checkpoint_policies.save_only_these_names(*kept))

    def forward(floats, others):
        return jax.vjp(lambda floats: checkpointed(floats, others), floats)

    def backward(pull, g):
        def after(x, *others):
            nothing = sum(0 * other.ravel()[0].astype(jnp.float32) for other in others)
            return x + nothing.astype(x.dtype)

        def wait(kept):
            # Activations [B, T, *]; not QKV, which a kernel reads as it is.
            wide = jnp.issubdtype(kept.dtype, jnp.floating) and kept.ndim == 3
            return after(kept, g) if wide else kept

        ((weights, dx_BTD, dturn),) = jax.tree.map(wait, pull)(g)
        return (weights, after(dx_BTD, *jax.tree.leaves(weights)), dturn), None

    rematerialising = jax.custom_vjp(lambda floats, others: checkpointed(floats, others))
    rematerialising.defvjp(forward, backward)
    return rematerialising


@jax.custom_vjp
def take(x_BTD, index_BM):
    """Columns `index_BM` of each row: [B, M, D].

    The indices of a row ascend. Of equal ones only the first passes a gradient on: the others, as
    `masking.Masked` makes them, select nothing. The backward gathers, too: a scatter would first
    write zeros to memory.
    """
    return jnp.take_along_axis(x_BTD, index_BM[..., None], axis=1)


def _take_backward(residuals, g_BMD):
    index_BM, like_T = residuals
    B, M, _ = g_BMD.shape
    rows_B1, place_M = jnp.arange(B)[:, None], jnp.arange(M, dtype=jnp.int32)
    from_BT = jnp.full((B, like_T.shape[0]), M, jnp.int32).at[rows_B1, index_BM].min(place_M)
    there_BT1 = (from_BT < M)[..., None]
    found_BTD = jnp.take_along_axis(g_BMD, jnp.minimum(from_BT, M - 1)[..., None], axis=1)
    return jnp.where(there_BT1, found_BTD, 0), None


take.defvjp(
    lambda x_BTD, index_BM: (take(x_BTD, index_BM), (index_BM, jnp.zeros((x_BTD.shape[1], 0)))),
    _take_backward,
)
