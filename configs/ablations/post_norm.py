"""Is the original's pre-LN needed at six layers, or does BERT's post-LN learn as well?

    python -m esm1nv_jax.main --config=configs/ablations/post_norm.py --config.data.path=DIR

Post-LN is known to need its warm-up and to bear lower peaks; look at the gradient norm in the first
thousand updates before reading anything into the end. Arguments are those of the parent.
"""

from esm1nv_jax.common.config_file import parent


def get_config(arg: str = ""):
    config = parent(__file__, "../pretrain_small.py", arg)
    config.model.norm = "post"
    return config.lock()
