"""A Slurm of one node with a configuration of its own, started and stopped by tests."""

import os
import shutil
import signal
import socket
import subprocess
import time
from pathlib import Path

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol", "scancel")
ALIVE = ("PENDING", "CONFIGURING", "RUNNING", "COMPLETING", "REQUEUED")
PATH = f"{os.environ['PATH']}:/usr/sbin:/sbin"
CONFIG = """
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ctld_port}
SlurmdPort={d_port}
SlurmUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
ReturnToService=2
MpiDefault=none
MinJobAge=300
KillWait=5
SlurmdParameters=config_overrides
SchedulerParameters=batch_sched_delay=0,sched_interval=2
JobRequeue=1
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.log
NodeName={host} NodeAddr=127.0.0.1 CPUs=4 State=UNKNOWN
PartitionName=all Nodes={host} Default=YES MaxTime=INFINITE State=UP
"""


def missing() -> str:
    """Why no Slurm can be started here; empty where one can."""
    absent = [name for name in PROGRAMS if not shutil.which(name, path=PATH)]
    if absent:
        return f"{', '.join(absent)} not installed (apt-get install slurm-wlm munge)"
    return "" if os.getuid() == 0 else "slurmd wants to be root"


class Slurm:
    """The daemons munged, slurmctld and slurmd, while open; all they write lies in `folder`."""

    def __init__(self, folder: Path):
        self.folder, self.host = folder, socket.gethostname()
        self.env = os.environ | {"SLURM_CONF": f"{folder}/slurm.conf", "PATH": PATH}

    def __enter__(self) -> "Slurm":
        self.daemons = []
        try:
            self._start_all()
        except BaseException:
            self.__exit__()
            raise
        return self

    def _start_all(self) -> None:
        for name in ("state", "spool"):
            (self.folder / name).mkdir()
        self.folder.chmod(0o755)
        key = self.folder / "munge.key"
        key.write_bytes(os.urandom(128))
        key.chmod(0o400)
        text = CONFIG.format(
            host=self.host, folder=self.folder, ctld_port=free_port(), d_port=free_port()
        )
        (self.folder / "slurm.conf").write_text(text.lstrip())
        files = {
            "key-file": "munge.key",
            "socket": "munge.socket",
            "pid-file": "munge.pid",
            "log-file": "munge.log",
            "seed-file": "munge.seed",
        }
        self._start(
            "munged",
            "--foreground",
            "--force",
            *(f"--{option}={self.folder}/{file}" for option, file in files.items()),
        )
        self._until(lambda: (self.folder / "munge.socket").exists(), "munge's socket")
        self._start("slurmctld", "-D")
        self._start("slurmd", "-D")
        self._until(lambda: "idle" in self.call("sinfo", "-h", "-o", "%T", check=False), "a node")

    def __exit__(self, *_) -> None:
        self.call("scancel", "--full", "--signal=KILL", "-u", "root", check=False)
        for daemon in reversed(self.daemons):
            daemon.send_signal(signal.SIGTERM)
            try:
                daemon.wait(20)
            except subprocess.TimeoutExpired:
                daemon.kill()

    def _start(self, *command: str) -> None:
        with (self.folder / f"{command[0]}.out").open("w") as out:
            self.daemons.append(
                subprocess.Popen(command, env=self.env, stdout=out, stderr=subprocess.STDOUT)
            )

    def _until(self, ready, what: str, seconds: float = 60) -> None:
        end = time.monotonic() + seconds
        while not ready():
            if time.monotonic() > end:
                logs = [path.read_text()[-1000:] for path in self.folder.glob("*.out")]
                raise AssertionError(f"no {what} after {seconds} s: {logs}")
            time.sleep(0.2)

    def call(self, *command: str, check: bool = True, **env: str) -> str:
        done = subprocess.run(
            command,
            env=self.env | env,
            cwd=Path(__file__).parents[2],
            capture_output=True,
            text=True,
        )
        assert not check or done.returncode == 0, (command, done.stdout, done.stderr)
        return done.stdout

    def state(self, job: str) -> str:
        """PENDING, RUNNING, COMPLETED, ..."""
        shown = self.call("scontrol", "show", "job", job)
        return next(word[9:] for word in shown.split() if word.startswith("JobState="))

    def until(self, job: str, ready, seconds: float = 900, log: Path | None = None) -> None:
        """Waits for a state of the job; `log` is shown should the job come to an end first."""

        def wanted() -> bool:
            state = self.state(job)
            if ready(state):
                return True
            assert log is None or state in ALIVE, (state, log.read_text()[-3000:])
            return False

        self._until(wanted, f"state of job {job} as wanted", seconds)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
