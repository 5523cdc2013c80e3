"""Opens whatever `--checkpoint` names: the one place that knows every form of a model on disk."""

from __future__ import annotations

import os

from etils import epath

from esm1nv_jax.checkpoints import model_folder
from esm1nv_jax.checkpoints.model_folder import Weights
from esm1nv_jax.common.errors import UserError
from esm1nv_jax.interchange import huggingface

FILES = {".nemo": "nemo", ".pt": "fair-esm"}  # what `esm1nv convert --from` calls their formats


def load_weights(path: str) -> Weights:
    """Weights of a run (its newest checkpoint), one of its steps, its `best`, a model folder or a
    Hugging Face folder. Another format is one more branch here, and a module beside `huggingface`.

    Of a fine-tuned run it is the best checkpoint, with its base model, LoRA merged, and its head.

    Raises UserError where there is none, with what was looked for.
    """
    if not path or not isinstance(path, str | os.PathLike):
        raise UserError(f"checkpoint {path!r} is no path; give the folder of a run or a model")
    folder = epath.Path(path)
    if folder.is_file():
        source = FILES.get(folder.suffix)
        raise UserError(
            f"{path} is a file of another tool; make a model folder of it first: "
            f"esm1nv convert --from {source} {path} --out MODEL"
            if source
            else f"{path} is a file; give the folder of the model"
        )
    if (folder / model_folder.DESCRIPTION).exists():
        return model_folder.read(path)
    if huggingface.is_hf_folder(folder):
        return huggingface.read(path)
    if (found := model_folder.find_finetuned(path)) is not None:
        return model_folder.read_finetuned(*found, load_weights)
    return model_folder.read(path)
