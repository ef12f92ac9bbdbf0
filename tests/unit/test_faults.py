"""What an error of another process means, and how often a role may be started anew."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from ray.exceptions import ActorDiedError, ActorUnavailableError, ObjectLostError, RayTaskError

from rlhf_dist.actors import faults as module
from rlhf_dist.actors.diagnosis import last_words
from rlhf_dist.actors.faults import Faults
from rlhf_dist.actors.waiting import WorkerDied, WorkerFailed, explained


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (ActorDiedError(), "reward, scoring: the process died"),
        (ActorUnavailableError("socket closed", None), "reward, scoring: the process died"),
        (ObjectLostError("00ff", "1.2.3.4", "here"), "reward, scoring: what it held is lost"),
        (RayTaskError("build", "a traceback", ActorDiedError()), "reward, scoring: the process died"),
        (RayTaskError("f", "t", RayTaskError("g", "t", ActorDiedError())), "reward, scoring: the process died"),
    ],
    ids=["died", "unavailable", "lost", "died behind a call", "died behind two calls"],
)
def test_a_death_is_what_can_be_done_again(error: Exception, said: str) -> None:
    found = explained(error, "reward, scoring")
    assert type(found) is WorkerDied
    assert str(found).startswith(said)


def test_a_bug_is_not() -> None:
    found = explained(RayTaskError("build", "a traceback", KeyError("x")), "experience")
    assert type(found) is WorkerFailed


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    now = [1000.0]
    monkeypatch.setattr(module.time, "time", lambda: now[0])
    return now


def test_restarts_are_paused_and_limited_within_an_hour(tmp_path: Path, clock: list[float]) -> None:
    said: list[str] = []
    faults = Faults(4, said.append, tmp_path / "faults.jsonl")
    assert [faults.died("reward", "reward 0", "cause") for _ in range(4)] == [0, 1, 2, 4]
    with pytest.raises(WorkerFailed, match=r"reward 1 died: cause 5. reward was started anew 4 times within an hour"):
        faults.died("reward", "reward 1", "cause 5")
    assert faults.died("generator", "generator 0", "cause") == 0, "each role has its own count"
    clock[0] += module.WINDOW + 1
    assert faults.died("reward", "reward 0", "cause") == 0
    assert said[1] == "reward 0 died: cause. Starting it anew in 1 s"


def test_the_record_says_for_how_long(tmp_path: Path, clock: list[float]) -> None:
    said: list[str] = []
    faults = Faults(4, said.append, tmp_path / "faults.jsonl")
    faults.died("reward", "reward 0", "killed")
    faults.died("policy", "policy 1", "killed")
    clock[0] += 7
    faults.works_again("reward 0")
    faults.works_again("generator 3")
    clock[0] += 5
    faults.works_again()
    faults.works_again()
    lines = [json.loads(line) for line in (tmp_path / "faults.jsonl").read_text().splitlines()]
    assert [(x["process"], x["away_seconds"]) for x in lines] == [("reward 0", 7), ("policy 1", 12)]
    assert said[2:] == ["reward 0 works again after 7.0 s", "policy 1 works again after 12.0 s"]


def test_last_words_are_those_of_the_process_that_died(tmp_path: Path) -> None:
    log = tmp_path / "reward-0.log"
    log.write_text("ValueError: caught\nFatal Python error: Segmentation fault\n" + 60 * "  File x, line 1\n")
    assert last_words(str(log), 0) == "; its log says: Fatal Python error: Segmentation fault"
    start = log.stat().st_size
    log.write_text(log.read_text() + "started anew\n")
    assert "killed from outside" in last_words(str(log), start)
