"""Which residues validation asks for: the same for every run, batch size and number of devices."""

import dataclasses

import numpy as np

from esm1nv_jax.data.packing import StreamConfig, evaluation_stream
from esm1nv_jax.data.pipeline import evaluation_batches
from esm1nv_jax.data.source import open_split, subset

STREAM = StreamConfig(seed=3, rows=8, row_length=128, max_residues=126, crop="random")


def questions(source, stream) -> dict[str, bytes]:
    """Tokens and mask bits of every sequence, by id."""
    found = {}
    for batch in evaluation_batches(source, evaluation_stream(stream)):
        for row, segments in enumerate(batch["segment_ids"]):
            for segment in range(1, segments.max(initial=0) + 1):
                here = segments == segment
                (example,) = set(batch["example_ids"][row][here].tolist())
                arrays = (batch[name][row][here] for name in ("tokens", "mask_bits"))
                found[source.ids([example])[0]] = b"".join(x.tobytes() for x in arrays)
    return found


def test_seed_crop_and_batch_size_do_not_change_what_validation_asks():
    source = subset(open_split("sample", "validation"), 40)
    asked = questions(source, STREAM)
    assert len(asked) == 40
    for change in ({"seed": 4}, {"crop": "prefix"}, {"rows": 4}, {"rows": 31}):
        assert questions(source, dataclasses.replace(STREAM, **change)) == asked, change


def test_a_subset_is_fixed_drawn_at_random_and_may_be_the_whole():
    source = open_split("sample", "validation")
    some, again = subset(source, 100), subset(source, 100)
    assert some.ids(range(100)) == again.ids(range(100)) and len(set(some.ids(range(100)))) == 100
    assert subset(source, 0) is source and subset(source, 10_000) is source
    # Not the longest, as the first rows of best-fit decreasing packing are: six standard errors.
    error = np.std(source.lengths) / 10
    assert abs(np.mean(some.lengths) - np.mean(source.lengths)) < 6 * error
    assert set(some.ids(range(100))) != set(source.ids(range(100)))
