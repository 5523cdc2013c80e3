"""Fitting the contact head: a logistic regression with an L1 penalty on a few structures."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from esm1nv_jax.common.errors import UserError
from esm1nv_jax.inference.contact_maps import attention_maps
from esm1nv_jax.inference.contact_metrics import MIN_SEPARATION
from esm1nv_jax.inference.device_model import DeviceModel
from esm1nv_jax.inference.structures import Structure
from esm1nv_jax.model import contact_head

MIN_STRUCTURES, MAX_STRUCTURES = 2, 20
INVERSE_PENALTY = 0.15  # C of Rao et al. 2021
FEATURE_BYTES = 2 << 30  # three times that are in use


def fit_contact_head(
    model: DeviceModel,
    structures: Sequence[Structure],
    ids: Sequence[np.ndarray],
    on_progress: Callable[[int], None] = lambda structures: None,
) -> dict:
    """Parameters of the contact head, fitted to the pairs of resolved residues at least 6 apart.

    `ids` are the token ids of the structures' residues. Raises UserError where the features would
    not fit into memory, or the structures have no contacts.
    """
    features = model.config.layers * model.config.heads
    pairs = sum(len(s.sequence) ** 2 // 2 for s in structures)
    size = 4 * pairs * features
    if size > FEATURE_BYTES:
        raise UserError(
            f"--fit: {features} features of {pairs:,} pairs take {size / 2**30:.1f} GiB, the limit "
            f"is {FEATURE_BYTES >> 30} GiB; give fewer or shorter structures"
        )
    x, y = [], []
    for done, (structure, tokens) in enumerate(zip(structures, ids, strict=True), 1):
        i, j = np.triu_indices(len(tokens), MIN_SEPARATION)
        used = structure.is_resolved[i] & structure.is_resolved[j]
        maps = attention_maps(model, tokens)[:, :, 1:-1, 1:-1]
        is_residue = np.ones((len(maps), len(tokens)), bool)
        corrected = np.asarray(contact_head.features(maps, is_residue))
        x.append(corrected.reshape(features, *corrected.shape[2:])[:, i[used], j[used]].T)
        y.append(structure.is_contact[i, j][used])
        on_progress(done)
    is_contact = np.concatenate(y)
    if not is_contact.any() or is_contact.all():
        raise UserError(
            f"the structures of --fit have {is_contact.sum():,} contacts among {len(is_contact):,} "
            f"pairs of residues at least {MIN_SEPARATION} apart; give structures with some"
        )
    kernel, bias = fit_logistic_regression(np.concatenate(x), is_contact)
    return {"kernel": kernel[:, None].astype(np.float32), "bias": np.array([bias], np.float32)}


def fit_logistic_regression(
    x: np.ndarray, y: np.ndarray, inverse_penalty: float = INVERSE_PENALTY
) -> tuple[np.ndarray, float]:
    """(weights [K], intercept) that minimize sum |weights| + C * sum of logistic losses.

    Args:
      x: float32 [n, K]. y: bool [n]. inverse_penalty: C.

    Weights are split into their positive and negative parts, which makes the problem smooth with
    bounds; features are scaled to unit deviation inside, and the penalty with them.
    """
    from scipy.optimize import minimize

    K, C = x.shape[1], np.float32(inverse_penalty)
    scale = x.std(axis=0, dtype=np.float64)
    scale = np.where(scale > 0, scale, 1).astype(np.float32)
    x, sign = x / scale, np.where(y, -1, 1).astype(np.float32)
    penalty = np.tile(1 / scale, 2).astype(np.float64)

    def loss(parts):
        weights = (parts[:K] - parts[K:-1]).astype(np.float32)
        margin = sign * (x @ weights + np.float32(parts[-1]))
        slope = C * sign * (0.5 + 0.5 * np.tanh(margin / 2))
        total = C * np.logaddexp(0, margin).sum(dtype=np.float64) + parts[:-1] @ penalty
        gradient = (slope @ x).astype(np.float64)
        by_part = np.concatenate([gradient, -gradient]) + penalty
        return total, np.append(by_part, slope.sum(dtype=np.float64))

    rate = y.mean()
    start = np.append(np.zeros(2 * K), np.log(rate / (1 - rate)))
    bounds = [(0, None)] * (2 * K) + [(None, None)]
    options = {"maxiter": 2_000, "maxfun": 4_000, "ftol": 1e-9}
    best = minimize(loss, start, jac=True, method="L-BFGS-B", bounds=bounds, options=options).x
    return (best[:K] - best[K:-1]) / scale, float(best[-1])
