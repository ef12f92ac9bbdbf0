"""Components of the reward that are no models: what they see, what they may return, and Python functions."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from rlhf_dist.config.base import load_function
from rlhf_dist.data.nonfinite import listed, row_name

LARGEST = float(np.finfo(np.float32).max)


class Texts:
    """What functions and endpoints see of a chunk: prompts, responses without special tokens, source rows."""

    def __init__(self, chunk: pa.Table, prompts: pa.Table, tokenizer: Any) -> None:
        rows = chunk["prompt_id"].to_numpy()
        self.prompt_ids: list[int] = rows.tolist()
        self.group_ids: list[int] = chunk["group_id"].to_pylist()
        picked = prompts.select(["prompt", "fields"]).take(rows)
        self.prompts: list[str] = picked["prompt"].to_pylist()
        self.fields: list[dict[str, Any]] = [json.loads(f) for f in picked["fields"].to_pylist()]
        self.responses: list[str] = tokenizer.batch_decode(chunk["response_ids"].to_pylist(), skip_special_tokens=True)


@dataclass(frozen=True)
class GivenUp:
    """Samples for which an endpoint gave no score."""

    time: float
    """Seconds since the epoch."""
    component: str
    endpoint: str
    """Scheme, host and path."""
    cause: str
    """No texts, no secrets."""
    status: int | None
    """Of the last answer, if there was one."""
    attempts: int
    """HTTP requests that held these samples."""
    seconds: float
    """Of all attempts, with the pauses between them."""
    prompt_ids: list[int]
    """Of each sample."""
    group_ids: list[int]
    """Of each sample."""
    ends_run: bool
    message: str
    """Why, for the user; holds the end of a prompt."""

    @property
    def record(self) -> dict[str, Any]:
        """A line of ``given_up.jsonl``."""
        rounded = {"time": round(self.time, 3), "seconds": round(self.seconds, 3)}
        return {k: v for k, v in (asdict(self) | rounded).items() if k not in ("ends_run", "message")}


def is_score(value: Any) -> bool:
    """Whether ``value`` is a number that a column of scores can hold: no bool, no NaN, nothing beyond float32."""
    number = isinstance(value, (int, float, np.integer, np.floating)) and not isinstance(value, bool)
    return number and bool(abs(value) <= LARGEST)


def checked(scores: Any, name: str, texts: Texts, chunk: pa.Table, may_lack: bool = False) -> np.ndarray:
    """``scores`` as float64, one for each row of ``chunk``.

    Args:
        may_lack: None is allowed, and becomes NaN.

    Raises:
        ValueError: a wrong number of scores, or one that is not a finite number; shows the sample, names the row.
    """
    values = list(scores)
    if len(values) != chunk.num_rows:
        raise ValueError(
            f"reward {name!r} returned {len(values)} scores for {chunk.num_rows} samples: "
            f"{listed([row_name(chunk, i) for i in range(chunk.num_rows)])}"
        )
    for i, value in enumerate(values):
        if not is_score(value) and not (may_lack and value is None):
            raise ValueError(
                f"reward {name!r} returned {value!r} for sample {i}; expected a finite number. "
                f"Prompt {texts.prompts[i][-80:]!r}, response {texts.responses[i][:80]!r} ({row_name(chunk, i)})"
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
