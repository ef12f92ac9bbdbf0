"""Every wait for another process goes through here: bounded, named, and with the real cause when it fails."""

from __future__ import annotations

import re
import time
from typing import Any

import ray
from ray.exceptions import (
    ActorDiedError,
    GetTimeoutError,
    LocalRayletDiedError,
    NodeDiedError,
    ObjectLostError,
    OutOfMemoryError,
    RayActorError,
    RayError,
    RayTaskError,
    WorkerCrashedError,
)

#: What Ray raises when a process, a node or what it held is gone.
DEATHS = (RayActorError, WorkerCrashedError, OutOfMemoryError, ObjectLostError, NodeDiedError, LocalRayletDiedError)
#: Seconds in which the death of one rank shows after another has failed for want of it.
SETTLING = 10.0


class WorkerFailed(RuntimeError):
    """A process of the run failed; the message says which one, doing what, and why."""


class WorkerDied(WorkerFailed):
    """A process, or what it held, is gone. What it did can be done again."""


class WaitLimitExceeded(WorkerFailed):
    """The other process did not answer in time."""


#: Seconds for any one wait; set from ``run.wait_limit`` when the run starts.
limit: float = 1800.0


def wait_for(refs: Any, what: str, seconds: float | None = None) -> Any:
    """``ray.get(refs)`` within ``seconds`` (default: the run's limit).

    Args:
        what: who is waited for, doing what; part of every message.

    Raises:
        ValueError: as the other process raised it: a mistake of the user.
        WorkerFailed: the process died or raised.
    """
    seconds = limit if seconds is None else seconds
    started = time.monotonic()
    try:
        return ray.get(refs, timeout=seconds)
    except GetTimeoutError:
        waited = time.monotonic() - started
        raise WaitLimitExceeded(
            f"the driver waited {waited:.0f} s for {what}; the limit is {seconds:.0f} s (run.wait_limit)"
        ) from None
    except RayError as error:
        raise _gravest(error, refs if isinstance(refs, list) else [refs], what) from None


def _gravest(error: RayError, refs: list[Any], what: str) -> Exception:
    """What made ``refs`` fail: when one of several ranks dies, others fail as well, and may be heard first."""
    first = explained(error, what)
    if not isinstance(first, WorkerFailed) or isinstance(first, WorkerDied) or len(refs) == 1:
        return first
    ready, _ = ray.wait(refs, num_returns=len(refs), timeout=SETTLING, fetch_local=False)
    for ref in ready:
        try:
            ray.get(ref)
        except RayError as other:
            found = explained(other, what)
            if isinstance(found, WorkerDied):
                return found
    return first


def explained(error: Exception, what: str) -> Exception:
    """``error`` of a call to another process, in our words: who, doing what, why."""
    if isinstance(error, RayTaskError):
        return from_task_error(error, what)
    if isinstance(error, ActorDiedError) and (mistake := _mistake_at_start(str(error))):
        exception = ValueError(f"{what}: {mistake}")
        exception.add_note(str(error))
        return exception
    if isinstance(error, ActorDiedError) and "raised in its creation task" in str(error):
        # It would fail again, however often it was started.
        return WorkerFailed(f"{what}: the process died. {_first_lines(str(error))}")
    if isinstance(error, DEATHS):
        return WorkerDied(f"{what}: {cause_of_death(error)}")
    if isinstance(error, RayError):
        return WorkerFailed(f"{what}: {type(error).__name__}: {_first_lines(str(error))}")
    return error


def from_task_error(error: RayTaskError, what: str) -> Exception:
    """The exception that the worker raised, with its traceback (``str`` of Ray's wrapping) as a note."""
    cause = error.cause
    if isinstance(cause, RayError):  # a failed dependency: the origin is inside
        return explained(cause, what)
    # Not type(cause): subclasses such as JSONDecodeError take other arguments than a message.
    if isinstance(cause, ValueError):
        exception: Exception = ValueError(f"{what}: {cause}")
    elif isinstance(cause, FloatingPointError):
        exception = FloatingPointError(f"{what}: {cause}")
    else:
        exception = WorkerFailed(f"{what}: {type(cause).__name__}: {cause}")
    exception.add_note(str(error))
    return exception


def cause_of_death(error: Exception) -> str:
    """What Ray knows of it; the signal that killed a process it does not know."""
    if isinstance(error, OutOfMemoryError):
        return f"out of memory. {_first_lines(str(error))}"
    if isinstance(error, ObjectLostError):
        return f"what it held is lost. {_first_lines(str(error), 2)}"
    if isinstance(error, NodeDiedError) or "its node has died" in str(error):
        return f"its node died. {_first_lines(str(error), 2)}"
    detail = re.search(r"Worker exit type: (\w+)", str(error))
    return f"the process died (Ray: {detail[1] if detail else type(error).__name__})"


def _mistake_at_start(text: str) -> str:
    """The message of the ValueError that a constructor raised: Ray passes on its traceback alone, as text."""
    _, raised, message = text.rpartition("\nValueError: ")
    return message.strip() if raised and "\n  File " not in message else ""


def _first_lines(text: str, n: int = 6) -> str:
    return " ".join(line.strip() for line in text.splitlines()[:n] if line.strip())
