"""Chips that one can plan for: their data sheets, what of a peak is reached, how XLA compiles for
them in their absence."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.util
import os
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from esm1nv_jax.common import command
from esm1nv_jax.common.errors import UserError

GIB = 2**30
THIS_CPU = "this-cpu"


@dataclasses.dataclass(frozen=True)
class Efficiency:
    """Shares of a peak that kernels reach."""

    products: float  # matrix products, of the peak FLOP/s
    memory: float  # of the bandwidth of the main memory; also of links
    attention: float  # in attention kernels, of the time of products and vector work at their peaks

    def mean(self, other: Efficiency) -> Efficiency:
        pairs = zip(dataclasses.astuple(self), dataclasses.astuple(other), strict=True)
        return Efficiency(*((a + b) / 2 for a, b in pairs))


@dataclasses.dataclass(frozen=True)
class Chip:
    name: str
    platform: str  # gpu, tpu or cpu
    flops: float  # dense bf16 products, FLOP/s
    bandwidth: float  # of its memory, bytes/s
    memory: float  # bytes
    low: Efficiency
    high: Efficiency
    source: str  # of the two efficiencies
    vector: float = 0.0  # 32-bit operations on elements a second, outside of products
    link: float = 0.0  # bytes/s in which an all-reduce passes one device within a host
    network: float = 0.0  # and between hosts: of the one network card a device has (assumed)
    launch: float = 0.0  # seconds between two kernels
    # Of a GPU: text of XLA's GpuTargetConfigProto, as a driver would report it. Of a TPU: the name
    # of its topologies.
    target: str = ""


_GPU_TARGET = """gpu_device_info {{
  threads_per_block_limit: 1024 threads_per_warp: 32 threads_per_core_limit: 2048
  registers_per_core_limit: 65536 registers_per_block_limit: 65536 shared_memory_per_block: 49152
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  core_count: {cores} fpus_per_core: {fpus} clock_rate_ghz: {clock} l2_cache_size: {l2}
  shared_memory_per_core: {shared} shared_memory_per_block_optin: {optin}
  memory_bandwidth: {bandwidth} device_memory_size: {memory}
  cuda_compute_capability {{ major: {major} minor: 0 feature_extension: {extension} }}
}}
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 10 patch: 0 }}
runtime_version {{ major: 12 minor: 9 patch: 0 }}
device_description_str: "{full}"
"""
# Of the two efficiencies of a GPU the higher one is measured: products by S. Bekman ("Machine
# Learning Engineering", table MAMF, the best shape), attention by T. Dao ("FlashAttention-2", 2023:
# 73 % of an A100's peak at head size 128) and J. Shah et al. ("FlashAttention-3", 2024: its
# predecessor reaches 35 % of an H100's). The lower one, and all of memory, is assumed.
_MEASURED = "the upper ends of products and attention are published measurements, the rest assumed"


def _gpu(name: str, full: str, bandwidth: int, memory: int) -> Chip:
    """Links: half of NVLink's two-way figure. Networks: one 200 or 400 Gbit/s card a GPU."""
    device: dict[str, Any] = {"bandwidth": bandwidth, "memory": memory, "full": full}
    if name.startswith("a100"):
        device |= {"major": 8, "cores": 108, "fpus": 64, "clock": 1.41, "l2": 41943040}
        device |= {"shared": 167936, "optin": 166912, "extension": "NONE"}
        peak, link, network = 312e12, 300e9, 25e9
        low, high = Efficiency(0.65, 0.80, 0.65), Efficiency(0.859, 0.92, 0.95)
    else:  # without Hopper's own instructions the compiler aborts on its products
        device |= {"major": 9, "cores": 132, "fpus": 128, "clock": 1.755, "l2": 52428800}
        device |= {"shared": 233472, "optin": 232448, "extension": "ACCELERATED_FEATURES"}
        if name.startswith("h200"):
            device["l2"] = 62914560
        peak, link, network = 989e12, 450e9, 50e9
        low, high = Efficiency(0.60, 0.80, 0.45), Efficiency(0.801, 0.92, 0.60)
    # A core issues four warps of 32 a clock, floats and integers side by side.
    vector = device["cores"] * 128 * device["clock"] * 1e9
    target = _GPU_TARGET.format(**device)
    figures = (peak, bandwidth, memory, low, high, _MEASURED, vector, link, network, 2e-6)
    return Chip(name, "gpu", *figures, target)


def _tpu(name: str, peak: float, bandwidth: float, memory: int, vector: float, link: float) -> Chip:
    """Vector operations are assumed; links are half of the two-way figure."""
    low, high = Efficiency(0.60, 0.80, 0.45), Efficiency(0.90, 0.92, 0.80)
    figures = (peak, bandwidth, memory * GIB, low, high, "all assumed", vector, link, 0.0, 1e-6)
    return Chip(f"tpu-{name}", "tpu", *figures, {"v7": "tpu7x"}.get(name, name))


CHIPS = {
    "a100-80gb": _gpu("a100-80gb", "NVIDIA A100-SXM4-80GB", 2039040000000, 85100068864),
    "a100-40gb": _gpu("a100-40gb", "NVIDIA A100-SXM4-40GB", 1555200000000, 42298834944),
    "h100-80gb": _gpu("h100-80gb", "NVIDIA H100 80GB HBM3", 3352320000000, 85014609920),
    "h200-141gb": _gpu("h200-141gb", "NVIDIA H200", 4800000000000, 141000000000),
    "tpu-v5e": _tpu("v5e", 197e12, 819e9, 16, 4e12, 100e9),
    "tpu-v6e": _tpu("v6e", 918e12, 1640e9, 32, 6e12, 224e9),
    # JAX has two devices a chip: half of its figures each.
    "tpu-v7": _tpu("v7", 1153e12, 3690e9, 96, 6e12, 300e9),
}
_FLAT = {n: f"{a}x{n // a}" for n, a in ((1, 1), (4, 2), (8, 2), (16, 4), (32, 4), (64, 8))}
_FLAT |= {128: "8x16", 256: "16x16"}
_CUBES = {8: "2x2x1", 16: "2x2x2", 32: "2x2x4", 64: "2x4x4", 128: "4x4x4"}
_TPU_SLICES = {"v5e": _FLAT, "v6e": _FLAT, "tpu7x": _CUBES}  # by number of devices


def chip(name: str, dtype: str) -> Chip:
    """The chip of a name, one of CHIPS or THIS_CPU; the latter by products of operands of `dtype`,
    float32 or bfloat16, as it computes them."""
    return measured_cpu(dtype) if name == THIS_CPU else CHIPS[name]


def by_device_kind(kind: str) -> Chip | None:
    """The GPU that JAX calls `kind`, or None where it is none of CHIPS."""
    return next((chip for chip in CHIPS.values() if f'"{kind}"' in chip.target), None)


def prepare_environment(name: str) -> str:
    """Sets what must stand in the environment before JAX is imported, and imports it; returns the
    flags of XLA: for GPUs those of `launch/xla_flags.sh`, unless XLA_FLAGS is set already.
    """
    os.environ["JAX_PLATFORMS"] = "cpu"  # planning never takes a device
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    if name.startswith("tpu"):
        tpu = {"SKIP_MDS_QUERY": "1", "ACCELERATOR_TYPE": "v5litepod-8"}
        for variable, value in (tpu | {"WORKER_HOSTNAMES": "localhost", "WORKER_ID": "0"}).items():
            os.environ.setdefault(f"TPU_{variable}", value)
        os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")  # two plans at a time
    elif name != THIS_CPU:
        os.environ.setdefault("XLA_FLAGS", " ".join(launch_flags()))
    with _quiet_stderr():
        import jax

        jax.devices()  # plug-ins are loaded here
    return os.environ.get("XLA_FLAGS", "")


def launch_flags() -> list[str]:
    """The XLA flags of `launch/xla_flags.sh`; none where the package is installed without it."""
    path = Path(__file__).parents[2] / "launch" / "xla_flags.sh"
    if not path.is_file():
        return []
    lines = path.read_text(encoding="utf-8").splitlines()
    lines = [line for line in lines if not line.startswith("#")]
    return re.findall(r"--xla_[\w=.,-]+", "\n".join(lines))


def devices(chip: Chip, hosts: int, per_host: int) -> list:
    """`hosts` x `per_host` devices to compile for, none of which need exist."""
    import jax

    count = hosts * per_host
    if chip.platform == "cpu":
        if count > jax.device_count("cpu"):
            raise UserError(f"{chip.name} is 1 device, asked for {count}: --devices-per-host=1")
        return jax.devices("cpu")[:count]
    if chip.platform == "tpu" and count not in _TPU_SLICES[chip.target]:
        slices = ", ".join(map(str, _TPU_SLICES[chip.target]))
        raise UserError(f"{count} of {chip.name} make no slice; there are slices of {slices}")
    plugins = {"gpu": ("jax_cuda13_plugin", "jax_cuda12_plugin"), "tpu": ("libtpu",)}
    if not any(map(importlib.util.find_spec, plugins[chip.platform])):
        package = f"jax-cuda13-plugin=={jax.__version__}" if chip.platform == "gpu" else "libtpu"
        raise UserError(
            f"compiling for {chip.name} needs {' or '.join(plugins[chip.platform])}, which is not "
            f"installed; no driver and no CUDA library is needed: pip install '{package}', or "
            "-e '.[plan]' in a clone"
        )
    from jax.experimental import topologies

    with _quiet_stderr():
        if chip.platform == "tpu":
            name = f"{chip.target}:{_TPU_SLICES[chip.target][count]}"
            # One chip is part of a host of four, unless this says otherwise.
            host: dict[str, Any] = {"chips_per_host_bounds": (1, 1, 1)} if count == 1 else {}
            topology = topologies.get_topology_desc(name, "tpu", **host)
        else:
            shape = {"topology": f"1x{hosts}x{per_host}", "target_config": chip.target}
            topology = topologies.get_topology_desc(chip.name, "cuda", **shape)
    return list(topology.devices)


def measured_cpu(dtype: str = "float32", clock: Callable[[], float] = time.perf_counter) -> Chip:
    """This machine, by its fastest matrix product, copy and chain of sums, a second each."""
    import jax
    import jax.numpy as jnp

    from esm1nv_jax.model.kernels.matmul import multiplies_bf16

    def fastest(function, x) -> float:
        """In place: pages of fresh memory cost more than writing to them."""
        repeated = jax.jit(function, donate_argnums=0)
        x = repeated(x).block_until_ready()
        times, until = [], clock() + 1
        while clock() < until:
            start = clock()
            x = repeated(x).block_until_ready()
            times.append(clock() - start)
        return min(times)

    n = 1536

    def product(x):  # with sums in fp32, as the model's
        return jnp.matmul(x, x, preferred_element_type=jnp.float32).astype(x.dtype)

    operands = jnp.bfloat16 if dtype == "bfloat16" and multiplies_bf16("cpu") else jnp.float32
    flops = 2 * n**3 / fastest(product, jnp.zeros((n, n), operands))
    big = jnp.ones(2**26, jnp.float32)  # 256 MiB, past any cache
    bandwidth = 2 * big.nbytes / fastest(lambda x: x + 1, big)
    chain = 64  # of operations on elements that stay in the cache

    def sums(x):
        for _ in range(chain // 2):
            x = x * 0.5 + 1.0
        return x

    small = jnp.ones(2**16, jnp.float32)
    vector = chain * small.size / fastest(sums, small)
    memory = command.machine_memory()
    low, high = Efficiency(0.75, 0.75, 0.75), Efficiency(0.95, 0.95, 0.95)
    source = "of peaks measured now; benchmarks/plan.py compares with the clock"
    return Chip(THIS_CPU, "cpu", flops, bandwidth, memory, low, high, source, vector, launch=5e-6)


@contextlib.contextmanager
def _quiet_stderr():
    """Plug-ins write to the file descriptor that they found no GPU, which is as it should be."""
    saved, null = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 2)
    try:
        yield
    finally:
        os.dup2(saved, 2)
        os.close(saved)
        os.close(null)
