"""Contact maps of one protein: from its attention maps, or from its categorical Jacobian; and the
fit of the contact head, a logistic regression with an L1 penalty on a few structures.

The categorical Jacobian (Zhang et al., "Protein language models learn evolutionary statistics of
interacting sequence motifs", 2024) is how the logits of every residue j change with every
substitution of every residue i. It needs no training, no attention weights and no structure.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from esm1nv_jax.common.errors import UserError
from esm1nv_jax.data import tokenizer
from esm1nv_jax.data.tokenizer import FIRST_RESIDUE, STANDARD
from esm1nv_jax.inference.engine import OutputSpec, fill_rows, run_batches
from esm1nv_jax.inference.loaded_model import DeviceModel
from esm1nv_jax.inference.row_shapes import RowBatch
from esm1nv_jax.inference.structures import MIN_SEPARATION, Structure
from esm1nv_jax.model import contact_head
from esm1nv_jax.model.encoder_config import EncoderConfig

METHODS = ("jacobian", "attention")
LENGTH_STEP = 32  # tokens; so many passes are worth a row that is no longer than it must be
ARRAY_BYTES = 4 << 30  # the most that attention maps or a Jacobian may take on the host
MIN_STRUCTURES, MAX_STRUCTURES = 2, 20  # to fit the contact head to
INVERSE_PENALTY = 0.15  # C of Rao et al. 2021
FEATURE_BYTES = 2 << 30  # three times that are in use
AMINO_ACIDS = slice(FIRST_RESIDUE, FIRST_RESIDUE + STANDARD)  # columns of the standard amino acids


def attention_maps(model: DeviceModel, ids: np.ndarray) -> np.ndarray:
    """Attention weights of one sequence of token ids without specials: float32 [L, N, T, T] with
    T = residues + 2.

    Raises UserError where they would not fit into memory.
    """
    check_size(model.config, len(ids), "attention")
    T = len(ids) + 2
    return _run(model, ids, "attention")["attention"][0, :, :, :T, :T]


def predict_contacts(
    model: DeviceModel,
    ids: np.ndarray,
    method: str,
    on_progress: Callable[[int], None] = lambda passes: None,
) -> np.ndarray:
    """Scores of contact by one of METHODS, higher is likelier: float32 [residues, residues].

    Probabilities by the contact head ("attention"), or `coupling_strength` ("jacobian": 20 passes
    for each residue). `on_progress` is called with how many passes are done.

    Raises UserError where the method is unknown, the model has no contact head, or the Jacobian
    or the attention maps would not fit into memory.
    """
    check_method(method, contact_head.NAME in model.params)
    check_size(model.config, len(ids), method)
    if method == "attention":
        results = _run(model, ids, "contacts")
        on_progress(1)
        return results["contacts"][0, 1 : len(ids) + 1, 1 : len(ids) + 1]
    return coupling_strength(categorical_jacobian(model, ids, on_progress))


def check_method(method: str, has_contact_head: bool) -> None:
    """Raises UserError where `method` is unknown, or needs a contact head that is not there."""
    if method not in METHODS:
        raise UserError(f"method {method!r} is unknown; there are {', '.join(METHODS)}")
    if method == "attention" and not has_contact_head:
        raise UserError(
            "this model has no contact head; fit one to structures with esm1nv contacts --fit "
            "STRUCTURES, or take --method jacobian"
        )


def _run(model: DeviceModel, ids: np.ndarray, kind: str) -> dict:
    """Results of one sequence in a row of its own."""
    tokens = tokenizer.add_specials(ids)
    row = RowBatch(model.shapes.length(len(tokens)), [[0]])
    arrays, _ = fill_rows(row, [tokens], model.shapes.devices)
    [(results, _)] = run_batches(model, [(arrays, None)], OutputSpec((kind,), ()))
    return results


def categorical_jacobian(
    model: DeviceModel, ids: np.ndarray, on_progress: Callable[[int], None] = lambda passes: None
) -> np.ndarray:
    """Logits [i, a, j, b] of amino acid b at residue j where residue i is a: float32
    [residues, 20, residues, 20], in the order of `tokenizer.RESIDUES`."""
    L, tokens = len(ids), tokenizer.add_specials(ids)
    T = -(-len(tokens) // LENGTH_STEP) * LENGTH_STEP
    B, total = model.shapes.rows(T), STANDARD * L
    jacobian = np.empty((total, L, STANDARD), np.float32)

    def batches():
        for first in range(0, total, B):
            changes = np.arange(first, min(first + B, total))
            copies = np.tile(tokens, (len(changes), 1))
            column, amino_acid = changes // STANDARD + 1, changes % STANDARD
            copies[np.arange(len(changes)), column] = FIRST_RESIDUE + amino_acid
            arrays, _ = fill_rows(RowBatch(T, [[k] for k in range(len(changes))]), [*copies], B)
            yield arrays, changes

    for results, changes in run_batches(model, batches(), OutputSpec(("logits",), ())):
        jacobian[changes] = results["logits"][: len(changes), 1 : L + 1, AMINO_ACIDS]
        on_progress(int(changes[-1]) + 1)
    return jacobian.reshape(L, STANDARD, L, STANDARD)


def coupling_strength(jacobian: np.ndarray) -> np.ndarray:
    """Scores [residues, residues] of a Jacobian, which is centred in place.

    Centred over each of its axes, symmetrised as the mean of [i, a, j, b] and [j, b, i, a]; then
    the Frobenius norm over amino acids, and APC.
    """
    for axis in range(4):
        jacobian -= jacobian.mean(axis=axis, keepdims=True)
    norms = np.stack(
        [
            np.linalg.norm(block + np.moveaxis(jacobian[:, :, i], 2, 0), axis=(0, 2)) / 2
            for i, block in enumerate(jacobian)
        ]
    )
    np.fill_diagonal(norms, 0)
    scores = np.array(contact_head.average_product_correction(norms))
    np.fill_diagonal(scores, 0)
    return scores


def check_size(
    config: EncoderConfig, residues: int, method: str, name: str = "the sequence"
) -> None:
    """Raises UserError where the Jacobian or the attention maps of a protein `name` would take more
    than ARRAY_BYTES."""
    what, size = "Jacobian", 4 * (STANDARD * residues) ** 2
    if method == "attention":
        what, size = "attention maps", 4 * config.layers * config.heads * (residues + 2) ** 2
    if size > ARRAY_BYTES:
        raise UserError(
            f"{name} has {residues:,} residues, its {what} would take {size / 2**30:.1f} GiB, the "
            f"limit is {ARRAY_BYTES >> 30} GiB; cut it into domains"
        )


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

    x: float32 [n, K]. y: bool [n]. C: `inverse_penalty`.

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
