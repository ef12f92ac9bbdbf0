"""What the config asks for against what the cluster has: processes and resources."""

from __future__ import annotations

import math
from collections.abc import Mapping

from rlhf_dist.config import Config
from rlhf_dist.doctor.judge import Finding
from rlhf_dist.planner import Role, check_fits, roles

#: Against rounding of fractions.
EPSILON = 1e-6


def judge_resources(cfg: Config, nodes: Mapping[str, Mapping[str, float]], free: Mapping[str, float]) -> list[Finding]:
    """Whether every stage fits, and every group of it.

    Args:
        nodes: all that each node has; by Ray's names of resources.
        free: what nobody holds now, of the whole cluster.
    """
    total: dict[str, float] = {}
    for node in nodes.values():
        for name, amount in node.items():
            total[name] = total.get(name, 0) + amount
    findings = _custom(cfg, total)
    try:
        check_fits(cfg, total.get("CPU", 0), total.get("GPU", 0))
    except ValueError as error:
        findings.append(Finding("fault", "resources", str(error)))
    if not findings:
        places = [place(role, cfg.cluster.placement, nodes) for role in roles(cfg)]
        findings = [Finding("fault", "resources", text, _MORE) for text in dict.fromkeys(filter(None, places))]
    if findings:
        return findings
    try:
        check_fits(cfg, free.get("CPU", 0), free.get("GPU", 0))
    except ValueError:
        text = f"only {free.get('CPU', 0):g} CPUs and {free.get('GPU', 0):g} GPUs are free now"
        return [
            Finding("warning", "resources", text, "Other jobs hold the rest; a run waits run.startup_limit for them")
        ]
    return [Finding("ok", "resources", "every stage fits the cluster, and every process a node")]


_MORE = "Lower what the group asks for, or start nodes that have it (ray start --num-cpus, --num-gpus, --resources)"


def _custom(cfg: Config, total: Mapping[str, float]) -> list[Finding]:
    """Custom resources of which the cluster has too little."""
    findings = {}
    for role in roles(cfg):
        for name in role.resources:
            users = [r for r in roles(cfg) if r.stage == role.stage and name in r.resources]
            need, have = sum(r.processes * r.resources[name] for r in users), total.get(name, 0)
            if need > have + EPSILON:
                each = ", ".join(f"{r.role} {r.processes}x{r.resources[name]:g}" for r in users)
                text = (
                    f"stage {role.stage} needs {need:g} of the resource {name} ({each}), but the cluster has {have:g}"
                )
                advice = f"Start nodes with ray start --resources='{{\"{name}\": {math.ceil(need - have)}}}'"
                findings[role.stage, name] = Finding("fault", "resources", text, advice)
    return list(findings.values())


def place(role: Role, strategy: str, nodes: Mapping[str, Mapping[str, float]]) -> str:
    """Why the processes of a group cannot all be placed, were the cluster theirs alone; empty if they can."""
    asked = {"CPU": role.cpus, "GPU": role.gpus, **role.resources}
    asked = {name: amount for name, amount in asked.items() if amount}
    if not asked:
        return ""
    fit = [min(int(node.get(name, 0) / amount + EPSILON) for name, amount in asked.items()) for node in nodes.values()]
    each = " and ".join(f"{amount:g} {name}" for name, amount in asked.items())
    group = f"stage {role.stage}: {role.role} has {role.processes} processes of {each} each"
    if not any(fit):
        return f"{group}, and no node holds one"
    if sum(fit) < role.processes:
        return f"{group}, and the nodes hold {sum(fit)} of them together"
    if strategy == "STRICT_PACK" and max(fit) < role.processes:
        return f"{group}, and no node holds all of them (cluster.placement=STRICT_PACK)"
    if strategy == "STRICT_SPREAD" and sum(1 for n in fit if n) < role.processes:
        return f"{group}, and only {sum(1 for n in fit if n)} nodes hold one (cluster.placement=STRICT_SPREAD)"
    return ""
