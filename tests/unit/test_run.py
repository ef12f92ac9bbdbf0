"""What a run says before it connects."""

from __future__ import annotations

import io
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from rlhf_dist.config_io import load
from rlhf_dist.observability.terminal import Terminal
from rlhf_dist.run import JOB_VARIABLE, Run


@pytest.fixture(autouse=True)
def same_handlers() -> Iterator[None]:
    """A run leaves signals ignored: its process ends with it."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGALRM)}
    yield
    for number, handler in handlers.items():
        signal.signal(number, handler)


def begun(folder: Path) -> str:
    """What a run prints that ends before it does anything."""
    output = io.StringIO()
    with Run(load(None, [f"run.root={folder}", "run.term_limit=60"]), Terminal(output)):
        pass
    return output.getvalue()


def test_the_name_of_the_variable_is_rays() -> None:
    from ray._private.runtime_env.constants import RAY_JOB_CONFIG_JSON_ENV_VAR

    assert JOB_VARIABLE == RAY_JOB_CONFIG_JSON_ENV_VAR


@pytest.mark.parametrize(("patience", "warned"), [(None, True), ("20", True), ("90", False)])
def test_a_job_that_has_too_little_time_to_stop_says_so(
    patience: str | None, warned: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(JOB_VARIABLE, "{}")
    monkeypatch.delenv("RAY_JOB_STOP_WAIT_TIME_S", raising=False)
    if patience is not None:
        monkeypatch.setenv("RAY_JOB_STOP_WAIT_TIME_S", patience)
    text = " ".join(begun(tmp_path).split())
    assert (f"stopping this job leaves it {patience or 3} s" in text) is warned


def test_outside_of_a_job_there_is_no_such_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(JOB_VARIABLE, raising=False)
    assert "stopping this job" not in begun(tmp_path)
