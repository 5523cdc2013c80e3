"""AdamW as ESM-1nv used it, or Muon, and a schedule of named phases."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax

from esm1nv_jax.common.errors import UserError, check_choices

CONSTANT_AT = ("min_lr", "peak")
DECAYS = ("cosine", "linear")
KINDS = ("adamw", "muon")
# RMS of an entry of Muon's step in units of the learning rate: about that of AdamW's, so that both
# take the same learning rate and weight decay (Liu et al. 2025, "Muon is scalable").
MUON_RMS = 0.2
NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)  # of Jordan et al.; five steps


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
    kind: str = "adamw"
    muon_beta: float = 0.95  # decay of Muon's moment
    decay: str = "cosine"  # how the rate falls from the peak to the minimum

    def __post_init__(self):
        check_choices("optimizer", self, constant_at=CONSTANT_AT, decay=DECAYS, kind=KINDS)
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
        for name in ("beta1", "beta2", "muon_beta"):
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


def schedule(config: OptimizerConfig) -> optax.Schedule:
    """Learning rate of step n, counted from 0.

    Warm-up rises linearly from 0 to the peak; a cosine, or a line, falls from it to `min_lr`. The
    original's constant phase (`constant_at='min_lr'`) comes last, at the minimum: steps 950,000
    to 1,000,000. `'peak'` is the other reading: warm-up, constant at the peak, cosine.
    """
    decay_start = config.warmup + (config.constant if config.constant_at == "peak" else 0)
    decay_length = config.horizon - config.warmup - config.constant

    def rate(count):
        count = jnp.asarray(count, jnp.float32)
        warm = config.peak_lr * count / max(config.warmup, 1)
        done = jnp.clip((count - decay_start) / max(decay_length, 1), 0, 1)
        # Without a decay the rate drops to the minimum where it would have stood.
        done = done if decay_length else jnp.where(count >= decay_start, 1.0, 0.0)
        swing = config.peak_lr - config.min_lr
        if config.decay == "cosine":
            fall = config.min_lr + 0.5 * swing * (1 + jnp.cos(jnp.pi * done))
        else:
            fall = config.min_lr + swing * (1 - done)
        return jnp.where(count < config.warmup, warm, fall)

    return rate


def decays(params) -> dict:
    """True for the leaves that weight decay applies to: no bias and no LayerNorm."""
    return jax.tree_util.tree_map_with_path(
        lambda path, _: path[-1].key in ("kernel", "embedding"), params
    )


def optimizer(config: OptimizerConfig) -> optax.GradientTransformation:
    """Clip by global norm, then Adam or Muon with decoupled weight decay, then the schedule."""
    adam = optax.scale_by_adam(b1=config.beta1, b2=config.beta2, eps=config.epsilon)
    return optax.chain(
        optax.clip_by_global_norm(config.clip_norm),
        adam if config.kind == "adamw" else _muon(config, adam),
        optax.add_decayed_weights(config.weight_decay, mask=decays),
        optax.scale_by_learning_rate(schedule(config)),
    )


def _newton_schulz(x):
    """The matrix [n, m] nearly orthogonal, or each of [n, parts, m]; their Frobenius norms are 1.

    Each by itself: under `jax.vmap`, as in optax, XLA's CPU backend takes twice the time.
    """
    if x.ndim == 3:
        return jnp.stack([_newton_schulz(x[:, i]) for i in range(x.shape[1])], axis=1)
    if len(x) > x.shape[1]:
        return _newton_schulz(x.T).T
    a, b, c = NEWTON_SCHULZ
    for _ in range(5):
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x


def _muon(config: OptimizerConfig, adam) -> optax.GradientTransformation:
    """Muon (Jordan et al. 2024) for hidden matrices: the kernels of blocks and of the LM head's
    dense layer. `adam` for the rest: embeddings, the output matrix, biases, scales, and what
    fine-tuning adds. Its products have the device's default precision: TF32 on an A100, bf16 on a
    TPU, and its step is the same to that."""

    def labels(params):
        def label(path, _):
            names = [entry.key for entry in path]
            hidden = names[0] == "blocks" or names[:2] == ["lm_head", "dense"]
            return "muon" if hidden and names[-1] == "kernel" else "adam"

        return jax.tree_util.tree_map_with_path(label, params)

    def split(params):
        """Queries, keys and values, gates and values: matrices of their own, [in, part, out]."""

        def reshape(path, leaf):
            names = [entry.key for entry in path]
            if names[0] != "blocks" or names[-2:] not in (["qkv", "kernel"], ["fc1", "kernel"]):
                return leaf
            block = params["blocks"][names[1]]
            out = len(leaf if names[-2] == "qkv" else block["fc2"]["kernel"])
            return leaf.reshape(len(leaf), -1, out)

        return jax.tree_util.tree_map_with_path(reshape, params)

    muon = optax.chain(
        # Moments, each matrix divided by its Frobenius norm: its own steps are `_newton_schulz`.
        optax.contrib.scale_by_muon(
            beta=config.muon_beta,
            ns_steps=0,
            weight_dimension_numbers=lambda params: jax.tree.map(
                lambda _: optax.contrib.MuonDimensionNumbers(0, -1), params
            ),
        ),
        # An orthogonal matrix [n, m] has the RMS max(n, m)**-0.5.
        optax.stateless_with_tree_map(
            lambda x, _: MUON_RMS * max(x.shape[0], x.shape[-1]) ** 0.5 * _newton_schulz(x)
        ),
    )
    inner = optax.partition({"muon": muon, "adam": adam}, labels)

    def update(grads, state, params=None):
        updates, state = inner.update(split(grads), state)
        return jax.tree.map(lambda x, like: x.reshape(like.shape), updates, grads), state

    return optax.GradientTransformation(lambda params: inner.init(split(params)), update)
