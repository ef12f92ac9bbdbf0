"""The reward: a weighted sum of models, functions and endpoints."""

from __future__ import annotations

from typing import Literal
from urllib.parse import urlsplit

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
    url: str | None = Field(None, repr=False)
    """HTTP endpoint that takes {prompts, responses, fields} as JSON and answers {scores: [...]}; ``$NAME`` is read from
    the environment of the reward process."""
    headers: dict[str, str] = Field({}, repr=False)
    """HTTP headers; ``$NAME`` in a value as in ``url``."""
    timeout: PositiveFloat = 60
    """Seconds for one call of a function, or for one request to an endpoint; then it fails."""
    max_batch: PositiveInt = 64
    """Samples in one request to an endpoint; larger chunks are split."""
    retries: int = Field(3, ge=0)
    """Attempts after a failed HTTP request, with growing random pauses, where another attempt can help."""
    breaker_failures: PositiveInt = 5
    """Failed HTTP requests in a row after which the endpoint is left alone."""
    breaker_seconds: PositiveFloat = 30
    """For so many seconds; every request fails at once, then one tries again."""
    on_failure: Literal["stop", "skip"] = "stop"
    """What follows when an endpoint gives no score for a sample. stop: the run ends. skip: the sample's group is left
    out, and new prompts take its place."""

    @model_validator(mode="after")
    def _one_source(self) -> RewardComponent:
        given = [k for k in ("model", "function", "url") if getattr(self, k)]
        if len(given) != 1:
            raise ValueError(f"give exactly one of model, function, url; got {given or 'none'}")
        if self.function and not is_function(self.function):
            raise ValueError(f"function must read package.module:function, got {self.function!r}")
        if self.url:
            _check_url(self.url)
        elif self.on_failure == "skip":
            raise ValueError(f"on_failure=skip is for a url; a {given[0]} that fails ends the run")
        return self

    @property
    def place(self) -> str:
        """Scheme, host and path of the URL, without credentials and query, which must not be seen."""
        url = urlsplit(self.url or "")
        return f"{url.scheme}://{url.netloc.rpartition('@')[2]}{url.path}"


def _check_url(url: str) -> None:
    """Raises ValueError without saying the URL, which may hold a password."""
    if not url.startswith(("http://", "https://")):
        raise ValueError("url must begin with http:// or https://")
    try:
        parts = urlsplit(url)
        complete = bool(parts.hostname) and parts.port != 0
    except ValueError:
        complete = False
    if not complete:
        raise ValueError("url must read http://HOST/PATH or http://HOST:PORT/PATH")


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
    skip_rounds: PositiveInt = 3
    """Times that a step replaces groups without a reward (``on_failure: skip``); then the run ends."""

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

    @property
    def uses_endpoints(self) -> bool:
        return any(c.url for c in self.components)
