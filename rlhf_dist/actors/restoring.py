"""From a checkpoint to what a learner goes on from; another number of ranks needs a conversion first."""

from __future__ import annotations

from typing import Any

import ray

from rlhf_dist import checkpoint
from rlhf_dist.actors.learner_spec import Restore
from rlhf_dist.actors.waiting import wait_for
from rlhf_dist.config import LearnerConfig


def learner_state(folder: str, manifest: dict[str, Any], role: str, now: LearnerConfig) -> Restore:
    """What ``role`` goes on from.

    Args:
        folder: of the checkpoint; any URL.
        manifest: of the checkpoint; its ``learners`` say how each of them was sharded.
        now: how it is sharded from here on.

    Raises:
        ValueError: the checkpoint has no such learner, or another ZeRO stage, which DeepSpeed cannot convert.
    """
    if role not in manifest["learners"]:
        raise ValueError(f"checkpoint {folder} has no {role}, only {', '.join(manifest['learners'])}")
    then = manifest["learners"][role]
    if then["zero_stage"] != now.zero_stage:
        raise ValueError(
            f"checkpoint {folder}: {role} was saved with zero_stage={then['zero_stage']}, this run has "
            f"zero_stage={now.zero_stage}; DeepSpeed converts between numbers of ranks, not between stages"
        )
    saved = f"{folder}/learner/{role}"
    if then["ranks"] == now.ranks:
        return Restore(saved, converted=False)
    converted = f"{folder}/converted/{role}"
    wait_for(_convert.remote(saved, converted), f"converting {role} from {then['ranks']} ranks to {now.ranks}")
    return Restore(converted, converted=True)


@ray.remote(num_cpus=0)
def _convert(folder: str, into: str) -> None:
    from rlhf_dist.engines.deepspeed import convert

    local, send = checkpoint.destination(into)
    with checkpoint.local_copy(folder) as source:
        convert(source, local)
    send()
