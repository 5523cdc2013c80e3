"""launch/sweep.sh and sweep.sbatch with an interpreter that only notes what it is asked to do."""

import os
import shutil
import signal
import subprocess
import sys
import time

import pytest

from esm1nv_jax.common import config_file
from tests.training.processes import ROOT

LIST = """
# a comment
seeds 0 1
all width=32 --config.steps=6

baseline pretrain_small
other    ablations/rotary:layers=1 --config.steps=7
"""
NAMES = ["baseline-0", "baseline-1", "other-0", "other-1"]
# Makes the workdir, appends its arguments to `calls`, waits for SIGTERM where there is `RUN.slow`
# (of an evaluation `RUN.slow_evaluation`), and ends with the status in `RUN.status`.
PYTHON = """#!{python}
import os, signal, sys, time
here, arguments = {folder!r}, sys.argv[1:]
slow = ".slow"
if "--checkpoint" in arguments:
    slow = ".slow_evaluation"
    run = arguments[arguments.index("--checkpoint") + 1]
else:
    run = [a for a in arguments if a.startswith("--workdir=")][0].split("=", 1)[1]
    os.makedirs(run, exist_ok=True)
open(here + "/calls", "a").write(" ".join(arguments) + "\\n")
if os.path.exists(here + "/" + os.path.basename(run) + slow):
    def stop(*_):
        time.sleep(0.5)
        open(run + "/saved", "w")
        sys.exit(75)
    signal.signal(signal.SIGTERM, stop)
    open(run + "/started", "w")
    time.sleep(600)
path = here + "/" + os.path.basename(run) + ".status"
sys.exit(int(open(path).read()) if os.path.exists(path) else 0)
"""


class Sweep:
    def __init__(self, folder):
        self.folder, self.out = folder, folder / "out"
        (folder / "list.txt").write_text(LIST)
        python = folder / "python"
        python.write_text(PYTHON.format(python=sys.executable, folder=str(folder)))
        python.chmod(0o755)
        scontrol = folder / "scontrol"
        scontrol.write_text(f'#!/bin/sh\necho "$@" >>{folder}/requeued\n')
        scontrol.chmod(0o755)

    def start(self, script="launch/sweep.sh", **env):
        return subprocess.Popen(
            [script, str(self.folder / "list.txt"), str(self.out), "--config.data.path=D"],
            cwd=ROOT,
            start_new_session=True,
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
            env=os.environ
            | {"PYTHON": str(self.folder / "python"), "PATH": f"{self.folder}:{os.environ['PATH']}"}
            | env,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def run(self, **env):
        process = self.start(**env)
        out, err = process.communicate(timeout=60)
        return process.returncode, out, err

    def until_started(self, process):
        deadline = time.monotonic() + 30
        while not (self.out / "baseline-0" / "started").exists():
            assert time.monotonic() < deadline and process.poll() is None
            time.sleep(0.05)

    def calls(self):
        path = self.folder / "calls"
        lines = path.read_text().splitlines() if path.exists() else []
        path.unlink(missing_ok=True)
        return lines


@pytest.fixture
def sweep(tmp_path):
    return Sweep(tmp_path)


def test_every_config_runs_with_every_seed_once(sweep):
    status, out, err = sweep.run()
    assert status == 0, err
    assert f"esm1nv compare {sweep.out}" in out
    assert sweep.calls() == [
        "-m esm1nv_jax.main --config=pretrain_small:width=32,seed=0 --config.steps=6 "
        f"--workdir={sweep.out}/baseline-0 --config.data.path=D",
        "-m esm1nv_jax.main --config=pretrain_small:width=32,seed=1 --config.steps=6 "
        f"--workdir={sweep.out}/baseline-1 --config.data.path=D",
        "-m esm1nv_jax.main --config=ablations/rotary:width=32,layers=1,seed=0 --config.steps=6 "
        f"--config.steps=7 --workdir={sweep.out}/other-0 --config.data.path=D",
        "-m esm1nv_jax.main --config=ablations/rotary:width=32,layers=1,seed=1 --config.steps=6 "
        f"--config.steps=7 --workdir={sweep.out}/other-1 --config.data.path=D",
    ]
    assert sweep.run()[0] == 0 and sweep.calls() == []


def test_arguments_and_options_of_its_own_win(sweep):
    (sweep.folder / "list.txt").write_text("seeds 0\nall --config.steps=6\na modern:steps=9\n")
    assert sweep.run()[0] == 0
    (line,) = sweep.calls()
    assert line.startswith("-m esm1nv_jax.main --config=modern:,steps=9,seed=0 --config.steps=6 ")
    (sweep.folder / "list.txt").write_text("seeds 0\nall width=32,steps=6\na modern:steps=9\n")
    assert sweep.run()[0] == 0
    (line,) = sweep.calls()
    arguments = line.split()[2].partition(":")[2]
    assert config_file.arguments(arguments, width=0, steps=0, seed=1)["steps"] == 9


def test_runs_are_evaluated_alike(sweep):
    assert sweep.run(EVALUATE="--data D:test --masking card", JOBS="2")[0] == 0
    calls = [line for line in sweep.calls() if "--checkpoint" in line]
    assert sorted(calls) == [
        f"-m esm1nv_jax evaluate --checkpoint {sweep.out}/{name} --data D:test --masking card "
        f"--json {sweep.out}/{name}/evaluation.json"
        for name in NAMES
    ]


def test_results_of_another_command_do_not_stay(sweep):
    assert sweep.run(EVALUATE="--data D:test")[0] == 0
    old = sweep.out / "baseline-0" / "evaluation.json"
    old.touch()
    (sweep.folder / "baseline-0.status").write_text("1")
    assert sweep.run(EVALUATE="--data D:other")[0] == 1 and not old.exists()


def test_a_run_that_fails_is_named_and_tried_again(sweep):
    (sweep.folder / "baseline-1.status").write_text("1")
    status, out, _ = sweep.run()
    assert status == 1 and f"baseline-1: status 1, see {sweep.out}/baseline-1.log" in out
    assert len(sweep.calls()) == 4 and "esm1nv compare" not in out
    (sweep.folder / "baseline-1.status").unlink()
    assert sweep.run()[0] == 0
    (line,) = sweep.calls()
    assert "baseline-1" in line


def test_a_run_that_is_stopped_stops_the_sweep(sweep):
    (sweep.folder / "baseline-1.status").write_text("75")
    status, _, err = sweep.run()
    assert status == 75 and "the same command goes on" in err
    assert len(sweep.calls()) == 2


# A terminal and some schedulers signal every process of the job at once.
@pytest.mark.parametrize("send", [os.kill, os.killpg])
@pytest.mark.parametrize("script", ["launch/sweep.sh", "launch/sweep.sbatch"])
def test_sigterm_reaches_the_run_which_saves(sweep, script, send):
    (sweep.folder / "baseline-0.slow").touch()
    ids = {"SLURM_ARRAY_TASK_ID": "0", "SLURM_ARRAY_JOB_ID": "9"}
    process = sweep.start(script, **ids)
    sweep.until_started(process)
    send(process.pid, signal.SIGTERM)
    assert process.wait(30) == 75
    assert (sweep.out / "baseline-0" / "saved").exists()
    assert len(sweep.calls()) == 1
    if script.endswith("sbatch"):
        assert (sweep.folder / "requeued").read_text() == "requeue 9_0\n"


def test_ctrl_c_ends_a_run_in_start_up_too_and_waits_for_it(sweep):
    """What a script starts in the background ignores Ctrl-C until it asks for it."""
    (sweep.folder / "baseline-0.slow").touch()
    process = sweep.start()
    sweep.until_started(process)
    os.killpg(process.pid, signal.SIGINT)
    assert process.wait(30) == 130
    assert (sweep.out / "baseline-0" / "saved").exists()
    assert len(sweep.calls()) == 1


def test_sigterm_ends_an_evaluation_which_is_done_again(sweep):
    slow = sweep.folder / "baseline-0.slow_evaluation"
    slow.touch()
    process = sweep.start(EVALUATE="--data D:test", ITEM="0")
    sweep.until_started(process)
    os.kill(process.pid, signal.SIGTERM)
    assert process.wait(30) == 75
    slow.unlink()
    assert sweep.run(EVALUATE="--data D:test", ITEM="0")[0] == 0
    assert sum("--checkpoint" in line for line in sweep.calls()) == 2


def test_one_run_alone_and_their_number(sweep):
    assert sweep.run(ITEM="count")[1] == "4\n"
    assert sweep.run(ITEM="2")[0] == 0
    (line,) = sweep.calls()
    assert "other-0" in line
    (sweep.folder / "list.txt").write_text("seeds 0 1 2 3 4 5 6 7 8\na pretrain_small")
    assert sweep.run(ITEM="08")[0] == 0  # no octal number
    (line,) = sweep.calls()
    assert "a-8" in line


def test_the_script_may_be_edited_while_it_runs(sweep):
    script = sweep.folder / "sweep.sh"
    shutil.copy(ROOT / "launch/sweep.sh", script)
    (sweep.folder / "baseline-0.slow").touch()
    process = sweep.start(str(script))
    sweep.until_started(process)
    with script.open("r+", encoding="utf-8") as file:  # in place, as some editors write
        file.write("# another line\n" + script.read_text(encoding="utf-8"))
    os.kill(process.pid, signal.SIGTERM)
    out, err = process.communicate(timeout=30)
    assert process.returncode == 75 and "baseline-0: status 75" in out, err


@pytest.mark.parametrize(
    ("text", "env", "words"),
    [
        ("", {}, "has no runs"),
        ("seeds 0\na pretrain_small\na modern", {}, "a name twice: a-0"),
        ("seeds 0\na/b pretrain_small", {}, "more than letters"),
        ("seeds 0\na", {}, "a has no config"),
        ("a pretrain_small\nseeds 0\nb modern", {}, "a has no seeds"),
        ("seeds\na pretrain_small", {}, "a has no seeds"),
        ("seeds 0-2\na pretrain_small", {}, "seeds '0-2 ' are no numbers"),
        ("seeds 0 1\r\na pretrain_small\r\n", {}, r"seeds $'0 1\r' are no numbers"),
        (LIST, {"JOBS": "0"}, "JOBS=0"),
        (LIST, {"ITEM": "4"}, "ITEM=4 of 4"),
        (LIST, {"ITEM": "x"}, "ITEM=x is no number"),
    ],
)
def test_mistakes_are_one_line(sweep, text, env, words):
    (sweep.folder / "list.txt").write_text(text)
    status, _, err = sweep.run(**env)
    (line,) = err.splitlines()
    assert status == 2 and line.startswith("error: ") and words in line
    assert sweep.calls() == []


@pytest.mark.parametrize("out", ["", "--config.steps=6", "/dev/null/x"])
def test_a_folder_that_cannot_be_made_is_one_line(sweep, out):
    sweep.out = out
    status, shown, err = sweep.run()
    assert (status, shown, err.count("\n")) == (2, "", 1) and "folder" in err
    assert sweep.calls() == []


def test_the_list_of_ablations_names_every_ablation():
    text = (ROOT / "configs/ablations/sweep.txt").read_text()
    lines = [line.split() for line in text.splitlines() if line and line[0] != "#"]
    configs = {line[1] for line in lines if line[0] not in ("seeds", "all")}
    ablations = {f"ablations/{path.stem}" for path in (ROOT / "configs/ablations").glob("*.py")}
    asked_in_reverse = {f"ablations/{name}" for name in ("no_dropout", "rotary", "muon")}
    assert configs == (ablations - asked_in_reverse) | {"pretrain_small", "modern"}
