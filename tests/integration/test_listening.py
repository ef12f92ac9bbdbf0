"""Who can reach a run: on a cluster of its own, nobody from another machine."""

from __future__ import annotations

from collections.abc import Callable
from ipaddress import ip_address

import psutil
from jobs import Job


def listening(job: Job) -> dict[str, set[str]]:
    """Addresses on which processes of the run listen, with the processes; TCP, and UDP that is bound to a port."""
    found: dict[str, set[str]] = {}
    for process in job.processes():
        pid, _, command = process.partition(" ")
        try:
            for socket in psutil.Process(int(pid)).net_connections("inet"):
                if socket.status in (psutil.CONN_LISTEN, psutil.CONN_NONE) and socket.laddr and not socket.raddr:
                    found.setdefault(socket.laddr.ip, set()).add(command)
        except psutil.NoSuchProcess:
            continue
    return found


def test_a_local_run_listens_on_loopback_only(start: Callable[..., Job], config: str) -> None:
    job = start("--config", config, "train.steps=50", "policy.learner.ranks=2", "policy.optim.lr=1e-5")
    job.wait_for_step(1)
    found = listening(job)
    job.process.terminate()
    job.wait()
    commands = {command for processes in found.values() for command in processes}
    for part in ("raylet", "gcs_server", "LearnerWorker", "Generator"):
        assert any(part in command for command in commands), f"no {part} among {commands}"
    for address, processes in found.items():
        ip = ip_address(address)
        assert (getattr(ip, "ipv4_mapped", None) or ip).is_loopback, f"{address}: {processes}"
