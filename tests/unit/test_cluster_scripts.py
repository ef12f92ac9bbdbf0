"""The scripts of ``cluster/``: their syntax, and how ``slurm.sh`` deals with Slurm, against stubs of its commands.

``tests/integration/test_slurm.py`` runs it on a real Slurm.
"""

from __future__ import annotations

import os
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SCRIPTS = sorted((ROOT / "cluster").glob("*.sh"))
#: What the script calls. The program is a stub only where it would train; the config is read by the real one.
STUBS = {
    # Runs its command once, as on the first node.
    "srun": 'while [[ $1 == --* ]]; do shift; done; exec "$@"',
    "scontrol": """
case $1 in
    show) tr , '\\n' <<<"$3" ;;
    requeue) echo "$@" >"$TOLD/requeued" ;;
esac""",
    "ray": """
echo "$@" >"$TOLD/ray"
stat -c %a "$RAY_AUTH_TOKEN_PATH" >"$TOLD/mode"
[[ -e $TOLD/no-ray ]] && exit 0  # symmetric-run does so when Ray does not start
while [[ $1 != -- ]]; do shift; done
shift
"$@"
""",
    "python": """
[[ $* == *rlhf_dist.main* && $* != *--print-config* ]] || exec "$PYTHON" "$@"
trap 'touch "$TOLD/saved"; exit 130' TERM
echo "RAY_ADDRESS=$RAY_ADDRESS $*" >"$TOLD/program"
code=$(cat "$TOLD/code" 2>/dev/null) && exit "$code"
for _ in $(seq 600); do sleep 0.1; done
""",
}


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_bash_reads_it(script: Path) -> None:
    checked = subprocess.run(["bash", "-n", script], capture_output=True, text=True, check=False)
    assert checked.returncode == 0, checked.stderr
    assert os.access(script, os.X_OK)


class Allocation:
    """``slurm.sh`` in an allocation of stubs."""

    def __init__(self, folder: Path, hosts: str = "one") -> None:
        self.stubs = folder / "stubs"
        self.notes = folder / "notes"
        self.stubs.mkdir()
        self.notes.mkdir()
        self.runs = folder / "runs"
        for name, body in STUBS.items():
            (self.stubs / name).write_text(f"#!/usr/bin/env bash\n{body.strip()}\n")
            (self.stubs / name).chmod(stat.S_IRWXU)
        self.environment = {
            **os.environ,
            "PATH": f"{self.stubs}{os.pathsep}{os.environ['PATH']}",
            "PYTHON": sys.executable,
            "PYTHONPATH": str(ROOT),
            "TOLD": str(self.notes),
            "SLURM_JOB_ID": "7",
            "SLURM_JOB_NODELIST": hosts,
            "SLURMD_NODENAME": hosts.split(",")[0],
            "SLURM_CPUS_ON_NODE": "4",
            "SLURM_MEM_PER_NODE": "1000",
            "RAY_AUTH_TOKEN": "0123456789abcdef" * 4,
        }
        self.folder = folder

    def start(self, *arguments: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            ["bash", ROOT / "cluster" / "slurm.sh", f"run.root={self.runs}", *arguments],
            cwd=self.folder,  # without .venv, which would come before the stubs
            env=self.environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def told(self, name: str) -> str:
        file = self.notes / name
        return file.read_text() if file.exists() else ""

    def run(self, *arguments: str) -> tuple[int, str]:
        process = self.start(*arguments)
        output, _ = process.communicate(timeout=60)
        return process.returncode, output

    def run_until(self, number: signal.Signals) -> tuple[int, str]:
        """Send a signal to the script alone, as ``--signal=B:`` does, once the program runs."""
        process = self.start("run.name=first")
        deadline = time.monotonic() + 60
        while not self.told("program"):
            assert process.poll() is None, process.communicate()[0]
            assert time.monotonic() < deadline
            time.sleep(0.05)
        process.send_signal(number)
        output, _ = process.communicate(timeout=60)
        return process.returncode, output


@pytest.fixture
def allocation(tmp_path: Path) -> Allocation:
    return Allocation(tmp_path)


@pytest.mark.parametrize("code", [0, 1, 2, 3, 130])
def test_slurm_exits_with_what_the_program_says(allocation: Allocation, code: int) -> None:
    (allocation.notes / "code").write_text(str(code))
    status, output = allocation.run("run.name=first", "train.steps=5")
    assert status == code, output
    assert f"-m rlhf_dist.main run.root={allocation.runs} run.name=first train.steps=5\n" in allocation.told("program")
    assert not allocation.told("requeued")


def test_slurm_offers_ray_what_the_job_has(allocation: Allocation) -> None:
    (allocation.notes / "code").write_text("0")
    status, output = allocation.run("run.name=first")
    assert status == 0, output
    ray = allocation.told("ray").split(" -- ")[0]
    assert ray == (
        "symmetric-run --address=127.0.0.1:6379 --min-nodes=1 --num-cpus=4 --num-gpus=0 --disable-usage-stats "
        f"--object-store-memory={1000 * 2**20 * 3 // 10}"
    )
    assert allocation.told("program").startswith("RAY_ADDRESS=127.0.0.1:6379 ")


def test_slurm_keeps_the_token_to_its_user(allocation: Allocation) -> None:
    (allocation.notes / "code").write_text("0")
    status, output = allocation.run("run.name=first")
    assert status == 0, output
    assert allocation.told("mode") == "600\n"
    assert list(allocation.runs.iterdir()) == [], "the token goes with the job"
    said = output + allocation.told("ray") + allocation.told("program")
    assert allocation.environment["RAY_AUTH_TOKEN"] not in said


def test_slurm_saves_and_queues_again_before_the_time_limit(allocation: Allocation) -> None:
    status, output = allocation.run_until(signal.SIGUSR1)
    assert (allocation.notes / "saved").exists(), output
    assert allocation.told("requeued") == "requeue 7\n"
    assert status == 130, "Slurm kills the script of a job that it queues again; the stub does not"
    assert list(allocation.runs.iterdir()) == []


def test_slurm_saves_and_ends_when_it_is_asked_to_stop(allocation: Allocation) -> None:
    status, output = allocation.run_until(signal.SIGTERM)
    assert (allocation.notes / "saved").exists(), output
    assert status == 130
    assert not allocation.told("requeued")


def test_slurm_is_no_success_when_ray_does_not_start(allocation: Allocation) -> None:
    (allocation.notes / "no-ray").touch()
    status, output = allocation.run("run.name=first")
    assert status == 1
    assert "error: Ray did not start on every node" in output


@pytest.mark.parametrize(
    ("change", "arguments", "message"),
    [
        ({"SLURM_JOB_ID": ""}, ["run.name=first"], "error: this is no Slurm job; submit it: sbatch"),
        ({}, [], "error: run.name is not set: without a fixed name"),
        ({}, ["run.name=first", "train.step=5"], "unknown key train.step"),
        ({"SLURMD_NODENAME": "two"}, ["run.name=first"], "error: this script runs on two, and not on the first node"),
        (
            {"SLURM_JOB_NODELIST": "localhost,two", "SLURMD_NODENAME": "localhost"},
            ["run.name=first"],
            "error: localhost has no address but loopback",
        ),
    ],
)
def test_slurm_refuses_before_anything_starts(
    allocation: Allocation, change: dict[str, str], arguments: list[str], message: str
) -> None:
    allocation.environment |= change
    status, output = allocation.run(*arguments)
    assert status in (1, 2)
    assert message in output
    assert not allocation.told("ray")
