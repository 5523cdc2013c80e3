"""Continues the pretraining of another model, such as ESM-2, in its architecture and vocabulary.

    esm1nv convert --from hf esm2_t6_8M_UR50D --out models/esm2_8m
    python -m esm1nv_jax.main --config=configs/continue_from.py:model=models/esm2_8m \\
        --config.data.path=DIR --workdir=runs/esm2_on_my_proteins

Hardware, time and metric depend on the model; not measured. The validation at step 0 is that of the
model as it was.

Arguments: model= (a run, a step, a model folder or a folder of transformers), batch=, steps=,
seed=. The schedule is short, with a tenth of the peak learning rate of a fresh start.
"""

import dataclasses

from ml_collections import config_dict

from esm1nv_jax.common.config_file import arguments, parent
from esm1nv_jax.common.errors import UserError
from esm1nv_jax.interchange.loader import load_weights


def get_config(arg: str = "") -> config_dict.ConfigDict:
    args = arguments(arg, model="", batch=0, steps=10_000, seed=0)
    if not args["model"]:
        raise UserError("name the model to continue: --config=configs/continue_from.py:model=DIR")
    config = parent(__file__, "pretrain_small.py", f"batch={args['batch']},steps={args['steps']}")
    model = load_weights(args["model"]).model
    config.seed = args["seed"]
    config.init_from = args["model"]
    config.model.update(dataclasses.asdict(model))
    residues = min(1024, model.positions - 2)
    config.data.update(max_residues=residues, row_length=residues + residues // 8)
    config.optimizer.update(peak_lr=2e-5, min_lr=2e-6, constant=0, horizon=args["steps"])
    config.optimizer.warmup = min(500, args["steps"] // 10)
    return config.lock()
