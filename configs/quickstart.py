"""A test of the installation: a small ESM on 9,000 bundled proteins.

    python -m esm1nv_jax.main --config=configs/quickstart.py

Hardware and time: two CPU cores, about 2 minutes. Expected metric: validation perplexity
17.03 at `<mask>` positions, below the composition baseline, 17.33 (README).

It differs from ESM-1nv in its size, in its positions, which are rotary instead of learned, in its
optimizer, Muon instead of AdamW, and in its masking, of 30 % of the residues at first and 15 % at
the end.

Arguments: steps=, seed=, hf (the variant that converts to transformers exactly).
"""

from ml_collections import config_dict

from esm1nv_jax.common.config_file import arguments, parent


def get_config(arg: str = "") -> config_dict.ConfigDict:
    args = arguments(arg, ("hf",), steps=450, seed=0)
    hf = ",hf" if args["hf"] else ""
    config = parent(__file__, "pretrain_small.py", f"batch=16,steps={args['steps']}{hf}")
    config.seed = args["seed"]
    config.data.update(path="sample", max_residues=254, row_length=256, crop="random")
    config.model.update(
        layers=2, width=128, heads=4, ffn=512, positions=256, dropout=0.0, attention_dropout=0.0
    )
    config.model.position_kind = "rotary"
    config.masking.update(rate=0.30, final_rate=0.15)
    config.compute.dtype = "float32"
    config.optimizer.update(
        kind="muon",
        peak_lr=4e-3,
        min_lr=2e-4,
        warmup=min(40, args["steps"] // 10),
        constant=0,
        horizon=args["steps"],
        beta2=0.99,
    )
    config.evaluation.every = 100
    config.checkpoint.update(every=100, keep=3)
    config.log.every = 10
    return config.lock()
