"""Prediction heads on the encoder's last hidden state: a label of each residue or of each protein.

A residue head is one linear layer, as in `EsmForTokenClassification`. A protein head pools the
states of one protein of a packed row, by `pooling`: their mean over its residues, an average that
learned scores weight, or `<s>` through a dense layer and tanh, as `EsmForSequenceClassification`
does. `<s>` and `</s>` take no part in the first two. All of it is fp32.

Axes: B rows, T tokens, D width, S segments of a row, K outputs.
"""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from esm1nv_jax.common.errors import UserError, check_choices

LEVELS = ("residue", "protein")
KINDS = ("classification", "multilabel", "regression")
POOLINGS = ("mean", "attention", "cls")
INIT_STD = 0.02


@dataclasses.dataclass(frozen=True)
class HeadConfig:
    """What a head predicts. `classes` is empty for regression; `pooling` is for proteins only."""

    level: str
    kind: str
    classes: tuple[str, ...] = ()
    pooling: str = "mean"

    def __post_init__(self):
        object.__setattr__(self, "classes", tuple(self.classes))  # a list, where read from JSON
        check_choices("head", self, level=LEVELS, kind=KINDS, pooling=POOLINGS)
        if (self.kind == "regression") == bool(self.classes):
            raise UserError(
                f"a head for {self.kind} cannot have the {len(self.classes)} classes "
                f"{', '.join(self.classes[:8])}; regression has none, the others have some"
            )
        if len(set(self.classes)) < len(self.classes):
            raise UserError(f"head.classes name one twice: {', '.join(self.classes)}")

    @property
    def outputs(self) -> int:
        """K: one for each class, or the value of a regression."""
        return len(self.classes) or 1


def init(config: HeadConfig, width: int, seed) -> dict:
    """Fresh parameters: kernels from N(0, 0.02), biases 0; attention pooling starts as the mean."""

    def linear(n: int, outputs: int) -> dict:
        key = jax.random.fold_in(jax.random.key(seed), n)
        kernel = INIT_STD * jax.random.normal(key, (width, outputs))
        return {"kernel": kernel, "bias": jnp.zeros(outputs)}

    params: dict = {"out_proj": linear(0, config.outputs)}
    if config.level == "protein" and config.pooling == "cls":
        params["dense"] = linear(1, width)
    if config.level == "protein" and config.pooling == "attention":
        params["score"] = {"kernel": jnp.zeros((width, 1))}
    return params


def abstract(config: HeadConfig, width: int) -> dict:
    """Shapes and dtypes of the parameters, without allocating them."""
    return jax.eval_shape(lambda: init(config, width, 0))


def logits(config: HeadConfig, params: dict, x_BTD, segment_ids_BT, positions_BT, num_segments):
    """Logits, or the value of a regression: fp32 [B, T, K], or [B, S, K] for proteins.

    Args:
      params: as `init` returns them.
      x_BTD: the last hidden state, after the final LayerNorm.
      segment_ids_BT: int32, from 1 in each row; 0 is padding.
      positions_BT: int32, counted from 0 in each segment.
      num_segments: S, at least the largest segment id. Segments that a row lacks get the logits of
        a state of zeros.
    """
    if config.level == "residue":
        return project(params, x_BTD)
    slot_BT = pooled_slots(config, segment_ids_BT, positions_BT)
    return project(params, pool(config, params, x_BTD, slot_BT, num_segments).mean())


def pooled_slots(config: HeadConfig, segment_ids_BT, positions_BT):
    """int32 [B, T]: the segment, from 0, whose pool a token belongs to; -1 where to none."""
    is_first_BT = positions_BT == 0
    if config.pooling == "cls":
        is_pooled_BT = is_first_BT
    else:
        next_BT = jnp.pad(segment_ids_BT[:, 1:], ((0, 0), (0, 1)))
        is_pooled_BT = ~is_first_BT & (segment_ids_BT == next_BT)  # the last token is </s>
    return jnp.where(is_pooled_BT, segment_ids_BT - 1, -1)


class Pool(NamedTuple):
    """Weighted sums over tokens. Those of the windows of one protein can be added up, once they
    have a common `log_scale`, the logarithm of what their weights were divided by."""

    sum_BSD: jax.Array
    weight_BS: jax.Array  # 0 where there was no token
    log_scale_BS: jax.Array

    def mean(self):
        return self.sum_BSD / jnp.where(self.weight_BS > 0, self.weight_BS, 1.0)[..., None]


def pool(config: HeadConfig, params: dict, x_BTD, slot_BT, num_slots: int) -> Pool:
    """The states of the tokens of each slot, added up with their weights."""
    is_in_BST = slot_BT[:, None] == jnp.arange(num_slots)[:, None]
    if config.pooling == "attention":
        score_BT = _matmul(x_BTD, params["score"]["kernel"])[..., 0]
        score_BST = jnp.where(is_in_BST, score_BT[:, None], -jnp.inf)
        highest_BS = jnp.max(score_BST, axis=-1)
        # Any shift gives the same mean: the maximum needs no gradient.
        shift_BS = jax.lax.stop_gradient(jnp.where(highest_BS > -jnp.inf, highest_BS, 0.0))
        weight_BST = jnp.exp(score_BST - shift_BS[..., None])
    else:
        weight_BST = is_in_BST.astype(jnp.float32)
        shift_BS = jnp.zeros(weight_BST.shape[:2])
    sum_BSD = jnp.einsum("BST,BTD->BSD", weight_BST, x_BTD, precision=jax.lax.Precision.HIGHEST)
    return Pool(sum_BSD, weight_BST.sum(axis=-1), shift_BS)


def project(params: dict, x):
    """Logits, fp32 [..., K], of states [..., D]: of residues, or pooled ones of proteins."""
    if "dense" in params:
        x = jnp.tanh(_linear(params["dense"], x))
    return _linear(params["out_proj"], x)


def to_predictions(config: HeadConfig, logits: np.ndarray) -> np.ndarray:
    """Probabilities of the classes, or the values of a regression: float32 [n, K] on the host."""
    if config.kind == "regression":
        return logits.astype(np.float32)
    x = logits.astype(np.float64)
    if config.kind == "multilabel":
        return (0.5 + 0.5 * np.tanh(x / 2)).astype(np.float32)  # the sigmoid, without overflow
    odds = np.exp(x - x.max(axis=-1, keepdims=True))
    return (odds / odds.sum(axis=-1, keepdims=True)).astype(np.float32)


def _linear(params: dict, x):
    return _matmul(x, params["kernel"]) + params["bias"]


def _matmul(x, kernel):
    return jnp.matmul(x, kernel, precision=jax.lax.Precision.HIGHEST)
