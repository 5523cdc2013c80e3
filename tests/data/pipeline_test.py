"""The stream is a pure function of the place: the same bits on any number of hosts."""

import dataclasses
import hashlib
import itertools
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from esm1nv_jax.common.errors import UserError
from esm1nv_jax.common.hashing import fold, fold_all, purpose
from esm1nv_jax.data import tokenizer
from esm1nv_jax.data.clusters import Groups
from esm1nv_jax.data.pipeline import (
    Place,
    StreamConfig,
    evaluation_batches,
    rows_for,
    train_batches,
)
from esm1nv_jax.data.prefetch import Prefetch
from esm1nv_jax.data.source import MemorySource, open_split

CONFIG = StreamConfig(seed=5, rows=88, row_length=512, max_residues=510)
ARRAYS = ("tokens", "segment_ids", "positions", "example_ids", "mask_bits")


def source_of(lengths, seed=0):
    rng = np.random.default_rng(seed)
    letters = np.frombuffer(tokenizer.RESIDUES.encode(), np.uint8)
    return MemorySource(
        [(f"p{i}", rng.choice(letters, n).tobytes()) for i, n in enumerate(lengths)]
    )


def hosts(rows, n):
    return [slice(i * rows // n, (i + 1) * rows // n) for i in range(n)]


def joined(iterators):
    """The next global batch out of the parts of all hosts, and the place, the same on each."""
    parts = [next(iterator) for iterator in iterators]
    (place,) = {place for _, place in parts}
    return {k: np.concatenate([batch[k] for batch, _ in parts]) for k in ARRAYS}, place


def digest(batch):
    return hashlib.sha256(b"".join(batch[name].tobytes() for name in ARRAYS)).hexdigest()


def segments(batch):
    """(example, row, first token, tokens) of each segment in order, found token by token."""
    out = []
    for row, (ids, segment_ids) in enumerate(
        zip(batch["example_ids"], batch["segment_ids"], strict=True)
    ):
        start = 0
        for segment, run in itertools.groupby(segment_ids.tolist()):
            n = len(list(run))
            if segment:
                out.append((int(ids[start]), row, start, n))
            start += n
    return out


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("crop", ["prefix", "random"])
def test_the_same_bits_on_any_number_of_hosts(packed, crop):
    source = open_split("sample", "train")
    config = dataclasses.replace(CONFIG, packed=packed, crop=crop, max_residues=300)
    streams = {n: [train_batches(source, config, rows=s) for s in hosts(88, n)] for n in (1, 4, 22)}
    seen = set()
    for _ in range(105 if packed else 25):
        whole, place = joined(streams[1])
        seen.add(digest(whole))
        for n in (4, 22):
            batch, also = joined(streams[n])
            assert digest(batch) == digest(whole)
            assert also == place
    assert len(seen) == (105 if packed else 25)
    assert place.epoch == (1 if packed else 0)


def test_the_stream_stays_what_it_was():
    """A run that was saved by an older version goes on with the same batches."""
    batch, place = next(train_batches(open_split("sample", "train"), CONFIG, Place(2, 3, 40)))
    assert digest(batch)[:16] == "843dfab9ddbf6101"
    assert place == Place(2, 3, 128)


def test_a_resume_on_other_hosts_is_exact():
    source = open_split("sample", "train")
    straight = train_batches(source, CONFIG)
    batches = [next(straight) for _ in range(12)]
    for at in (0, 3, 8):
        resumed = [train_batches(source, CONFIG, batches[at][1], s) for s in hosts(88, 8)]
        for expected, place in batches[at + 1 :]:
            batch, also = joined(resumed)
            assert digest(batch) == digest(expected)
            assert also == place


@settings(deadline=None, max_examples=60)
@given(
    lengths=st.lists(st.integers(1, 40), min_size=1, max_size=60),
    rows=st.integers(1, 9),
    max_residues=st.integers(1, 30),
    packed=st.booleans(),
    crop=st.sampled_from(["prefix", "random"]),
    block=st.sampled_from([1, 4]),
)
def test_every_token_is_accounted_for(lengths, rows, max_residues, packed, crop, block):
    """Three epochs, token by token, against a plain reading of the contract."""
    source = source_of(lengths)
    config = StreamConfig(
        seed=1,
        rows=rows,
        row_length=max_residues + 2 + len(lengths) % 5,
        max_residues=max_residues,
        packed=packed,
        crop=crop,
        block=block,
    )
    seen = []
    for batch, _ in itertools.islice(train_batches(source, config), 3 * len(lengths)):
        assert all(batch[k].shape == (rows, config.row_length) for k in ARRAYS)
        assert {str(batch[k].dtype) for k in ARRAYS} == {"int32", "uint32"}
        padding = batch["segment_ids"] == 0
        assert (batch["tokens"][padding] == tokenizer.PAD).all()
        assert (batch["example_ids"][padding] == -1).all()
        assert (batch["positions"][padding] == 0).all()
        row_of = [row for _, row, _, _ in segments(batch)]
        assert packed or len(row_of) == len(set(row_of))
        for example, row, start, n in segments(batch):
            epoch = len(seen) // len(lengths)
            seen.append(example)
            (sequence,) = source.sequences([example])
            kept = min(len(sequence), max_residues)
            assert n == kept + 2
            here = np.s_[row, start : start + n]
            text = tokenizer.decode(batch["tokens"][here])
            assert text.startswith("<s>") and text.endswith("</s>")
            crops = [sequence[i : i + kept].decode() for i in range(len(sequence) - kept + 1)]
            own = text[3:-4]
            assert own == crops[0] if crop == "prefix" else own in crops
            assert batch["positions"][here].tolist() == list(range(n))
            assert len(set(batch["segment_ids"][here].tolist())) == 1
            key = fold(fold_all(1, purpose("mask"), epoch), np.uint32(example))
            expected = {
                tuple(fold(key, np.arange(i, i + n, dtype=np.uint32)))
                for i, other in enumerate(crops)
                if other == own
            }
            assert tuple(batch["mask_bits"][here]) in expected
        if len(seen) >= 3 * len(lengths):
            break
    for epoch in range(3):
        part = seen[epoch * len(lengths) : (epoch + 1) * len(lengths)]
        assert sorted(part) == list(range(len(lengths)))


def test_random_crops_move_with_the_epoch_and_reach_both_ends():
    source = source_of([100] * 300)
    config = StreamConfig(seed=0, rows=300, row_length=52, max_residues=50, crop="random")
    stream = train_batches(source, config)
    starts = []
    for _ in range(6):
        batch, _ = next(stream)
        for example, row, start, n in segments(batch):
            crop = tokenizer.decode(batch["tokens"][row, start + 1 : start + n - 1])
            starts.append((example, source.sequences([example])[0].decode().index(crop)))
    moved = {example for example, at in starts if (example, at) != starts[0]}
    assert len(moved) == 300
    assert {at for _, at in starts} == set(range(51))


def test_evaluation_covers_each_once_whatever_the_order_and_the_hosts():
    source = open_split("sample", "validation")
    shuffled = np.random.default_rng(1).permutation(500)
    other = MemorySource(list(zip(source.ids(shuffled), source.sequences(shuffled), strict=True)))
    config = dataclasses.replace(CONFIG, max_residues=200, crop="random")

    def bits(data):
        out = {}
        for batch in evaluation_batches(data, config):
            for example, row, start, n in segments(batch):
                (name,) = data.ids([example])
                assert name not in out
                here = np.s_[row, start : start + n]
                out[name] = (batch["tokens"][here].tobytes(), batch["mask_bits"][here].tobytes())
        return out

    assert len(bits(source)) == 500
    assert bits(source) == bits(other)
    whole = [digest(batch) for batch in evaluation_batches(source, config)]
    parts = [list(evaluation_batches(source, config, s)) for s in hosts(88, 4)]
    together = [
        digest({k: np.concatenate([p[k] for p in group]) for k in ARRAYS})
        for group in zip(*parts, strict=True)
    ]
    assert together == whole


def test_one_of_each_cluster():
    source = source_of([5] * 90)
    cluster = np.arange(90) % 30
    source.groups = Groups.of(cluster)
    config = StreamConfig(seed=0, rows=30, row_length=7, max_residues=5, sample="one_per_group")
    drawn = []
    place = Place()
    for batch, place in itertools.islice(train_batches(source, config), 40):  # noqa: B007
        examples = [example for example, *_ in segments(batch)]
        assert sorted(cluster[examples]) == list(range(30))
        drawn += examples
    assert place == Place(40)
    assert set(drawn) == set(range(90))
    with pytest.raises(UserError, match="--groups"):
        next(train_batches(source_of([5]), config))


def test_rows_for_a_number_of_sequences():
    lengths = np.array([100, 300, 900])
    config = StreamConfig(seed=0, rows=1, row_length=512, max_residues=510)
    mean = (102 + 302 + 512) / 3
    assert rows_for(lengths, 370, config) == round(370 * mean / 512)
    assert rows_for(lengths, 370, dataclasses.replace(config, packed=False)) == 370


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rows": 0}, "rows must be 1 or more, found 0"),
        ({"max_residues": 511}, "holds 510 residues"),
        ({"crop": "middle"}, "'prefix' or 'random', found 'middle'"),
        ({"sample": "some"}, "'all' or 'one_per_group'"),
        ({"block": 0}, "block must be 1 or more"),
    ],
)
def test_a_wrong_config_says_what_is_allowed(change, message):
    with pytest.raises(UserError, match=message):
        dataclasses.replace(CONFIG, **change)


@pytest.mark.parametrize("place", [Place(0, 9, 0), Place(0, 0, 5000)])
def test_a_place_of_another_data_set_is_refused(place):
    with pytest.raises(UserError, match="another data set"):
        next(train_batches(open_split("sample", "train"), CONFIG, place))


def test_prefetch_keeps_order_waits_and_passes_failures_on():
    def slow():
        for i in range(5):
            time.sleep(0.02)
            yield i
        raise KeyError("lost")

    with Prefetch(slow(), ahead=2) as items:
        assert [next(items) for _ in range(5)] == list(range(5))
        with pytest.raises(KeyError, match="lost"):
            next(items)
        assert items.waited > 0.08
        with pytest.raises(StopIteration):
            next(items)


def test_prefetch_does_not_wait_when_the_stream_is_faster():
    with Prefetch(iter(range(50)), ahead=8) as items:
        time.sleep(0.1)
        for _ in range(50):
            time.sleep(0.002)
            next(items)
        assert items.waited < 0.02


def test_prefetch_closes_while_the_queue_is_full():
    made = []

    def endless():
        for i in itertools.count():
            made.append(i)
            yield i

    items = Prefetch(endless(), ahead=2)
    next(items)
    items.close()
    count = len(made)
    time.sleep(0.3)
    assert len(made) == count <= 5
