"""A Ray cluster of one node as `ray start --head` makes it, with token authentication, and `ray job` against it."""

from __future__ import annotations

import contextlib
import os
import random
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path

import psutil

ROOT = Path(__file__).parents[1]
MARK = "RLHF_DIST_TEST"


def free_ports(count: int) -> list[int]:
    """Different ports where nobody listens.

    Below those that the kernel gives out by itself: one of these may be somebody else's, Ray's own parts among them, by
    the time that it is used.
    """
    found: list[int] = []
    for port in random.sample(range(20_000, 32_000), 100):
        with contextlib.suppress(OSError), socket.create_server(("127.0.0.1", port)):
            found.append(port)
        if len(found) == count:
            return found
    raise RuntimeError(f"of 100 ports only {len(found)} are free")


class Head:
    """The node; :meth:`die` ends it.

    Args:
        variables: environment of the node, and so of all that runs on it.
        options: of ``ray start``.
    """

    def __init__(self, variables: Mapping[str, str], options: Mapping[str, str | int]) -> None:
        self.mark = secrets.token_hex(16)
        self.port, self.dashboard, self.client_server, self.agent = free_ports(4)
        # Sockets lie in here, whose paths must stay below 108 characters.
        self.temp = tempfile.mkdtemp(prefix="rj", dir="/tmp")
        self.environment = {**os.environ, **variables, "HOME": self.temp, MARK: self.mark, "COLUMNS": "1000"}
        self.environment |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
        self.environment["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
        (Path(self.temp) / ".cache").symlink_to(Path.home() / ".cache")  # what DeepSpeed and vLLM have compiled
        self.address = f"http://127.0.0.1:{self.dashboard}"
        self._start(options)

    def run(self, *command: str, seconds: float, **variables: str) -> subprocess.CompletedProcess[str]:
        """A command with the cluster's token; ``variables`` in its environment."""
        environment = self.environment | variables
        return subprocess.run(
            command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=seconds, check=False
        )

    def status(self, submission: str) -> str:
        """PENDING, RUNNING, STOPPED, SUCCEEDED or FAILED."""
        from ray.job_submission import JobSubmissionClient

        token = {"Authorization": f"Bearer {self.environment['RAY_AUTH_TOKEN']}"}
        return str(JobSubmissionClient(self.address, headers=token).get_job_status(submission).value)

    def die(self) -> None:
        """Every process of this cluster at once, as when the node goes; nothing else on the machine."""
        deadline = time.monotonic() + 30
        while found := self._processes():
            assert time.monotonic() < deadline, found
            for process in found:
                try:
                    process.send_signal(signal.SIGKILL)
                except psutil.NoSuchProcess:
                    continue
            time.sleep(0.2)
        self.node.wait(10)
        shutil.rmtree(self.temp, ignore_errors=True)

    def _start(self, options: Mapping[str, str | int]) -> None:
        all_options = {
            "port": self.port,
            "dashboard-port": self.dashboard,
            "dashboard-host": "127.0.0.1",
            "node-ip-address": "127.0.0.1",
            "temp-dir": f"{self.temp}/ray",
            "ray-client-server-port": self.client_server,
            "dashboard-agent-listen-port": self.agent,
            "min-worker-port": 0,
            "max-worker-port": 0,
            **options,
        }
        with open(Path(self.temp) / "node.log", "w") as log:
            self.node = subprocess.Popen(
                ["ray", "start", "--head", "--block", *(f"--{name}={value}" for name, value in all_options.items())],
                env=self.environment,
                cwd=ROOT,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        # The image's HEALTHCHECK; and jobs are taken some seconds later than that.
        for command in (
            ["health-check", "--address", f"127.0.0.1:{self.port}"],
            ["job", "list", "--address", self.address],
        ):
            deadline = time.monotonic() + 180
            while self.run("ray", *command, seconds=60).returncode:
                assert self.node.poll() is None, (Path(self.temp) / "node.log").read_text()
                assert time.monotonic() < deadline, command
                time.sleep(1)

    def _processes(self) -> list[psutil.Process]:
        found = []
        for process in psutil.process_iter():
            try:
                if process.environ().get(MARK) == self.mark and process.status() != psutil.STATUS_ZOMBIE:
                    found.append(process)
            except (psutil.NoSuchProcess, psutil.AccessDenied):
                continue
        return found
