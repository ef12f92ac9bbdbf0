"""``--dry-run``: what a config means, before anything is loaded: steps, processes, memory, files. Prints, exits."""

from __future__ import annotations

import sys
from collections.abc import Sequence

import psutil

from rlhf_dist import manifest
from rlhf_dist.config import Config
from rlhf_dist.needs import (
    GB,
    Need,
    check_memory,
    gpu_bytes,
    needs,
    object_store,
    ppo_of,
    rollout_bytes,
    sent_parameters,
)
from rlhf_dist.observability.formats import human
from rlhf_dist.observability.terminal import Terminal
from rlhf_dist.planner import Role, check_files, roles
from rlhf_dist.sizes import width


def dry_run(cfg: Config, emit: str | None = None) -> int:
    """Print the plan; exit code 0, or 2 if a file is missing or something cannot fit.

    Args:
        emit: "k8s": print worker groups for Kubernetes instead.
    """
    if emit == "k8s":
        return _emit(cfg)
    terminal = Terminal()
    terminal.title(f"{cfg.recipe}: {cfg.description}" if cfg.description else cfg.recipe)
    ppo = ppo_of(cfg)
    if ppo is not None:
        terminal.table("One PPO step", ["", ""], _arithmetic(ppo))
    rows = [
        [r.stage, r.role, str(r.processes), f"{r.cpus:g}", f"{r.gpus:g}", str(_threads(r)), r.what] for r in roles(cfg)
    ]
    terminal.table("Processes", ["stage", "role", "processes", "CPUs each", "GPUs each", "threads", ""], rows)
    for stage in dict.fromkeys(r.stage for r in roles(cfg)):
        parts = [r for r in roles(cfg) if r.stage == stage]
        cpus, gpus = (sum(r.processes * getattr(r, kind) for r in parts) for kind in ("cpus", "gpus"))
        terminal.info(f"stage {stage} needs {cpus:g} CPUs and {gpus:g} GPUs")
    problems = check_files(cfg)
    if not problems:
        terminal.info("files: all there")
        problems = _memory(cfg, ppo, terminal)
    for problem in problems:
        terminal.error(problem)
    return 2 if problems else 0


def _emit(cfg: Config) -> int:
    try:
        print(manifest.emit(cfg), end="")
    except OSError as error:
        print(f"error: the model's config is not here, so sizes are not known: {_first_line(error)}", file=sys.stderr)
        return 2
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0]


def _memory(cfg: Config, ppo: Config | None, terminal: Terminal) -> list[str]:
    """Print what every process needs; returns what cannot fit."""
    try:
        found = needs(cfg)
    except OSError as error:
        terminal.warn(f"memory: not known, since the model's config is not here: {_first_line(error)}")
        return []
    terminal.table("Memory of each process at its peak", ["stage", "role", "host", "GPU", "of which"], _rows(found))
    if any(need.role.gpus for need in found):
        terminal.info("memory on GPUs is estimated from the sizes of what lies there, and has not been measured")
    if ppo is not None:
        _traffic(ppo, terminal)
    local = not cfg.cluster.joined and not any(n.role.gpus for n in found)
    given = cfg.cluster.node_memory_gb
    node = given * GB if given else float(psutil.virtual_memory().total) if local else None
    return check_memory(found, node, gpu_bytes(cfg), together=local and not given)


def _rows(found: Sequence[Need]) -> list[list[str]]:
    rows = []
    for need in found:
        m = need.memory
        parts = sorted((m.gpu or m.host).items(), key=lambda part: -part[1])
        largest = ", ".join(f"{name} {_bytes(size)}" for name, size in parts[:3])
        rows.append([need.role.stage, need.role.role, _bytes(m.host_bytes), _bytes(m.gpu_bytes), largest])
    return rows


def _traffic(ppo: Config, terminal: Terminal) -> None:
    parameters = sent_parameters(ppo)
    weights = parameters * width(ppo.weight_sync.wire_dtype or ppo.model.dtype)
    terminal.info(
        f"each step sends {_bytes(weights)} of weights to each node with generators, and at most "
        f"{_bytes(rollout_bytes(ppo))} of rollouts to reward, reference and learners"
    )
    stored = object_store(ppo, parameters)
    parts = ", ".join(f"{name} {_bytes(size)}" for name, size in stored.items())
    terminal.info(f"object store: {_bytes(sum(stored.values()))} ({parts})")


def _bytes(n: float) -> str:
    return f"{human(float(n))}B" if n else "-"


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


def _threads(role: Role) -> int:
    return max(1, int(role.cpus))
