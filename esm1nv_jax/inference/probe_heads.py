"""Small heads on frozen features: a linear one, a two-layer CNN, an MLP.

The linear head is convex: it is fitted to convergence by L-BFGS, at an L2 penalty chosen on the
validation split. The others have the shapes of FLIP's probes (Dallago et al., 2021): convolutions
of 7 residues through 32 channels, or layers of 256 and 128; without their dropout, the round that
validates best is kept instead.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np
import optax
from scipy.optimize import minimize

from esm1nv_jax.common.hashing import fold_all, permute, purpose
from esm1nv_jax.data.labeled_data import Split

KERNEL, CHANNELS, LAYERS = 7, 32, (256, 128)
ROUNDS, PATIENCE = 30, 4  # validation follows every round: an epoch, or as many as make
STEPS = 50  # so many steps
TOKENS, PROTEINS = 8_192, 128  # in a batch: labels where they are of residues, else proteins
CHUNK = 16_384  # labels of a linear head on the device at once
ITERATIONS = 1_000  # of L-BFGS, at most
HIGHEST = jax.lax.Precision.HIGHEST  # else an A100 would use TF32 and a TPU bf16

Score = Callable[[Split, np.ndarray], float]  # of predictions [k, outputs]; higher is better


@dataclasses.dataclass(frozen=True)
class Setting:
    """What is chosen on the validation split. The linear head has no learning rate."""

    weight_decay: float  # of the linear head: of its mean loss, l2 / 2 times the squared weights
    learning_rate: float = 0.0


GRIDS = {"linear": tuple(Setting(l2) for l2 in (1e-1, 1e-2, 1e-3, 1e-4, 1e-5))}
GRIDS["cnn"] = GRIDS["mlp"] = tuple(
    Setting(decay, rate) for rate in (1e-3, 1e-2) for decay in (0.0, 0.3)
)


@dataclasses.dataclass(frozen=True)
class LabeledFeatures:
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
    def of(cls, data: LabeledFeatures, regression: bool) -> Scale:
        """In fp64, a chunk at a time."""
        sums = np.zeros((2, data.features.shape[1]))
        for start in range(0, len(data.features), CHUNK):
            x = data.features[start : start + CHUNK].astype(np.float64)
            sums += np.stack([x.sum(axis=0), (x**2).sum(axis=0)])
        mean, square = sums / len(data.features)
        std = np.sqrt(np.maximum(square - mean**2, 0))
        # A feature that hardly varied in training, such as a rare letter, must not tower over all.
        std = np.maximum(std, 0.25 * np.median(std) or 1.0)
        scale = (mean.astype(np.float32), std.astype(np.float32))
        if not regression:
            return cls(*scale)
        labels = data.split.labels[data.split.used]
        return cls(*scale, float(labels.mean()), float(labels.std()) or 1.0)

    def labels(self, split: Split) -> np.ndarray:
        if split.labels.dtype.kind == "f":
            return ((split.labels - self.label_mean) / self.label_std).astype(np.float32)
        return split.labels.astype(np.int32)


def fit_best(
    head: str,
    classes: int,
    data: dict[str, LabeledFeatures],
    settings: Sequence[Setting],
    seed: int,
    score: Score,
    on_fit: Callable[[], None],
) -> tuple[Setting, Callable[[LabeledFeatures], np.ndarray]]:
    """The setting that validates best, and its predictor; see `fit`. `on_fit` follows each."""
    fits = []
    for setting in settings:
        fits.append(fit(head, classes, data["train"], data["valid"], setting, seed, score))
        on_fit()
    best = max(range(len(fits)), key=lambda i: (fits[i][0] == fits[i][0], fits[i][0], -i))
    return settings[best], fits[best][1]


def fit(
    head: str,
    classes: int,
    train: LabeledFeatures,
    valid: LabeledFeatures,
    setting: Setting,
    seed: int,
    score: Score,
) -> tuple[float, Callable[[LabeledFeatures], np.ndarray]]:
    """(score on `valid`, predictor). `classes` is 0 in regression. The predictor gives float32
    [k, outputs], in units of the label."""
    scale = Scale.of(train, regression=not classes)
    if head == "linear":
        params = fit_linear(classes, train, scale, setting.weight_decay)
        predict = functools.partial(_predict_linear, params, scale)
        return score(valid.split, predict(valid)), predict
    return _fit_network(head, classes, train, valid, scale, setting, seed, score)


def fit_linear(
    classes: int, train: LabeledFeatures, scale: Scale, l2: float
) -> dict[str, np.ndarray]:
    """`kernel` [D, outputs] and `bias` [outputs] that minimise mean loss + l2 / 2 |kernel|^2."""
    D, outputs = train.features.shape[1], classes or 1
    labels, used = scale.labels(train.split), train.split.used
    n = int(used.sum())

    def unpack(flat):
        return {"kernel": flat[outputs:].reshape(D, outputs), "bias": flat[:outputs]}

    def objective(flat: np.ndarray):
        params = jax.tree.map(np.float32, unpack(flat))
        total, gradient = 0.0, np.zeros_like(flat)
        for start in range(0, len(labels), CHUNK):
            chunk = [x[start : start + CHUNK] for x in (train.features, labels, used)]
            missing = CHUNK - len(chunk[1])
            if missing and start:  # one shape but for a single, short chunk
                chunk = [np.pad(x, [(0, missing)] + [(0, 0)] * (x.ndim - 1)) for x in chunk]
            loss, grads = _linear_loss(params, scale.mean, scale.std, *chunk, classes)
            total += float(loss)
            gradient[:outputs] += grads["bias"]
            gradient[outputs:] += np.ravel(grads["kernel"])
        kernel = flat[outputs:]
        gradient /= n
        gradient[outputs:] += l2 * kernel
        return total / n + l2 / 2 * float(kernel @ kernel), gradient

    zeros = np.zeros(outputs * (D + 1))
    options = {"maxiter": ITERATIONS, "maxfun": 2 * ITERATIONS, "ftol": 1e-10, "gtol": 1e-5}
    result = minimize(objective, zeros, jac=True, method="L-BFGS-B", options=options)
    return jax.tree.map(np.float32, unpack(result.x))


@functools.partial(jax.jit, static_argnames="classes")
def _linear_loss(params, mean, std, x_KD, label_K, used_K, classes: int):
    def total(params):
        x = (x_KD.astype(jnp.float32) - mean) / std
        logits = jnp.matmul(x, params["kernel"], precision=HIGHEST) + params["bias"]
        return jnp.sum(jnp.where(used_K, _loss(logits, label_K, classes), 0))

    return jax.value_and_grad(total)(params)


def _loss(scores, labels, classes: int):
    """Cross-entropy, or squared error of the scaled label, of each label."""
    if classes:
        return optax.softmax_cross_entropy_with_integer_labels(scores, labels)
    return jnp.square(scores[..., 0] - labels)


def _predict_linear(params, scale: Scale, data: LabeledFeatures) -> np.ndarray:
    kernel = params["kernel"] / scale.std[:, None]
    bias = params["bias"] - scale.mean @ kernel
    chunks = range(0, len(data.features), CHUNK)
    scores = [data.features[i : i + CHUNK].astype(np.float32) @ kernel + bias for i in chunks]
    return np.concatenate(scores) * np.float32(scale.label_std) + np.float32(scale.label_mean)


def init(head: str, inputs: int, outputs: int, seed: int) -> dict:
    """Parameters of a network: N(0, 1 / inputs of a unit), doubled behind a ReLU."""

    def layer(number, *shape):
        key = jax.random.key(fold_all(seed, purpose("probe head"), number))
        std = (2 if number else 1) ** 0.5 * np.prod(shape[:-1]) ** -0.5
        return {"kernel": std * jax.random.normal(key, shape), "bias": jnp.zeros(shape[-1])}

    if head == "cnn":
        return {"0": layer(0, KERNEL, inputs, CHANNELS), "1": layer(1, KERNEL, CHANNELS, outputs)}
    sizes = (inputs, *LAYERS, outputs)
    return {str(i): layer(i, *pair) for i, pair in enumerate(itertools.pairwise(sizes))}


@jax.jit
def apply(params: dict, mean, std, x_BTD, real_BT):
    """Scores [B, T, outputs]. Padding (`real_BT` False) is as the end of the protein."""
    x_BTD = (x_BTD.astype(jnp.float32) - mean) / std
    for i in range(len(params)):
        layer = params[str(i)]
        x_BTD = jnp.where(real_BT[..., None], x_BTD, 0)
        if layer["kernel"].ndim == 3:
            x_BTD = jax.lax.conv_general_dilated(
                x_BTD,
                layer["kernel"],
                (1,),
                "SAME",
                dimension_numbers=("NWC", "WIO", "NWC"),
                precision=HIGHEST,
            )
        else:
            x_BTD = jnp.matmul(x_BTD, layer["kernel"], precision=HIGHEST)
        x_BTD = x_BTD + layer["bias"]
        if i < len(params) - 1:
            x_BTD = jax.nn.relu(x_BTD)
    return x_BTD


@functools.partial(jax.jit, static_argnames="classes", donate_argnums=(0, 1))
def train_step(params, state, mean, std, batch, rate, decay, classes: int):
    """One step of AdamW; `rate` and `decay` are traced, so that no setting compiles anew."""

    def mean_loss(params):
        scores = apply(params, mean, std, batch["x"], batch["real"])
        losses = jnp.where(batch["used"], _loss(scores, batch["label"], classes), 0)
        return jnp.sum(losses) / jnp.maximum(jnp.sum(batch["used"]), 1)

    updates, state = optax.scale_by_adam().update(jax.grad(mean_loss)(params), state, params)
    return jax.tree.map(lambda p, u: p - rate * (u + decay * p), params, updates), state


def _fit_network(head, classes, train, valid, scale: Scale, setting: Setting, seed, score: Score):
    """`fit` for the heads that are trained: the round that validates best."""
    params = init(head, train.features.shape[1], classes or 1, seed)
    state = optax.scale_by_adam().init(params)
    rate, decay = np.float32(setting.learning_rate), np.float32(setting.weight_decay)

    def predict(data: LabeledFeatures, params: dict) -> np.ndarray:
        out = np.zeros((len(data.features), classes or 1), np.float32)
        for rows, batch in batches(data, np.arange(len(data.split.sizes)), scale):
            scores = np.asarray(apply(params, scale.mean, scale.std, batch["x"], batch["real"]))
            out[rows] = scores[batch["real"]]
        return out * np.float32(scale.label_std) + np.float32(scale.label_mean)

    best, kept, waited, epoch = -np.inf, params, 0, 0
    n = len(train.split.sizes)
    for _ in range(ROUNDS):
        done = 0
        while done < STEPS:
            order = permute(np.arange(n), n, fold_all(seed, purpose("probe order"), epoch))
            for _, batch in batches(train, order, scale):
                params, state = train_step(
                    params, state, scale.mean, scale.std, batch, rate, decay, classes
                )
                done += 1
            epoch += 1
        value = score(valid.split, predict(valid, params))
        if value > best:
            best, kept, waited = value, jax.tree.map(np.asarray, params), 0
        else:
            waited += 1
            if waited == PATIENCE:
                break
    return best, functools.partial(predict, params=kept)


def batches(
    data: LabeledFeatures, order: np.ndarray, scale: Scale
) -> Iterator[tuple[np.ndarray, dict]]:
    """Proteins in `order`, those of like length together; with the rows of their labels.

    Arrays are [B, T]: 'x' [B, T, D], 'label', 'used' and 'real' (False in padding). T is a power of
    two and B follows from it, so that few shapes are compiled.
    """
    sizes, labels = data.split.sizes, scale.labels(data.split)
    starts = np.cumsum(sizes) - sizes
    lengths = np.maximum(2 ** np.ceil(np.log2(sizes)).astype(int), 1)
    lengths = np.where(lengths > 1, np.maximum(lengths, 64), 1)

    def batch(group: list[int], T: int):
        real = np.zeros((_rows(T), T), bool)
        real[: len(group)] = np.arange(T) < sizes[group][:, None]
        rows = np.concatenate([np.arange(sizes[p]) + starts[p] for p in group])
        arrays = {"real": real}
        for name, values in (("x", data.features), ("used", data.split.used), ("label", labels)):
            arrays[name] = np.zeros((*real.shape, *values.shape[1:]), values.dtype)
            arrays[name][real] = values[rows]
        return rows, arrays

    waiting: dict[int, list[int]] = {}
    for protein in order.tolist():
        T = int(lengths[protein])
        waiting.setdefault(T, []).append(protein)
        if len(waiting[T]) == _rows(T):
            yield batch(waiting.pop(T), T)
    for T, group in waiting.items():
        yield batch(group, T)


def _rows(T: int) -> int:
    return PROTEINS if T == 1 else max(1, TOKENS // T)
