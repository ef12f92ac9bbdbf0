"""Rewards over HTTP: requests that end in time, are tried again, and in the end are given up and told of."""

from __future__ import annotations

import asyncio
import base64
import json
import logging
import math
import os
import re
import ssl
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from email.utils import parsedate_to_datetime
from typing import Any
from urllib.parse import unquote

import httpx
from tenacity import RetryCallState, Retrying, retry_if_exception, stop_after_attempt, wait_random_exponential

from rlhf_dist.actors.rewards import GivenUp, Texts, is_score
from rlhf_dist.config import RewardComponent
from rlhf_dist.observability.files import jsonable

#: Seconds that an answer's Retry-After can ask for.
LONGEST_PAUSE = 60.0
#: Bytes of an answer; more is no list of scores.
LONGEST_ANSWER = 16 * 2**20
#: Characters of an answer in a message.
SHOWN = 200

_pause = wait_random_exponential(multiplier=0.2, max=30)


@dataclass(eq=False)
class Failure(Exception):
    """A request that failed."""

    cause: str
    """In words of ours: no texts, no secrets."""
    status: int | None = None
    detail: str = ""
    """What the other side said; may hold texts of samples."""
    passing: bool = False
    """The same request may succeed later."""
    of_samples: bool = False
    """It could be due to one of the samples, so that the others may succeed without it."""
    refused: bool = False
    """The endpoint is well and does not take these samples."""
    late: bool = False
    pause: float = 0.0
    """Seconds that the endpoint asks for."""
    advice: str = ""
    """What to do, where this is a mistake in the config."""


class Breaker:
    """A circuit breaker: opens after ``failures`` in a row, and ``seconds`` later lets single requests try again."""

    def __init__(self, failures: int, seconds: float) -> None:
        self.failures, self.seconds = failures, seconds
        self.in_a_row = 0
        self.last = ""
        self._until = -math.inf

    @property
    def open(self) -> bool:
        return time.monotonic() < self._until

    @property
    def trying(self) -> bool:
        """Half-open: one success closes it, one failure opens it again."""
        return self.in_a_row >= self.failures

    def succeeded(self) -> None:
        self.in_a_row = 0

    def failed(self, cause: str) -> None:
        self.in_a_row += 1
        self.last = cause
        if self.trying:
            self._until = time.monotonic() + self.seconds

    def trip(self, cause: str) -> None:
        """Open it for good."""
        if self._until < math.inf:
            self.last, self._until = cause, math.inf


@dataclass(eq=False)
class _Part:
    """Samples that are asked for together: a request, or half of one that failed."""

    rows: list[int]
    attempts: int = 0
    """HTTP requests that held these samples, those of the whole included."""
    seconds: float = 0.0
    failed: bool = False
    other: _Part | None = field(default=None, repr=False)
    """The other half; None if this is the whole."""

    def halves(self) -> tuple[_Part, _Part]:
        middle = len(self.rows) // 2
        first, second = (_Part(r, self.attempts, self.seconds) for r in (self.rows[:middle], self.rows[middle:]))
        first.other, second.other = second, first
        return first, second


class Endpoint:
    """The HTTP client of one component.

    A call asks for at most ``max_batch`` samples at a time. A request that fails for a passing reason is tried again;
    one that fails for good is asked for in halves, where that can help, until the samples that fail stand alone. What
    gets no score then is given up: None in the scores, and ``report`` hears why. It is the driver that ends the run.

    Raises:
        ValueError: a header that cannot be sent, or a variable that is not set.
    """

    def __init__(self, component: RewardComponent, report: Callable[[GivenUp], None]) -> None:
        assert component.url is not None
        self.component = component
        self.report = report
        self.breaker = Breaker(component.breaker_failures, component.breaker_seconds)
        where = f"reward {component.name!r}"
        headers = {name: _header(raw, f"{where}: header {name!r}") for name, raw in component.headers.items()}
        self._url = httpx.URL(_expanded(component.url, f"{where}: url"))
        self._secrets = _secrets(component, self._url, headers)
        # httpx' own limits are for each read, and a server that sends a byte now and then keeps them all. An event
        # loop can end the whole request, wherever it stands; it lives as long as the connections.
        self._client = httpx.AsyncClient(
            headers={"Content-Type": "application/json", **headers},
            timeout=httpx.Timeout(None, connect=0.9 * component.timeout),
        )
        self._runner = asyncio.Runner()
        for name in ("httpx", "httpcore"):  # they log URLs and headers
            logging.getLogger(name).setLevel(logging.WARNING)

    def __call__(self, texts: Texts) -> list[float | None]:
        """Scores of a chunk; None where they were given up."""
        scores: list[float | None] = [None] * len(texts.prompts)
        size = self.component.max_batch
        for first in range(0, len(scores), size):
            self._score(texts, _Part(list(range(first, min(first + size, len(scores))))), scores)
        return scores

    def close(self) -> None:
        """Close the connections."""
        self._runner.run(self._client.aclose())
        self._runner.close()

    def _score(self, texts: Texts, whole: _Part, scores: list[float | None]) -> None:
        """Fill in the scores of one request. Halves come in the order of their size, so that those that succeed come
        between those that fail, and close the breaker."""
        waiting = deque([whole])
        while waiting:
            part = waiting.popleft()
            try:
                found = self._request(texts, part)
            except Failure as failure:
                if failure.of_samples and len(part.rows) > 1 and not self.breaker.open:
                    waiting += part.halves()
                else:
                    self._give_up(texts, part, failure)
            else:
                for row, score in zip(part.rows, found, strict=True):
                    scores[row] = score

    def _request(self, texts: Texts, part: _Part) -> list[float]:
        """One request with its retries.

        Raises:
            Failure: the last one, or that the breaker is open.
        """
        if self.breaker.open:
            raise Failure(f"circuit breaker open, after: {self.breaker.last}")

        # A half is not asked for again when it is late: its whole was late more than once already.
        def again(error: BaseException) -> bool:
            return isinstance(error, Failure) and error.passing and not (error.late and part.other)

        attempts = 1 if self.breaker.trying else self.component.retries + 1
        retrying = Retrying(
            retry=retry_if_exception(again), stop=stop_after_attempt(attempts), wait=_wait, reraise=True
        )
        began = time.monotonic()
        try:
            scores = retrying(self._attempt, part, _body(texts, part.rows))
        except Failure as failure:
            self._count(part, failure)
            raise
        finally:
            part.seconds += time.monotonic() - began
        self.breaker.succeeded()
        return scores

    def _count(self, part: _Part, failure: Failure) -> None:
        """What a failure says about the endpoint. Where a whole failed one half has to, and a sample that fails alone
        is to blame itself; but what is late is dear, and always counts."""
        part.failed = True
        expected = part.other is not None and (len(part.rows) == 1 or not part.other.failed)
        if failure.refused:
            self.breaker.succeeded()
        elif failure.late or not failure.of_samples or not expected:
            self.breaker.failed(failure.cause)

    def _attempt(self, part: _Part, body: bytes) -> list[float]:
        part.attempts += 1
        try:
            status, retry_after, answer = self._runner.run(self._post(body))
        except TimeoutError:
            raise Failure(
                f"no answer within {self.component.timeout:g} s", passing=True, of_samples=True, late=True
            ) from None
        except httpx.RequestError as error:
            raise self._broken(error) from None
        if not httpx.codes.is_success(status):
            raise self._refused(status, retry_after, answer)
        return self._scores(answer, len(part.rows))

    async def _post(self, body: bytes) -> tuple[int, str, bytes]:
        """Status, Retry-After and body of the answer.

        Raises:
            TimeoutError: the whole of it took longer than the component's ``timeout``.
        """
        answer = bytearray()
        async with (
            asyncio.timeout(self.component.timeout),
            self._client.stream("POST", self._url, content=body) as response,
        ):
            async for piece in response.aiter_bytes():
                answer += piece
                if len(answer) > LONGEST_ANSWER:
                    raise Failure(f"an answer of more than {LONGEST_ANSWER >> 20} MB", of_samples=True)
        return response.status_code, response.headers.get("Retry-After", ""), bytes(answer)

    def _broken(self, error: httpx.RequestError) -> Failure:
        """No answer, or half of one."""
        origin = _origin(error)
        detail = self._hide(str(origin))
        if isinstance(origin, ssl.SSLCertVerificationError):
            return Failure("certificate not trusted", detail=detail, advice="Put its authority into SSL_CERT_FILE")
        if isinstance(error, (httpx.ConnectError, httpx.ConnectTimeout, httpx.ProxyError)):
            return Failure(f"no connection ({type(origin).__name__})", detail=detail, passing=True)
        if isinstance(error, httpx.DecodingError):
            return Failure("an answer that cannot be decompressed", detail=detail, of_samples=True)
        return Failure(f"broken off ({type(origin).__name__})", detail=detail, passing=True, of_samples=True)

    def _refused(self, status: int, retry_after: str, answer: bytes) -> Failure:
        """An answer that is not 2xx."""
        cause = f"status {status} {httpx.codes.get_reason_phrase(status)}".strip()
        detail = self._hide(answer.decode(errors="replace"))
        if status >= 500 or status in (408, 429):
            pause = _seconds(retry_after)
            return Failure(cause, status, detail, passing=True, of_samples=status >= 500, pause=pause)
        if status in (400, 413, 422):
            return Failure(cause, status, detail, of_samples=True, refused=True)
        if status in (401, 403, 407):
            advice = "Check the component's headers and the variables that they name"
        else:
            advice = "Check the component's url, and that it takes POST"
        return Failure(cause, status, detail, advice=advice)

    def _scores(self, answer: bytes, count: int) -> list[float]:
        try:
            scores = json.loads(answer)["scores"]
        # A deeply nested answer exhausts the parser's stack.
        except (ValueError, KeyError, TypeError, IndexError, RecursionError):
            scores = None
        if not isinstance(scores, list):
            wrong = 'the answer is not {"scores": [...]}'
        elif len(scores) != count:
            wrong = f"{len(scores)} scores for {count} samples"
        elif bad := [i for i, score in enumerate(scores) if not is_score(score)]:
            wrong = f"score {bad[0]} is no finite number"
        else:
            return scores
        raise Failure(wrong, detail=self._hide(answer.decode(errors="replace")), of_samples=True)

    def _give_up(self, texts: Texts, part: _Part, failure: Failure) -> None:
        component, rows = self.component, part.rows
        ends_run = component.on_failure == "stop" or bool(failure.advice)
        if ends_run:
            self.breaker.trip(failure.cause)
        advice = failure.advice or ("on_failure: skip leaves such samples out" if ends_run else "")
        self.report(
            GivenUp(
                time=time.time(),
                component=component.name,
                endpoint=component.place,
                cause=failure.cause,
                status=failure.status,
                attempts=part.attempts,
                seconds=part.seconds,
                prompt_ids=[texts.prompt_ids[r] for r in rows],
                group_ids=[texts.group_ids[r] for r in rows],
                ends_run=ends_run,
                message=f"reward {component.name!r}: {component.place}: {failure.cause} (samples: {len(rows)}, "
                f"attempts: {part.attempts}, seconds: {part.seconds:.1f}). "
                + (f"It said {failure.detail!r}. " if failure.detail else "")
                + (f"{advice}. " if advice else "")
                + f"First prompt: {texts.prompts[rows[0]][-80:]!r}",
            )
        )

    def _hide(self, text: str) -> str:
        """The start of ``text``, without what must not be seen: some servers send back what they got."""
        for secret in self._secrets:
            text = text.replace(secret, "***")
        return text[:SHOWN]


def _variables(raw: str) -> list[str]:
    """Names of the environment variables in a value of the config."""
    return [name.strip("{}") for name in re.findall(r"\$(\w+|{\w+})", raw)]


def _expanded(raw: str, where: str) -> str:
    """A value of the config with its variables; it is in no message."""
    if any(name not in os.environ for name in _variables(raw)):
        raise ValueError(f"{where} names a variable that is not set in the environment of the reward process")
    return os.path.expandvars(raw)


def _header(raw: str, where: str) -> str:
    value = _expanded(raw, where)
    if not (value.isascii() and value.isprintable() and value == value.strip()):
        raise ValueError(
            f"{where} cannot be sent: a value has printable ASCII characters only, and no space at its ends. "
            "Is a variable empty, or does it end in a new line?"
        )
    return value


def _secrets(component: RewardComponent, url: httpx.URL, headers: dict[str, str]) -> list[str]:
    """What no message may show: variables, words of headers, credentials and query of the URL.

    Long ones first, since one may be part of another; shorter than four characters is no secret.
    """
    user = url.userinfo.decode()
    words = {os.environ[name] for raw in (str(component.url), *component.headers.values()) for name in _variables(raw)}
    words |= {word for value in headers.values() for word in (value, *value.split())}
    words |= {user, *user.split(":"), *unquote(user).split(":")}
    words.add(base64.b64encode(unquote(user).encode()).decode())
    words |= {url.query.decode(), *(value for _, value in url.params.multi_items())}
    return sorted((word for word in words if len(word) > 3), key=len, reverse=True)


def _origin(error: BaseException) -> BaseException:
    """What the operating system or the parser said, below what httpx and its transport made of it."""
    while below := error.__cause__ or error.__context__:
        error = below.exceptions[0] if isinstance(below, BaseExceptionGroup) else below
    return error


def _body(texts: Texts, rows: list[int]) -> bytes:
    body: dict[str, list[Any]] = {
        "prompts": [texts.prompts[r] for r in rows],
        "responses": [texts.responses[r] for r in rows],
        "fields": [jsonable(texts.fields[r], "fields") for r in rows],
    }
    return json.dumps(body, allow_nan=False).encode()


def _wait(state: RetryCallState) -> float:
    """Seconds until the next attempt: what the endpoint asked for, and a random part that grows."""
    error = state.outcome.exception() if state.outcome else None
    return _pause(state) + (error.pause if isinstance(error, Failure) else 0.0)


def _seconds(retry_after: str) -> float:
    """Of a Retry-After header: a number of seconds or a date; 0 for anything else."""
    try:
        wanted = float(retry_after)
    except ValueError:
        try:
            wanted = parsedate_to_datetime(retry_after).timestamp() - time.time()
        except (ValueError, OverflowError):
            return 0.0
    return 0.0 if math.isnan(wanted) else min(max(wanted, 0.0), LONGEST_PAUSE)
