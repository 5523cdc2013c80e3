"""The stream is a pure function of its state: the same bits in any number of processes."""

import dataclasses
import hashlib
import itertools
import json
import threading
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from esm1nv_jax.common.errors import UserError
from esm1nv_jax.common.hashing import fold, fold_all, purpose
from esm1nv_jax.data import tokenizer
from esm1nv_jax.data.packing import StreamConfig, rows_for
from esm1nv_jax.data.pipeline import evaluation_batches, prefetch, train_dataset
from esm1nv_jax.data.source import MemorySource, open_split
from esm1nv_jax.data.splits import Groups

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


def batches_from(source, config, state=None, rows=slice(None)):
    iterator = iter(train_dataset(source, config, rows))
    if state is not None:
        iterator.set_state(state)
    return iterator


def state_at(index, row):
    return {"parent": {"next_index": index}, "batch_idx": row}


def joined(iterators):
    """The next global batch out of the parts of all hosts, and the state, the same on each."""
    parts = [next(iterator) for iterator in iterators]
    (state,) = {json.dumps(iterator.get_state()) for iterator in iterators}
    return {k: np.concatenate([batch[k] for batch in parts]) for k in ARRAYS}, json.loads(state)


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
    streams = {n: [batches_from(source, config, rows=s) for s in hosts(88, n)] for n in (1, 4, 22)}
    seen = set()
    for _ in range(105 if packed else 25):
        whole, state = joined(streams[1])
        seen.add(digest(whole))
        for n in (4, 22):
            batch, also = joined(streams[n])
            assert digest(batch) == digest(whole)
            assert also == state
    assert len(seen) == (105 if packed else 25)
    assert state["parent"]["next_index"] // 5 == (1 if packed else 0)  # the epoch


def test_the_stream_stays_what_it_was():
    """A run that was saved by an older version goes on with the same batches."""
    batches = batches_from(open_split("sample", "train"), CONFIG, state_at(2 * 5 + 3, 40))
    assert digest(next(batches))[:16] == "843dfab9ddbf6101"
    assert batches.get_state() == state_at(2 * 5 + 3, 128)


def test_a_resume_on_other_hosts_is_exact():
    source = open_split("sample", "train")
    straight = [batches_from(source, CONFIG)]
    batches = [joined(straight) for _ in range(12)]
    for at in (0, 3, 8):
        resumed = [batches_from(source, CONFIG, batches[at][1], s) for s in hosts(88, 8)]
        for expected, state in batches[at + 1 :]:
            batch, also = joined(resumed)
            assert digest(batch) == digest(expected)
            assert also == state


def test_a_state_holds_for_another_number_of_rows():
    source = open_split("sample", "train")
    batches = batches_from(source, CONFIG)
    for _ in range(3):
        next(batches)
    expected = next(batches)
    batches = batches_from(source, dataclasses.replace(CONFIG, rows=22))
    for _ in range(12):
        next(batches)
    found = [next(batches) for _ in range(4)]
    assert all(np.array_equal(np.concatenate([b[k] for b in found]), expected[k]) for k in ARRAYS)


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
    for batch in itertools.islice(batches_from(source, config), 3 * len(lengths)):
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
    starts = []
    for batch in itertools.islice(batches_from(source, config), 6):
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
    batches = batches_from(source, config)
    for batch in itertools.islice(batches, 40):
        examples = [example for example, *_ in segments(batch)]
        assert sorted(cluster[examples]) == list(range(30))
        drawn += examples
    assert batches.get_state() == state_at(39, 30)  # the end of epoch 39
    assert set(drawn) == set(range(90))
    with pytest.raises(UserError, match="--groups"):
        train_dataset(source_of([5]), config)


def test_rows_for_a_number_of_sequences():
    lengths = np.array([100, 300, 900])
    config = StreamConfig(seed=0, rows=1, row_length=512, max_residues=510)
    mean = (102 + 302 + 512) / 3
    assert rows_for(lengths, 370, config) == round(370 * mean / 512)
    assert rows_for(lengths, 370, config, 64) == 256
    longer = dataclasses.replace(config, max_residues=70_000, row_length=70_002)
    assert rows_for(lengths.astype(np.uint16), 1000, longer) == round(1306 / 3 * 1000 / 70_002)
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


@pytest.mark.parametrize(
    "state", [state_at(0, 5000), state_at(0, -1), {"epoch": 0, "window": 0, "row": 0}, {}]
)
def test_a_state_of_another_data_set_is_refused(state):
    with pytest.raises(UserError, match="another data set"):
        batches_from(open_split("sample", "train"), CONFIG, state)


def test_an_empty_split_is_refused():
    for make in (train_dataset, evaluation_batches):
        with pytest.raises(UserError, match="holds no sequence"):
            make(MemorySource([]), CONFIG)


def test_more_processes_than_rows():
    """A process without a row gets batches of none, and the same state."""
    source, config = source_of([5] * 9), StreamConfig(seed=0, rows=2, row_length=7, max_residues=5)
    parts = [batches_from(source, config, rows=s) for s in hosts(2, 3)]
    for _ in range(5):
        batch, _ = joined(parts)
        assert batch["tokens"].shape == (2, 7)


class SlowSource(MemorySource):
    """Reads as slowly as it is told to, and fails at one of its reads."""

    def __init__(self, seconds=0.0, fails_at=None):
        super().__init__([(f"p{i}", b"ACDEF") for i in range(300)])
        self.seconds, self.fails_at, self.reads = seconds, fails_at, 0

    def sequences(self, indices):
        self.reads += 1
        time.sleep(self.seconds)
        if self.reads == self.fails_at:
            raise KeyError("lost")
        return super().sequences(indices)


PREFETCHED = StreamConfig(seed=0, rows=4, row_length=7, max_residues=5)


def test_prefetch_keeps_order_and_passes_failures_on():
    source = SlowSource(0.02, fails_at=6)
    expected = [digest(b) for b in itertools.islice(batches_from(SlowSource(), PREFETCHED), 5)]
    iterator = prefetch(train_dataset(source, PREFETCHED), ahead=2)
    assert [digest(next(iterator)) for _ in range(5)] == expected
    with pytest.raises(KeyError, match="lost"):
        next(iterator)
    iterator.close()


def test_prefetch_is_as_far_ahead_as_it_may_be():
    source = SlowSource()
    iterator = prefetch(train_dataset(source, PREFETCHED), ahead=8)
    for taken in range(1, 4):
        next(iterator)
        end = time.monotonic() + 20
        while source.reads < taken + 8 and time.monotonic() < end:
            time.sleep(0.01)
        time.sleep(0.1)
        assert source.reads == taken + 9  # 8 in the queue, one that waits to enter it
    iterator.close()


def test_the_state_of_a_prefetched_stream_is_that_of_the_batches_taken():
    iterator = prefetch(train_dataset(SlowSource(), PREFETCHED), ahead=4)
    straight = batches_from(SlowSource(), PREFETCHED)
    for _ in range(7):
        next(iterator), next(straight)
    time.sleep(0.1)
    state = iterator.get_state()
    assert state == straight.get_state()
    expected = digest(next(straight))
    iterator.close()
    resumed = prefetch(train_dataset(SlowSource(), PREFETCHED), state)
    assert digest(next(resumed)) == expected
    resumed.close()


def test_prefetch_closes_while_the_queue_is_full():
    source, threads = SlowSource(), threading.active_count()
    iterator = prefetch(train_dataset(source, PREFETCHED), ahead=2)
    next(iterator)
    iterator.close()
    reads = source.reads
    time.sleep(0.3)
    assert source.reads == reads <= 5
    assert threading.active_count() == threads
    with pytest.raises(ValueError, match="closed"):
        next(iterator)
