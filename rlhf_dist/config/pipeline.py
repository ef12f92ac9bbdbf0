"""The stages of a run: what each makes, from what, in which order; given in the config, resolved here."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from typing import Annotated, Any, Literal

from pydantic import (
    BeforeValidator,
    Field,
    PositiveInt,
    SerializerFunctionWrapHandler,
    model_serializer,
    model_validator,
)

from rlhf_dist.config.base import Section

Recipe = Literal["sft", "distill", "compare", "reward_model", "dpo", "ppo", "evaluate", "evaluate_reward"]

#: What a stage is called that is given no name, and the folder that it makes.
NAMES: dict[str, str] = {"compare": "comparisons", "ppo": "policy"}
#: Recipes whose result is a policy; those of ``SUPERVISED`` learn from data that somebody wrote.
SUPERVISED = ("sft", "distill", "dpo")
POLICIES = (*SUPERVISED, "ppo")


def _named(value: Any) -> Any:
    return {"recipe": value} if isinstance(value, str) else value


class StageConfig(Section):
    """One stage; a recipe's name alone stands for ``{recipe: NAME}``."""

    recipe: Recipe
    """What is done."""
    name: str | None = Field(None, pattern=r"^[A-Za-z0-9_-]+(/[A-Za-z0-9_-]+)*$")
    """Of the stage and of the folder with its result, such as ``pm_test`` or ``second/policy``; default: the recipe's,
    ``policy`` for ppo, ``comparisons`` for compare. Checkpoints, rollouts and ledger of ppo lie beside the folder."""
    start: str | None = None
    """Stage whose model it starts from, samples or evaluates. Default: the newest policy; reward models start from
    ``reward_model.path`` or the newest policy that ppo has not touched."""
    reward: str | None = None
    """ppo: the reward model that ``model: trained`` stands for. Default: the newest."""
    reference: str | None = None
    """ppo: the policy to stay near to. Default: the one that ppo started from, in the first round."""
    comparisons: list[str] | None = None
    """reward_model and dpo: stages whose comparisons are learnt beside those of the data. Default: all before it."""
    set: dict[str, Any] = {}
    """Keys of the config with the values that they have in this stage: ``{data.train: half.jsonl, seed: 2}``."""

    @model_validator(mode="after")
    def _belongs(self) -> StageConfig:
        for key, recipes in (("reward", ("ppo",)), ("reference", ("ppo",)), ("comparisons", ("reward_model", "dpo"))):
            if getattr(self, key) is not None and self.recipe not in recipes:
                raise ValueError(f"{key} is for {' and '.join(recipes)}, not for {self.recipe}")
        for key in self.set:
            if key.partition(".")[0] in ("pipeline", "recipe", "run", "cluster"):
                raise ValueError(f"set: {key} belongs to the whole run, not to one stage")
        return self

    @model_serializer(mode="wrap")
    def _brief(self, dump: SerializerFunctionWrapHandler) -> Any:
        """What was given; a recipe's name where that is all."""
        given = {key: value for key, value in dump(self).items() if value not in (None, {})}
        return self.recipe if len(given) == 1 else given


Stages = list[Annotated[StageConfig, BeforeValidator(_named)]]


class PipelineConfig(Section):
    """The stages of recipe pipeline."""

    stages: Stages | None = None
    """In order. Default: sft; where a component of the reward is ``model: trained`` also compare, if ``compare.by``
    says who does it, and reward_model; ppo."""
    round: Stages = []
    """Stages that follow and are repeated ``rounds`` times, each time with the newest policy; the results of round N
    are in the folder ``round_N``."""
    rounds: PositiveInt = 1
    """How often."""
    reuse: bool = True
    """A stage that another run under ``run.root`` has made from the same inputs, with the same code, is taken over from
    there. Within a run that is gone on with this is always so."""


@dataclass(frozen=True)
class Stage:
    """A stage with everything that it is made from; names of other stages, None: what the run starts from."""

    recipe: Recipe
    name: str
    start: str | None = None
    reward: str | None = None
    reference: str | None = None
    comparisons: tuple[str, ...] = ()
    round: int = 0
    """From 1; 0 outside of ``pipeline.round``."""
    set: dict[str, Any] = field(default_factory=dict, hash=False)

    @property
    def label(self) -> str:
        """What its figures and its bar are called."""
        return self.recipe if self.name == NAMES.get(self.recipe, self.recipe) else self.name

    @property
    def parent(self) -> str:
        """The folder around its result, relative to the run folder; where the files of ppo are."""
        return str(PurePosixPath(self.name).parent)

    @property
    def inputs(self) -> tuple[str, ...]:
        """Stages whose results it reads."""
        given = (self.start, self.reward, self.reference, *self.comparisons)
        return tuple(dict.fromkeys(name for name in given if name is not None))


def resolve(stages: Sequence[StageConfig], repeated: Sequence[StageConfig] = (), rounds: int = 1) -> tuple[Stage, ...]:
    """Fill in names and inputs.

    Raises:
        ValueError: a name that is given twice, or an input that no stage before makes.
    """
    planned: list[Stage] = []
    for one in stages:
        planned.append(_resolved(one, planned, 0))
    for i in range(1, rounds + 1):
        for one in repeated:
            planned.append(_resolved(one, planned, i))
    for number, stage in enumerate(planned):
        for other in planned[:number]:
            if other.name == stage.name:
                raise ValueError(f"pipeline.stages: two stages are called {stage.name}; give one another `name`")
            if other.recipe == stage.recipe == "ppo" and other.parent == stage.parent:
                raise ValueError(
                    f"pipeline.stages: the checkpoints of {other.name} and {stage.name} would lie in one folder; "
                    "give one of them a `name` in a folder of its own, such as second/policy"
                )
    return tuple(planned)


def _resolved(cfg: StageConfig, before: Sequence[Stage], round_number: int) -> Stage:
    folder = f"round_{round_number}/" if round_number else ""
    name = folder + (cfg.name or NAMES.get(cfg.recipe, cfg.recipe))
    made = {stage.name: stage for stage in before}

    def find(key: str, given: str | None, recipes: Sequence[str]) -> str | None:
        """The stage called ``given``, first in its own round; without one the newest of ``recipes``."""
        if given is None:
            return next((stage.name for stage in reversed(before) if stage.recipe in recipes), None)
        for found in (folder + given, given):
            if found in made and made[found].recipe in recipes:
                return found
        able = [stage.name for stage in before if stage.recipe in recipes]
        raise ValueError(
            f"pipeline.stages: {name}: {key}={given}: no such stage before it; there are: {able or 'none'}"
        )

    sources: tuple[str, ...] = ()
    if cfg.recipe in ("reward_model", "dpo"):
        if cfg.comparisons is None:
            sources = tuple(stage.name for stage in before if stage.recipe == "compare")
        else:
            sources = tuple(str(find("comparisons", source, ("compare",))) for source in cfg.comparisons)
    own: tuple[str, ...] = POLICIES
    if cfg.recipe == "reward_model":
        own = (*SUPERVISED, "reward_model") if cfg.start else SUPERVISED
    elif cfg.recipe == "evaluate_reward":
        own = ("reward_model",)
    start = find("start", cfg.start, own)
    reward = find("reward", cfg.reward, ("reward_model",)) if cfg.recipe == "ppo" else None
    reference = None
    if cfg.recipe == "ppo":
        reference = start if cfg.reference is None else find("reference", cfg.reference, POLICIES)
        while cfg.reference is None and reference is not None and made[reference].recipe == "ppo":
            reference = made[reference].reference
    return Stage(cfg.recipe, name, start, reward, reference, sources, round_number, cfg.set)
