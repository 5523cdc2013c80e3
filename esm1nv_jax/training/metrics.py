"""Metrics of a run: from sums over batches to rates and utilisation; the time of each process."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import time
from collections.abc import Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from esm1nv_jax.model.encoder_config import EncoderConfig
from esm1nv_jax.model.lora import FUSED
from esm1nv_jax.training.objective import Objective
from esm1nv_jax.training.process_group import ProcessGroup
from esm1nv_jax.training.tuning import Tuning

# The probe is two products of square matrices of this size: 4 GFLOP. A CPU would take 0.1 seconds
# for them at every save.
PROBE_SIZE, CPU_PROBE_SIZE = 1024, 512
KEY = "hosts/"  # under which processes publish their metrics
# Dense bf16 peak, FLOP/s a device, by `jax.Device.device_kind` (vendors' data sheets).
PEAK_FLOPS = {
    "NVIDIA A100-SXM4-40GB": 312e12,
    "NVIDIA A100-SXM4-80GB": 312e12,
    "NVIDIA A100 80GB PCIe": 312e12,
    "NVIDIA H100 80GB HBM3": 989e12,
    "NVIDIA H200": 989e12,
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,
    "TPU v5": 459e12,
    "TPU v6 lite": 918e12,
}


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ScalarMetrics:
    """Named scalars in one fp32 array [names], on their way from the devices to the host.

    One array of the program for all: a host makes and fetches an array for each output of each
    device after every step, and two dozen of them took it milliseconds.
    """

    values: jax.Array
    names: tuple[str, ...] = dataclasses.field(metadata={"static": True})

    @staticmethod
    def pack(scalars: dict[str, jax.Array]) -> ScalarMetrics:
        values = jnp.stack([scalar.astype(jnp.float32) for scalar in scalars.values()])
        return ScalarMetrics(values, tuple(scalars))

    def fetch(self) -> dict[str, float]:
        """Wait for the device and return the scalars on the host."""
        return dict(zip(self.names, jax.device_get(self.values).tolist(), strict=True))


def add_sums(total: dict[str, float], sums: dict[str, float]) -> dict[str, float]:
    """Return the sums by name of two dictionaries, the first of which may be empty."""
    return {name: total.get(name, 0.0) + value for name, value in sums.items()}


def training_flops(
    config: EncoderConfig,
    tokens: float,
    sum_squared_lengths: float,
    head: float,
    tuning: Tuning | None = None,
    outputs: float | None = None,
) -> float:
    """Return the FLOPs that training on these tokens cannot do without.

    Products of real tokens and attention within their own sequences, forward and twice that
    backward; nothing for padding, pooling or rematerialisation. `head` are those of the head,
    forward. Frozen kernels have no weight gradient, and below the first trained layer there is
    no backward at all. Where the output of the last block is read at `outputs` tokens only, it
    needs the keys and values of all tokens, and all else of these.
    """
    width, ffn, layers = config.width, config.ffn, config.layers
    matrix = 2 * width * tokens
    stages = {  # of a block, forward
        "qkv": 3 * matrix * width,
        "attention": 4 * width * sum_squared_lengths,
        "out_proj": matrix * width,
        "fc1": matrix * config.fc1_width,
        "fc2": matrix * ffn,
    }
    block = sum(stages.values())
    forward = layers * block + head
    method = tuning.method if tuning else "full"
    if tuning is None or method == "full":
        share = 1.0 if outputs is None else outputs / tokens
        return 3 * (forward - (1 - share) * (block - 2 * matrix * width))
    if method == "head":
        return forward + head
    if method == "last":
        return forward + 2 * (tuning.blocks * block + head)
    assert tuning.lora is not None
    stages["attention"] *= 2  # neither operand is a weight: both need their gradients
    order, projections = list(stages), tuning.lora.projections
    first = min(order.index("qkv" if name in FUSED else name) for name in projections)
    not_needed = sum(stages[name] for name in order[: first + 1])  # of the first block
    backward = layers * sum(stages.values()) - not_needed
    wide = {"fc1": config.fc1_width, "fc2": ffn}
    sizes = [width + wide.get(name, width) for name in projections]
    factors = 2 * tuning.lora.rank * tokens * layers * sum(sizes)
    return forward + backward + 3 * factors + 2 * head


def objective_flops(
    objective: Objective,
    config: EncoderConfig,
    tokens: float,
    sum_squared_lengths: float,
    targets: float,
    tuning: Tuning | None = None,
) -> float:
    """Return `training_flops` where `targets` of the tokens are predicted."""
    head = objective.head_flops(config) * targets
    outputs = None if objective.reads_all else targets
    return training_flops(config, tokens, sum_squared_lengths, head, tuning, outputs)


class ThroughputWindow:
    """Consecutive steps between two lines of the log: their sums, and the time they took."""

    def __init__(
        self,
        model: EncoderConfig,
        devices: Sequence[jax.Device],
        objective: Objective,
        tuning: Tuning | None = None,
    ):
        self.model, self.objective, self.tuning = model, objective, tuning
        self.num_devices = len(devices)
        self.peak = PEAK_FLOPS.get(devices[0].device_kind)
        self.restart()

    def restart(self) -> None:
        self.total: dict[str, float] = {}
        self.steps, self.paused = 0, 0.0
        self.start = time.perf_counter()

    def add(self, sums: dict[str, float]) -> None:
        self.total, self.steps = add_sums(self.total, sums), self.steps + 1

    @contextlib.contextmanager
    def pause(self) -> Iterator[None]:
        """Time spent inside is not training time: evaluation and saving."""
        start = time.perf_counter()
        yield
        self.paused += time.perf_counter() - start

    def take(self) -> dict[str, float]:
        """Return the metrics of the window, and begin another."""
        total, seconds = self.total, time.perf_counter() - self.start - self.paused
        residues = total["tokens"] - 2 * total["sequences"]  # without <s> and </s>
        metrics = self.objective.metrics(total) | {
            "tokens_per_second": residues / seconds,
            "seconds_per_step": seconds / self.steps,
            "sequences_per_step": total["sequences"] / self.steps,
            "padding_share": 1 - total["tokens"] / total["num_slots"],
        }
        work = total["tokens"], total["sum_squared_lengths"], total["num_targets"]
        flops = objective_flops(self.objective, self.model, *work, self.tuning)
        metrics["flops_per_step"] = flops / self.steps
        if self.peak:
            metrics["mfu"] = flops / seconds / (self.peak * self.num_devices)
        self.restart()
        return metrics


class HostClock:
    """Where the main thread of this process spends its time between two lines of the log; a step
    takes as long everywhere, because it waits for the slowest process.

    Shares of the wall time: `data_wait` for batches, `device_wait` for the device (a straggler
    waits less than its peers), `host_time` the rest. `probe_seconds` is the time of a fixed matrix
    product on this process's first device alone, taken when nothing else runs on it.
    """

    def __init__(self, group: ProcessGroup, device: jax.Device):
        self.group = group
        with jax.default_device(device):
            size = CPU_PROBE_SIZE if device.platform == "cpu" else PROBE_SIZE
            self._matrix = jnp.asarray(np.full((size, size), 1e-3, np.float32))
            self._product = jax.jit(lambda x: jnp.sum(x @ x @ x)).lower(self._matrix).compile()
        self.probe_seconds = 0.0
        self.restart()

    def restart(self) -> None:
        self._start = time.perf_counter()
        self._waited = {"data_wait": 0.0, "device_wait": 0.0}

    @contextlib.contextmanager
    def waiting(self, name: str) -> Iterator[None]:
        """Count the time spent inside as `name`: 'data_wait' or 'device_wait'."""
        start = time.perf_counter()
        yield
        self._waited[name] += time.perf_counter() - start

    def probe(self) -> None:
        """Time the product, twice: the first may still find the device busy."""
        for _ in range(2):
            start = time.perf_counter()
            self._product(self._matrix).block_until_ready()
            self.probe_seconds = time.perf_counter() - start

    def take(self) -> dict[str, float]:
        """Return the metrics of all processes, `name/process`, on process 0; elsewhere this one's.

        Process 0 waits for nobody: it takes what the others published last, which may be one line
        of the log old.
        """
        wall = time.perf_counter() - self._start
        mine = {name: seconds / wall for name, seconds in self._waited.items()}
        mine["host_time"] = max(0.0, 1 - sum(mine.values()))
        if self.probe_seconds:
            mine["probe_seconds"] = self.probe_seconds
        self.restart()
        by_process = {self.group.index: mine}
        if self.group.client is not None:
            key = f"{KEY}{self.group.index}"
            self.group.client.key_value_set(key, json.dumps(mine), allow_overwrite=True)
            if self.group.is_primary:
                for key, message in self.group.client.key_value_dir_get(KEY):
                    by_process[int(key.rpartition("/")[2])] = json.loads(message)
        return {
            f"{name}/{process}": value
            for process, metrics in sorted(by_process.items())
            for name, value in metrics.items()
        }
