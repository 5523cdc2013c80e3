"""ESM-1nv at full size: 6 layers, width 768, 44M parameters, as the sources describe it.

    python -m esm1nv_jax.main --config=configs/pretrain_small.py --config.data.path=DIR
    python -m esm1nv_jax.main --config=configs/pretrain_small.py:shipped --config.data.path=DIR

DIR is a data set made by `esm1nv prepare`.

Hardware and time: the original took 176, later 144, A100 GPUs; for 176 A100-80GB `esm1nv plan`
estimates 0.21 s a step (0.19 to 0.25), 2.5 days for a million steps. Not trained here; one H200
takes 0.11 s for the rows of one device (docs/performance.md). Expected metric: no perplexity of
ESM-1nv was published; its relative ESM-1 (6 layers, 43M parameters, another split) has 11.8. To try
the real shape on a CPU, in 7 GB of memory:

    python -m esm1nv_jax.main --config=configs/pretrain_small.py:batch=1,steps=20 \\
        --config.data.path=sample --config.compute.dtype=float32 \\
        --config.evaluation.sequences=20 --workdir=runs/try

Variants, at most one of each line:
  card, shipped   the model card (the default), or the configuration published from 2022 to May
                  2024: 10 % of residues predicted, half of them shown as `<mask>`, half as another
                  letter, and 512 tokens. It is not known which of the two the released weights saw.
  phase1, phase2  end where the original ended on 176 A100s (step 349,500), and on the 144 that
                  continued it (957,610). In one workdir the second continues the first.
  padded          one sequence a row, as the original; otherwise rows are packed.
  hf              GELU in its erf form in the FFN too, the only one that EsmForMaskedLM has, so that
                  `esm1nv convert --to hf` is exact.
Arguments: max_length= residues before a sequence is cropped, batch= rows of a global batch (0: as
many as hold 370 sequences a device), steps=, width= (heads of 64, an FFN of four widths), layers=,
seed=. Every field below can be set by --config.field=value.

Pitfalls of this recipe:
  - The constant phase comes last. The cosine falls from step 500 to step 950,000, and the last
    50,000 steps have the minimal rate; the release used 7,610 of them. "Warm-up, 50,000 at the
    peak, cosine" is another schedule: configs/ablations/constant_at_peak.py.
  - With batch=0 another number of devices means another batch size. It did in the original, too.
  - The original logged as perplexity 2 to the power of a loss in nats. Here it is exp of the
    token-weighted mean.
  - With `shipped` no predicted residue is left unchanged, so the model learns that a visible
    residue at a predicted position is wrong: its logits at visible positions are not usable.
  - With 80/10/10 masking a tenth of the answers are visible in the input. Compare recipes and
    baselines at `<mask>` positions only.

Known differences from the original, in both variants: rows are packed; specials and unknown letters
are never masked (the original masked before cropping, specials included); a cropped sequence keeps
its </s>; in each sequence exactly round(rate x residues) are predicted; one token a residue (the
original merged runs of unknown characters); operands of products in bf16 without loss scaling (the
original: fp16); in `card`, random letters come from the 20 standard residues and may equal the
original letter, as in BERT (the original: 25 letters, never equal), in `shipped` as in the
original; attention dropout of 0.1 is 26/256.
"""

from ml_collections import config_dict

from esm1nv_jax.common.config_file import arguments
from esm1nv_jax.common.errors import UserError
from esm1nv_jax.data.tokenizer import ESM1NV

CHOICES = (("card", "shipped"), ("phase1", "phase2"), ("padded",), ("hf",))
STOPS = {"phase1": 349_500, "phase2": 957_610}


def get_config(arg: str = "") -> config_dict.ConfigDict:
    names = tuple(name for choice in CHOICES for name in choice)
    chosen = arg.split(",")
    args = arguments(
        arg,
        names,
        max_length=510 if "shipped" in chosen else 1024,
        batch=0,
        steps=next((stop for name, stop in STOPS.items() if name in chosen), 1_000_000),
        width=768,
        layers=6,
        seed=0,
    )
    for choice in CHOICES:
        if sum(args[name] for name in choice) > 1:
            raise UserError(f"config arguments {' and '.join(choice)} exclude each other; take one")
    max_residues = args["max_length"]

    # The comment of a field is its documentation: `esm1nv config` and docs/configs.md show it.
    config = config_dict.ConfigDict()
    config.seed = args["seed"]  # of initial weights, order of the data, crops, masks and dropout
    config.steps = args["steps"]  # training stops after this step; the schedule does not follow it
    config.minutes = 0.0  # training also stops after so many minutes with validations; 0: never
    config.platform = "auto"  # auto, cpu, gpu or tpu
    config.init_from = ""  # start from the weights of this run, step, model or transformers folder
    # start from the whole state of this run or step: weights, optimizer, step, place in the data
    config.fork_from = ""

    config.data = {
        "path": "",  # a data set made by `esm1nv prepare`, or "sample" for the bundled sample
        "max_residues": max_residues,  # longer sequences are cropped to as many residues
        "crop": "prefix",  # prefix, as the original, or random: another window in every epoch
        # tokens of a row, from max_residues + 2 up: 1,152 for 1,024 residues
        "row_length": -(-(max_residues + 2) // 128) * 128,
        "packed": not args["padded"],  # several sequences in a row; False: one
        "sample": "all",  # all examples, or one_per_group of a data set prepared with clusters
        "block": 1,  # consecutive records read together, for storage that is slow at random access
        "workers": 0,  # processes that read batches, for hosts that wait for data; 0: a thread
    }
    config.batch = {
        "rows": args["batch"],  # rows of a global batch; 0: from sequences_per_device
        "sequences_per_device": 370,  # on average, where rows is 0; more devices, a larger batch
        "microbatches": 1,  # gradient accumulation: parts of a device's rows, one after another
    }
    # masking.recipe: card, 80/10/10 % <mask>, random, unchanged; or shipped, 50/50/0; sets no rate
    # masking.rate: share of the residues that is predicted
    # masking.final_rate: the rate changes linearly to this until optimizer.horizon; 0: it stays
    config.masking = (
        {"recipe": "shipped", "rate": 0.10} if args["shipped"] else {"recipe": "card", "rate": 0.15}
    )
    config.masking["final_rate"] = 0.0
    config.model = {
        "layers": args["layers"],  # transformer blocks
        "width": args["width"],  # of the embeddings and the residual stream
        "heads": max(1, args["width"] // 64),  # attention heads; they divide width
        "ffn": 4 * args["width"],  # hidden width of the feed-forward network
        "positions": max_residues + 2,  # longest input in tokens, <s> and </s> included
        "norm": "pre",  # LayerNorm before each sublayer (pre) or after it (post)
        # gelu_tanh, gelu_erf or swiglu, whose gates make fc1 twice as wide
        "ffn_activation": "gelu_erf" if args["hf"] else "gelu_tanh",
        "head_activation": "gelu_erf",  # of the LM head: gelu_tanh or gelu_erf
        "dropout": 0.1,  # rate, of embeddings and residual branches
        "attention_dropout": 0.1,  # rate, of attention probabilities, to 1/256
        "norm_epsilon": 1e-5,  # of LayerNorm
        "position_kind": "learned",  # learned or rotary
        "embedding_norm": False,  # LayerNorm on the embeddings, as ESM-1b
        "token_dropout": False,  # no embedding at <mask>, the others scaled, as ESM-1b and ESM-2
        "bias_kv": False,  # a key and a value of each head in place of those of </s>, as ESM-1
        "bare_head": False,  # no final norm; the LM head is its output matrix and bias, as ESM-1
        "vocabulary": ESM1NV,  # tokens in the order of their ids, separated by spaces
        "norm_kind": "layernorm",  # layernorm, layernorm_no_bias or rmsnorm
        "bias": True,  # of the linear layers of the blocks, and of the final norm
        "qk_norm": False,  # queries and keys normalized, each over the whole width
        "tied_head": True,  # whether the LM head's output matrix is the token embedding
        "branch_scale": 1.0,  # factor of each residual branch; of ESMC sqrt(36 / layers)
    }
    config.compute = {
        "dtype": "bfloat16",  # operands of matrix products: bfloat16 or float32
        "attention": "auto",  # auto, the first that fits, or cudnn, pallas, pallas_tpu, splash, xla
        # recomputed in the backward pass: none, dots (all but QKV, fc1 and fused attention), block
        "remat": "none",
        "residual_dtype": "float32",  # of the residual stream: float32, or bfloat16, fewer bytes
        "reduce_dtype": "float32",  # of the sum of gradients over devices: float32 or bfloat16
        "deterministic": False,  # on GPUs: the same bits from the same start, slower
    }
    config.optimizer = {
        "kind": "adamw",  # adamw, or muon: for hidden matrices, with AdamW for the rest
        "peak_lr": 2e-4,  # learning rate after the warm-up
        "min_lr": 2e-5,  # learning rate at the end
        "warmup": 500.0,  # steps of linear increase from 0; below 1: a share of config.steps
        "constant": 50_000.0,  # steps at a constant rate; below 1: a share of config.steps
        # rate of the constant steps: min_lr, at the end, as the original; or peak
        "constant_at": "min_lr",
        # steps of the schedule, then min_lr; up to 1: a share of config.steps
        "horizon": 1_000_000.0,
        "beta1": 0.9,  # decay of Adam's first moment
        "beta2": 0.98,  # decay of Adam's second moment
        "epsilon": 1e-8,  # in the denominator of Adam
        "weight_decay": 0.01,  # decoupled; not of biases and LayerNorm
        "clip_norm": 1.0,  # the gradient is scaled down to this L2 norm, over all parameters
        "muon_beta": 0.95,  # decay of Muon's moment
        "decay": "cosine",  # of the learning rate, from peak_lr to min_lr: cosine or linear
    }
    config.evaluation = {
        "every": 1500,  # steps between validations
        "sequences": 0,  # how many of the validation split, the same every time; 0: all
    }
    config.checkpoint = {
        "every": 1500,  # steps between checkpoints
        "minutes": 0.0,  # also when so many minutes have passed since the last; 0: never
        "keep": 47,  # newest checkpoints that are kept
        "keep_every": 0,  # also keep the steps that it divides; 0: none
        "on_error": "continue",  # continue or stop, where a checkpoint cannot be written
    }
    config.skip_nonfinite = 0  # so many steps that are not finite are skipped before a run stops
    config.cluster = {
        "start_timeout": 300,  # seconds for all processes to find each other
        "stall_timeout": 600,  # seconds; longer than a step, a validation or a save takes
    }
    config.log = {
        "every": 50  # steps between lines of metrics
    }
    config.profile = ""  # steps to trace into WORKDIR/profile, such as 20-24
    return config.lock()
