"""The ledger under any order of events: admission bounded by staleness, nothing lost, nothing trained twice."""

from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from rlhf_dist.data.ledger import Ledger


class LedgerMachine(RuleBasedStateMachine):
    """Generators that finish in any order, die with what they hold, and a learner that trains and publishes."""

    @initialize(batch=st.integers(1, 4), staleness=st.integers(0, 3), resumed_at=st.integers(0, 3))
    def start(self, batch: int, staleness: int, resumed_at: int) -> None:
        self.batch, self.staleness = batch, staleness
        self.first = resumed_at * batch + 7
        self.ledger = Ledger(batch, staleness, version=resumed_at, next_group=self.first)
        self.version = self.resumed_at = resumed_at
        self.discarded: set[int] = set()
        self.sampled_under: dict[int, int] = {}
        self.at_generators: set[int] = set()
        self.finished: set[int] = set()
        self.trained: list[int] = []

    @rule()
    def admit(self) -> None:
        groups = self.ledger.admit()
        assert not self.sampled_under.keys() & groups, "admitted twice"
        self.sampled_under |= dict.fromkeys(groups, self.version)
        self.at_generators |= set(groups)
        assert self.ledger.admit() == []

    @precondition(lambda self: self.at_generators)
    @rule(data=st.data())
    def complete(self, data: st.DataObject) -> None:
        group = data.draw(st.sampled_from(sorted(self.at_generators)))
        self.at_generators.remove(group)
        self.finished.add(group)
        self.ledger.completed(group)

    @precondition(lambda self: self.finished)
    @rule(data=st.data())
    def complete_again(self, data: st.DataObject) -> None:
        group = data.draw(st.sampled_from(sorted(self.finished)))
        with pytest.raises(ValueError, match=f"group {group} is not running"):
            self.ledger.completed(group)

    @rule(data=st.data())
    def generator_dies(self, data: st.DataObject) -> None:
        known = sorted(self.sampled_under)
        held = data.draw(st.lists(st.sampled_from(known), unique=True)) if known else []
        again = self.ledger.lost(held)
        assert again == sorted(self.at_generators.intersection(held)), "exactly its unfinished groups"
        self.sampled_under |= dict.fromkeys(again, self.version)

    @precondition(lambda self: self.at_generators)
    @rule(data=st.data())
    def discard(self, data: st.DataObject) -> None:
        group = data.draw(st.sampled_from(sorted(self.at_generators)))
        self.at_generators.remove(group)
        self.discarded.add(group)
        self.ledger.discarded(group)
        with pytest.raises(ValueError, match=f"group {group} is not running"):
            self.ledger.completed(group)

    # One batch between two versions: the loop trains, then publishes.
    @precondition(lambda self: len(self.trained) // self.batch + self.resumed_at == self.version)
    @rule()
    def train(self) -> None:
        waiting = sorted(self.sampled_under.keys() - self.discarded - set(self.trained))
        batch = self.ledger.take_batch()
        if batch is None:
            assert len(waiting) < self.batch or not self.finished.issuperset(waiting[: self.batch])
            return
        assert batch == waiting[: self.batch], "in the order of the prompts"
        assert self.finished.issuperset(batch)
        ages = [self.version - self.sampled_under[g] for g in batch]
        assert max(ages) <= self.staleness
        self.trained += batch

    @precondition(lambda self: len(self.trained) // self.batch + self.resumed_at == self.version + 1)
    @rule()
    def publish(self) -> None:
        self.version += 1
        self.ledger.published(self.version)

    @rule(step=st.sampled_from([-1, 0, 2, 5]))
    def publish_out_of_order(self, step: int) -> None:
        with pytest.raises(ValueError, match=f"was published after version {self.version}"):
            self.ledger.published(self.version + step)

    @invariant()
    def bounded(self) -> None:
        assert self.ledger.submitted <= (self.version + self.staleness + 1) * self.batch
        kept = len(self.sampled_under) - len(self.discarded)
        assert self.ledger.submitted == self.resumed_at * self.batch + kept
        assert self.ledger.running == self.at_generators
        assert self.ledger.complete == self.finished - set(self.trained)


TestLedger = LedgerMachine.TestCase
TestLedger.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)


def test_on_policy_waits_for_the_version() -> None:
    ledger = Ledger(batch_size=2)
    assert ledger.admit() == [0, 1]
    ledger.completed(1)
    assert ledger.take_batch() is None
    ledger.completed(0)
    assert ledger.take_batch() == [0, 1]
    assert ledger.admit() == []
    ledger.published(1)
    assert ledger.admit() == [2, 3]


def test_staleness_lets_the_generators_run_ahead() -> None:
    ledger = Ledger(batch_size=2, max_staleness=1)
    assert ledger.admit() == [0, 1, 2, 3]
    ledger.completed(3)
    ledger.completed(2)
    assert ledger.take_batch() is None, "batches are trained in the order of the prompts"


def test_a_resumed_run_continues_where_it_was() -> None:
    ledger = Ledger(batch_size=2, version=3, next_group=9)
    assert ledger.admit() == [9, 10]


def test_a_discarded_group_makes_room_for_another() -> None:
    ledger = Ledger(batch_size=2)
    assert ledger.admit() == [0, 1]
    ledger.discarded(0)
    assert ledger.admit() == [2]
    ledger.completed(1)
    assert ledger.take_batch() is None
    ledger.completed(2)
    assert ledger.take_batch() == [1, 2]


def test_a_group_that_was_never_submitted_cannot_complete() -> None:
    with pytest.raises(ValueError, match="group 0 is not running"):
        Ledger(batch_size=1).completed(0)
