"""Does Muon learn faster than AdamW?

    python -m esm1nv_jax.main --config=configs/ablations/muon.py --config.data.path=DIR

Muon makes the step of every hidden matrix orthogonal; embeddings, biases and scales stay with
AdamW. Its steps are scaled to the size of AdamW's, so that learning rate and weight decay are the
parent's; the best rate may still be another one for either.
Hardware and time as the parent's, configs/pretrain_small.py; not measured. Arguments: the parent's.
Answer (docs/ablations.md): yes, by 0.0179 ± 0.0021 nats, perplexity 16.98 against 17.29, a million
parameters, 1M tokens, peak rate 4e-3 for both.
"""

from esm1nv_jax.common.config_file import parent


def get_config(arg: str = ""):
    config = parent(__file__, "../pretrain_small.py", arg)
    config.optimizer.kind = "muon"
    return config.lock()
