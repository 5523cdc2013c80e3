"""The encoder that one would pretrain today at the size of ESM-1nv: 44M parameters.

    python -m esm1nv_jax.main --config=configs/modern.py --config.data.path=DIR

Each line below is one change of the parent, configs/pretrain_small.py; most have an ablation of
their own in configs/ablations. `transformers` has no such architecture: `esm1nv convert --to hf`
refuses it.
Hardware and time: not measured; `esm1nv plan` estimates 0.13 s a step on 8 H100. Expected metric:
not known; at a million parameters no difference from the parent under Muon with rotary positions
was seen (docs/ablations.md). Arguments: the parent's.
"""

from esm1nv_jax.common.config_file import parent


def get_config(arg: str = ""):
    config = parent(__file__, "pretrain_small.py", arg)
    config.model.position_kind = "rotary"
    config.model.ffn_activation = "swiglu"
    config.model.ffn = 2 * config.model.ffn // 3  # three matrices with the parameters of two
    config.model.norm_kind = "rmsnorm"
    config.model.bias = False
    config.model.qk_norm = True
    config.model.dropout = 0.0
    config.model.attention_dropout = 0.0
    config.masking.rate = 0.30
    config.masking.final_rate = 0.15
    config.data.crop = "random"
    config.optimizer.kind = "muon"
    return config.lock()
