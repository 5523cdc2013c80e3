"""Does the other reading of the schedule help: 500 warm-up, 50,000 steps at the peak, then cosine?

    python -m esm1nv_jax.main --config=configs/ablations/constant_at_peak.py --config.data.path=DIR

The original's constant steps come last, at the minimal rate. The lengths of the phases are the
parent's and do not scale: in a short run set --config.optimizer.constant and .horizon in both runs.
Hardware and time as the parent's, configs/pretrain_small.py; not measured. Arguments: the parent's.
Answer (docs/ablations.md): no difference was seen, +0.0029 ± 0.0015 nats with 60 % of the steps at
the peak, a million parameters, 1M tokens, Muon.
"""

from esm1nv_jax.common.config_file import parent


def get_config(arg: str = ""):
    config = parent(__file__, "../pretrain_small.py", arg)
    config.optimizer.constant_at = "peak"
    return config.lock()
