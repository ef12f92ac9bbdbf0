"""Deaths of processes: what died and why, how often a role may be started anew, and how long it was away."""

from __future__ import annotations

import json
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

from rlhf_dist.actors.diagnosis import oom_kills
from rlhf_dist.actors.waiting import WorkerFailed

#: Restarts of one role are counted over so many seconds: a fault a night is no reason to stop, ten in an hour are.
WINDOW = 3600.0
#: Seconds of pause before the second restart within the window; doubled for each further one, up to the longest.
PAUSE, LONGEST_PAUSE = 1.0, 60.0


@dataclass
class Fault:
    """One death."""

    process: str
    cause: str
    time: float
    """Seconds since the epoch."""
    away_seconds: float | None = None
    """Until the process did its work again; None as long as it does not."""


class Faults:
    """Called from whatever thread notices.

    Args:
        max_restarts: of one role within an hour.
        announce: shows a line to whoever watches the run.
        path: ``faults.jsonl``, which gets a line for each death when it is over.
    """

    def __init__(self, max_restarts: int, announce: Callable[[str], None], path: str | Path) -> None:
        self.max_restarts = max_restarts
        self.announce = announce
        self.path = Path(path)
        self.faults: list[Fault] = []
        self._oom_kills = oom_kills()
        self._restarts: dict[str, deque[float]] = {}
        self._lock = threading.Lock()

    def died(self, role: str, process: str, cause: str) -> float:
        """Note a death; returns the seconds to wait before the process is started anew.

        Raises:
            WorkerFailed: the role was started anew too often.
        """
        now = time.time()
        if (killed := oom_kills() - self._oom_kills) > 0:
            cause += f"; the kernel has killed {killed} processes for want of memory since the run began"
        with self._lock:
            self.faults.append(Fault(process, cause, now))
            restarts = self._restarts.setdefault(role, deque())
            while restarts and restarts[0] < now - WINDOW:
                restarts.popleft()
            if len(restarts) >= self.max_restarts:
                raise WorkerFailed(
                    f"{process} died: {cause}. {role} was started anew {len(restarts)} times within an hour, "
                    f"run.max_restarts allows {self.max_restarts}"
                )
            restarts.append(now)
            pause = 0.0 if len(restarts) == 1 else min(LONGEST_PAUSE, PAUSE * 2 ** (len(restarts) - 2))
        self.announce(f"{process} died: {cause}. Starting it anew" + (f" in {pause:g} s" if pause else ""))
        return pause

    def works_again(self, process: str | None = None) -> None:
        """The process, or the one in its place, does its work again; None: all of them do."""
        with self._lock:
            over = [f for f in self.faults if process in (None, f.process) and f.away_seconds is None]
            for fault in over:
                fault.away_seconds = time.time() - fault.time
                with open(self.path, "a") as file:
                    file.write(json.dumps(asdict(fault)) + "\n")
        for fault in {f.process: f for f in over}.values():
            self.announce(f"{fault.process} works again after {fault.away_seconds:.1f} s")
