"""Worker processes make the batches and states that one process makes, and end with it."""

import itertools
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import grain
import numpy as np
import pytest
from absl import flags

from esm1nv_jax.data.packing import StreamConfig
from esm1nv_jax.data.pipeline import prefetch, train_dataset
from esm1nv_jax.data.prepare import Preparation, prepare
from esm1nv_jax.data.source import MemorySource, open_split
from tests.data.made_up import fasta, made_up

CONFIG = StreamConfig(seed=3, rows=50, row_length=512, max_residues=400, crop="random")
ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    base = tmp_path_factory.mktemp("workers")
    (base / "made_up.fasta").write_bytes(fasta(made_up(700)))
    prepare(Preparation((str(base / "made_up.fasta"),), str(base / "set"), 50, 50, workers=1))
    return str(base / "set")


def taken(iterator, n):
    return [(next(iterator), iterator.get_state()) for _ in range(n)]


def assert_same(found, expected):
    for (batch, state), (other, also) in zip(found, expected, strict=True):
        assert state == also
        assert all(np.array_equal(batch[name], other[name]) for name in other)


def test_workers_make_the_same_batches_and_states(folder):
    """Over two epochs, from a state that one process saved."""
    source, rows = open_split(folder, "train"), slice(10, 35)
    expected = taken(iter(train_dataset(source, CONFIG, rows)), 18)
    assert expected[-1][1]["parent"]["next_index"] >= 2
    iterator = prefetch(train_dataset(source, CONFIG, rows, workers=2), expected[2][1])
    assert_same(taken(iterator, 15), expected[3:])
    iterator.close()


def test_workers_are_not_asked_for_what_they_have_read(folder):
    """Grain waits 25 s for each whose last batches fill the pipe, at the end of every run."""
    iterator = prefetch(train_dataset(open_split(folder, "train"), CONFIG, workers=1))
    before = multiprocessing.active_children()
    next(iterator)
    (worker,) = (p for p in multiprocessing.active_children() if p not in before)
    iterator.close()
    assert worker.exitcode == -signal.SIGKILL


class Unreadable(MemorySource):
    def sequences(self, indices):
        raise OSError("the disk is gone")


def test_an_error_in_a_worker_is_raised_here():
    source = Unreadable([(f"p{i}", b"ACDEF") for i in range(300)])
    iterator = prefetch(train_dataset(source, CONFIG, workers=1))
    with pytest.raises(OSError, match="the disk is gone"):
        next(iterator)
    iterator.close()


TRAINER = """
import os, signal, sys, time
from esm1nv_jax.data.pipeline import prefetch, train_dataset
from esm1nv_jax.data.source import open_split
from tests.data.workers_test import CONFIG

if __name__ == "__main__":
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda *_: None)  # as a trainer that saves first
    batches = prefetch(train_dataset(open_split(sys.argv[1], "train"), CONFIG, workers=2))
    batches.start_prefetch()
    print("starting", flush=True)
    for line in sys.stdin:
        for _ in range(10):  # more than the workers had made ahead
            next(batches)
        print("more", flush=True)
"""


def children(pid):
    task = Path(f"/proc/{pid}/task")
    return {int(c) for t in task.iterdir() for c in (t / "children").read_text().split()}


def command(pid):
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return b""


def alive(pid):
    try:
        return (
            Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()[0]
            != "Z"
        )
    except OSError:
        return False


@pytest.mark.integration
@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="reads /proc")
def test_workers_outlive_signals_but_not_their_trainer(folder, tmp_path):
    script = tmp_path / "trainer.py"
    script.write_text(TRAINER)
    process = subprocess.Popen(
        [sys.executable, str(script), folder],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=(tmp_path / "stderr").open("w"),
        text=True,
        start_new_session=True,
    )
    try:
        assert process.stdout.readline() == "starting\n"
        workers = set()
        while len(workers) < 2:
            workers = {c for c in children(process.pid) if b"spawn_main" in command(c)}
        # Ctrl-C, a scheduler's signal and that of a lost terminal reach all of them, as they start
        # and later.
        for number in 2 * (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            os.killpg(process.pid, number)
            process.stdin.write("\n")
            process.stdin.flush()
            assert process.stdout.readline() == "more\n"
        assert (tmp_path / "stderr").read_text() == ""
        process.kill()
        process.wait()
        end = time.monotonic() + 20
        while any(map(alive, workers)) and time.monotonic() < end:
            time.sleep(0.05)
        assert not [pid for pid in workers if alive(pid)]
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
        process.stdin.close()
        process.stdout.close()


@pytest.mark.integration
def test_grain_reads_the_documented_source_with_workers(folder):
    """`mp_prefetch` and `DataLoader` send the source to other processes."""
    flags.FLAGS.mark_as_parsed()  # as docs/data.md says
    source = open_split(folder, "train")
    expected = [source[i]["sequence"] for i in range(8)]
    dataset = grain.MapDataset.source(source).to_iter_dataset()
    iterator = iter(dataset.mp_prefetch(grain.MultiprocessingOptions(num_workers=2)))
    assert [next(iterator)["sequence"] for _ in range(8)] == expected
    iterator.close()
    sampler = grain.samplers.SequentialSampler(
        num_records=len(source), shard_options=grain.sharding.NoSharding()
    )
    loader = grain.DataLoader(data_source=source, sampler=sampler, worker_count=2)
    records = itertools.islice(iter(loader), 8)
    assert [record["sequence"] for record in records] == expected
