"""ESM-1nv at full size: 6 layers, 768 wide, 44M parameters, as the model card describes it.

    python -m esm1nv_jax.main --config=configs/pretrain_small.py --config.data.path=DIR

DIR is a data set made by `esm1nv prepare`. To try the real shape on a laptop:

    python -m esm1nv_jax.main --config=configs/pretrain_small.py:batch=4,steps=20 \\
        --config.data.path=sample --workdir=runs/try

Arguments: batch= rows in an update over all devices (default: from sequences_per_device),
steps=, seed=. Every field below can be set by --config.field=value.
"""

from ml_collections import config_dict

from esm1nv_jax.configuration import arguments


def get_config(arg: str = "") -> config_dict.ConfigDict:
    args = arguments(arg, batch=0, steps=1_000_000, seed=0)
    config = config_dict.ConfigDict()
    config.seed = args["seed"]
    config.steps = args["steps"]  # stop here; may be raised later, the schedule does not move
    config.platform = "auto"  # or cpu, gpu, tpu
    config.init_from = ""  # start from the weights of this run or model folder

    config.data = {
        "path": "",  # a folder made by `esm1nv prepare`, or "sample"
        "max_residues": 1024,  # longer sequences are cropped
        "crop": "prefix",  # as the original; or random, anew in every epoch
        "row_length": 1152,  # tokens in a row, apart from the length of a sequence
        "packed": True,  # False: one sequence a row
        "sample": "all",  # or one_per_group, of a data set prepared with clusters
        "block": 1,  # records read together where random access is dear
    }
    config.batch = {
        "rows": args["batch"],  # rows in an update over all devices; 0: by the next field
        "sequences_per_device": 370,
        "microbatches": 1,  # parts of an update that a device computes one after another
    }
    config.masking = {"recipe": "card", "rate": 0.15}  # card: 80/10/10, shipped: 50/50/0
    config.model = {
        "layers": 6,
        "width": 768,
        "heads": 12,
        "ffn": 3072,
        "positions": 1026,
        "norm": "pre",
        "ffn_activation": "gelu_tanh",
        "head_activation": "gelu_erf",
        "dropout": 0.1,
        "attention_dropout": 0.1,
        "norm_epsilon": 1e-5,
    }
    config.compute = {
        "dtype": "bfloat16",  # of the operands of matrix products
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
        "stall_timeout": 600,  # seconds; longer than a compile, an evaluation, a save
    }
    config.log = {"every": 50}
    return config.lock()
