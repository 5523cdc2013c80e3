"""Does a model that only ever saw the first residues of long proteins do worse on the rest?

    python -m esm1nv_jax.main --config=configs/ablations/random_crop.py --config.data.path=DIR

The original crops to a prefix; this draws another window in every epoch. The difference can only
come from sequences longer than max_length. Arguments are those of the parent.
"""

from esm1nv_jax.common.config_file import parent


def get_config(arg: str = ""):
    config = parent(__file__, "../pretrain_small.py", arg)
    config.data.crop = "random"
    return config.lock()
