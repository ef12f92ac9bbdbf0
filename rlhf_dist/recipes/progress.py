"""What the recipes tell about their steps: seconds of each phase, figures of the weight syncs, the progress bar."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence

from rlhf_dist.actors.rewards import GivenUp
from rlhf_dist.actors.rollouts import RolloutBatch
from rlhf_dist.actors.scorer import ScorerGroup, ShardedReward
from rlhf_dist.data.serving import Sync
from rlhf_dist.observability.trace import Trace
from rlhf_dist.run import Run


class StepClock:
    """Seconds of the phases of one step, as the driver sees them."""

    def __init__(self, trace: Trace) -> None:
        self.trace = trace
        self.began = self.last = time.time()
        self.phases: dict[str, float] = {}

    def lap(self, phase: str) -> None:
        """The phase that just ended."""
        now = time.time()
        self.phases[phase] = now - self.last
        self.trace.add([{"name": phase, "process": "driver", "start": self.last, "end": now, "args": {}}])
        self.last = now

    @property
    def seconds(self) -> float:
        return self.last - self.began

    def figures(self, rollouts: RolloutBatch) -> dict[str, float]:
        return {
            **{f"timing/{phase}": seconds for phase, seconds in self.phases.items()},
            "timing/step": self.seconds,
            "perf/throughput": rollouts.tokens / self.seconds,
            "perf/samples_per_second": rollouts.samples / self.seconds,
            "rollout/groups_left_out": float(len(rollouts.left_out)),
        }


def log_syncs(run: Run, syncs: Sequence[Sync]) -> dict[str, float]:
    """Figures of weight syncs that have completed, none or several; the largest canary difference goes into the
    summary."""
    if not syncs:
        return {}
    records = [record for sync in syncs for record in sync.records.values()]
    worst = max(r["canary_diff"] for r in records)
    run.summary.set("weight_sync.max_canary_diff", max(worst, run.summary.get("weight_sync.max_canary_diff", 0.0)))
    run.summary.set("weight_sync.versions", syncs[-1].version + 1)
    slowest = lambda name: max(r[name] for r in records)
    for record in records:
        if record["reloaded_after"]:
            run.terminal.warn(f"weights were loaded a second time: {record['reloaded_after']}")
    return {
        "weight_sync/canary_diff": worst,
        "weight_sync/canary_tells_apart": float(all(r["tells_apart"] for r in records)),
        "weight_sync/bytes": float(records[0]["nbytes"]),
        "weight_sync/in_flight": float(max(r["in_flight"] for r in records)),
        "weight_sync/reloads": float(sum(bool(r["reloaded_after"]) for r in records)),
        **{
            f"weight_sync/{name}": slowest(name)
            for name in ("pull_seconds", "load_seconds", "verify_seconds", "serving_seconds")
        },
    }


def log_given_up(run: Run, reward: ScorerGroup | ShardedReward) -> list[GivenUp]:
    """What endpoints gave up since the last call: a line each in given_up.jsonl, and the samples in the summary.

    Raises:
        ValueError: one of them ends the run: ``on_failure: stop``, or a mistake in the config.
    """
    given_up = reward.given_up()
    if given_up:
        with open(run.path("given_up.jsonl"), "a", encoding="utf-8") as file:
            file.writelines(json.dumps(g.record) + "\n" for g in given_up)
    if run.cfg.reward.uses_endpoints:
        samples = sum(len(g.group_ids) for g in given_up)
        run.summary.set("reward.given_up", run.summary.get("reward.given_up", 0) + samples)
    if final := next((g for g in given_up if g.ends_run), None):
        raise ValueError(final.message)
    return given_up


def shown(figures: dict[str, float], rollouts: RolloutBatch, clock: StepClock) -> dict[str, float]:
    """What the progress bar says."""
    shown = {"reward": figures["rollout/reward_mean"]}
    if "rollout/kl" in figures:
        shown["kl"] = figures["rollout/kl"]
    return shown | {"tokens/s": rollouts.tokens / clock.seconds}
