"""Small heads on frozen features: linear, a two-layer CNN, an MLP; trained with early stopping.

The shapes of FLIP's probes (Dallago et al., 2021): convolutions of 7 residues through 32 channels,
or layers of 256 and 128. Without their dropout: the round that validates best is kept instead.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
import optax

from esm1nv_jax.common.hashing import fold_all, purpose
from esm1nv_jax.data.labeled_data import Split
from esm1nv_jax.data.order import permute

HEADS = ("linear", "cnn", "mlp")
REACH, CHANNELS, LAYERS = 7, 32, (256, 128)
ROUNDS, PATIENCE = 30, 4  # validation follows every round: an epoch, or as many as make
UPDATES = 50  # so many updates
TOKENS, PROTEINS = 8_192, 128  # in a batch: labels where they are of residues, else proteins
LEARNING_RATES, DECAYS = (1e-3, 1e-2), (0.0, 0.3)


@dataclasses.dataclass(frozen=True)
class Setting:
    """What is chosen on the validation split."""

    learning_rate: float
    weight_decay: float


GRID = tuple(Setting(rate, decay) for rate in LEARNING_RATES for decay in DECAYS)


@dataclasses.dataclass(frozen=True)
class Data:
    """A split with its features: float16 or float32 [k, D], a row for each label."""

    split: Split
    features: np.ndarray


@dataclasses.dataclass(frozen=True)
class Scale:
    """Of features and, in regression, of labels: what is subtracted and divided by."""

    mean: np.ndarray
    std: np.ndarray
    label_mean: float = 0.0
    label_std: float = 1.0

    @classmethod
    def of(cls, data: Data, regression: bool) -> Scale:
        sums = np.zeros((2, data.features.shape[1]))
        for start in range(0, len(data.features), 65_536):
            part = data.features[start : start + 65_536].astype(np.float64)
            sums += np.stack([part.sum(axis=0), (part**2).sum(axis=0)])
        mean, square = sums / len(data.features)
        std = np.sqrt(np.maximum(square - mean**2, 0))
        # A feature that hardly varied in training, such as a rare letter, must not tower over all.
        std = np.maximum(std, 0.25 * np.median(std) or 1.0)
        found = (mean.astype(np.float32), std.astype(np.float32))
        if not regression:
            return cls(*found)
        labels = data.split.labels[data.split.used]
        return cls(*found, float(labels.mean()), float(labels.std()) or 1.0)


def init(head: str, inputs: int, outputs: int, seed: int) -> dict:
    def layer(number, *shape):
        key = jax.random.key(fold_all(seed, purpose("probe head"), number))
        std = (2 if number else 1) ** 0.5 * np.prod(shape[:-1]) ** -0.5
        return {"kernel": std * jax.random.normal(key, shape), "bias": jnp.zeros(shape[-1])}

    if head == "linear":
        # From zero: the same start for every seed, which then orders the batches only.
        return {"0": {"kernel": jnp.zeros((inputs, outputs)), "bias": jnp.zeros(outputs)}}
    if head == "cnn":
        return {"0": layer(0, REACH, inputs, CHANNELS), "1": layer(1, REACH, CHANNELS, outputs)}
    sizes = (inputs, *LAYERS, outputs)
    return {str(i): layer(i, *pair) for i, pair in enumerate(itertools.pairwise(sizes))}


def apply(head: str, params: dict, x_BTD, real_BT):
    """Scores [B, T, outputs]. Padding (`real_BT` False) is as the end of the protein."""
    for i in range(len(params)):
        layer = params[str(i)]
        x_BTD = jnp.where(real_BT[..., None], x_BTD, 0)
        if head == "cnn":
            x_BTD = jax.lax.conv_general_dilated(
                x_BTD, layer["kernel"], (1,), "SAME", dimension_numbers=("NWC", "WIO", "NWC")
            )
        else:
            x_BTD = x_BTD @ layer["kernel"]
        x_BTD = x_BTD + layer["bias"]
        if i < len(params) - 1:
            x_BTD = jax.nn.relu(x_BTD)
    return x_BTD


def losses(head: str, classes: int, params, scale, batch):
    """Sum of cross-entropy, or of squared error of the scaled label, and the labels it is over."""
    x_BTD = (batch["x"].astype(jnp.float32) - scale["mean"]) / scale["std"]
    scores = apply(head, params, x_BTD, batch["real"])
    if classes:
        each = optax.softmax_cross_entropy_with_integer_labels(scores, batch["label"])
    else:
        each = jnp.square(scores[..., 0] - batch["label"])
    return jnp.sum(jnp.where(batch["used"], each, 0)), jnp.sum(batch["used"])


@functools.partial(jax.jit, static_argnames=("head", "classes"), donate_argnums=(0, 1))
def update(params, state, scale, batch, rate, decay, head: str, classes: int):
    """One step of AdamW; `rate` and `decay` are traced, so that no setting compiles anew."""

    def mean(params):
        total, n = losses(head, classes, params, scale, batch)
        return total / jnp.maximum(n, 1)

    grads = jax.grad(mean)(params)
    updates, state = optax.scale_by_adam().update(grads, state, params)
    return jax.tree.map(lambda p, u: p - rate * (u + decay * p), params, updates), state


@functools.partial(jax.jit, static_argnames="head")
def scores(params, scale, batch, head: str):
    x_BTD = (batch["x"].astype(jnp.float32) - scale["mean"]) / scale["std"]
    return apply(head, params, x_BTD, batch["real"])


def fit(head: str, classes: int, train: Data, valid: Data, setting: Setting, seed: int, score):
    """(score, predictor) of the round that validates best; `score(split, predicted)` is higher
    where better. The predictor takes Data to float32 [k, outputs], in units of the label."""
    scale = Scale.of(train, regression=not classes)
    on_device = {"mean": scale.mean, "std": scale.std}
    params = init(head, train.features.shape[1], classes or 1, seed)
    state = optax.scale_by_adam().init(params)
    rate, decay = np.float32(setting.learning_rate), np.float32(setting.weight_decay)

    def predict(data: Data, params: dict) -> np.ndarray:
        out = np.zeros((len(data.features), classes or 1), np.float32)
        for places, batch in batches(data, np.arange(len(data.split.sizes)), scale):
            found = np.asarray(scores(params, on_device, batch, head))
            out[places] = found[batch["real"]]
        return out if classes else out * scale.label_std + scale.label_mean

    best, kept, waited, epoch = -np.inf, params, 0, 0
    n = len(train.split.sizes)
    for _ in range(ROUNDS):
        done = 0
        while done < UPDATES:
            order = permute(np.arange(n), n, fold_all(seed, purpose("probe order"), epoch))
            for _, batch in batches(train, order, scale):
                params, state = update(params, state, on_device, batch, rate, decay, head, classes)
                done += 1
            epoch += 1
        found = score(valid.split, predict(valid, params))
        if found > best:
            best, kept, waited = found, jax.tree.map(np.asarray, params), 0
        else:
            waited += 1
            if waited == PATIENCE:
                break
    return best, functools.partial(predict, params=kept)


def batches(data: Data, order: np.ndarray, scale: Scale) -> Iterator[tuple[np.ndarray, dict]]:
    """Proteins in `order`, those of like length together; with the places of their labels.

    Arrays are [B, T]: 'x' [B, T, D], 'label', 'used' and 'real' (False in padding). T is a power of
    two and B follows from it, so that few shapes are compiled.
    """
    sizes = data.split.sizes
    starts = np.cumsum(sizes) - sizes
    lengths = np.maximum(2 ** np.ceil(np.log2(sizes)).astype(int), 1)
    lengths = np.where(lengths > 1, np.maximum(lengths, 64), 1)
    waiting: dict[int, list[int]] = {}
    for protein in order.tolist():
        T = int(lengths[protein])
        group = waiting.setdefault(T, [])
        group.append(protein)
        if len(group) == _rows(T):
            yield _batch(data, group, T, starts, scale)
            group.clear()
    for T, group in waiting.items():
        if group:
            yield _batch(data, group, T, starts, scale)


def _rows(T: int) -> int:
    return PROTEINS if T == 1 else max(1, TOKENS // T)


def _batch(data: Data, group: list[int], T: int, starts, scale: Scale):
    split = data.split
    real = np.zeros((_rows(T), T), bool)
    real[: len(group)] = np.arange(T) < split.sizes[group][:, None]
    places = np.concatenate([np.arange(split.sizes[p]) + starts[p] for p in group])
    batch = {"real": real, "used": np.zeros(real.shape, bool)}
    batch["x"] = np.zeros((*real.shape, data.features.shape[1]), data.features.dtype)
    batch["x"][real] = data.features[places]
    batch["used"][real] = split.used[places]
    if split.labels.dtype.kind == "f":
        labels = ((split.labels - scale.label_mean) / scale.label_std).astype(np.float32)
    else:
        labels = split.labels.astype(np.int32)
    batch["label"] = np.zeros(real.shape, labels.dtype)
    batch["label"][real] = labels[places]
    return places, batch
