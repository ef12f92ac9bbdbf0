"""``cluster/slurm.sh`` on a Slurm of one node, from Debian's packages: slurmctld, slurmd, slurm-client and munge.

It runs in namespaces of its own: `ray symmetric-run` ends with `ray stop`, which ends every Ray process that it sees.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from jobs import REWARDS

from rlhf_dist.observability.metrics import read_metrics

ROOT = Path(__file__).parents[2]
TOOLS = ("slurmctld", "slurmd", "sbatch", "munged", "unshare", "nsenter", "ip")
missing = [tool for tool in TOOLS if shutil.which(tool) is None]

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(bool(missing), reason=f"not installed: {', '.join(missing)}"),
    pytest.mark.skipif(os.geteuid() != 0, reason="daemons of Slurm and namespaces need root"),
]

ADDRESS = "10.88.0.1"
CONFIG = """
ClusterName=one
SlurmctldHost={host}({address})
AuthType=auth/munge
AuthInfo=socket={folder}/munge/socket
SlurmUser=root
SlurmdUser=root
StateSaveLocation={folder}/slurmctld
SlurmdSpoolDir={folder}/slurmd
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
MpiDefault=none
NodeName={host} NodeAddr={address} CPUs=2 State=UNKNOWN
PartitionName=all Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""
# An address beside loopback: without one, getaddrinfo finds no name. Bash stays, since the first process of a process
# namespace has to reap what others leave.
DAEMONS = """
set -e
ip link set lo up
ip link add eth0 type veth peer name other
ip address add {address}/24 dev eth0
ip link set eth0 up
ip link set other up
cd {folder}/munge
head -c 1024 /dev/urandom >key
chmod 400 key
munged --force --socket=$PWD/socket --key-file=$PWD/key --pid-file=$PWD/pid --log-file=$PWD/log --seed-file=$PWD/seed
slurmctld
slurmd
sleep infinity & wait
"""


class Slurm:
    """Daemons in a network and a process tree of their own, and commands for them."""

    def __init__(self) -> None:
        # Sockets lie in here, whose paths must stay below 108 characters.
        self.folder = Path(tempfile.mkdtemp(prefix="slurm", dir="/tmp"))
        for name in ("slurmctld", "slurmd", "munge", "ray"):
            (self.folder / name).mkdir(mode=0o700)
        names = {"host": socket.gethostname().split(".")[0], "address": ADDRESS, "folder": self.folder}
        (self.folder / "slurm.conf").write_text(CONFIG.format(**names))
        self.environment = {
            **os.environ,
            "SLURM_CONF": str(self.folder / "slurm.conf"),
            "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
            "PYTHONPATH": str(ROOT),
            "RAY_TMPDIR": str(self.folder / "ray"),
            "COLUMNS": "1000",
        }
        self.log = open(self.folder / "start.log", "w")  # noqa: SIM115
        apart = ["unshare", "--net", "--pid", "--fork", "--kill-child", "--mount-proc"]
        self.process = subprocess.Popen(
            [*apart, "bash", "-c", DAEMONS.format(**names)],
            env=self.environment,
            stdout=self.log,
            stderr=subprocess.STDOUT,
        )
        deadline = time.monotonic() + 60
        while "idle" not in self("sinfo", "--noheader", "--format=%T", check=False):
            assert self.process.poll() is None, (self.folder / "start.log").read_text()
            assert time.monotonic() < deadline, (self.folder / "slurmctld.log").read_text()
            time.sleep(0.5)

    def __call__(self, *command: str, cwd: Path | None = None, check: bool = True) -> str:
        """The output of a command among the daemons."""
        inner = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text().split()
        if not inner and not check:
            return ""
        enter = ["nsenter", "--net", "--pid", "--mount", f"--target={inner[0]}", f"--wd={cwd or self.folder}"]
        done = subprocess.run(
            [*enter, *command], env=self.environment, capture_output=True, text=True, timeout=60, check=False
        )
        assert not check or done.returncode == 0, done.stderr
        return done.stdout

    def submit(self, place: Path, *arguments: str) -> str:
        """The id of a job that writes to ``place/slurm.log``."""
        script = [f"--output={place / 'slurm.log'}", str(ROOT / "cluster" / "slurm.sh")]
        return self("sbatch", "--parsable", *script, *arguments, cwd=place).strip()

    def about(self, job: str, key: str) -> str:
        found = re.search(rf"\b{key}=(\S+)", self("scontrol", "show", "job", job))
        assert found is not None, key
        return found[1]

    def wait(self, job: str, *states: str, seconds: float = 300) -> str:
        deadline = time.monotonic() + seconds
        while (state := self.about(job, "JobState")) not in states:
            assert time.monotonic() < deadline, state
            time.sleep(0.5)
        return state

    def close(self) -> None:
        """End all of it; what the process namespace holds goes with its first process."""
        self.process.kill()
        self.process.wait()
        self.log.close()
        shutil.rmtree(self.folder, ignore_errors=True)


@pytest.fixture(scope="module")
def slurm() -> Iterator[Slurm]:
    slurm = Slurm()
    yield slurm
    slurm.close()


@pytest.fixture
def place(tmp_path: Path) -> Path:
    (tmp_path / "my_rewards.py").write_text(REWARDS)
    return tmp_path


def test_a_job_saves_before_its_time_limit_and_goes_on_when_it_is_queued_again(
    slurm: Slurm, place: Path, config: str
) -> None:
    runs, log = place / "runs", place / "slurm.log"
    keys = ["train.steps=400", "run.checkpoint_every=100", "policy.optim.lr=1e-5"]
    job = slurm.submit(place, "--config", config, f"run.root={runs}", "run.name=first", *keys)
    deadline = time.monotonic() + 200
    while not any(r["step"] >= 2 for r in read_metrics(runs / "first" / "metrics.jsonl")):
        assert slurm.about(job, "JobState") in ("PENDING", "RUNNING"), log.read_text()
        assert time.monotonic() < deadline, log.read_text()
        time.sleep(0.5)
    (token,) = runs.glob(".ray-token-*")
    assert token.stat().st_mode & 0o777 == 0o600
    secret = token.read_text().strip()

    # What Slurm does by itself --signal seconds before the limit.
    slurm("scancel", "--batch", "--signal=USR1", job)
    slurm.wait(job, "PENDING")
    saved = max(int(p.parent.name.split("_")[1]) for p in (runs / "first" / "checkpoints").glob("step_*/manifest.json"))
    assert saved % 100, "not one that was due"
    assert json.loads((runs / "first" / "summary.json").read_text())["status"] == "interrupted"
    assert not token.exists()

    # Slurm lets a job that is queued again wait for two minutes; not here. It ends by scancel, which queues nothing.
    slurm("scontrol", "update", f"jobid={job}", "StartTime=now")
    deadline = time.monotonic() + 200
    while not any(r["step"] > saved for r in read_metrics(runs / "first" / "metrics.jsonl")):
        assert slurm.about(job, "JobState") in ("PENDING", "RUNNING", "COMPLETING"), log.read_text()
        assert time.monotonic() < deadline, log.read_text()
        time.sleep(0.5)
    slurm("scancel", "--batch", "--signal=TERM", job)
    assert slurm.wait(job, "COMPLETED", "FAILED", "CANCELLED") == "FAILED"
    assert slurm.about(job, "ExitCode") == "130:0"
    text = log.read_text()
    assert "start 1: nodes" in text
    assert "start 2: nodes" in text
    assert "which is gone on with" in text
    assert text.splitlines()[-1] == "the program ended with exit status 130"
    written = [file for file in runs.rglob("*") if file.is_file()]
    assert not [file for file in [*written, log] if secret.encode() in file.read_bytes()]


def test_a_mistake_is_the_exit_code_of_the_job(slurm: Slurm, place: Path, config: str) -> None:
    arguments = ["--config", config, f"run.root={place / 'runs'}", "run.name=broken"]
    job = slurm.submit(place, *arguments, "reward.components=[{name: broken, function: 'my_rewards:broken'}]")
    assert slurm.wait(job, "COMPLETED", "FAILED") == "FAILED"
    assert slurm.about(job, "ExitCode") == "2:0", (place / "slurm.log").read_text()
    assert "no such family" in (place / "slurm.log").read_text()
