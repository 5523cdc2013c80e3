"""Contact maps of one protein: from its attention maps, or from its categorical Jacobian.

The categorical Jacobian (Zhang et al., "Protein language models learn evolutionary statistics of
interacting sequence motifs", 2024) is how the logits of every residue j change with every
substitution of every residue i. It needs no training, no attention weights and no structure.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np

from esm1nv_jax.common.errors import UserError
from esm1nv_jax.data import tokenizer
from esm1nv_jax.data.tokenizer import FIRST_RESIDUE, STANDARD
from esm1nv_jax.inference.device_model import DeviceModel
from esm1nv_jax.inference.engine import OutputSpec, fill_rows, run_batches
from esm1nv_jax.inference.row_shapes import RowBatch
from esm1nv_jax.model import contact_head
from esm1nv_jax.model.encoder_config import EncoderConfig

METHODS = ("jacobian", "attention")
LENGTH_STEP = 32  # tokens; so many passes are worth a row that is no longer than it must be
ARRAY_BYTES = 4 << 30  # the most that attention maps or a Jacobian may take on the host
AMINO_ACIDS = slice(FIRST_RESIDUE, FIRST_RESIDUE + STANDARD)  # columns of the standard amino acids


def attention_maps(model: DeviceModel, ids: np.ndarray) -> np.ndarray:
    """Attention weights of one sequence of token ids without specials: float32 [L, N, T, T] with
    T = residues + 2.

    Raises UserError where they would not fit into memory.
    """
    check_size(model.config, len(ids), "attention")
    T = len(ids) + 2
    [results] = _run(model, ids, "attention")
    return results["attention"][0, :, :, :T, :T]


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
        [results] = _run(model, ids, "contacts")
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


def _run(model: DeviceModel, ids: np.ndarray, kind: str) -> Iterator[dict]:
    """Results of one sequence in a row of its own."""
    tokens = tokenizer.add_specials(ids)
    row = RowBatch(model.shapes.length(len(tokens)), [[0]])
    arrays, _ = fill_rows(row, [tokens], model.shapes.devices)
    for results, _ in run_batches(model, [(arrays, None)], OutputSpec((kind,), ())):
        yield results


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
