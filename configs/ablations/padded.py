"""Does packing change what is learned, apart from the time it takes?

    python -m esm1nv_jax.main --config=configs/ablations/padded.py --config.data.path=DIR

The parent packs sequences into rows; this puts one in each, as the original. With batch=0 both see
370 sequences a device and step, so their curves over steps should coincide.
Hardware and time as the parent's, configs/pretrain_small.py; not measured. Arguments: the parent's.
Answer (docs/ablations.md): no, -0.0006 ± 0.0013 nats for padded rows, a million parameters, 1M
tokens, Muon.
"""

from esm1nv_jax.common.config_file import parent


def get_config(arg: str = ""):
    config = parent(__file__, "../pretrain_small.py", arg)
    config.data.packed = False
    return config.lock()
