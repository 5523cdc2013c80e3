"""Windows against their definition, read literally."""

import numpy as np
import pytest

from esm1nv_jax.data import tokenizer
from esm1nv_jax.inference import likelihood
from esm1nv_jax.inference.mutants import parse_mutants
from esm1nv_jax.inference.row_shapes import centered_starts, split_into_windows


def farthest(length, limit):
    """The window of each residue by the definition: farthest from a cut, the earlier of equals."""
    found = split_into_windows(length, limit)
    chosen = []
    for r in range(length):

        def distance(w, r=r):
            if not w.start <= r < w.stop:
                return -1
            left = r - w.start if w.start else np.inf
            right = w.stop - 1 - r if w.stop < length else np.inf
            return min(left, right)

        chosen.append(max(range(len(found)), key=lambda k: (distance(found[k]), -k)))
    return chosen


@pytest.mark.parametrize("limit", [2, 3, 7, 10, 16])
def test_every_residue_comes_from_the_window_in_which_it_is_farthest_from_a_cut(limit):
    for length in range(1, 5 * limit):
        found = split_into_windows(length, limit)
        assert found[0].first == 0 and found[-1].last == length
        assert all(w.stop - w.start == min(limit, length) for w in found)
        assert all(w.start <= w.first <= w.last <= w.stop for w in found)
        taken = [k for k, w in enumerate(found) for _ in range(w.first, w.last)]
        assert taken == farthest(length, limit), (length, limit)


def test_the_stride_is_half_a_window():
    assert [w.start for w in split_into_windows(100, 20)] == [0, 10, 20, 30, 40, 50, 60, 70, 80]


@pytest.mark.parametrize("length,limit", [(50, 20), (51, 21), (20, 20), (7, 20)])
def test_a_centred_window_holds_its_sites_and_stays_inside(length, limit):
    for first in range(length):
        for last in range(first, length):
            if last - first >= min(limit, length):
                continue
            start = int(centered_starts(np.array(first), np.array(last), length, limit))
            stop = min(start + limit, length)
            assert 0 <= start <= first and last < stop <= length
            assert stop - start == min(limit, length)
            if start > 0 and stop < length:  # not pushed by an end: as much on either side
                assert abs((first - start) - (stop - 1 - last)) <= 1


@pytest.mark.parametrize("mode", likelihood.MODES)
def test_an_inner_stop_at_the_end_of_a_window_stays_a_token(model, monkeypatch, mode):
    read = []

    def run_queries(model, queries, *most):
        for query in queries:
            read.append(query.tokens)
            yield query, np.zeros((len(query.columns), tokenizer.VOCABULARY))

    monkeypatch.setattr(likelihood, "run_queries", run_queries)
    wild_type = "ACDEF*GHIKL"  # in windows of six residues, the first ends in the stop
    mutants = parse_mutants(["A1C"], wild_type)
    likelihood.score_mutants(model.on_devices, wild_type, mutants, 6, mode)
    assert read and all(len(tokens) == 8 for tokens in read)
    assert tokenizer.UNK in {int(tokens[6]) for tokens in read}  # or <mask>, where it is asked for


def test_an_inner_stop_at_the_end_of_a_prefix_stays_a_token(model, monkeypatch):
    sequences = [b"ACDEF*GHIKL", b"ACDEFXGHIKL"]
    read = []
    run_queries = likelihood.run_queries

    def spied(model, queries, *most):
        return run_queries(model, (read.append(len(q.tokens)) or q for q in queries), *most)

    monkeypatch.setattr(likelihood, "run_queries", spied)
    likelihood.pseudo_log_likelihood(model.on_devices, [s[:6] for s in sequences], 6)
    assert set(read) == {8}
