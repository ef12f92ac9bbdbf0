"""Frozen scorers: the reference policy, and the reward as a weighted sum of models, functions and endpoints."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import ray
from ray import ObjectRef

from rlhf_dist.actors.group import WATCH, Group, Holder, Resources, Worker
from rlhf_dist.actors.learner import LearnerGroup
from rlhf_dist.actors.rewards import FunctionProcess, GivenUp, Texts, checked
from rlhf_dist.actors.rollouts import Columns, Slice, Stages
from rlhf_dist.actors.waiting import wait_for
from rlhf_dist.config import ModelConfig, RewardComponent


@ray.remote(concurrency_groups=WATCH)  # type: ignore[call-overload]  # Ray 2.60 leaves it out of its types
class Reference(Worker):
    """A replica of the frozen initial policy."""

    def __init__(self, model_path: str, model: ModelConfig, temperature: float, max_tokens: int, pad_id: int) -> None:
        super().__init__("reference")
        with self.importing():
            from rlhf_dist import models

        with self.trace.span(self.name, "start"):
            policy = models.load_policy(model_path, model.dtype, model.attention, model.trust_remote_code)
            self.forward = _Forward(models.PolicyModule(policy, temperature), max_tokens, pad_id)

    def logprobs(self, chunk: pa.Table) -> pa.Table:
        """``ref_logprobs`` of every row."""
        from rlhf_dist.data.batching import TokenColumn

        column = TokenColumn(chunk)
        with self.trace.span(self.name, "logprobs"):
            for batch, (logprobs, _) in self.forward(chunk, column.wanted):
                column.add(batch, logprobs)
        return column.table("ref_logprobs")


@ray.remote(concurrency_groups=WATCH)  # type: ignore[call-overload]  # Ray 2.60 leaves it out of its types
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
        with self.importing():
            from rlhf_dist.data.tokenization import load_tokenizer

            if any(component.model for component in components):
                from rlhf_dist import models  # noqa: F401

        self.components = list(components)
        self.given_up: list[GivenUp] = []
        with self.trace.span(self.name, "start"):
            self.tokenizer = load_tokenizer(tokenizer_dir)
            self.score_with = [self._prepare(c, model, max_tokens, pad_id) for c in self.components]

    def score(self, chunk: pa.Table, prompts: pa.Table, with_sum: bool) -> tuple[pa.Table, list[GivenUp]]:
        """``score/NAME`` of every row and their weighted sum ``score``; without the sum ``metric/NAME`` only.

        A score that an endpoint gave up is null, and so is the sum with it; the second result says why.

        Raises:
            ValueError: a component returned the wrong number of scores, or one that is not a finite number.
        """
        texts = Texts(chunk, prompts, self.tokenizer)
        total = np.zeros(chunk.num_rows)
        columns: dict[str, pa.Array] = {}
        for component, score_with in zip(self.components, self.score_with, strict=True):
            with self.trace.span(self.name, component.name):
                scores = checked(
                    score_with(chunk, texts), component.name, texts, chunk, may_lack=component.url is not None
                )
            total += component.weight * scores
            columns[f"{'score' if with_sum else 'metric'}/{component.name}"] = _nullable(scores)
        if with_sum:
            columns["score"] = _nullable(total)
        table = pa.table({"row": pa.array(range(chunk.num_rows), pa.int64()), **columns})
        given_up, self.given_up = self.given_up, []
        return table, given_up

    def _prepare(
        self, component: RewardComponent, model: ModelConfig, max_tokens: int, pad_id: int
    ) -> Callable[[pa.Table, Texts], Any]:
        if component.function:
            function = FunctionProcess(component.function, component.timeout, component.name)
            return lambda chunk, texts: function(texts)
        if component.url:
            from rlhf_dist.actors.endpoint import Endpoint

            endpoint = Endpoint(component, lambda given_up: self.given_up.append(given_up))
            return lambda chunk, texts: endpoint(texts)
        from rlhf_dist import models

        assert component.model is not None
        scalar = models.load_scalar(component.model, model.dtype, model.attention, model.trust_remote_code)
        forward = _Forward(models.ScalarModule(scalar), max_tokens, pad_id)

        def score(chunk: pa.Table, texts: Texts) -> np.ndarray:
            scores = np.empty(chunk.num_rows, np.float32)
            for batch, out in forward(chunk, np.arange(chunk.num_rows)):
                scores[batch.rows] = out.reshape(-1)[batch.last].float().cpu().numpy()
            return scores

        return score


def _nullable(scores: np.ndarray) -> pa.Array:
    """float32, null for NaN."""
    return pa.array(scores.astype(np.float32), mask=np.isnan(scores))


class _Forward:
    """A frozen module over a chunk, in micro-batches."""

    def __init__(self, module: Any, max_tokens: int, pad_id: int) -> None:
        import torch

        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.module = module.to(self.device).eval()
        self.max_tokens = max_tokens
        self.pad_id = pad_id

    def __call__(self, chunk: pa.Table, rows: np.ndarray) -> Any:
        import torch

        from rlhf_dist.data.batching import collate, micro_batches, sequence_lengths

        with torch.inference_mode():
            for part in micro_batches(sequence_lengths(chunk, rows), 1, 0, self.max_tokens):
                batch = collate(chunk, rows[part].tolist(), (), self.pad_id).to(self.device)
                yield batch, self.module(batch)


class ReferenceGroup(Holder):
    """Replicas of the reference; chunks go round."""

    def __init__(self, group: Group) -> None:
        super().__init__(group)
        self._next = itertools.cycle(group.actors)

    def logprobs(self, batch: Stages) -> Columns:
        return batch.apply("reference", lambda s: [next(self._next).logprobs.remote(s.chunk.table)])


class ShardedReference(Holder):
    """The reference as one ZeRO-3 group."""

    def __init__(self, learner: LearnerGroup) -> None:
        super().__init__(learner)
        self.learner = learner

    def logprobs(self, batch: Stages) -> Columns:
        return self.learner.logprobs(batch, "ref_logprobs")


class ScorerGroup(Holder):
    """Replicas of the reward; chunks go round.

    Args:
        gives_up: a component is an endpoint; ask :meth:`given_up` after each batch.
    """

    def __init__(self, role: str, group: Group, gives_up: bool = False) -> None:
        self.role = role
        self.gives_up = gives_up
        super().__init__(group)
        self._next = itertools.cycle(group.actors)
        self._given_up: list[ObjectRef] = []
        # Chunks are submitted by the generators' threads.
        self._lock = threading.Lock()

    def score(self, batch: Stages, prompts: ObjectRef, with_sum: bool = True) -> Columns:
        def submit(part: Slice) -> list[ObjectRef]:
            score: Any = next(self._next).score.options(num_returns=2)
            columns, given_up = score.remote(part.chunk.table, prompts, with_sum)
            if self.gives_up:
                with self._lock:
                    self._given_up.append(given_up)
            return [columns]

        return batch.apply(self.role, submit)

    def given_up(self) -> list[GivenUp]:
        """What endpoints gave up in the chunks that were scored since the last call; does not wait for others."""
        with self._lock:
            if not self._given_up:
                return []
            done, self._given_up = ray.wait(self._given_up, num_returns=len(self._given_up), timeout=0)
        return [given_up for part in wait_for(done, f"{self.role}, scoring") for given_up in part]


class ShardedReward(Holder):
    """One reward model as a ZeRO-3 group."""

    def __init__(self, learner: LearnerGroup, component: RewardComponent) -> None:
        super().__init__(learner)
        self.learner = learner
        self.component = component

    def score(self, batch: Stages, prompts: ObjectRef) -> Columns:
        return self.learner.scores(batch, f"score/{self.component.name}")

    def given_up(self) -> list[GivenUp]:
        """Nothing: a model scores everything."""
        return []


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
    group = Group(
        role, Scorer, replicas, resources, lambda _: arguments, strategy=strategy, seconds=seconds, ray_restarts=True
    )
    return ScorerGroup(role, group, gives_up=any(c.url for c in components))
