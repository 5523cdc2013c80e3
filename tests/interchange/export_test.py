"""What is written for `transformers`: tokenizer, model card, approximation, nothing overwritten."""

import dataclasses
import json

import numpy as np
import pytest

from esm1nv_jax.checkpoints import model_folder
from esm1nv_jax.common.errors import UserError
from esm1nv_jax.data import fasta, tokenizer
from esm1nv_jax.interchange import convert
from esm1nv_jax.interchange.loader import load_weights
from esm1nv_jax.model import encoder
from tests.model.parameters import random_parameters

pytest.importorskip("torch", reason="pip install -e '.[interchange-test]'")
transformers = pytest.importorskip("transformers")

TINY = encoder.EncoderConfig(
    layers=1, width=16, heads=2, ffn=32, positions=40, ffn_activation="gelu_erf"
)


@pytest.fixture
def exported(tmp_path):
    model_folder.write(
        str(tmp_path / "model"), model_folder.Weights(random_parameters(TINY), TINY, {"run": "r"})
    )
    convert.to_hf(str(tmp_path / "model"), str(tmp_path / "there"))
    return tmp_path / "there"


def test_the_tokenizer_there_gives_our_ids(exported):
    there = transformers.AutoTokenizer.from_pretrained(exported)
    rng = np.random.default_rng(0)
    letters = np.array(list("ACDEFGHIKLMNPQRSTVWYBXZUOJacdlxj*-. \t\n"))
    texts = ["".join(rng.choice(letters, rng.integers(0, 40))) for _ in range(500)]
    texts += [text + "*" for text in texts[:50]] + ["", "*", "**", " M * ", "mktl", "JJJ"]
    texts += [sequence.decode() for _, sequence in list(fasta.sample())[:20]]
    for text in texts:
        assert there(text)["input_ids"] == tokenizer.encode(text).tolist(), repr(text)
    for character in "1éλ_":  # refused here; there a tokenizer cannot refuse
        assert there(f"MK{character}L")["input_ids"] == [1, 22, 16, 0, 5, 2]
        with pytest.raises(ValueError, match="at index 2"):
            tokenizer.encode(f"MK{character}L")
    assert there("MK<mask>L")["input_ids"] == [1, 22, 16, 4, 5, 2]
    ids = there(["MKTL", "MK"], padding=True, return_tensors="pt")
    assert ids["input_ids"][1].tolist() == [1, 22, 16, 2, 3, 3]
    assert ids["attention_mask"][1].tolist() == [1, 1, 1, 1, 0, 0]
    assert there.decode([1, 22, 16, 4, 5, 2]) == "<s>MK<mask>L</s>"
    assert there.convert_ids_to_tokens(range(30)) == list(tokenizer.TOKENS)
    assert (there.pad_token_id, there.mask_token_id, there.unk_token_id) == (3, 4, 0)
    slow = transformers.EsmTokenizer.from_pretrained(exported)  # by vocab.txt, on plain residues
    assert slow("MKTL")["input_ids"] == there("MKTL")["input_ids"]


def test_the_tokenizer_of_a_model_from_elsewhere_keeps_its_ids(copy, tmp_path):
    convert.to_hf(str(copy("esm2")), str(tmp_path / "out"))
    there = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    assert there("mK<mask>.-J")["input_ids"] == [0, 20, 15, 32, 29, 30, 3, 2]


def test_the_card_states_what_the_provenance_records(tmp_path):
    config = {
        "data": {"path": "sample", "max_residues": 62, "crop": "prefix", "row_length": 64},
        "masking": {"recipe": "card", "rate": 0.3, "final_rate": 0.15},
        "optimizer": {"kind": "muon", "peak_lr": 0.004, "warmup": 40},
        "batch": {"rows": 16},
        "compute": {"dtype": "float32"},
    }
    metrics = [
        {"kind": "validation", "step": step, "perplexity": 15.0 + step, "perplexity_mask": 17.25}
        for step in (0, 10, 20)
    ]
    (tmp_path / "metrics.jsonl").write_text("\n".join(map(json.dumps, metrics)))
    made = {"run": str(tmp_path), "steps": [10], "config": config, "licence": "cc-by-4.0"}
    model_folder.write(
        str(tmp_path / "model"), model_folder.Weights(random_parameters(TINY), TINY, made)
    )
    convert.to_hf(str(tmp_path / "model"), str(tmp_path / "out"))
    card = (tmp_path / "out" / "README.md").read_text()
    for words in (
        "license: cc-by-4.0",
        "recipe `card`",
        "30% of residues predicted at first, 15% at the end",
        "Muon, peak learning rate 0.004",
        "0.004",
        "Step 10",
        "Swiss-Prot",
        "CC BY 4.0",
        "perplexity 25.000",
        "17.250",
        "62 residues",
    ):
        assert words in card, words
    again = load_weights(str(tmp_path / "out")).provenance
    assert again["metrics"] == metrics[1]
    assert again["licence"] == "cc-by-4.0"


def test_the_card_of_an_average_names_the_data_of_its_metrics(tmp_path):
    """`esm1nv average --report` records metrics on data that it names, and no step."""
    made = {
        "run": "r",
        "steps": [10, 20],
        "metrics": {"data": "sample:test", "perplexity": 15.25, "perplexity_mask": 17.5},
    }
    model_folder.write(
        str(tmp_path / "model"), model_folder.Weights(random_parameters(TINY), TINY, made)
    )
    convert.to_hf(str(tmp_path / "model"), str(tmp_path / "out"))
    card = (tmp_path / "out" / "README.md").read_text()
    assert "On sample:test: perplexity 15.250" in card and "17.500 over `<mask>`" in card


def test_a_model_folder_is_opened_before_a_config_of_transformers_beside_it(copy):
    path = copy("esm")
    model_folder.write(str(path), model_folder.Weights(random_parameters(TINY), TINY, {}))
    assert load_weights(str(path)).model == TINY


def test_tanh_gelu_is_refused_or_measured(tmp_path):
    model = dataclasses.replace(TINY, ffn_activation="gelu_tanh")
    params = random_parameters(model)
    params["blocks"]["0"]["fc1"]["kernel"] *= 50  # so that the forms are far apart
    model_folder.write(str(tmp_path / "model"), model_folder.Weights(params, model, {}))
    with pytest.raises(UserError, match=r"gelu_tanh.*--approximate"):
        convert.to_hf(str(tmp_path / "model"), str(tmp_path / "out"))
    assert not (tmp_path / "out").exists()
    difference = convert.to_hf(str(tmp_path / "model"), str(tmp_path / "out"), approximate=True)
    assert "logits differ by up to" in difference
    assert difference in (tmp_path / "out" / "README.md").read_text()
    apart = float(difference.split("up to ")[1].split(",")[0])
    assert 1e-6 < apart < 1
    assert load_weights(str(tmp_path / "out")).model.ffn_activation == "gelu_erf"


def test_damaged_companions_of_an_export_are_named(exported):
    for name in ("provenance.json", "vocabulary_padding.safetensors"):
        whole = (exported / name).read_bytes()
        (exported / name).write_bytes(whole[: len(whole) // 2])
        with pytest.raises(UserError, match="is damaged"):
            load_weights(str(exported))
        (exported / name).write_bytes(whole)
    load_weights(str(exported))


def test_nothing_is_overwritten(copy, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "precious").write_text("kept")
    for call in (convert.to_hf, convert.import_model):
        with pytest.raises(UserError, match="not empty"):
            call(str(copy("esm")) if call is convert.to_hf else "x", str(tmp_path / "out"))
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["precious"]
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be written"):
        convert.import_model(str(tmp_path / "esm"), str(tmp_path / "file" / "out"))
