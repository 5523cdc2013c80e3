"""Metrics of labels are their definitions; their errors are those of a mean over proteins."""

import tracemalloc
import warnings

import numpy as np
import pytest
from scipy import stats

from esm1nv_jax.model import label_metrics
from esm1nv_jax.model.label_metrics import bootstrap_errors, score

RNG = np.random.default_rng(0)


def test_accuracy_has_the_standard_error_of_a_mean_over_proteins():
    n = 400
    labels = RNG.integers(0, 3, n)
    right = RNG.random(n) < 0.7
    predicted = np.eye(3)[np.where(right, labels, (labels + 1) % 3)]
    assert score("classification", labels, predicted)["accuracy"] == pytest.approx(right.mean())
    alone = bootstrap_errors("classification", labels, predicted, np.arange(n))
    assert alone["accuracy"] == pytest.approx(right.std() / n**0.5, rel=0.1)
    # Sixteen copies of every label, of one protein, say no more than one.
    copies = [np.repeat(x, 16, axis=0) for x in (labels, predicted, np.arange(n))]
    together = bootstrap_errors("classification", *copies)
    assert together["accuracy"] == pytest.approx(alone["accuracy"], rel=1e-6)
    one = bootstrap_errors("classification", labels, predicted, np.full(n, 7))
    assert np.isnan(list(one.values())).all()


def test_several_labels_are_scored_class_by_class():
    labels = RNG.integers(0, 2, (200, 4))
    logits = np.where(RNG.random((200, 4)) < 0.8, 2 * labels - 1, 1 - 2 * labels) * 3.0
    found = score("multilabel", labels, logits)
    guess = (logits > 0).astype(int)
    assert found["accuracy"] == pytest.approx((guess == labels).mean())
    f1, mcc = [], []
    for true, said in zip(labels.T, guess.T, strict=True):
        both = np.sum(true & said)
        f1.append(2 * both / (true.sum() + said.sum()))
        mcc.append(np.corrcoef(true, said)[0, 1])
    assert found["macro_f1"] == pytest.approx(np.mean(f1))
    assert found["mcc"] == pytest.approx(np.mean(mcc))
    errors = bootstrap_errors("multilabel", labels, logits, np.arange(200))
    assert 0.005 < errors["accuracy"] < 0.03 and set(errors) == set(found)


def test_values_are_scored_by_rank_and_by_square():
    labels = RNG.normal(size=300)
    values = labels + RNG.normal(size=300)
    found = score("regression", labels, values[:, None])
    ranks = [np.argsort(np.argsort(x)) for x in (labels, values)]
    assert found["spearman"] == pytest.approx(np.corrcoef(*ranks)[0, 1])
    assert found["mse"] == pytest.approx(np.mean((labels - values) ** 2))
    errors = bootstrap_errors("regression", labels, values[:, None], np.arange(300))
    assert errors["mse"] == pytest.approx(stats.sem((labels - values) ** 2), rel=0.15)
    constant = np.zeros((300, 1))
    assert np.isnan(score("regression", labels, constant)["spearman"])
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # a user would see them
        assert np.isnan(
            bootstrap_errors("regression", labels, constant, np.arange(300))["spearman"]
        )


def test_many_classes_take_little_memory():
    """A table of 1,195 classes, those of folds in TAPE, has 11 MB; one a protein 2 GB."""
    n, k = 200, 1195
    labels = RNG.integers(0, k, n)
    predicted = np.zeros((n, k))
    predicted[np.arange(n), np.where(RNG.random(n) < 0.5, labels, 0)] = 1.0
    tracemalloc.start()
    errors = bootstrap_errors("classification", labels, predicted, np.arange(n))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    right = predicted.argmax(axis=1) == labels
    assert errors["accuracy"] == pytest.approx(right.std() / n**0.5, rel=0.1)
    assert peak < 2e8


def test_counts_of_a_large_test_set_do_not_overflow():
    labels = np.arange(200_000) % 2
    predicted = np.eye(2)[labels]
    predicted[:20] = predicted[:20, ::-1]
    assert 0.999 < score("classification", labels, predicted)["mcc"] < 1


def test_the_ranks_of_a_bootstrap_are_those_of_its_samples(monkeypatch):
    """By definition each sample is ranked anew; with a million residues that takes minutes."""
    labels, values = RNG.integers(0, 9, 200) / 4, RNG.integers(0, 30, 200) / 7.0
    protein = RNG.integers(0, 12, 200)
    _, protein = np.unique(protein, return_inverse=True)
    n, draws, drawn = protein.max() + 1, np.random.default_rng(0), []
    for _ in range(label_metrics.SAMPLES):
        chosen = [np.flatnonzero(protein == i) for i in draws.integers(0, n, n)]
        drawn.append(
            score("regression", *(x[np.concatenate(chosen)] for x in (labels, values[:, None])))
        )
    monkeypatch.setattr(label_metrics, "spearman", None)
    found = bootstrap_errors("regression", labels, values[:, None], protein)
    for name, error in found.items():
        assert error == pytest.approx(np.std([x[name] for x in drawn], ddof=1), rel=1e-9)
