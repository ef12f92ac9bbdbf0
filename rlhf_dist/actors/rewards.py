"""Components of the reward that are no models: Python functions, HTTP endpoints, and the check of what they return."""

from __future__ import annotations

import json
import math
import os
from typing import Any

import numpy as np
import pyarrow as pa

from rlhf_dist.config import RewardComponent
from rlhf_dist.config.base import load_function


class Texts:
    """What functions and endpoints see of a chunk: prompts, responses without special tokens, source rows."""

    def __init__(self, chunk: pa.Table, prompts: pa.Table, tokenizer: Any) -> None:
        rows = chunk["prompt_id"].to_numpy()
        picked = prompts.select(["prompt", "fields"]).take(rows)
        self.prompts: list[str] = picked["prompt"].to_pylist()
        self.fields: list[dict[str, Any]] = [json.loads(f) for f in picked["fields"].to_pylist()]
        self.responses: list[str] = tokenizer.batch_decode(chunk["response_ids"].to_pylist(), skip_special_tokens=True)


def checked(scores: Any, name: str, texts: Texts) -> np.ndarray:
    values = list(scores)
    if len(values) != len(texts.prompts):
        raise ValueError(f"reward {name!r} returned {len(values)} scores for {len(texts.prompts)} samples")
    for i, value in enumerate(values):
        if isinstance(value, (bool, str)) or not isinstance(value, (int, float, np.number)) or not math.isfinite(value):
            raise ValueError(
                f"reward {name!r} returned {value!r} for sample {i}; expected a finite number. "
                f"Prompt {texts.prompts[i][-80:]!r}, response {texts.responses[i][:80]!r}"
            )
    return np.asarray(values, np.float64)


def _call(name: str, prompts: list[str], responses: list[str], fields: list[dict[str, Any]]) -> list[Any]:
    return list(load_function(name)(prompts, responses, fields))


class FunctionProcess:
    """A Python reward in a process of its own, which is killed at the time limit."""

    def __init__(self, function: str, timeout: float, name: str) -> None:
        import multiprocessing

        from pebble import ProcessPool

        load_function(function)  # fail at the start, not at the first batch
        self.function, self.timeout, self.name = function, timeout, name
        self.pool = ProcessPool(max_workers=1, context=multiprocessing.get_context("spawn"))

    def __call__(self, texts: Texts) -> list[Any]:
        from concurrent.futures import TimeoutError

        future = self.pool.schedule(
            _call, args=(self.function, texts.prompts, texts.responses, texts.fields), timeout=self.timeout
        )
        try:
            return future.result()
        except TimeoutError:
            raise ValueError(
                f"reward {self.name!r}: {self.function} took longer than {self.timeout:g} s "
                f"for {len(texts.prompts)} samples"
            ) from None
        except Exception as error:
            raise ValueError(f"reward {self.name!r}: {self.function} raised {type(error).__name__}: {error}") from error


def post(component: RewardComponent, texts: Texts) -> list[Any]:
    """Scores from an HTTP endpoint; network errors and 5xx answers are tried again, with growing pauses and jitter."""
    import httpx
    from tenacity import Retrying, retry_if_exception, stop_after_attempt, wait_random_exponential

    def passing(error: BaseException) -> bool:
        status = error.response.status_code if isinstance(error, httpx.HTTPStatusError) else None
        return isinstance(error, httpx.TransportError) or (status is not None and status >= 500)

    headers = {k: os.path.expandvars(v) for k, v in component.headers.items()}
    body = {"prompts": texts.prompts, "responses": texts.responses, "fields": texts.fields}
    retrying = Retrying(
        retry=retry_if_exception(passing),
        stop=stop_after_attempt(component.retries + 1),
        wait=wait_random_exponential(multiplier=0.2, max=30),
        reraise=True,
    )
    try:
        for attempt in retrying:
            with attempt:
                answer = httpx.post(str(component.url), json=body, headers=headers, timeout=component.timeout)
                answer.raise_for_status()
        return list(answer.json()["scores"])
    except httpx.HTTPError as error:
        raise ValueError(
            f"reward {component.name!r}: {component.url} failed: {error or type(error).__name__}"
        ) from None
    except (KeyError, TypeError, ValueError):
        raise ValueError(f'reward {component.name!r}: {component.url} did not answer {{"scores": [...]}}') from None
