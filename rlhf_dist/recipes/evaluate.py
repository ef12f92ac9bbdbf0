"""Evaluation on held-out prompts: reward, the configured figures, KL, best-of-n, by group, samples to read.

python -m rlhf_dist.main recipe=evaluate model.path=...
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from ray import ObjectRef

from rlhf_dist.actors.data import load_table
from rlhf_dist.actors.dispatch import GeneratorGroup
from rlhf_dist.actors.experience import ExperienceGroup
from rlhf_dist.actors.scorer import ReferenceGroup, ScorerGroup, ShardedReference, ShardedReward
from rlhf_dist.evaluation.overoptimization import row
from rlhf_dist.recipes import groups
from rlhf_dist.recipes.progress import log_given_up
from rlhf_dist.run import Run

#: Group ids of evaluations begin here, so that their seeds never meet those of training.
FIRST_GROUP = 1 << 40


@dataclass
class Evaluator:
    """Samples the held-out prompts with the newest policy and scores them with everything that is there."""

    run: Run
    generators: GeneratorGroup
    experience: ExperienceGroup
    reward: ScorerGroup | ShardedReward | None = None
    reference: ReferenceGroup | ShardedReference | None = None
    metrics: ScorerGroup | None = None
    prompts: ObjectRef = field(init=False)

    def __post_init__(self) -> None:
        self.prompts, report = load_table("prompts", self.run.cfg, self.run.tokenizer_dir, "test")
        self.count = min(report["rows"], self.run.cfg.evaluation.prompts)

    def __call__(self, stage: str, step: int) -> dict[str, Any]:
        """Evaluate, log and :meth:`report`.

        Returns:
            what ``summarize`` says, and ``figures``: its numbers, best-of-n and greedy decoding, as the log names them.
        """
        cfg = self.run.cfg.evaluation
        result = self._sample(cfg.n_samples_per_prompt, greedy=False, best_of_n=cfg.best_of_sizes)
        figures = dict(result["metrics"])
        for n, expected in result["best_of_n"].items():
            figures |= {f"{name}_best_of_{n}": value for name, value in expected.items()}
        unscored = result["unscored"]
        if cfg.greedy:
            greedy = self._sample(0, greedy=True)
            figures |= {f"{k}_greedy": v for k, v in greedy["metrics"].items() if k in greedy["std"]}
            unscored += greedy["unscored"]
        if self.run.cfg.reward.uses_endpoints and self.reward is not None:
            figures["unscored"] = unscored
        if unscored:
            self.run.terminal.warn(f"{unscored} held-out samples got no reward; its figures are over the others")
        result["figures"] = figures
        self.report(stage, result)
        log = f"{self.run.stage.parent}/eval".removeprefix("./")
        self.run.log(log, step, {f"eval/{k}": v for k, v in (row(step, result) | figures).items() if k != "step"})
        return result

    def report(self, stage: str, result: dict[str, Any]) -> None:
        """Put the figures of an evaluation under ``eval.STAGE`` into the summary, in place of those of one before."""
        for name, value in result["figures"].items():
            self.run.summary.set(f"eval.{stage}.{name}", value)
        self.run.summary.set(f"eval.{stage}.stderr", result["stderr"])
        if result["by_group"]:
            self.run.summary.set(f"eval.{stage}.by_group", result["by_group"])

    def _sample(self, n: int, greedy: bool, best_of_n: Sequence[int] = ()) -> dict[str, Any]:
        ids = [(FIRST_GROUP + i, i) for i in range(self.count)]
        rollouts = self.generators.generate(self.prompts, ids, n, greedy)
        columns = []
        if self.reward is not None:
            columns.append(self.reward.score(rollouts, self.prompts))
        if self.metrics is not None:
            columns.append(self.metrics.score(rollouts, self.prompts, with_sum=False))
        if self.reference is not None:
            columns.append(self.reference.logprobs(rollouts))
        rollouts.wait(self.run.cfg.run.wait_limit)
        group_by = self.run.cfg.evaluation.group_by
        result = self.experience.summarize(rollouts, columns, self.prompts, group_by, n + greedy, best_of_n)
        if self.reward is not None:
            log_given_up(self.run, self.reward)
        return result


def evaluate(run: Run, model_path: str) -> None:
    """Evaluate the policy in ``model_path`` as it is on disk."""
    compare(run, {"policy": model_path})


def compare(run: Run, policies: dict[str, str]) -> None:
    """Evaluate policies on disk, one after the other, and show them side by side; the first is the KL's reference.

    Args:
        policies: name of each in the summary and in the tables, and its folder.
    """
    first = next(iter(policies.values()))
    results = {}
    for name, path in policies.items():
        generators = groups.generators(run, path, from_learner=False)
        experience = groups.experience(run)
        metrics = groups.evaluation_metrics(run, None)
        reward = None if run.cfg.trains_reward else groups.reward(run, None)
        reference = groups.reference(run, first) if len(policies) > 1 else None
        evaluator = Evaluator(run, generators, experience, reward, reference, metrics)
        run.start(generator=generators, experience=experience, reward=reward, reference=reference, metrics=metrics)
        with run.terminal.stage(f"evaluating {name}", 1) as bar:
            results[name] = evaluator(name, 0)
            bar.update(1, {k: v for k, v in results[name]["metrics"].items() if k in results[name]["std"]})
        run.finish_stage()
    show(run, results)


def show(run: Run, results: dict[str, dict[str, Any]]) -> None:
    """Print the figures of one or two policies side by side, best-of-n, the table by group, and some samples."""
    stages = list(results)
    names = sorted({k for s in stages for k in _figures(run, s) if "_best_of_" not in k})
    rows = [[n, *(_figures(run, s).get(n) for s in stages)] for n in names]
    run.terminal.table("Held-out prompts", ["", *stages], rows)
    _show_best_of_n(run, {s: results[s]["best_of_n"] for s in stages})
    by_group = {s: results[s]["by_group"] for s in stages}
    if any(by_group.values()):
        metric = run.cfg.evaluation.metrics[0].name if run.cfg.evaluation.metrics else "reward"
        kinds = sorted({g for s in stages for g in by_group[s]})
        table = [[g, *(by_group[s].get(g, {}).get(metric) for s in stages)] for g in kinds]
        run.terminal.table(f"{metric} by {run.cfg.evaluation.group_by}", ["", *stages], table)
    first, last = results[stages[0]]["samples"], results[stages[-1]]["samples"]
    run.samples = [
        {"prompt": a["prompt"], "before": a["response"], "after": b["response"],
         "score_before": _score(a), "score_after": _score(b)}
        for a, b in zip(first, last, strict=True)
    ]  # fmt: skip
    shown = run.samples[: run.cfg.evaluation.show_samples]
    if shown:
        run.terminal.samples("Samples", shown)


def _show_best_of_n(run: Run, found: dict[str, dict[str, dict[str, float]]]) -> None:
    """A row for each n: its KL to the policy at most, and every figure of the sample that the reward prefers."""
    columns = dict.fromkeys((s, name) for s, sizes in found.items() for best in sizes.values() for name in best)
    figures = [(s, name) for s, name in columns if name != "kl_bound"]
    rows = []
    for n in dict.fromkeys(n for sizes in found.values() for n in sizes):
        bound = next(sizes[n]["kl_bound"] for sizes in found.values() if n in sizes)
        rows.append([n, bound, *(found[s].get(n, {}).get(name) for s, name in figures)])
    if rows:
        header = ["n", "KL at most", *(f"{name}, {s}" for s, name in figures)]
        run.terminal.table("Best of n by the reward", header, rows)


def _figures(run: Run, stage: str) -> dict[str, Any]:
    return {k: v for k, v in run.summary.get(f"eval.{stage}").items() if not isinstance(v, dict)}


def _score(sample: dict[str, Any]) -> float | None:
    """The evaluation's own figure where there is one, else the reward."""
    return next(reversed(sample["scores"].values()), None)
