"""Parts of `gpu.py` about the training step of the full recipe."""

from __future__ import annotations

import collections
import concurrent.futures
import functools
import hashlib
import itertools
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from gpu_kernels import attempted

from esm1nv_jax.planning import chips

CARD = Path(__file__).parents[1] / "configs/pretrain_small.py"
TINY = "width=64,layers=1,max_length=62"
ROUNDS, STEPS = 5, 4
VARIANTS = {
    "step": ("", {}),
    "step_xla": ("", {"compute.attention": "xla", "batch.microbatches": 5}),
    "step_no_dropout": ("", {"model.dropout": 0.0, "model.attention_dropout": 0.0}),
    "step_padded": ("padded", {"compute.attention": "pallas", "compute.remat": "dots"}),
    "step_cudnn": ("padded", {"model.attention_dropout": 0.0, "compute.remat": "dots"}),
}


def card(rehearse: bool, arguments: str = "", tiny: str = ",batch=2", **fields):
    """The full recipe on the bundled sample, or a tiny one, as a frozen `RunConfig`."""
    from esm1nv_jax.common import config_file
    from esm1nv_jax.training.run_config import RunConfig

    if rehearse:
        arguments = f"{arguments},{TINY}{tiny}"
        fields = {k: v for k, v in fields.items() if "attention" not in k or not isinstance(v, str)}
        fields = {"compute.dtype": "float32"} | fields | {"batch.microbatches": 1}
    config = config_file.load(CARD, arguments.strip(","))
    with config.unlocked():
        config.update_from_flattened_dict({"data.path": "sample"} | fields)
    return RunConfig.from_config_dict(config.lock())


class Training:
    """The compiled step of a run on one device, its state, and a few batches on the device."""

    def __init__(self, run, device, batches: int = 4):
        import jax

        from esm1nv_jax.data.packing import stream_config
        from esm1nv_jax.data.pipeline import train_dataset
        from esm1nv_jax.data.source import open_split
        from esm1nv_jax.training import sharding, step
        from esm1nv_jax.training.run_data import masked_lm

        self.run, self.device = run, device
        self.source = open_split("sample", "train")
        self.rows = run.global_rows(self.source.lengths, 1)
        self.settings = run.step_config(device, masked_lm(run, self.source))
        mesh = sharding.make_mesh([device])
        stream = iter(train_dataset(self.source, stream_config(run, self.rows)))
        self.batches = [
            sharding.place_on_devices(batch, self.settings.objective.batch_dtypes, mesh)
            for batch in itertools.islice(stream, batches)
        ]
        layout = sharding.sharding(mesh, "state")
        # One initial state for all devices: it is drawn on the host.
        with jax.default_device(jax.local_devices(backend="cpu")[0]):
            state = jax.device_get(jax.jit(step.create_state, static_argnums=0)(self.settings))
        self.state = jax.device_put(state, layout)
        shapes = step.abstract_state(self.settings, mesh)
        batch = step.abstract_batch(self.settings, mesh, self.rows, run.data.row_length)
        began = time.perf_counter()
        self.compiled = step.jit_steps(self.settings, mesh)[0].lower(shapes, batch).compile()
        self.compile_seconds = time.perf_counter() - began

    def steps(self, number: int) -> list[dict[str, float]]:
        """Metrics of so many steps; they are fetched after the last."""
        metrics = []
        for i in range(number):
            self.state, values = self.compiled(self.state, self.batches[i % len(self.batches)])
            metrics.append(values)
        return [values.fetch() for values in metrics]


def cpu(record, rehearse: bool) -> None:
    """Three steps of the card on the chip and on the CPU: the same masks and dropout, so the losses
    agree to rounding."""
    import jax

    here, host = jax.devices()[0], jax.local_devices(backend="cpu")[0]
    losses = {}
    compared = [("cpu, float32", host, "float32"), ("this chip, float32", here, "float32")]
    if not rehearse:
        compared.append(("this chip, bfloat16", here, "bfloat16"))
    for name, device, dtype in compared:
        run = card(rehearse, "batch=2", tiny="", **{"compute.dtype": dtype})
        training = Training(run, device, batches=3)
        metrics = training.steps(3)
        losses[name] = [m["loss"] / m["num_targets"] for m in metrics]
        reference = losses["cpu, float32"]
        pairs = zip(losses[name], reference, strict=True)
        record(
            name,
            losses=losses[name],
            gradient_norms=[m["gradient_norm"] for m in metrics],
            apart=max(abs(a - b) / b for a, b in pairs),
            attention=training.settings.compute.attention,
            compile_seconds=training.compile_seconds,
        )


def deterministic(record, rehearse: bool) -> None:
    """Two processes run the same steps with `compute.deterministic`: are the states equal bitwise?

    On the chip, beside them, the same without it. Two layers of the full width.
    """
    code = f"import gpu_steps; gpu_steps.digests({rehearse})"
    environment = os.environ | {"JAX_ENABLE_COMPILATION_CACHE": str(rehearse).lower()}

    def digests_of_a_process(_) -> dict[str, str]:
        command = [sys.executable, "-c", code]
        ended = subprocess.run(command, stdout=subprocess.PIPE, text=True, env=environment)
        if ended.returncode:
            raise RuntimeError("a process failed; its message is in gpu.log")
        return json.loads(ended.stdout.strip().splitlines()[-1])

    with concurrent.futures.ThreadPoolExecutor(1 if rehearse else 2) as pool:
        first, second = pool.map(digests_of_a_process, range(2))
    for name, digest in first.items():
        record(name, equal=digest == second[name], sha256=digest[:16])


def digests(rehearse: bool) -> None:
    """Prints SHA-256 of the state after four steps, with and without `compute.deterministic`."""
    import jax

    found = {}
    for name, value in (("deterministic", True), ("default", False))[: 1 if rehearse else 2]:
        run = card(rehearse, "layers=2,batch=16", tiny="", **{"compute.deterministic": value})
        training = Training(run, jax.devices()[0])
        training.steps(4)
        leaves = jax.tree.leaves(jax.device_get(training.state))
        found[name] = hashlib.sha256(b"".join(leaf.tobytes() for leaf in leaves)).hexdigest()
    print(json.dumps(found))


def step(record, rehearse: bool, variant: str = "step") -> None:
    """The recipe's step with its rows a device: time, MFU, memory, kernels by class, and what the
    roofline of `plan` says of this very program."""
    import jax

    from esm1nv_jax.planning.hlo import Program
    from esm1nv_jax.training.metrics import PEAK_FLOPS, objective_flops

    arguments, fields = VARIANTS[variant]
    device = jax.devices()[0]
    training = Training(card(rehearse, arguments, **fields), device)
    settings = training.settings
    training.steps(STEPS)
    times = []
    for _ in range(ROUNDS):
        began = time.perf_counter()
        metrics = training.steps(STEPS)
        times.append((time.perf_counter() - began) / STEPS)
    second = statistics.median(times)
    total = {name: statistics.fmean(m[name] for m in metrics) for name in metrics[0]}
    counted = total["tokens"], total["sum_squared_lengths"], total["num_targets"]
    work = objective_flops(settings.objective, settings.model, *counted)
    chip = chips.by_device_kind(device.device_kind) or (chips.measured_cpu() if rehearse else None)
    peak = PEAK_FLOPS.get(device.device_kind, chip.flops if chip else 0.0)
    record(
        "measured",
        attention=settings.compute.attention,
        rows=training.rows,
        ms=1e3 * second,
        fastest_ms=1e3 * min(times),
        slowest_ms=1e3 * max(times),
        tokens_per_second=total["tokens"] / second,
        residues_per_second=(total["tokens"] - 2 * total["sequences"]) / second,
        sequences=total["sequences"],
        mfu=work / second / peak if peak else None,
        peak_gib=(device.memory_stats() or {}).get("peak_bytes_in_use", 0) / 2**30,
        compile_seconds=training.compile_seconds,
        loss=total["loss"] / total["num_targets"],
    )
    program = None
    with attempted(record, "roofline of this program"):
        program = Program(training.compiled.as_text())
        if chip:
            roofline_of(record, training, program, chip)
    if variant != "step":
        return
    with attempted(record, "profile"), tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            training.steps(STEPS)
        kernels, longest = profile(folder, program)
        record("profile", busy_ms=sum(k["ms"] for k in kernels), kernels=kernels, longest=longest)


def roofline_of(record, training: Training, program, chip: chips.Chip) -> None:
    """Records what `plan` would say of a program that was compiled for the live chip."""
    from esm1nv_jax.planning import roofline

    settings = training.settings
    chosen = settings.compute.chip
    load = roofline.stream_load(training.run, training.source, training.rows, 1, chosen)
    shape = roofline.Step(settings.model, settings.compute.attention, settings.microbatches, 1, 1)
    slow, middle, fast = (
        roofline.estimate(program, chip, efficiency, load, shape)
        for efficiency in (chip.low, chip.low.mean(chip.high), chip.high)
    )
    memory = roofline.memory_of(training.compiled, program, training.state)
    record(
        "roofline of this program",
        chip=chip.name,
        ms=1e3 * middle.seconds,
        fastest_ms=1e3 * fast.seconds,
        slowest_ms=1e3 * slow.seconds,
        peak_gib=sum(memory.values()) / 2**30,
        kernels=in_milliseconds(middle.by_class()),
    )


def in_milliseconds(kernels: list[dict]) -> list[dict]:
    """Classes of kernels as `plan` gives them, without what it does not time."""
    return [
        {"phase": k["phase"], "kind": k["kind"], "kernels": k["kernels"], "ms": 1e3 * k["seconds"]}
        for k in kernels
    ]


for _name in VARIANTS:
    if _name != "step":
        globals()[_name] = functools.partial(step, variant=_name)


def profile(folder: str, program) -> tuple[list[dict], list[dict]]:
    """Milliseconds of a step by phase and kind of kernel in a trace of STEPS, and the 25 longest.

    An event belongs to the instruction of the program that it names, or is named after; libraries'
    kernels inside of CUDA graphs name none, and are told by their own names.
    """
    import jax

    (path,) = Path(folder).rglob("*.xplane.pb")
    known = {plain(kernel.name): kernel for kernel in (program.kernels if program else ())}
    classes: dict[tuple[str, str], list[float]] = collections.defaultdict(lambda: [0, 0.0])
    named: collections.Counter = collections.Counter()
    planes = list(jax.profiler.ProfileData.from_file(str(path)).planes)
    gpus = [plane for plane in planes if plane.name.startswith("/device:GPU")]
    for plane in gpus or planes:
        for line in plane.lines:
            if gpus and not line.name.startswith("Stream"):
                continue  # the same time again, by module or by step
            for event in line.events:
                op = dict(event.stats).get("hlo_op")
                if not gpus and op is None:
                    continue
                kernel = known.get(plain(str(op))) or known.get(plain(event.name))
                key = (kernel.phase, kernel.kind) if kernel else by_name(event.name)
                classes[key][0] += 1
                classes[key][1] += event.duration_ns * 1e-9
                named[f"{key[1]}: {event.name}"] += event.duration_ns * 1e-9
    rows = [
        {"phase": phase, "kind": kind, "kernels": count / STEPS, "ms": 1e3 * seconds / STEPS}
        for (phase, kind), (count, seconds) in classes.items()
    ]
    longest = [{"name": n[:80], "ms": 1e3 * s / STEPS} for n, s in named.most_common(25)]
    return sorted(rows, key=lambda row: -row["ms"]), longest


def plain(name: str) -> str:
    return re.sub(r"\W", "_", name)


def by_name(name: str) -> tuple[str, str]:
    """Phase and kind of a kernel that no instruction of the program names."""
    match = re.search("(?:flash|residual_norm|gelu)_(forward|backward)", name)
    phase = match[1] if match else "unknown"
    for pattern, kind in (
        ("flash_|fmha|sdpa", "attention"),
        ("gemm|nvjet|cutlass|xmma|cublas|dot", "gemm"),
        ("nccl", "collective"),
        ("memcpy|memset|copy|transpose", "copy"),
        ("reduce|residual_norm", "reduction"),
        ("fusion|loop|wrapped|gelu", "elementwise"),
    ):
        if re.search(pattern, name, re.IGNORECASE):
            return phase, kind
    return phase, "other"


def plan(record, rehearse: bool) -> None:
    """What `esm1nv plan` says of this chip, compiled in its absence."""
    import jax

    kind = jax.devices()[0].device_kind
    known = chips.by_device_kind(kind)
    if known is None and not rehearse:
        raise RuntimeError(f"no chip of planning/chips.py is a {kind}")
    name = known.name if known else chips.THIS_CPU
    command = [sys.executable, "-m", "esm1nv_jax", "plan", "--json", f"--chip={name}"]
    if rehearse:
        command += [f"--config={CARD}:{TINY},batch=2", "--config.compute.dtype=float32"]
    else:
        command += [f"--config={CARD}", "--config.data.path=sample"]
    ended = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    planned = json.loads(ended.stdout)
    record(
        "plan",
        chip=name,
        rows=planned["rows"],
        ms=1e3 * planned["seconds"],
        fastest_ms=1e3 * planned["fastest"],
        slowest_ms=1e3 * planned["slowest"],
        mfu=planned["mfu"],
        residues_per_second=planned["residues_per_second"],
        peak_gib=planned["peak"] / 2**30,
        compile_seconds=planned["compile_seconds"],
        kernels=in_milliseconds(planned["kernels"]),
    )
