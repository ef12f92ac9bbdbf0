"""``--dry-run``: what a config means, before anything is loaded. Resolves, checks files, prints, exits.

Also used at the start of a run on a local cluster, so that a placement that
cannot fit is refused in a second instead of waited for.
"""

from __future__ import annotations

import importlib.util
import os
import sys
from dataclasses import dataclass, field
from pathlib import Path

from rlhf_dist.config import Config, LearnerConfig, Stage
from rlhf_dist.observability.terminal import Terminal


@dataclass(frozen=True)
class Role:
    """One group of processes of a stage."""

    stage: str
    role: str
    processes: int
    cpus: float
    """Of each process."""
    gpus: float
    what: str
    resources: dict[str, float] = field(default_factory=dict)
    """Custom Ray resources of each process."""


def roles(cfg: Config) -> list[Role]:
    """Every process of every stage; stages run one after the other. Rounds are alike, and the first stands for all."""
    return [role for stage in cfg.stages if stage.round < 2 for role in _roles(cfg.of(stage), stage)]


def _roles(cfg: Config, stage: Stage) -> list[Role]:
    label, generator, r = stage.label, _generator(cfg), cfg.reward
    components = " + ".join(_component(cfg, i) for i in range(len(r.components)))
    reward = Role(label, "reward", r.replicas, r.cpus, r.gpus, components, r.resources)
    match stage.recipe:
        case "sft":
            return [_learner(label, "sft", cfg.sft.learner)]
        case "distill":
            return [Role(f"{label} teacher", *generator), _learner(label, "distill", cfg.distill.learner)]
        case "compare":
            return [Role(label, *generator)]
        case "reward_model":
            return [_learner(label, "reward_model", cfg.reward_model.learner)]
        case "dpo":
            after = f"{label} evaluation"
            evaluation = [Role(after, *generator), _reference(after, cfg), *_metrics(after, cfg)]
            return [_learner(label, "dpo", cfg.dpo.learner), *evaluation]
        case "ppo":
            critic = [_learner(label, "critic", cfg.critic.learner)] if cfg.uses_critic else []
            reference = [_reference(label, cfg)] if cfg.uses_reference else []
            learners = [_learner(label, "policy", cfg.policy.learner), *critic]
            return [*learners, Role(label, *generator), reward, *reference, *_metrics(label, cfg)]
        case "evaluate":
            return [Role(label, *generator), *([] if cfg.trains_reward else [reward]), *_metrics(label, cfg)]
        case "evaluate_reward":
            c = cfg.reward_model.learner
            return [Role(label, "reward_model", c.ranks, c.cpus, c.gpus, "one ZeRO-3 group", c.resources)]
    raise AssertionError(stage.recipe)


def _metrics(stage: str, cfg: Config) -> list[Role]:
    """The process of ``evaluation.metrics``, where it was given a share of the machine."""
    e = cfg.evaluation
    if not e.metrics or not (e.cpus or e.gpus):
        return []
    what = " and ".join(m.name for m in e.metrics)
    return [Role(stage, "metrics", 1, e.cpus, e.gpus, what)]


def check_fits(cfg: Config, cpus: float, gpus: float) -> None:
    """Raises ValueError if the groups of a stage need more than the cluster has, all of them being up at once."""
    for stage in dict.fromkeys(r.stage for r in roles(cfg)):
        parts = [r for r in roles(cfg) if r.stage == stage]
        for name, have, need in (
            ("CPUs", cpus, sum(r.processes * r.cpus for r in parts)),
            ("GPUs", gpus, sum(r.processes * r.gpus for r in parts)),
        ):
            if need > have + 1e-6:
                each = ", ".join(f"{r.role} {r.processes}x{r.cpus if name == 'CPUs' else r.gpus:g}" for r in parts)
                raise ValueError(
                    f"stage {stage} needs {need:g} {name} ({each}), but the cluster has {have:g}. Lower the cpus or "
                    "gpus of the groups (fractions are allowed), use fewer processes, or join a larger cluster"
                )


def check_files(cfg: Config) -> list[str]:
    """Problems with files and functions that the config names; empty if there are none."""
    return list(dict.fromkeys(problem for stage in cfg.stages for problem in _check_files(cfg.of(stage))))


def _check_files(cfg: Config) -> list[str]:
    problems = []
    models = {"model.path": cfg.model.path, "model.tokenizer": cfg.model.tokenizer, "critic.path": cfg.critic.path}
    models |= {
        f"reward.components[{i}].model": c.model for i, c in enumerate(cfg.reward.components) if c.model != "trained"
    }
    known = ("trained", *(stage.name for stage in cfg.stages))
    models |= {
        f"evaluation.metrics[{i}].model": m.model for i, m in enumerate(cfg.evaluation.metrics) if m.model not in known
    }
    models["reward_model.path"] = cfg.reward_model.path
    models["distill.teacher"] = cfg.distill.teacher
    for key, path in models.items():
        if path and _is_folder_name(path) and not (Path(path).expanduser() / "config.json").is_file():
            problems.append(f"{key}={path}: no folder with a config.json there")
    folder = cfg.data.dir or ""
    files = {f"data.{key}": getattr(cfg.data, key) for key in ("train", "test", "pretrain")}
    for key, name in (files | {"distill.extra": cfg.distill.extra}).items():
        if (
            name
            and not name.startswith("hub:")
            and not folder.startswith("hub:")
            and not (Path(folder) / name).is_file()
        ):
            problems.append(f"{key}={name}: no such file in {folder or Path.cwd()}")
    context = cfg.distill.context_file
    if context is not None and not Path(context).is_file():
        problems.append(f"distill.context_file={context}: no such file")
    functions = [(f"reward.components[{i}].function", c.function) for i, c in enumerate(cfg.reward.components)]
    functions.append(("compare.by", None if cfg.compare.by == "people" else cfg.compare.by))
    functions += [(f"evaluation.metrics[{i}].function", m.function) for i, m in enumerate(cfg.evaluation.metrics)]
    algo = (("advantage_estimator", cfg.algo.advantage_estimator), ("policy_loss", cfg.algo.policy_loss))
    functions += [(f"algo.{key}", name) for key, name in algo if ":" in name]
    sys.path.insert(0, os.getcwd())
    for key, function in functions:
        if function and not _module_exists(function.partition(":")[0]):
            problems.append(f"{key}={function}: no such module; it must be importable from {os.getcwd()} or installed")
    return problems


def plan(cfg: Config) -> int:
    """Print the plan; exit code 0, or 2 if a file is missing."""
    terminal = Terminal()
    terminal.title(f"{cfg.recipe}: {cfg.description}" if cfg.description else cfg.recipe)
    if cfg.runs_ppo:
        ppo = next(stage for stage in cfg.stages if stage.recipe == "ppo")
        terminal.table("One PPO step", ["", ""], _arithmetic(cfg.of(ppo)))
    rows = [
        [r.stage, r.role, str(r.processes), f"{r.cpus:g}", f"{r.gpus:g}", str(_threads(r)), r.what] for r in roles(cfg)
    ]
    terminal.table("Processes", ["stage", "role", "processes", "CPUs each", "GPUs each", "threads", ""], rows)
    for stage in dict.fromkeys(r.stage for r in roles(cfg)):
        parts = [r for r in roles(cfg) if r.stage == stage]
        cpus, gpus = (sum(r.processes * getattr(r, kind) for r in parts) for kind in ("cpus", "gpus"))
        terminal.info(f"stage {stage} needs {cpus:g} CPUs and {gpus:g} GPUs")
    problems = check_files(cfg)
    for problem in problems:
        terminal.error(problem)
    if not problems:
        terminal.info("files: all there")
    return 2 if problems else 0


def _arithmetic(cfg: Config) -> list[list[str]]:
    r, t = cfg.rollout, cfg.train
    samples = cfg.samples_per_step
    longest = r.max_prompt_length + r.max_response_length
    return [
        ["prompts", f"{r.batch_size} (rollout.batch_size)"],
        ["samples", f"{r.batch_size} x {r.n_samples_per_prompt} (rollout.n_samples_per_prompt) = {samples}"],
        [
            "optimizer steps",
            f"{t.epochs} (train.epochs) x {samples} / {t.batch_size} (train.batch_size) = {cfg.updates_per_step}",
        ],
        ["tokens, at most", f"{samples} x ({r.max_prompt_length} + {r.max_response_length}) = {samples * longest:,}"],
        [
            "micro-batch of one rank",
            f"{t.micro_batch_tokens:,} tokens: {max(1, t.micro_batch_tokens // longest)} samples or more",
        ],
        ["all steps", f"{t.steps} (train.steps) x {samples} = {t.steps * samples:,} samples"],
    ]


def _learner(stage: str, role: str, c: LearnerConfig) -> Role:
    return Role(stage, role, c.ranks, c.cpus, c.gpus, f"DeepSpeed ZeRO-{c.zero_stage}", c.resources)


def _reference(stage: str, cfg: Config) -> Role:
    r = cfg.reference
    what = "one ZeRO-3 group" if r.sharded else "replicas"
    return Role(stage, "reference", r.replicas, r.cpus, r.gpus, what, r.resources)


def _generator(cfg: Config) -> tuple[str, int, float, float, str, dict[str, float]]:
    g = cfg.generator
    tp = g.tensor_parallel_size
    what = f"vLLM, tensor parallel {tp}" if tp > 1 else "vLLM"
    return "generator", g.replicas, g.cpus * tp, g.gpus, what, g.resources


def _component(cfg: Config, i: int) -> str:
    c = cfg.reward.components[i]
    source = c.model or c.function or c.place
    return f"{c.weight:g} * {source}" if c.weight != 1 else source


def _threads(role: Role) -> int:
    return max(1, int(role.cpus))


def _is_folder_name(path: str) -> bool:
    """A hub name is ``owner/name``; everything else that is given must be a folder."""
    return path.count("/") != 1 or path.startswith((".", "~", "/")) or Path(path).exists()


def _module_exists(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except ModuleNotFoundError:
        return False
