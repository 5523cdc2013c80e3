"""The smallest model that still has every part: for tests that start real processes."""

from ml_collections import config_dict

from esm1nv_jax.configuration import arguments, parent


def get_config(arg: str = "") -> config_dict.ConfigDict:
    args = arguments(arg, steps=10, batch=8)
    config = parent(__file__, "../../configs/pretrain_small.py", f"batch={args['batch']}")
    config.steps = args["steps"]
    config.data.update(path="sample", max_residues=62, row_length=64, crop="random")
    config.model.update(layers=1, width=16, heads=2, ffn=32, positions=64)
    config.compute.dtype = "float32"
    config.optimizer.update(peak_lr=1e-3, min_lr=1e-4, warmup=5, constant=0, horizon=200)
    config.evaluation.update(every=1000, batches=2)
    config.checkpoint.update(every=5, keep=100)
    config.log.every = 1
    return config.lock()
