"""Attention weights against those of `transformers` on the same weights."""

import numpy as np
import pytest

from esm1nv_jax import load

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
