"""What a person gets wrong is answered with one line and status 2, before anything is written."""

import dataclasses
import errno
import os
import subprocess
import sys

import pytest
from etils import epath

from esm1nv_jax.checkpoints import step_folder
from esm1nv_jax.common import config_file, files
from esm1nv_jax.common.errors import UserError
from esm1nv_jax.training import summary
from esm1nv_jax.training.run_config import MINIMUM, RunConfig
from esm1nv_jax.training.workdir import write_or_check_config
from tests.training import processes

SYNTAX = "def get_config(:\n"
RAISES = "def get_config(arg=''):\n    x = 1\n    return {}['layers']\n"
NOT_CONFIG = "def get_config(arg=''):\n    return {}\n"
NULL = "\0"
try:
    compile(NULL, "mine.py", "exec")
except (SyntaxError, ValueError) as error:  # the latter until Python 3.11.3
    OF_NULL = f"mine.py: {type(error).__name__}: {error}"
FROM_NOTHING = """from ml_collections import config_dict
def get_config(arg=""):
    return config_dict.ConfigDict({"seed": 0})
"""
FIELD_TOO_MANY = f"""from esm1nv_jax.common.config_file import parent
def get_config(arg=""):
    config = parent("/", "{processes.TINY}").unlock()
    config.model.depth = 3
    return config
"""


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--config.model.width=1000000000001"], "heads may be 1"),
        (["--config.model.heads=3"], "model.heads=3 does not divide model.width=16"),
        (["--config.modle.heads=4"], "config has no field config.modle.heads; config has batch"),
        (["--config.model.head=4"], "config.model has attention_dropout, bare_head"),
        (["--config.model.width=wide"], "config.model.width is int, such as 16"),
        (["--config.model=4"], "config.model is a group; set one of attention_dropout"),
        (["--config.steps"], "no value"),
        (["--conf.steps=4"], "unknown"),
        (["--config.steps=0"], "steps=0 must be at least 1"),
        (["--config.data.max_residues=100"], "set data.max_residues to at most 62"),
        (["--config.data.row_length=32"], "max_residues is 62"),
        (["--config.data.path="], "esm1nv prepare"),
        (["--config.data.path=/nowhere"], "/nowhere"),
        (["--config.batch.rows=7", "--config.batch.microbatches=2"], "take 8"),
        (["--config.masking.recipe=bert"], "card, shipped"),
        (["--config.compute.dtype=int8"], "float32, bfloat16"),
        (
            ["--config.compute.residual_dtype=float16"],
            "compute.residual_dtype='float16' is unknown",
        ),
        (["--config.platform=gpu"], "found 0 such devices"),
        (["--config.platform=cray"], "auto, cpu, gpu, tpu"),
        (["--config.init_from=/nowhere"], "/nowhere does not exist"),
        (["--config.profile=often"], "--config.profile=20-24"),
        (["--config.profile=5-3"], "names no steps"),
        (["--config.optimizer.warmup=5000"], "optimizer.horizon=1000"),
        (["--config.optimizer.warmup=1.5"], "warmup=1.5 is neither whole nor a share of steps"),
        (["--config.optimizer.weight_decay=nan"], "weight_decay=nan is not a finite number"),
        (["--config.optimizer.peak_lr=inf"], "optimizer.peak_lr=inf is not a finite number"),
        (["--config.optimizer.horizon=1e300"], "horizon=1e+300 must be at most 2147483647"),
        ([f"--config.steps={1 << 31}"], "steps=2147483648 must be at most 2147483647"),
        (["--config.data.workers=1000000"], "data.workers=1000000 must be at most 1000"),
        (["--config.minutes=-1"], "minutes=-1.0 must be at least 0"),
        (["--config.fork_from=/nowhere"], "is no run with checkpoints"),
        (["--config.fork_from=/a", "--config.init_from=/b"], "exclude each other"),
        (["--config.optimizer.epsilon=0"], "optimizer.epsilon=0.0 must be above 0"),
        (["--config.model.norm_epsilon=0"], "model.norm_epsilon=0.0 must be above 0"),
        (["--config.skip_nonfinite=-1"], "skip_nonfinite=-1 must be at least 0"),
        ([f"--config.seed={1 << 63}"], "must lie in 0..2**63 - 1"),
        ([f"--config.data.path={__file__}"], "is a file, not a data set"),
        (["--config.data.sample=one_per_group"], "prepare it with --groups"),
    ],
)
def test_of_options(tmp_path, train_here, options, words):
    assert_refused(train_here(f"--workdir={tmp_path / 'run'}", *options), words)
    assert not (tmp_path / "run" / "config.json").exists()


@pytest.mark.parametrize(
    "options",
    [
        ["--config.model.width=1000000000001", "--config.model.heads=1"],
        ["--config.model.layers=1000000000"],
        ["--config.model.ffn=1000000000000"],
        ["--config.model.positions=1000000000000"],
        ["--config.batch.rows=1000000000"],
        ["--config.data.row_length=1000000000000"],
        ["--config.batch.rows=0", "--config.batch.sequences_per_device=1000000000"],
    ],
)
def test_of_sizes_that_no_device_holds(tmp_path, train_here, options):
    assert_refused(train_here(f"--workdir={tmp_path / 'run'}", *options), "GiB a device (")
    assert not (tmp_path / "run" / "config.json").exists()


def test_in_a_process_of_its_own(tmp_path):
    options = (f"--workdir={tmp_path / 'run'}", "--config.model.heads=3")
    assert_refused(processes.run(*options), "model.heads=3 does not divide model.width=16")


@pytest.mark.parametrize("name", MINIMUM)
def test_of_numbers_that_are_too_small(name):
    least = MINIMUM[name]
    config = config_file.load(processes.TINY)
    RunConfig.from_config_dict(config_file.override(config, [f"--config.{name}={least}"]))
    with pytest.raises(UserError, match=f"{name}={least - 1} must be at least {least}"):
        RunConfig.from_config_dict(config_file.override(config, [f"--config.{name}={least - 1}"]))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (SYNTAX, "line 1: SyntaxError"),
        (NULL, OF_NULL),
        (RAISES, "line 3: KeyError"),
        (NOT_CONFIG, "ConfigDict"),
        (FROM_NOTHING, "no field config.steps; build it on configs/pretrain_small.py"),
        (FIELD_TOO_MANY, "no field config.model.depth; config.model has layers, width"),
    ],
)
def test_of_a_config_file(tmp_path, train_here, text, words):
    path = tmp_path / "mine.py"
    path.write_text(text)
    assert_refused(train_here(config=path), words)


def test_of_a_missing_config_and_unknown_arguments(train_here):
    assert_refused(train_here(config="configs/nothing.py"), "'configs/nothing.py' does not exist")
    for folder in ("", ".", "configs", "/", ":hf"):
        with pytest.raises(UserError, match=r"does not exist; give a file, or one of .*quickstart"):
            config_file.from_option(folder, [])
    assert_refused(train_here(config=f"{processes.TINY}:stpes=3"), "steps=")
    assert_refused(train_here(config=f"{processes.TINY}:steps=three"), "not of type int")


def test_of_a_workdir_that_cannot_be_written(tmp_path, train_here):
    (tmp_path / "file").write_text("")
    assert_refused(train_here(f"--workdir={tmp_path / 'file' / 'run'}"), "cannot be written")
    assert_refused(train_here(f"--workdir={tmp_path / 'run[1]'}"), "has one of [ * ? in its path")
    assert not (tmp_path / "run[1]").exists()
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "config.json").write_text("not json")
    assert_refused(train_here(f"--workdir={tmp_path / 'other'}"), "not readable as JSON")


@pytest.mark.parametrize("file", [{"model.json": "{}"}, {"config.json": '{"model_type": "esm"}'}])
def test_of_a_workdir_that_is_a_model(tmp_path, train_here, file):
    """Whatever was trained there, `--checkpoint` would open the model and not the run."""
    ((name, text),) = file.items()
    (tmp_path / name).write_text(text)
    assert_refused(train_here(f"--workdir={tmp_path}"), "holds a model, which every command would")
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_full_size_config_without_data_says_how_to_make_one(train_here):
    assert_refused(train_here(config="configs/pretrain_small.py"), "esm1nv prepare --fasta")


def test_configs_work_from_any_folder(tmp_path):
    process = processes.run("--config.model.heads=3", config=processes.TINY, cwd=tmp_path)
    assert_refused(process, "model.heads=3")


def test_the_table_of_verbs_is_quick_and_unknown_verbs_are_named():
    call = [sys.executable, "-X", "importtime", "-m", "esm1nv_jax", "--help"]
    process = subprocess.run(
        call, env=processes.environment(), cwd=processes.ROOT, capture_output=True, text=True
    )
    assert process.returncode == 0 and "usage: esm1nv VERB" in process.stdout
    heavy = {"jax", "flax", "numpy", "orbax", "grain", "rich", "matplotlib"}
    imported = {line.split("|")[-1].strip() for line in process.stderr.splitlines()}
    assert not heavy & imported
    unknown = subprocess.run(
        [sys.executable, "-m", "esm1nv_jax", "trian"],
        env=processes.environment(),
        cwd=processes.ROOT,
        capture_output=True,
        text=True,
    )
    assert_refused(unknown, "no verb 'trian'; there are ")


def assert_refused(process, words):
    """Status 2 and one line that holds `words`."""
    assert process.returncode == 2, (process.returncode, process.stderr)
    errors = process.stderr.strip().splitlines()
    assert len(errors) == 1, process.stderr
    assert errors[0].startswith("error: ") and words in errors[0], errors[0]


def test_other_training_data_leave_the_folder_as_it_was(tmp_path, monkeypatch):
    config = RunConfig.from_config_dict(config_file.load(str(processes.TINY)))
    folder = epath.Path(tmp_path)
    write_or_check_config(folder, config, {"train": "aa", "validation": "v"})
    write_or_check_config(folder, config, {"train": "bb", "validation": "v"})  # nothing learned yet
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    monkeypatch.setattr(step_folder, "steps", lambda run: [4])
    elsewhere = dataclasses.replace(config, data=dataclasses.replace(config.data, path="other"))
    with pytest.raises(UserError, match="not the one this run began with"):
        write_or_check_config(folder, elsewhere, {"train": "aa", "validation": "v"})
    with pytest.raises(UserError, match="the validation split is not the one this run began with"):
        write_or_check_config(folder, elsewhere, {"train": "bb", "validation": "w"})
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
    write_or_check_config(folder, elsewhere, {"train": "bb", "validation": "v"})


@pytest.mark.integration
def test_a_disk_that_fills_up_at_the_very_end_costs_no_finished_run(
    tmp_path, train_here, monkeypatch
):
    write = files.write_atomically

    def full(path, text):
        if path.name == summary.BASELINES:
            raise OSError(errno.ENOSPC, "No space left on device")
        write(path, text)

    monkeypatch.setattr(files, "write_atomically", full)
    done = train_here(f"--workdir={tmp_path / 'run'}", "--config.steps=4")
    assert done.returncode == 0 and "composition of each protein" in done.stderr


@pytest.mark.integration
def test_a_start_on_a_full_disk_is_one_line(tmp_path, train_here):
    call = ["mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", str(tmp_path)]
    if os.getuid() or subprocess.run(call, capture_output=True).returncode:
        pytest.skip("a small disk can only be mounted by root")
    try:
        options = (f"--workdir={tmp_path / 'run'}", "--config.steps=4")
        for file in ("data.json", "config.json"):  # of a new run, and of one that goes on
            with pytest.raises(OSError), open(tmp_path / "ballast", "wb", buffering=0) as ballast:
                while True:
                    ballast.write(b"x" * 4096)
            assert_refused(train_here(*options), f"no space left to write {tmp_path}/run/{file}")
            (tmp_path / "ballast").unlink()
            assert train_here(*options).returncode == 0
    finally:
        subprocess.run(["umount", "-l", str(tmp_path)], check=True)
