"""What a step on disk says of its model, and what it must say."""

import pytest
from etils import epath

from esm1nv_jax.checkpoints import model_folder
from esm1nv_jax.checkpoints.model_folder import Weights
from esm1nv_jax.common.errors import UserError
from esm1nv_jax.model.encoder_config import EncoderConfig


def test_a_finetuned_step_without_its_label_scale_is_one_line(monkeypatch):
    step = Weights({}, EncoderConfig(), {"base": None})
    monkeypatch.setattr(model_folder, "_read_step", lambda *_: step)
    with pytest.raises(UserError, match=r"checkpoint 3 of run cannot be read: .* label_scale$"):
        model_folder.read_finetuned(epath.Path("run"), 3, "checkpoints", lambda _: step)
