"""One update by our learner, by a plain PyTorch loop, and by the same loop under DeepSpeed.

All three start from the same weights and see the same batches, so that their losses and gradient norms must agree.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import deepspeed
import numpy as np
import pyarrow as pa
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification
from transformers.utils import logging

from rlhf_dist.actors.learner_spec import LearnerSpec
from rlhf_dist.actors.learner_worker import LearnerWorker
from rlhf_dist.config import AlgoConfig, LearnerConfig, ModelConfig, OptimConfig
from rlhf_dist.engines.deepspeed import ds_config
from rlhf_dist.models import build_policy, load_policy, load_scalar

#: For each optimizer step the rows of each micro-batch.
Plan = Sequence[Sequence[Sequence[int]]]
#: Loss and gradient norm of an optimizer step.
Step = tuple[float, float]

ALGO = AlgoConfig(rollout_correction="none")
#: The default of ``policy.optim``, with a rate that does not depend on how long is measured.
OPTIM = OptimConfig(lr=1e-6, schedule="constant", warmup_ratio=0)
ZERO_2 = LearnerConfig(zero_stage=2)
SPECIAL = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}


def save_models(folder: Path, hidden: int, layers: int, vocabulary: int, longest: int) -> None:
    """Random Llamas under ``folder``, by role: ``policy`` and ``critic``, whose head is not the zeros of a real run.

    From a head of zeros no gradient would reach the rest of the critic, and there would be nothing to compare.
    """
    logging.disable_progress_bar()
    heads = max(1, hidden // 64)
    architecture = {
        "model_type": "llama",
        "hidden_size": hidden,
        "intermediate_size": 4 * hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": heads,
        "max_position_embeddings": longest,
    }
    build_policy(architecture, vocabulary, SPECIAL, seed=0).save_pretrained(folder / "policy")
    config = AutoModelForCausalLM.from_pretrained(folder / "policy").config
    config.num_labels = 1
    torch.manual_seed(1)
    AutoModelForSequenceClassification.from_config(config).save_pretrained(folder / "critic")


class OurLoop:
    """``LearnerWorker`` as Ray would run it, in this process: what Ray adds to a call is not measured."""

    def __init__(self, role: str, path: Path, micro_batch_tokens: int, max_response_length: int) -> None:
        spec = LearnerSpec(
            role=role,
            model_path=str(path),
            head="policy" if role == "policy" else "scalar",
            objective="policy" if role == "policy" else "critic",
            model=ModelConfig(path=str(path)),
            learner=ZERO_2,
            optim=OPTIM,
            micro_batch_tokens=micro_batch_tokens,
            algo=ALGO,
            max_response_length=max_response_length,
        )
        worker_class: Any = LearnerWorker
        self.worker = worker_class.__ray_metadata__.modified_class(spec, 0, 1)
        self.worker.setup(*self.worker.address())
        self.loss = "loss" if role == "policy" else "value_loss"

    def update(self, table: pa.Table, minibatches: Sequence[np.ndarray]) -> list[Step]:
        return [(step[self.loss], step["grad_norm"]) for step in self.worker.update(table, minibatches)]


@dataclass(frozen=True)
class Samples:
    """A table as a plain loop holds it: for each row its tokens and what is known of their predictions."""

    ids: list[Tensor]
    columns: dict[str, list[Tensor]]
    """One number for each token but the first; 0 in the prompt. ``mask`` is 1 in the response."""

    @classmethod
    def of(cls, table: pa.Table, names: Sequence[str]) -> Samples:
        prompts, responses = table["prompt_ids"].to_pylist(), table["response_ids"].to_pylist()
        values = {name: table[name].to_pylist() for name in names} | {"mask": [[1.0] * len(x) for x in responses]}
        columns = {
            name: [torch.tensor([0.0] * (len(p) - 1) + x) for p, x in zip(prompts, column, strict=True)]
            for name, column in values.items()
        }
        return cls([torch.tensor(p + r) for p, r in zip(prompts, responses, strict=True)], columns)

    def padded(self, rows: Sequence[int]) -> dict[str, Tensor]:
        """Micro-batch of ``rows``, padded on the right: tokens ``[B, T]``, the columns ``[B, T - 1]``."""
        pad = lambda tensors: pad_sequence([tensors[row] for row in rows], batch_first=True)
        ids, attention = pad(self.ids), pad([torch.ones_like(x) for x in self.ids])
        return {"ids": ids, "attention": attention, **{name: pad(x) for name, x in self.columns.items()}}

    def trained(self, rows: Sequence[int]) -> int:
        return sum(int(self.columns["mask"][row].sum()) for row in rows)


class Values(nn.Module):
    """A number for each token: transformers' classifier itself gives one for the last token only."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor, attention_mask: Tensor, use_cache: bool) -> Tensor:
        hidden = self.model.model(input_ids=input_ids, attention_mask=attention_mask, use_cache=use_cache)
        return self.model.score(hidden.last_hidden_state).squeeze(-1)


def policy_loss(module: Callable, batch: dict[str, Tensor]) -> Tensor:
    """PPO's loss, summed over the response tokens."""
    output = module(input_ids=batch["ids"], attention_mask=batch["attention"], use_cache=False)
    labels = batch["ids"][:, 1:]
    logprobs = -cross_entropy(output.logits[:, :-1].flatten(0, 1), labels.flatten(), reduction="none").view_as(labels)
    ratio = (logprobs - batch["old_logprobs"]).exp()
    clipped = ratio.clamp(1 - ALGO.eps_clip, 1 + ALGO.eps_clip)
    loss = -torch.minimum(ratio * batch["advantages"], clipped * batch["advantages"])
    return (loss * batch["mask"]).sum()


def critic_loss(module: Callable, batch: dict[str, Tensor]) -> Tensor:
    """The clipped value loss, summed over the response tokens."""
    assert ALGO.value_clip is not None
    values = module(input_ids=batch["ids"], attention_mask=batch["attention"], use_cache=False)[:, :-1]
    old, returns = batch["values"], batch["returns"]
    clipped = values.clamp(old - ALGO.value_clip, old + ALGO.value_clip)
    loss = 0.5 * torch.maximum((values - returns).square(), (clipped - returns).square())
    return (loss * batch["mask"]).sum()


class PlainLoop:
    """What one would write without a framework: no metrics, no checks.

    The loss is read once in an optimizer step, to compare it.
    """

    def __init__(self, role: str, path: Path) -> None:
        if role == "policy":
            self.names, self.loss = ("old_logprobs", "advantages"), policy_loss
            self.module: Any = load_policy(str(path), "float32", "sdpa")
        else:
            self.names, self.loss = ("values", "returns"), critic_loss
            self.module = Values(load_scalar(str(path), "float32", "sdpa"))
        self.module.train()
        self.prepare()

    def prepare(self) -> None:
        self.optimizer = torch.optim.AdamW(
            self.module.parameters(), OPTIM.lr, OPTIM.betas, OPTIM.eps, OPTIM.weight_decay
        )

    def update(self, samples: Samples, plan: Plan) -> list[Step]:
        steps = []
        for micro_batches in plan:
            tokens = sum(samples.trained(rows) for rows in micro_batches)
            total = torch.zeros(())
            for rows in micro_batches:
                loss = self.loss(self.module, samples.padded(rows)) / tokens
                self.backward(loss)
                total += loss.detach()
            steps.append((float(total), self.step()))
        return steps

    def backward(self, loss: Tensor) -> None:
        loss.backward()

    def step(self) -> float:
        norm = nn.utils.clip_grad_norm_(self.module.parameters(), OPTIM.max_grad_norm)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return float(norm)


class DeepSpeedLoop(PlainLoop):
    """The same under DeepSpeed, with the config that our learner gives it; only after :class:`OurLoop`, whose group of
    one process it joins."""

    def prepare(self) -> None:
        config = ds_config(ZERO_2, OPTIM, "float32")
        self.module, *_ = deepspeed.initialize(
            model=self.module, model_parameters=list(self.module.parameters()), config=config
        )

    def backward(self, loss: Tensor) -> None:
        self.module.backward(loss)

    def step(self) -> float:
        self.module.step()
        return float(self.module.get_global_grad_norm())
