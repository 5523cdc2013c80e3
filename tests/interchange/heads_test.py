"""Fine-tuned models in `transformers`: its classes give the numbers of ours, and come back."""

import dataclasses
import json
import math

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from esm1nv_jax import load
from esm1nv_jax.checkpoints import model_folder
from esm1nv_jax.common.errors import UserError
from esm1nv_jax.data import tokenizer
from esm1nv_jax.interchange import convert
from esm1nv_jax.interchange.loader import load_weights
from esm1nv_jax.model import encoder, heads
from esm1nv_jax.model.heads import HeadConfig
from tests.model.parameters import random_parameters

torch = pytest.importorskip("torch", reason="pip install -e '.[interchange-test]'")
transformers = pytest.importorskip("transformers")

from tests.interchange import witness  # noqa: E402, needs both

SEQUENCES = ["MKTVRQERLKSIVRILERSKEPVSGAQ", "LAS", "GVERTDIPKNFQYHMCWLLASGEE"]
CLASSES = ("helix", "strand", "other, or none")
HEADS = [
    HeadConfig("residue", "classification", CLASSES),
    HeadConfig("residue", "regression"),
    HeadConfig("protein", "classification", CLASSES, "cls"),
    HeadConfig("protein", "multilabel", ("one",), "cls"),
    HeadConfig("protein", "regression", (), "cls"),
]
ESM = encoder.EncoderConfig(
    layers=2,
    width=32,
    heads=4,
    ffn=64,
    positions=66,
    dropout=0.0,
    attention_dropout=0.0,
    ffn_activation="gelu_erf",
)
BERT = dataclasses.replace(ESM, norm="post")
name_of = "{0.level}-{0.kind}".format


def make(path, head, config=ESM, provenance=None):
    """A model folder with random weights, none of them at its neutral value."""
    params = random_parameters(config, 7) | {"head": heads.init(head, config.width, 8)}
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda x: np.float32(x + rng.normal(0, 0.1, x.shape)), params)
    made = {"base": {"path": "models/first", "digest": "0"}} if provenance is None else provenance
    model_folder.write(str(path), model_folder.Weights(params, config, made, head))
    return str(path)


def outputs_there(folder, head):
    """What the class that config.json names computes of each sequence, without `<s>` and `</s>`."""
    kind = "Token" if head.level == "residue" else "Sequence"
    auto = getattr(transformers, f"AutoModelFor{kind}Classification")
    model, info = auto.from_pretrained(folder, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert type(model).__name__.endswith(f"For{kind}Classification")
    ids = transformers.AutoTokenizer.from_pretrained(folder)(
        SEQUENCES, padding=True, return_tensors="pt"
    )
    with torch.no_grad():
        logits = model.eval()(**ids).logits.numpy()
    if head.level == "residue":
        logits = [x[1 : 1 + len(s)] for x, s in zip(logits, SEQUENCES, strict=True)]
    return model, logits


@pytest.mark.parametrize("config", [ESM, BERT], ids=["esm", "bert"])
@pytest.mark.parametrize("head", HEADS, ids=name_of)
def test_the_class_there_gives_the_same_numbers_and_comes_back(head, config, tmp_path):
    source = make(tmp_path / "model", head, config)
    assert convert.to_hf(source, str(tmp_path / "there")) == ""
    model, logits = outputs_there(tmp_path / "there", head)
    predicted = load(source).predict(SEQUENCES).values
    for ours, theirs in zip(predicted, logits, strict=True):
        expected = heads.to_predictions(head, theirs)
        np.testing.assert_allclose(ours, expected, atol=1e-5)
        assert np.ptp(expected) > 1e-3 or expected.size == 1
    labels = head.classes or ("LABEL_0",)
    assert model.config.id2label == dict(enumerate(labels))
    assert model.config.label2id == {label: i for i, label in enumerate(labels)}
    assert model.config.problem_type in ("regression", f"{kind_there(head)}_label_classification")

    weights, again = load_weights(source), load_weights(str(tmp_path / "there"))
    expected = head if head.level == "protein" else dataclasses.replace(head, pooling="cls")
    assert again.head == expected and again.model == config and again.has_lm_head
    assert again.provenance["base"]["digest"] == "0"
    ours, theirs = map(model_folder.flatten, (weights.params, again.params))
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        np.testing.assert_array_equal(value, theirs[name])


def kind_there(head):
    return {"classification": "single", "multilabel": "multi"}.get(head.kind)


@pytest.mark.parametrize("kind", ["esm2", "bert"])
@pytest.mark.parametrize("level", ["Token", "Sequence"])
def test_a_model_made_there_is_read(kind, level, tmp_path):
    family = "Esm" if kind == "esm2" else "Bert"
    torch.manual_seed(0)
    config = witness.config(kind)
    config.num_labels = 3
    model = getattr(transformers, f"{family}For{level}Classification")(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    folder = witness.save(model, kind, tmp_path / "there")
    inputs, mask = witness.ids(kind, SEQUENCES)
    with torch.no_grad():
        logits = model(input_ids=inputs, attention_mask=mask).logits.numpy()
    ours = load(folder)
    assert ours.head.classes == ("LABEL_0", "LABEL_1", "LABEL_2")
    assert ours.head.level == ("residue" if level == "Token" else "protein")
    for i, value in enumerate(ours.predict(SEQUENCES).values):
        theirs = logits[i, 1 : 1 + len(SEQUENCES[i])] if level == "Token" else logits[i]
        np.testing.assert_allclose(value, heads.to_predictions(ours.head, theirs), atol=1e-5)
    assert ours.embed(SEQUENCES).mean.shape == (3, 48)
    for call in (
        lambda: ours.logits(SEQUENCES),
        lambda: ours.fill_mask("MK<mask>V"),
        lambda: ours.score_variants("MKV", ["M1A"]),
    ):
        with pytest.raises(UserError, match="without a masked-LM head"):
            call()
    convert.import_model(folder, str(tmp_path / "model"))
    convert.to_hf(str(tmp_path / "model"), str(tmp_path / "again"))
    folders = tmp_path / "there", tmp_path / "again"
    before, after = (load_file(path / "model.safetensors") for path in folders)
    for name in before.keys() & after.keys():
        if any(part in name for part in (".layer.", "classifier", "pooler")):
            np.testing.assert_array_equal(before[name], after[name])
    assert {name for name in before if "classifier" in name} <= after.keys()
    assert not (tmp_path / "again" / "lm_head.safetensors").exists()


@pytest.mark.parametrize("pooling", ["mean", "attention"])
def test_pooling_that_is_not_there_is_refused(pooling, tmp_path):
    source = make(tmp_path / "model", HeadConfig("protein", "regression", (), pooling))
    with pytest.raises(UserError, match=rf"pools by '{pooling}'.*fine-tune with pooling 'cls'"):
        convert.to_hf(source, str(tmp_path / "there"))
    assert not (tmp_path / "there").exists()


@pytest.mark.integration
def test_an_approximation_is_measured_at_the_head(tmp_path):
    tanh = dataclasses.replace(ESM, ffn_activation="gelu_tanh", head_activation="gelu_tanh")
    source = make(tmp_path / "model", HEADS[0], tanh, provenance={})
    difference = convert.to_hf(source, str(tmp_path / "there"), approximate=True)
    apart = float(difference.rpartition("outputs of the head differ by up to ")[2])
    assert 1e-7 < apart < 1e-2


def test_the_card_has_metrics_in_any_unit(tmp_path):
    metrics = {"step": 3, "loss": 0.25, "spearman": math.nan, "mse": 2.5e-13}
    config = {
        "data": {"path": "t.csv", "max_residues": 62, "crop": "prefix", "row_length": 64},
        "masking": {"recipe": "card", "rate": 0.15},
        "optimizer": {"peak_lr": 1e-4 * 768 / 32, "warmup": 40},
        "batch": {"rows": 0, "sequences_per_device": 32},
        "compute": {"dtype": "float32"},
    }
    made = {"metrics": metrics, "config": config, "head": {}, "base": {"path": "models/first"}}
    source = make(tmp_path / "model", HEADS[4], provenance=made)
    convert.to_hf(source, str(tmp_path / "there"))
    card = (tmp_path / "there" / "README.md").read_text()
    assert "Validation after step 3: loss 0.250, spearman -, mse 2.5e-13." in card
    assert (
        "rate 0.0024, 40 warm-up steps; about 32 sequences a device a step, in rows of 64" in card
    )


def test_the_card_names_the_class_and_the_labels(tmp_path):
    convert.to_hf(make(tmp_path / "model", HEADS[0]), str(tmp_path / "there"))
    card = (tmp_path / "there" / "README.md").read_text()
    for words in ("AutoModelForTokenClassification", "3 classes: helix, strand", "token-classif"):
        assert words in card
    there = transformers.AutoModelForTokenClassification.from_pretrained(tmp_path / "there")
    names = {k: v.numel() for k, v in there.named_parameters() if "contact_head" not in k}
    cut = (
        128 - len(tokenizer.TOKENS)
    ) * ESM.width - 4 * ESM.width  # and positions before the first
    assert f"EsmForTokenClassification with {sum(names.values()) + cut:,} parameters" in card


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda f, t: f.update(problem_type="ranking"), "problem_type is 'ranking'"),
        (lambda f, t: f.update(problem_type=["ranking"]), r"problem_type is \['ranking'\]"),
        (lambda f, t: f.update(id2label={"1": "A", "2": "B", "3": "C"}), r"3 labels \(from '1'\)"),
        (lambda f, t: f["id2label"].pop("2"), "3 outputs, id2label 2 labels"),
        (lambda f, t: f.update(problem_type="regression"), "a regression has one"),
        (lambda f, t: t.pop("classifier.out_proj.bias"), "classifier.bias, which is missing"),
        (lambda f, t: t.pop("classifier.dense.weight"), "classifier.dense.weight is missing"),
        (
            lambda f, t: t.update({"classifier.out_proj.weight": np.zeros((4, 32), np.float32)}),
            r"float32 \(4, 32\); EsmForSequenceClassification has floats of shape \(3, 32\)",
        ),
    ],
)
def test_what_does_not_belong_together_is_named(change, message, tmp_path):
    convert.to_hf(make(tmp_path / "model", HEADS[2]), str(tmp_path / "there"))
    config, tensors = tmp_path / "there" / "config.json", tmp_path / "there" / "model.safetensors"
    fields, values = json.loads(config.read_text()), load_file(tensors)
    change(fields, values)
    config.write_text(json.dumps(fields))
    save_file(values, tensors)
    with pytest.raises(UserError, match=message):
        load_weights(str(tmp_path / "there"))


def test_the_tokenizer_there_is_ours(tmp_path):
    convert.to_hf(make(tmp_path / "model", HEADS[0]), str(tmp_path / "there"))
    there = transformers.AutoTokenizer.from_pretrained(tmp_path / "there")
    assert there("MKTL")["input_ids"] == tokenizer.encode("MKTL").tolist()
