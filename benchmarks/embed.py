"""Embedding speed on this machine: ours, and `transformers` on a model of the same shape.

    python benchmarks/embed.py --fasta proteins.fasta.gz [--residues 60000] [--json out.json]

Both embed the same proteins (cut at 510 residues) with random weights of the ESM-1nv size and give
the mean over residues. The rival gets what its users do to be fast: sorted by length, batches of
4,096 tokens padded to their longest, bf16 autocast, SDPA, inference mode. Rounds alternate, so that
a busy machine is busy for both; compare within a row, and trust the ratio. Needs the extra `bench`.
"""

from __future__ import annotations

import json
import statistics
import time

import numpy as np

from esm1nv_jax.common import command
from esm1nv_jax.common.command import Parser
from esm1nv_jax.common.errors import UserError

CUT = 510
BATCH_TOKENS = 4_096


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


def ours(sequences: list[bytes], precision: str, deterministic: bool = False, config=None):
    """A function that embeds everything once and returns the means [n, 768]."""
    import jax

    from esm1nv_jax.data import tokenizer
    from esm1nv_jax.inference.engine import OutputSpec, embed_sequences
    from esm1nv_jax.inference.model import Model
    from esm1nv_jax.model import encoder

    config = config or encoder.EncoderConfig()
    model = Model(config, jax.device_put(encoder.init(config, 0)), {}, precision)
    ids = [tokenizer.residue_ids(sequence) for sequence in sequences]
    return lambda: embed_sequences(
        model.on_devices, ids, OutputSpec(("mean",)), model.longest, deterministic
    )["mean_-1"]


def rival(
    sequences: list[bytes],
    bf16: bool,
    device: str = "cpu",
    compiled: bool = False,
    batch_tokens: int = BATCH_TOKENS,
    config=None,
):
    """The same with `transformers`."""
    import rivals
    import torch
    from transformers import EsmModel

    from esm1nv_jax.data import tokenizer
    from esm1nv_jax.model.encoder_config import EncoderConfig

    config = rivals.config_of(config or EncoderConfig())
    torch.manual_seed(0)  # the same weights in fp32 and bf16
    model = EsmModel(config, add_pooling_layer=False).eval().to(device)
    forward = torch.compile(model, dynamic=True) if compiled else model
    order = sorted(range(len(sequences)), key=lambda i: -len(sequences[i]))
    batches, batch = [], []
    for i in order:
        longest = len(sequences[(batch or [i])[0]]) + 2
        if batch and longest * (len(batch) + 1) > batch_tokens:
            batches.append(batch)
            batch = []
        batch.append(i)
    batches.append(batch)

    def run():
        means = np.zeros((len(sequences), config.hidden_size), np.float32)
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


def accuracy(found: np.ndarray, exact: np.ndarray) -> dict[str, float]:
    lengths = np.linalg.norm(found, axis=1) * np.linalg.norm(exact, axis=1)
    cosine = np.sum(found * exact, axis=1) / lengths
    return {
        "least cosine": float(cosine.min()),
        "largest difference": float(np.abs(found - exact).max()),
    }


def main(argv: list[str]) -> None:
    parser = Parser("(benchmark)", "Embedding speed.", "python benchmarks/embed.py --fasta F")
    parser.add_argument("--fasta", required=True)
    parser.add_argument("--residues", type=int, default=60_000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", help="write the figures here, too")
    args = parser.parse_args(argv)
    sequences = read(args.fasta, args.residues)
    tokens = sum(map(len, sequences)) + 2 * len(sequences)
    programs = {
        "ours fp32": ours(sequences, "fp32"),
        "ours bf16": ours(sequences, "bf16"),
        "ours fp32 deterministic": ours(sequences, "fp32", deterministic=True),
    }
    try:
        programs |= {
            "transformers fp32": rival(sequences, bf16=False),
            "transformers bf16": rival(sequences, bf16=True),
        }
    except ImportError as error:
        raise UserError(f"{error}; pip install torch transformers") from None
    means, seconds = {}, {name: [] for name in programs}
    for name, run in programs.items():
        began = time.perf_counter()
        means[name] = run()
        print(f"{name:<26} first pass, compilation included: {time.perf_counter() - began:.1f} s")
    for _ in range(args.rounds):
        for name, run in programs.items():
            began = time.perf_counter()
            run()
            seconds[name].append(time.perf_counter() - began)
    exact = {"ours": means["ours fp32"], "transformers": means["transformers fp32"]}
    base = statistics.median(seconds["transformers bf16"])
    rows = {}
    print(f"\n{len(sequences)} proteins, {tokens:,} tokens, median of {args.rounds} rounds")
    print(f"{'':<26} tokens/s  to transformers bf16  least cosine  largest difference to its fp32")
    for name in programs:
        median = statistics.median(seconds[name])
        near = accuracy(means[name], exact[name.split()[0]])
        rows[name] = {"tokens/s": tokens / median, "ratio": base / median, **near}
        print(
            f"{name:<26} {tokens / median:8,.0f} {base / median:21.2f} "
            f"{near['least cosine']:13.6f} {near['largest difference']:15.2e}"
        )
    if args.json:
        with open(args.json, "w", encoding="utf-8") as file:
            json.dump({"proteins": len(sequences), "tokens": tokens, "programs": rows}, file)


if __name__ == "__main__":
    import sys

    command.keep_freed_memory()  # as `esm1nv embed` does
    sys.exit(command.run(main, sys.argv[1:]))
