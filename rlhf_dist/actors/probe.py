"""A process on every node that looks at the node for ``rlhf_dist.doctor``."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import ray
from ray.exceptions import GetTimeoutError, RayActorError, RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from rlhf_dist.actors.waiting import explained


@dataclass(frozen=True)
class Node:
    """A node of the cluster that Ray believes to be alive."""

    id: str
    resources: dict[str, float]
    """All that it has, whoever holds it; memory and object store in bytes."""


def nodes() -> dict[str, Node]:
    """By name: the address, with the beginning of Ray's id where several nodes share one."""
    alive = [node for node in ray.nodes() if node["Alive"]]
    shared = Counter(node["NodeManagerAddress"] for node in alive)
    found = {}
    for node in sorted(alive, key=lambda node: (node["NodeManagerAddress"], node["NodeID"])):
        name = node["NodeManagerAddress"]
        name = name if shared[name] == 1 else f"{name} ({node['NodeID'][:6]})"
        found[name] = Node(node["NodeID"], node["Resources"])
    return found


# No CPUs: it starts on a node whose CPUs are all taken, too.
@ray.remote(num_cpus=0, max_restarts=0)
class Probe:
    """Calls functions on its node, one after the other."""

    def call(self, function: Callable[..., Any], *args: Any) -> Any:
        return function(*args)


class Probes:
    """One :class:`Probe` on each of ``nodes``. One that died, or did not answer in time, is not asked again."""

    def __init__(self, nodes: Mapping[str, Node]) -> None:
        start: Any = Probe
        self._processes = {
            name: start.options(scheduling_strategy=NodeAffinitySchedulingStrategy(node.id, soft=False)).remote()
            for name, node in nodes.items()
        }

    @property
    def names(self) -> list[str]:
        """Nodes that can be asked."""
        return list(self._processes)

    def ask(
        self, function: Callable[..., Any], seconds: float, arguments: Mapping[str, tuple[Any, ...]]
    ) -> tuple[dict[str, Any], dict[str, str]]:
        """``function`` on the nodes of ``arguments``, side by side, within ``seconds``.

        Returns:
            What it returned, by node; and why not, by node.
        """
        refs = {n: self._processes[n].call.remote(function, *a) for n, a in arguments.items() if n in self._processes}
        if refs:
            ray.wait(list(refs.values()), num_returns=len(refs), timeout=seconds)
        answers, reasons = {}, {}
        for name, ref in refs.items():
            try:
                answers[name] = ray.get(ref, timeout=0)
            except GetTimeoutError:
                reasons[name] = f"{name}: no answer within {seconds:g} s"
                del self._processes[name]
            except RayError as error:
                reasons[name] = str(explained(error, name))
                if isinstance(error, RayActorError):  # the process is gone
                    del self._processes[name]
        return answers, reasons
