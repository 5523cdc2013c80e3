"""Heads of fine-tuned models as `transformers` has them: For{Token,Sequence}Classification."""

from __future__ import annotations

from typing import Any

import numpy as np

from esm1nv_jax.checkpoints.model_folder import flatten
from esm1nv_jax.common.errors import UserError
from esm1nv_jax.interchange.hf_config import ESM
from esm1nv_jax.interchange.tensor_names import Family, check_finite
from esm1nv_jax.model import contact_head, heads
from esm1nv_jax.model.encoder_config import EncoderConfig
from esm1nv_jax.model.heads import HeadConfig

ENDINGS = {"residue": "ForTokenClassification", "protein": "ForSequenceClassification"}
PROBLEMS = {
    "classification": "single_label_classification",
    "multilabel": "multi_label_classification",
    "regression": "regression",
}


def architecture(family: Family, head: HeadConfig | None) -> str:
    """The class of `transformers` that computes a model with this head, or without one."""
    if head is None:
        return family.architecture
    return family.architecture.removesuffix("ForMaskedLM") + ENDINGS[head.level]


def inexact_reason(head: HeadConfig | None) -> str | None:
    """Why `transformers` has no such head, or None."""
    if head is None or head.level == "residue" or head.pooling == "cls":
        return None
    return (
        f"a head that pools by {head.pooling!r} has no equal in transformers, whose "
        "ForSequenceClassification reads <s>; fine-tune with pooling 'cls' to convert, or use this "
        "model by esm1nv predict"
    )


def config_fields(head: HeadConfig) -> dict[str, Any]:
    """Fields of config.json; a regression has the one label that `transformers` calls LABEL_0."""
    labels = head.classes or ("LABEL_0",)
    return {
        "id2label": {str(i): label for i, label in enumerate(labels)},
        "label2id": {label: i for i, label in enumerate(labels)},
        "problem_type": PROBLEMS[head.kind],
    }


def read_config(
    fields: dict[str, Any], tensors: dict[str, np.ndarray], source: str
) -> HeadConfig | None:
    """The HeadConfig of a folder, None where its architecture has no head.

    Classes without names are LABEL_0, LABEL_1, ..., as there; one output without a `problem_type`
    is a regression, several are classes. Raises UserError where the fields contradict each other.
    """
    name = (fields.get("architectures") or [""])[0]
    levels = [level for level, ending in ENDINGS.items() if str(name).endswith(ending)]
    if not levels:
        return None
    bias = tensors.get("classifier.out_proj.bias", tensors.get("classifier.bias"))
    if bias is None or bias.ndim != 1:
        raise UserError(f"{source}: a {name} has a tensor classifier.bias, which is missing here")
    problem = fields.get("problem_type")
    problem = problem or PROBLEMS["regression" if len(bias) == 1 else "classification"]
    kinds = {value: kind for kind, value in PROBLEMS.items()}
    if not isinstance(problem, str) or problem not in kinds:
        raise UserError(
            f"{source}: problem_type is {problem!r}; there are {', '.join(PROBLEMS.values())}"
        )
    kind = kinds[problem]
    labels = fields.get("id2label") or {str(i): f"LABEL_{i}" for i in range(len(bias))}
    indices = [str(i) for i in range(len(bias))]
    classes = tuple(str(labels.get(i)) for i in indices)
    if set(labels) != set(indices) or (kind == "regression" and len(bias) != 1):
        raise UserError(
            f"{source}: the head has {len(bias)} outputs, id2label {len(labels)} labels (from "
            f"{min(labels)!r}), and problem_type is {problem!r}; labels are numbered from 0, one "
            "for each output, and a regression has one"
        )
    return HeadConfig(levels[0], kind, () if kind == "regression" else classes, "cls")


def to_hf_tensors(
    family: Family, head: HeadConfig, params: dict[str, np.ndarray]
) -> dict[str, np.ndarray]:
    """Tensors of a head from its parameters, such as `out_proj/kernel`."""
    return {theirs: params[ours].T for ours, theirs in _head_names(family, head).items()}


def pop_params(
    family: Family, head: HeadConfig, tensors: dict[str, np.ndarray], width: int, source: str
) -> dict[str, np.ndarray]:
    """The parameters of a head, whose tensors are removed; inverts `to_hf_tensors`.

    Raises UserError that names the first tensor which is missing or of a wrong shape.
    """
    shapes = {k: v.shape for k, v in flatten(heads.abstract(head, width)).items()}
    return _pop(tensors, _head_names(family, head), shapes, architecture(family, head), source)


def to_contact_tensors(
    family: Family, config: EncoderConfig, params: dict[str, np.ndarray] | None
) -> dict[str, np.ndarray]:
    """Tensors of ESM's contact head; zero where there is none, for `transformers` would draw them
    at random at every start."""
    zeros = {k: np.zeros(v.shape, np.float32) for k, v in contact_head.abstract(config).items()}
    return {
        theirs: np.ascontiguousarray((params or zeros)[ours].T)
        for ours, theirs in _layer_names("", family.contact_head).items()
    }


def pop_contact_params(
    family: Family, config: EncoderConfig, tensors: dict[str, np.ndarray], source: str
) -> dict[str, np.ndarray] | None:
    """The parameters of a contact head, whose tensors are removed; None where there is none, or it
    is zero. Raises UserError for one of another shape."""
    names = _layer_names("", family.contact_head)
    present = [tensors[name] for name in names.values() if name in tensors]
    shapes = {k: v.shape for k, v in contact_head.abstract(config).items()}
    model = f"a model with {config.layers} layers of {config.heads} heads"
    params = _pop(tensors, names, shapes, model, source) if present else {}
    return params if any(value.any() for value in params.values()) else None


def _pop(tensors, names, shapes, model: str, source: str) -> dict[str, np.ndarray]:
    """Parameters by name, whose tensors are removed. `names`: ours to theirs."""
    params = {}
    for ours, theirs in names.items():
        tensor, shape = tensors.pop(theirs, None), shapes[ours]
        if tensor is None or tensor.T.shape != shape or tensor.dtype != np.float32:
            found = "missing" if tensor is None else f"{tensor.dtype} {tensor.shape}"
            raise UserError(
                f"{source}: tensor {theirs} is {found}; {model} has floats of shape {shape[::-1]}"
            )
        params[ours] = np.ascontiguousarray(tensor.T)
    check_finite(params, source)
    return params


def _layer_names(ours: str, theirs: str) -> dict[str, str]:
    return {f"{ours}kernel": f"{theirs}.weight", f"{ours}bias": f"{theirs}.bias"}


def _head_names(family: Family, head: HeadConfig) -> dict[str, str]:
    """Parameters of a head: ours to theirs."""
    layers = {"out_proj": "classifier"}
    if head.level == "protein" and family is ESM:
        layers = {"dense": "classifier.dense", "out_proj": "classifier.out_proj"}
    elif head.level == "protein":
        layers |= {"dense": "bert.pooler.dense"}
    return {
        k: v for ours, theirs in layers.items() for k, v in _layer_names(f"{ours}/", theirs).items()
    }
