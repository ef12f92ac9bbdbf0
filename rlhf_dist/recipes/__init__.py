"""One file per job; each reads like its algorithm."""

from __future__ import annotations

from collections.abc import Callable

from rlhf_dist.recipes.distill import distill
from rlhf_dist.recipes.dpo import dpo
from rlhf_dist.recipes.evaluate import evaluate
from rlhf_dist.recipes.evaluate_reward import evaluate_reward
from rlhf_dist.recipes.pipeline import pipeline
from rlhf_dist.recipes.ppo import ppo
from rlhf_dist.recipes.reward_model import reward_model
from rlhf_dist.recipes.sft import sft
from rlhf_dist.run import Run

RECIPES: dict[str, Callable[[Run], object]] = {
    "sft": lambda run: sft(run, run.model_path),
    "reward_model": lambda run: reward_model(run, run.model_path),
    "ppo": lambda run: ppo(run, run.model_path),
    "distill": lambda run: distill(run, run.model_path),
    "dpo": lambda run: dpo(run, run.model_path),
    "pipeline": pipeline,
    "evaluate": lambda run: evaluate(run, run.model_path),
    "evaluate_reward": lambda run: evaluate_reward(run, run.model_path),
}
