"""`esm1nv config`: every field with its meaning, and the table in the documents."""

import json
from pathlib import Path

import pytest

from esm1nv_jax.common import config_file
from esm1nv_jax.common.errors import UserError
from esm1nv_jax.training import show_config

ROOT = Path(__file__).parents[2]


def test_every_field_of_the_recipe_has_a_meaning():
    fields = config_file.flat(config_file.load("pretrain_small"))
    texts = show_config.meanings()
    assert texts.keys() == fields.keys()
    assert all(len(text) > 7 for text in texts.values()), texts
    assert texts["masking.rate"] == "share of the residues that is predicted"


def test_the_document_has_the_table_of_the_code(capsys):
    show_config.main(["pretrain_small", "--markdown"])
    assert capsys.readouterr().out in (ROOT / "docs/configs.md").read_text(encoding="utf-8")


def test_the_resolved_config_is_shown(capsys):
    show_config.main(["quickstart:steps=77", "--config.optimizer.peak_lr=0.25"])
    lines = capsys.readouterr().out.splitlines()
    assert any(line.startswith("optimizer.peak_lr = 0.25 ") for line in lines)
    assert any(line.startswith("steps = 77 ") and "schedule" in line for line in lines)
    show_config.main(["quickstart:steps=77", "--json"])
    assert json.loads(capsys.readouterr().out)["optimizer"]["horizon"] == 77


def test_a_value_that_is_not_allowed_is_refused():
    with pytest.raises(UserError, match="constant_at"):
        show_config.main(["quickstart", "--config.optimizer.constant_at=middle"])


@pytest.mark.parametrize("name", ["quickstart", "configs/quickstart.py", "ablations/padded"])
def test_our_configs_are_found_from_any_folder(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert config_file.load(name).model.layers


def test_a_file_here_comes_before_one_of_ours(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "quickstart").write_text(
        "def get_config():\n"
        "    from ml_collections import config_dict\n"
        "    return config_dict.ConfigDict({'seed': 5})\n"
    )
    with pytest.raises(UserError, match="not a Python file"):
        config_file.load("quickstart")
    (tmp_path / "quickstart").rename(tmp_path / "mine.py")
    assert config_file.load("mine.py").seed == 5


def test_a_name_that_is_unknown_is_answered_with_those_that_are():
    with pytest.raises(UserError, match=r"ablations/post_norm.*quickstart"):
        config_file.load("quikstart")
