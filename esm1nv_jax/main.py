"""The command of training: `python -m esm1nv_jax.main --config=FILE[:args] [--workdir=DIR]`."""

from __future__ import annotations

import sys
from pathlib import Path

from esm1nv_jax.common import command


def main(argv: list[str]) -> int:
    parser = command.Parser(
        "train",
        "Train a model. Every field of the config can be set: --config.optimizer.peak_lr=1e-3",
        "esm1nv train --config=configs/quickstart.py --workdir=runs/first --config.seed=1",
    )
    parser.add_argument(
        "--config",
        required=True,
        metavar="FILE[:ARGS]",
        help="a config file, or the name of one of ours",
    )
    parser.add_argument("--workdir", metavar="DIR", help="where the run lives (default runs/NAME)")
    parser.add_argument(
        "--strict", action="store_true", help="stop at a damaged checkpoint, do not fall back"
    )
    options, overrides = parser.parse_known_args(argv)

    command.set_up()
    from esm1nv_jax.common import config_file
    from esm1nv_jax.training.run_config import RunConfig
    from esm1nv_jax.training.train import train

    config = config_file.from_option(options.config, overrides)
    name = Path(options.config.partition(":")[0]).stem
    run_config = RunConfig.from_config_dict(config)
    return train(run_config, options.workdir or f"runs/{name}", options.strict)


if __name__ == "__main__":
    sys.exit(command.run(main, sys.argv[1:]))
