"""Does training on the first residues of long proteins harm predictions in the rest?

    python -m esm1nv_jax.main --config=configs/ablations/random_crop.py --config.data.path=DIR

The original crops to a prefix; this draws another window in every epoch. A difference can only come
from sequences longer than data.max_residues.
Hardware and time as the parent's, configs/pretrain_small.py; not measured. Arguments: the parent's.
Answer (docs/ablations.md): no difference was seen, +0.0028 ± 0.0023 nats for random crops, a
million parameters, 1M tokens, Muon.
"""

from esm1nv_jax.common.config_file import parent


def get_config(arg: str = ""):
    config = parent(__file__, "../pretrain_small.py", arg)
    config.data.crop = "random"
    return config.lock()
