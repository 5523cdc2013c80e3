"""Does dropout of 0.1 help a model that sees each sequence a few times?

    python -m esm1nv_jax.main --config=configs/ablations/no_dropout.py --config.data.path=DIR

The original trained for hundreds of epochs; in a short run without repetition dropout may
only cost.
Hardware and time as the parent's, configs/pretrain_small.py; not measured. Arguments: the parent's.
Answer (docs/ablations.md): no difference was seen, +0.0007 ± 0.0010 nats for dropout of 0.1, a
million parameters, 1M tokens, Muon.
"""

from esm1nv_jax.common.config_file import parent


def get_config(arg: str = ""):
    config = parent(__file__, "../pretrain_small.py", arg)
    config.model.update(dropout=0.0, attention_dropout=0.0)
    return config.lock()
