"""Frozen scorers: the reference policy, and the reward as a weighted sum of models, functions and endpoints."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import ray
from ray import ObjectRef

from rlhf_dist.actors.group import WATCH, Group, Holder, Resources, Worker
from rlhf_dist.actors.learner import LearnerGroup
from rlhf_dist.actors.rewards import FunctionProcess, Texts, checked, post
from rlhf_dist.actors.rollouts import Columns, Stages
from rlhf_dist.config import ModelConfig, RewardComponent


@ray.remote(concurrency_groups=WATCH)  # type: ignore[call-overload]  # Ray 2.60 leaves it out of its types
class Reference(Worker):
    """A replica of the frozen initial policy."""

    def __init__(self, model_path: str, model: ModelConfig, temperature: float, max_tokens: int, pad_id: int) -> None:
        super().__init__("reference")
        from rlhf_dist import models

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
        from rlhf_dist.data.tokenization import load_tokenizer

        self.components = list(components)
        self.tokenizer = load_tokenizer(tokenizer_dir)
        self.score_with = [self._prepare(c, model, max_tokens, pad_id) for c in self.components]

    def score(self, chunk: pa.Table, prompts: pa.Table, with_sum: bool) -> pa.Table:
        """``score/NAME`` of every row and their weighted sum ``score``; without the sum ``metric/NAME`` only.

        Raises:
            ValueError: a component returned the wrong number of scores, or one that is not a finite number.
        """
        texts = Texts(chunk, prompts, self.tokenizer)
        total = np.zeros(chunk.num_rows)
        columns: dict[str, pa.Array] = {}
        for component, score_with in zip(self.components, self.score_with, strict=True):
            with self.trace.span(self.name, component.name):
                scores = checked(score_with(chunk, texts), component.name, texts)
            total += component.weight * scores
            columns[f"{'score' if with_sum else 'metric'}/{component.name}"] = pa.array(scores, pa.float32())
        if with_sum:
            columns["score"] = pa.array(total, pa.float32())
        return pa.table({"row": pa.array(range(chunk.num_rows), pa.int64()), **columns})

    def _prepare(
        self, component: RewardComponent, model: ModelConfig, max_tokens: int, pad_id: int
    ) -> Callable[[pa.Table, Texts], Any]:
        if component.function:
            function = FunctionProcess(component.function, component.timeout, component.name)
            return lambda chunk, texts: function(texts)
        if component.url:
            return lambda chunk, texts: post(component, texts)
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
    """Replicas of the reward; chunks go round."""

    def __init__(self, role: str, group: Group) -> None:
        self.role = role
        super().__init__(group)
        self._next = itertools.cycle(group.actors)

    def score(self, batch: Stages, prompts: ObjectRef, with_sum: bool = True) -> Columns:
        return batch.apply(self.role, lambda s: [next(self._next).score.remote(s.chunk.table, prompts, with_sum)])


class ShardedReward(Holder):
    """One reward model as a ZeRO-3 group."""

    def __init__(self, learner: LearnerGroup, component: RewardComponent) -> None:
        super().__init__(learner)
        self.learner = learner
        self.component = component

    def score(self, batch: Stages, prompts: ObjectRef) -> Columns:
        return self.learner.scores(batch, f"score/{self.component.name}")


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
    return ScorerGroup(role, group)
