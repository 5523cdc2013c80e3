"""The first hour on a GPU: correctness, speed and memory on one chip, beside what `plan` predicts.

    python benchmarks/gpu.py --out results [--minutes 8] [--parts step,attention]
    python benchmarks/gpu.py --out results --rehearse     # the same on a CPU with tiny shapes

Needs one GPU and no network. Every part runs in a process of its own with a time limit of its own,
so that a failure ends nothing else; what was skipped is listed with the reason. Correctness and the
prediction run side by side, then what is timed runs alone. Results are written to `gpu.json`,
`gpu.md` and `gpu.log` in the folder of `--out` after each part.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import gpu_report  # noqa: E402, beside this file

from esm1nv_jax.common.command import Parser, run  # noqa: E402
from esm1nv_jax.common.errors import UserError  # noqa: E402
from esm1nv_jax.planning import chips  # noqa: E402

# Part: (module, longest seconds). The first group runs side by side, the second one by one.
CHECKS = {
    "plan": ("gpu_steps", 240),
    "reference": ("gpu_kernels", 180),
    "cpu": ("gpu_steps", 240),
    "deterministic": ("gpu_steps", 240),
}
TIMED = {
    "device": ("gpu_kernels", 60),
    "step": ("gpu_steps", 180),
    "attention": ("gpu_kernels", 150),
    "blocks": ("gpu_kernels", 150),
    "torch_train": ("gpu_rivals", 200),
    "embed": ("gpu_rivals", 150),
    "torch_embed": ("gpu_rivals", 120),
    "step_xla": ("gpu_steps", 120),
    "step_no_dropout": ("gpu_steps", 120),
    "step_padded": ("gpu_steps", 120),
    "step_cudnn": ("gpu_steps", 120),
}
PARTS = CHECKS | TIMED
PROBE = (
    "import json, jax; d = jax.devices()[0]; "
    "print(json.dumps({'platform': d.platform, 'kind': d.device_kind}))"
)


class Runner:
    """Starts parts, collects what they record, and keeps the files of `--out` up to date."""

    def __init__(self, options: argparse.Namespace, scratch: str):
        self.options, self.scratch = options, Path(scratch)
        self.out = Path(options.out)
        self.out.mkdir(parents=True, exist_ok=True)
        self.began = time.monotonic()
        self.results: dict = {"parts": {}}
        self.lock = threading.Lock()
        (self.out / "gpu.log").write_text("", encoding="utf-8")

    def environment(self, name: str = "") -> dict[str, str]:
        here, inherited = str(Path(__file__).parent), os.environ.get("PYTHONPATH")
        paths = [str(ROOT), here, *([inherited] if inherited else [])]
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths), "PYTHONUNBUFFERED": "1"}
        environment |= {"HF_HUB_OFFLINE": "1", "TF_CPP_MIN_LOG_LEVEL": "2"}
        # What is timed shares autotuning, which was done alone on the chip.
        if name in ("reference", "cpu"):  # only their results count; tuning in fp32 takes minutes
            flags = os.environ.get("XLA_FLAGS", "")
            environment["XLA_FLAGS"] = f"{flags} --xla_gpu_autotune_level=0".strip()
        timed = name in TIMED or self.options.rehearse
        environment["JAX_COMPILATION_CACHE_DIR"] = str(self.scratch / f"programs-{timed}")
        environment["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.1"
        environment.pop("JAX_PLATFORMS", None)
        if self.options.rehearse or name.startswith("torch"):
            environment["JAX_PLATFORMS"] = "cpu"
        if name in TIMED:
            environment["XLA_PYTHON_CLIENT_MEM_FRACTION"] = "0.90"  # as launch/xla_flags.sh
        else:
            environment["XLA_PYTHON_CLIENT_PREALLOCATE"] = "false"
        return environment

    def probe(self) -> dict:
        """The device that JAX finds, with the XLA flags of a run where this version takes them."""
        environment, given = self.environment(), os.environ.get("XLA_FLAGS", "")
        flags = " ".join(flag for flag in chips.launch_flags() if flag not in given.split())
        for chosen in dict.fromkeys((f"{flags} {given}".strip(), given)):
            ended = subprocess.run(
                [sys.executable, "-c", PROBE],
                capture_output=True,
                text=True,
                env=environment | {"XLA_FLAGS": chosen},
                timeout=180,
                check=False,
            )
            if ended.returncode == 0:
                os.environ["XLA_FLAGS"] = chosen
                found = json.loads(ended.stdout.strip().splitlines()[-1])
                return found | {"flags": chosen}
            self.say(f"JAX does not start with XLA_FLAGS={chosen!r}: {last_line(ended.stderr)}")
        raise UserError("JAX does not start on this machine; the line above says why")

    def say(self, text: str) -> None:
        line = f"[{time.monotonic() - self.began:4.0f} s] {text}"
        with self.lock, open(self.out / "gpu.log", "a", encoding="utf-8") as log:
            log.write(line + "\n")
            print(line, flush=True)

    def part(self, name: str) -> None:
        """Runs one part and stores its records and how it ended."""
        left = self.until - time.monotonic()
        limit = left if self.options.rehearse else min(PARTS[name][1], left)
        if left < (1 if self.options.rehearse else 20):
            self.store(name, [], f"skipped: --minutes {self.options.minutes:g} are over", 0.0)
            return
        self.say(f"{name}: begins, at most {limit:.0f} s")
        records = self.scratch / f"{name}.jsonl"
        command = [sys.executable, __file__, "--part", name, "--out", str(records)]
        command += ["--rehearse"] if self.options.rehearse else []
        began, tail = time.monotonic(), []
        process = subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            env=self.environment(name),
            cwd=ROOT,
            start_new_session=True,
        )
        timer = threading.Timer(limit, lambda: os.killpg(process.pid, signal.SIGKILL))
        timer.start()
        for line in process.stdout:
            tail.append(line.rstrip())
            if line.startswith("  "):  # progress; the rest is in the log
                self.say(f"{name}:{line.rstrip()[1:]}")
            else:
                with self.lock, open(self.out / "gpu.log", "a", encoding="utf-8") as log:
                    log.write(f"{name}| {line}")
        status = process.wait()
        timer.cancel()
        seconds = time.monotonic() - began
        ended = "done"
        if status:
            stopped = seconds >= limit - 1
            ended = f"stopped after {limit:.0f} s" if stopped else f"failed: {last_line(tail)}"
        lines = records.read_text(encoding="utf-8").splitlines() if records.is_file() else []
        self.store(name, [json.loads(line) for line in lines], ended, seconds)

    def store(self, name: str, records: list[dict], ended: str, seconds: float) -> None:
        self.say(f"{name}: {ended}")
        with self.lock:
            self.results["parts"][name] = {"status": ended, "seconds": seconds, "records": records}
            self.results["seconds"] = time.monotonic() - self.began
            text = json.dumps(self.results, indent=1)
            (self.out / "gpu.json").write_text(text, encoding="utf-8")
            page = gpu_report.markdown(self.results)
            (self.out / "gpu.md").write_text(page, encoding="utf-8")


def last_line(text) -> str:
    lines = text.splitlines() if isinstance(text, str) else text
    lines = [line.strip() for line in lines if line.strip()]
    return lines[-1][:300] if lines else "no message"


def run_part(options: argparse.Namespace) -> None:
    """In a process of its own: calls the part, whose records become lines of the file `--out`."""
    import importlib

    # One of the modules beside this file: imported here, for they import jax or torch.
    module = importlib.import_module(PARTS[options.part][0])

    def record(name: str, **values) -> None:
        with open(options.out, "a", encoding="utf-8") as file:
            file.write(json.dumps({"name": name} | values) + "\n")
        words = (f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in values.items())
        print(f"  {name}: {', '.join(words)}"[:300], flush=True)

    getattr(module, options.part)(record, options.rehearse)


def main(argv: list[str]) -> int:
    parser = Parser("(benchmark)", __doc__.splitlines()[0], "python benchmarks/gpu.py --out DIR")
    parser.add_argument("--out", required=True, metavar="DIR", help="folder of the results")
    parser.add_argument("--parts", default=",".join(PARTS), help="some of the default's")
    parser.add_argument(
        "--minutes", type=float, help="no part runs beyond these (8; 60 in a rehearsal)"
    )
    parser.add_argument("--rehearse", action="store_true", help="tiny shapes on the CPU")
    parser.add_argument("--part", choices=PARTS, help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    if options.part:
        run_part(options)
        return 0
    if options.minutes is None:
        options.minutes = 60.0 if options.rehearse else 8.0
    chosen = options.parts.split(",")
    if unknown := [name for name in chosen if name not in PARTS]:
        raise UserError(f"--parts={unknown[0]} is unknown; there are {', '.join(PARTS)}")
    with tempfile.TemporaryDirectory() as scratch:
        runner = Runner(options, scratch)
        runner.results["device"] = found = runner.probe()
        runner.until = time.monotonic() + 60 * options.minutes
        if found["platform"] != "gpu" and not options.rehearse:
            raise UserError(
                f"JAX found a {found['platform']}, no GPU; install the extra cuda13 or cuda12, or "
                "try the programs on a CPU by --rehearse"
            )
        runner.say(f"{found['kind']}, XLA_FLAGS={found['flags'] or 'none'}")
        together = PARTS if options.rehearse else CHECKS  # the times of a rehearsal mean nothing
        with concurrent.futures.ThreadPoolExecutor(2 if options.rehearse else 4) as pool:
            list(pool.map(runner.part, [name for name in together if name in chosen]))
        for name in PARTS:
            if name in chosen and name not in together:
                runner.part(name)
        print((runner.out / "gpu.md").read_text(encoding="utf-8"), flush=True)
        ended = {name: part["status"] for name, part in runner.results["parts"].items()}
        return int(any(status != "done" for status in ended.values()))


if __name__ == "__main__":
    sys.exit(run(main, sys.argv[1:]))
