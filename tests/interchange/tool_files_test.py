"""Fields of other tools' configs that are no numbers of a model."""

import pytest

from esm1nv_jax.common.errors import UserError
from esm1nv_jax.interchange import esmc
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
