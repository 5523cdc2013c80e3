"""ESM-2 from scratch (Lin et al. 2023), 8M to 650M parameters, as the paper's supplement has it.

    python -m esm1nv_jax.main --config=configs/esm2.py:8m --config.data.path=DIR

DIR is a data set prepared with clusters (`esm1nv prepare --groups`): in every epoch one member of
each cluster is drawn, as ESM-2 draws UniRef90 members of UniRef50 clusters.

Arguments: one of 8m, 35m, 150m, 650m (the default is 8m); steps=, batch= (rows of 1,024 tokens),
seed=. A batch of 2,048 rows is the paper's 2 million tokens; on few devices set
--config.batch.microbatches, so that a part fits.

Hardware and time: not measured; `esm1nv plan` estimates, for 500,000 steps on 8 H100, 0.5 days of
8m (microbatches=4) and 17 days of 650m (microbatches=16). Expected metric: not known; the paper's
perplexities are on its own UniRef50 split and compare with no other.

Known differences from the original: rows are packed, and a cropped sequence keeps its <s> and </s>,
which ESM-2 has at real ends only; in each sequence exactly round(rate x residues) are predicted;
operands of products in bf16 (the original: fp16); the gradient is clipped at norm 1; dropout of
tokens scales by the share of <mask> in each sequence. Weight decay leaves out biases and norms.
"""

from esm1nv_jax.common.config_file import arguments, parent
from esm1nv_jax.common.errors import UserError
from esm1nv_jax.data.tokenizer import ESM2

SIZES = {"8m": (6, 320), "35m": (12, 480), "150m": (30, 640), "650m": (33, 1280)}


def get_config(arg: str = ""):
    args = arguments(arg, tuple(SIZES), steps=500_000, batch=2048, seed=0)
    chosen = [size for size in SIZES if args[size]] or ["8m"]
    if len(chosen) > 1:
        raise UserError(f"config arguments {' and '.join(chosen)} exclude each other; take one")
    layers, width = SIZES[chosen[0]]
    shared = f"max_length=1022,batch={args['batch']},steps={args['steps']},seed={args['seed']},hf"
    config = parent(__file__, "pretrain_small.py", shared)
    config.model.update(layers=layers, width=width, heads=20, ffn=4 * width)
    config.model.update(position_kind="rotary", token_dropout=True, vocabulary=ESM2)
    config.model.update(dropout=0.0, attention_dropout=0.0)
    config.data.update(crop="random", sample="one_per_group")
    config.optimizer.update(peak_lr=4e-4, min_lr=4e-5, warmup=2000.0, decay="linear")
    config.optimizer.update(constant=0.1, horizon=1.0)  # shares: the last tenth at the minimum
    if chosen[0] == "650m":
        config.compute.remat = "dots"
    return config.lock()
