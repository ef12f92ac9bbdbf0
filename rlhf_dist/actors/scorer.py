"""Frozen scorers: the reference policy, and the reward as a weighted sum of models, functions and endpoints."""

from __future__ import annotations

import importlib
import itertools
import json
import math
import os
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import ray
from ray import ObjectRef

from rlhf_dist.actors.dispatch import Columns, RolloutBatch
from rlhf_dist.actors.group import Group, Resources, Worker
from rlhf_dist.actors.learner import LearnerGroup
from rlhf_dist.config import ModelConfig, RewardComponent
from rlhf_dist.observability.trace import Span


@ray.remote
class Reference(Worker):
    """A replica of the frozen initial policy."""

    def __init__(self, model_path: str, model: ModelConfig, temperature: float, max_tokens: int, pad_id: int) -> None:
        super().__init__("reference")
        from rlhf_dist import models

        policy = models.load_policy(model_path, model.dtype, model.attention, model.trust_remote_code)
        self.forward = _Forward(models.PolicyModule(policy, temperature), max_tokens, pad_id)

    def logprobs(self, chunk: pa.Table) -> pa.Table:
        """``ref_logprobs`` of every row."""
        from rlhf_dist.data.batching import Ragged

        flat, order = [np.empty(0, np.float32)], []
        with self.trace.span(self.name, "logprobs"):
            for batch, (logprobs, _) in self.forward(chunk):
                flat.append(batch.gather(logprobs))
                order += batch.rows
        lengths = Ragged.of(chunk, "response_ids").lengths[order]
        column = Ragged.to_arrow(np.concatenate(flat), lengths).cast(pa.list_(pa.float32()))
        return pa.table({"row": pa.array(order, pa.int64()), "ref_logprobs": column})


@ray.remote
class Scorer(Worker):
    """A replica of the reward (or of the evaluation's metrics): every component on every sample."""

    def __init__(
        self,
        role: str,
        components: Sequence[RewardComponent],
        model: ModelConfig,
        tokenizer_dir: str,
        max_tokens: int,
        pad_id: int,
    ) -> None:
        super().__init__(role)
        from rlhf_dist.data.tokenization import load_tokenizer

        self.components = list(components)
        self.tokenizer = load_tokenizer(tokenizer_dir)
        self.score_with = [self._prepare(c, model, max_tokens, pad_id) for c in self.components]

    def score(self, chunk: pa.Table, prompts: pa.Table, with_sum: bool) -> pa.Table:
        """``score/NAME`` of every row and their weighted sum ``score``; without the sum ``metric/NAME`` only.

        Raises:
            ValueError: a component returned the wrong number of scores, or one that is not a finite number.
        """
        texts = _Texts(chunk, prompts, self.tokenizer)
        total = np.zeros(chunk.num_rows)
        columns: dict[str, pa.Array] = {}
        for component, score_with in zip(self.components, self.score_with, strict=True):
            with self.trace.span(self.name, component.name):
                scores = _checked(score_with(chunk, texts), component.name, texts)
            total += component.weight * scores
            columns[f"{'score' if with_sum else 'metric'}/{component.name}"] = pa.array(scores, pa.float32())
        if with_sum:
            columns["score"] = pa.array(total, pa.float32())
        return pa.table({"row": pa.array(range(chunk.num_rows), pa.int64()), **columns})

    def _prepare(
        self, component: RewardComponent, model: ModelConfig, max_tokens: int, pad_id: int
    ) -> Callable[[pa.Table, _Texts], Any]:
        if component.function:
            function = _FunctionProcess(component.function, component.timeout, component.name)
            return lambda chunk, texts: function(texts)
        if component.url:
            return lambda chunk, texts: _post(component, texts)
        from rlhf_dist import models

        assert component.model is not None
        scalar = models.load_scalar(component.model, model.dtype, model.attention, model.trust_remote_code)
        forward = _Forward(models.ScalarModule(scalar), max_tokens, pad_id)

        def score(chunk: pa.Table, texts: _Texts) -> np.ndarray:
            scores = np.empty(chunk.num_rows, np.float32)
            for batch, out in forward(chunk):
                scores[batch.rows] = out.reshape(-1)[batch.last].float().cpu().numpy()
            return scores

        return score


class _Forward:
    """A frozen module over a chunk, in micro-batches."""

    def __init__(self, module: Any, max_tokens: int, pad_id: int) -> None:
        import torch

        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.module = module.to(self.device).eval()
        self.max_tokens = max_tokens
        self.pad_id = pad_id

    def __call__(self, chunk: pa.Table) -> Any:
        import torch

        from rlhf_dist.data.batching import collate, micro_batches, sequence_lengths

        with torch.inference_mode():
            for rows in micro_batches(sequence_lengths(chunk), 1, 0, self.max_tokens):
                batch = collate(chunk, rows, (), self.pad_id).to(self.device)
                yield batch, self.module(batch)


class _Texts:
    """What functions and endpoints see of a chunk: prompts, responses without special tokens, source rows."""

    def __init__(self, chunk: pa.Table, prompts: pa.Table, tokenizer: Any) -> None:
        rows = chunk["prompt_id"].to_numpy()
        picked = prompts.select(["prompt", "fields"]).take(rows)
        self.prompts: list[str] = picked["prompt"].to_pylist()
        self.fields: list[dict[str, Any]] = [json.loads(f) for f in picked["fields"].to_pylist()]
        self.responses: list[str] = tokenizer.batch_decode(chunk["response_ids"].to_pylist(), skip_special_tokens=True)


def _checked(scores: Any, name: str, texts: _Texts) -> np.ndarray:
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


def load_function(name: str) -> Callable[..., Sequence[float]]:
    """``package.module:function``.

    Raises:
        ValueError: the module cannot be imported, or has no such function.
    """
    module_name, _, function = name.partition(":")
    try:
        module = importlib.import_module(module_name)
    except ImportError as error:
        raise ValueError(f"function {name!r}: cannot import {module_name}: {error}") from None
    found = getattr(module, function, None)
    if not callable(found):
        raise ValueError(f"function {name!r}: module {module_name} has no function {function!r}")
    return found


def _call(name: str, prompts: list[str], responses: list[str], fields: list[dict[str, Any]]) -> list[Any]:
    return list(load_function(name)(prompts, responses, fields))


class _FunctionProcess:
    """A Python reward in a process of its own, which is killed at the time limit."""

    def __init__(self, function: str, timeout: float, name: str) -> None:
        import multiprocessing

        from pebble import ProcessPool

        load_function(function)  # fail at the start, not at the first batch
        self.function, self.timeout, self.name = function, timeout, name
        self.pool = ProcessPool(max_workers=1, context=multiprocessing.get_context("spawn"))

    def __call__(self, texts: _Texts) -> list[Any]:
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


def _post(component: RewardComponent, texts: _Texts) -> list[Any]:
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


class ReferenceGroup:
    """Replicas of the reference; chunks go round."""

    def __init__(self, group: Group) -> None:
        self.group = group
        self._next = itertools.cycle(group.actors)

    def logprobs(self, batch: RolloutBatch) -> Columns:
        return batch.apply("reference", lambda chunk: [next(self._next).logprobs.remote(chunk)])

    def wait_ready(self) -> list[Any]:
        return self.group.wait_ready()

    def spans(self) -> list[Span]:
        return self.group.spans()

    def release(self) -> None:
        self.group.release()


class ShardedReference:
    """The reference as one ZeRO-3 group."""

    def __init__(self, learner: LearnerGroup) -> None:
        self.learner = learner

    def logprobs(self, batch: RolloutBatch) -> Columns:
        return self.learner.logprobs(batch, "ref_logprobs")

    def wait_ready(self) -> list[Any]:
        return self.learner.wait_ready()

    def spans(self) -> list[Span]:
        return self.learner.spans()

    def release(self) -> None:
        self.learner.release()


class ScorerGroup:
    """Replicas of the reward; chunks go round."""

    def __init__(self, role: str, group: Group) -> None:
        self.role = role
        self.group = group
        self._next = itertools.cycle(group.actors)

    def score(self, batch: RolloutBatch, prompts: ObjectRef, with_sum: bool = True) -> Columns:
        return batch.apply(self.role, lambda chunk: [next(self._next).score.remote(chunk, prompts, with_sum)])

    def wait_ready(self) -> list[Any]:
        return self.group.wait_ready()

    def spans(self) -> list[Span]:
        return self.group.spans()

    def release(self) -> None:
        self.group.release()


class ShardedReward:
    """One reward model as a ZeRO-3 group."""

    def __init__(self, learner: LearnerGroup, component: RewardComponent) -> None:
        self.learner = learner
        self.component = component

    def score(self, batch: RolloutBatch, prompts: ObjectRef) -> Columns:
        return self.learner.scores(batch, f"score/{self.component.name}")

    def wait_ready(self) -> list[Any]:
        return self.learner.wait_ready()

    def spans(self) -> list[Span]:
        return self.learner.spans()

    def release(self) -> None:
        self.learner.release()


def scorer_group(
    role: str,
    components: Sequence[RewardComponent],
    model: ModelConfig,
    tokenizer_dir: str,
    *,
    replicas: int,
    resources: Resources,
    max_tokens: int,
    pad_id: int,
    strategy: str,
    seconds: float,
) -> ScorerGroup:
    """Start ``replicas`` scorers of ``components``."""
    arguments = (role, list(components), model, tokenizer_dir, max_tokens, pad_id)
    group = Group(role, Scorer, replicas, resources, lambda _: arguments, strategy=strategy, seconds=seconds)
    return ScorerGroup(role, group)
