"""Kills processes of a run at random, all through it; then shows that nothing was lost.

    python -m benchmarks.chaos                          # 60 steps, 20 kills, a quarter of an hour on two cores
    python -m benchmarks.chaos --steps 12 --kills 3     # in small

GRPO with two generators, two learner ranks, a reward model and a reference. A process is killed with SIGKILL when the
run has recovered from the kill before for ``--pause`` seconds and has trained a step since. At the end

* the ledger must show every group trained exactly once in the line of updates that led to the final weights,
* training on ``rollouts/`` along this line, without generators and without faults, must give the same weights, bit for
  bit.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import uuid
from collections import Counter
from pathlib import Path
from typing import Any

import psutil
from rich.console import Console
from rich.table import Table

from benchmarks.asynchrony import MODEL, random_policy
from benchmarks.machine import describe

ROOT = Path(__file__).parents[1]
RESULTS = Path(__file__).parent / "results" / "chaos.json"
#: Ray names its processes after their class.
PROCESSES = {
    "generator": "ray::Generator",
    "policy": "ray::LearnerWorker",
    "reward": "ray::Scorer",
    "reference": "ray::Reference",
    "experience": "ray::Experience",
}
MARK = "RLHF_DIST_CHAOS"
CHAOS_MODEL = MODEL | {"max_position_embeddings": 128, "initializer_range": 0.05}
OPTIONS = [
    "recipe=ppo",
    "model.architecture={}",
    "data.world={prompts: 1000, test_prompts: 16}",
    "algo={advantage_estimator: grpo, kl_coef: 0.01, kl_estimator: k3, use_kl_loss: true}",
    "rollout={n_samples_per_prompt: 4, max_prompt_length: 48, max_response_length: 48, chunk_tokens: 2000}",
    "train={micro_batch_tokens: 8192}",
    "policy={learner: {ranks: 2, cpus: 0.2, zero_stage: 2}, optim: {lr: 1.0e-4, schedule: constant}}",
    "generator={replicas: 2, cpus: 0.2}",
    "reward.cpus=0.1",
    "reward.normalize=false",
    "reference.cpus=0.1",
    "critic.warmup_steps=0",
    "evaluation={prompts: 4, n_samples_per_prompt: 1, greedy: false, metrics: [], group_by: null}",
    "cluster.local_cpus=2",
    "run={checkpoint_every: 1, keep_last: 2, max_restarts: 100, wait_limit: 300}",
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--kills", type=int, default=20, help="at least; they go on until the run ends")
    parser.add_argument("--pause", type=float, default=15, help="seconds between a recovery and the next kill")
    parser.add_argument("--batch", type=int, default=320, help="prompts in a step, with four samples each")
    parser.add_argument("--seed", type=int, default=0, help="of who dies when")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        result = chaos(Path(folder), args.steps, args.kills, args.pause, args.batch, args.seed)
    RESULTS.write_text(json.dumps({"machine": describe(), **result}, indent=1) + "\n")
    show(result)


def processes(role: str, mark: str, value: str) -> list[psutil.Process]:
    """Those of a role whose environment has ``mark=value``, the oldest first."""
    found = []
    for process in psutil.process_iter():
        try:
            ours = process.environ().get(mark) == value and process.status() != psutil.STATUS_ZOMBIE
            if ours and process.cmdline()[0].startswith(PROCESSES[role]):
                found.append(process)
        except (psutil.NoSuchProcess, psutil.AccessDenied, IndexError):
            continue
    return sorted(found, key=lambda p: p.create_time())


def chaos(folder: Path, steps: int, kills: int, pause: float, batch: int, seed: int) -> dict[str, Any]:
    """The run, the kills, and both proofs."""
    policy = random_policy(folder / "policy", CHAOS_MODEL)
    options = [
        *OPTIONS,
        f"model.path={policy}",
        f"reward.components=[{{name: reward_model, model: {random_reward_model(folder / 'reward', policy)}}}]",
        f"train.steps={steps}",
        f"train.batch_size={2 * batch}",
        f"rollout.batch_size={batch}",
        f"run.root={folder}",
        "run.name=run",
    ]
    mark = uuid.uuid4().hex
    environment = {**os.environ, MARK: mark, "PYTHONPATH": str(ROOT)}
    started = time.monotonic()
    program = subprocess.Popen([sys.executable, "-m", "rlhf_dist.main", *options], cwd=ROOT, env=environment)
    killed = kill_at_random(program, folder / "run", mark, kills, pause, random.Random(seed))
    if program.wait():
        raise RuntimeError(f"the run ended with exit code {program.returncode} after {len(killed)} kills")
    seconds = time.monotonic() - started
    faults = json.loads((folder / "run" / "summary.json").read_text())["faults"]
    return {
        "steps": steps,
        "seconds": seconds,
        "killed": killed,
        "faults": faults,
        **trained_once(folder / "run", batch),
        "replay_is_bit_identical": replay(folder),
    }


def random_reward_model(folder: Path, policy: Path) -> Path:
    """On disk, head included: one that was started anew must give the scores of the one before."""
    import torch
    from transformers import AutoConfig, AutoModelForSequenceClassification

    torch.manual_seed(1)
    config = AutoConfig.from_pretrained(policy, num_labels=1)
    AutoModelForSequenceClassification.from_config(config).save_pretrained(folder)
    return folder


def kill_at_random(
    program: subprocess.Popen, run: Path, mark: str, kills: int, pause: float, choose: random.Random
) -> list[dict[str, Any]]:
    """Until ``kills`` processes were killed, the same number of each role, or the run has ended."""
    roles = [role for _ in range(-(-kills // len(PROCESSES))) for role in PROCESSES]
    choose.shuffle(roles)
    killed: list[dict[str, Any]] = []
    quiet, step = time.monotonic(), 0
    while program.poll() is None and len(killed) < max(kills, len(roles)):
        time.sleep(0.2)
        recovered = lines(run / "faults.jsonl")
        newest = newest_step(run)
        if len(recovered) < len(killed) or newest <= step:
            quiet = time.monotonic()
            continue
        if time.monotonic() - quiet < pause:
            continue
        role = roles[len(killed)]
        living = processes(role, MARK, mark)
        if not living:  # the run is ending
            continue
        victim = choose.choice(living)
        victim.send_signal(signal.SIGKILL)
        step = newest
        killed.append({"role": role, "pid": victim.pid, "after_step": step})
    return killed


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def newest_step(run: Path) -> int:
    """Of the ledger, rollbacks included."""
    found = lines(run / "ledger.jsonl")
    return found[-1].get("step", found[-1].get("back_to", 0)) if found else 0


def trained_once(run: Path, batch: int) -> dict[str, Any]:
    """Counts from the ledger.

    Raises:
        RuntimeError: a group was trained twice, or not at all, or a version was used twice.
    """
    from rlhf_dist.data.trained import final_line

    line = final_line(run / "ledger.jsonl")
    groups = Counter(group for step in line for group in step.rows)
    versions = [record["version"] for record in lines(run / "ledger.jsonl")]
    if sorted(groups) != list(range(batch * len(line))) or set(groups.values()) != {1}:
        raise RuntimeError(f"of {len(groups)} groups some were trained twice or not at all")
    if len(set(versions)) < len(versions):
        raise RuntimeError("a policy version was used twice")
    return {"groups_trained_once": len(groups), "versions": versions[-1] + 1, "trained_steps": len(line)}


def replay(folder: Path) -> bool:
    """Train along the ledger on the rollouts of the run; whether the weights are those of the run, bit for bit."""
    import torch
    from safetensors.torch import load_file

    from rlhf_dist.actors.data import read_parquet
    from rlhf_dist.config_io import load
    from rlhf_dist.data.prompts import minibatches
    from rlhf_dist.data.trained import final_line
    from rlhf_dist.recipes import groups
    from rlhf_dist.run import Run

    cfg = load(str(folder / "run" / "config.yaml"), ["run.name=replay"])
    with Run(cfg) as run:
        run.prepare()
        policy, _ = groups.policy_and_critic(run, run.model_path, run.model_path)
        run.start(policy=policy)
        for step in final_line(folder / "run" / "ledger.jsonl"):
            table = read_parquet(str(folder / "run" / "rollouts" / f"step_{step.step:06d}.parquet"))
            rows = minibatches(cfg.samples_per_step, cfg.train.batch_size, cfg.updates_per_step, [cfg.seed, step.step])
            policy.update(table, rows).steps()
        policy.export(run.path("policy"), run.tokenizer_dir)
        run.finish()
    ours, theirs = (load_file(folder / name / "policy" / "model.safetensors") for name in ("replay", "run"))
    return all(torch.equal(ours[name], theirs[name]) for name in theirs)


def show(result: dict[str, Any]) -> None:
    table = Table("role", "kills", "seconds until it worked again, median", "longest", title="killed with SIGKILL")
    for role in PROCESSES:
        away = [f["away_seconds"] for f in result["faults"] if f["process"].split()[0] == role]
        killed = sum(k["role"] == role for k in result["killed"])
        shown = [f"{statistics.median(away):.1f}", f"{max(away):.1f}"] if away else ["-", "-"]
        table.add_row(role, str(killed), *shown)
    console = Console()
    console.print(table)
    console.print(
        f"{result['trained_steps']} steps and {len(result['killed'])} kills in {result['seconds']:.0f} s; "
        f"{result['groups_trained_once']} groups, each trained once; {result['versions']} policy versions; "
        f"replay without faults bit for bit the same: {result['replay_is_bit_identical']}"
    )


if __name__ == "__main__":
    main()
