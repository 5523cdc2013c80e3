"""A keyed permutation is one to one and looks random."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from esm1nv_jax.common.hashing import permute


@settings(deadline=None)
@given(n=st.integers(1, 5000), key=st.integers(0, 2**32 - 1))
def test_permute_is_one_to_one(n, key):
    assert np.array_equal(np.sort(permute(np.arange(n), n, np.uint32(key))), np.arange(n))


def test_permute_by_parts_at_full_size():
    n = 2**31
    some = np.arange(n - 5000, n)
    out = permute(some, n, np.uint32(1))
    assert len(np.unique(out)) == 5000
    assert out.min() >= 0 and out.max() < n
    assert np.array_equal(permute(some[::7], n, np.uint32(1)), out[::7])


def assert_uniform(values, n):
    """Chi-square of values in 0..n-1, in at most ten bins."""
    bins = min(n, 10)
    expected = np.bincount(np.arange(n) * bins // n, minlength=bins) * len(values) / n
    found = np.bincount(values * bins // n, minlength=bins)
    chi2 = ((found - expected) ** 2 / expected).sum()
    assert chi2 < 35, (chi2, found)  # nine degrees of freedom: one in 10,000


@pytest.mark.parametrize("n", [6, 8, 100, 1000])
def test_permute_is_uniform(n):
    """Over 3,000 keys, where 0 and 1 go, and how far apart, but for n of 5 to 7."""
    sent = np.array([permute(np.array([0, 1]), n, np.uint32(7919 * k)) for k in range(3000)])
    assert_uniform(sent[:, 0], n)
    assert_uniform(sent[:, 1], n)
    if n >= 8:
        assert_uniform((sent[:, 1] - sent[:, 0] - 1) % n, n - 1)
