"""Does the shipped recipe of masking learn as much as the card's?

    python -m esm1nv_jax.main --config=configs/ablations/shipped_masking.py --config.data.path=DIR

Shipped: 10 % of residues predicted, half of them shown as `<mask>`, half as another letter. The
parent's argument `shipped` shortens proteins, too; this changes the masking alone. Validate both
runs on the same masks, by `esm1nv evaluate --masking card`.
Hardware and time as the parent's, configs/pretrain_small.py; not measured. Arguments: the parent's.
Answer (docs/ablations.md): no, 0.0121 ± 0.0012 nats worse at `<mask>`, a million parameters, 1M
tokens.
"""

from esm1nv_jax.common.config_file import parent


def get_config(arg: str = ""):
    config = parent(__file__, "../pretrain_small.py", arg)
    config.masking.update(recipe="shipped", rate=0.10)
    return config.lock()
