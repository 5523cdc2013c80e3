"""The categorical Jacobian against one written out in loops over mutants as text."""

import dataclasses

import numpy as np
import pytest

from esm1nv_jax.common.errors import UserError
from esm1nv_jax.data.tokenizer import RESIDUES
from esm1nv_jax.inference import contact_maps, forward_pass

AMINO_ACIDS = RESIDUES[:20]


def literal(model, sequence):
    """float64 [L, L]: mutants one by one, [i][a] to logits [j][b]; centred, symmetrised, APC."""
    L = len(sequence)
    mutants = [sequence[:i] + a + sequence[i + 1 :] for i in range(L) for a in AMINO_ACIDS]
    logits = np.array(model.logits(mutants), np.float64)[:, :, 5:25].reshape(L, 20, L, 20)
    for axis in range(4):
        logits = logits - logits.mean(axis, keepdims=True)
    norms = np.zeros((L, L))
    for i in range(L):
        for j in range(L):
            if i != j:
                symmetric = (logits[i, :, j, :] + logits[j, :, i, :].T) / 2
                norms[i, j] = np.sqrt((symmetric**2).sum())
    scores = norms - np.outer(norms.sum(0), norms.sum(1)) / norms.sum()
    np.fill_diagonal(scores, 0)
    return scores


def test_the_jacobian_is_that_of_mutants_one_by_one(model):
    done = []
    scores = model.contacts("MKXVRQELW", on_progress=done.append)
    np.testing.assert_allclose(scores, literal(model, "MKXVRQELW"), atol=1e-5)
    assert np.abs(scores).max() > 0.01 and done[-1] == 180
    np.testing.assert_allclose(scores, scores.T, atol=1e-5)


def test_proteins_of_one_length_bucket_share_one_program(model):
    programs = forward_pass._embed, forward_pass._block, forward_pass._results
    before, on_devices = [program._cache_size() for program in programs], model.on_devices
    for residues in (35, 48, 62):
        ids = np.arange(residues) % 20 + 5
        contact_maps.predict_contacts(on_devices, ids, "jacobian")
    for program, size in zip(programs, before, strict=True):
        assert program._cache_size() <= size + 1  # compiled here, or by another test


def test_a_coupled_pair_stands_out():
    """Logits of which only residues 1 and 4 depend on each other."""
    rng = np.random.default_rng(0)
    jacobian = np.tile(rng.normal(size=(1, 1, 6, 20)), (6, 20, 1, 1))
    jacobian += 0.01 * rng.normal(size=jacobian.shape)
    jacobian[1, :, 4] += np.eye(20)
    scores = contact_maps.coupling_strength(jacobian)
    assert {1, 4} == {*np.unravel_index(scores.argmax(), scores.shape)}
    assert scores[1, 4] > 5 * np.abs(np.delete(scores.ravel(), [10, 25])).max()


def test_what_cannot_be_computed_is_refused(model, monkeypatch):
    for method, error in (("apc", "there are jacobian, attention"), ("attention", "no contact")):
        with pytest.raises(UserError, match=error):
            model.contacts("MKTV", method)
    with pytest.raises(UserError, match="has 65 residues, and the model reads 64 at once"):
        model.contacts("M" * 65)
    monkeypatch.setattr(contact_maps, "ARRAY_BYTES", 1 << 16)
    for call in (model.contacts, model.attention):
        with pytest.raises(UserError, match=r"has 60 residues, its .* would take .* cut it into"):
            call("M" * 60)
    without = dataclasses.replace(model, provenance={"lm_head": "none"})
    with pytest.raises(UserError, match="came without a masked-LM head"):
        without.contacts("MKTV")
