"""Fine-tunes a model on the labels of a CSV table (docs/finetuning.md).

    python -m esm1nv_jax.main --workdir=runs/ss3 \\
        --config=configs/finetune.py:model=models/first,csv=ss3.csv,task=residue_classification

Hardware, time and metric depend on model and table; not measured here.

Arguments: model= (a run, a step, a model folder or a folder of transformers), csv=, task=
(residue_classification, residue_regression, protein_classification, protein_multilabel or
protein_regression), method= (full, last=BLOCKS, lora=RANK or head), epochs=, batch= (proteins a
step and device, rounded to whole rows), lr=, weight_decay=, seed=; of a table without a column
`split` valid_fraction=, test_fraction= and split_seed=, on which the steps of an epoch depend; and
`scratch`: the architecture of the model with random weights, for comparison.

The learning rate rises over a tenth of the steps and falls to zero by a cosine. Its peak depends on
the method: 1e-4 where all or the last blocks are trained, 5e-4 for LoRA, 1e-3 for the head alone,
of a model 768 wide; narrower ones take more, in proportion.
Rows hold the longest protein, or as much as the model reads; longer proteins are cropped.
"""

import dataclasses

from ml_collections import config_dict

from esm1nv_jax.common.config_file import arguments, parent
from esm1nv_jax.common.errors import UserError
from esm1nv_jax.data import labeled_data
from esm1nv_jax.interchange.loader import load_weights

PEAK_LR = {"lora": 5e-4, "head": 1e-3}  # else 1e-4, at this width:
WIDTH = 768
SHORTEST_ROW = 256  # tokens; several short proteins share one, up to those of a batch


def get_config(arg: str = "") -> config_dict.ConfigDict:
    args = arguments(
        arg,
        ("scratch",),
        model="",
        csv="",
        task="",
        method="full",
        epochs=20,
        batch=32,
        lr=0.0,
        weight_decay=0.01,
        seed=0,
        valid_fraction=0.1,
        test_fraction=0.1,
        split_seed=0,
    )
    for name in ("model", "csv", "task"):
        if not args[name]:
            raise UserError(
                "name model, table and task: "
                "--config=configs/finetune.py:model=DIR,csv=FILE,task=residue_classification"
            )
    for name in ("epochs", "batch"):
        if args[name] < 1:
            raise UserError(f"config argument {name}={args[name]} must be at least 1")
    fractions = labeled_data.SplitFractions(
        args["valid_fraction"], args["test_fraction"], args["split_seed"]
    )
    table = labeled_data.read(args["csv"], args["task"], fractions=fractions)
    base = load_weights(args["model"])
    model = base.model
    longest = max(map(len, table.train.sequences + table.valid.sequences + table.test.sequences))
    residues = min(longest, model.positions - 2)
    epoch = -(-len(table.train.sequences) // args["batch"])  # steps
    steps = epoch * args["epochs"]

    config = parent(__file__, "pretrain_small.py", f"steps={steps},seed={args['seed']}").unlock()
    config.init_from = "" if args["scratch"] else args["model"]
    config.model.update(dataclasses.asdict(model))
    # As the masked-LM head was trained, which stays: `score` asks whether visible residues count.
    config.masking.update((base.provenance.get("config") or {}).get("masking") or {})
    tokens = residues + 2
    row_length = tokens * max(1, min(SHORTEST_ROW // tokens, args["batch"]))
    config.data.update(path=args["csv"], max_residues=residues, row_length=-(-row_length // 8) * 8)
    config.batch.sequences_per_device = args["batch"]
    default_lr = PEAK_LR.get(args["method"].partition("=")[0], 1e-4) * WIDTH / model.width
    config.optimizer.update(
        peak_lr=args["lr"] or default_lr,
        min_lr=0.0,
        warmup=0.1,
        constant=0.0,
        horizon=1.0,
        beta2=0.999,
    )
    config.optimizer.weight_decay = args["weight_decay"]
    config.evaluation.every = epoch
    config.checkpoint.update(every=epoch, keep=1)
    config.log.every = min(50, epoch)
    config.finetune = {
        "task": args["task"],  # level and kind of the labels, such as residue_classification
        "method": args["method"],  # what is trained beside the head: full, last=2, lora=8 or head
        "pooling": "mean",  # of a protein's residues, for its head: mean, attention or cls, <s>
        "class_weights": False,  # weigh classes by the inverse of their frequency
        # of validation, for the best checkpoint; auto: accuracy, macro_f1 or spearman, by the task
        "metric": "auto",
        "patience": 5,  # validations without a better one before training stops; 0: never
        "test": True,  # evaluate the best checkpoint on the test split, once, at the end
        "valid_fraction": fractions.valid,  # of a table without a column `split`
        "test_fraction": fractions.test,  # of a table without a column `split`
        "split_seed": fractions.seed,  # of those fractions
        "lora_alpha": 16.0,  # the product of LoRA's factors counts alpha / rank times
        "lora_dropout": 0.0,  # rate, of the input of LoRA's factors
        "lora_projections": "query,key,value,out_proj",  # also fc1, fc2
        "frozen_dtype": "float32",  # of frozen kernels; bfloat16 halves them
    }
    return config.lock()
