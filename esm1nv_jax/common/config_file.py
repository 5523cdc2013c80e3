"""Reads a config file, its arguments and the overrides of a command line (docs/configs.md).

A config is a Python file with `get_config(arg="")` that returns a locked `ConfigDict`. It may build
on another by `parent(__file__, "other.py")`, a path relative to itself.
"""

from __future__ import annotations

import importlib.util
import json
import traceback
from pathlib import Path
from typing import Any

from ml_collections import config_dict

from esm1nv_jax.common.errors import UserError

# The configs of a clone, or those that were installed with the package.
CONFIGS = Path(__file__).parents[2] / "configs"
if not (CONFIGS / "pretrain_small.py").is_file():
    CONFIGS = Path(__file__).parents[1] / "configs"


def find(name: str | Path) -> Path:
    """The config file of a path, or of a name such as `quickstart` or `ablations/post_norm`.

    A path that begins with `configs/` is found from any folder. Raises UserError with the names.
    """
    path = Path(name)
    below = path.relative_to("configs") if path.parts[:1] == ("configs",) else path
    for candidate in (path, CONFIGS / below, CONFIGS / f"{below}.py"):
        if candidate.is_file():
            return candidate
    names = sorted(str(p.relative_to(CONFIGS).with_suffix("")) for p in CONFIGS.rglob("*.py"))
    raise UserError(
        f"config file {str(name)!r} does not exist; give a file, or one of {', '.join(names)}"
    )


def from_option(option: str, overrides: list[str]) -> config_dict.ConfigDict:
    """The config of `--config=FILE[:ARGS]` with `--config.field=value` overrides, locked."""
    name, _, arg = option.partition(":")
    return override(load(name, arg), overrides)


def load(name: str | Path, arg: str = "") -> config_dict.ConfigDict:
    """The config that a file (see `find`) makes of `arg`. Raises UserError with file and line."""
    path = find(name)
    spec = importlib.util.spec_from_file_location(f"config_{path.stem}", path)
    if spec is None or spec.loader is None:
        raise UserError(f"config file {path} is not a Python file")
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
        config = module.get_config(arg) if arg else module.get_config()
    except UserError:
        raise
    except Exception as error:  # whatever a person's file may raise
        raise UserError(f"config file {_where(path, error)}: {_what(error)}") from None
    if not isinstance(config, config_dict.ConfigDict):
        raise UserError(
            f"config file {path}: get_config returns {type(config).__name__}, "
            "it must return an ml_collections ConfigDict"
        )
    return config.lock()


def parent(file: str, name: str, arg: str = "") -> config_dict.ConfigDict:
    """The config `name`, a path relative to `file`, unlocked for changes of existing fields."""
    return load(Path(file).resolve().parent / name, arg)


def arguments(arg: str, names: tuple[str, ...] = (), **values: Any) -> dict[str, Any]:
    """Takes `name,key=value` apart: names become True or False, values take their default's type.

    Raises UserError on anything else.
    """
    values_of: dict[str, Any] = {name: False for name in names} | values
    for item in filter(None, arg.split(",")):
        key, has_value, text = item.partition("=")
        if not has_value and key in names:
            values_of[key] = True
        elif has_value and key in values:
            kind = type(values[key])
            try:
                values_of[key] = kind(text)
            except ValueError:
                raise UserError(
                    f"config argument {key}={text} is not of type {kind.__name__}"
                ) from None
        else:
            allowed = [*names, *(f"{key}=" for key in values)]
            raise UserError(
                f"config argument {item!r} is unknown; there are {', '.join(allowed) or 'none'}"
            )
    return values_of


def override(config: config_dict.ConfigDict, options: list[str]) -> config_dict.ConfigDict:
    """Applies `--config.field=value` options, each checked against the type of its field."""
    from absl import flags
    from ml_collections import config_flags

    kinds = []
    for option in options:
        field = option.lstrip("-").partition("=")[0]
        if not option.startswith("--") or not field.startswith("config."):
            raise UserError(f"option {option!r} is unknown; fields are set by --config.field=value")
        value = _value(config, field)
        kinds.append(f"{field} is {type(value).__name__}, such as {value!r}")
        if "=" not in option:
            raise UserError(f"option {option!r} has no value; write {option}=VALUE")
    argv = ["esm1nv", *options]
    values = flags.FlagValues()
    try:
        config_flags.DEFINE_config_dict("config", config, flag_values=values, sys_argv=argv)
        values(argv)
    except (flags.Error, TypeError, ValueError) as error:
        raise UserError(f"{_what(error)}; {'; '.join(kinds)}") from None
    return values.config.lock()


def _value(config, field: str) -> Any:
    """The value of a field. Raises UserError where there is none, or it is a group."""
    node, seen = config, "config"
    for name in field.split(".")[1:]:
        if not isinstance(node, config_dict.ConfigDict) or name not in node:
            known = ", ".join(node) if isinstance(node, config_dict.ConfigDict) else "no fields"
            raise UserError(f"config has no field {field}; {seen} has {known}")
        node, seen = node[name], f"{seen}.{name}"
    if isinstance(node, config_dict.ConfigDict):
        raise UserError(f"{field} is a group; set one of {', '.join(node)}")
    return node


def flat(config: config_dict.ConfigDict | dict, prefix: str = "") -> dict[str, Any]:
    """Every field under its dotted name."""
    fields: dict[str, Any] = {}
    for name, value in config.items():
        if hasattr(value, "items"):
            fields |= flat(value, f"{prefix}{name}.")
        else:
            fields[prefix + name] = value
    return fields


def to_json(config: config_dict.ConfigDict) -> str:
    return json.dumps(config.to_dict(), indent=1, sort_keys=True)


def _what(error: Exception) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def _where(path: Path, error: Exception) -> str:
    if isinstance(error, SyntaxError) and error.lineno:
        return f"{error.filename}, line {error.lineno}"
    lines = [f.lineno for f in traceback.extract_tb(error.__traceback__) if f.filename == str(path)]
    return f"{path}, line {lines[-1]}" if lines else str(path)
