"""Chips that one can plan for: their figures, and how XLA compiles for them in their absence.

Figures are of the vendors' data sheets; a target's text is XLA's own description of a GPU
(`GpuTargetConfigProto`), as a driver would report it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.util
import os
import re
import time
from collections.abc import Callable
from pathlib import Path

from esm1nv_jax.common.errors import UserError

GIB = 2**30
THIS_CPU = "this-cpu"


@dataclasses.dataclass(frozen=True)
class Chip:
    name: str
    platform: str  # gpu, tpu or cpu
    flops: float  # dense bf16 products, FLOP/s
    bandwidth: float  # of its memory, bytes/s
    memory: float  # bytes
    vector: float = 0.0  # 32-bit integer and float operations/s outside of products
    link: float = 0.0  # bytes/s in which an all-reduce passes one device within a host
    network: float = 0.0  # and between hosts: of the one network card a device has (assumed)
    launch: float = 0.0  # seconds between two kernels
    target: str = ""  # of a GPU: text of a GpuTargetConfigProto

    def network_of(self, hosts: int) -> float:
        return self.link if hosts == 1 else min(self.link, self.network or self.link)


def _target(name: str, **device) -> str:
    major, minor = device.pop("capability")
    # Hopper's own instructions; without them the compiler aborts on its products.
    extension = "ACCELERATED_FEATURES" if major == 9 else "NONE"
    common = {
        "threads_per_block_limit": 1024,
        "threads_per_warp": 32,
        "threads_per_core_limit": 2048,
        "registers_per_core_limit": 65536,
        "registers_per_block_limit": 65536,
        "shared_memory_per_block": 49152,
        "block_dim_limit_x": 2147483647,
        "block_dim_limit_y": 65535,
        "block_dim_limit_z": 65535,
    }
    lines = "\n".join(f"  {key}: {value}" for key, value in (common | device).items())
    return f"""gpu_device_info {{
{lines}
  cuda_compute_capability {{ major: {major} minor: {minor} feature_extension: {extension} }}
}}
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 10 patch: 0 }}
runtime_version {{ major: 12 minor: 9 patch: 0 }}
device_description_str: "{name}"
"""


_A100 = {
    "capability": (8, 0),
    "core_count": 108,
    "fpus_per_core": 64,
    "shared_memory_per_core": 167936,
    "shared_memory_per_block_optin": 166912,
    "clock_rate_ghz": 1.41,
    "l2_cache_size": 41943040,
}
_A100_80 = _A100 | {"memory_bandwidth": 2039040000000, "device_memory_size": 85100068864}
_A100_40 = _A100 | {"memory_bandwidth": 1555200000000, "device_memory_size": 42298834944}
_H100 = {
    "capability": (9, 0),
    "core_count": 132,
    "fpus_per_core": 128,
    "shared_memory_per_core": 233472,
    "shared_memory_per_block_optin": 232448,
    "clock_rate_ghz": 1.755,
    "l2_cache_size": 52428800,
    "memory_bandwidth": 3352320000000,
    "device_memory_size": 85014609920,
}


def _gpu(name: str, full_name: str, flops: float, link: float, network: float, device) -> Chip:
    return Chip(
        name=name,
        platform="gpu",
        flops=flops,
        bandwidth=device["memory_bandwidth"],
        memory=device["device_memory_size"],
        # A core issues four warps of 32 a clock, floats and integers side by side.
        vector=device["core_count"] * 128 * device["clock_rate_ghz"] * 1e9,
        link=link,
        network=network,
        launch=2e-6,
        target=_target(full_name, **device),
    )


# Links: half of the NVLink's two-way figure; networks: one 200 or 400 Gbit/s card a GPU.
CHIPS = {
    chip.name: chip
    for chip in (
        _gpu("a100-80gb", "NVIDIA A100-SXM4-80GB", 312e12, 300e9, 25e9, _A100_80),
        _gpu("a100-40gb", "NVIDIA A100-SXM4-40GB", 312e12, 300e9, 25e9, _A100_40),
        _gpu("h100-80gb", "NVIDIA H100 80GB HBM3", 989e12, 450e9, 50e9, _H100),
        Chip("tpu-v5e", "tpu", 197e12, 819e9, 16 * GIB, vector=4e12, link=100e9, launch=1e-6),
    )
}

_TPU_GRIDS = {1: "1x1", 4: "2x2", 8: "2x4", 16: "4x4", 32: "4x8", 64: "8x8", 128: "8x16"}
_TPU_GRIDS[256] = "16x16"


def chip(name: str) -> Chip:
    if name == THIS_CPU:
        return measured_cpu()
    if name not in CHIPS:
        raise UserError(f"chip {name!r} is unknown; there are {', '.join((*CHIPS, THIS_CPU))}")
    return CHIPS[name]


def prepare_environment(name: str) -> str:
    """Sets what must stand in the environment before JAX is imported; returns the flags of XLA.

    For GPUs these are the flags of `launch/xla_flags.sh`, unless XLA_FLAGS is set already.
    """
    os.environ["JAX_PLATFORMS"] = "cpu"  # planning never takes a device
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    if name.startswith("tpu"):
        os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
        os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v5litepod-8")
        os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
        os.environ.setdefault("TPU_WORKER_ID", "0")
    elif name != THIS_CPU:
        os.environ.setdefault("XLA_FLAGS", " ".join(launch_flags()))
    return os.environ.get("XLA_FLAGS", "")


def launch_flags() -> list[str]:
    """The XLA flags of `launch/xla_flags.sh`; none where the package is installed without it."""
    path = Path(__file__).parents[2] / "launch" / "xla_flags.sh"
    if not path.is_file():
        return []
    lines = [line for line in path.read_text().splitlines() if not line.startswith("#")]
    return re.findall(r"--xla_[\w=.,-]+", "\n".join(lines))


def devices(chip: Chip, hosts: int, per_host: int) -> list:
    """`hosts` x `per_host` devices to compile for, none of which need exist."""
    import jax

    count = hosts * per_host
    if chip.platform == "cpu":
        if count > jax.device_count("cpu"):
            raise UserError(f"{chip.name} is 1 device, asked for {count}: --devices_per_host=1")
        return jax.devices("cpu")[:count]
    missing = {"gpu": "jax_cuda12_plugin", "tpu": "libtpu"}[chip.platform]
    if importlib.util.find_spec(missing) is None:
        package = f"jax-cuda12-plugin=={jax.__version__}" if chip.platform == "gpu" else "libtpu"
        raise UserError(
            f"compiling for {chip.name} needs {missing}, which is not installed; no driver and no "
            f"CUDA library is needed: pip install '{package}' (or the extra esm1nv_jax[plan])"
        )
    from jax.experimental import topologies

    with _quiet_stderr():
        if chip.platform == "gpu":
            found = topologies.get_topology_desc(
                platform="cuda",
                topology_name=chip.name,
                topology=f"1x{hosts}x{per_host}",
                target_config=chip.target,
            )
        else:
            if count not in _TPU_GRIDS:
                raise UserError(
                    f"{count} devices of {chip.name} make no slice; there are slices of "
                    f"{', '.join(map(str, _TPU_GRIDS))}"
                )
            found = topologies.get_topology_desc(
                platform="tpu", topology_name=f"v5e:{_TPU_GRIDS[count]}"
            )
    return list(found.devices)


def measured_cpu(clock: Callable[[], float] = time.perf_counter) -> Chip:
    """This machine, by its fastest matrix product, copy and chain of sums, a second each."""
    import jax
    import jax.numpy as jnp

    def best(function, x) -> float:
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
    flops = 2 * n**3 / best(lambda x: x @ x, jnp.zeros((n, n), jnp.float32))
    big = jnp.ones(2**26, jnp.float32)  # 256 MiB, past any cache
    bandwidth = 2 * big.nbytes / best(lambda x: x + 1, big)
    chain = 64  # of operations on elements that stay in the cache

    def sums(x):
        for _ in range(chain // 2):
            x = x * 0.5 + 1.0
        return x

    small = jnp.ones(2**16, jnp.float32)
    vector = chain * small.size / best(sums, small)
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return Chip(THIS_CPU, "cpu", flops, bandwidth, memory, vector, launch=5e-6)


@contextlib.contextmanager
def _quiet_stderr():
    """Plugins write to the file descriptor that no GPU was found: here that is as it should be."""
    saved, null = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 2)
    try:
        yield
    finally:
        os.dup2(saved, 2)
        os.close(saved)
        os.close(null)
