"""What must be over before Ray ends."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import ray

from rlhf_dist.actors.dispatch import GeneratorGroup, Lane
from rlhf_dist.actors.group import Group, Resources

pytestmark = pytest.mark.usefixtures("cluster")


def readers() -> list[threading.Thread]:
    return [t for t in threading.enumerate() if t.name.startswith("generator ")]


@pytest.mark.parametrize("end", ["stop_calling", "release"])
def test_no_thread_waits_for_chunks_any_more(end: str) -> None:
    """One that called Ray after its end would start a cluster, or end the process with exit code 1."""

    @ray.remote
    class Silent:
        def next_chunk(self) -> Any:
            threading.Event().wait()

    group = Group("generator", Silent, 2, Resources(0), lambda _: (), strategy="PACK", seconds=60)
    generators = GeneratorGroup(group, max_num_seqs=8)
    generators.open(Lane(ray.put(None), 1, False, lambda chunk: None, lambda error: None))
    assert len(readers()) == 2
    getattr(generators, end)()
    assert readers() == []
    group.release()
