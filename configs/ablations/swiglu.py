"""Does SwiGLU learn more than GELU, at equal parameters and FLOPs?

    python -m esm1nv_jax.main --config=configs/ablations/swiglu.py --config.data.path=DIR

A gated FFN (Shazeer 2020) has three matrices instead of two, so it is two thirds as wide.
Hardware and time as the parent's, configs/pretrain_small.py; not measured. Arguments: the parent's.
Answer (docs/ablations.md): no difference was seen, -0.0015 ± 0.0008 nats, a million parameters, 1M
tokens, Muon.
"""

from esm1nv_jax.common.config_file import parent


def get_config(arg: str = ""):
    config = parent(__file__, "../pretrain_small.py", arg)
    config.model.update(ffn_activation="swiglu", ffn=2 * config.model.ffn // 3)
    return config.lock()
