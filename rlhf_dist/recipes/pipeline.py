"""Several stages in order, each from the result of the one before: by default SFT, reward model, PPO.

    python -m rlhf_dist.main
    python -m rlhf_dist.main pipeline.stages=[sft,dpo]

A run that is gone on with makes no stage again that is complete.

Source: Ouyang et al., 2203.02155.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import cache, partial

from ray import ObjectRef

from rlhf_dist.actors.data import concatenate, load_table
from rlhf_dist.recipes import groups
from rlhf_dist.recipes.distill import distill
from rlhf_dist.recipes.dpo import dpo
from rlhf_dist.recipes.evaluate import FIRST_GROUP
from rlhf_dist.recipes.ppo import ppo
from rlhf_dist.recipes.reward_model import reward_model
from rlhf_dist.recipes.sft import sft
from rlhf_dist.run import Run

#: Responses sampled for each prompt from which the embedded world makes pairs.
SAMPLES_PER_PROMPT = 4


def pipeline(run: Run) -> str:
    """Returns the folder of the last stage's result."""
    policy, reward = run.model_path, None
    for stage in run.cfg.stages:
        match stage:
            case "sft":
                policy = run.once("sft", partial(sft, run, policy))
            case "distill":
                policy = run.once("distill", partial(distill, run, policy))
            case "reward_model":
                reward = run.once("reward_model", partial(on_comparisons, reward_model, run, policy))
            case "dpo":
                policy = run.once("dpo", partial(on_comparisons, dpo, run, policy))
            case "ppo":
                policy = run.once("policy", partial(ppo, run, policy, reward))
    return policy if run.cfg.stages[-1] != "reward_model" or reward is None else reward


def on_comparisons(recipe: Callable[[Run, str, ObjectRef | None], str], run: Run, policy_path: str) -> str:
    """A stage that learns from comparisons, of which the embedded world makes a part from samples of the policy."""
    sampled = sample_for_comparisons(run, policy_path) if run.cfg.samples_comparisons else None
    return recipe(run, policy_path, sampled)


@cache  # one sampling for all stages with the same policy
def sample_for_comparisons(run: Run, policy_path: str) -> ObjectRef:
    """Responses of the SFT policy to training prompts; ``schema.ROLLOUT``."""
    world = run.cfg.data.world
    generators = groups.generators(run, policy_path, from_learner=False)
    run.start(generator=generators)
    prompts, report = load_table("prompts", run.cfg, run.tokenizer_dir, "train")
    wanted = round(world.comparisons * world.sampled_pairs)
    ids = [(2 * FIRST_GROUP + i, i) for i in range(min(wanted, report["rows"]))]
    with run.terminal.stage("sampling comparisons", len(ids)) as bar:
        started = time.monotonic()
        rollouts = generators.generate(prompts, ids, SAMPLES_PER_PROMPT).wait(run.cfg.run.wait_limit)
        seconds = time.monotonic() - started
        bar.update(len(ids), {"samples": rollouts.samples, "tokens/s": rollouts.response_tokens / seconds})
    run.finish_stage()
    return concatenate([part.chunk.table for part in rollouts.slices])
