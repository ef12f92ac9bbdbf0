"""The ledger under any order of events: ages bounded, nothing lost, nothing trained twice, nothing ever stuck."""

from __future__ import annotations

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from rlhf_dist.data.ledger import Ledger


class LedgerMachine(RuleBasedStateMachine):
    """Generators that finish in any order, die with what they hold, and a learner that trains and publishes."""

    @initialize(batch=st.integers(1, 4), staleness=st.integers(0, 3), resumed_at=st.integers(0, 3))
    def start(self, batch: int, staleness: int, resumed_at: int) -> None:
        self.batch, self.staleness = batch, staleness
        self.first = resumed_at * batch + 7
        self.ledger = Ledger(batch, staleness, version=resumed_at)
        assert self.ledger.load_state_dict({"next_group": self.first, "outstanding": []}) == []
        self.version = self.resumed_at = resumed_at
        self.discarded: set[int] = set()
        self.sampled_under: dict[int, int] = {}
        self.at_generators: set[int] = set()
        self.finished: set[int] = set()
        self.open: list[int] | None = None
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

    @precondition(lambda self: self.open is None and len(self.trained) // self.batch + self.resumed_at == self.version)
    @rule(later=st.integers(0, 2))
    def restart(self, later: int) -> None:
        """The driver dies between two batches; another one goes on, at a version that was never used."""
        state = json.loads(json.dumps(self.ledger.state_dict()))
        self.version += later
        self.resumed_at += later
        self.ledger = Ledger(self.batch, self.staleness, version=self.version)
        again = self.ledger.load_state_dict(state)
        assert set(again) == self.sampled_under.keys() - set(self.trained) - self.discarded
        self.at_generators = set(again)
        self.finished -= self.at_generators
        self.sampled_under |= dict.fromkeys(again, self.version)

    # One batch between two versions: the loop trains, then publishes.
    @precondition(lambda self: self.open is None and len(self.trained) // self.batch + self.resumed_at == self.version)
    @rule()
    def open_batch(self) -> None:
        self.ledger.open_batch()
        self.open = []
        self.take()

    @precondition(lambda self: self.open is not None)
    @rule()
    def take(self) -> None:
        assert self.open is not None
        taken = self.ledger.take()
        assert self.finished.issuperset(taken)
        assert not set(taken) & set(self.trained + self.open)
        self.open += taken
        waiting = self.finished - self.discarded - set(self.trained) - set(self.open)
        if waiting and len(self.open) < self.batch:
            # What is complete stays outside for one reason only: others need the places to meet their deadlines.
            assert self.at_generators
            assert not self.meets_deadlines(without_places=1)

    def meets_deadlines(self, without_places: int) -> bool:
        """Whether groups that are still running can be trained in time, one batch a version, with places taken away."""
        assert self.open is not None
        places = self.batch - len(self.open) - without_places
        return all(
            sum(self.sampled_under[g] + self.staleness <= d for g in self.at_generators)
            <= places + (d - self.version) * self.batch
            for d in range(self.version, self.version + self.staleness)
        )

    @precondition(lambda self: self.open)
    @rule(data=st.data())
    def discard(self, data: st.DataObject) -> None:
        assert self.open is not None
        group = data.draw(st.sampled_from(sorted(self.open)))
        self.open.remove(group)
        self.discarded.add(group)
        self.ledger.discarded(group)
        with pytest.raises(ValueError, match=f"group {group} is not in the open batch"):
            self.ledger.discarded(group)

    @precondition(lambda self: self.open is not None)
    @rule()
    def train(self) -> None:
        assert self.open is not None
        if len(self.open) < self.batch:
            assert not self.ledger.full
            with pytest.raises(ValueError, match="is not full"):
                self.ledger.close_batch()
            return
        ages = [self.version - self.sampled_under[g] for g in self.open]
        assert max(ages) <= self.staleness
        assert self.ledger.close_batch() == sorted(self.open)
        self.trained += self.open
        self.open = None

    @precondition(lambda self: self.open is None and len(self.trained) // self.batch + self.resumed_at > self.version)
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
        assert self.ledger.running.keys() == self.at_generators
        open_batch = set(self.open or ())
        assert self.ledger.complete.keys() == self.finished - set(self.trained) - self.discarded - open_batch

    @invariant()
    def every_deadline_can_be_met(self) -> None:
        """Whatever happens next, no group has to be dropped: overdue groups always have a place."""
        due = [*self.ledger.running.values(), *self.ledger.complete.values()]
        trained_now = self.open is None and len(self.trained) // self.batch + self.resumed_at > self.version
        free = 0 if trained_now else self.batch - len(self.open or ())
        for d in range(self.version, self.version + self.staleness + 1):
            assert sum(x <= d for x in due) <= free + (d - self.version) * self.batch


TestLedger = LedgerMachine.TestCase
TestLedger.settings = settings(max_examples=80, stateful_step_count=50, deadline=None)


@given(
    batch=st.integers(1, 4),
    staleness=st.integers(0, 3),
    steps=st.integers(1, 8),
    order=st.randoms(use_true_random=False),
)
@settings(max_examples=100, deadline=None)
def test_a_whole_run_trains_every_group_once_in_time(batch: int, staleness: int, steps: int, order) -> None:
    ledger = Ledger(batch, staleness, last_version=steps)
    admitted: dict[int, int] = {}
    trained: list[int] = []
    for version in range(steps):
        admitted |= dict.fromkeys(ledger.admit(), version)
        ledger.open_batch()
        taken = ledger.take()
        while not ledger.full:
            # A group that is running, and any of them: a long response may be the last of all.
            ledger.completed(order.choice(sorted(ledger.running)))
            taken += ledger.take()
        assert max(version - admitted[g] for g in taken) <= staleness
        assert sorted(taken) == ledger.close_batch()
        trained += taken
        ledger.published(version + 1)
    assert sorted(trained) == list(range(batch * steps))
    assert ledger.admit() == [], "nothing was sampled for nobody"
    assert not ledger.running
    assert not ledger.complete


def test_on_policy_waits_for_the_version() -> None:
    ledger = Ledger(batch_size=2)
    assert ledger.admit() == [0, 1]
    ledger.open_batch()
    ledger.completed(1)
    assert ledger.take() == [1]
    assert not ledger.full
    ledger.completed(0)
    assert ledger.take() == [0]
    assert ledger.close_batch() == [0, 1]
    assert ledger.admit() == []
    ledger.published(1)
    assert ledger.admit() == [2, 3]


def test_staleness_trains_what_is_complete_first() -> None:
    ledger = Ledger(batch_size=2, max_staleness=1)
    assert ledger.admit() == [0, 1, 2, 3]
    ledger.open_batch()
    ledger.completed(3)
    ledger.completed(2)
    assert ledger.take() == [3, 2]
    ledger.close_batch()
    ledger.published(1)
    assert ledger.admit() == [4, 5]
    ledger.open_batch()
    for group in (4, 5):
        ledger.completed(group)
    assert ledger.take() == [], "groups 0 and 1 are due, however long they take"
    ledger.completed(1)
    ledger.completed(0)
    assert ledger.take() == [1, 0]


def test_a_place_that_no_deadline_needs_goes_to_whoever_is_complete() -> None:
    ledger = Ledger(batch_size=2, max_staleness=1)
    ledger.admit()
    ledger.open_batch()
    for group in (0, 1):
        ledger.completed(group)
    assert ledger.take() == [0, 1]
    ledger.close_batch()
    ledger.published(1)
    ledger.completed(2)
    assert ledger.admit() == [4, 5]
    ledger.open_batch()
    ledger.completed(4)
    assert ledger.take() == [2], "the second place is kept for group 3"


def test_a_group_that_was_lost_gets_a_new_deadline() -> None:
    ledger = Ledger(batch_size=1, max_staleness=1)
    assert ledger.admit() == [0, 1]
    ledger.open_batch()
    ledger.completed(1)
    assert ledger.take() == [1]
    ledger.close_batch()
    ledger.published(1)
    assert ledger.lost([0, 1]) == [0]
    assert ledger.admit() == [2]
    ledger.open_batch()
    ledger.completed(2)
    assert ledger.take() == [2], "group 0 starts again under version 1, so it is not due yet"


def test_a_resumed_run_continues_where_it_was() -> None:
    ledger = Ledger(batch_size=2, max_staleness=1)
    assert ledger.admit() == [0, 1, 2, 3]
    ledger.open_batch()
    for group in (0, 2):
        ledger.completed(group)
    assert ledger.take() == [0, 2]
    assert ledger.close_batch() == [0, 2]
    ledger.published(1)
    resumed = Ledger(batch_size=2, max_staleness=1, version=5)
    assert resumed.load_state_dict(ledger.state_dict()) == [1, 3]
    assert resumed.admit() == [4, 5]


def test_a_discarded_group_makes_room_for_another() -> None:
    ledger = Ledger(batch_size=2)
    assert ledger.admit() == [0, 1]
    ledger.open_batch()
    for group in (0, 1):
        ledger.completed(group)
    assert ledger.take() == [0, 1]
    ledger.discarded(0)
    assert ledger.admit() == [2]
    ledger.completed(2)
    assert ledger.take() == [2]
    assert ledger.close_batch() == [1, 2]


def test_no_group_is_submitted_that_nobody_would_train() -> None:
    ledger = Ledger(batch_size=2, max_staleness=3, last_version=2)
    assert ledger.admit() == [0, 1, 2, 3]


def test_what_cannot_be() -> None:
    ledger = Ledger(batch_size=1)
    with pytest.raises(ValueError, match="group 0 is not running"):
        ledger.completed(0)
    ledger.open_batch()
    with pytest.raises(ValueError, match="open already"):
        ledger.open_batch()
    with pytest.raises(ValueError, match="while the batch of version 0 is open"):
        ledger.published(1)
