"""The reward: a weighted sum of models, functions and endpoints."""

from __future__ import annotations

from pydantic import Field, PositiveFloat, PositiveInt, model_validator

from rlhf_dist.config.base import NonNegative, Section, is_function
from rlhf_dist.config.processes import ReplicaConfig


class RewardComponent(Section):
    """One term of the reward. Exactly one of ``model``, ``function``, ``url``."""

    name: str = "reward"
    """Name of the column ``score/NAME`` and of its metric."""
    weight: float = 1.0
    """Its factor in the sum."""
    model: str | None = None
    """Folder or hub name of a sequence classifier with one output; ``trained``: the pipeline's reward model."""
    function: str | None = None
    """``package.module:function``, called as f(prompts, responses, fields) -> list of numbers."""
    url: str | None = None
    """HTTP endpoint that takes {prompts, responses, fields} as JSON and answers {scores: [...]}."""
    headers: dict[str, str] = {}
    """HTTP headers; ``$NAME`` in a value is read from the environment."""
    timeout: PositiveFloat = 60
    """Seconds for one call of a function or endpoint; then the call fails."""
    retries: int = Field(3, ge=0)
    """Attempts after a failed HTTP call, with growing pauses."""

    @model_validator(mode="after")
    def _one_source(self) -> RewardComponent:
        given = [k for k in ("model", "function", "url") if getattr(self, k)]
        if len(given) != 1:
            raise ValueError(f"give exactly one of model, function, url; got {given or 'none'}")
        if self.function and not is_function(self.function):
            raise ValueError(f"function must read package.module:function, got {self.function!r}")
        if self.url and not self.url.startswith(("http://", "https://")):
            raise ValueError(f"url must begin with http:// or https://, got {self.url!r}")
        return self


class RewardConfig(ReplicaConfig):
    """The reward: a weighted sum of components, computed by ``replicas`` processes."""

    components: list[RewardComponent] = [RewardComponent(name="reward_model", model="trained")]
    """Terms of the sum."""
    normalize: bool = False
    """Subtract mean and divide by standard deviation of the scores of the initial policy."""
    clip: PositiveFloat | None = None
    """Clip the score to [-clip, clip], after normalisation."""
    missing_eos_penalty: NonNegative = 0.0
    """Subtracted from the score of a response without an end of text."""
    soft_overlong_cache: PositiveInt | None = None
    """Over so many tokens before ``rollout.max_response_length`` the score falls linearly by up to 1 (DAPO)."""

    @model_validator(mode="after")
    def _components(self) -> RewardConfig:
        names = [c.name for c in self.components]
        if not names:
            raise ValueError("components is empty: PPO needs a reward")
        if len(set(names)) < len(names):
            raise ValueError(f"components must have different names, got {names}")
        if self.sharded and (len(names) > 1 or not self.components[0].model):
            raise ValueError("sharded runs one model over all processes: give exactly one component, with `model`")
        if self.sharded and self.components[0].weight != 1:
            raise ValueError(f"sharded knows no weight, got {self.components[0].weight:g}; scale algo.kl_coef instead")
        return self
