"""Are pre-LN blocks needed at six layers, or does BERT's post-LN learn as well?

    python -m esm1nv_jax.main --config=configs/ablations/post_norm.py --config.data.path=DIR

Post-LN is known to need its warm-up and to tolerate lower peak rates only: compare the gradient
norms of the first thousand steps before the final losses.
Hardware and time as the parent's, configs/pretrain_small.py; not measured. Arguments: the parent's.
Answer (docs/ablations.md): no difference was seen, +0.0010 ± 0.0011 nats, a million parameters, 1M
tokens, Muon.
"""

from esm1nv_jax.common.config_file import parent


def get_config(arg: str = ""):
    config = parent(__file__, "../pretrain_small.py", arg)
    config.model.norm = "post"
    return config.lock()
