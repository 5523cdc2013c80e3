"""Does it help to predict 30 % of the residues at first and 15 % at the end?

    python -m esm1nv_jax.main --config=configs/ablations/masking_schedule.py --config.data.path=DIR

The rate falls linearly over the horizon of the schedule of learning rates (Yang et al. 2023).
Validation is at the last rate, which is the parent's.
Hardware and time as the parent's, configs/pretrain_small.py; not measured. Arguments: the parent's.
Answer (docs/ablations.md): yes, -0.0058 ± 0.0007 nats, a million parameters, 1M tokens, Muon.
"""

from esm1nv_jax.common.config_file import parent


def get_config(arg: str = ""):
    config = parent(__file__, "../pretrain_small.py", arg)
    config.masking.update(rate=0.30, final_rate=0.15)
    return config.lock()
