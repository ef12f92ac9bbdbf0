"""Figures of updates that are still running, and how the shares of the ranks add up."""

from __future__ import annotations

from dataclasses import dataclass, field

from ray import ObjectRef

from rlhf_dist.actors.waiting import wait_for
from rlhf_dist.data.shares import add_up, average


@dataclass
class PendingStats:
    """Metrics of updates that are still running; ``a | b`` joins those of two groups."""

    parts: list[tuple[str, list[ObjectRef]]] = field(default_factory=list)

    def __or__(self, other: PendingStats) -> PendingStats:
        return PendingStats(self.parts + other.parts)

    def steps(self) -> list[dict[str, float]]:
        """One dict for each optimizer step (of the first group)."""
        role, refs = self.parts[0]
        return reduce_ranks(wait_for(refs, f"{role}, updating"))

    def result(self) -> dict[str, float]:
        """Means over the optimizer steps (of NAME_max the largest), as ``train/NAME``.

        Names that two groups share: the critic's get a prefix.
        """
        metrics: dict[str, float] = {}
        for role, refs in self.parts:
            for name, value in average(reduce_ranks(wait_for(refs, f"{role}, updating"))).items():
                shared = role == "critic" and name in ("lr", "grad_norm", "loss")
                metrics[f"train/critic_{name}" if shared else f"train/{name}"] = value
        if "train/_r2" in metrics:
            r1, r2, e1, e2 = (metrics.pop(f"train/_{name}") for name in ("r1", "r2", "e1", "e2"))
            variance = r2 - r1**2
            metrics["train/explained_variance"] = 1 - (e2 - e1**2) / variance if variance > 1e-12 else 0.0
        return metrics


def reduce_ranks(ranks: list[list[dict[str, float]]]) -> list[dict[str, float]]:
    """Shares of all ranks to global figures, for each optimizer step."""
    return [add_up(step) for step in zip(*ranks, strict=True)]
