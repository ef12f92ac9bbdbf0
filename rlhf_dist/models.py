"""The models, as modules that take a :class:`~rlhf_dist.data.batching.Batch` and return per-token figures.

``PolicyModule``  log-probabilities and entropies of the predicted tokens (policy, reference)
``ScalarModule``  one number per token: values (critic) or, at the last token, the score (reward model)

The full logits never leave the module. Both keep a Hugging Face model inside,
so that what is saved opens in transformers and vLLM.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    PretrainedConfig,
    PreTrainedModel,
)

from rlhf_dist.algorithms.logprobs import token_logprobs
from rlhf_dist.algorithms.losses import entropy_from_logits
from rlhf_dist.algorithms.supervised import distillation_loss
from rlhf_dist.data.batching import Batch


class PolicyModule(nn.Module):
    """Causal language model; returns ``(logprobs, entropy)``, each ``[B, T]`` float32, 0 where nothing is predicted."""

    def __init__(self, model: PreTrainedModel, temperature: float = 1.0) -> None:
        super().__init__()
        self.model = model
        self.temperature = temperature

    def forward(
        self,
        batch: Batch,
        entropy: Literal["no", "detached", "yes"] = "no",
        temperature: float | None = None,
        teacher: tuple[Tensor, Tensor] | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """``entropy`` with a gradient costs a backward pass over ``[n, V]`` of its own: ``detached`` has none.

        With ``teacher``, its likely tokens and their log-probabilities (each ``[n, K]`` for the n response tokens),
        the first result is the KL to it instead of the log-probability."""
        temperature = self.temperature if temperature is None else temperature
        # Logits only from the first index that predicts a response token on: [B, T - first, V].
        keep = batch.input_ids.shape[1] - batch.first_label
        logits = self.model(
            input_ids=batch.input_ids,
            attention_mask=batch.attention_mask,
            position_ids=batch.position_ids,
            use_cache=False,
            logits_to_keep=keep,
        ).logits
        # Rows of response tokens only: [n, V]. Their number differs between ranks; nothing below is collective.
        where = batch.response[:, batch.first_label :]
        chosen = logits[where]
        labels = batch.labels[:, batch.first_label :][where]
        if teacher is None:
            values = token_logprobs(chosen, labels, temperature)
        else:
            ids, theirs = (x[None] for x in teacher)
            values = distillation_loss(chosen[None], ids, theirs, torch.ones(1, len(chosen), device=chosen.device))[0][
                0
            ]
        # A dummy has no response token; adding 0 * logits keeps the backward pass, and its collectives, alive.
        logprobs = _scatter(values, batch.response) + (0.0 * logits.float().sum() if values.numel() == 0 else 0.0)
        if entropy == "no":
            return logprobs, None
        with torch.set_grad_enabled(entropy == "yes" and torch.is_grad_enabled()):
            return logprobs, _scatter(entropy_from_logits(chosen.float() / temperature), batch.response)


class ScalarModule(nn.Module):
    """Sequence classifier with one output; returns its value at every token, ``[B, T]`` float32."""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.model = model

    @property
    def mean(self) -> float:
        """The score that counts as 0; see :meth:`center`."""
        return getattr(self.model.config, "reward_mean", 0.0)

    def center(self, mean: float) -> None:
        """Take ``mean`` off all scores from now on: with the mean score of reference responses these have mean 0.

        InstructGPT (2203.02155) uses a bias for that. The heads of transformers' classifiers have none, so
        it is ``reward_mean`` in the model's ``config.json``, which this class alone reads. A critic that starts from
        the reward model thereby estimates the scores that the policy gets.
        """
        self.model.config.reward_mean = self.mean + mean

    def forward(self, batch: Batch) -> Tensor:
        backbone: nn.Module = getattr(self.model, self.model.base_model_prefix)
        head: nn.Module = getattr(self.model, "score")  # noqa: B009  (mypy takes the attribute for a Tensor)
        hidden = backbone(
            input_ids=batch.input_ids,
            attention_mask=batch.attention_mask,
            position_ids=batch.position_ids,
            use_cache=False,
        ).last_hidden_state
        return head(hidden).squeeze(-1).float() - self.mean

    def scores(self, batch: Batch) -> Tensor:
        """The value at the last token of each sequence, ``[sequences]``."""
        return self(batch).reshape(-1)[batch.last]


def _scatter(values: Tensor, where: Tensor) -> Tensor:
    return torch.zeros(where.shape, dtype=values.dtype, device=values.device).masked_scatter(where, values)


def build_policy(architecture: dict[str, Any], vocab_size: int, special: dict[str, int], seed: int) -> PreTrainedModel:
    """A randomly initialised causal language model.

    Args:
        architecture: keys of the Hugging Face config, ``model_type`` among them.
        special: ``bos_token_id``, ``eos_token_id``, ``pad_token_id``.

    Raises:
        ValueError: unknown ``model_type``, or keys that its config does not take.
    """
    torch.manual_seed(seed)
    return AutoModelForCausalLM.from_config(model_config(architecture, vocab_size, special))


def model_config(architecture: dict[str, Any], vocab_size: int, special: dict[str, int]) -> PretrainedConfig:
    """The Hugging Face config of ``model.architecture``; see :func:`build_policy`."""
    keys = dict(architecture)
    model_type = keys.pop("model_type", None)
    if model_type is None:
        raise ValueError("model.architecture needs model_type, for example llama")
    try:
        known = AutoConfig.for_model(model_type)
    except ValueError:
        raise ValueError(f"model.architecture.model_type={model_type!r} is not known to transformers") from None
    unknown = [k for k in keys if not hasattr(known, k) and k not in known.attribute_map]
    if unknown:
        raise ValueError(f"model.architecture: {model_type} has no config key {unknown[0]!r}")
    return AutoConfig.for_model(model_type, **keys, vocab_size=vocab_size, **special, dtype="float32")


def load_policy(path: str, dtype: str, attention: str, trust_remote_code: bool = False) -> PreTrainedModel:
    """The causal language model in ``path`` (folder or hub name)."""
    return AutoModelForCausalLM.from_pretrained(
        _existing(path),
        dtype=getattr(torch, dtype),
        attn_implementation=attention,
        trust_remote_code=trust_remote_code,
        use_safetensors=True,
    )


def load_scalar(path: str, dtype: str, attention: str, trust_remote_code: bool = False) -> PreTrainedModel:
    """A sequence classifier with one output; from a causal language model the head starts at zero.

    A zero head makes the first values and scores exactly 0, so that neither
    the critic's first advantages nor the reward model's first loss depend on
    the seed of the head.
    """
    model, info = AutoModelForSequenceClassification.from_pretrained(
        _existing(path),
        num_labels=1,
        dtype=getattr(torch, dtype),
        attn_implementation=attention,
        trust_remote_code=trust_remote_code,
        use_safetensors=True,
        output_loading_info=True,
    )
    if any(key.startswith("score.") for key in info["missing_keys"]):
        nn.init.zeros_(model.score.weight)
    return model


def _existing(path: str) -> str:
    """A folder that does not exist would be taken for a hub name and end in a long network error."""
    if ("/" in path and path.count("/") != 1) or path.startswith((".", "~")):
        folder = Path(path).expanduser()
        if not (folder / "config.json").is_file():
            raise ValueError(f"no model in {folder}: expected a folder with config.json")
        return str(folder)
    return path
