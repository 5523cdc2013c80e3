"""Documents are held against the repository: links, paths, commands with their options, fields."""

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from esm1nv_jax.cli import VERBS
from esm1nv_jax.common import config_file
from esm1nv_jax.data.splits import NAMES
from esm1nv_jax.model.encoder import EncoderConfig, parameter_count
from esm1nv_jax.training.run_config import RunConfig
from esm1nv_jax.training.tuning import FinetuneConfig

ROOT = Path(__file__).parents[1]
PAGES = [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), ROOT / "benchmarks/README.md"]
# What shows commands: the pages, configs, launchers and benchmarks.
SHOWING = [
    *PAGES,
    *ROOT.glob("configs/**/*.*"),
    *ROOT.glob("launch/*"),
    *ROOT.glob("benchmarks/*.*"),
]
TEXTS = {
    path: path.read_text(encoding="utf-8") for path in SHOWING if "__pycache__" not in path.parts
}
COMMAND = re.compile(
    r"(?:\besm1nv|-m esm1nv_jax) (?P<verb>[a-z]+)\b(?P<of_verb>[^\n`|;&]*)"
    r"|-m esm1nv_jax\.main\b(?P<of_train>[^\n`|;&]*)"
    r"|\bpython (?P<script>(?:benchmarks|tests)/\w+\.py)(?P<of_script>[^\n`|;&]*)"
)
# Folders of the repository; the package's own are shown without its name.
PATH = re.compile(
    r"(?<![\w./*-])(?:esm1nv_jax|benchmarks|configs|docs|launch|notebooks|tests|cli|common|data|model"
    r"|checkpoints|interchange|training|inference|planning)/[\w/]*\w\.(?:py|sh|md|txt|sbatch|yaml|png)\b"
)


def slug(heading: str) -> str:
    """The anchor that GitHub gives a heading."""
    return re.sub(r"[^\w\- ]", "", heading.strip().lower().replace("`", "")).replace(" ", "-")


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_links_of_a_page_lead_somewhere(page):
    text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    links = re.findall(r"\]\(([^)\s]+)\)", text) + re.findall(r"^\[\w+\]: (\S+)", text, re.M)
    for link in links:
        if link.startswith("http"):
            continue
        name, _, anchor = link.partition("#")
        target = page.parent / name if name else page
        assert target.exists(), link
        if anchor:
            headings = re.findall(r"^#+ (.+)$", target.read_text(encoding="utf-8"), re.M)
            assert anchor in map(slug, headings), link


def test_files_that_are_named_exist():
    missing = {
        (path.name, name)
        for path, text in TEXTS.items()
        for name in PATH.findall(text)
        if not (ROOT / name).exists() and not (ROOT / "esm1nv_jax" / name).exists()
    }
    assert missing == set()


def options_of(module: str) -> set[str]:
    """The options that a command's module, or a script, declares."""
    source = (ROOT / module).read_text(encoding="utf-8")
    options = set(re.findall(r'"--([a-z-]+)"', source))
    if "fasta_job.add_arguments" in source:
        options |= options_of("esm1nv_jax/inference/fasta_job.py")
    if 'f"--{name}"' in source:  # prepare: the sizes of splits
        options |= set(NAMES[1:])
    return options | {"help"}


def shown_commands() -> list[tuple[str, str, str]]:
    """(file, module or script, arguments) of every command that is shown."""
    found = []
    for path, text in TEXTS.items():
        joined = re.sub(r"\\\\?\n\s*#?", " ", text)
        for match in COMMAND.finditer(joined):
            if verb := match["verb"]:
                if verb not in VERBS:
                    assert match["of_verb"].find("--") < 0, f"{path.name}: {match[0]}"
                    continue
                module = VERBS[verb][0].replace(".", "/") + ".py"
                found.append((path.name, module, match["of_verb"]))
            elif match["script"]:
                found.append((path.name, match["script"], match["of_script"]))
            else:
                found.append((path.name, "esm1nv_jax/main.py", match["of_train"]))
    return found


def test_commands_have_the_options_that_are_shown():
    commands = shown_commands()
    assert len(commands) > 100
    unknown = {
        (file, module, option)
        for file, module, arguments in commands
        for option in re.findall(r"(?<![\w-])--([a-z][a-z_-]*)\b(?!\.)", arguments)
        if option.replace("_", "-") not in options_of(module)
    }
    assert unknown == set()


def test_fields_that_are_set_exist():
    fields = set(config_file.flat(config_file.load("pretrain_small", "")))
    fields |= {f"finetune.{name}" for name in FinetuneConfig.__dataclass_fields__}
    unknown = {
        (path.name, name)
        for path, text in TEXTS.items()
        for name in re.findall(r"--config\.([a-z_0-9.]+)=", text)
        if name not in fields | {"field"}  # stands for any
    }
    assert unknown == set()


def test_the_config_that_is_shown_is_one(tmp_path):
    (code,) = re.findall(r"```python\n(.*?)```", TEXTS[ROOT / "docs/configs.md"], re.DOTALL)
    (tmp_path / "wide.py").write_text(code, encoding="utf-8")
    shutil.copy(ROOT / "configs/pretrain_small.py", tmp_path)
    config = RunConfig.from_config_dict(config_file.load(tmp_path / "wide.py", "steps=2000"))
    sizes = [parameter_count(x) for x in (config.model, EncoderConfig())]
    assert 0.95 < sizes[0] / sizes[1] < 1.05
    assert config.steps == config.optimizer.horizon == 2000


def test_every_benchmark_stands_in_the_readme():
    text = TEXTS[ROOT / "benchmarks/README.md"]
    files = [path.name for path in ROOT.glob("benchmarks/*.*") if path.name != "README.md"]
    assert [name for name in files if f"`{name}`" not in text] == []


@pytest.fixture
def run_all(tmp_path):
    """Runs benchmarks/all.sh with stand-ins for its programs; those that match FAIL end badly."""
    stand_in = (
        '#!/bin/sh\necho "$0 $*" >>"$CALLS"\nif echo "$*" | grep -qE "$FAIL"; then exit 3; fi\n'
    )
    for name in ("python", "esm1nv"):
        (tmp_path / "bin").mkdir(exist_ok=True)
        (tmp_path / "bin" / name).write_text(stand_in, encoding="utf-8")
        (tmp_path / "bin" / name).chmod(0o755)

    def run(*names: str, fail: str = "nothing") -> tuple[int, str, list[str]]:
        calls = tmp_path / "calls"
        calls.write_text("", encoding="utf-8")
        environment = {"PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}", "CALLS": str(calls)}
        done = subprocess.run(
            ["bash", ROOT / "benchmarks/all.sh", tmp_path, tmp_path, tmp_path / "out", *names],
            env=os.environ | environment | {"FAIL": fail},
            capture_output=True,
            text=True,
        )
        lines = calls.read_text(encoding="utf-8").splitlines()
        return done.returncode, done.stdout + done.stderr, [x for x in lines if "pip list" not in x]

    return run


def test_all_benchmarks_run_one_by_one_past_a_failure_and_only_once(run_all):
    status, text, calls = run_all("startup", "loop", "input", fail="loop.py")
    assert status == 1 and "loop: failed with status 3" in text
    scripts = [re.search(r"benchmarks/(\w+)\.py|esm1nv (prepare)", call) for call in calls]
    assert [match[1] or match[2] for match in scripts] == ["startup", "loop", "prepare", "input"]
    status, text, calls = run_all("startup", "loop", "input")
    assert status == 0 and "startup: done before" in text
    assert len(calls) == 1 and "loop.py --json" in calls[0]


def test_an_unknown_benchmark_is_a_mistake(run_all):
    status, text, calls = run_all("embd")
    assert status == 2 and "there is no embd; there are" in text and calls == []
