"""Several stages in order, each from the result of the one before: by default SFT, reward model, PPO.

    python -m rlhf_dist.main
    python -m rlhf_dist.main pipeline.stages=[sft,dpo]

Source: Ouyang et al., 2203.02155.
"""

from __future__ import annotations

import time

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
    policy, reward, sampled = run.model_path, None, None
    for stage in run.cfg.stages:
        if stage in ("reward_model", "dpo") and run.cfg.samples_comparisons and sampled is None:
            sampled = sample_for_comparisons(run, policy)
        match stage:
            case "sft":
                policy = sft(run, policy)
            case "distill":
                policy = distill(run, policy)
            case "reward_model":
                reward = reward_model(run, policy, sampled)
            case "dpo":
                policy = dpo(run, policy, sampled)
            case "ppo":
                policy = ppo(run, policy, reward)
    return policy if run.cfg.stages[-1] != "reward_model" or reward is None else reward


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
