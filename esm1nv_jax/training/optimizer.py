"""AdamW as ESM-1nv used it, and its schedule of named phases."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax

from esm1nv_jax.common.errors import UserError

CONSTANT_AT = ("min_lr", "peak")


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """Units: learning rates per step, lengths of phases in steps."""

    peak_lr: float = 2e-4
    min_lr: float = 2e-5
    warmup: int = 500
    constant: int = 50_000
    constant_at: str = "min_lr"  # where the constant phase stands: at the end, or at the peak
    horizon: int = 1_000_000  # the schedule's length; after it the rate stays at min_lr
    beta1: float = 0.9
    beta2: float = 0.98
    epsilon: float = 1e-8
    weight_decay: float = 0.01
    clip_norm: float = 1.0

    def __post_init__(self):
        if self.constant_at not in CONSTANT_AT:
            raise UserError(
                f"optimizer.constant_at={self.constant_at!r} is unknown; there are "
                f"{', '.join(CONSTANT_AT)}"
            )
        if min(self.warmup, self.constant) < 0 or self.warmup + self.constant > self.horizon:
            raise UserError(
                f"optimizer.warmup={self.warmup} and optimizer.constant={self.constant} must be at "
                f"least 0 and fit in optimizer.horizon={self.horizon}"
            )
        if not 0 <= self.min_lr <= self.peak_lr:
            raise UserError(
                f"optimizer.min_lr={self.min_lr} is not between 0 and optimizer.peak_lr="
                f"{self.peak_lr}"
            )
        for name in ("clip_norm", "epsilon"):  # no epsilon: 0 / 0 where a gradient is 0
            if getattr(self, name) <= 0:
                raise UserError(f"optimizer.{name}={getattr(self, name)} must be above 0")
        if self.weight_decay < 0:
            raise UserError(f"optimizer.weight_decay={self.weight_decay} must be at least 0")
        for name in ("beta1", "beta2"):
            if not 0 <= getattr(self, name) < 1:
                raise UserError(f"optimizer.{name}={getattr(self, name)} is not in [0, 1)")


def resolve_shares(values: Mapping[str, Any], steps: int) -> dict[str, Any]:
    """Return the fields of an OptimizerConfig with the lengths of its phases in whole steps.

    A warm-up and a constant phase below 1, and a horizon of at most 1, are shares of `steps`,
    rounded down.
    """
    resolved = dict(values)
    for name in ("warmup", "constant", "horizon"):
        length = values.get(name, 0)
        if 0 < length < 1 or (name == "horizon" and length == 1):
            length = int(length * steps + 1e-6)
        elif length % 1:
            raise UserError(f"optimizer.{name}={length} is neither whole nor a share of steps")
        if name in values:
            resolved[name] = int(length)
    return resolved


def phases(config: OptimizerConfig) -> list[tuple[str, int, int]]:
    """(name, first step, end) of each phase that has any length, in order."""
    if config.constant_at == "min_lr":
        lengths = [("warm-up", config.warmup), ("cosine", None), ("constant", config.constant)]
    else:
        lengths = [("warm-up", config.warmup), ("constant", config.constant), ("cosine", None)]
    cosine = config.horizon - config.warmup - config.constant
    found, start = [], 0
    for name, length in lengths:
        length = cosine if length is None else length
        if length:
            found.append((name, start, start + length))
        start += length
    return found


def schedule(config: OptimizerConfig) -> optax.Schedule:
    """Learning rate of step n, counted from 0.

    Warm-up rises linearly from 0 to the peak; the cosine falls from the peak to `min_lr`. The
    original's constant phase (`constant_at='min_lr'`) comes last, at the minimum: steps 950,000
    to 1,000,000. `'peak'` is the other reading: warm-up, constant at the peak, cosine.
    """
    cosine_start = config.warmup + (config.constant if config.constant_at == "peak" else 0)
    cosine_length = config.horizon - config.warmup - config.constant

    def rate(count):
        count = jnp.asarray(count, jnp.float32)
        warm = config.peak_lr * count / max(config.warmup, 1)
        done = jnp.clip((count - cosine_start) / max(cosine_length, 1), 0, 1)
        # Without a cosine the rate drops to the minimum where the cosine would have stood.
        done = done if cosine_length else jnp.where(count >= cosine_start, 1.0, 0.0)
        swing = config.peak_lr - config.min_lr
        fall = config.min_lr + 0.5 * swing * (1 + jnp.cos(jnp.pi * done))
        return jnp.where(count < config.warmup, warm, fall)

    return rate


def decays(params) -> dict:
    """True for the leaves that weight decay applies to: no bias and no LayerNorm."""
    return jax.tree_util.tree_map_with_path(
        lambda path, _: path[-1].key in ("kernel", "embedding"), params
    )


def optimizer(config: OptimizerConfig) -> optax.GradientTransformation:
    """Clip by global norm, then Adam with decoupled weight decay, then the schedule."""
    return optax.chain(
        optax.clip_by_global_norm(config.clip_norm),
        optax.scale_by_adam(b1=config.beta1, b2=config.beta2, eps=config.epsilon),
        optax.add_decayed_weights(config.weight_decay, mask=decays),
        optax.scale_by_learning_rate(schedule(config)),
    )
