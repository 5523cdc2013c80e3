"""Heads of fine-tuned models as `transformers` has them: For{Token,Sequence}Classification."""

from __future__ import annotations

from typing import Any

import numpy as np

from esm1nv_jax.checkpoints.model_folder import flatten
from esm1nv_jax.common.errors import UserError
from esm1nv_jax.interchange.tensor_names import ESM, Family
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
    if problem not in kinds:
        raise UserError(
            f"{source}: problem_type is {problem!r}; there are {', '.join(PROBLEMS.values())}"
        )
    kind = kinds[problem]
    labels = fields.get("id2label") or {str(i): f"LABEL_{i}" for i in range(len(bias))}
    classes = tuple(str(labels.get(str(i))) for i in range(len(bias)))
    if len(labels) != len(bias) or (kind == "regression" and len(bias) != 1):
        raise UserError(
            f"{source}: the head has {len(bias)} outputs, id2label {len(labels)} labels, and "
            f"problem_type is {problem!r}; they must agree, and a regression has one"
        )
    return HeadConfig(levels[0], kind, () if kind == "regression" else classes, "cls")


def to_hf_tensors(
    family: Family, head: HeadConfig, params: dict[str, np.ndarray]
) -> dict[str, np.ndarray]:
    """Tensors of a head from its parameters, such as `out_proj/kernel`."""
    tensors = {}
    for ours, theirs in _modules(family, head).items():
        tensors[f"{theirs}.weight"] = params[f"{ours}/kernel"].T
        tensors[f"{theirs}.bias"] = params[f"{ours}/bias"]
    return tensors


def pop_params(
    family: Family, head: HeadConfig, tensors: dict[str, np.ndarray], width: int, source: str
) -> dict[str, np.ndarray]:
    """The parameters of a head, whose tensors are removed; inverts `to_hf_tensors`.

    Raises UserError that names the first tensor which is missing or of a wrong shape.
    """
    shapes = {k: v.shape for k, v in flatten(heads.abstract(head, width)).items()}
    params = {}
    for ours, theirs in _modules(family, head).items():
        for part, kind in (("kernel", "weight"), ("bias", "bias")):
            tensor, shape = tensors.pop(f"{theirs}.{kind}", None), shapes[f"{ours}/{part}"]
            if tensor is None or tensor.T.shape != shape or tensor.dtype != np.float32:
                found = "missing" if tensor is None else f"{tensor.dtype} {tensor.shape}"
                raise UserError(
                    f"{source}: tensor {theirs}.{kind} is {found}; "
                    f"{architecture(family, head)} has floats of shape {shape[::-1]}"
                )
            params[f"{ours}/{part}"] = np.ascontiguousarray(tensor.T)
    return params


CONTACTS = {"kernel": "contact_head.regression.weight", "bias": "contact_head.regression.bias"}


def to_contact_tensors(
    config: EncoderConfig, params: dict[str, np.ndarray] | None
) -> dict[str, np.ndarray]:
    """Tensors of ESM's contact head; zero where there is none, for `transformers` would draw them
    at random at every start."""
    tensors = {}
    for ours, like in contact_head.abstract(config).items():
        value = params[ours] if params else np.zeros(like.shape, np.float32)
        tensors[f"esm.{CONTACTS[ours]}"] = np.ascontiguousarray(value.T)
    return tensors


def pop_contact_params(
    config: EncoderConfig, tensors: dict[str, np.ndarray], source: str, prefix: str = "esm."
) -> dict[str, np.ndarray]:
    """The parameters of a contact head, whose tensors are removed; none where there is
    none or it is zero. Raises UserError for one of another shape."""
    popped = {ours: tensors.pop(prefix + theirs, None) for ours, theirs in CONTACTS.items()}
    if not any(value is not None and value.any() for value in popped.values()):
        return {}
    params = {}
    for ours, like in contact_head.abstract(config).items():
        value = popped[ours]
        if value is None or value.T.shape != like.shape or value.dtype != np.float32:
            found = "missing" if value is None else f"{value.dtype} {value.shape}"
            raise UserError(
                f"{source}: tensor {prefix}{CONTACTS[ours]} is {found}; {config.layers} layers of "
                f"{config.heads} heads have floats of shape {like.shape[::-1]}"
            )
        params[ours] = np.ascontiguousarray(value.T)
    return params


def _modules(family: Family, head: HeadConfig) -> dict[str, str]:
    """Linear layers: ours to theirs."""
    if head.level == "residue":
        return {"out_proj": "classifier"}
    if family is ESM:
        return {"dense": "classifier.dense", "out_proj": "classifier.out_proj"}
    return {"dense": "bert.pooler.dense", "out_proj": "classifier"}
