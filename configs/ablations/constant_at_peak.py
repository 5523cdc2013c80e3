"""What would the misread schedule have given: 500 warm-up, 50,000 at the peak, then cosine?

    python -m esm1nv_jax.main --config=configs/ablations/constant_at_peak.py --config.data.path=DIR

The original holds its constant steps at the minimum, at the end. Lengths of phases are the parent's
and scale with nothing: in a short run set --config.optimizer.constant and .horizon, in both runs.
Arguments are those of the parent.
"""

from esm1nv_jax.common.config_file import parent


def get_config(arg: str = ""):
    config = parent(__file__, "../pretrain_small.py", arg)
    config.optimizer.constant_at = "peak"
    return config.lock()
