"""Which groups of samples may be submitted, and which are trained next: a plain state machine.

No Ray, no clock, no thread, so that a property test can drive it through any
order of events. Groups are numbered in the order of the prompt stream.

    >>> ledger = Ledger(batch_size=2)
    >>> ledger.admit()
    [0, 1]
    >>> ledger.completed(1); ledger.completed(0); ledger.take_batch()
    [0, 1]
    >>> ledger.admit()          # version 1 is not published yet
    []
    >>> ledger.published(1); ledger.admit()
    [2, 3]
    >>> ledger.discarded(2); ledger.admit()
    [4]
"""

from __future__ import annotations


class Ledger:
    """Admission by ``groups_submitted < (version + staleness + 1) * batch_size``; batches in prompt order.

    Args:
        batch_size: groups per training step.
        max_staleness: policy versions by which a trained group may be old. Batches are taken in prompt order,
            which is exact for 0.
        version, next_group: where a resumed run continues.
    """

    def __init__(self, batch_size: int, max_staleness: int = 0, version: int = 0, next_group: int = 0) -> None:
        self.batch_size = batch_size
        self.max_staleness = max_staleness
        self.version = version
        self.next_group = next_group
        self.submitted = version * batch_size
        self.running: set[int] = set()
        self.complete: set[int] = set()

    def admit(self) -> list[int]:
        """Groups that may be submitted now; they count as running from here on."""
        limit = (self.version + self.max_staleness + 1) * self.batch_size
        groups = list(range(self.next_group, self.next_group + max(0, limit - self.submitted)))
        self.next_group += len(groups)
        self.submitted += len(groups)
        self.running.update(groups)
        return groups

    def completed(self, group: int) -> None:
        """Raises ValueError if the group is not running: it would be trained twice."""
        self._remove(group)
        self.complete.add(group)

    def discarded(self, group: int) -> None:
        """A group that shall not be trained; another may be submitted in its place.

        Raises:
            ValueError: the group is not running.
        """
        self._remove(group)
        self.submitted -= 1

    def lost(self, groups: list[int]) -> list[int]:
        """Groups to submit again after a generator died: those of ``groups`` that are still running."""
        return sorted(self.running.intersection(groups))

    def take_batch(self) -> list[int] | None:
        """The next batch if all of its groups are complete, else None."""
        batch = sorted(self.running | self.complete)[: self.batch_size]
        if len(batch) < self.batch_size or not self.complete.issuperset(batch):
            return None
        self.complete.difference_update(batch)
        return batch

    def published(self, version: int) -> None:
        """A new policy version serves. Raises ValueError if it is not the next one."""
        if version != self.version + 1:
            raise ValueError(f"version {version} was published after version {self.version}")
        self.version = version

    def _remove(self, group: int) -> None:
        if group not in self.running:
            raise ValueError(f"group {group} is not running: it was completed already or never submitted")
        self.running.remove(group)
