"""A lower bound of the memory of a step, to refuse what cannot fit before it is allocated."""

from __future__ import annotations

import jax

from esm1nv_jax.common import command
from esm1nv_jax.common.errors import UserError
from esm1nv_jax.data.packing import StreamConfig
from esm1nv_jax.training.step import StepConfig

GIB = 2**30


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
            f"{x / GIB:,.1f}"
            for x in (parameters + activations, parameters, activations, available)
        )
        raise UserError(
            f"a step needs at least {total} GiB a device ({one} for parameters, gradients and "
            f"Adam, {other} for {rows:,} rows of {stream.row_length:,} tokens), and a device has "
            f"{has}; make the model or the batch smaller (model.*, batch.*, data.row_length)"
        )


def bound_kept_memory(train_step: jax.stages.Compiled) -> None:
    """On a CPU, give freed memory back to the system where a step works in too much to keep it."""
    analysis = train_step.memory_analysis()
    if analysis is not None and not command.keeps(analysis.temp_size_in_bytes):
        command.return_freed_memory()
