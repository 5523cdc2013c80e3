"""Opens whatever `--checkpoint` names: the one place that knows every form of a model on disk."""

from __future__ import annotations

from etils import epath

from esm1nv_jax.checkpoints import model_folder
from esm1nv_jax.checkpoints.model_folder import Weights
from esm1nv_jax.interchange import huggingface


def load_weights(path: str) -> Weights:
    """Weights of a run (its newest checkpoint), one of its steps, its `best`, a model folder or a
    Hugging Face folder. Another format is one more branch here, and a module beside `huggingface`.

    Raises UserError where there is none, with what was looked for.
    """
    folder = epath.Path(path)
    if not (folder / model_folder.DESCRIPTION).exists() and huggingface.is_hf_folder(folder):
        return huggingface.read(path)
    return model_folder.read(path)
