"""Embedding speed on this machine: ours and, of the same model, `transformers` and other engines.

    python benchmarks/embed.py --fasta proteins.fasta.gz [--residues 60000] [--rivals] [--json FILE]

All embed the same proteins (cut at 510 residues) and give the mean over residues. The model is the
ESM-1nv size with GELU by erf, which `transformers` has, and random weights, or that of
`--checkpoint`. The rivals get what their users do to be fast: sorted by length, batches of 4,096
tokens padded to their longest, SDPA and inference mode or the engine's own fusions. Rounds
alternate, so that a busy machine is busy for all; compare within a run, and trust the ratio. bf16
is measured where the CPU multiplies it, `--engine openvino` and `onnxruntime` where their extras
are installed. `--rivals` adds ONNX Runtime and OpenVINO in the precisions that they have
(`onnx_rivals.py`, the extra `bench-engines`). Needs the extra `bench`.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from esm1nv_jax.common import command
from esm1nv_jax.common.command import Parser
from esm1nv_jax.common.errors import UserError

CUT = 510
BATCH_TOKENS = 4_096
BASE = "transformers fp32"


def read(path: str, residues: int) -> list[bytes]:
    """Proteins from the start of a FASTA file, about so many residues in all."""
    from esm1nv_jax.data.fasta import scan

    taken, total = [], 0
    for _, sequence in scan(path, skip=True):
        taken.append(sequence[:CUT])
        total += len(taken[-1])
        if total >= residues:
            return taken
    return taken


def weights_of(checkpoint: str | None):
    """The model of a checkpoint, or one with random weights, that `transformers` has exactly."""
    import jax

    from esm1nv_jax.checkpoints.model_folder import Weights
    from esm1nv_jax.interchange import hf_config
    from esm1nv_jax.interchange.loader import load_weights
    from esm1nv_jax.model import encoder

    if checkpoint:
        weights = load_weights(checkpoint)
        return dataclasses.replace(weights, model=hf_config.approximate_config(weights.model))
    config = hf_config.approximate_config(encoder.EncoderConfig())
    return Weights(jax.device_get(encoder.init(config, 0)), config, {})


def ours(
    sequences: list[bytes],
    precision: str,
    deterministic: bool = False,
    config=None,
    weights=None,
    engine: str = "xla",
):
    """A function that embeds everything once and returns the means [n, width]."""
    import jax

    from esm1nv_jax.data import tokenizer
    from esm1nv_jax.inference.cpu_engines import select_engine
    from esm1nv_jax.inference.engine import OutputSpec, embed_sequences
    from esm1nv_jax.inference.model import Model
    from esm1nv_jax.model import encoder

    config = weights.model if weights else config or encoder.EncoderConfig()
    params = weights.encoder_params if weights else encoder.init(config, 0)
    engine = select_engine(engine, precision, config)
    model = Model(config, jax.device_put(params), {}, precision, engine=engine)
    ids = [tokenizer.residue_ids(sequence) for sequence in sequences]
    return lambda: embed_sequences(
        model.on_devices, ids, OutputSpec(("mean",)), model.longest, deterministic
    )["mean_-1"]


def sorted_batches(sequences: list[bytes], batch_tokens: int) -> list[list[int]]:
    """Indices of the sequences of each batch, by falling length, padded to so many tokens."""
    order = sorted(range(len(sequences)), key=lambda i: -len(sequences[i]))
    batches: list[list[int]] = [[]]
    for i in order:
        longest = len(sequences[(batches[-1] or [i])[0]]) + 2
        if batches[-1] and longest * (len(batches[-1]) + 1) > batch_tokens:
            batches.append([])
        batches[-1].append(i)
    return batches


def rival(
    sequences: list[bytes],
    bf16: bool,
    device: str = "cpu",
    compiled: bool = False,
    batch_tokens: int = BATCH_TOKENS,
    config=None,
    folder: str | None = None,
):
    """The same with `transformers`, of the model in a folder of its own kind."""
    import rivals
    import torch
    from transformers import EsmModel

    from esm1nv_jax.data import tokenizer
    from esm1nv_jax.model.encoder_config import EncoderConfig

    options = {"add_pooling_layer": False}
    if folder:
        model = EsmModel.from_pretrained(folder, attn_implementation="sdpa", **options)
    else:
        torch.manual_seed(0)  # the same weights in fp32 and bf16
        model = EsmModel(rivals.config_of(config or EncoderConfig()), **options)
    model.eval().to(device)
    forward = torch.compile(model, dynamic=True) if compiled else model
    batches = sorted_batches(sequences, batch_tokens)

    def run():
        means = np.zeros((len(sequences), model.config.hidden_size), np.float32)
        with torch.inference_mode(), torch.autocast(device, torch.bfloat16, enabled=bf16):
            for batch in batches:
                ids = [tokenizer.residue_ids(sequences[i]) for i in batch]
                tokens, mask = (x.to(device) for x in rivals.padded(ids))
                hidden = forward(input_ids=tokens, attention_mask=mask).last_hidden_state.float()
                if device != "cpu":  # one transfer a batch, of means
                    inside = mask.clone()
                    inside[:, 0] = 0
                    inside[torch.arange(len(batch)), mask.sum(1) - 1] = 0
                    sums = torch.einsum("btd,bt->bd", hidden, inside.float())
                    means[batch] = (sums / inside.sum(1, keepdim=True)).cpu().numpy()
                    continue
                for row, i in enumerate(batch):
                    means[i] = hidden[row, 1 : len(sequences[i]) + 1].mean(0).numpy()
        return means

    return run


def engine_programs(sequences: list[bytes], weights, hf_folder: str, scratch: Path) -> dict:
    """ONNX Runtime and OpenVINO, by name, on the same export."""
    import onnx_rivals
    import rivals

    from esm1nv_jax.data import tokenizer
    from esm1nv_jax.model.kernels.matmul import multiplies_bf16

    path = scratch / "model.onnx"
    onnx_rivals.export(hf_folder, path)

    def embed_all(hidden_of) -> np.ndarray:
        means = np.zeros((len(sequences), weights.model.width), np.float32)
        for batch in sorted_batches(sequences, BATCH_TOKENS):
            ids = [tokenizer.residue_ids(sequences[i]) for i in batch]
            hidden = hidden_of(*(x.numpy() for x in rivals.padded(ids)))
            for row, i in enumerate(batch):
                means[i] = hidden[row, 1 : len(sequences[i]) + 1].mean(0)
        return means

    functions = {}
    for kind in ("fp32", "bf16", "int8") if multiplies_bf16("cpu") else ("fp32", "int8"):
        if kind != "bf16":  # which ONNX Runtime does not have on CPUs
            functions[f"ONNX Runtime {kind}"] = onnx_rivals.onnx_runtime(path, kind == "int8")
        functions[f"OpenVINO {kind}"] = onnx_rivals.openvino(path, kind)
    return {name: functools.partial(embed_all, f) for name, f in functions.items()}


def accuracy(found: np.ndarray, exact: np.ndarray) -> dict[str, float]:
    lengths = np.linalg.norm(found, axis=1) * np.linalg.norm(exact, axis=1)
    cosine = np.sum(found * exact, axis=1) / lengths
    return {
        "lowest cosine": float(cosine.min()),
        "largest difference": float(np.abs(found - exact).max()),
    }


def main(argv: list[str]) -> None:
    parser = Parser("(benchmark)", "Embedding speed.", "python benchmarks/embed.py --fasta F")
    parser.add_argument("--fasta", required=True)
    parser.add_argument("--residues", type=int, default=60_000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--checkpoint", help="a model that `transformers` has (default: random)")
    parser.add_argument("--rivals", action="store_true", help="ONNX Runtime and OpenVINO, too")
    parser.add_argument("--json", help="write the figures here, too")
    args = parser.parse_args(argv)
    sequences = read(args.fasta, args.residues)
    tokens = sum(map(len, sequences)) + 2 * len(sequences)
    with tempfile.TemporaryDirectory() as scratch:
        programs = make_programs(args, sequences, Path(scratch))
        means = {name: first_pass(name, run) for name, run in programs.items()}
        seconds = measure(programs, args.rounds)
    rows = {}
    print(f"\n{len(sequences)} proteins, {tokens:,} tokens, median of {args.rounds} rounds;")
    print(f"ratios are to {BASE}, accuracy is to ours fp32")
    print(f"{'':<24} tokens/s  ratio  by CPU time  lowest cosine  largest difference")
    wall, cpu = (statistics.median(s) for s in zip(*seconds[BASE], strict=True))
    for name in programs:
        wall_s, cpu_s = (statistics.median(s) for s in zip(*seconds[name], strict=True))
        rows[name] = {
            "tokens/s": tokens / wall_s,
            "ratio": wall / wall_s,
            "ratio by CPU time": cpu / cpu_s,
            **accuracy(means[name], means["ours fp32"]),
        }
        rate, ratio, by_cpu, cosine, difference = rows[name].values()
        print(
            f"{name:<24} {rate:8,.0f} {ratio:6.2f} {by_cpu:12.2f} {cosine:14.6f} {difference:19.1e}"
        )
    if args.json:
        figures = {"proteins": len(sequences), "tokens": tokens, "programs": rows}
        Path(args.json).write_text(json.dumps(figures), encoding="utf-8")


def make_programs(args, sequences: list[bytes], scratch: Path) -> dict[str, Callable]:
    """Functions that return the means of all sequences, by name."""
    from esm1nv_jax.inference.cpu_engines import has_instructions
    from esm1nv_jax.interchange import huggingface
    from esm1nv_jax.model.kernels.matmul import multiplies_bf16

    weights = weights_of(args.checkpoint)
    hf_folder = str(scratch / "hf")
    huggingface.write(hf_folder, weights)
    programs = {
        "ours fp32": ours(sequences, "fp32", weights=weights),
        "ours fp32 deterministic": ours(sequences, "fp32", True, weights=weights),
    }
    if multiplies_bf16("cpu"):
        programs["ours bf16"] = ours(sequences, "bf16", weights=weights)
    if importlib.util.find_spec("onnxruntime"):
        run = ours(sequences, "int8", weights=weights, engine="onnxruntime")
        programs["ours int8 onnxruntime"] = run
    if importlib.util.find_spec("openvino"):
        for precision in ("fp32", *filter(has_instructions, ("bf16", "int8"))):
            run = ours(sequences, precision, weights=weights, engine="openvino")
            programs[f"ours {precision} openvino"] = run
    try:
        programs[BASE] = rival(sequences, bf16=False, folder=hf_folder)
        if multiplies_bf16("cpu"):
            programs["transformers bf16"] = rival(sequences, bf16=True, folder=hf_folder)
        if args.rivals:
            programs |= engine_programs(sequences, weights, hf_folder, scratch)
    except ImportError as error:
        raise UserError(f"{error}; pip install -e '.[bench,bench-engines]'") from None
    return programs


def first_pass(name: str, run: Callable[[], np.ndarray]) -> np.ndarray:
    began = time.perf_counter()
    means = run()
    print(f"{name:<24} first pass, compilation included: {time.perf_counter() - began:.1f} s")
    return means


def measure(programs: dict[str, Callable], rounds: int) -> dict[str, list[tuple[float, float]]]:
    """(wall, CPU) seconds of each program in each round."""
    seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in programs}
    for number in range(rounds):
        for name, run in programs.items():
            began, cpu = time.perf_counter(), time.process_time()
            run()
            seconds[name].append((time.perf_counter() - began, time.process_time() - cpu))
        print(f"round {number + 1} of {rounds} is done", flush=True)
    return seconds


if __name__ == "__main__":
    import sys

    command.keep_freed_memory()  # as `esm1nv embed` does
    sys.exit(command.run(main, sys.argv[1:]))
