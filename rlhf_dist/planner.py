"""Which processes a config means, whether the cluster has place for them, and whether its files are there.

Used by ``--dry-run`` and at the start of a run, so that a placement that cannot
fit is refused in a second instead of waited for.
"""

from __future__ import annotations

import importlib.util
import os
import sys
from dataclasses import dataclass, field
from pathlib import Path

from rlhf_dist.config import Config, LearnerConfig, Stage


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
    return [role for stage in cfg.stages if stage.round < 2 for role in stage_roles(cfg.of(stage), stage)]


def stage_roles(cfg: Config, stage: Stage) -> list[Role]:
    """Those of one stage, whose config ``cfg`` is."""
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


def _is_folder_name(path: str) -> bool:
    """A hub name is ``owner/name``; everything else that is given must be a folder."""
    return path.count("/") != 1 or path.startswith((".", "~", "/")) or Path(path).exists()


def _module_exists(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except ModuleNotFoundError:
        return False
