"""ESMC: the same numbers as EsmcForMaskedLM, and the way back."""

import json
import shutil

import numpy as np
import pytest

from esm1nv_jax.checkpoints import model_folder
from esm1nv_jax.common import config_file
from esm1nv_jax.common.errors import UserError
from esm1nv_jax.interchange import convert, esmc
from esm1nv_jax.interchange.hf_config import inexact_reason
from esm1nv_jax.interchange.loader import load_weights
from esm1nv_jax.model import encoder

torch = pytest.importorskip("torch", reason="pip install -e '.[interchange-test]'")
transformers = pytest.importorskip("transformers")
if not hasattr(transformers, "EsmcForMaskedLM"):
    pytest.skip("this transformers has no ESMC", allow_module_level=True)

from transformers.models.esmc.tokenization_esmc import SEQUENCE_VOCAB  # noqa: E402, needs both

from tests.interchange import packed, witness  # noqa: E402
from tests.interchange.packed import proteins  # noqa: E402

TOKENS = (*SEQUENCE_VOCAB, *(f"<row_{i}>" for i in range(33, 64)))


def make(**fields):
    torch.manual_seed(0)
    small = {"hidden_size": 48, "num_attention_heads": 4, "intermediate_size": 80}
    config = transformers.EsmcConfig(**small | {"num_hidden_layers": 3} | fields)
    model = transformers.EsmcForMaskedLM(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return model


def outputs(model, sequences):
    ids = {letter: i for i, letter in enumerate(SEQUENCE_VOCAB)} | {"_": 32}
    found = {}
    for sequence in sequences:
        inputs = torch.tensor([[0, *(ids[c] for c in sequence), 2]])
        with torch.no_grad():
            out = model(input_ids=inputs, output_hidden_states=True)
        found[sequence] = [h[0].numpy() for h in out.hidden_states], out.logits[0].numpy()
    return found


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("esmc")
    model = make()
    model.save_pretrained(folder)
    return model, folder


def test_every_layer_from_there(saved):
    model, folder = saved
    sequences = proteins(1, 50, 3, 40, 61, masked=0.2)
    weights = load_weights(str(folder))
    rows = [[sequences[0], sequences[3]], [sequences[1], sequences[2]]]
    worst = packed.differences(outputs(model, sequences), weights, rows, 128, TOKENS)
    assert worst.max() < 1e-5, worst
    assert weights.model.branch_scale == (36 / 3) ** 0.5 and weights.model.positions == 2048


def test_the_tokenizer_of_the_folder_and_another_theta_are_read(tmp_path):
    model = make(rope_parameters={"rope_theta": 500.0, "rope_type": "default"})
    model.save_pretrained(tmp_path)
    transformers.EsmcTokenizer().save_pretrained(tmp_path)
    sequences = proteins(2, 30, 44)
    weights = load_weights(str(tmp_path))
    worst = packed.differences(outputs(model, sequences), weights, [sequences], 96, TOKENS)
    assert worst.max() < 1e-5, worst
    with pytest.raises(UserError, match="other rotary frequencies"):
        convert.to_hf(str(tmp_path), str(tmp_path / "out"))


@pytest.mark.parametrize(
    ("layers", "width", "heads", "ffn", "millions"),
    [
        (30, 960, 15, 2560, 333),
        pytest.param(36, 1152, 18, 3072, 575, marks=pytest.mark.integration),
    ],
)
def test_the_sizes_of_the_released_models(layers, width, heads, ffn, millions):
    with torch.device("meta"):
        config = transformers.EsmcConfig(
            hidden_size=width,
            num_attention_heads=heads,
            intermediate_size=ffn,
            num_hidden_layers=layers,
        )
        there = sum(p.numel() for p in transformers.EsmcForMaskedLM(config).parameters())
    fields = {"layers": layers, "width": width, "heads": heads, "ffn": ffn}
    here = encoder.EncoderConfig(
        **fields, vocabulary=" ".join(TOKENS), **esmc.architecture(layers), dropout=0.0
    )
    unread = (128 - 64) * (2 * width + 1) + width // heads // 2
    assert encoder.parameter_count(here) - unread == there
    assert round(there / 1e6) == millions
    assert inexact_reason(here) is None


def test_there_and_back_is_bit_exact_and_opens_there(saved, tmp_path):
    model, folder = saved
    convert.to_hf(str(folder), str(tmp_path / "out"))
    again = transformers.AutoModelForMaskedLM.from_pretrained(tmp_path / "out").eval()
    assert isinstance(again, transformers.EsmcForMaskedLM)
    for (name, a), (_, b) in zip(
        model.state_dict().items(), again.state_dict().items(), strict=True
    ):
        assert torch.equal(a, b), name
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    assert tokenizer("MKTW<mask>")["input_ids"] == [0, 20, 15, 11, 22, 32, 2]
    a, b = (
        model_folder.flatten(load_weights(str(path)).params) for path in (folder, tmp_path / "out")
    )
    assert a.keys() == b.keys() and all(np.array_equal(a[name], b[name]) for name in a)


def test_configs_that_continue_or_fine_tune_take_its_architecture(saved, tmp_path):
    _, folder = saved
    config = config_file.load("continue_from", f"model={folder}")
    assert config.model.qk_norm and not config.model.tied_head and not config.model.bias
    table = tmp_path / "t.csv"
    rows = [f"MKT{'A' * n}L,{'HEC'[n % 3] * (n + 4)}" for n in range(12)]
    table.write_text("sequence,label\n" + "\n".join(rows) + "\n")
    config = config_file.load(
        "finetune", f"model={folder},csv={table},task=residue_classification,method=lora=2"
    )
    assert config.model.norm_kind == "layernorm" and config.model.branch_scale == (36 / 3) ** 0.5


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"attention_bias": True}, "attention_bias=True"),
        ({"hidden_act": "gelu"}, "hidden_act='gelu'"),
        ({"num_key_value_heads": 2}, "num_key_value_heads=2"),
        ({"tie_word_embeddings": True}, "tie_word_embeddings=True"),
        ({"rope_parameters": {"rope_type": "linear"}}, "rope_type must be 'default'"),
        ({"architectures": ["EsmcForTokenClassification"]}, "not EsmcForTokenClassification"),
        ({"intermediate_size": 96}, "has shape"),
    ],
)
def test_what_no_released_model_has_is_refused(saved, tmp_path, change, words):
    folder = shutil.copytree(saved[1], tmp_path / "copy")
    witness.rewrite(folder, **change)
    with pytest.raises(UserError, match=words):
        load_weights(str(folder))
    assert json.loads((folder / "config.json").read_text())["model_type"] == "esmc"
