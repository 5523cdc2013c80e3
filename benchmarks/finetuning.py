"""Fine-tuning speed on this machine: ours, and `transformers`' Trainer (with `peft` for LoRA).

    python benchmarks/finetuning.py --model DIR --csv ss3.csv.gz --task residue_classification
        [--methods full,lora=8] [--batch 32] [--dtype float32] [--rounds 3] [--steps 5] [--json OUT]

Both start from the same weights, written by `esm1nv convert`, and see the same training split, cut
at what the model reads, with the same number of proteins a step, AdamW, clipping and dropout. Ours:
packed rows, the input stream and all. The rival: `Trainer` with its defaults on a CPU, batches
padded to their longest protein. Proteins a second are counted in whole steps. Each program has a
process of its own; the first round warms up; rounds alternate, so that a busy machine is busy for
both: trust the ratio. Needs the extra `bench`.
"""

from __future__ import annotations

import json
import statistics
import sys
import tempfile
import time
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
from train import Ours, alternated

from esm1nv_jax.common import command, config_file
from esm1nv_jax.common.command import Parser

CONFIG = Path(__file__).parents[1] / "configs" / "finetune.py"
OURS, RIVAL = "ours", "transformers"


def config_of(options: dict[str, Any]):
    names = ("model", "csv", "task", "method", "batch")
    config = config_file.load(CONFIG, ",".join(f"{name}={options[name]}" for name in names))
    with config.unlocked():
        config.compute.dtype = options["dtype"]
        config.finetune.pooling = "cls"  # which `transformers` has, too
    return config


def serve(pipe: Connection, program: str, options: dict[str, Any], exported: str) -> None:
    """In a process of its own: makes as many steps as it is asked for, until it hears 0."""
    if program == RIVAL:
        serve_trainer(pipe, options, exported)
        return
    command.keep_freed_memory()  # as esm1nv_jax.main does
    ours = Ours(config_of(options), proteins_of)
    while steps := pipe.recv():
        began = time.perf_counter()
        proteins = ours.run(steps)
        pipe.send(proteins / (time.perf_counter() - began))
    ours.batches.close()


def proteins_of(batch) -> int:
    return int(np.count_nonzero((batch["segment_ids"] > 0) & (batch["positions"] == 0)))


def serve_trainer(pipe: Connection, options: dict[str, Any], exported: str) -> None:
    import torch
    import transformers
    from rivals import padded

    from esm1nv_jax.data import labeled_data, tokenizer
    from esm1nv_jax.training.run_config import RunConfig

    settings = RunConfig.from_config_dict(config_of(options))
    task = labeled_data.read(options["csv"], options["task"])
    by_residue, regression = options["task"].startswith("residue"), not task.classes
    ends = np.cumsum(task.train.sizes)
    examples = []
    for i, sequence in enumerate(task.train.sequences):
        labels = task.train.labels[ends[i] - task.train.sizes[i] : ends[i]]
        if by_residue:
            used = task.train.used[ends[i] - task.train.sizes[i] : ends[i]]
            labels = np.where(used, labels, -100)
        cut = settings.data.max_residues
        examples.append((tokenizer.residue_ids(sequence)[:cut], labels[:cut]))

    def collate(batch):
        ids, attention_mask = padded([ids for ids, _ in batch])
        labels = torch.tensor(np.array([y[0] for _, y in batch]))
        if by_residue:
            labels = torch.full(ids.shape, -100)
            for row, (_, y) in enumerate(batch):
                labels[row, 1 : len(y) + 1] = torch.from_numpy(y)
        labels = labels.float() if regression else labels
        return {"input_ids": ids, "attention_mask": attention_mask, "labels": labels}

    kind = "Token" if by_residue else "Sequence"
    auto = getattr(transformers, f"AutoModelFor{kind}Classification")
    model = auto.from_pretrained(exported, num_labels=len(task.classes) or 1)
    model = restricted(model, options["method"], kind)

    class Served(transformers.TrainerCallback):
        """Waits for orders between steps."""

        def __init__(self):
            self.receive()

        def receive(self):
            self.steps = self.left = pipe.recv()
            self.begin = time.perf_counter()

        def on_step_end(self, args, state, control, **_):
            self.left -= 1
            if not self.left:
                proteins = self.steps * args.per_device_train_batch_size
                pipe.send(proteins / (time.perf_counter() - self.begin))
                self.receive()
                control.should_training_stop = self.steps == 0

    with tempfile.TemporaryDirectory() as scratch:
        arguments = transformers.TrainingArguments(
            output_dir=scratch,
            use_cpu=True,
            per_device_train_batch_size=options["batch"],
            dataloader_drop_last=True,
            max_steps=1_000_000,
            learning_rate=settings.optimizer.peak_lr,
            weight_decay=settings.optimizer.weight_decay,
            bf16=options["dtype"] == "bfloat16",
            save_strategy="no",
            logging_strategy="no",
            report_to="none",
            disable_tqdm=True,
            remove_unused_columns=False,
        )
        transformers.Trainer(
            model, arguments, collate, train_dataset=examples, callbacks=[Served()]
        ).train()


def restricted(model, method: str, kind: str):
    """The model of `transformers` with only the parameters of a method to be trained."""
    name, _, number = method.partition("=")
    if name == "lora":
        import peft

        projections = ["query", "key", "value", "attention.output.dense"]
        task = "TOKEN_CLS" if kind == "Token" else "SEQ_CLS"
        config = peft.LoraConfig(
            task_type=task, r=int(number), lora_alpha=16, target_modules=projections
        )
        return peft.get_peft_model(model, config)
    if name != "full":
        model.esm.requires_grad_(False)
    if name == "last":
        encoder = model.esm.encoder
        for module in (*encoder.layer[-int(number) :], encoder.emb_layer_norm_after):
            module.requires_grad_(True)
    return model


def main(argv: list[str]) -> None:
    parser = Parser("(benchmark)", "Fine-tuning speed.", "see the file")
    add = parser.add_argument
    add("--model", required=True, help="the checkpoint to fine-tune, of an ESM of transformers")
    add("--csv", required=True)
    add("--task", required=True, help="residue_classification, protein_classification, ...")
    add("--methods", default="full,lora=8")
    add("--batch", type=int, default=32, help="proteins a step")
    add("--dtype", choices=("float32", "bfloat16"), default="float32", help="of matrix products")
    add("--rounds", type=int, default=3)
    add("--steps", type=int, default=5, help="of each program in a round")
    add("--json", help="write the figures here, too")
    args = parser.parse_args(argv)
    results = {}
    with tempfile.TemporaryDirectory() as scratch:
        from esm1nv_jax.interchange import convert

        exported = f"{scratch}/exported"
        convert.to_hf(args.model, exported, approximate=True)
        for method in args.methods.split(","):
            options = vars(args) | {"method": method}
            programs = {name: (name, options, exported) for name in (OURS, RIVAL)}
            rates = alternated(serve, programs, args.rounds, args.steps)
            results[method] = rates
            a, b = (statistics.median(rates[name]) for name in (OURS, RIVAL))
            print(
                f"{method:<8} ours {a:7.2f} proteins/s ({min(rates[OURS]):.2f} to "
                f"{max(rates[OURS]):.2f}), transformers {b:7.2f} ({min(rates[RIVAL]):.2f} to "
                f"{max(rates[RIVAL]):.2f}), ours to it {a / b:.2f}"
            )
    if args.json:
        Path(args.json).write_text(json.dumps(results, indent=1), encoding="utf-8")


if __name__ == "__main__":
    command.keep_freed_memory()  # as esm1nv_jax.main does
    sys.exit(command.run(main, sys.argv[1:]))
