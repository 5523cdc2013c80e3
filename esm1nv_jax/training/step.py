"""One update, one evaluation batch: pure functions of state and batch.

The gradient is computed device by device in the one `shard_map` of the project, so that nothing is
gathered whatever the attention backend, and reduced once an update, whatever the number of
microbatches.
"""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from esm1nv_jax.model import encoder, esm2, loss, masking
from esm1nv_jax.model.dropout import DropoutKey
from esm1nv_jax.training.optimizer import OptimizerConfig, optimizer, schedule
from esm1nv_jax.training.scalars import Scalars
from esm1nv_jax.training.sharding import DATA, sharding

# Arrays of a batch, all [B, T].
ON_DEVICE = {
    "tokens": jnp.int32,
    "segment_ids": jnp.int32,
    "positions": jnp.int32,
    "mask_bits": jnp.uint32,
}

# Autotuning picks kernels by the clock, so two starts may pick different ones.
DETERMINISTIC = {"xla_gpu_deterministic_ops": True, "xla_gpu_autotune_level": 0}


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    step: jax.Array  # int32: updates so far
    params: dict
    opt_state: optax.OptState
    nonfinite: jax.Array  # int32: updates whose loss or gradient was not finite


@dataclasses.dataclass(frozen=True)
class StepConfig:
    """All that an update is made of, apart from its arrays."""

    seed: int
    model: encoder.EncoderConfig
    compute: encoder.Compute
    masking: masking.MaskingConfig
    optimizer: OptimizerConfig
    microbatches: int = 1
    reduce_dtype: str = "float32"
    deterministic: bool = False  # on a GPU: the same bits from the same start
    nonfinite_allowed: int = 0  # beyond so many bad updates the state stands still


def create_state(config: StepConfig) -> TrainState:
    params = encoder.init(config.model, config.seed)
    return fresh_state(config, params)


def fresh_state(config: StepConfig, params: dict) -> TrainState:
    """The state before the first update, from parameters of any origin."""
    opt_state = optimizer(config.optimizer).init(params)
    return TrainState(jnp.zeros((), jnp.int32), params, opt_state, jnp.zeros((), jnp.int32))


def batch_sums(config: StepConfig, params, batch, dropout_key):
    """Sums over some rows: what the loss and every figure are made of. fp32 scalars."""
    tokens = esm2.readable(config.model.vocabulary, batch["tokens"])
    masked = masking.mask(config.masking, tokens, batch["segment_ids"], batch["mask_bits"])
    output = encoder.forward(
        config.model,
        params,
        masked.inputs_BT,
        batch["segment_ids"],
        batch["positions"],
        compute=config.compute,
        dropout_key=dropout_key,
        index_BM=masked.index_BM,
    )
    real_BT = batch["segment_ids"] > 0
    first_BT = real_BT & (batch["positions"] == 0)
    tokens, sequences = (jnp.sum(x, dtype=jnp.float32) for x in (real_BT, first_BT))
    return loss.sums(output.logits, masked) | {
        "sequences": sequences,
        "tokens": tokens,  # with <s> and </s>, without padding
        "places": jnp.float32(real_BT.size),
        # The sum of 2 p + 1 over the positions p of a segment is its squared length.
        "squares": jnp.sum(jnp.where(real_BT, 2.0 * batch["positions"] + 1.0, 0.0)),
    }


def device_gradients(config: StepConfig, params, batch, step):
    """What one device contributes to an update: runs inside the `shard_map`, on its own rows."""
    rows = batch["tokens"].shape[0]
    first = jax.lax.axis_index(DATA) * rows
    numbers = (first + jnp.arange(rows)).astype(jnp.uint32)  # of the rows in the global batch

    def loss_of(params, batch, numbers):
        sums = batch_sums(config, params, batch, DropoutKey.at(config.seed, step, numbers))
        return sums["loss"], sums

    def add(total, part):
        return jax.tree.map(jnp.add, total, jax.grad(loss_of, has_aux=True)(params, *part)), None

    parts = jax.tree.map(
        lambda x: x.reshape(config.microbatches, -1, *x.shape[1:]), (batch, numbers)
    )
    if config.microbatches == 1:
        grads, sums = jax.grad(loss_of, has_aux=True)(params, batch, numbers)
    else:
        part = jax.tree.map(lambda x: x[0], parts)
        shapes = jax.eval_shape(jax.grad(loss_of, has_aux=True), params, *part)
        zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
        (grads, sums), _ = jax.lax.scan(add, zeros, parts)
    grads = jax.tree.map(lambda g: g.astype(config.reduce_dtype), grads)
    grads, sums = jax.lax.psum((grads, sums), DATA)  # the one reduction of an update
    return jax.tree.map(lambda g: g.astype(jnp.float32), grads), sums


def train_step(config: StepConfig, mesh: Mesh, state: TrainState, batch):
    """One update. Returns the new state and Scalars: sums of the batch, norms, the rate.

    Where the loss or the gradient is not finite the parameters and the optimiser stay as they were
    and `nonfinite` counts it; beyond `nonfinite_allowed` of them nothing moves any more, so that
    the host, which looks one update late, still finds the state that met the bad batch.
    """
    grads, sums = jax.shard_map(
        functools.partial(device_gradients, config),
        mesh=mesh,
        in_specs=(P(), P(DATA), P()),
        out_specs=P(),
        check_vma=False,
    )(state.params, batch, state.step)
    grads = jax.tree.map(lambda g: g / sums["selected"], grads)  # the mean over all hosts' tokens
    gradient_norm = optax.global_norm(grads)
    finite = jnp.isfinite(sums["loss"]) & jnp.isfinite(gradient_norm)
    stopped = state.nonfinite > config.nonfinite_allowed
    nonfinite = state.nonfinite + (~finite & ~stopped)

    updates, opt_state = optimizer(config.optimizer).update(grads, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    good = finite & ~stopped
    params, opt_state = jax.tree.map(
        lambda new, old: jnp.where(good, new, old),
        (params, opt_state),
        (state.params, state.opt_state),
    )
    halted = nonfinite > config.nonfinite_allowed
    metrics = sums | {
        "gradient_norm": gradient_norm,
        "parameter_norm": optax.global_norm(params),
        "update_norm": optax.global_norm(updates),
        # A skipped update does not move the schedule.
        "learning_rate": schedule(config.optimizer)(state.step - state.nonfinite),
        "finite": finite,
        "halted": halted,
        "nonfinite": nonfinite,  # so far, in the whole run
    }
    state = TrainState(state.step + ~halted, params, opt_state, nonfinite)
    return state, Scalars.of(metrics)


def evaluation_step(config: StepConfig, mesh: Mesh, params, batch):
    """Sums over one global batch without dropout, as Scalars; equal on every device."""

    def on_device(params, batch):
        return jax.lax.psum(batch_sums(config, params, batch, None), DATA)

    sums = jax.shard_map(
        on_device, mesh=mesh, in_specs=(P(), P(DATA)), out_specs=P(), check_vma=False
    )(params, batch)
    return Scalars.of(sums)


def compiled(config: StepConfig, mesh: Mesh):
    """The two jitted functions of a run: (update, evaluation).

    jit appears here alone. State is replicated and batches are split by rows; the state is donated,
    so that parameters and optimiser are updated in place and exist once in memory.
    """
    state, batch = sharding(mesh, "state"), sharding(mesh, "batch")
    options = DETERMINISTIC if config.deterministic else None
    update = jax.jit(
        functools.partial(train_step, config, mesh),
        in_shardings=(state, batch),
        out_shardings=(state, state),
        donate_argnums=0,
        compiler_options=options,
    )
    evaluate = jax.jit(
        functools.partial(evaluation_step, config, mesh),
        in_shardings=(state, batch),
        out_shardings=state,
        compiler_options=options,
    )
    return update, evaluate
