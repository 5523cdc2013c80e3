"""What a step on disk says of its model, and what it must say."""

import pytest
from etils import epath

from esm1nv_jax.checkpoints import model_folder
from esm1nv_jax.checkpoints.model_folder import Weights
from esm1nv_jax.common.errors import UserError
from esm1nv_jax.model.encoder_config import EncoderConfig


@pytest.mark.parametrize(("here", "path"), [("checkpoints", "500"), ("checkpoints/500", ".")])
def test_a_step_is_found_from_within_its_run(tmp_path, monkeypatch, here, path):
    (tmp_path / "checkpoints" / "500").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / here)
    assert model_folder.find_step(path) == (epath.Path(tmp_path), 500, "checkpoints")


def test_a_finetuned_step_without_its_label_scale_is_one_line(monkeypatch):
    step = Weights({}, EncoderConfig(), {"base": None})
    monkeypatch.setattr(model_folder, "_read_step", lambda *_: step)
    with pytest.raises(UserError, match=r"checkpoint 3 of run cannot be read: .* label_scale$"):
        model_folder.read_finetuned(epath.Path("run"), 3, "checkpoints", lambda _: step)
