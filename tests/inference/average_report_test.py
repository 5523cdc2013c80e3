"""Whether an average is better than its members: a test paired by protein decides."""

import numpy as np
import pytest

from esm1nv_jax.inference.average_report import paired_difference, verdict

COUNTS = np.array([12, 40, 7, 0, 25, 90, 33, 18])


def row(losses, name="average of 2", run=""):
    """A model with these mean losses of each protein."""
    proteins = {
        f"p{i}": {"positions_mask": int(n), "perplexity_mask": float(np.exp(x)) if n else np.nan}
        for i, (n, x) in enumerate(zip(COUNTS, losses, strict=True))
    }
    overall = {"perplexity_mask": float(np.exp(COUNTS @ losses / COUNTS.sum()))}
    return {"name": name, "run": run, "metrics": overall, "by_protein": proteins}


def jackknife(a, b):
    """Mean and standard error of a ratio of sums, by leaving out one protein at a time."""
    keep = COUNTS > 0
    n, d = COUNTS[keep], ((a - b) * COUNTS)[keep]
    left_out = np.array([np.delete(d, i).sum() / np.delete(n, i).sum() for i in range(len(n))])
    k = len(n)
    error = np.sqrt((k - 1) / k * ((left_out - left_out.mean()) ** 2).sum())
    return d.sum() / n.sum(), error


def test_a_difference_is_that_of_sums_over_proteins():
    rng = np.random.default_rng(0)
    a, b = rng.normal(2.5, 0.3, 8), rng.normal(2.6, 0.3, 8)
    mean, error = paired_difference(row(a), row(b))
    expected = jackknife(a, b)
    assert mean == pytest.approx(expected[0], rel=1e-9)
    assert error == pytest.approx(expected[1], rel=0.35)  # two estimates of one error, 7 proteins


HARD = np.random.default_rng(1).normal(2.5, 0.5, 8)  # proteins differ far more than models
NOISE = np.array([1, -1, 1, 1, -1, 1, -1, -1])


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (-0.02 + 0.002 * NOISE, "is better than the best member, checkpoint 2"),
        (0.02 + 0.002 * NOISE, "is worse than the best member, checkpoint 2"),
        (-0.0004 + 0.01 * NOISE, "cannot be told apart from the best member, checkpoint 2"),
        (0 * NOISE, "cannot be told apart from the best member, checkpoint 2"),
    ],
)
def test_only_what_is_larger_than_its_error_is_a_difference(change, words):
    members = [row(HARD + 0.3, "checkpoint 1", "r"), row(HARD, "checkpoint 2", "r")]
    text = verdict([*members, row(HARD + change)])
    assert words in text and "paired by protein" in text
    assert ("train longer" in text) == ("worse" in words)


def test_runs_of_other_weights_have_no_common_mean():
    members = [row(HARD, "checkpoint 1", "r"), row(HARD, "checkpoint 2", "s")]
    assert "average within each run" in verdict([*members, row(HARD + 1)])
