"""Fields of other tools' configs that are no numbers of a model."""

import pytest

from esm1nv_jax.common.errors import UserError
from esm1nv_jax.interchange import esmc
from esm1nv_jax.interchange.loader import load_weights
from esm1nv_jax.interchange.tool_files import ConfigFields


def test_a_list_that_holds_itself_many_times_is_shown_in_one_line():
    value = ["x"]
    for _ in range(60):
        value = [value, value]
    fields = ConfigFields({"layers": value}, "config.json")
    for call in (lambda: fields.get("layers", int), lambda: fields.choice("layers", (1,), 1, "")):
        with pytest.raises(UserError, match="layers") as error:
            call()
        assert len(str(error.value)) < 2000


@pytest.mark.parametrize(
    ("value", "kind"),
    [(2**30 + 1, int), (-(2**31), int), (10**400, float), (10**5000, int)],
    ids=["above", "below", "no float", "too many digits to print"],
)
def test_numbers_beyond_all_models_are_refused(value, kind):
    with pytest.raises(UserError, match=r"x is .*, which no model has"):
        ConfigFields({"x": value}, "config.json").get("x", kind)


@pytest.mark.parametrize("name", ["num_hidden_layers", "num_attention_heads"])
def test_an_esmc_without_layers_or_heads_is_refused(name):
    fields = {"num_hidden_layers": 3, "num_attention_heads": 4, "hidden_size": 48, name: 0}
    with pytest.raises(UserError, match=f"{name}=0"):
        esmc.encoder_config(ConfigFields(fields, "config.json"), "")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("model.safetensors", "model.safetensors is a file; give the folder of the model"),
        ("esm1nv.nemo", "esm1nv convert --from nemo .*esm1nv.nemo --out MODEL"),
        ("esm1.pt", "esm1nv convert --from fair-esm .*esm1.pt --out MODEL"),
    ],
)
def test_a_file_in_place_of_a_folder_is_named(tmp_path, name, message):
    (tmp_path / name).write_bytes(b"")
    with pytest.raises(UserError, match=message):
        load_weights(str(tmp_path / name))
