"""A model at rest: parameters, config and where they came from; and finding one behind a path.

The checkpoints of a fine-tuned run hold the trained parameters only. The metadata of each step say
what makes a whole model of them: `base`, the path and the digest of the parameters that training
left as they are; `lora`, the config of LoRA; `head`, that of the head; `label_scale`, the mean and
standard deviation in whose units a regression was trained.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from etils import epath
from flax import traverse_util
from safetensors import SafetensorError
from safetensors.numpy import load as load_safetensors
from safetensors.numpy import save as save_safetensors

from esm1nv_jax.checkpoints import step_folder
from esm1nv_jax.checkpoints.step_folder import BEST, FOLDER
from esm1nv_jax.common import files
from esm1nv_jax.common.errors import UserError
from esm1nv_jax.model import contact_head, encoder, heads, lora
from esm1nv_jax.model.heads import HeadConfig

PARAMETERS, DESCRIPTION = "parameters.safetensors", "model.json"
NO_LM_HEAD = {"lm_head": "none"}  # in the provenance of a model that came without one

# Nested dictionaries to and from names such as `blocks/0/qkv/kernel`.
flatten = functools.partial(traverse_util.flatten_dict, sep="/")
unflatten = functools.partial(traverse_util.unflatten_dict, sep="/")


@dataclasses.dataclass(frozen=True)
class Weights:
    """Parameters on the host with what they belong to.

    params: nested, NumPy float32; those of a fine-tuned model's `head` are under "head".
    provenance: where they came from: run, steps, data, config, metrics; `base`, what it was
      fine-tuned from.
    contact_head: parameters of `model.contact_head`, if there are any.
    """

    params: dict
    model: encoder.EncoderConfig
    provenance: dict[str, Any]
    head: HeadConfig | None = None
    contact_head: dict | None = None

    @property
    def has_lm_head(self) -> bool:
        """Whether the model came with a masked-LM head."""
        return not self.provenance.items() >= NO_LM_HEAD.items()

    @property
    def encoder_params(self) -> dict:
        """The parameters without those of the head."""
        return {name: value for name, value in self.params.items() if name != "head"}


def read(path: str) -> Weights:
    """Weights of a run (its newest checkpoint), one of its steps, its `best` or a model folder.

    `interchange.loader.load_weights` also opens a folder of `transformers`.

    Raises UserError where there is none, with what was looked for.
    """
    folder = epath.Path(path)
    if not folder.exists():
        raise UserError(f"checkpoint {path} does not exist; give a run, a step or a model folder")
    if (folder / DESCRIPTION).exists():
        return _read_model(folder)
    if (found := find_step(path)) is not None:
        weights = _read_step(*found)
        check(weights.params, weights.model, f"checkpoint {found.step} of {found.run}")
        return weights
    raise UserError(
        f"{path} holds no model: neither {DESCRIPTION}, {FOLDER}/STEP nor a config.json "
        "of transformers was found there"
    )


class StepPath(NamedTuple):
    """A step of a run; `folder` is `checkpoints` or `best`."""

    run: epath.Path
    step: int
    folder: str


def find_step(path: epath.PathLike) -> StepPath | None:
    """The step that `path` names: itself, or the newest of a run or of its folders `checkpoints`
    and `best`; None where there is none."""
    folder = files.absolute(path)  # of `.` or `500` the names of the folders above
    if folder.name.isdecimal() and folder.parent.name in (FOLDER, BEST):
        return StepPath(folder.parent.parent, int(folder.name), folder.parent.name)
    if folder.name in (FOLDER, BEST) and (steps := step_folder.steps(folder.parent, folder.name)):
        return StepPath(folder.parent, steps[-1], folder.name)
    steps = step_folder.steps(folder)
    return StepPath(folder, steps[-1], FOLDER) if steps else None


def check_step(run: epath.Path, step: int, folder: str, items: tuple[str, ...] = ()) -> None:
    """Raises UserError where a step was never finished, or one of `items` (all) is damaged."""
    if step not in step_folder.steps(run, folder):
        raise UserError(
            f"checkpoint {step} of {run} was never finished; take another, or {run} for the newest"
        )
    errors = step_folder.verify(run, step, folder, items)
    if errors:
        raise UserError(
            f"checkpoint {step} of {run} is damaged: {'; '.join(errors)}; give an older one, "
            f"such as {run / folder / 'STEP'} (esm1nv doctor {run} checks all)"
        )


def write(path: str, weights: Weights) -> None:
    """Writes a model folder; `model.json` comes last, so that a half-made folder is none."""
    folder = epath.Path(path)
    folder.mkdir(parents=True, exist_ok=True)
    contacts = {contact_head.NAME: weights.contact_head} if weights.contact_head else {}
    params = flatten(weights.params | contacts)
    flat = {name: np.asarray(value) for name, value in params.items()}
    (folder / PARAMETERS).write_bytes(save_safetensors(flat))
    description = {"model": dataclasses.asdict(weights.model), "provenance": weights.provenance}
    if weights.head:
        description["head"] = dataclasses.asdict(weights.head)
    (folder / DESCRIPTION).write_text(json.dumps(description, indent=1))


def check(
    params: dict, model: encoder.EncoderConfig, source: str, head: HeadConfig | None = None
) -> None:
    """Raises UserError that names the first array which is missing, extra or of a wrong shape."""
    tree = encoder.abstract(model)
    if head:
        tree = tree | {"head": heads.abstract(head, model.width)}
    if contact_head.NAME in params:
        tree = tree | {contact_head.NAME: contact_head.abstract(model)}
    expected = {k: v.shape for k, v in flatten(tree).items()}
    actual = {k: v.shape for k, v in flatten(params).items()}
    for name in sorted(expected.keys() | actual.keys()):
        if expected.get(name) != actual.get(name):
            raise UserError(
                f"{source}: parameter {name} has shape {actual.get(name, 'none (missing)')}, "
                f"the model needs {expected.get(name, 'none (it has no such parameter)')}"
            )


def _read_model(folder: epath.Path) -> Weights:
    try:
        description = json.loads((folder / DESCRIPTION).read_text())
        model = encoder.EncoderConfig(**description["model"])
        head = HeadConfig(**description["head"]) if "head" in description else None
        params = unflatten(load_safetensors(files.read_weights(folder / PARAMETERS)))
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        raise UserError(f"model folder {folder} cannot be read: {error}") from None
    check(params, model, str(folder), head)
    contacts = params.pop(contact_head.NAME, None)
    return Weights(params, model, description.get("provenance", {}), head, contacts)


def _read_step(run: epath.Path, step: int, folder: str) -> Weights:
    """Return the parameters that a step holds; of a fine-tuned run those that were trained."""
    check_step(run, step, folder, items=("params", "metadata"))
    try:
        metadata = step_folder.read_metadata(run, step, folder)
        params = step_folder.read_params(run, step, folder)
        model = encoder.EncoderConfig(**metadata["config"]["model"])
        head = HeadConfig(**metadata["head"]) if "head" in metadata else None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"checkpoint {step} of {run} cannot be read: {error} (esm1nv doctor {run} checks all)"
        ) from None
    return Weights(params, model, {"run": str(run), "steps": [step]} | metadata, head)


def digest(params: dict) -> str:
    """Return a SHA-256 of names, shapes and values of parameters."""
    total = hashlib.sha256()
    for name, value in sorted(flatten(params).items()):
        array = np.ascontiguousarray(np.asarray(value, np.float32))
        total.update(f"{name} {array.shape}\n".encode())
        total.update(array.data)
    return total.hexdigest()


def find_finetuned(path: str) -> StepPath | None:
    """Return the step that `path` names where it is a fine-tuned run or step; else None.

    Of a run it is the step that validates best, if there is one, and not the newest.
    """
    found = find_step(path)
    if found is None:
        return None
    run, step, folder = found
    try:
        if "head" not in step_folder.read_metadata(run, step, folder):
            return None
    except (OSError, ValueError):
        return None  # `read` says what is wrong
    best = step_folder.steps(run, BEST) if files.absolute(path) == run else []
    return StepPath(run, best[-1], BEST) if best else found


def read_finetuned(
    run: epath.Path, step: int, folder: str, load_base: Callable[[str], Weights]
) -> Weights:
    """Return the whole model of a step of a fine-tuned run, LoRA merged, the head in units of the
    label.

    Raises UserError where the step is damaged, or the base model is gone or has other parameters.
    """
    weights, source = _read_step(run, step, folder), f"checkpoint {step} of {run}"
    metadata, params = weights.provenance, dict(weights.params)
    if missing := {"base", "label_scale"} - metadata.keys():
        raise UserError(f"{source} cannot be read: its metadata lack {', '.join(sorted(missing))}")
    adapters = params.pop("lora", None)
    if metadata["base"] is not None:
        base = _read_base(source, metadata["base"], load_base)
        params = unflatten(flatten(base) | flatten(params))
    if adapters is not None:
        params = lora.merge(params, adapters, lora.LoraConfig(**metadata["lora"]))
    params["head"] = scale_head(params["head"], *metadata["label_scale"])
    check(params, weights.model, source, weights.head)
    return dataclasses.replace(weights, params=params)


def scale_head(head: dict, mean: float, std: float) -> dict:
    """Return the parameters of a head whose outputs are `std` times as large, plus `mean`."""
    last = head["out_proj"]
    kernel = np.asarray(last["kernel"]) * np.float32(std)
    bias = np.asarray(last["bias"]) * np.float32(std) + np.float32(mean)
    return head | {"out_proj": {"kernel": kernel, "bias": bias}}


def _read_base(source: str, base: dict, load_base: Callable[[str], Weights]) -> dict:
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
