"""Which groups of samples may be submitted, and which are trained next: a plain state machine.

No Ray, no clock, no thread, so that a property test can drive it through any
order of events. Groups are numbered in the order of the prompt stream.

    >>> ledger = Ledger(batch_size=2)
    >>> ledger.admit()
    [0, 1]
    >>> ledger.open_batch(); ledger.completed(1); ledger.take()
    [1]
    >>> ledger.completed(0); ledger.take(); ledger.close_batch()
    [0]
    [0, 1]
    >>> ledger.admit()          # version 1 is not published yet
    []
    >>> ledger.published(1); ledger.admit()
    [2, 3]

With ``v`` the policy's version, ``S`` the staleness and ``B`` the batch size:

* **Admission.** A group may be submitted while ``submitted < (v + S + 1) * B``. Its oldest token is of version ``v``,
  so it must be trained at version ``v + S`` at the latest: its deadline.
* **Consumption.** A complete group enters the open batch if every other outstanding group can still meet its deadline:
  for every ``d``, those with a deadline up to ``d`` fit into the places that are left in the batches up to ``d``.
  Earliest deadlines first, then in order of completion.

Both together never need to drop a group: admission adds a group only where there is a place for it, and consumption
keeps the places. So nothing is thrown away, and no long response is put off for ever.
"""

from __future__ import annotations

from collections import Counter, deque
from typing import Any


class Ledger:
    """Admission and consumption of groups; see the module's docstring.

    Args:
        batch_size: groups per training step.
        max_staleness: policy versions by which a trained group may be old; 0 trains every group at its own version.
        last_version: the version that the last batch makes; no group is admitted that nobody would train.
        version: of the policy that the first batch is sampled from.
    """

    def __init__(
        self,
        batch_size: int,
        max_staleness: int = 0,
        last_version: int | None = None,
        version: int = 0,
    ) -> None:
        self.batch_size = batch_size
        self.max_staleness = max_staleness
        self.last_version = last_version
        self.version = version
        self.next_group = 0
        self.submitted = version * batch_size
        # Groups and their deadlines.
        self.running: dict[int, int] = {}
        self.complete: dict[int, int] = {}
        self._ready: dict[int, deque[int]] = {}
        """The complete ones of each deadline, in order of completion: to sort thousands at every chunk takes too long.
        """
        self.batch: dict[int, int] | None = None
        self._due: Counter[int] = Counter()
        """Groups that run or are complete, by deadline: counted, because there are thousands and few deadlines."""

    def admit(self) -> list[int]:
        """Groups that may be submitted now; they count as running from here on."""
        versions = self.version + self.max_staleness + 1
        if self.last_version is not None:
            versions = min(versions, self.last_version)
        count = max(0, versions * self.batch_size - self.submitted)
        groups = list(range(self.next_group, self.next_group + count))
        self.next_group += count
        self.submitted += count
        self._run(groups)
        return groups

    def completed(self, group: int) -> None:
        """Raises ValueError if the group is not running: it would be trained twice."""
        if group not in self.running:
            raise ValueError(f"group {group} is not running: it was completed already or never submitted")
        deadline = self.complete[group] = self.running.pop(group)
        self._ready.setdefault(deadline, deque()).append(group)

    def open_batch(self) -> None:
        """Begin the batch of the current version.

        Raises:
            ValueError: the one before is still open.
        """
        if self.batch is not None:
            raise ValueError(f"the batch of version {self.version} is open already")
        self.batch = {}

    def take(self) -> list[int]:
        """Complete groups that enter the open batch now."""
        taken: list[int] = []
        if self.batch is None or self.full:
            return taken
        room = self._room()
        for deadline in sorted(self._ready):
            ready = self._ready[deadline]
            while ready and not self.full and all(room[d] >= 1 for d in room if d < deadline):
                group = ready.popleft()
                self.batch[group] = self.complete.pop(group)
                self._due[deadline] -= 1
                room = {d: places - (d < deadline) for d, places in room.items()}
                taken.append(group)
            if ready:
                break
            del self._ready[deadline]
        return taken

    def _room(self) -> dict[int, int]:
        """For each deadline ``d``: places in the batches up to ``d`` that no outstanding group due by then needs."""
        assert self.batch is not None
        free = self.batch_size - len(self.batch)
        return {
            d: free + (d - self.version) * self.batch_size - sum(n for other, n in self._due.items() if other <= d)
            for d in range(self.version, self.version + self.max_staleness + 1)
        }

    @property
    def full(self) -> bool:
        """Whether the open batch has all of its groups."""
        return self.batch is not None and len(self.batch) == self.batch_size

    def close_batch(self) -> list[int]:
        """The open batch was trained; returns its groups.

        Raises:
            ValueError: it is not full.
        """
        if not self.full or self.batch is None:
            raise ValueError(f"a batch of {len(self.batch or ())} groups is not full, it has {self.batch_size}")
        trained, self.batch = sorted(self.batch), None
        return trained

    def discarded(self, group: int) -> None:
        """A group of the open batch that shall not be trained; another may be submitted in its place.

        Raises:
            ValueError: the group is not in the open batch.
        """
        if self.batch is None or group not in self.batch:
            raise ValueError(f"group {group} is not in the open batch")
        del self.batch[group]
        self.submitted -= 1

    def lost(self, groups: list[int]) -> list[int]:
        """Groups to submit again after a generator died: those of ``groups`` that are still running.

        They start anew under the current version, which puts off their deadlines.
        """
        again = sorted(self.running.keys() & set(groups))
        self._due.subtract(self.running[group] for group in again)
        self._run(again)
        return again

    def state_dict(self) -> dict[str, Any]:
        """What a run that goes on from here must know, between two batches; JSON can hold it."""
        return {"next_group": self.next_group, "outstanding": sorted(self.running | self.complete)}

    def load_state_dict(self, state: dict[str, Any]) -> list[int]:
        """Go on from ``state``, at the version of this ledger; returns the groups that have to be submitted again.

        They start anew under the current version.
        """
        self.next_group = state["next_group"]
        self.submitted += len(state["outstanding"])
        self._run(state["outstanding"])
        return list(self.running)

    def published(self, version: int) -> None:
        """A new policy version. Raises ValueError if it is not the next one, or a batch is open."""
        if version != self.version + 1:
            raise ValueError(f"version {version} was published after version {self.version}")
        if self.batch is not None:
            raise ValueError(f"version {version} was published while the batch of version {self.version} is open")
        self.version = version
        self._due = +self._due

    def _run(self, groups: list[int]) -> None:
        """``groups`` are sampled from the current version, or a newer one."""
        deadline = self.version + self.max_staleness
        self.running |= dict.fromkeys(groups, deadline)
        self._due[deadline] += len(groups)
