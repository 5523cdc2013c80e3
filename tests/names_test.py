"""One name, one thing: names of modules and public classes in the package."""

import ast
import collections
import re
from pathlib import Path

PACKAGE = Path(__file__).parents[1] / "esm1nv_jax"
MODULES = [path for path in PACKAGE.rglob("*.py") if not path.stem.startswith("__")]

# Names of earlier modules that said little, or that a better one has replaced.
FORBIDDEN_MODULES = """
archive averaging between checkpoint cluster cluster_watchdog common config configuration curves
dataset doctor downstream encode estimate figures fitness flash folder foreign helpers hosts
keys layout leaves leaving masks metadata misc output page process products program pseudo report
request rows saving scan settings sources spool tally utils weights workers writers
"""


def duplicates(names) -> list[str]:
    return [name for name, times in collections.Counter(names).items() if times > 1]


def test_no_two_modules_share_a_name():
    assert duplicates(path.stem for path in MODULES) == []


def test_no_two_public_classes_share_a_name():
    classes = [
        node.name
        for path in MODULES
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.ClassDef) and not node.name.startswith("_")
    ]
    assert duplicates(classes) == []


def test_no_module_has_a_name_that_was_given_up():
    assert {path.stem for path in MODULES} & set(FORBIDDEN_MODULES.split()) == set()


def test_the_design_names_every_module_and_no_other():
    text = (PACKAGE.parent / "docs/design.md").read_text(encoding="utf-8")
    section = text.partition("## Modules")[2].partition("## Contracts")[0]
    named = {name for name in re.findall(r"`([a-z0-9_]+)`", section) if name != "doctor"}
    assert named == {path.stem for path in MODULES} - {"main", "cli"}
