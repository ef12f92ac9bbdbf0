"""Stages in order, each from the results of those before: by default SFT, comparisons, reward model, PPO.

    python -m rlhf_dist.main
    python -m rlhf_dist.main pipeline.stages=[sft,dpo]
    python -m rlhf_dist.main pipeline.stages=[sft] pipeline.round=[compare,reward_model,ppo] pipeline.rounds=3

A recipe alone is a pipeline of one stage. No stage is made again whose result is there, from the same inputs.

Source: Ouyang et al., 2203.02155; rounds: Bai et al., 2204.05862, section 4.5.
"""

from __future__ import annotations

from functools import partial

from rlhf_dist.config import Stage
from rlhf_dist.recipes.compare import collect_comparisons
from rlhf_dist.recipes.distill import distill
from rlhf_dist.recipes.dpo import dpo
from rlhf_dist.recipes.evaluate import evaluate
from rlhf_dist.recipes.evaluate_reward import evaluate_reward
from rlhf_dist.recipes.ppo import ppo
from rlhf_dist.recipes.reward_model import reward_model
from rlhf_dist.recipes.sft import sft
from rlhf_dist.run import Run


def pipeline(run: Run) -> None:
    """Make every stage of the config; the results are in the run folder."""
    for stage in run.cfg.stages:
        with run.at(stage):
            match stage.recipe:
                case "evaluate":  # figures, and no result that another stage could read
                    evaluate(run, path_of(run, stage.start))
                case "evaluate_reward":
                    evaluate_reward(run, path_of(run, stage.start))
                case _:
                    run.results[stage.name] = run.once(partial(make, run, stage))


def make(run: Run, stage: Stage) -> str:
    """Run the recipe of a stage; returns the folder of its result."""
    start = path_of(run, stage.start)
    compared = [path_of(run, name) for name in stage.comparisons]
    match stage.recipe:
        case "sft":
            return sft(run, start)
        case "distill":
            return distill(run, start)
        case "compare":
            return collect_comparisons(run, start)
        case "reward_model":
            return reward_model(run, start, compared)
        case "dpo":
            return dpo(run, start, compared)
        case "ppo":
            reward = path_of(run, stage.reward) if stage.reward else None
            return ppo(run, start, reward, path_of(run, stage.reference))
    raise AssertionError(stage.recipe)


def path_of(run: Run, stage: str | None) -> str:
    """The folder of a stage's result; None: the model that the run starts from."""
    return run.model_path if stage is None else str(run.results[stage])
