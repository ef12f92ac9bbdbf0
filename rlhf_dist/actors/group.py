"""Placing and starting the Ray actors of one role."""

from __future__ import annotations

import atexit
import contextlib
import faulthandler
import functools
import gc
import math
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import ray
from ray import ObjectRef
from ray.actor import ActorHandle
from ray.exceptions import RayError
from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from rlhf_dist.actors.diagnosis import Place, last_words
from rlhf_dist.actors.faults import Faults
from rlhf_dist.actors.waiting import WorkerFailed, cause_of_death, wait_for
from rlhf_dist.observability.logs import redirect_output
from rlhf_dist.observability.trace import Span, Trace

#: Folder for the output of all actors; set by the run when it started the cluster itself. On a cluster that was
#: joined, Ray's own logs hold it, and the dashboard shows it.
log_dir: str | None = None
_LOG_VARIABLE = "RLHF_DIST_LOG"
TRACE_SECONDS = 30.0


class Worker:
    """What every actor of this package is: quiet on the terminal, with a trace of its own."""

    def __init__(self, name: str) -> None:
        if path := os.environ.get(_LOG_VARIABLE):
            redirect_output(path)
            faulthandler.enable()  # a crash in C says so in the log
        self.name = name
        self.trace = Trace()
        self.trace.born(name)

    @contextlib.contextmanager
    def importing(self) -> Iterator[None]:
        """For the body that imports what the process needs. Python does not look for garbage meanwhile, nor among the
        imported objects later: a fifth of the CPU time of importing vLLM is that search, and it never finds any."""
        gc.disable()
        try:
            with self.trace.span(self.name, "import"):
                yield
        finally:
            gc.freeze()
            gc.enable()
            atexit.register(gc.unfreeze)  # nanobind calls what is left then a leak, on stderr

    def ready(self) -> int:
        """Answers once the constructor is through; returns the pid."""
        return os.getpid()

    def spans(self) -> list[Span]:
        """What this process did since the last call."""
        return self.trace.drain()

    def place(self) -> Place:
        """Where this process is, and what it writes to."""
        return Place(os.getpid(), ray.get_runtime_context().get_node_id(), os.environ.get(_LOG_VARIABLE))

    @ray.method(concurrency_group="watch", max_task_retries=0)
    def ping(self) -> None:
        """Answers whatever the process computes, as long as Python gets its turn."""

    @ray.method(concurrency_group="watch", max_task_retries=0)
    def lifetime(self) -> None:
        """Never returns: the call fails when the process dies."""
        threading.Event().wait()


#: Every actor class needs this group of threads, for :meth:`Worker.lifetime` and :meth:`Worker.ping`.
WATCH = {"watch": 2}


#: By default glibc takes a tensor of some megabytes from the kernel and gives it back, each time: the kernel clears its
#: pages anew, which is a tenth of an update on a CPU and a fifth of a forward pass. 32 MB is the most that mallopt(3)
#: takes as a threshold. The rest that is free at the end of the heap stays with the process, up to 1 GB of it.
MALLOC = {"MALLOC_MMAP_THRESHOLD_": str(2**25), "MALLOC_TRIM_THRESHOLD_": str(2**30)}


@dataclass(frozen=True)
class Resources:
    """What one process of a role takes."""

    cpus: float
    gpus: float = 0
    custom: dict[str, float] = field(default_factory=dict)

    def bundle(self) -> dict[str, float]:
        bundle = {"CPU": self.cpus, **self.custom}
        return bundle | {"GPU": self.gpus} if self.gpus else bundle

    @property
    def threads(self) -> int:
        return max(1, math.floor(self.cpus))

    def environment(self, name: str) -> dict[str, str]:
        """Threads by CPUs, waiting without spinning (two processes that spin on two cores run at a fiftieth), and
        memory that is used again without the kernel.

        Must be in the environment before the process starts.
        """
        threads = str(self.threads)
        log = {_LOG_VARIABLE: os.path.join(log_dir, f"{name}.log")} if log_dir else {}
        return {
            "OMP_NUM_THREADS": threads,
            "MKL_NUM_THREADS": threads,
            "OMP_WAIT_POLICY": "PASSIVE",
            "TOKENIZERS_PARALLELISM": "false",
            **MALLOC,
            **log,
        }


class Group:
    """``count`` actors of one class on one placement group.

    Args:
        make_args: index of the actor to the arguments of its constructor.
        patient: wait for nodes that are not there yet, ``seconds`` long: they may be replacements of lost ones.
        ray_restarts: for actors without a state: Ray starts one that died anew, and gives it its calls again.

    Raises:
        WorkerFailed: the cluster cannot place the group within ``seconds``.
    """

    def __init__(
        self,
        role: str,
        actor_class: Any,
        count: int,
        resources: Resources,
        make_args: Callable[[int], Sequence[Any]],
        *,
        strategy: str,
        seconds: float,
        concurrency: int = 1,
        ray_restarts: bool = False,
        patient: bool = False,
    ) -> None:
        self.role = role
        self.seconds = seconds
        self._released = False
        # A process that asks for nothing needs no place; Ray refuses empty bundles.
        needs = any(resources.bundle().values())
        self.placement = _place(role, [resources.bundle()] * count, strategy, seconds, patient) if needs else None
        retries = -1 if ray_restarts else 0

        def start(i: int) -> ActorHandle:
            return actor_class.options(
                num_cpus=resources.cpus,
                num_gpus=resources.gpus,
                resources=resources.custom or None,
                max_concurrency=concurrency,
                max_restarts=retries,
                max_task_retries=retries,
                scheduling_strategy=self._bundle(i),
                runtime_env={"env_vars": resources.environment(f"{role}-{i}")},
            ).remote(*make_args(i))

        self._start = start
        self._places: dict[int, ObjectRef] = {}
        self._log_starts: dict[int, int] = {}
        self.actors: list[ActorHandle] = [start(i) for i in range(count)]

    def _bundle(self, i: int) -> PlacementGroupSchedulingStrategy | str:
        if self.placement is None:
            return "DEFAULT"
        return PlacementGroupSchedulingStrategy(self.placement, placement_group_bundle_index=i)

    def wait_ready(self) -> list[Any]:
        """Block until every actor is up; returns what their ``ready`` returned."""
        return wait_for([a.ready.remote() for a in self.actors], f"start of {self.role}", self.seconds)

    def processes(self) -> list[tuple[str, ActorHandle, Place]]:
        """Name, handle and place of every actor that has begun its work."""
        found = []
        for i, ref in self._places.items():
            if ray.wait([ref], timeout=0)[0]:
                found.append((f"{self.role} {i}", self.actors[i], ray.get(ref)))
        return found

    def restart(self, i: int) -> None:
        """A new actor in the place of one that died."""
        ray.kill(self.actors[i])  # what hangs is not dead yet
        self.actors[i] = self._start(i)

    def guard(self, faults: Faults) -> None:
        """Note deaths of actors that Ray starts anew by itself."""
        for i in range(len(self.actors)):
            self.watch(i, functools.partial(self._died, i, faults))

    def _died(self, i: int, faults: Faults, error: Exception) -> None:
        name, actor = f"{self.role} {i}", self.actors[i]
        try:
            faults.died(self.role, name, self.cause_of_death(i, error))
        except WorkerFailed as too_often:
            faults.announce(str(too_often))
            ray.kill(actor)  # whoever waits for it gets the error
            return
        # Answered by the process that Ray has started in its place.
        actor.ready.remote().future().add_done_callback(
            lambda answer: faults.works_again(name) if answer.exception() is None else None
        )
        self.watch(i, functools.partial(self._died, i, faults))

    def cause_of_death(self, i: int, error: Exception) -> str:
        """What Ray knows, and what the log of the process says."""
        cause = cause_of_death(error)
        log = os.path.join(log_dir, f"{self.role}-{i}.log") if log_dir else ""
        if os.path.exists(log):
            cause += last_words(log, self._log_starts.get(i, 0))
            self._log_starts[i] = os.path.getsize(log)
        return cause

    def watch(self, i: int, died: Callable[[Exception], None]) -> None:
        """Call ``died`` when the process of actor ``i`` is gone, in a thread of Ray's."""

        # Asked for beforehand: a process that hangs cannot say where it is.
        self._places[i] = self.actors[i].place.remote()

        def ended(future: Any) -> None:
            if not self._released:
                died(future.exception())

        self.actors[i].lifetime.remote().future().add_done_callback(ended)

    def spans(self) -> list[Span]:
        """The trace of all actors since the last call; of those that answer soon: no run fails for want of a trace."""
        refs: list[ObjectRef] = [a.spans.remote() for a in self.actors]
        ready, _ = ray.wait(refs, num_returns=len(refs), timeout=TRACE_SECONDS)
        spans: list[Span] = []
        for ref in ready:
            with contextlib.suppress(RayError):  # one that has died has no trace any more
                spans += ray.get(ref)
        return spans

    def stop_calling(self) -> None:
        """Ray is about to end: from here on only the run's own thread calls it.

        A call of another thread would start a cluster again, or end this process at once with exit code 1
        (Ray 2.60, CoreWorkerProcess::EnsureInitialized).
        """
        self._released = True

    def release(self) -> None:
        """Kill the actors and give their resources back."""
        self._released = True
        for actor in self.actors:
            ray.kill(actor)
        if self.placement is not None:
            remove_placement_group(self.placement)


class Startable(Protocol):
    """What a run starts, traces and ends: groups of actors, and what holds one."""

    def wait_ready(self) -> Any: ...

    def guard(self, faults: Faults) -> None:
        """From here on processes may die: note it, and do what can be done."""
        ...

    def processes(self) -> list[tuple[str, ActorHandle, Place]]: ...

    def spans(self) -> list[Span]: ...

    def stop_calling(self) -> None:
        """Ray is about to end: from here on only the run's own thread calls it."""
        ...

    def release(self) -> None: ...


class Holder:
    """What the driver holds of a role: verbs of its own over a group that it starts and ends."""

    def __init__(self, group: Startable) -> None:
        self._held = group

    def wait_ready(self) -> Any:
        return self._held.wait_ready()

    def guard(self, faults: Faults) -> None:
        self._held.guard(faults)

    def processes(self) -> list[tuple[str, ActorHandle, Place]]:
        return self._held.processes()

    def spans(self) -> list[Span]:
        return self._held.spans()

    def stop_calling(self) -> None:
        self._held.stop_calling()

    def release(self) -> None:
        self._held.release()


def _place(role: str, bundles: list[dict[str, float]], strategy: str, seconds: float, patient: bool) -> PlacementGroup:
    group = placement_group(bundles, strategy=strategy, name=f"rlhf_dist-{role}")
    # A group that the whole cluster could never hold is refused at once; a busy cluster may free resources.
    total = ray.cluster_resources()
    needed: dict[str, float] = {}
    for bundle in bundles:
        for name, amount in bundle.items():
            needed[name] = needed.get(name, 0) + amount
    short = {n: (a, total.get(n, 0)) for n, a in needed.items() if a > total.get(n, 0) + 1e-9}
    if (short and not patient) or not group.wait(seconds):
        remove_placement_group(group)
        free = ray.available_resources()
        detail = ", ".join(
            f"{n}: {a:g} needed, {total.get(n, 0):g} in the cluster, {free.get(n, 0):g} free" for n, a in needed.items()
        )
        raise WorkerFailed(f"cannot place {role} ({len(bundles)} processes, strategy {strategy}): {detail}")
    return group
