"""Are means and biases needed: RMSNorm and no biases against LayerNorm with all of them?

    python -m esm1nv_jax.main --config=configs/ablations/rmsnorm.py --config.data.path=DIR

The LM head keeps the biases of its linear layer and of the output.
Hardware and time as the parent's, configs/pretrain_small.py; not measured. Arguments: the parent's.
Answer (docs/ablations.md): no difference was seen without them, +0.0010 ± 0.0011 nats, a million
parameters, 1M tokens, Muon.
"""

from esm1nv_jax.common.config_file import parent


def get_config(arg: str = ""):
    config = parent(__file__, "../pretrain_small.py", arg)
    config.model.update(norm_kind="rmsnorm", bias=False)
    return config.lock()
