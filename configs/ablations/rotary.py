"""Do rotary positions learn faster than a table of learned ones?

    python -m esm1nv_jax.main --config=configs/ablations/rotary.py --config.data.path=DIR

Rotary positions (Su et al. 2021) enter every attention as angles and have no parameters; a learned
table has 768 a position, and sees the last ones only in the longest proteins.
Answer (docs/ablations.md): under AdamW yes, perplexity 16.48 against 16.98 at `<mask>`, a million
parameters, 14M tokens; under Muon, 1M tokens, no difference was seen.
Hardware and time as the parent's, configs/pretrain_small.py; not measured. Arguments: the parent's.
"""

from esm1nv_jax.common.config_file import parent


def get_config(arg: str = ""):
    config = parent(__file__, "../pretrain_small.py", arg)
    config.model.position_kind = "rotary"
    return config.lock()
