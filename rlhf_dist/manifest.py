"""``--dry-run --emit k8s``: the worker groups of a RayJob for a config, as a patch of ``k8s/base``.

One group of pods for each custom resource that the config asks for (``generator.resources: {generator: 1}``), or one,
``worker``, where it asks for none. Sizes are those of the stage that needs most.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import yaml

from rlhf_dist.config import Config
from rlhf_dist.needs import Need, needs, object_store, ppo_of, sent_parameters

GIB = 2**30
GPUS_OF_A_NODE = 8
#: Beside the actors a pod runs Ray's own processes.
RAY_BYTES = 1.5e9
#: Ray's least is 75 MB; tables of a stage's data travel through the store too.
LEAST_STORE = 500e6
#: Of the object store, since its blocks do not fill it without gaps.
FILLED = 0.75
#: Shared memory beside the object store: torch's and NCCL's.
SHARED_BYTES = GIB
#: Of a pod's memory, at most.
SHARED_SHARE = 0.7


@dataclass(frozen=True)
class Group:
    """Equal pods."""

    name: str
    pods: int
    cpus: int
    """Of each pod, as all that follows."""
    gpus: int
    memory: int
    """GiB."""
    shared: int
    """GiB of shared memory, inside ``memory``."""
    store: int
    """Bytes of the object store, inside ``shared``."""
    resources: dict[str, int]


def emit(cfg: Config) -> str:
    """The patch, as YAML.

    Raises:
        OSError: a model that the config names is not here.
        ValueError: a process asks for two custom resources, so that it belongs to two groups.
    """
    patch = [op for i, group in enumerate(groups(cfg)) for op in _operations(i, group)]
    command = "python -m rlhf_dist.main ... --dry-run --emit k8s"
    return f"# Sizes of the worker groups, made by `{command}`.\n" + yaml.safe_dump(patch, sort_keys=False, width=120)


def groups(cfg: Config) -> list[Group]:
    """The pods that a config needs."""
    found = needs(cfg)
    ppo = ppo_of(cfg)
    stored = sum(object_store(ppo, sent_parameters(ppo)).values()) if ppo else 0.0
    store = int(max(LEAST_STORE, stored / FILLED))
    names = dict.fromkeys(_place(need) for need in found)
    return [_group(name, [n for n in found if _place(n) == name], store) for name in names]


def _place(need: Need) -> str:
    names = list(need.role.resources)
    if len(names) > 1:
        raise ValueError(f"{need.role.role} asks for {names}: a process can lie in one worker group only; give one")
    return names[0] if names else "worker"


def _group(name: str, members: Sequence[Need], store: int) -> Group:
    stages = [[n for n in members if n.role.stage == stage] for stage in dict.fromkeys(n.role.stage for n in members)]

    def most(one: Any) -> float:
        """Of all stages, since they run one after the other."""
        return max(sum(one(need) for need in stage) for stage in stages)

    gpus = math.ceil(most(lambda n: n.role.processes * n.role.gpus) - 1e-6)
    pods = max(1, math.ceil(gpus / GPUS_OF_A_NODE))
    shared = math.ceil((store + SHARED_BYTES) / GIB)
    # The first pod has the first rank.
    actors = most(lambda n: (n.host_bytes - n.once) / pods + n.once)
    units = most(lambda n: n.role.processes * n.role.resources.get(name, 0))
    return Group(
        name=name,
        pods=pods,
        cpus=max(1, math.ceil(most(lambda n: n.role.processes * n.role.cpus) / pods)),
        gpus=math.ceil(gpus / pods),
        memory=max(math.ceil((actors + RAY_BYTES) / GIB) + shared, math.ceil(shared / SHARED_SHARE)),
        shared=shared,
        store=store,
        resources={name: math.ceil(units / pods)} if units else {},
    )


def _operations(i: int, group: Group) -> Iterator[dict[str, Any]]:
    """JSON patches (RFC 6902) of the base's RayJob, whose only group is the first."""
    root = "/spec/rayClusterSpec/workerGroupSpecs"
    at = f"{root}/{i}"
    if i:
        yield {"op": "copy", "from": f"{root}/0", "path": at}
    size = {"cpu": str(group.cpus), "memory": f"{group.memory}Gi"}
    if group.gpus:
        size["nvidia.com/gpu"] = str(group.gpus)
    values = {
        "groupName": group.name,
        "replicas": group.pods,
        "minReplicas": group.pods,
        "maxReplicas": group.pods,
        "resources": {name: str(count) for name, count in group.resources.items()},
        "rayStartParams/object-store-memory": str(group.store),
        "template/spec/containers/0/resources": {"requests": size, "limits": dict(size)},
        "template/spec/volumes/2/emptyDir/sizeLimit": f"{group.shared}Gi",
    }
    for path, value in values.items():
        yield {"op": "replace", "path": f"{at}/{path}", "value": value}
    tolerations = [{"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"}] if group.gpus else []
    yield {"op": "add", "path": f"{at}/template/spec/tolerations", "value": tolerations}
