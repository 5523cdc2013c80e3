"""Attention weights and contacts against those of `transformers` on the same weights."""

import dataclasses

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from esm1nv_jax import load
from esm1nv_jax.checkpoints import model_folder
from esm1nv_jax.common.errors import UserError
from esm1nv_jax.interchange import convert
from esm1nv_jax.interchange.loader import load_weights

torch = pytest.importorskip("torch", reason="pip install -e '.[interchange-test]'")
transformers = pytest.importorskip("transformers")

from tests.interchange import witness  # noqa: E402, needs both

SEQUENCES = ["MKTVRQERLKSIVRILERSKEPVSGAQ", "LAS", "GVERTDIPKNFQYHMCWLLASGEE"]


def make(kind):
    """A model whose attention weights are far from uniform, and are returned."""
    model = witness.make(kind)
    model.set_attn_implementation("eager")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "query" in name or "key" in name:
                parameter.mul_(8)
            if "contact_head.regression.weight" in name:
                parameter.mul_(200)
    return model


@pytest.mark.parametrize("kind", ["esm", "esm1b", "esm2", "bert"])
def test_attention_weights_are_those_of_transformers(kind, tmp_path):
    there = make(kind)
    model = load(witness.save(there, kind, tmp_path))
    for sequence in SEQUENCES:
        ids, mask = witness.ids(kind, [sequence])
        with torch.no_grad():
            output = there(input_ids=ids, attention_mask=mask, output_attentions=True)
        expected = torch.cat(output.attentions).numpy()
        assert np.ptp(expected) > 0.5
        weights = model.attention(sequence)
        assert weights.shape == (3, 4, len(sequence) + 2, len(sequence) + 2)
        np.testing.assert_allclose(weights, expected, atol=1e-5)


def contacts_there(model, kind, sequence):
    ids, mask = witness.ids(kind, [sequence])
    with torch.no_grad():
        return model.predict_contacts(ids, mask)[0].numpy()


@pytest.mark.parametrize("kind", ["esm", "esm1b", "esm2"])
def test_contacts_are_those_of_transformers_there_and_back(kind, tmp_path):
    there = make(kind)
    folder = witness.save(there, kind, tmp_path / "there")
    model = load(folder)
    for sequence in SEQUENCES:
        expected = contacts_there(there, kind, sequence)
        assert np.ptp(expected) > 0.1
        contacts = model.contacts(sequence, "attention")
        np.testing.assert_allclose(contacts, expected, atol=1e-5)
        short = load(folder, max_residues=40)  # another length of rows
        np.testing.assert_allclose(short.contacts(sequence, "attention"), expected, atol=1e-5)

    convert.import_model(folder, str(tmp_path / "ours"))
    convert.to_hf(str(tmp_path / "ours"), str(tmp_path / "again"))
    again = transformers.EsmForMaskedLM.from_pretrained(
        tmp_path / "again", attn_implementation="eager"
    )
    for sequence in SEQUENCES:
        expected = contacts_there(there, kind, sequence)
        np.testing.assert_allclose(contacts_there(again, kind, sequence), expected, atol=1e-6)


def test_a_head_that_bert_has_no_place_for_comes_back_from_a_file_beside_it(tmp_path):
    weights = load_weights(witness.save(witness.make("bert"), "bert", tmp_path / "there"))
    head = {"kernel": np.arange(12, dtype=np.float32)[:, None], "bias": np.ones(1, np.float32)}
    weights = dataclasses.replace(weights, contact_head=head)
    model_folder.write(str(tmp_path / "ours"), weights)
    convert.to_hf(str(tmp_path / "ours"), str(tmp_path / "again"))
    _, report = transformers.BertForMaskedLM.from_pretrained(
        tmp_path / "again", output_loading_info=True
    )
    assert not any(report.values()), report
    again = load_weights(str(tmp_path / "again")).contact_head
    np.testing.assert_array_equal(again["kernel"], head["kernel"])
    np.testing.assert_array_equal(again["bias"], head["bias"])


def test_a_head_of_zeros_is_none_and_one_of_another_shape_is_refused(tmp_path):
    folder = witness.save(make("esm"), "esm", tmp_path)
    path, name = tmp_path / "model.safetensors", "esm.contact_head.regression.weight"
    tensors = load_file(path)
    for size, error in ((12, "no contact head; fit one"), (8, rf"{name} is float32 \(1, 8\)")):
        tensors[name] = np.full((1, size), size - 12, np.float32)
        tensors["esm.contact_head.regression.bias"] = np.zeros(1, np.float32)
        save_file(tensors, path, metadata={"format": "pt"})
        with pytest.raises(UserError, match=error):
            load(folder).contacts("MKTV", "attention")
