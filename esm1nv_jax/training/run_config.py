"""From the config to the values that a run is made of, all checked before a device is touched."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
from ml_collections import ConfigDict

from esm1nv_jax.common import config_file
from esm1nv_jax.common.errors import UserError
from esm1nv_jax.data.pipeline import rows_for
from esm1nv_jax.data.stream_config import stream_config
from esm1nv_jax.model import attention
from esm1nv_jax.model.encoder import Compute, EncoderConfig
from esm1nv_jax.model.kernels import matmul
from esm1nv_jax.model.masking import recipe
from esm1nv_jax.training import profiling
from esm1nv_jax.training.optimizer import OptimizerConfig
from esm1nv_jax.training.step import StepConfig

REDUCE_DTYPES = ("float32", "bfloat16")

LEAST = {  # that a field may be
    "steps": 1,
    "batch.rows": 0,
    "batch.sequences_per_device": 1,
    "batch.microbatches": 1,
    "evaluation.every": 1,
    "evaluation.batches": 0,
    "checkpoint.every": 1,
    "checkpoint.minutes": 0,
    "checkpoint.keep": 1,
    "checkpoint.keep_every": 0,
    "skip_nonfinite": 0,
    "cluster.start_timeout": 1,
    "cluster.stall_timeout": 1,
    "log.every": 1,
}

# Fields that may change between the starts of one run: none of them changes what is learned.
MAY_CHANGE = (
    "steps",
    "platform",
    "init_from",
    "evaluation.",
    "checkpoint.",
    "log.",
    "cluster.",
    "skip_nonfinite",
    "profile",
    "compute.remat",
    "compute.attention",
    "batch.microbatches",
    "data.path",
)


def step_config(config: ConfigDict) -> StepConfig:
    values = config_file.flat(config)
    for name, least in LEAST.items():
        if name not in values:
            raise UserError(
                f"config has no field config.{name}; build it on configs/pretrain_small.py by "
                "esm1nv_jax.common.config_file.parent, which has them all"
            )
        if values[name] < least:
            raise UserError(f"{name}={values[name]} must be at least {least}")
    if not 0 <= config.seed < 1 << 63:
        raise UserError(f"seed={config.seed} must lie in 0..2**63 - 1")
    model = _made(EncoderConfig, config.model, "model")
    if config.data.max_residues + 2 > model.positions:
        raise UserError(
            f"data.max_residues={config.data.max_residues} needs {config.data.max_residues + 2} "
            f"positions with <s> and </s>, model.positions={model.positions}; "
            f"set data.max_residues to at most {model.positions - 2}"
        )
    compute = dict(config.compute)
    reduce_dtype, deterministic = compute.pop("reduce_dtype"), compute.pop("deterministic")
    if reduce_dtype not in REDUCE_DTYPES:
        raise UserError(
            f"compute.reduce_dtype={reduce_dtype!r} is unknown; there are "
            f"{', '.join(REDUCE_DTYPES)}"
        )
    profiling.updates(config.profile)  # raises UserError
    return StepConfig(
        seed=config.seed,
        model=model,
        compute=_made(Compute, compute, "compute"),
        masking=recipe(config.masking.recipe, config.masking.rate),
        optimizer=_made(OptimizerConfig, config.optimizer, "optimizer"),
        microbatches=config.batch.microbatches,
        reduce_dtype=reduce_dtype,
        deterministic=deterministic,
        nonfinite_allowed=config.skip_nonfinite,
    )


def _made(kind: type, group: Mapping[str, Any], name: str):
    """A frozen value of a group of the config, of whose fields it has to know every one."""
    known = [field.name for field in dataclasses.fields(kind)]
    for field in group:
        if field not in known:
            raise UserError(
                f"config has no field config.{name}.{field}; config.{name} has {', '.join(known)}"
            )
    return kind(**group)


def fitted(step: StepConfig, config: ConfigDict, device: jax.Device) -> StepConfig:
    """`step` as the device computes it best: its attention backend, and what it keeps in memory.

    Raises UserError where the one that the config names is not fit.
    """
    model, compute = step.model, step.compute
    case = attention.Case(
        platform=device.platform,
        capability=float(getattr(device, "compute_capability", 0)),
        dtype=compute.dtype,
        packed=config.data.packed,
        rate=model.attention_dropout,
        head_size=model.width // model.heads,
        row_length=config.data.row_length,
    )
    chosen = attention.choose(compute.attention, case)
    # A CPU computes faster in fp32 what an accelerator is too slow to read and write in it.
    kept = "float32" if device.platform == "cpu" else compute.dtype
    compute = dataclasses.replace(
        compute, attention=chosen, activations=kept, native=matmul.multiplies_bf16(device.platform)
    )
    return dataclasses.replace(step, compute=compute)


def global_rows(config: ConfigDict, lengths, devices: int) -> int:
    """Rows in an update over all devices: as given, or from sequences per device."""
    batch = config.batch
    rows = batch.rows
    if not rows:
        one = stream_config(config, rows=1)  # for the layout of a row
        per_device = rows_for(lengths, batch.sequences_per_device, one)
        per_device += -per_device % batch.microbatches
        rows = per_device * devices
    if rows % (devices * batch.microbatches):
        raise UserError(
            f"batch.rows={rows} is not a multiple of {devices} devices x {batch.microbatches} "
            f"microbatches; take {rows + -rows % (devices * batch.microbatches)}"
        )
    return rows
