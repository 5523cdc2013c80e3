"""Figures of a run: from sums over batches to perplexities and rates."""

from __future__ import annotations

import contextlib
import math
import time

from esm1nv_jax.model.encoder import EncoderConfig

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


def figures(sums: dict[str, float]) -> dict[str, float]:
    """What a person reads, from sums over any number of batches.

    Perplexity is exp of the token-weighted mean cross-entropy: over all selected positions, and
    over `<mask>` positions only (`_mask`), which alone is compared with baselines.
    """
    loss = sums["loss"] / max(sums["selected"], 1)
    loss_mask = sums["loss_mask"] / max(sums["selected_mask"], 1)
    return {
        "loss": loss,
        "perplexity": _exp(loss),
        "loss_mask": loss_mask,
        "perplexity_mask": _exp(loss_mask),
        "accuracy_mask": sums["right_mask"] / max(sums["selected_mask"], 1),
    }


def add(total: dict[str, float], sums: dict[str, float]) -> dict[str, float]:
    return {name: total.get(name, 0.0) + value for name, value in sums.items()}


def training_flops(config: EncoderConfig, sums: dict[str, float]) -> float:
    """FLOPs that an update cannot do without: products of real tokens and attention within their
    own sequences, forward and twice that backward; nothing for padding or rematerialisation."""
    width, layers = config.width, config.layers
    block = 4 * width**2 + 2 * width * config.ffn
    forward = 2 * layers * block * sums["tokens"] + 4 * layers * width * sums["squares"]
    head = 2 * (width**2 + 128 * width) * sums["selected"]
    return 3 * (forward + head)


class Window:
    """Consecutive updates between two lines of the log: their sums, and the time they took."""

    def __init__(self, model: EncoderConfig, devices):
        self.model, self.devices = model, list(devices)
        self.peak = PEAK_FLOPS.get(self.devices[0].device_kind)
        self.start()

    def start(self) -> None:
        self.total: dict[str, float] = {}
        self.updates, self.paused = 0, 0.0
        self.began = time.perf_counter()

    def add(self, sums: dict[str, float]) -> None:
        self.total, self.updates = add(self.total, sums), self.updates + 1

    @contextlib.contextmanager
    def pause(self):
        """Time spent inside is not the updates': evaluation and saving."""
        began = time.perf_counter()
        yield
        self.paused += time.perf_counter() - began

    def take(self) -> dict[str, float]:
        """Figures of the window, which starts anew."""
        total, seconds = self.total, time.perf_counter() - self.began - self.paused
        residues = total["tokens"] - 2 * total["sequences"]  # without <s> and </s>
        found = figures(total) | {
            "tokens_per_second": residues / seconds,
            "seconds_per_update": seconds / self.updates,
            "sequences_per_update": total["sequences"] / self.updates,
            "padding_share": 1 - total["tokens"] / total["places"],
        }
        if self.peak:
            flops = training_flops(self.model, total)
            found["mfu"] = flops / seconds / (self.peak * len(self.devices))
        self.start()
        return found


def _exp(nats: float) -> float:
    return math.exp(nats) if nats < 700 else math.inf
