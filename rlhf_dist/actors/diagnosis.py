"""Why nothing moves: which processes do not answer, what state they are in, and where their Python stands."""

from __future__ import annotations

import contextlib
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import psutil
import ray
from ray.actor import ActorHandle
from ray.exceptions import RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from rlhf_dist.observability.logs import tail

#: Seconds in which a process that is alive answers, whatever it computes.
ANSWER = 3.0
#: Seconds for everything that is asked of a node.
INSPECTION = 15.0
#: Lines of a log and of a stack that are shown.
LINES = 8
#: Of processes that die by a signal which Python sees, and of C++. Exceptions come through Ray; those in a log are of
#: libraries that have caught them.
_LAST_WORDS = re.compile(r"Fatal Python error|terminate called|^Aborted|[Oo]ut of memory")


@dataclass(frozen=True)
class Place:
    """Where a process of the run is."""

    pid: int
    node_id: str
    log: str | None
    """Its output, where the run started the cluster itself."""


@dataclass
class Finding:
    """What is known of one process."""

    process: str
    actor: ActorHandle
    place: Place
    answers: bool
    state: str = "its node does not answer"
    stack: list[str] = field(default_factory=list)
    log: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        head = f"{self.process} (pid {self.place.pid}) {'answers' if self.answers else 'does not answer'}: {self.state}"
        lines = [f"    stack  {line}" for line in self.stack] + [f"    log    {line}" for line in self.log]
        return "\n".join([head, *lines])


def diagnose(processes: Sequence[tuple[str, ActorHandle, Place]]) -> list[Finding]:
    """Of every process whether it answers; those that do not come first. Takes some seconds, and never longer."""
    pings: list[ray.ObjectRef] = [actor.ping.remote() for _, actor, _ in processes]
    answered, _ = ray.wait(pings, num_returns=len(pings), timeout=ANSWER)
    findings = [
        Finding(name, actor, place, answers=_succeeded(ping) if ping in answered else False)
        for (name, actor, place), ping in zip(processes, pings, strict=True)
    ]
    inspections = {_inspect.options(scheduling_strategy=_on(f.place)).remote(f.place): f for f in findings}
    ready, _ = ray.wait(list(inspections), num_returns=len(inspections), timeout=INSPECTION)
    for ref in ready:
        if _succeeded(ref):
            finding = inspections[ref]
            finding.state, finding.stack, finding.log = ray.get(ref)
    return sorted(findings, key=lambda f: f.answers)


def last_words(log: str, start: int) -> str:
    """What the log of a dead process says of its end; Ray does not know the signal.

    Args:
        start: byte from which on it is the log of this process; those before it in its place wrote to the same file.
    """
    with open(log, "rb") as file:
        file.seek(start)
        said = [line for line in file.read().decode(errors="replace").splitlines() if _LAST_WORDS.search(line)]
    if said:
        return f"; its log says: {said[-1].strip()}"
    return "; its log says nothing, as when it was killed from outside (SIGKILL)"


def oom_kills() -> int:
    """Processes of this container that the kernel has killed for want of memory; 0 where that is not counted."""
    try:
        events = Path("/sys/fs/cgroup/memory.events").read_text().split()
    except OSError:
        return 0
    return int(events[events.index("oom_kill") + 1]) if "oom_kill" in events else 0


def kill(findings: Sequence[Finding]) -> None:
    """End processes that do not answer; not by Ray, which asks them to."""
    refs = [_kill.options(scheduling_strategy=_on(f.place)).remote(f.place.pid) for f in findings]
    ray.wait(refs, num_returns=len(refs), timeout=INSPECTION)


def _on(place: Place) -> NodeAffinitySchedulingStrategy:
    return NodeAffinitySchedulingStrategy(place.node_id, soft=False)


@ray.remote(num_cpus=0, max_retries=0)
def _kill(pid: int) -> None:
    with contextlib.suppress(psutil.NoSuchProcess):  # gone by itself
        psutil.Process(pid).kill()


def _succeeded(ref: ray.ObjectRef) -> bool:
    try:
        ray.get(ref)
    except RayError:
        return False
    return True


@ray.remote(num_cpus=0, max_retries=0)
def _inspect(place: Place) -> tuple[str, list[str], list[str]]:
    """State, Python stack and last lines of a process on this node."""
    log = tail(place.log, LINES) if place.log else []
    try:
        process = psutil.Process(place.pid)
        state = f"{process.status()}, {process.cpu_percent(0.2):.0f} % of a core, {process.memory_info().rss >> 20} MB"
    except psutil.NoSuchProcess:
        return "the process is gone", [], log
    return state, _stack(place.pid), log


def _stack(pid: int) -> list[str]:
    """The innermost lines of the threads that count, by py-spy, which can read a process that is stopped, too."""
    program = shutil.which("py-spy") or str(Path(sys.executable).parent / "py-spy")
    try:
        out = subprocess.run(
            [program, "dump", "--nonblocking", "--pid", str(pid)], capture_output=True, text=True, timeout=8
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        return [f"no stack: {error}"]
    if out.returncode:
        return [f"no stack: {out.stderr.strip().splitlines()[-1:]}"]
    threads = out.stdout.split("\n\n")[1:] or out.stdout.split("\n\n")
    busy = [t for t in threads if "MainThread" in t or "active" in t.splitlines()[0]]
    return [line.strip() for thread in busy for line in thread.strip().splitlines()[: LINES + 1]][: 3 * LINES]
