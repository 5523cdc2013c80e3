"""Precision and the fit of the contact head, against enumeration and optimality conditions."""

import dataclasses
import itertools
import math

import jax
import numpy as np

from esm1nv_jax.inference.api_types import residue_ids
from esm1nv_jax.inference.contact_maps import fit_contact_head, fit_logistic_regression
from esm1nv_jax.inference.structures import (
    Structure,
    baseline_scores,
    contact_precision,
    expected_precision,
    mean_and_error,
)


def test_precision_is_the_mean_over_all_orders_of_ties():
    rng = np.random.default_rng(0)
    for _ in range(20):
        scores = rng.integers(0, 3, 6).astype(float)
        truth = rng.random(6) < 0.4
        for top in (1, 2, 4, 6, 9):
            values = []
            for order in itertools.permutations(range(6)):
                ranked = sorted(order, key=lambda k: -scores[k])  # a stable sort
                values.append(truth[ranked[:top]].mean())
            assert math.isclose(expected_precision(scores, truth, top), np.mean(values))
    assert math.isnan(expected_precision(np.zeros(0), np.zeros(0, bool), 3))


def make_structure(residues, seed=0):
    rng = np.random.default_rng(seed)
    truth = np.triu(rng.random((residues, residues)) < 0.2)
    return Structure("a", "M" * residues, rng.random(residues) < 0.8, truth | truth.T)


def test_ranges_count_resolved_pairs_by_their_separation():
    structure = make_structure(50)
    scores = np.random.default_rng(1).random((50, 50))
    scores += scores.T
    values = contact_precision(scores, structure)
    for name, low, high in (("short", 6, 11), ("medium", 12, 23), ("long", 24, 99)):
        pairs = [
            (i, j)
            for i in range(50)
            for j in range(i, 50)
            if low <= j - i <= high and structure.is_resolved[i] and structure.is_resolved[j]
        ]
        pairs.sort(key=lambda pair: -scores[pair])
        for cutoff, top in (("P@L", 50), ("P@L/2", 25), ("P@L/5", 10)):
            expected = np.mean([structure.is_contact[pair] for pair in pairs[:top]])
            assert math.isclose(values[name, cutoff], expected)
    perfect = contact_precision(structure.is_contact.astype(float), structure)
    assert perfect["short", "P@L/5"] == 1


def test_the_random_baseline_is_the_share_of_contacts_and_separation_takes_near_pairs_first():
    structure = make_structure(40)
    maps = baseline_scores(40)
    resolved = np.outer(structure.is_resolved, structure.is_resolved)
    i, j = np.nonzero(np.triu(resolved, 6))
    for name, first, last in (("short", 6, 11), ("long", 24, 40)):
        used = (j - i >= first) & (j - i <= last)
        rate = structure.is_contact[i, j][used].mean()
        values = contact_precision(maps["random"], structure)
        assert math.isclose(values[name, "P@L"], rate)
        nearest = used & (j - i == first)
        values = contact_precision(maps["by separation"], structure)
        assert math.isclose(values[name, "P@L/5"], structure.is_contact[i, j][nearest].mean())


def test_errors_are_over_proteins_and_leave_out_what_has_no_value():
    mean, error, n = mean_and_error([0.2, math.nan, 0.4, 0.9])
    assert (mean, n) == (0.5, 3)
    assert math.isclose(error, math.sqrt((0.09 + 0.01 + 0.16) / 2 / 3))
    assert all(map(math.isnan, mean_and_error([math.nan])[:2]))


def test_the_regression_is_at_its_optimum():
    """Subgradients of |weights| + C * loss: the problem is convex, so they are enough."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(3000, 10)) * rng.uniform(0.02, 1, 10)
    weights = np.array([3, -2, 0, 0, 0, 4, 0, 0, -3, 1.0])
    y = rng.random(3000) < 1 / (1 + np.exp(-(x @ weights - 2)))
    found, bias = fit_logistic_regression(x.astype(np.float32), y)
    gradient = 0.15 * x.T @ (1 / (1 + np.exp(-(x @ found + bias))) - y)
    used = np.abs(found) > 1e-6
    assert 2 <= used.sum() < 10
    np.testing.assert_allclose(gradient[used], -np.sign(found[used]), atol=5e-3)
    assert np.abs(gradient[~used]).max() < 1 + 5e-3
    assert abs((1 / (1 + np.exp(-(x @ found + bias))) - y).sum()) < 0.1


def test_a_fitted_head_is_a_regression_on_corrected_attention(model):
    """Structures whose contacts are where one head attends, so that it must be found."""
    for block in (params := jax.tree.map(np.asarray, model.params))["blocks"].values():
        block["qkv"]["kernel"] = 3 * block["qkv"]["kernel"]  # attention weights far from uniform
    model = dataclasses.replace(model, params=params)
    sequences = ["MKTVRQERLKSIVRILERSKEPVSGAQ", "LASGVERTDIPKNFQYHMCWLLASGEEMKTVRQ"]
    corrected, structures = [], []
    for sequence in sequences:
        x = model.attention(sequence).astype(np.float64)[:, :, 1:-1, 1:-1]
        x = x.reshape(8, len(sequence), len(sequence))
        x = x + x.transpose(0, 2, 1)
        x -= x.sum(1, keepdims=True) * x.sum(2, keepdims=True) / x.sum((1, 2), keepdims=True)
        truth = x[5] > np.quantile(x[5], 0.8)
        structures.append(Structure("a", sequence, np.ones(len(sequence), bool), truth))
        corrected.append(x)
    ids = [residue_ids(s, "a") for s in sequences]
    head = fit_contact_head(model.on_devices, structures, ids)
    assert head["kernel"].shape == (8, 1)
    assert head["kernel"][:, 0].argmax() == 5
    fitted = dataclasses.replace(model, contact_head_params=head)
    for sequence, x, structure in zip(sequences, corrected, structures, strict=True):
        logits = np.tensordot(head["kernel"][:, 0], x, 1) + head["bias"][0]
        contacts = fitted.contacts(sequence, "attention")
        np.testing.assert_allclose(contacts, 1 / (1 + np.exp(-logits)), atol=1e-4)
        assert contact_precision(contacts, structure)["short", "P@L/5"] > 0.9
    heads = []  # what stands at unresolved residues is not read
    for flipped in (False, True):
        one = structures[0]
        resolved, truth = np.arange(len(one.sequence)) % 7 > 1, one.is_contact.copy()
        truth[~resolved] ^= flipped
        truth[:, ~resolved] ^= flipped
        some = [Structure("a", one.sequence, resolved, truth), structures[1]]
        heads.append(fit_contact_head(model.on_devices, some, ids)["kernel"])
    np.testing.assert_array_equal(*heads)
