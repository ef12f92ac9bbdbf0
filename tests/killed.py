"""Runs the program, and kills it with SIGKILL at a point of its work.

    python -m killed POINT N [arguments of rlhf_dist.main]

before the N-th call of the function at that point, or after it where the point says so.
"""

from __future__ import annotations

import functools
import importlib
import os
import signal
import sys
from typing import Any

#: Where: module, name in it, and whether the kill comes after the call.
POINTS = {
    "before generation": ("rlhf_dist.actors.stream", "RolloutStream.next_batch", False),
    "in generation": ("rlhf_dist.actors.rollouts", "RolloutBatch.wait", False),
    "in scoring": ("rlhf_dist.actors.experience", "ExperienceGroup.build", True),
    "in the update": ("rlhf_dist.actors.learner", "LearnerGroup.update", True),
    "after the update": ("rlhf_dist.actors.stats", "PendingStats.result", True),
    "between ledger and publication": ("rlhf_dist.data.trained", "TrainedLedger.trained", True),
    "in the publication": ("rlhf_dist.actors.dispatch", "GeneratorGroup.publish", True),
    "before saving": ("rlhf_dist.recipes.saving", "Saver.save", False),
    "while the ranks write": ("rlhf_dist.recipes.saving", "Saver.save", True),
    "before the manifest": ("rlhf_dist.checkpoint", "seal", False),
    "after the manifest": ("rlhf_dist.checkpoint", "seal", True),
    "after removing old ones": ("rlhf_dist.checkpoint", "prune", True),
}


def kill_at(point: str, count: int) -> None:
    """Have this process killed there."""
    module_name, path, after = POINTS[point]
    holder: Any = importlib.import_module(module_name)
    *parents, name = path.split(".")
    for parent in parents:
        holder = getattr(holder, parent)
    function = getattr(holder, name)
    calls = 0

    @functools.wraps(function)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == count and not after:
            os.kill(os.getpid(), signal.SIGKILL)
        result = function(*args, **kwargs)
        if calls == count and after:
            os.kill(os.getpid(), signal.SIGKILL)
        return result

    setattr(holder, name, wrapped)


if __name__ == "__main__":
    kill_at(sys.argv[1], int(sys.argv[2]))
    from rlhf_dist.main import main

    sys.exit(main(sys.argv[3:]))
