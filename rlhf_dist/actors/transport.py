"""How a version of the policy gets from the learner to the generators: one of :data:`TRANSPORTS`, chosen once.

``object_store``  the learner's ranks return shards, the generators pull them
``nccl``, ``ipc``  vLLM's own engines: the learner pushes, and drives the generators through :class:`GeneratorClient`

Either way a generator serves nothing under the new version before its canary
has agreed with the learner's.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from ray import ObjectRef
from ray.actor import ActorHandle

from rlhf_dist.actors.waiting import wait_for


class Weights(Protocol):
    """One version of the policy, on its way."""

    @property
    def version(self) -> int: ...

    @property
    def can_be_late(self) -> bool:
        """Whether a generator that was started after the publication can still load them."""
        ...

    def deliver(self, generators: Sequence[ActorHandle]) -> list[ObjectRef]:
        """Have every generator load this version; returns at once, a reference to each generator's record."""


@dataclass(frozen=True)
class PulledWeights:
    """Shards in Ray's object store: a generator takes them when it is ready, and blocks nobody."""

    version: int
    parts: list[ObjectRef]
    """The shards of each rank."""
    canaries: list[ObjectRef]
    """From rank 0 the canary, from the others None."""
    can_be_late: bool = True

    @classmethod
    def publish(cls, version: int, ranks: Sequence[ActorHandle], frozen: Sequence[ObjectRef]) -> PulledWeights:
        parts = [*frozen, *(r.weights.remote(version) for r in ranks)]
        return cls(version, parts, [r.canary.remote() for r in ranks])

    def deliver(self, generators: Sequence[ActorHandle]) -> list[ObjectRef]:
        return [g.load.remote(self.version, self.parts, self.canaries) for g in generators]


@dataclass(frozen=True)
class PushedWeights:
    """Weights that the learner sends to all generators at once, when it knows them."""

    version: int
    ranks: Sequence[ActorHandle]
    can_be_late: bool = False  # nccl and ipc know the generators that were there at the start

    @classmethod
    def publish(cls, version: int, ranks: Sequence[ActorHandle], frozen: Sequence[ObjectRef]) -> PushedWeights:
        return cls(version, ranks)  # merged: vLLM's senders know whole weights only

    def deliver(self, generators: Sequence[ActorHandle]) -> list[ObjectRef]:
        canaries = [r.push_weights.remote(self.version, list(generators)) for r in self.ranks]
        # All of them, so that the failure of any rank reaches the one who waits for the gate.
        return [g.gate.remote(self.version, *canaries) for g in generators]


#: ``(version, ranks of the learner, what was sent once and never changes)`` to a version on its way.
TRANSPORTS: dict[str, Callable[[int, Sequence[ActorHandle], Sequence[ObjectRef]], Weights]] = {
    "object_store": PulledWeights.publish,
    "nccl": PushedWeights.publish,
    "ipc": PushedWeights.publish,
}


class GeneratorClient:
    """vLLM's ``VLLMWeightSyncClient`` over our generators; rank 0 of the learner calls it.

    vLLM's own client for Ray gives every engine the same ranks of the group and leaves the version to another call.

    Args:
        workers: tensor-parallel workers of each generator.
    """

    def __init__(self, generators: Sequence[ActorHandle], workers: int) -> None:
        self.generators = list(generators)
        self.workers = workers
        self.version = -1
        """What the next :meth:`finish_weight_update` completes."""

    @property
    def world_size(self) -> int:
        """The sender and all workers."""
        return 1 + len(self.generators) * self.workers

    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None:
        infos = [init_info] * len(self.generators)
        if "rank_offset" in init_info:  # a collective: the workers of each generator follow those of the one before
            first = init_info["rank_offset"]
            infos = [init_info | {"rank_offset": first + i * self.workers} for i in range(len(self.generators))]
        refs = [g.init_weight_transfer_engine.remote(info) for g, info in zip(self.generators, infos, strict=True)]
        wait_for(refs, "generators, connecting to the learner")

    def start_weight_update(self) -> None:
        wait_for([g.start_weight_update.remote() for g in self.generators], self._what("starting"))

    def update_weights(self, update_info: dict[str, Any] | list[dict[str, Any]]) -> None:
        wait_for([g.update_weights.remote(update_info) for g in self.generators], self._what("receiving"))

    def finish_weight_update(self, weight_version: str | None = None) -> None:
        refs = [g.finish_weight_update.remote(self.version) for g in self.generators]
        wait_for(refs, self._what("finishing"))

    def _what(self, doing: str) -> str:
        return f"generators, {doing} version {self.version}"
