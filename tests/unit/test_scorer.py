"""The reward: real function processes and a real HTTP endpoint on this machine, and every way in which they fail."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from ray.exceptions import RayTaskError
from tiny import rollouts

from rlhf_dist import schema
from rlhf_dist.actors.rewards import load_function
from rlhf_dist.actors.scorer import Scorer
from rlhf_dist.actors.waiting import WorkerFailed, from_task_error
from rlhf_dist.config import ModelConfig, RewardComponent
from rlhf_dist.data.tokenization import save_tokenizer
from rlhf_dist.data.world import build_tokenizer

FUNCTIONS = """
import time

def length(prompts, responses, fields):
    return [float(len(r)) for r in responses]

def field(prompts, responses, fields):
    return [f["answer"] for f in fields]

def raises(prompts, responses, fields):
    raise KeyError("no such family")

def short(prompts, responses, fields):
    return [0.0]

def nan(prompts, responses, fields):
    return [0.0, float("nan"), 1.0]

def words(prompts, responses, fields):
    return ["good"] * len(prompts)

def flags(prompts, responses, fields):
    return [True] * len(prompts)

def nothing(prompts, responses, fields):
    return None

def hangs(prompts, responses, fields):
    if prompts[0] == "p0":
        time.sleep(600)
    return [1.0] * len(prompts)

def dies(prompts, responses, fields):
    import os
    os._exit(3)

value = 3
"""


@pytest.fixture(scope="module")
def tokenizer_dir(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("tokenizer")
    save_tokenizer(build_tokenizer(), str(folder))
    return str(folder)


@pytest.fixture(autouse=True)
def functions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "test_functions.py").write_text(FUNCTIONS)
    monkeypatch.syspath_prepend(tmp_path)


def prompts(first: int = 0) -> pa.Table:
    rows = range(first, first + 3)
    columns = {
        "prompt_id": list(range(3)),
        "prompt_ids": [[1]] * 3,
        "prompt": [f"p{i}" for i in rows],
        "fields": [json.dumps({"answer": i}) for i in rows],
    }
    return pa.table(columns, schema=schema.PROMPT)


def scorer(tokenizer_dir: str, *components: dict[str, Any]) -> Any:
    """The actor's class without Ray around it: it runs here."""
    parts = [RewardComponent(**{"name": "r", **c}) for c in components]
    return Scorer.__ray_metadata__.modified_class("reward", parts, ModelConfig(path="-"), tokenizer_dir, 1000, 0)


CHUNK = rollouts([(1, 2), (2, 3), (1, 4)])


def test_a_weighted_sum_of_components(tokenizer_dir: str) -> None:
    process = scorer(
        tokenizer_dir,
        {"name": "length", "function": "test_functions:length", "weight": 0.5},
        {"name": "field", "function": "test_functions:field", "weight": -2},
    )
    found = process.score(CHUNK, prompts(), True)
    texts = process.tokenizer.batch_decode(CHUNK["response_ids"].to_pylist(), skip_special_tokens=True)
    assert found["row"].to_pylist() == [0, 1, 2]
    assert found["score/length"].to_pylist() == [len(t) for t in texts]
    assert found["score/field"].to_pylist() == [0, 1, 2]
    assert found["score"].to_pylist() == pytest.approx([0.5 * len(t) - 2 * i for i, t in enumerate(texts)])
    assert process.score(CHUNK, prompts(), False).column_names == ["row", "metric/length", "metric/field"]


def test_prompts_are_those_of_the_rows(tokenizer_dir: str) -> None:
    process = scorer(tokenizer_dir, {"function": "test_functions:field"})
    found = process.score(CHUNK.take(pa.array([2, 0])), prompts(), True)
    assert found["score"].to_pylist() == [2, 0]


@pytest.mark.parametrize(
    ("function", "message"),
    [
        ("raises", "reward 'r': test_functions:raises raised KeyError: 'no such family'"),
        ("short", "reward 'r' returned 1 scores for 3 samples"),
        ("nan", "reward 'r' returned nan for sample 1; expected a finite number. Prompt 'p1', response '"),
        ("words", "reward 'r' returned 'good' for sample 0; expected a finite number"),
        ("flags", "reward 'r' returned True for sample 0; expected a finite number"),
        ("nothing", "reward 'r': test_functions:nothing raised TypeError"),
        ("dies", "reward 'r': test_functions:dies raised ProcessExpired"),
    ],
)
def test_a_function_that_fails(function: str, message: str, tokenizer_dir: str) -> None:
    with pytest.raises(ValueError) as caught:
        scorer(tokenizer_dir, {"function": f"test_functions:{function}"}).score(CHUNK, prompts(), True)
    assert message in str(caught.value)


def test_a_function_that_hangs_is_ended_at_its_limit_and_starts_anew(tokenizer_dir: str) -> None:
    process = scorer(tokenizer_dir, {"function": "test_functions:hangs", "timeout": 5})
    assert process.score(CHUNK, prompts(first=1), True)["score"].to_pylist() == [1, 1, 1]
    began = time.monotonic()
    with pytest.raises(ValueError, match="reward 'r': test_functions:hangs took longer than 5 s for 3 samples"):
        process.score(CHUNK, prompts(), True)
    assert time.monotonic() - began < 30
    assert process.score(CHUNK, prompts(first=1), True)["score"].to_pylist() == [1, 1, 1]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("no_such_module:f", "function 'no_such_module:f': cannot import no_such_module"),
        ("test_functions:lenght", "module test_functions has no function 'lenght'"),
        ("test_functions:value", "module test_functions has no function 'value'"),
    ],
)
def test_a_function_that_is_not_there_is_refused_at_the_start(name: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load_function(name)


# Endpoints


class Endpoint(BaseHTTPRequestHandler):
    """Answers what ``server.answers`` says, in turn; the last one for ever."""

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        answers: list[tuple[int, Any]] = self.server.answers  # type: ignore[attr-defined]
        self.server.seen.append((self.headers.get("Authorization"), body))  # type: ignore[attr-defined]
        status, answer = answers.pop(0) if len(answers) > 1 else answers[0]
        text = (json.dumps(answer) if not isinstance(answer, str) else answer).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)

    def log_message(self, *args: Any) -> None:
        """Quiet."""


@pytest.fixture
def server() -> Iterator[Any]:
    server: Any = HTTPServer(("127.0.0.1", 0), Endpoint)
    server.answers, server.seen = [(200, {"scores": [0.5, 1, 2]})], []
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    server.url = f"http://127.0.0.1:{server.server_address[1]}/score"
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


def test_an_endpoint_that_stumbles_once(server: Any, tokenizer_dir: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SCORE_TOKEN", "sesame")
    server.answers.insert(0, (500, "busy"))
    process = scorer(tokenizer_dir, {"url": server.url, "headers": {"Authorization": "Bearer $SCORE_TOKEN"}})
    assert process.score(CHUNK, prompts(), True)["score"].to_pylist() == [0.5, 1, 2]
    assert len(server.seen) == 2
    token, body = server.seen[0]
    assert token == "Bearer sesame"
    assert body["prompts"] == ["p0", "p1", "p2"]
    assert body["fields"] == [{"answer": 0}, {"answer": 1}, {"answer": 2}]
    assert len(body["responses"]) == 3


@pytest.mark.parametrize(
    ("answers", "retries", "calls", "message"),
    [
        ([(500, "busy")], 2, 3, "500 Internal Server Error"),
        ([(404, "where")], 3, 1, "404 Not Found"),
        ([(200, "no json")], 3, 1, 'did not answer {"scores": [...]}'),
        ([(200, {"rewards": [1, 2, 3]})], 3, 1, 'did not answer {"scores": [...]}'),
        ([(200, [1, 2, 3])], 3, 1, 'did not answer {"scores": [...]}'),
        ([(200, {"scores": [1, 2]})], 3, 1, "returned 2 scores for 3 samples"),
        ([(200, {"scores": [1, None, 2]})], 3, 1, "returned None for sample 1; expected a finite number"),
        ([(200, {"scores": 3})], 3, 1, 'did not answer {"scores": [...]}'),
    ],
    ids=["500", "404", "no JSON", "no scores", "a list", "too few", "null", "a number"],
)
def test_an_endpoint_that_fails(
    answers: list, retries: int, calls: int, message: str, server: Any, tokenizer_dir: str
) -> None:
    server.answers = answers
    with pytest.raises(ValueError) as caught:
        scorer(tokenizer_dir, {"url": server.url, "retries": retries}).score(CHUNK, prompts(), True)
    assert message in str(caught.value)
    assert "reward 'r'" in str(caught.value)
    assert len(server.seen) == calls


def test_an_endpoint_that_is_not_there(server: Any, tokenizer_dir: str) -> None:
    server.server_close()
    with pytest.raises(ValueError, match=r"reward 'r': http://127.0.0.1:\d+/score failed: .*refused"):
        scorer(tokenizer_dir, {"url": server.url, "retries": 1}).score(CHUNK, prompts(), True)


# How such a failure arrives in the driver


@pytest.mark.parametrize(
    ("cause", "kind"),
    [
        (ValueError("bad row"), ValueError),
        (json.JSONDecodeError("bad", "doc", 0), ValueError),
        (UnicodeDecodeError("utf-8", b"\xff", 0, 1, "bad"), ValueError),
        (FloatingPointError("bad loss"), FloatingPointError),
        (KeyError("bad key"), WorkerFailed),
    ],
)
def test_the_drivers_exception_says_who_and_why(cause: Exception, kind: type[Exception]) -> None:
    found = from_task_error(RayTaskError("score", "the remote traceback", cause), "reward, scoring")
    assert type(found) is kind
    assert str(found).startswith("reward, scoring: ")
    assert "bad" in str(found)
