"""ESM-1nv at full size: 6 layers, 768 wide, 44M parameters, in the readings that exist of it.

    python -m esm1nv_jax.main --config=configs/pretrain_small.py --config.data.path=DIR
    python -m esm1nv_jax.main --config=configs/pretrain_small.py:shipped --config.data.path=DIR

DIR is a data set made by `esm1nv prepare`. To try the real shape on a laptop:

    python -m esm1nv_jax.main --config=configs/pretrain_small.py:batch=4,steps=20 \\
        --config.data.path=sample --config.compute.dtype=float32 \\
        --config.evaluation.batches=2 --workdir=runs/try

Readings, at most one of each line:
  card, shipped   what the model card says (the default), or the configuration published from 2022
                  to May 2024: 10 % of residues predicted, half of them `<mask>`, half another
                  letter, and 512 tokens. Which of the two the released weights saw is not known.
  phase1, phase2  stop where the original stopped on 176 A100s (update 349,500), and on the 144
                  that went on (957,610). One workdir: the second continues the first.
  padded          one sequence a row, as the original; otherwise rows are packed.
  hf              the erf form of GELU in the FFN too, the only one that EsmForMaskedLM has, so that
                  `esm1nv convert --to hf` is exact.
Arguments: max_length= residues before a sequence is cropped, batch= rows in an update over all
devices (0: as many as hold 370 sequences a device), steps=, width= (heads of 64, FFN of four
widths), layers=, seed=. Every field below can be set by --config.field=value.

Traps of this recipe:
  - The constant steps come last. The cosine falls from update 500 to 950,000, and the last 50,000
    stand at the minimum, of which the release used 7,610. "Warm-up, 50,000 at the peak, cosine" is
    another schedule: configs/ablations/constant_at_peak.py.
  - More or fewer devices are another batch, for batch=0. It was so in the original, too.
  - The figure that the original logged as perplexity is 2 to the power of a loss in nats. Here it
    is exp of the token-weighted mean.
  - Under `shipped` no residue that is predicted is left as it was, so the model learns that a
    visible residue at such a place is wrong: its logits at visible positions mean nothing.
  - With 80/10/10 masking a tenth of the answers stand in the input. Compare recipes and baselines
    on `<mask>` positions only.

Known departures from the original, in both readings: rows are packed; specials and unknown letters
are never masked (the original masked before cropping, with the specials in place); a cropped
sequence keeps its </s>; in each sequence exactly round(rate x residues) are predicted; one token a
residue (the original merged runs of unknown characters); operands of products in bf16 without loss
scaling (the original: fp16); in `card`, random letters come from the 20 standard residues and may
equal the original, as in BERT (the original: 25 letters, never equal). In `shipped`, letters are
drawn as in the original.
"""

from ml_collections import config_dict

from esm1nv_jax.common.config_file import arguments
from esm1nv_jax.common.errors import UserError
from esm1nv_jax.data.vocabulary import ESM1NV

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

    config = config_dict.ConfigDict()
    config.seed = args["seed"]
    config.steps = args["steps"]  # stop here; may be raised later, the schedule does not move
    config.platform = "auto"  # or cpu, gpu, tpu
    config.init_from = ""  # start from the weights of this run or model folder

    config.data = {
        "path": "",  # a folder made by `esm1nv prepare`, or "sample"
        "max_residues": max_residues,  # longer sequences are cropped
        "crop": "prefix",  # as the original; or random, anew in every epoch
        # Tokens in a row, apart from the length of a sequence: 1,152 for 1,024 residues.
        "row_length": -(-(max_residues + 2) // 128) * 128,
        "packed": not args["padded"],  # False: one sequence a row
        "sample": "all",  # or one_per_group, of a data set prepared with clusters
        "block": 1,  # records read together where random access is dear
    }
    config.batch = {
        "rows": args["batch"],  # rows in an update over all devices; 0: by the next field
        "sequences_per_device": 370,
        "microbatches": 1,  # parts of an update that a device computes one after another
    }
    # card: 80/10/10, shipped: 50/50/0
    config.masking = (
        {"recipe": "shipped", "rate": 0.10} if args["shipped"] else {"recipe": "card", "rate": 0.15}
    )
    config.model = {
        "layers": args["layers"],
        "width": args["width"],
        "heads": max(1, args["width"] // 64),
        "ffn": 4 * args["width"],
        "positions": max_residues + 2,
        "norm": "pre",
        "ffn_activation": "gelu_erf" if args["hf"] else "gelu_tanh",
        "head_activation": "gelu_erf",
        "dropout": 0.1,
        "attention_dropout": 0.1,
        "norm_epsilon": 1e-5,
        "position_kind": "learned",  # or rotary
        "embedding_norm": False,  # as ESM-1b
        "token_dropout": False,  # as ESM-1b and ESM-2
        "vocabulary": ESM1NV,  # tokens of a model from elsewhere, by its own ids
    }
    config.compute = {
        "dtype": "bfloat16",  # of the operands of matrix products
        "attention": "auto",  # the fastest that is fit; or one of cudnn, pallas, splash, xla
        "remat": "none",  # what the backward computes again: none, dots, block
        "reduce_dtype": "float32",  # in which gradients are summed over devices
        "deterministic": False,  # on GPUs: the same bits from the same start, slower
    }
    config.optimizer = {
        "peak_lr": 2e-4,
        "min_lr": 2e-5,
        "warmup": 500,
        "constant": 50_000,
        "constant_at": "min_lr",  # the original's constant steps come last; or peak
        "horizon": 1_000_000,
        "beta1": 0.9,
        "beta2": 0.98,
        "epsilon": 1e-8,
        "weight_decay": 0.01,
        "clip_norm": 1.0,
    }
    config.evaluation = {"every": 1500, "batches": 50}  # batches 0: the whole validation split
    config.checkpoint = {
        "every": 1500,
        "minutes": 0,  # and whenever so many have gone by since the last, unless 0
        "keep": 47,  # the newest
        "keep_every": 0,  # and all steps that it divides, unless 0; the best lives apart
        "on_error": "continue",  # or stop, where a checkpoint cannot be written
    }
    config.skip_nonfinite = 0  # updates to skip, in the whole run, before it stops
    config.cluster = {
        "start_timeout": 300,  # seconds for all processes to find each other
        "stall_timeout": 600,  # seconds; longer than an update, an evaluation, a save
    }
    config.log = {"every": 50}
    config.profile = ""  # trace these updates, such as 20-24, into WORKDIR/profile
    return config.lock()
