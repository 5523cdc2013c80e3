"""`esm1nv VERB`: a table of verbs, each imported only when it is called."""

from __future__ import annotations

import importlib
import sys

from esm1nv_jax import __version__
from esm1nv_jax.common import command
from esm1nv_jax.common.errors import UserError

# verb: (module with a `main(argv)`, what it does)
VERBS = {
    "prepare": ("esm1nv_jax.data.prepare", "make a data set of FASTA files"),
    "inspect": ("esm1nv_jax.data.inspect", "show a data set and a batch of it"),
    "config": ("esm1nv_jax.training.show_config", "show every field of a config, with its meaning"),
    "plan": ("esm1nv_jax.planning.plan", "memory and time of a step on chips you do not have"),
    "train": ("esm1nv_jax.main", "train a model from a config file"),
    "finetune": ("esm1nv_jax.training.finetune", "train a model on labels of a CSV table"),
    "compare": ("esm1nv_jax.training.compare", "set runs side by side: configs, curves, seeds"),
    "average": ("esm1nv_jax.inference.average", "the mean of checkpoints, as a model folder"),
    "evaluate": ("esm1nv_jax.inference.evaluate", "perplexity beside baselines, and a report"),
    "probe": ("esm1nv_jax.inference.probe", "what a frozen encoder knows of a downstream task"),
    "embed": ("esm1nv_jax.inference.embed", "embed the proteins of a FASTA file"),
    "predict": ("esm1nv_jax.inference.predict", "labels of proteins, by a fine-tuned model"),
    "score": ("esm1nv_jax.inference.score", "score mutants of a protein"),
    "contacts": ("esm1nv_jax.inference.contacts", "which residues of a protein touch each other"),
    "doctor": ("esm1nv_jax.checkpoints.step_folder", "verify every byte of a run's checkpoints"),
    "convert": ("esm1nv_jax.interchange.convert", "to and from Hugging Face transformers"),
}

# And train, which does the same by itself.
COMPUTING = ("finetune", "embed", "predict", "score", "evaluate", "probe", "contacts")


def help_text() -> str:
    width = max(map(len, VERBS))
    return "\n".join(
        [
            f"esm1nv {__version__}: pretrain, average, evaluate and serve a protein language model",
            "",
            "usage: esm1nv VERB [options]        esm1nv VERB --help shows an example",
            "",
            *(f"  {verb:<{width}}  {what}" for verb, (_, what) in VERBS.items()),
            "",
            "example:",
            "  esm1nv train --config=configs/quickstart.py",
        ]
    )


def dispatch(argv: list[str]) -> int | None:
    if not argv or argv[0] in ("-h", "--help", "help"):
        print(help_text())
        return 0
    if argv[0] == "--version":
        print(__version__)
        return 0
    verb, *rest = argv
    if verb not in VERBS:
        raise UserError(f"no verb {verb!r}; there are {', '.join(VERBS)} (esm1nv --help)")
    if verb in COMPUTING:
        command.set_up()
    elif verb != "plan":  # which compiles for absent GPUs
        command.hide_unusable_plugins()
    if verb in ("plan", "average", "convert"):
        command.check_machine()
    return importlib.import_module(VERBS[verb][0]).main(rest)


def main() -> None:
    sys.exit(command.run(dispatch, sys.argv[1:]))
