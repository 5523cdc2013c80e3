"""A run of seconds for tests of whole processes: one layer, short rows of the bundled sample."""

from ml_collections import config_dict

from esm1nv_jax.common.config_file import arguments, parent


def get_config(arg: str = "") -> config_dict.ConfigDict:
    args = arguments(arg, steps=12, seed=0, batch=8)
    config = parent(__file__, "../../configs/quickstart.py", f"steps={args['steps']}")
    config.seed = args["seed"]
    config.masking.update(rate=0.15, final_rate=0.0)
    config.batch.rows = args["batch"]
    config.data.update(max_residues=62, row_length=64)
    config.model.update(layers=1, width=16, heads=2, ffn=32, positions=64, dropout=0.1)
    config.model.position_kind = "learned"
    config.optimizer.update(kind="adamw", warmup=2, horizon=1000)
    config.evaluation.update(every=6, sequences=40)
    config.checkpoint.update(every=4, keep=10)
    config.log.every = 2
    return config.lock()
