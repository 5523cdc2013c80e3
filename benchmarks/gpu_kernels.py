"""Parts of `gpu.py` about the chip and the attention kernels."""

from __future__ import annotations

import concurrent.futures
import contextlib
import dataclasses
import functools
import statistics
import subprocess
import time
from importlib import metadata
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from esm1nv_jax.common import config_file
from esm1nv_jax.data.packing import stream_config
from esm1nv_jax.data.pipeline import train_dataset
from esm1nv_jax.data.source import SAMPLE, open_split
from esm1nv_jax.model.attention import attention as model_attention
from esm1nv_jax.model.kernels.flash_gpu import Blocks, flash_attention
from esm1nv_jax.training.run_config import RunConfig
from tests.model import attention_reference

CARD = Path(__file__).parents[1] / "configs/pretrain_small.py"
ROWS = 32  # of 1,152 tokens: enough for any chip, and T x T scores still fit
RATE = 0.1
PACKAGES = "jax jaxlib jax-cuda13-plugin jax-cuda12-plugin flax torch transformers".split()


@contextlib.contextmanager
def attempted(record, name: str):
    """Records the error of one measurement; the others of the part go on."""
    try:
        yield
    except Exception as error:
        lines = str(error).strip().splitlines() or [""]
        record(name, error=f"{type(error).__name__}: {lines[0][:250]}")


def seconds(function, *arguments, rounds: int = 5, at_least: float = 0.1) -> float:
    """Median time of a call. Calls are queued, so that dispatch hides behind the device."""
    jax.block_until_ready(function(*arguments))  # compiles
    start = time.perf_counter()
    jax.block_until_ready(function(*arguments))
    calls = int(min(max(at_least / (time.perf_counter() - start), 1), 100))
    times = []
    for _ in range(rounds):
        start = time.perf_counter()
        for _ in range(calls):
            result = function(*arguments)
        jax.block_until_ready(result)
        times.append((time.perf_counter() - start) / calls)
    return statistics.median(times)


def device(record, rehearse: bool) -> None:
    """Versions, and the two ceilings of the chip: a large matrix product, a large copy."""
    versions = {}
    for package in PACKAGES:
        with contextlib.suppress(metadata.PackageNotFoundError):
            versions[package] = metadata.version(package)
    record("versions", **versions)
    with attempted(record, "driver"):
        query = ["nvidia-smi", "--query-gpu=name,driver_version,memory.total,power.limit"]
        ended = subprocess.run([*query, "--format=csv,noheader"], capture_output=True, text=True)
        record("driver", reported=ended.stdout.strip())
    limit = (jax.devices()[0].memory_stats() or {}).get("bytes_limit", 0)
    record("memory", gib=limit / 2**30)
    n = 256 if rehearse else 8192
    a, b = (jax.random.normal(jax.random.key(i), (n, n), jnp.bfloat16) for i in range(2))
    record("product", n=n, tflops=2e-12 * n**3 / seconds(jax.jit(jnp.matmul), a, b))
    x = jnp.ones((2**20 if rehearse else 2**29,), jnp.float32)
    record("copy", tb_per_s=2e-12 * x.nbytes / seconds(jax.jit(lambda x: x + 1), x))


def reference(record, rehearse: bool) -> None:
    """Every backend, values and gradients in bf16, against NumPy in fp64."""
    B, T, N, H = (2, 140, 2, 16) if rehearse else (2, 640, 4, 64)
    random = np.random.default_rng(0)
    qkv = np.asarray(jnp.asarray(random.normal(size=(B, T, 3, N, H)), jnp.bfloat16), np.float64)
    g = np.asarray(jnp.asarray(random.normal(size=(B, T, N, H)), jnp.bfloat16), np.float64)
    keys = np.array([3, 2**31], np.uint32)
    packed, padded = np.zeros((2, B, T), np.int32)
    packed[0, : T // 2], packed[0, T // 2], packed[0, T // 2 + 1 : T - 40], packed[1] = 1, 2, 3, 1
    padded[0, : T - 99], padded[1, :7] = 1, 1
    cases = [(name, rows, rate) for name in ("xla", "pallas") for rows in ("packed", "padded")
             for rate in (0.0, RATE)]  # fmt: skip
    cases = cases[1::4] if rehearse else cases
    for name, rows, rate in (*cases, ("cudnn", "padded", 0.0)):
        label = f"{name}, {rows}, dropout {rate}"
        if name == "cudnn" and rehearse:
            record(label, skipped="cuDNN needs a GPU")
            continue
        with attempted(record, label):
            ids = packed if rows == "packed" else padded
            function = backend(name, ids, rate, keys, rehearse)
            out, pull = jax.vjp(function, jnp.asarray(qkv, jnp.bfloat16))
            found = (out, pull(jnp.asarray(g, out.dtype))[0])
            right = attention_reference.attention(qkv, ids, g, rate, keys)
            errors = [relative_error(x, y) for x, y in zip(found, right, strict=True)]
            clean = all(not np.any(np.asarray(x, np.float64)[ids == 0]) for x in found)
            good = bool(max(errors) < 0.02 and clean)
            record(label, values=errors[0], gradients=errors[1], padding_is_zero=clean, good=good)


def relative_error(found, right) -> float:
    """Largest difference, in units of the largest value."""
    return float(np.abs(np.asarray(found, np.float64) - right).max() / np.abs(right).max())


def backend(name: str, ids, rate: float, keys, interpret: bool, blocks: Blocks | None = None):
    """Attention of one backend as a function of the QKV array alone."""
    ids, keys = jnp.asarray(ids), jnp.asarray(keys)
    if name == "pallas" and (interpret or blocks):
        chosen = {"blocks": blocks} if blocks else {}
        return lambda qkv: flash_attention(qkv, ids, rate, keys, interpret=interpret, **chosen)
    dropout = (rate, keys) if rate else ()
    return lambda qkv: model_attention(qkv, ids, jnp.bfloat16, *dropout, backend=name)


def card_rows(reading: str, rows: int, rehearse: bool) -> np.ndarray:
    """Segment ids of rows of the card's input stream, int32 [rows, T]."""
    arguments = f"{reading},max_length=62,batch=1" if rehearse else reading
    run = RunConfig.from_config_dict(config_file.load(CARD, arguments))
    stream = stream_config(run, 2 if rehearse else rows)
    return next(iter(train_dataset(open_split(SAMPLE, "train"), stream)))["segment_ids"]


def attention_inputs(ids: np.ndarray, rehearse: bool):
    """QKV, a gradient of the output, and dropout keys, on the device."""
    (B, T), (N, H) = ids.shape, ((2, 16) if rehearse else (12, 64))
    qkv = jax.random.normal(jax.random.key(0), (B, T, 3, N, H), jnp.bfloat16)
    g = jax.random.normal(jax.random.key(1), (B, T, N, H), jnp.bfloat16)
    return qkv, g, np.arange(B, dtype=np.uint32)


def forward_and_backward(function):
    """Jitted: the values of an attention function and its gradient."""

    def both(qkv, g):
        out, pull = jax.vjp(function, qkv)
        return out, pull(g.astype(out.dtype))

    return jax.jit(both)


def attention(record, rehearse: bool) -> None:
    """Each attention kernel at the card's shapes: forward, and forward with backward."""
    for rows in ("packed",) if rehearse else ("packed", "padded"):
        ids = card_rows("" if rows == "packed" else "padded", ROWS, rehearse)
        qkv, g, keys = attention_inputs(ids, rehearse)
        real = ids > 0
        tokens = int(real.sum())
        owner = (np.arange(len(ids))[:, None] * 10_000 + ids)[real]
        squares = float((np.unique(owner, return_counts=True)[1].astype(float) ** 2).sum())
        flops = 4 * squares * qkv.shape[3] * qkv.shape[4]
        for name, function in kernels(rows, ids, keys, rehearse).items():
            with attempted(record, f"{name}, {rows}"):
                forward = seconds(jax.jit(function), qkv)
                both = seconds(forward_and_backward(function), qkv, g)
                record(
                    f"{name}, {rows}",
                    forward_ms=1e3 * forward,
                    both_ms=1e3 * both,
                    ns_per_token=1e9 * both / tokens,
                    tflops=3.5e-12 * flops / both,  # products of scores within segments only
                    rows=len(ids),
                    tokens=tokens,
                )


def kernels(rows: str, ids: np.ndarray, keys, rehearse: bool) -> dict:
    """Attention functions of QKV, by name: ours, and those of JAX."""
    found = {
        f"{name}{' + dropout' if rate else ''}": backend(name, ids, rate, keys, rehearse)
        for name in ("pallas", "xla")
        for rate in ((RATE,) if rehearse else (0.0, RATE))
    }
    same = jnp.asarray((ids[:, None, :, None] == ids[:, None, None, :]) & (ids > 0)[:, None, None])

    def jax_nn(qkv, **options):
        return jax.nn.dot_product_attention(*(qkv[:, :, c] for c in range(3)), **options)

    found["jax.nn xla"] = functools.partial(jax_nn, mask=same, implementation="xla")
    if rehearse:
        return found
    if rows == "padded":
        found["jax.nn cudnn"] = backend("cudnn", ids, 0.0, keys, False)
        dense = functools.partial(jax_nn, implementation="cudnn")
        found["jax.nn cudnn, no mask, T x T"] = dense
    for rate in (0.0, RATE):  # with offsets of segments, which jax.nn does not offer
        name = f"cudnn by segments (private API){' + dropout' if rate else ''}"
        found[name] = functools.partial(cudnn_by_segments, ids, rate)
    return found


def cudnn_by_segments(ids: np.ndarray, rate: float, qkv):
    """cuDNN's kernel for packed rows, by a function that JAX keeps to itself."""
    from jax._src.cudnn import fused_attention_stablehlo as fused

    most = int(ids.max())
    lengths = np.stack([(ids == i).sum(axis=1) for i in range(1, most + 1)], axis=1)
    offsets = np.concatenate([np.zeros((len(ids), 1), int), np.cumsum(lengths, axis=1)], axis=1)
    empty = lengths == 0
    lengths[empty] = -1
    offsets[:, 1:][empty] = -1
    lengths, offsets = jnp.asarray(lengths, jnp.int32), jnp.asarray(offsets, jnp.int32)
    return fused.dot_product_attention(
        *(qkv[:, :, c] for c in range(3)),
        q_seqlen=lengths,
        kv_seqlen=lengths,
        q_offsets=offsets,
        kv_offsets=offsets,
        scale=qkv.shape[-1] ** -0.5,
        mask_type=fused.MaskType.PADDING,
        dropout_rate=rate,
    )


def blocks(record, rehearse: bool) -> None:
    """Sweeps the tiles of our kernel, the forward first, then the backward beside the best one.

    The line named `best` is what the table in `model/kernels/flash_gpu.py` should hold.
    """
    ids = card_rows("", ROWS, rehearse)
    qkv, g, keys = attention_inputs(ids, rehearse)
    expected = forward_and_backward(backend("pallas", ids, RATE, keys, rehearse))(qkv, g)
    sizes = (16,) if rehearse else (64, 128)
    tried = (dict(queries=q, keys=k, warps=w, stages=s) for q in sizes for k in (32, *sizes)
             for w in (4, 8) for s in (1, 2, 3))  # fmt: skip
    default = Blocks()
    forward = [dataclasses.replace(default, **fields) for fields in tried]
    best = fastest(record, "forward", forward, qkv, g, ids, keys, expected, rehearse)
    tried = (dict(backward=b, backward_warps=w, backward_stages=s) for b in (32, *sizes)
             for w in (4, 8) for s in (1, 2, 3))  # fmt: skip
    backward = [dataclasses.replace(best, **fields) for fields in tried]
    best = fastest(record, "both", backward, qkv, g, ids, keys, expected, rehearse)
    times = [
        1e3 * seconds(forward_and_backward(backend("pallas", ids, RATE, keys, rehearse, b)), qkv, g)
        for b in (default, best)
    ]
    record(
        "best",
        chip=jax.devices()[0].device_kind,
        blocks=repr(best),
        both_ms=times[1],
        default_ms=times[0],
    )


def fastest(record, what, candidates, qkv, g, ids, keys, expected, rehearse) -> Blocks:
    """Compiles all candidates at once, checks and times each; returns the fastest that is right."""
    arguments = (qkv,) if what == "forward" else (qkv, g)
    candidates = list(dict.fromkeys(candidates))[: 1 if rehearse else None]

    def compiled(chosen: Blocks):
        function = backend("pallas", ids, RATE, keys, rehearse, chosen)
        jitted = jax.jit(function) if what == "forward" else forward_and_backward(function)
        return jitted.lower(*arguments).compile()

    times: dict[Blocks, float] = {}
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        programs = [(chosen, pool.submit(compiled, chosen)) for chosen in candidates]
        for chosen, program in programs:
            label = f"{what} {dataclasses.astuple(chosen)}"
            with attempted(record, label):
                program.result()
    for chosen, program in programs:  # once nothing compiles beside them
        label = f"{what} {dataclasses.astuple(chosen)}"
        if program.exception() is not None:
            continue
        with attempted(record, label):
            run = program.result()
            apart = float(distance(run(*arguments), expected[0] if what == "forward" else expected))
            if not apart < 0.02:
                record(label, error=f"differs from the default by {apart:.3f}")
                continue
            times[chosen] = seconds(run, *arguments, rounds=3, at_least=0.02)
            record(label, ms=1e3 * times[chosen])
    return min(times, key=times.__getitem__)


@jax.jit
def distance(found, right):
    """Largest difference of all arrays, in units of the largest value of each."""
    pairs = zip(jax.tree.leaves(found), jax.tree.leaves(right), strict=True)
    pairs = [(x.astype(jnp.float32), y.astype(jnp.float32)) for x, y in pairs]
    return jnp.max(jnp.stack([jnp.abs(x - y).max() / jnp.abs(y).max() for x, y in pairs]))
