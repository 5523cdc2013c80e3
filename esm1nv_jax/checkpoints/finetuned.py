"""A fine-tuned run at rest: its checkpoints hold the trained parameters, and name their base.

The metadata of each step say what is needed to make a whole model of it: `base`, the path and the
digest of the parameters that training left as they are; `lora`, the config of LoRA; `head`, that of
the head; `label_scale`, the mean and standard deviation in whose units a regression was trained.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable

import numpy as np
from etils import epath

from esm1nv_jax.checkpoints import model_folder, step_folder
from esm1nv_jax.checkpoints.model_folder import StepPath, Weights, flatten, unflatten
from esm1nv_jax.checkpoints.step_folder import BEST
from esm1nv_jax.common.errors import UserError
from esm1nv_jax.model import lora
from esm1nv_jax.model.encoder_config import EncoderConfig
from esm1nv_jax.model.heads import HeadConfig


def digest(params: dict) -> str:
    """Return a SHA-256 of names, shapes and values of parameters."""
    total = hashlib.sha256()
    for name, value in sorted(flatten(params).items()):
        array = np.ascontiguousarray(np.asarray(value, np.float32))
        total.update(f"{name} {array.shape}\n".encode())
        total.update(array.data)
    return total.hexdigest()


def find(path: str) -> StepPath | None:
    """Return the step that `path` names where it is a fine-tuned run or step; else None.

    Of a run it is the step that validates best, if there is one, and not the newest.
    """
    found = model_folder.find_step(path)
    if found is None:
        return None
    run, step, folder = found
    try:
        if "head" not in step_folder.read_metadata(run, step, folder):
            return None
    except (OSError, ValueError):
        return None  # `model_folder.read` says what is wrong
    best = step_folder.steps(run, BEST) if epath.Path(path) == run else []
    return StepPath(run, best[-1], BEST) if best else found


def read(run: epath.Path, step: int, folder: str, load_base: Callable[[str], Weights]) -> Weights:
    """Return the whole model of a step of a fine-tuned run, LoRA merged, the head in units of the
    label.

    Raises UserError where the step is damaged, or the base model is gone or has other parameters.
    """
    model_folder.check_step(run, step, folder, items=("params", "metadata"))
    source = f"checkpoint {step} of {run}"
    try:
        metadata = step_folder.read_metadata(run, step, folder)
        trained = step_folder.read_params(run, step, folder)
        model = EncoderConfig(**metadata["config"]["model"])
        head = HeadConfig(**metadata["head"])
        mean, std = metadata["label_scale"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{source} cannot be read: {error} (esm1nv doctor {run})") from None
    adapters = trained.pop("lora", None)
    base = metadata["base"]
    if base is None:
        params = trained
    else:
        params = unflatten(flatten(_base(source, base, load_base)) | flatten(trained))
    if adapters is not None:
        params = lora.merge(params, adapters, lora.LoraConfig(**metadata["lora"]))
    params["head"] = scale_head(params["head"], mean, std)
    model_folder.check(params, model, source, head)
    return Weights(params, model, {"run": str(run), "steps": [step]} | metadata, head)


def scale_head(head: dict, mean: float, std: float) -> dict:
    """Return the parameters of a head whose outputs are `std` times as large, plus `mean`."""
    last = head["out_proj"]
    kernel = np.asarray(last["kernel"]) * np.float32(std)
    bias = np.asarray(last["bias"]) * np.float32(std) + np.float32(mean)
    return head | {"out_proj": {"kernel": kernel, "bias": bias}}


def _base(source: str, base: dict, load_base: Callable[[str], Weights]) -> dict:
    try:
        params = load_base(base["path"]).encoder_params
    except UserError as error:
        raise UserError(
            f"{source} is fine-tuned from {base['path']}, which cannot be read ({error}); put the "
            "base model there again"
        ) from None
    if (found := digest(params)) != base["digest"]:
        raise UserError(
            f"{source} is fine-tuned from {base['path']} with digest {base['digest'][:16]}, but "
            f"the model there now has {found[:16]}; put the base model there again"
        )
    return params
