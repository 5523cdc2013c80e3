"""Does normalizing queries and keys help, here or at a higher learning rate?

    python -m esm1nv_jax.main --config=configs/ablations/qk_norm.py --config.data.path=DIR

It bounds the scores of attention (Dehghani et al. 2023), which large models need at high learning
rates; at 44M parameters it may change little.
Hardware and time as the parent's, configs/pretrain_small.py; not measured. Arguments: the parent's.
Answer (docs/ablations.md): yes, by 0.0099 ± 0.0020 nats at the same learning rate, a million
parameters, 1M tokens, Muon.
"""

from esm1nv_jax.common.config_file import parent


def get_config(arg: str = ""):
    config = parent(__file__, "../pretrain_small.py", arg)
    config.model.qk_norm = True
    return config.lock()
