"""The program with a reward over HTTP that fails for some prompts, in every way at once."""

from __future__ import annotations

import contextlib
import json
import threading
import time
import zlib
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from jobs import Job

from rlhf_dist.data.tokenization import load_tokenizer
from rlhf_dist.recipes.evaluate import FIRST_GROUP as EVALUATION

WAYS = ("500", "garbage", "closes", "hangs")


def score(response: str) -> float:
    """Different for different responses, so that no score can land at another's place unseen."""
    return zlib.crc32(response.encode()) % 997 / 100


class Judge(BaseHTTPRequestHandler):
    """Fails for a fourth of the prompts, each in a way of its own."""

    protocol_version = "HTTP/1.1"

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.seen.add((self.headers["Authorization"], self.path))
        ways: dict[str, str] = self.server.ways
        for prompt in body["prompts"]:
            if zlib.crc32(prompt.encode()) % 4 == 0:
                ways.setdefault(prompt, WAYS[len(ways) % len(WAYS)])
        way = next((ways[p] for p in body["prompts"] if p in ways), self.server.otherwise)
        with contextlib.suppress(ConnectionError):
            self.behave(way, body)

    def behave(self, way: str, body: dict[str, Any]) -> None:
        if way in ("closes", "hangs"):
            self.server.ended.wait(600 if way == "hangs" else 0)
            self.close_connection = True
            return
        answer = "<html>" if way == "garbage" else json.dumps({"scores": [score(r) for r in body["responses"]]})
        self.send_response(500 if way == "500" else 200)
        self.send_header("Content-Length", str(len(answer)))
        self.end_headers()
        self.wfile.write(answer.encode())

    def log_message(self, *args: Any) -> None:
        """Quiet."""


@pytest.fixture
def judge(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    monkeypatch.setenv("JUDGE_TOKEN", "sesame-street")
    monkeypatch.setenv("JUDGE_KEY", "hidden-in-query")
    server: Any = ThreadingHTTPServer(("127.0.0.1", 0), Judge)
    server.daemon_threads = True
    server.ways, server.seen, server.otherwise, server.ended = {}, set(), "well", threading.Event()
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    server.place = f"http://127.0.0.1:{server.server_address[1]}/score"
    yield server
    server.ended.set()
    server.shutdown()
    server.server_close()
    thread.join()


def component(judge: Any, keys: str) -> str:
    headers = "{Authorization: 'Bearer $JUDGE_TOKEN'}"
    return f"reward.components=[{{name: judge, url: '{judge.place}?key=$JUDGE_KEY', headers: {headers}, {keys}}}]"


def given_up(job: Job) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (job.folder / "given_up.jsonl").read_text().splitlines()]


def test_what_gets_no_reward_is_replaced(start: Callable[..., Job], config: str, judge: Any) -> None:
    keys = "on_failure: skip, timeout: 1, retries: 0, breaker_failures: 50"
    job = start("--config", config, "reward.skip_rounds=8", component(judge, keys)).wait()
    assert job.code == 0, job.output

    tokenizer = load_tokenizer(str(job.folder / "tokenizer"))
    lost = {g: p for r in given_up(job) for g, p in zip(r["group_ids"], r["prompt_ids"], strict=True) if g < EVALUATION}
    assert {r["cause"] for r in given_up(job)} == {
        "status 500 Internal Server Error",
        'the answer is not {"scores": [...]}',
        "broken off (RemoteProtocolError)",
        "no answer within 1 s",
    }
    trained: list[int] = []
    for step in (1, 2):
        table = pq.read_table(job.folder / "rollouts" / f"step_{step:06d}.parquet")
        assert table.num_rows == 32, "as many as without replacements"
        responses = tokenizer.batch_decode(table["response_ids"].to_pylist(), skip_special_tokens=True)
        expected = np.array([score(r) for r in responses], np.float32)
        assert table["score"].to_pylist() == expected.tolist() == table["score/judge"].to_pylist()
        assert not set(lost.values()) & set(table["prompt_id"].to_pylist())
        trained += dict.fromkeys(table["group_id"].to_pylist())
    assert len(trained) == len(set(trained)) == 16
    assert not lost.keys() & set(trained)

    records = job.metrics("ppo")
    replaced = sum(r["rollout/unscored_groups"] for r in records)
    assert replaced == sum(r["rollout/groups_left_out"] for r in records) == len(lost) > 0
    assert 1 <= job.output.count("groups without a reward were replaced") <= 2, "one warning for each step"
    assert job.summary["reward"]["given_up"] == sum(len(r["group_ids"]) for r in given_up(job))
    unscored = [job.summary["eval"][stage]["unscored"] for stage in ("sft", "ppo")]
    assert sum(unscored) == sum(g >= EVALUATION for r in given_up(job) for g in r["group_ids"]) > 0

    assert judge.seen == {("Bearer sesame-street", "/score?key=hidden-in-query")}
    for secret in ("sesame-street", "hidden-in-query"):
        assert secret not in job.output
        assert not [f for f in job.folder.rglob("*") if f.is_file() and secret.encode() in f.read_bytes()]
    job.assert_nothing_left()


def test_a_failure_stops_the_run(start: Callable[..., Job], config: str, judge: Any) -> None:
    judge.otherwise = "500"
    began = time.time()
    job = start("--config", config, component(judge, "timeout: 1, retries: 1")).wait(300)
    message = f"reward 'judge': {judge.place}: "
    job.assert_failed(2, message)
    assert "on_failure: skip leaves such samples out. First prompt: '" in job.output
    assert job.summary["status"] == "failed"
    assert message in job.summary["error"]
    first = given_up(job)[0]
    assert (first["component"], first["endpoint"]) == ("judge", judge.place)
    assert first["attempts"] >= 2
    assert began < first["time"] < time.time()
    assert not (job.folder / "rollouts").exists(), "nothing was trained"
