"""Does predicting 30 % of the residues learn faster than the card's 15 %?

    python -m esm1nv_jax.main --config=configs/ablations/masking_rate.py --config.data.path=DIR

A higher rate gives more predictions a step and leaves less to predict them from. Validate both runs
at one rate, by `esm1nv evaluate --masking card`: the runs' own metrics are at their own rates.
Other rates: --config.masking.rate=0.4.
Hardware and time as the parent's, configs/pretrain_small.py; not measured. Arguments: the parent's.
Answer (docs/ablations.md): no difference was seen, -0.0027 ± 0.0016 nats under the same masks of 15
%, a million parameters, 1M tokens.
"""

from esm1nv_jax.common.config_file import parent


def get_config(arg: str = ""):
    config = parent(__file__, "../pretrain_small.py", arg)
    config.masking.rate = 0.30
    return config.lock()
