"""Rewards over HTTP against a real server on this machine, which fails in every way that a server can."""

from __future__ import annotations

import contextlib
import json
import logging
import shutil
import socket
import ssl
import struct
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from email.utils import formatdate
from functools import cache
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pyarrow as pa
import pytest
from tiny import rollouts

from rlhf_dist import schema
from rlhf_dist.actors import endpoint as module
from rlhf_dist.actors.endpoint import Breaker, Endpoint
from rlhf_dist.actors.rewards import GivenUp, Texts
from rlhf_dist.actors.scorer import Scorer
from rlhf_dist.config import ModelConfig, RewardComponent
from rlhf_dist.data.tokenization import save_tokenizer
from rlhf_dist.data.world import build_tokenizer

# A server that behaves as it is told. Prompts are p0, p1 ..., and the score of each is its number.

Behaviour = Callable[["Handler", dict[str, Any]], None]


class Handler(BaseHTTPRequestHandler):
    """Does what ``server.behaviours`` say, in turn; the last one for ever."""

    protocol_version = "HTTP/1.1"

    def setup(self) -> None:
        super().setup()
        self.server.connections += 1

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.seen.append({"time": time.monotonic(), "headers": dict(self.headers), **body})
        behaviours = self.server.behaviours
        behave = behaviours.pop(0) if len(behaviours) > 1 else behaviours[0]
        with contextlib.suppress(ConnectionError):  # the client may have gone
            behave(self, body)

    def answer(self, status: int, text: str, **headers: str) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(text.encode())))
        self.end_headers()
        self.wfile.write(text.encode())

    def pause(self, seconds: float) -> bool:
        """Returns early, with True, at the end of the test."""
        return self.server.ended.wait(seconds)

    def log_message(self, *args: Any) -> None:
        """Quiet."""


def good(handler: Handler, body: dict[str, Any]) -> None:
    handler.answer(200, json.dumps({"scores": [float(p[1:]) for p in body["prompts"]]}))


def status(code: int, text: str = "out of order", **headers: str) -> Behaviour:
    return lambda handler, body: handler.answer(code, text, **headers)


def says(text: str) -> Behaviour:
    return lambda handler, body: handler.answer(200, text)


def slow(seconds: float) -> Behaviour:
    def behave(handler: Handler, body: dict[str, Any]) -> None:
        handler.pause(seconds)
        good(handler, body)

    return behave


def drips(handler: Handler, body: dict[str, Any]) -> None:
    """A byte of the answer now and then: every read is in time."""
    handler.send_response(200)
    handler.send_header("Content-Length", "10000")
    handler.end_headers()
    while not handler.pause(0.05):
        handler.wfile.write(b" ")


def drips_headers(handler: Handler, body: dict[str, Any]) -> None:
    handler.wfile.write(b"HTTP/1.1 200 OK\r\nX-Slow: ")
    while not handler.pause(0.05):
        handler.wfile.write(b"x")


def hangs(handler: Handler, body: dict[str, Any]) -> None:
    handler.pause(600)
    handler.close_connection = True


def closes(handler: Handler, body: dict[str, Any]) -> None:
    handler.close_connection = True


def closes_half_way(handler: Handler, body: dict[str, Any]) -> None:
    handler.send_response(200)
    handler.send_header("Content-Length", "1000")
    handler.end_headers()
    handler.wfile.write(b'{"scores": [')
    handler.close_connection = True


def resets(handler: Handler, body: dict[str, Any]) -> None:
    handler.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    handler.connection.close()
    handler.close_connection = True


def speaks_no_http(handler: Handler, body: dict[str, Any]) -> None:
    handler.wfile.write(b"SSH-2.0-OpenSSH_9.2\r\n\r\n")
    handler.close_connection = True


def echoes(handler: Handler, body: dict[str, Any]) -> None:
    """What some servers do with what they do not like: they send it all back."""
    handler.answer(500, handler.path + "\n" + str(handler.headers))


def poisoned(bad: set[str], behave: Behaviour) -> Behaviour:
    """Good, but for requests with one of the prompts ``bad``."""
    return lambda handler, body: (behave if bad & set(body["prompts"]) else good)(handler, body)


@pytest.fixture
def server() -> Iterator[Any]:
    server: Any = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    server.behaviours, server.seen, server.connections, server.ended = [good], [], 0, threading.Event()
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    server.host = f"127.0.0.1:{server.server_address[1]}"
    server.url = f"http://{server.host}/score"
    yield server
    server.ended.set()
    server.shutdown()
    server.server_close()
    thread.join()


@cache
def tokenizer() -> Any:
    return build_tokenizer()


def prompts(count: int) -> pa.Table:
    columns = {
        "prompt_id": list(range(count)),
        "prompt_ids": [[1]] * count,
        "prompt": [f"p{i}" for i in range(count)],
        "fields": [json.dumps({"answer": i}) for i in range(count)],
    }
    return pa.table(columns, schema=schema.PROMPT)


def chunk(count: int) -> pa.Table:
    return rollouts([(1, 2)] * count)


def texts(count: int = 1) -> Texts:
    return Texts(chunk(count), prompts(count), tokenizer())


class Client:
    """An endpoint and what it has given up; skips, and is patient, unless told otherwise."""

    def __init__(self, url: str, **keys: Any) -> None:
        self.given_up: list[GivenUp] = []
        defaults = {"name": "r", "url": url, "timeout": 20, "retries": 0, "on_failure": "skip"}
        self.endpoint = Endpoint(RewardComponent(**defaults | keys), self.given_up.append)

    def __call__(self, count: int = 1) -> list[float | None]:
        return self.endpoint(texts(count))

    @property
    def only(self) -> GivenUp:
        (given_up,) = self.given_up
        return given_up


@pytest.fixture
def client(server: Any) -> Iterator[Callable[..., Client]]:
    clients: list[Client] = []

    def make(url: str | None = None, **keys: Any) -> Client:
        clients.append(Client(url or server.url, **keys))
        return clients[-1]

    yield make
    for made in clients:
        made.endpoint.close()


# What goes well


def test_a_chunk_goes_out_in_requests_on_one_connection(server: Any, client: Callable[..., Client]) -> None:
    judge = client(max_batch=4)
    assert judge(10) == list(range(10))
    assert judge(3) == [0, 1, 2]
    assert [len(r["prompts"]) for r in server.seen] == [4, 4, 2, 3]
    assert server.seen[1]["fields"] == [{"answer": i} for i in range(4, 8)]
    assert len(server.seen[2]["responses"]) == 2
    assert server.connections == 1
    assert judge.given_up == []


def test_texts_that_json_has_no_word_for(server: Any, client: Callable[..., Client]) -> None:
    asked = texts(1)
    asked.responses, asked.fields = ["half a pair \ud800"], [{"answer": float("nan")}]
    assert client().endpoint(asked) == [0]
    assert server.seen[0]["responses"] == asked.responses
    assert server.seen[0]["fields"] == [{"answer": None}]


def test_slow_but_in_time(server: Any, client: Callable[..., Client]) -> None:
    server.behaviours = [slow(0.2)]
    assert client()(2) == [0, 1]


@pytest.mark.parametrize(
    "stumble", [status(500), status(503), status(429), closes, closes_half_way, resets, speaks_no_http]
)
def test_an_endpoint_that_stumbles(stumble: Behaviour, server: Any, client: Callable[..., Client]) -> None:
    server.behaviours = [stumble, stumble, good]
    judge = client(retries=2)
    assert judge(2) == [0, 1]
    assert [len(r["prompts"]) for r in server.seen] == [2, 2, 2]
    assert judge.given_up == []


def test_late_once(server: Any, client: Callable[..., Client]) -> None:
    server.behaviours = [hangs, good]
    assert client(timeout=2, retries=1)(2) == [0, 1]


# What fails for good


@pytest.mark.parametrize(
    ("behaviour", "keys", "cause", "code", "calls"),
    [
        (status(500), {"retries": 2}, "status 500 Internal Server Error", 500, 3),
        (status(429), {"retries": 1}, "status 429 Too Many Requests", 429, 2),
        (status(400), {"retries": 2}, "status 400 Bad Request", 400, 1),
        (status(422), {"retries": 2}, "status 422 Unprocessable Entity", 422, 1),
        (slow(600), {"retries": 1, "timeout": 0.5}, "no answer within 0.5 s", None, 2),
        (hangs, {"retries": 1, "timeout": 0.5}, "no answer within 0.5 s", None, 2),
        (drips, {"retries": 1, "timeout": 0.5}, "no answer within 0.5 s", None, 2),
        (drips_headers, {"retries": 1, "timeout": 0.5}, "no answer within 0.5 s", None, 2),
        (closes, {"retries": 1}, "broken off (RemoteProtocolError)", None, 2),
        (closes_half_way, {"retries": 1}, "broken off (RemoteProtocolError)", None, 2),
        (resets, {"retries": 1}, "broken off (ConnectionResetError)", None, 2),
        (speaks_no_http, {"retries": 1}, "broken off (RemoteProtocolError)", None, 2),
    ],
    ids=["500", "429", "400", "422", "slow", "hangs", "drips", "drips headers", "closes", "closes half-way", "resets",
         "no HTTP"],
)  # fmt: skip
def test_an_endpoint_that_fails(
    behaviour: Behaviour,
    keys: dict[str, Any],
    cause: str,
    code: int | None,
    calls: int,
    server: Any,
    client: Callable[..., Client],
) -> None:
    server.behaviours = [behaviour]
    judge = client(**keys)
    began = time.monotonic()
    assert judge() == [None]
    took = time.monotonic() - began
    assert took < 20
    # A server that is slow to get its turn reads what the client has given up long ago.
    while len(server.seen) < calls and time.monotonic() < began + 20:
        time.sleep(0.01)
    assert len(server.seen) == calls
    given_up = judge.only
    assert given_up.cause == cause
    assert (given_up.status, given_up.attempts) == (code, calls)
    assert 0 < given_up.seconds <= took
    assert f"reward 'r': {server.url}: {cause} (samples: 1, attempts: {calls}, seconds: " in given_up.message
    assert given_up.message.endswith("First prompt: 'p0'")


def test_nobody_listens(server: Any, client: Callable[..., Client]) -> None:
    server.shutdown()
    server.server_close()
    judge = client(retries=1)
    assert judge(4) == [None] * 4
    assert judge.only.cause == "no connection (ConnectionRefusedError)"
    assert judge.only.attempts == 2, "halves would be refused too"


def test_a_certificate_that_nobody_vouches_for(
    server: Any, client: Callable[..., Client], certificate: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate)
    server.socket = context.wrap_socket(server.socket, server_side=True)
    server.handle_error = lambda *args: None  # of the client that goes away
    judge = client(f"https://{server.host}/score", retries=3)
    assert judge() == [None]
    assert judge.only.cause == "certificate not trusted"
    assert judge.only.attempts == 1
    assert judge.only.ends_run
    assert "Put its authority into SSL_CERT_FILE" in judge.only.message
    assert server.seen == []
    monkeypatch.setenv("SSL_CERT_FILE", certificate)
    assert client(f"https://{server.host}/score")(2) == [0, 1]


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A key and a certificate for 127.0.0.1 that it signs itself."""
    file = tmp_path_factory.mktemp("certificate") / "both.pem"
    command = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=test"]
    command += ["-addext", "subjectAltName=IP:127.0.0.1", "-keyout", str(file), "-out", str(file.with_suffix(".crt"))]
    if shutil.which("openssl") is None:
        pytest.skip("openssl, which makes the certificate, is not there")
    subprocess.run(command, check=True, capture_output=True)
    file.write_text(file.read_text() + file.with_suffix(".crt").read_text())
    return str(file)


@pytest.mark.parametrize(
    ("answer", "cause"),
    [
        ("<html><title>Welcome</title></html>", 'the answer is not {"scores": [...]}'),
        ("", 'the answer is not {"scores": [...]}'),
        ('{"scores": [1', 'the answer is not {"scores": [...]}'),
        ('{"rewards": [1]}', 'the answer is not {"scores": [...]}'),
        ("[1]", 'the answer is not {"scores": [...]}'),
        ("7", 'the answer is not {"scores": [...]}'),
        ('{"scores": 1}', 'the answer is not {"scores": [...]}'),
        ('{"scores": {"0": 1}}', 'the answer is not {"scores": [...]}'),
        ("[" * 100_000, 'the answer is not {"scores": [...]}'),
        ('{"scores": []}', "0 scores for 1 samples"),
        ('{"scores": [1, 2]}', "2 scores for 1 samples"),
        ('{"scores": [NaN]}', "score 0 is no finite number"),
        ('{"scores": [Infinity]}', "score 0 is no finite number"),
        ('{"scores": ["1"]}', "score 0 is no finite number"),
        ('{"scores": [null]}', "score 0 is no finite number"),
        ('{"scores": [true]}', "score 0 is no finite number"),
        ('{"scores": [[1]]}', "score 0 is no finite number"),
        ('{"scores": [1e39]}', "score 0 is no finite number"),
        (f'{{"scores": [{"9" * 400}]}}', "score 0 is no finite number"),
    ],
)
def test_garbage(answer: str, cause: str, server: Any, client: Callable[..., Client]) -> None:
    server.behaviours = [says(answer)]
    judge = client(retries=3)
    assert judge() == [None]
    assert len(server.seen) == 1
    assert judge.only.cause == cause
    assert judge.only.status is None
    if answer:
        assert f"It said {answer[:200]!r}. " in judge.only.message


def test_an_answer_without_end(server: Any, client: Callable[..., Client], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "LONGEST_ANSWER", 2**20)
    server.behaviours = [says(" " * 2**21)]
    judge = client()
    assert judge() == [None]
    assert judge.only.cause == "an answer of more than 1 MB"


def test_an_answer_that_is_packed_wrongly(server: Any, client: Callable[..., Client]) -> None:
    server.behaviours = [status(200, "no gzip", Content_Encoding="gzip")]
    judge = client()
    assert judge() == [None]
    assert judge.only.cause == "an answer that cannot be decompressed"


@pytest.mark.parametrize(
    ("code", "advice"),
    [
        (401, "Check the component's headers and the variables that they name"),
        (403, "Check the component's headers and the variables that they name"),
        (404, "Check the component's url, and that it takes POST"),
        (405, "Check the component's url, and that it takes POST"),
        (301, "Check the component's url, and that it takes POST"),
    ],
)
@pytest.mark.parametrize("on_failure", ["stop", "skip"])
def test_a_mistake_in_the_config(
    code: int, advice: str, on_failure: str, server: Any, client: Callable[..., Client]
) -> None:
    server.behaviours = [status(code, Location="/elsewhere")]
    judge = client(retries=3, on_failure=on_failure, max_batch=2)
    assert judge(4) == [None] * 4
    assert len(server.seen) == 1, "nothing more is asked"
    assert judge.given_up[0].ends_run
    assert judge.given_up[0].status == code
    assert advice in judge.given_up[0].message


# Only what fails is lost


@pytest.mark.parametrize(
    ("behaviour", "keys"),
    [
        (status(500), {}),
        (status(400), {}),
        (status(413), {}),
        (status(422), {}),
        (closes, {}),
        (says("garbage"), {}),
        (says('{"scores": [null]}'), {}),
        (hangs, {"timeout": 1}),
    ],
    ids=["500", "400", "413", "422", "closes", "garbage", "null", "hangs"],
)
def test_one_sample_that_is_poison(
    behaviour: Behaviour, keys: dict[str, Any], server: Any, client: Callable[..., Client]
) -> None:
    server.behaviours = [poisoned({"p5"}, behaviour)]
    judge = client(**keys)
    assert judge(9) == [None if i == 5 else i for i in range(9)]
    assert judge.only.group_ids == judge.only.prompt_ids == [5]
    assert judge.only.attempts == 4, "with 9, 5, 2 and 1 of the samples"
    assert len(server.seen) <= 9


def test_too_many_at_once(server: Any, client: Callable[..., Client]) -> None:
    """No sample fails alone, so nothing is lost, and a run that stops at failures goes on."""
    server.behaviours = [lambda handler, body: (status(413) if len(body["prompts"]) > 2 else good)(handler, body)]
    judge = client(on_failure="stop")
    assert judge(8) == list(range(8))
    assert judge.given_up == []


def test_an_endpoint_in_ruins_is_not_asked_for_every_sample(server: Any, client: Callable[..., Client]) -> None:
    server.behaviours = [status(500)]
    judge = client(breaker_failures=5)
    assert judge(64) == [None] * 64
    assert len(server.seen) < 12
    assert sorted(g for part in judge.given_up for g in part.group_ids) == list(range(64)), "each told of once"


def test_many_poisoned_samples_do_not_open_the_breaker(server: Any, client: Callable[..., Client]) -> None:
    bad = {f"p{i}" for i in range(3, 64, 16)}
    for behaviour in (status(422), status(500)):
        server.behaviours = [poisoned(bad, behaviour)]
        judge = client(max_batch=16, breaker_failures=3)
        assert judge(64) == [None if f"p{i}" in bad else i for i in range(64)]


def test_stop_asks_for_nothing_more(server: Any, client: Callable[..., Client]) -> None:
    server.behaviours = [status(500), good]
    judge = client(max_batch=1, on_failure="stop")
    assert judge(3) == [None] * 3
    assert judge(2) == [None] * 2
    assert len(server.seen) == 1
    first = judge.given_up[0]
    assert first.ends_run
    assert "500 Internal Server Error" in first.message
    assert "on_failure: skip leaves such samples out" in first.message
    others = {given_up.cause for given_up in judge.given_up[1:]}
    assert others == {"circuit breaker open, after: status 500 Internal Server Error"}


# Waiting


def test_retry_after_is_respected(server: Any, client: Callable[..., Client]) -> None:
    server.behaviours = [status(429, Retry_After="1"), good]
    assert client(retries=1)() == [0]
    assert server.seen[1]["time"] - server.seen[0]["time"] > 0.9


def test_what_retry_after_may_say() -> None:
    assert module._seconds("3") == 3
    assert module._seconds("86400") == module.LONGEST_PAUSE
    assert module._seconds("9" * 400) == module.LONGEST_PAUSE
    assert 15 < module._seconds(formatdate(time.time() + 30, usegmt=True)) <= 31
    assert module._seconds(formatdate(time.time() - 30, usegmt=True)) == 0
    for nonsense in ("", "soon", "-5", "nan", "Mon, 99 Foo 2024 00:00:00 GMT"):
        assert module._seconds(nonsense) == 0


def test_the_breaker_opens_tries_and_closes(server: Any, client: Callable[..., Client]) -> None:
    server.behaviours = [status(500)]
    judge = client(breaker_failures=2, breaker_seconds=1, retries=1)
    assert judge() + judge() == [None, None]
    assert len(server.seen) == 4
    assert judge() == [None], "open"
    assert len(server.seen) == 4
    assert judge.given_up[-1].cause == "circuit breaker open, after: status 500 Internal Server Error"
    assert (judge.given_up[-1].attempts, judge.given_up[-1].status) == (0, None)

    time.sleep(1.1)
    assert judge() == [None], "half-open: one attempt"
    assert len(server.seen) == 5
    assert judge() == [None], "open again"
    assert len(server.seen) == 5

    time.sleep(1.1)
    server.behaviours = [good, status(500), good]
    assert judge() == [0], "closed"
    assert judge() == [0], "with its attempts"
    assert len(server.seen) == 8


def test_a_success_between_failures_keeps_the_breaker_closed() -> None:
    breaker = Breaker(2, 1000)
    for _ in range(5):
        breaker.failed("status 500")
        breaker.succeeded()
    breaker.failed("status 500")
    assert not breaker.open
    breaker.failed("status 500")
    assert breaker.open


# Secrets


def test_no_secret_is_seen(
    server: Any, client: Callable[..., Client], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    secrets = {"sesame", "hunter22", "k3y-in-query", "k3y-in-path", "literal"}
    monkeypatch.setenv("SCORE_TOKEN", "sesame")
    monkeypatch.setenv("SCORE_PATH", "k3y-in-path")
    server.behaviours = [echoes]
    caplog.set_level(logging.DEBUG)
    headers = {"X-Token": "Bearer $SCORE_TOKEN", "X-Key": "literal"}
    judge = client(f"http://me:hunter22@{server.host}/$SCORE_PATH?key=k3y-in-query", headers=headers)
    assert judge() == [None]
    sent = server.seen[0]["headers"]
    assert (sent["X-Token"], sent["X-Key"]) == ("Bearer sesame", "literal")
    assert sent["Authorization"].startswith("Basic "), "the URL's credentials"
    secrets.add(sent["Authorization"].removeprefix("Basic "))

    seen = [
        judge.only.message,
        json.dumps(judge.only.record),
        repr(judge.only),
        repr(judge.endpoint),
        repr(judge.endpoint.component),
        caplog.text,
    ]
    for text in seen:
        assert not [secret for secret in secrets if secret in text], text
    assert judge.only.endpoint == f"http://{server.host}/$SCORE_PATH"
    assert "/***?***" in judge.only.message


def test_a_record_has_no_texts(server: Any, client: Callable[..., Client]) -> None:
    server.behaviours = [lambda handler, body: handler.answer(422, json.dumps(body))]
    judge = client(max_batch=2)
    began = time.time()
    assert judge(2) == [None, None]
    first, second = (given_up.record for given_up in judge.given_up)
    assert began - 1 < first.pop("time") <= second.pop("time") < began + 60
    assert 0 < first.pop("seconds") < 60
    assert first == {
        "component": "r",
        "endpoint": server.url,
        "cause": "status 422 Unprocessable Entity",
        "status": 422,
        "attempts": 2,
        "prompt_ids": [0],
        "group_ids": [0],
    }
    assert second["group_ids"] == [1]


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("Bearer $NO_SUCH_TOKEN", "names a variable that is not set in the environment of the reward process"),
        ("Bearer ${NO_SUCH_TOKEN}", "names a variable that is not set in the environment of the reward process"),
        ("Bearer $LINE_TOKEN", "cannot be sent: a value has printable ASCII characters only"),
        ("Bearer $EMPTY_TOKEN", "cannot be sent: a value has printable ASCII characters only"),
        ("Bearer geheim\u00fc", "cannot be sent: a value has printable ASCII characters only"),
    ],
)
def test_a_header_that_cannot_be_sent(value: str, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LINE_TOKEN", "geheim\n")
    monkeypatch.setenv("EMPTY_TOKEN", "")
    with pytest.raises(ValueError, match=message) as caught:
        Client("http://127.0.0.1:9/", headers={"Authorization": value})
    assert str(caught.value).startswith("reward 'r': header 'Authorization' ")
    assert "geheim" not in str(caught.value)


def test_a_url_whose_variable_is_not_set() -> None:
    with pytest.raises(ValueError, match="reward 'r': url names a variable that is not set"):
        Client("http://127.0.0.1:9/?key=$NO_SUCH_TOKEN")


# In the reward's process


@pytest.fixture(scope="module")
def tokenizer_dir(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("tokenizer")
    save_tokenizer(tokenizer(), str(folder))
    return str(folder)


def test_a_score_that_was_given_up_is_null_and_the_sum_with_it(server: Any, tokenizer_dir: str) -> None:
    server.behaviours = [poisoned({"p1"}, status(500))]
    components = [
        RewardComponent(name="judge", url=server.url, retries=0, on_failure="skip", weight=2),
        RewardComponent(name="other", url=server.url + "/other", retries=0, on_failure="skip", weight=0),
    ]
    process = Scorer.__ray_metadata__.modified_class("reward", components, ModelConfig(path="-"), tokenizer_dir, 99, 0)
    table, given_up = process.score(chunk(3), prompts(3), True)
    assert table["score/judge"].to_pylist() == table["score/other"].to_pylist() == [0, None, 2]
    assert table["score"].to_pylist() == [0, None, 4]
    assert [(g.component, g.group_ids, g.ends_run) for g in given_up] == [("judge", [1], False), ("other", [1], False)]
    server.behaviours = [good]
    table, given_up = process.score(chunk(3), prompts(3), True)
    assert table["score"].to_pylist() == [0, 2, 4]
    assert given_up == [], "told of once"
