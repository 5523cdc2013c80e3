"""One training step, one evaluation step: pure functions of state and batch; the memory they need.

The gradient is computed device by device inside a `shard_map`, so that nothing is gathered
whatever the attention backend, and reduced once a step, whatever the number of microbatches.
"""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from esm1nv_jax.common import command
from esm1nv_jax.common.errors import UserError
from esm1nv_jax.data.packing import StreamConfig
from esm1nv_jax.model import encoder
from esm1nv_jax.model.dropout import DropoutKey
from esm1nv_jax.training.metrics import ScalarMetrics
from esm1nv_jax.training.objective import Objective
from esm1nv_jax.training.optimizer import OptimizerConfig, optimizer, schedule
from esm1nv_jax.training.sharding import DATA, sharding
from esm1nv_jax.training.tuning import Tuning, merge_trees

# Autotuning picks kernels by the clock, so two starts may pick different ones.
DETERMINISTIC = {"xla_gpu_deterministic_ops": True, "xla_gpu_autotune_level": 0}


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    step: jax.Array  # int32: steps done
    params: dict
    opt_state: optax.OptState
    nonfinite: jax.Array  # int32: steps whose loss or gradient was not finite
    frozen: dict = dataclasses.field(default_factory=dict)  # parameters that no step changes

    @property
    def all_params(self) -> dict:
        """The parameters, trained and frozen, as one tree."""
        return merge_trees(self.params, self.frozen)


@dataclasses.dataclass(frozen=True)
class StepConfig:
    """All that a step is made of, apart from its arrays."""

    seed: int
    model: encoder.EncoderConfig
    compute: encoder.ComputeConfig
    objective: Objective
    optimizer: OptimizerConfig
    microbatches: int = 1
    reduce_dtype: str = "float32"
    deterministic: bool = False  # on a GPU: the same bits from the same start
    nonfinite_allowed: int = 0  # beyond so many nonfinite steps the state stands still
    tuning: Tuning | None = None  # which parameters are trained; None: all


def create_state(config: StepConfig) -> TrainState:
    """Return a fresh state with random parameters."""
    return state_from_params(config, config.objective.init(config.model, config.seed))


def state_from_params(config: StepConfig, params: dict) -> TrainState:
    """Return the state before the first step, from parameters of any origin."""
    frozen: dict = {}
    if config.tuning is not None:
        params, frozen = config.tuning.split(params, config.model)
    opt_state = optimizer(config.optimizer).init(params)
    return TrainState(jnp.zeros((), jnp.int32), params, opt_state, jnp.zeros((), jnp.int32), frozen)


def batch_sums(config: StepConfig, params, batch, dropout_key: DropoutKey | None):
    """Return sums over some rows, fp32 scalars: the objective's, and counts of tokens."""
    return batch_outputs(config, params, batch, dropout_key)[0]


def batch_outputs(config: StepConfig, params, batch, dropout_key: DropoutKey | None):
    """Return `batch_sums`, and the objective's outputs by row. `params` are all of them, trained
    and frozen."""
    real_BT = batch["segment_ids"] > 0
    first_BT = real_BT & (batch["positions"] == 0)
    sums, outputs = config.objective.loss_sums(
        config.model, config.compute, params, batch, dropout_key
    )
    counts = {
        "sequences": jnp.sum(first_BT, dtype=jnp.float32),
        "tokens": jnp.sum(real_BT, dtype=jnp.float32),  # with <s> and </s>, without padding
        "num_slots": jnp.float32(real_BT.size),
        # The sum of 2 p + 1 over the positions p of a segment is its squared length.
        "sum_squared_lengths": jnp.sum(jnp.where(real_BT, 2.0 * batch["positions"] + 1.0, 0.0)),
    }
    return sums | counts, outputs


def device_gradients(config: StepConfig, params, frozen, batch, step):
    """Return the gradients of `params` and the sums of one step, summed over all devices.

    Runs inside the `shard_map`, on this device's rows, in `config.microbatches` parts.
    """
    rows = batch["tokens"].shape[0]
    first_row = jax.lax.axis_index(DATA) * rows
    global_rows = (first_row + jnp.arange(rows)).astype(jnp.uint32)

    def loss_of(params, batch, global_rows):
        key = DropoutKey.at(config.seed, step, global_rows)
        batch = batch | {"step": step}
        sums = batch_sums(config, merge_trees(params, frozen), batch, key)
        return sums["loss"], sums

    gradients_of = jax.grad(loss_of, has_aux=True)
    if config.microbatches == 1:
        grads, sums = gradients_of(params, batch, global_rows)
    else:
        parts = jax.tree.map(
            lambda x: x.reshape(config.microbatches, -1, *x.shape[1:]), (batch, global_rows)
        )
        first = jax.tree.map(lambda x: x[0], parts)
        shapes = jax.eval_shape(gradients_of, params, *first)
        zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)

        def accumulate(total, part):
            return jax.tree.map(jnp.add, total, gradients_of(params, *part)), None

        (grads, sums), _ = jax.lax.scan(accumulate, zeros, parts)
    grads = jax.tree.map(lambda g: g.astype(config.reduce_dtype), grads)
    grads, sums = jax.lax.psum((grads, sums), DATA)  # the one reduction of a step
    return jax.tree.map(lambda g: g.astype(jnp.float32), grads), sums


def train_step(config: StepConfig, mesh: Mesh, state: TrainState, batch):
    """Return the state after one step, and its ScalarMetrics: sums, norms, the learning rate.

    Where the loss or the gradient is not finite, parameters and optimizer state stay as they were
    and `nonfinite` counts it; beyond `nonfinite_allowed` of them nothing moves any more, so that
    the host, which reads metrics one step late, still finds the state that met the bad batch.
    """
    grads, sums = jax.shard_map(
        functools.partial(device_gradients, config),
        mesh=mesh,
        in_specs=(P(), P(), P(DATA), P()),
        out_specs=P(),
        # With the check, autodiff reduces the gradient of replicated parameters over the devices by
        # itself, in every microbatch; here that is done once, after the last of them.
        check_vma=False,
    )(state.params, state.frozen, batch, state.step)
    # The mean over the targets of all hosts.
    grads = jax.tree.map(lambda g: g / config.objective.num_targets(sums), grads)
    gradient_norm = optax.global_norm(grads)
    finite = jnp.isfinite(sums["loss"]) & jnp.isfinite(gradient_norm)
    halted_before = state.nonfinite > config.nonfinite_allowed
    nonfinite = state.nonfinite + (~finite & ~halted_before)

    updates, opt_state = optimizer(config.optimizer).update(grads, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    moves = finite & ~halted_before
    params, opt_state = jax.tree.map(
        lambda new, old: jnp.where(moves, new, old),
        (params, opt_state),
        (state.params, state.opt_state),
    )
    halted = nonfinite > config.nonfinite_allowed
    metrics = sums | {
        "gradient_norm": gradient_norm,
        "parameter_norm": optax.global_norm(params),
        "update_norm": optax.global_norm(updates),
        # A skipped step does not move the schedule.
        "learning_rate": schedule(config.optimizer)(state.step - state.nonfinite),
        "finite": finite,
        "halted": halted,
        "nonfinite": nonfinite,  # so far, in the whole run
    }
    state = TrainState(state.step + ~halted, params, opt_state, nonfinite, state.frozen)
    return state, ScalarMetrics.pack(metrics)


def eval_step(config: StepConfig, mesh: Mesh, params, batch):
    """Return the ScalarMetrics of one global batch without dropout, and the objective's outputs of
    all its rows; equal on every device. `params` are all of them, trained and frozen."""

    def on_device(params, batch):
        sums, outputs = batch_outputs(config, params, batch, None)
        gathered = {
            name: jax.lax.all_gather(x, DATA, axis=0, tiled=True) for name, x in outputs.items()
        }
        return jax.lax.psum(sums, DATA), gathered

    sums, outputs = jax.shard_map(
        on_device, mesh=mesh, in_specs=(P(), P(DATA)), out_specs=P(), check_vma=False
    )(params, batch)
    return ScalarMetrics.pack(sums), outputs


def jit_steps(config: StepConfig, mesh: Mesh):
    """Return the jitted (train_step, eval_step) of a run.

    The state is replicated and batches are split by rows; the state is donated, so that parameters
    and optimizer state are updated in place and exist once in memory.
    """
    replicated, by_rows = sharding(mesh, "state"), sharding(mesh, "batch")
    options = DETERMINISTIC if config.deterministic else None
    jit = functools.partial(
        jax.jit,
        in_shardings=(replicated, by_rows),
        out_shardings=replicated,
        compiler_options=options,
    )
    jitted_train_step = jit(functools.partial(train_step, config, mesh), donate_argnums=0)
    return jitted_train_step, jit(functools.partial(eval_step, config, mesh))


def abstract_batch(config: StepConfig, mesh: Mesh, rows: int, row_length: int):
    """Return the shapes, dtypes and shardings of a global batch."""
    return {
        name: jax.ShapeDtypeStruct(
            config.objective.batch_shape(name, rows, row_length),
            dtype,
            sharding=sharding(mesh, "batch"),
        )
        for name, dtype in config.objective.batch_dtypes.items()
    }


def abstract_state(config: StepConfig, mesh: Mesh) -> TrainState:
    """Return the shapes, dtypes and shardings of the state, without allocating it."""
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding(mesh, "state")),
        jax.eval_shape(lambda: create_state(config)),
    )


def compile_steps(config: StepConfig, mesh: Mesh, rows: int, row_length: int):
    """Return the (train_step, eval_step) of a run, compiled for global batches of this shape."""
    state = abstract_state(config, mesh)
    batch = abstract_batch(config, mesh, rows, row_length)
    jitted_train_step, jitted_eval_step = jit_steps(config, mesh)
    train_step = jitted_train_step.lower(state, batch).compile()
    _bound_kept_memory(train_step)
    return train_step, jitted_eval_step.lower(state.all_params, batch).compile()


def _bound_kept_memory(train_step: jax.stages.Compiled) -> None:
    """On a CPU, give freed memory back to the system where a step works in too much to keep it."""
    analysis = train_step.memory_analysis()
    if analysis is not None and not command.keeps(analysis.temp_size_in_bytes):
        command.return_freed_memory()


def least_memory(config: StepConfig, rows: int, row_length: int) -> tuple[float, float]:
    """Return bytes of (parameters, activations) that a step on `rows` rows a device cannot do
    without: parameters, gradients and both moments of Adam, or the one of Muon, in fp32; the batch,
    and the input of each block in bf16, which even `remat='block'` keeps. Of frozen parameters,
    only themselves."""
    model = config.model
    block = 4 * model.width**2 + model.width * (model.fc1_width + model.ffn)
    embeddings = model.positions * model.width if model.position_kind == "learned" else 0
    of_block = 12.0 if config.optimizer.kind == "muon" else 16.0  # bytes a parameter
    parameters = of_block * model.layers * block + 16.0 * embeddings
    if config.tuning is not None and config.tuning.method != "full":
        trained = of_block * config.tuning.blocks * block
        frozen = 2.0 if config.tuning.frozen_dtype == "bfloat16" else 4.0
        parameters = trained + frozen * (model.layers - config.tuning.blocks) * block
    kept = 2.0 * model.layers * model.width * rows / config.microbatches
    return parameters, row_length * (kept + 16.0 * rows)


def device_memory(device: jax.Device) -> float:
    """Return the bytes a device has; of a CPU the machine's, shared by the devices made of it."""
    limit = (device.memory_stats() or {}).get("bytes_limit")
    return limit or command.machine_memory() / jax.local_device_count(device.platform)


def check_memory(
    config: StepConfig,
    stream: StreamConfig,
    mesh: jax.sharding.Mesh,
    available: float | None = None,
) -> None:
    """Raise UserError where a step on the devices of `mesh` cannot fit in `available` bytes each:
    by default what the first of this process has."""
    rows = stream.rows // mesh.size
    if available is None:
        available = device_memory(mesh.local_devices[0])
    parameters, activations = least_memory(config, rows, stream.row_length)
    if parameters + activations > available:
        total, one, other, has = (
            f"{x / 2**30:,.1f}"
            for x in (parameters + activations, parameters, activations, available)
        )
        raise UserError(
            f"a step needs at least {total} GiB a device ({one} for parameters, gradients and "
            f"Adam, {other} for {rows:,} rows of {stream.row_length:,} tokens), and a device has "
            f"{has}; make the model or the batch smaller (model.*, batch.*, data.row_length)"
        )
