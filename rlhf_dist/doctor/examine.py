"""The examination: connects as a run does, asks every node, prints a line for each check.

python -m rlhf_dist.main doctor [--config FILE] [key.path=value ...]
"""

from __future__ import annotations

import os
import secrets
import shutil
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import RayError

from rlhf_dist import connection, planner
from rlhf_dist.actors.probe import Node, Probes, nodes
from rlhf_dist.config import Config
from rlhf_dist.doctor import judge, probes
from rlhf_dist.doctor.judge import Finding
from rlhf_dist.doctor.resources import judge_resources
from rlhf_dist.needs import checkpoint_bytes
from rlhf_dist.observability.logs import quiet_libraries
from rlhf_dist.observability.terminal import Terminal

#: Seconds until a node's process must be up: it may be the first there.
STARTUP_LIMIT = 60.0
#: Seconds for any other answer; a mount whose server is gone never answers.
ANSWER_LIMIT = 30.0
#: Seconds for answers of programs that import torch, which takes long from a network file system.
TORCH_LIMIT = 180.0
#: What to do about a node that did not answer.
LOOK = "Look at the node and at Ray's logs there (ray status, ray list nodes)"
#: ... and about ranks that did not meet.
INTERFACE = (
    "Ranks connect to where the host name of a node leads, on any port. GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME, set "
    "before ray start, choose a network interface; NCCL_DEBUG=INFO says more"
)
#: Questions for the time of which the quickest answer counts.
CLOCK_SAMPLES = 8


def doctor(cfg: Config, terminal: Terminal | None = None) -> int:
    """Exit code: 0 nothing would stop a run, 1 something would, or no cluster could be joined."""
    terminal = terminal or Terminal()
    terminal.title(f"doctor: {cfg.recipe}{f', {cfg.description}' if cfg.description else ''}")
    quiet_libraries(os.devnull)
    address = cfg.cluster.joined
    try:
        connection.connect(cfg.cluster)
    except (ConnectionError, RuntimeError, ValueError, RayError) as error:
        advice = "Look at ray status there, at the address, and at the token (RAY_AUTH_MODE)" if address else ""
        where = f"the cluster at {address} cannot be joined" if address else "no local cluster could be started"
        finding = Finding("fault", "cluster", f"{where}: {error}", advice)
        terminal.finding(finding.level, finding.check, str(finding))
        return 1
    try:
        examination = Examination(cfg, nodes(), terminal)
        examination.cluster(address)
        examination.everything()
    finally:
        ray.shutdown()
    faults, warnings = (sum(f.level == level for f in examination.findings) for level in ("fault", "warning"))
    terminal.info(
        f"faults: {faults}, warnings: {warnings}; {'a run would be stopped' if faults else 'a run can start'}"
    )
    return 1 if faults else 0


class Examination:
    """Asks ``cluster``, the nodes by name, and reports to ``terminal`` as answers come.

    A node that does not answer is a fault by itself, and is not asked again.
    """

    def __init__(self, cfg: Config, cluster: Mapping[str, Node], terminal: Terminal) -> None:
        self.cfg = cfg
        self.nodes = cluster
        self.terminal = terminal
        self.findings: list[Finding] = []
        self.probes = Probes(cluster)

    def report(self, findings: Sequence[Finding]) -> None:
        for finding in findings:
            self.terminal.finding(finding.level, finding.check, str(finding))
        self.findings += findings

    def ask(
        self,
        check: str,
        function: Callable[..., Any],
        *arguments: Any,
        seconds: float = ANSWER_LIMIT,
        each: Mapping[str, tuple[Any, ...]] | None = None,
        advice: str = LOOK,
    ) -> dict[str, Any]:
        """Answers by node, to the same question or to one for ``each`` of them; a missing answer is reported."""
        questions = dict.fromkeys(self.probes.names, arguments) if each is None else each
        answers, reasons = self.probes.ask(function, seconds, questions)
        self.report([Finding("fault", check, reason, advice) for reason in reasons.values()])
        return answers

    def cluster(self, address: str | None) -> None:
        total = ray.cluster_resources()
        where = f"joined the cluster at {address}" if address else "a local cluster, as a run would start it"
        what = f"{len(self.nodes)} node{'s' * (len(self.nodes) > 1)}, {total.get('CPU', 0):g} CPUs"
        gpus = f", {total['GPU']:g} GPUs" if total.get("GPU") else ""
        self.report([Finding("ok", "cluster", f"Ray {ray.__version__}, {where}: {what}{gpus}")])

    def everything(self) -> None:
        of_nodes = {name: node.resources for name, node in self.nodes.items()}
        self.report(judge_resources(self.cfg, of_nodes, ray.available_resources()))
        # The first answer is waited for longer: processes are starting.
        versions = self.ask("versions", probes.versions, seconds=STARTUP_LIMIT)
        self.report(judge.versions(versions | {"the driver": probes.versions()}))
        if found := self.ask("files", planner.check_files, self.cfg):
            self.report(judge.files(found))
        self.folders()
        self.machines()
        self.clock()
        self.gpus()
        self.all_reduce()

    def folders(self) -> None:
        run, needed = self.cfg.run, checkpoint_bytes(self.cfg)
        elsewhere = run.checkpoint_dir
        self.folder("run.root", run.root, None if elsewhere else needed)
        if elsewhere and "://" in elsewhere:
            if problems := self.ask("run.checkpoint_dir", probes.file_system, elsewhere):
                self.report(judge.url("run.checkpoint_dir", elsewhere, problems))
        elif elsewhere:
            self.folder("run.checkpoint_dir", elsewhere, needed)

    def folder(self, key: str, path: str, needed: float | None) -> None:
        """The driver and every node write to it and read what the other has written."""
        root = Path(path).absolute()
        mine = root / f".doctor-{uuid.uuid4().hex}"
        made = [p for p in (root, *root.parents) if not p.exists()]
        words = {name: secrets.token_hex(16) for name in ("driver", *self.nodes)}
        try:
            try:
                mine.mkdir(parents=True)
                (mine / "driver").write_text(words["driver"])
            except OSError as error:
                advice = f"Give a folder that can be written to, {key}=FOLDER"
                self.report([Finding("fault", key, f"the driver cannot write to {root}: {error}", advice)])
                return
            problems = self.ask(key, probes.visit, each={n: (str(mine), n, words) for n in self.probes.names})
            for name, problem in problems.items():
                if not problem:
                    problems[name] = _unread(mine / name, words[name])
            if problems:
                self.report(judge.folder(key, str(root), problems))
                self.report(judge.disk(key, str(root), probes.free(str(root)), needed))
        finally:
            self.tidy(key, mine, made)

    def tidy(self, key: str, mine: Path, made: Sequence[Path]) -> None:
        """Remove the folder ``mine`` and those of ``made`` that are there and empty, innermost first."""
        try:
            if mine.exists():
                shutil.rmtree(mine)
            for folder in made:
                if folder.exists() and not any(folder.iterdir()):
                    folder.rmdir()
        except OSError as error:  # a node's user may own what it wrote
            self.report([Finding("warning", key, f"{mine} could not be removed: {error}", "Remove it")])

    def machines(self) -> None:
        found = self.ask("node", probes.machine)
        if not found:
            return
        for check in (judge.shared_memory, judge.memory, judge.temp, judge.open_files):
            self.report(check(found))
        self.ports({name: m.ports for name, m in found.items()})

    def ports(self, ranges: Mapping[str, tuple[int, int]]) -> None:
        """Every node listens, and every other connects; ``ranges``: from which the systems choose ports."""
        at = self.ask("ports", probes.listen)
        others = {name: ({other: at[other] for other in at if other != name},) for name in at}
        # Each connection may take its whole limit, 16 of them side by side.
        seconds = ANSWER_LIMIT + probes.CONNECT * (1 + len(at) // 16)
        unreachable = self.ask("ports", probes.reach, each=others, seconds=seconds)
        if unreachable:
            self.report(judge.ports(unreachable, ranges))

    def clock(self) -> None:
        """One node after the other: answers that wait for others would say less of the time."""
        found = {}
        for name in self.probes.names:
            samples = []
            for _ in range(CLOCK_SAMPLES):
                asked = time.time()
                answer = self.ask("clock", probes.now, each={name: ()})
                answered = time.time()
                if name not in answer:
                    break
                samples.append(((answered - asked) / 2, answer[name] - (asked + answered) / 2))
            if samples:
                bound, ahead = min(samples)
                found[name] = (ahead, bound)
        if found:
            self.report(judge.clock(found))

    def _with(self, resource: str) -> list[str]:
        return [name for name in self.probes.names if self.nodes[name].resources.get(resource)]

    def gpus(self) -> None:
        names = self._with("GPU")
        if not names:
            self.report([Finding("ok", "GPUs", "none in the cluster")])
            return
        if found := self.ask("GPUs", probes.gpus, each=dict.fromkeys(names, ()), seconds=TORCH_LIMIT):
            wanted = {name: self.nodes[name].resources["GPU"] for name in found}
            self.report(judge.gpus(found, wanted))

    def all_reduce(self) -> None:
        """One rank on every node that could hold one; two if there is one node, unless it has one GPU."""
        names = self._with("GPU") or self._with("CPU") or self.probes.names
        if not names:
            return
        alone = len(names) == 1
        count = 1 if alone and self.nodes[names[0]].resources.get("GPU") == 1 else 2
        ranks = {names[0]: range(count)} if alone else {name: range(i, i + 1) for i, name in enumerate(names)}
        world = sum(map(len, ranks.values()))
        meeting = self.ask("all-reduce", probes.meet, each={names[0]: ()})
        if not meeting:
            return
        address, port = meeting[names[0]]
        calls = {name: (list(own), world, address, port) for name, own in ranks.items()}
        answers = self.ask("all-reduce", probes.all_reduce, each=calls, seconds=TORCH_LIMIT, advice=INTERFACE)
        if len(answers) == len(ranks):
            where = f"on {len(names)} node{'s' * (len(names) > 1)}"
            text = f"{world} rank{'s' * (world > 1)} {where} by {answers[names[0]]}, at {address}:{port}"
            self.report([Finding("ok", "all-reduce", text)])


def _unread(file: Path, word: str) -> str:
    """What is wrong with a file that a node has written, or nothing."""
    try:
        return "" if file.read_text() == word else "writes a file of which the driver reads another content"
    except OSError as error:
        return f"writes a file that the driver cannot read: {error}"
