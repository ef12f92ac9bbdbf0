"""The same GRPO for our side and for TRL's: cases, and the options of both; see ``benchmarks.end_to_end``."""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
#: Steps that are not counted: compilation, first versions.
WARM_UP = 3
REWARD = "rlhf_dist.data.world:gold_score"
#: AdamW, the loss and its KL on both sides.
BETAS, EPS, MAX_GRAD_NORM = (0.9, 0.95), 1e-8, 1.0
EPS_CLIP, KL_COEF = 0.2, 0.05
#: Of the log-normal: median words, standard deviation of their logarithm.
MEDIAN, SIGMA = 64, 1.0
#: How TRL can generate, as arguments of ``GRPOConfig``. Those that fail are reported, not measured.
TRL_MODES: dict[str, dict[str, Any]] = {
    "generate": {},
    "generate, micro-batches of 16": {"per_device_train_batch_size": 16},
    "continuous batching": {"use_transformers_continuous_batching": True},
    "vLLM in its process": {"use_vllm": True, "vllm_mode": "colocate", "vllm_gpu_memory_utilization": 0.1},
}


@dataclass(frozen=True)
class Case:
    """What both sides do; ``prompts`` and ``samples`` (of each) make a step, ``batch_size`` samples an update."""

    lengths: str
    steps: int
    max_response_length: int
    lr: float
    prompts: int = 32
    samples: int = 4
    batch_size: int = 64
    max_prompt_length: int = 48
    warm_up: int = WARM_UP

    @property
    def samples_per_step(self) -> int:
        return self.prompts * self.samples


CASES = (
    Case("short", steps=60, max_response_length=24, lr=5e-4),
    # A rate next to nothing: lengths stay what they are.
    Case("log-normal", steps=12, max_response_length=1024, lr=1e-12),
)


@dataclass(frozen=True)
class Place:
    """Where a benchmark runs: a folder for its files, the interpreter that has TRL, options of our own for tuning."""

    folder: Path
    trl_python: str
    options: tuple[str, ...] = ()
    cores: int = os.cpu_count() or 1


def tiny(case: Case) -> Case:
    """Only to see whether it runs."""
    return replace(
        case, steps=4, warm_up=1, prompts=4, batch_size=8, max_response_length=min(48, case.max_response_length)
    )


def our_options(case: Case, policy: Path, staleness: int, place: Place) -> list[str]:
    """The config of our side. S = 0: all cores in each phase; else they are shared out."""
    cores = place.cores if staleness == 0 else max(1, place.cores // 2)
    optim = f"lr: {case.lr!r}, schedule: constant, warmup_ratio: 0, betas: [{BETAS[0]}, {BETAS[1]}], eps: {EPS!r}"
    sizes = f"batch_size: {case.prompts}, n_samples_per_prompt: {case.samples}, max_staleness: {staleness}"
    lengths = f"max_prompt_length: {case.max_prompt_length}, max_response_length: {case.max_response_length}"
    return [
        "recipe=ppo",
        f"model.path={policy}",
        "model.architecture={}",
        f"rollout={{{sizes}, {lengths}, temperature: 1.0}}",
        f"train={{steps: {case.steps}, batch_size: {case.batch_size}, epochs: 1}}",
        f"algo={{advantage_estimator: grpo, loss_aggregation: sequence_mean, eps_clip: {EPS_CLIP}}}",
        f"algo={{kl_coef: {KL_COEF}, use_kl_loss: true, kl_estimator: k3}}",
        f"policy.optim={{{optim}, weight_decay: 0, max_grad_norm: {MAX_GRAD_NORM}}}",
        f"reward.components=[{{name: gold, function: '{REWARD}'}}]",
        "reward={normalize: false, missing_eos_penalty: 0}",
        "critic.warmup_steps=0",
        f"generator.cpus={cores}",
        f"policy.learner.cpus={cores}",
        f"reference.cpus={cores}",
        "reward.cpus=1",
        f"cluster.local_cpus={4 * place.cores}",
        "evaluation={prompts: 8, n_samples_per_prompt: 1, greedy: false, metrics: [], group_by: null}",
        "run={save_rollouts: false, checkpoint_every: 0}",
        *place.options,
    ]


def trl_config(case: Case, place: Place, mode: dict[str, Any]) -> dict[str, Any]:
    """Arguments of ``GRPOConfig`` that say the same, and leave out all that TRL does beside training.

    What cannot be made equal: TRL divides by a group's standard deviation + 1e-4, ours by + 1e-6.
    """
    config = {
        "output_dir": str(place.folder / "trl"),
        "use_cpu": True,
        "bf16": False,
        "gradient_checkpointing": False,
        "shuffle_dataset": False,  # the rows come in the order of training
        "per_device_train_batch_size": case.batch_size,
        "generation_batch_size": case.samples_per_step,
        "num_generations": case.samples,
        "num_iterations": 1,
        "max_steps": case.steps * (case.samples_per_step // case.batch_size),
        "max_completion_length": case.max_response_length,
        "temperature": 1.0,
        "top_p": 1.0,
        "top_k": 0,
        "loss_type": "grpo",
        "scale_rewards": "group",
        "epsilon": EPS_CLIP,
        "beta": KL_COEF,
        "use_bias_correction_kl": False,
        "learning_rate": case.lr,
        "lr_scheduler_type": "constant",
        "adam_beta1": BETAS[0],
        "adam_beta2": BETAS[1],
        "adam_epsilon": EPS,
        "weight_decay": 0.0,
        "max_grad_norm": MAX_GRAD_NORM,
        "seed": 0,
        "logging_steps": case.samples_per_step // case.batch_size,  # one line for each batch of samples
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
    }
    config |= mode
    micro_batch = min(config["per_device_train_batch_size"], case.batch_size)
    accumulated = case.batch_size // micro_batch
    return config | {"per_device_train_batch_size": micro_batch, "gradient_accumulation_steps": accumulated}


def environment(threads: int) -> dict[str, str]:
    """Of a process of TRL: its threads, this project's modules before those of the caller, nothing from a network."""
    modules = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    own = {"OMP_NUM_THREADS": str(threads), "PYTHONPATH": modules, "HF_HUB_OFFLINE": "1"}
    # TRL loads weights into the engine of its own process.
    return {**os.environ, **own, "TOKENIZERS_PARALLELISM": "false", "VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
