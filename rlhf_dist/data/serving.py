"""Which generators serve which version of the weights, and whom a publication waits for: a plain state machine.

>>> serving = Serving(2)
>>> first = serving.published(0, now=0.0)
>>> serving.loaded(first, 1, {}, now=2.0); serving.loading(0)
[0]
>>> serving.lost(0); serving.loading(0)    # the others go on without it
[]
>>> [sync.version for sync in serving.take_complete()]
[0]
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass
class Sync:
    """One version of the weights on its way to the generators."""

    version: int
    published: float
    """Seconds, of the caller's clock."""
    records: dict[int, dict[str, Any]] = field(default_factory=dict)
    """By generator: what it verified, and ``serving_seconds`` since the publication."""

    def served_by(self, generators: set[int]) -> bool:
        """Whether all of ``generators``, and at least one, serve this version or a newer one."""
        return bool(self.records) and generators <= self.records.keys()


class Serving:
    """The generators that live, and the versions that not all of them serve yet."""

    def __init__(self, generators: int) -> None:
        self.everybody = set(range(generators))
        self.live = set(self.everybody)
        self.pending: list[Sync] = []
        self._complete: list[Sync] = []

    def published(self, version: int, now: float) -> Sync:
        """``version`` is on its way, since ``now``."""
        sync = Sync(version, now)
        self.pending.append(sync)
        return sync

    def loaded(self, sync: Sync, generator: int, record: dict[str, Any], now: float) -> None:
        """The generator serves the version; ``record`` is what it verified."""
        sync.records[generator] = record | {"serving_seconds": now - sync.published}
        self._settle()

    def lost(self, generator: int) -> None:
        """Nobody waits for a generator that died."""
        self.live.remove(generator)
        self._settle()

    def joined(self, generator: int, record: dict[str, Any], now: float) -> None:
        """A generator that was lost serves the newest version, and with it all that are pending."""
        self.live.add(generator)
        for sync in self.pending:
            sync.records[generator] = record | {"serving_seconds": now - sync.published}
        self._settle()

    def loading(self, version: int) -> list[int]:
        """Generators that do not serve ``version`` or a newer one yet."""
        behind = [sync for sync in self.pending if sync.version <= version]
        # With nobody there the version waits for the first who comes back.
        return sorted({i for sync in behind for i in (self.live or self.everybody) - sync.records.keys()})

    def take_complete(self) -> list[Sync]:
        """What has completed since the last call."""
        complete, self._complete = self._complete, []
        return complete

    def forget(self) -> None:
        """Give up every version that is on its way."""
        self.pending.clear()
        self._complete.clear()

    def _settle(self) -> None:
        """Put those aside that every living generator has completed."""
        done = [sync for sync in self.pending if sync.served_by(self.live)]
        self.pending = [sync for sync in self.pending if not sync.served_by(self.live)]
        self._complete += done
