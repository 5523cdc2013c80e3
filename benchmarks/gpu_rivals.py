"""Parts of `gpu.py` that compare with `transformers` at the same shapes, and embedding."""

from __future__ import annotations

import itertools
import statistics
import time

import jax
import numpy as np
from gpu_kernels import attempted
from gpu_steps import card

RESIDUES = 1024  # the card's cut
STEPS, ROUNDS = 5, 3


def proteins(number: int) -> list[bytes]:
    """The first proteins of the bundled sample, cut as the card cuts them."""
    from esm1nv_jax.data.source import open_split

    sequences = open_split("sample", "train").sequences(np.arange(number))
    return [sequence[:RESIDUES] for sequence in sequences]


def torch_train(record, rehearse: bool) -> None:
    """`EsmForMaskedLM` in bf16 with fused AdamW, dropout and masking as in the recipe.

    Padded batches as its users make them, at random and of like length; and packed rows of 1,152
    tokens, whose sequences a mask of T x T keeps apart, for it has no other way without
    FlashAttention's own package.
    """
    if not present(record):
        return
    import rivals
    import torch

    from esm1nv_jax.data import tokenizer
    from esm1nv_jax.training.metrics import PEAK_FLOPS, objective_flops

    run = card(rehearse, "hf")
    objective = run.step_config(jax.devices("cpu")[0]).objective
    device = "cpu" if rehearse else "cuda"
    size, rows = (4, 2) if rehearse else (64, 56)
    cut = 62 if rehearse else RESIDUES
    ids = [tokenizer.residue_ids(s[:cut]) for s in proteins(200 if rehearse else 4000)]
    peak = 0.0 if rehearse else PEAK_FLOPS.get(torch.cuda.get_device_name(), 0.0)
    padded = {
        "random batches": rivals.random_batches(ids, size, seed=0),
        "batches of like length": rivals.grouped_batches(ids, size, seed=0),
    }
    variants = [(name, False) for name in padded] + [("packed rows", False)]
    if rehearse:
        variants = variants[1:]
    else:
        variants += [("random batches", True), ("packed rows", True)]
    for name, compiled in variants:
        label = f"{name}{', torch.compile' if compiled else ''}"
        with attempted(record, label):
            trainer = rivals.Trainer(
                run.model, run.optimizer, not rehearse, device=device, compiled=compiled
            )
            if name in padded:
                longest = None if "length" in name else cut + 2
                batches = [
                    dict(zip(("tokens", "attention_mask"), rivals.padded(b, longest), strict=True))
                    for b in itertools.islice(padded[name], 4)
                ]
            else:
                batches = [packed_rows(run, rows)]
            batches = [
                {k: torch.as_tensor(v).to(device) for k, v in batch.items()} for batch in batches
            ]
            began = time.perf_counter()
            for batch in batches:  # compiles, and meets every shape
                trainer.step_on(batch)
            synchronize(device)
            warm_up = time.perf_counter() - began
            if not rehearse:
                torch.cuda.reset_peak_memory_stats()
            times, tokens, squares, targets = [], 0, 0.0, 0
            for _ in range(ROUNDS):
                began = time.perf_counter()
                for batch in itertools.islice(itertools.cycle(batches), STEPS):
                    trainer.step_on(batch)
                synchronize(device)
                times.append((time.perf_counter() - began) / STEPS)
            for batch in itertools.islice(itertools.cycle(batches), STEPS):
                lengths = segment_lengths(batch)
                tokens, squares = tokens + lengths.sum(), squares + (lengths**2.0).sum()
                targets += 0.15 * (lengths - 2).sum()
            second = statistics.median(times)
            # What they cannot do without, as for ours: see `training_flops`.
            counted = tokens / STEPS, squares / STEPS, targets / STEPS
            work = objective_flops(objective, run.model, *counted)
            record(
                label,
                ms=1e3 * second,
                tokens=int(tokens / STEPS),
                tokens_per_second=tokens / STEPS / second,
                mfu=work / second / peak if peak else None,
                peak_gib=0.0 if rehearse else torch.cuda.max_memory_allocated() / 2**30,
                warm_up_seconds=warm_up,
            )
            del trainer, batches
            if not rehearse:
                torch.cuda.empty_cache()


def present(record) -> bool:
    """Whether `transformers` and torch can be imported; records why not."""
    try:
        import torch  # noqa: F401
        import transformers  # noqa: F401
    except ImportError as error:
        record("skipped", reason=f"{error}; the extra bench brings it")
        return False
    return True


def synchronize(device: str) -> None:
    import torch

    if device == "cuda":
        torch.cuda.synchronize()


def packed_rows(run, rows: int) -> dict[str, np.ndarray]:
    """A batch of our input stream: tokens, positions, and which token may attend to which."""
    from esm1nv_jax.data.packing import stream_config
    from esm1nv_jax.data.pipeline import train_dataset
    from esm1nv_jax.data.source import open_split
    from esm1nv_jax.data.tokenizer import PAD

    batch = next(iter(train_dataset(open_split("sample", "train"), stream_config(run, rows))))
    ids = batch["segment_ids"]
    # A padding token attends to padding, so that no softmax is over nothing.
    same = ids[:, None, :, None] == ids[:, None, None, :]
    positions = np.where(ids > 0, batch["positions"] + PAD + 1, PAD).astype(np.int64)
    return {
        "tokens": batch["tokens"].astype(np.int64),
        "attention_mask": same,
        "position_ids": positions,
        "segment_ids": ids,
    }


def segment_lengths(batch) -> np.ndarray:
    """Tokens of each sequence of a batch."""
    if "segment_ids" not in batch:
        return batch["attention_mask"].sum(1).cpu().numpy()
    ids = batch["segment_ids"].cpu().numpy()
    owner = (np.arange(len(ids))[:, None] * 10_000 + ids)[ids > 0]
    return np.unique(owner, return_counts=True)[1]


def embed(record, rehearse: bool) -> None:
    """Our embedding: means of the last layer in bf16, from residues to NumPy, as a command does."""
    import embed as benchmark

    sequences = [s[:62] for s in proteins(16)] if rehearse else proteins(9000)
    run = benchmark.ours(sequences, "bf16", config=card(rehearse).model)
    measure(record, "ours, bf16", run, sequences)


def torch_embed(record, rehearse: bool) -> None:
    """`EsmModel` on the same proteins: sorted by length, padded, SDPA, bf16."""
    if not present(record):
        return
    import embed as benchmark

    sequences = [s[:62] for s in proteins(16)] if rehearse else proteins(9000)
    device, tokens = ("cpu", 4096) if rehearse else ("cuda", 65_536)
    for compiled in (False,) if rehearse else (False, True):
        label = f"transformers, bf16{', torch.compile' if compiled else ''}"
        with attempted(record, label):
            model = card(rehearse).model
            run = benchmark.rival(sequences, not rehearse, device, compiled, tokens, model)
            measure(record, label, run, sequences)


def measure(record, name: str, run, sequences: list[bytes]) -> None:
    """Tokens a second of the second to fourth pass; the first compiles."""
    tokens = sum(map(len, sequences)) + 2 * len(sequences)
    times = []
    for _ in range(ROUNDS + 1):
        began = time.perf_counter()
        run()
        times.append(time.perf_counter() - began)
    second = statistics.median(times[1:])
    record(
        name,
        proteins=len(sequences),
        tokens=tokens,
        tokens_per_second=tokens / second,
        first_pass_seconds=times[0],
    )
