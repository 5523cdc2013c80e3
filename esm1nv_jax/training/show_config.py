"""`esm1nv config`: every field of a config, resolved, with its meaning and unit.

Meanings are the comments of configs/pretrain_small.py, which has every field but those of the group
`finetune`, and of configs/finetune.py, so that a field is described where its default stands.
docs/configs.md is made by `--markdown`.
"""

from __future__ import annotations

import json
import re

from esm1nv_jax.common import command, config_file

_GROUP = re.compile(r"    config\.(\w+) = \{")
_FIELD = re.compile(r'    config\.(\w+) = (?!\()|        "(\w+)": ')


def meanings(name: str = "pretrain_small") -> dict[str, str]:
    """The comment of each field that the config file `name` makes, by its dotted name."""
    texts: dict[str, str] = {}
    group, above = "", ""
    for line in config_file.find(name).read_text(encoding="utf-8").splitlines():
        if comment := re.match(r"\s+# (?:([a-z_.]+): )?(.*)", line):
            if comment[1]:  # of a field that has no line of its own
                texts[comment[1]] = comment[2]
            else:
                above = comment[2]
            continue
        if opened := _GROUP.match(line):
            group = opened[1] + "."
        elif field := _FIELD.match(line):
            name = group + field[2] if field[2] else field[1]
            texts[name] = (above or line.partition("  #")[2]).strip()
        elif line.startswith("    }"):
            group = ""
        above = ""
    return texts


def markdown(fields: dict[str, object], texts: dict[str, str]) -> str:
    rows = [f"| `{name}` | `{value!r}` | {texts.get(name, '')} |" for name, value in fields.items()]
    return "\n".join(["| field | default | meaning, unit |", "|---|---|---|", *rows])


def main(argv: list[str]) -> int:
    parser = command.Parser(
        "config",
        "Show every field of a config, with its value and meaning.",
        "esm1nv config quickstart:steps=1000 --config.optimizer.peak_lr=1e-3",
    )
    parser.add_argument("config", metavar="FILE[:ARGS]", help="a file, or the name of one of ours")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--markdown", action="store_true", help="print a table for docs/configs.md")
    options, overrides = parser.parse_known_args(argv)
    config = config_file.from_option(options.config, overrides)

    from esm1nv_jax.training.run_config import RunConfig  # jax, which --help does without

    RunConfig.from_config_dict(config)  # raises UserError
    fields, texts = config_file.flat(config), meanings("finetune") | meanings()
    if options.json:
        print(config_file.to_json(config))
    elif options.markdown:
        print(markdown(fields, texts))
    else:
        width = max(
            len(name) + len(json.dumps(value))
            for name, value in fields.items()
            if len(str(value)) < 40
        )
        for name, value in fields.items():
            shown = f"{name} = {json.dumps(value)}"
            print(f"{shown:<{width + 4}} # {texts[name]}" if texts.get(name) else shown)
    return 0
