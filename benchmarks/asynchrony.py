"""What it is worth that generators run ahead of the learner: seconds of a step, and tokens trained, by staleness.

    python -m benchmarks.asynchrony                  # all parts, about ten minutes on two cores
    python -m benchmarks.asynchrony --parts tails

``overlap``  GRPO with a reward function, one core for the generator and one for the learner, generation and training
             of about equal length. With staleness 1 a step should take as long as the longer of the two.
``ppo``      the same with critic, reward model and reference, all on the same two cores.
``tails``    responses of very different lengths (each token ends one with the same probability, so the longest of a
             few hundred is about ten times the median): tokens trained per second with staleness 2, against what a bare
             vLLM generates from the same requests.

The policy is random and its learning rate next to nothing, so that lengths stay what they are.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import tempfile
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.bare_vllm import bare_loops
from benchmarks.machine import describe
from benchmarks.program import ppo_steps, run_program
from rlhf_dist.config_io import load
from rlhf_dist.data.load import load_prompts
from rlhf_dist.data.prompts import PromptOrder

ROOT = Path(__file__).parents[1]
RESULTS = Path(__file__).parent / "results" / "asynchrony.json"
#: What a process does before there is anything to do.
STARTING = ("python", "import", "start")
#: Steps that are not counted: compilation, first versions.
WARM_UP = 3
MODEL = {
    "model_type": "llama",
    "hidden_size": 128,
    "intermediate_size": 384,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "max_position_embeddings": 4096,
    "initializer_range": 0.02,
}
#: For ``tails``: so small that training takes less time than generation.
SMALL = MODEL | {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2,
                 "num_key_value_heads": 2}  # fmt: skip
COMMON = [
    "recipe=ppo",
    "model.architecture={}",
    "critic.warmup_steps=0",
    "algo={advantage_estimator: grpo, kl_coef: 0, rollout_correction: tis}",
    "policy.optim={lr: 1e-12, schedule: constant}",
    "evaluation={prompts: 8, n_samples_per_prompt: 1, greedy: false, metrics: [], group_by: null}",
    "run.save_rollouts=false",
]
GRPO = ["reward.components=[{name: length, function: benchmarks.asynchrony:length}]"]
OVERLAP = [
    "rollout={batch_size: 32, n_samples_per_prompt: 4, max_response_length: 48, max_prompt_length: 48}",
    "train={steps: 20, batch_size: 64, micro_batch_tokens: 8192}",
]
#: Four times as many samples in a step as are decoded at once: the longest response takes longer than a step would with
#: fewer, and no bound on the age leaves room for that.
TAIL_SAMPLES = 512
TAILS = [
    "rollout={batch_size: 128, n_samples_per_prompt: 4, max_response_length: 1400, max_prompt_length: 48}",
    f"train={{steps: 9, batch_size: {TAIL_SAMPLES}, micro_batch_tokens: 8192}}",
    "generator.max_num_seqs=128",
]
BOTH = ["generator.cpus=2", "policy.learner.cpus=2", "critic.learner.cpus=2", "reward.cpus=1", "cluster.local_cpus=8"]
ONE = ["generator.cpus=1", "policy.learner.cpus=1", "cluster.local_cpus=4"]


def length(prompts: list[str], responses: list[str], fields: list[dict[str, Any]]) -> list[float]:
    """A reward that costs nothing."""
    return [float(len(response) % 7) for response in responses]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=["overlap", "ppo", "tails"], default=["overlap", "ppo", "tails"])
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--runs", type=Path, help="where the runs go, and stay; default: a temporary folder")
    args = parser.parse_args()
    results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    with tempfile.TemporaryDirectory() as temporary:
        folder = args.runs or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        parts = {"overlap": overlap, "ppo": whole_ppo, "tails": tails}
        for name in args.parts:
            results[name] = {"machine": describe(), "runs": parts[name](folder, args.repetitions)}
            RESULTS.write_text(json.dumps(results, indent=1) + "\n")
    for name in args.parts:
        show(name, results[name]["runs"])


def random_policy(folder: Path, model: dict[str, Any]) -> Path:
    from rlhf_dist.data.tokenization import save_tokenizer
    from rlhf_dist.data.world import build_tokenizer
    from rlhf_dist.models import build_policy

    tokenizer = build_tokenizer()
    save_tokenizer(tokenizer, str(folder))
    special = {f"{k}_token_id": getattr(tokenizer, f"{k}_token_id") for k in ("bos", "eos", "pad")}
    build_policy(model, len(tokenizer), special, seed=0).save_pretrained(folder)
    return folder


def run(folder: Path, name: str, options: list[str]) -> list[dict[str, Any]]:
    """One run of the program; the lines of its steps, without those of the warm-up."""
    place = Path(tempfile.mkdtemp(prefix=name, dir=folder))
    steps = ppo_steps(run_program(place, [*COMMON, *options]))
    busy = busy_seconds(place / "run" / "trace.json", "policy 0") / len(steps)
    return [line | {"training": busy} for line in steps[WARM_UP:]]


def busy_seconds(trace: Path, process: str) -> float:
    """All that one process did once it had started, in seconds."""
    events = json.loads(trace.read_text())["traceEvents"]
    number = next(e["pid"] for e in events if e["name"] == "process_name" and e["args"]["name"] == process)
    mine = [e for e in events if e.get("ph") == "X" and e["pid"] == number and e["name"] not in STARTING]
    return sum(e["dur"] for e in mine) / 1e6


def seconds_per_step(lines: list[dict[str, Any]]) -> float:
    return statistics.median(b["time"] - a["time"] for a, b in itertools.pairwise(lines))


def phases(lines: list[dict[str, Any]]) -> dict[str, float]:
    names = ("generate", "score", "update", "push_weights")
    medians = {name: statistics.median(line[f"timing/{name}"] for line in lines) for name in names}
    return {"training": lines[0]["training"], **medians}


def overlap(folder: Path, repetitions: int) -> list[dict[str, Any]]:
    """Repetitions of three kinds of run, in turns."""
    policy = random_policy(folder / "policy", MODEL)
    base = [f"model.path={policy}", *GRPO, *OVERLAP]
    kinds = {
        "S=0, one core each": [*ONE, "rollout.max_staleness=0"],
        "S=1, one core each": [*ONE, "rollout.max_staleness=1"],
        "S=0, both cores in each phase": [*BOTH, "rollout.max_staleness=0"],
    }
    return in_turns(folder, base, kinds, repetitions)


def whole_ppo(folder: Path, repetitions: int) -> list[dict[str, Any]]:
    """Every group of PPO on the same cores."""
    policy = random_policy(folder / "policy", MODEL)
    base = [
        f"model.path={policy}",
        f"reward.components=[{{name: reward_model, model: {policy}}}]",
        *OVERLAP,
        "algo={advantage_estimator: gae, kl_coef: 0.05}",
        "critic.optim.lr=1e-12",
    ]
    kinds = {
        "PPO, S=0, both cores in each phase": [*BOTH, "rollout.max_staleness=0"],
        "PPO, S=1, both cores shared": [*BOTH, "rollout.max_staleness=1"],
    }
    return in_turns(folder, base, kinds, repetitions)


def in_turns(folder: Path, base: list[str], kinds: dict[str, list[str]], repetitions: int) -> list[dict[str, Any]]:
    runs = []
    for _ in range(repetitions):
        for kind, options in kinds.items():
            lines = run(folder, "overlap", [*base, *options])
            tokens = statistics.mean(line["perf/throughput"] * line["timing/step"] for line in lines)
            seconds = seconds_per_step(lines)
            runs.append({"kind": kind, "step": seconds, "tokens_per_second": tokens / seconds, **phases(lines)})
    return runs


def tails(folder: Path, repetitions: int) -> list[dict[str, Any]]:
    """Tokens of responses per second: trained with each staleness, and generated by a bare vLLM."""
    policy = random_policy(folder / "small", SMALL)
    runs = []
    base = [f"model.path={policy}", *GRPO, *TAILS, *ONE]
    for _ in range(repetitions):
        runs.append({"kind": "bare vLLM", "tokens_per_second": bare(policy)})
        for staleness in (0, 2):
            lines = run(folder, "tails", [*base, f"rollout.max_staleness={staleness}"])
            tokens = sum(line["rollout/response_length_mean"] * TAIL_SAMPLES for line in lines[1:])
            rate = tokens / (lines[-1]["time"] - lines[0]["time"])
            longest = max(line["rollout/response_length_max"] for line in lines)
            runs.append({"kind": f"S={staleness}, keep", "tokens_per_second": rate, "longest": longest})
    return runs


def bare(policy: Path) -> float:
    """Response tokens per second of ``LLM.generate`` on the requests of all steps."""
    options = [*COMMON, *GRPO, *TAILS, *ONE, f"model.path={policy}"]
    cfg = load(None, options)
    prompts = load_prompts(cfg, str(policy), "train")[0].num_rows
    rows = PromptOrder(prompts, cfg.seed, cfg.data.shuffle).take(cfg.rollout.batch_size * cfg.train.steps)
    with bare_loops(options) as loops:
        tokens, seconds = loops.generate(list(enumerate(rows)))
    return tokens / seconds


def show(part: str, runs: list[dict[str, Any]]) -> None:
    """Medians over the repetitions, and the ratio that matters."""
    kinds = list(dict.fromkeys(r["kind"] for r in runs))
    names = [n for n in runs[-1] if n != "kind"]
    median = {k: {n: statistics.median(r[n] for r in runs if r["kind"] == k and n in r) for n in names
                  if any(n in r for r in runs if r["kind"] == k)} for k in kinds}  # fmt: skip
    table = Table(part, *names)
    for kind in kinds:
        table.add_row(kind, *(f"{median[kind][n]:,.3g}" if n in median[kind] else "-" for n in names))
    console = Console()
    console.print(table)
    if part == "overlap":
        alone, ahead, both = (median[k] for k in kinds)
        longer = max(alone["generate"], alone["training"])
        console.print(f"S=1 / longer of generation and training (S=0): {ahead['step'] / longer:.2f}")
        console.print(f"S=1 / S=0: {ahead['step'] / alone['step']:.2f}")
        console.print(f"S=1 / S=0 with both cores in each phase: {ahead['step'] / both['step']:.2f}")
    elif part == "ppo":
        console.print(f"S=1 / S=0: {median[kinds[1]]['step'] / median[kinds[0]]['step']:.2f}")
    else:
        for kind in kinds[1:]:
            ratio = median[kind]["tokens_per_second"] / median[kinds[0]]["tokens_per_second"]
            console.print(f"{kind} / {kinds[0]}: {ratio:.2f}")


if __name__ == "__main__":
    main()
