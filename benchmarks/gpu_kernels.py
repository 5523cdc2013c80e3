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
            arrays = (jnp.asarray(qkv, jnp.bfloat16), ids, keys, jnp.asarray(g, jnp.bfloat16))
            found = forward_and_backward(backend(name, rate, rehearse))(*arrays)
            right = attention_reference.attention(qkv, ids, g, rate, keys)
            errors = [relative_error(x, y) for x, y in zip(found, right, strict=True)]
            clean = all(not np.any(np.asarray(x, np.float64)[ids == 0]) for x in found)
            good = bool(max(errors) < 0.02 and clean)
            record(label, values=errors[0], gradients=errors[1], padding_is_zero=clean, good=good)


def relative_error(found, right) -> float:
    """Largest difference, in units of the largest value."""
    return float(np.abs(np.asarray(found, np.float64) - right).max() / np.abs(right).max())


def backend(name: str, rate: float, interpret: bool, blocks: Blocks | None = None):
    """Attention of one backend, as a function of QKV, segment ids and dropout keys."""
    if name == "pallas" and (interpret or blocks):
        chosen = {"blocks": blocks} if blocks else {}
        return lambda qkv, ids, keys: flash_attention(
            qkv, ids, rate, keys, interpret=interpret, **chosen
        )
    chip = jax.devices()[0].device_kind
    return lambda qkv, ids, keys: model_attention(
        qkv, ids, jnp.bfloat16, rate, keys if rate else None, name, chip
    )


def card_rows(reading: str, rows: int, rehearse: bool) -> np.ndarray:
    """Segment ids of rows of the card's input stream, int32 [rows, T]."""
    arguments = f"{reading},max_length=62,batch=1" if rehearse else reading
    run = RunConfig.from_config_dict(config_file.load(CARD, arguments))
    stream = stream_config(run, 2 if rehearse else rows)
    return next(iter(train_dataset(open_split(SAMPLE, "train"), stream)))["segment_ids"]


def attention_inputs(ids: np.ndarray, rehearse: bool) -> tuple:
    """QKV, segment ids, dropout keys, and a gradient of the output, on the device."""
    (B, T), (N, H) = ids.shape, ((2, 16) if rehearse else (12, 64))
    qkv = jax.random.normal(jax.random.key(0), (B, T, 3, N, H), jnp.bfloat16)
    g = jax.random.normal(jax.random.key(1), (B, T, N, H), jnp.bfloat16)
    return qkv, jnp.asarray(ids), jnp.arange(B, dtype=jnp.uint32), g


def forward_and_backward(function):
    """Jitted: the values of an attention function and the gradient of QKV."""

    def both(qkv, ids, keys, g):
        out, pull = jax.vjp(lambda qkv: function(qkv, ids, keys), qkv)
        return out, pull(g.astype(out.dtype))[0]

    return jax.jit(both)


def attention(record, rehearse: bool) -> None:
    """Each attention kernel at the card's shapes: forward, and forward with backward."""
    for rows in ("packed",) if rehearse else ("padded", "packed"):
        ids = card_rows("" if rows == "packed" else "padded", ROWS, rehearse)
        arrays = attention_inputs(ids, rehearse)
        real = ids > 0
        tokens, (_, _, _, N, H) = int(real.sum()), arrays[0].shape
        owner = (np.arange(len(ids))[:, None] * 10_000 + ids)[real]
        squares = float((np.unique(owner, return_counts=True)[1].astype(float) ** 2).sum())
        for name, function in kernels(rows, ids, rehearse).items():
            with attempted(record, f"{name}, {rows}"):
                forward = seconds(jax.jit(function), *arrays[:3])
                both = seconds(forward_and_backward(function), *arrays)
                record(
                    f"{name}, {rows}",
                    forward_ms=1e3 * forward,
                    both_ms=1e3 * both,
                    ns_per_token=1e9 * both / tokens,
                    # 2 products of scores forward, 5 backward, within segments only.
                    tflops=7 * 2e-12 * squares * N * H / both,
                    rows=len(ids),
                    tokens=tokens,
                )


def kernels(rows: str, ids: np.ndarray, rehearse: bool) -> dict:
    """Attention functions by name: ours, and those of JAX."""
    found = {
        f"{name}{' + dropout' if rate else ''}": backend(name, rate, rehearse)
        for name in ("pallas", "xla")
        for rate in ((RATE,) if rehearse else (0.0, RATE))
    }

    def dot_product_attention(qkv, **options):
        return jax.nn.dot_product_attention(*(qkv[:, :, c] for c in range(3)), **options)

    def masked(qkv, ids, keys):
        same = (ids[:, None, :, None] == ids[:, None, None]) & (ids > 0)[:, None, None]
        return dot_product_attention(qkv, mask=same, implementation="xla")

    found["jax.nn xla"] = masked
    if rehearse:
        return found
    if rows == "padded":
        found["jax.nn cudnn"] = backend("cudnn", 0.0, False)
        found["jax.nn cudnn, no mask, T x T"] = lambda qkv, ids, keys: dot_product_attention(
            qkv, implementation="cudnn"
        )
    else:  # Last, for with dropout it ended the process (jaxlib 0.11.2), and might without.
        found["cudnn by segments (private API)"] = functools.partial(cudnn_by_segments, ids)
    return found


def cudnn_by_segments(ids: np.ndarray, qkv, *_):
    """cuDNN's kernel for packed rows by offsets of segments, which `jax.nn` does not offer."""
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
    )


def blocks(record, rehearse: bool) -> None:
    """Sweeps the tiles of our kernel, the forward first, then the backward beside the best one.

    The line named `best` is what the table in `model/kernels/flash_gpu.py` should hold.
    """
    arrays = attention_inputs(card_rows("", ROWS, rehearse), rehearse)
    run = functools.partial(backend, "pallas", RATE, rehearse)
    default = Blocks()
    sizes = (16,) if rehearse else (128, 64)
    tried = (dict(queries=q, keys=k, warps=w, stages=s) for s in (2, 3, 1) for w in (4, 8)
             for q in sizes for k in (*sizes, 32))  # fmt: skip
    forward = [default, *(dataclasses.replace(default, **fields) for fields in tried)]
    best, _ = fastest(record, "forward", forward, run, arrays, rehearse)
    tried = (dict(backward=b, backward_warps=w, backward_stages=s) for s in (2, 3, 1)
             for w in (4, 8) for b in (*sizes, 32))  # fmt: skip
    backward = [best, *(dataclasses.replace(best, **fields) for fields in tried)]
    best, best_ms = fastest(record, "both", backward, run, arrays, rehearse)
    default_ms = 1e3 * seconds(forward_and_backward(run(default)), *arrays)
    chip = jax.devices()[0].device_kind
    record("best", chip=chip, blocks=repr(best), both_ms=best_ms, default_ms=default_ms)


def fastest(record, what: str, candidates, run, arrays, rehearse: bool):
    """The fastest of the candidates that equals the first, which must work, and its milliseconds.

    Eight are compiled at once, and timed while nothing compiles, so that one that ends the process
    takes few others with it.
    """
    arrays = arrays[:3] if what == "forward" else arrays
    candidates = list(dict.fromkeys(candidates))[: 1 if rehearse else None]

    def compiled(chosen: Blocks):
        function = jax.jit(run(chosen)) if what == "forward" else forward_and_backward(run(chosen))
        return function.lower(*arrays).compile()

    expected, times = None, {}
    for start in range(0, len(candidates), 8):
        with concurrent.futures.ThreadPoolExecutor(8) as pool:
            programs = [
                (chosen, pool.submit(compiled, chosen)) for chosen in candidates[start : start + 8]
            ]
        for chosen, program in programs:
            label = f"{what} {dataclasses.astuple(chosen)}"
            with attempted(record, label):
                result = program.result()
                found = result(*arrays)
                expected = found if expected is None else expected
                apart = float(distance(found, expected))
                if not apart < 0.05:
                    record(label, error=f"differs from the first by {apart:.3f} of the largest")
                    continue
                times[chosen] = 1e3 * seconds(result, *arrays, rounds=3, at_least=0.02)
                record(label, ms=times[chosen])
    best = min(times, key=times.__getitem__)
    return best, times[best]


@jax.jit
def distance(found, right):
    """Largest difference of all arrays, in units of the largest value of each."""
    pairs = zip(jax.tree.leaves(found), jax.tree.leaves(right), strict=True)
    pairs = [(x.astype(jnp.float32), y.astype(jnp.float32)) for x, y in pairs]
    return jnp.max(jnp.stack([jnp.abs(x - y).max() / jnp.abs(y).max() for x, y in pairs]))
