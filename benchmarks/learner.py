"""Tokens per second of an update by our learner, by a plain PyTorch loop with padding, and by that under DeepSpeed.

    python -m benchmarks.learner                        # policy and critic, three spreads of lengths
    python -m benchmarks.learner --hidden 512 --layers 8 --threads 1
    python -m benchmarks.learner --table

A random Llama on a CPU, float32, AdamW. Each repetition draws one batch for each spread, all with equally many tokens,
and the three loops take turns with it; nothing is reported unless they had the same losses and gradient norms. Our side
is ``LearnerWorker.update`` with PPO's metrics, from an Arrow table, without Ray. The others pad rows in the order in
which they come, a fixed number to a micro-batch: as many as fit into the tokens of ours if all were as long as the
longest of the batch.

Tokens are those of prompts and responses, without padding.
"""

from __future__ import annotations

import argparse
import math
import os
import tempfile
import time
from bisect import bisect_right
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from rich.console import Console
from rich.table import Table

from benchmarks.results import WIDTH, Report, Run

REPORT = Report(
    "learner",
    case=("role", "spread", "kind"),
    figures=("tokens_per_second", "seconds", "padding", "micro_batches"),
)
ROLES = ("policy", "critic")
OURS, BARE, DEEPSPEED = KINDS = ("ours", "bare", "deepspeed")
#: Standard deviation of the logarithm of the response lengths.
SPREADS = {"equal": 0.0, "moderate": 0.5, "long": 1.0}
#: Of tokens per second of ours over those of the bare loop.
GOALS = {"equal": 0.95, "long": 1.5}
#: Relative; float32 sums in another order.
TOLERANCE = 1e-4


@dataclass(frozen=True)
class Settings:
    """Model and batches."""

    hidden: int = 256
    layers: int = 4
    vocabulary: int = 1024
    rows: int = 64
    """Samples of an optimizer step."""
    optimizer_steps: int = 2
    """In an update."""
    prompt: int = 16
    """Tokens of every prompt."""
    mean: int = 112
    """Mean tokens of a response."""
    longest: int = 496
    """Tokens at which responses are cut."""
    micro_batch_tokens: int = 4096
    threads: int = 2


SMALL = Settings(hidden=64, layers=1, rows=8, prompt=4, mean=12, longest=44, micro_batch_tokens=96)


def main(arguments: Sequence[str] | None = None) -> None:
    options = parse(arguments)
    if options.table:
        runs = REPORT.read(options)
        REPORT.show(runs)
    else:
        settings = replace(SMALL if options.small else Settings(), threads=options.threads)
        if not options.small:
            settings = replace(settings, hidden=options.hidden, layers=options.layers)
        runs = measure(settings, 1 if options.small else options.repetitions)
        REPORT.finish(runs, asdict(settings), options)
    show_ratios(runs)


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = REPORT.parser("Updates of policy and critic beside a plain PyTorch loop.", repetitions=5)
    parser.add_argument("--hidden", type=int, default=Settings.hidden, metavar="N", help="default %(default)s")
    parser.add_argument("--layers", type=int, default=Settings.layers, metavar="N", help="default %(default)s")
    cores = os.cpu_count() or 1
    parser.add_argument("--threads", type=int, default=cores, metavar="N", help="of torch; default: the cores")
    options = parser.parse_args(arguments)
    if options.repetitions < 1 or options.threads < 1 or options.hidden % 64 or options.hidden < 64:
        parser.error("--repetitions and --threads must be 1 or more, --hidden a multiple of 64")
    return options


def measure(settings: Settings, repetitions: int) -> list[Run]:
    """All runs; each role in a process of its own, with the environment of a learner's process."""
    from rlhf_dist.actors.group import Resources

    # Here, because the child must have it before it imports torch.
    os.environ.update(Resources(settings.threads).environment("learner"))
    with ProcessPoolExecutor(1, get_context("spawn"), max_tasks_per_child=1) as processes:
        parts = [processes.submit(measure_role, role, settings, repetitions) for role in ROLES]
        return [run for part in parts for run in part.result()]


def measure_role(role: str, settings: Settings, repetitions: int) -> list[Run]:
    """Runs of one role, the loops in turns. The first repetition checks that they agree and is left out.

    Raises:
        ValueError: they do not agree, so their times mean nothing.
    """
    from benchmarks import learner_loops as loops

    s, runs = settings, []
    with tempfile.TemporaryDirectory() as folder:
        loops.save_models(Path(folder), s.hidden, s.layers, s.vocabulary, s.prompt + s.longest)
        path = Path(folder) / role
        ours = loops.OurLoop(role, path, s.micro_batch_tokens, s.longest)
        plain = {BARE: loops.PlainLoop(role, path), DEEPSPEED: loops.DeepSpeedLoop(role, path)}
    for repetition in range(repetitions + 1):
        for spread, sigma in SPREADS.items():
            batch = Batch.random(s, sigma, np.random.default_rng(repetition))
            plans = {OURS: batch.bucketed(s.micro_batch_tokens)}
            plans |= dict.fromkeys(plain, batch.in_order(s.micro_batch_tokens))
            samples = loops.Samples.of(batch.table, plain[BARE].names)
            updates: dict[str, Callable[[], Any]] = {OURS: lambda b=batch: ours.update(b.table, b.minibatches)}
            updates |= {kind: lambda k=kind, s=samples, p=plans: plain[k].update(s, p[k]) for kind in plain}
            first = repetition % len(KINDS)  # none of them always comes first
            timed = {kind: seconds(updates[kind]) for kind in KINDS[first:] + KINDS[:first]}
            if repetition == 0:
                check({kind: steps for kind, (_, steps) in timed.items()}, f"{role}, {spread}")
                continue
            case = {"role": role, "spread": spread, "repetition": repetition}
            runs += [{"kind": kind, **case, **figures(batch.lengths, plans[kind], timed[kind][0])} for kind in KINDS]
    return runs


def seconds(update: Callable[[], Any]) -> tuple[float, Any]:
    """How long one update took, and what it returned."""
    started = time.perf_counter()
    result = update()
    return time.perf_counter() - started, result


def check(steps: Mapping[str, Sequence[tuple[float, float]]], where: str) -> None:
    """Refuse loops that do not compute the same.

    Raises:
        ValueError: names the loop that differs from ours, and how.
    """
    for kind in (BARE, DEEPSPEED):
        for i, (ours, theirs) in enumerate(zip(steps[OURS], steps[kind], strict=True), 1):
            if not all(math.isclose(a, b, rel_tol=TOLERANCE, abs_tol=1e-6) for a, b in zip(ours, theirs, strict=True)):
                raise ValueError(
                    f"{where}, optimizer step {i}: loss and gradient norm are {ours} in ours, {theirs} in {kind!r}; "
                    f"they differ by more than {TOLERANCE:.0e} and do not compute the same, so nothing is reported"
                )


def figures(lengths: np.ndarray, plan: Sequence[Sequence[Sequence[int]]], elapsed: float) -> dict[str, float]:
    tokens = int(lengths.sum())
    micro_batches = [rows for step in plan for rows in step]
    return {
        "tokens": tokens,
        "seconds": elapsed,
        "tokens_per_second": tokens / elapsed,
        "padding": padding_share(lengths, micro_batches),
        "micro_batches": len(micro_batches),
    }


def padding_share(lengths: np.ndarray, micro_batches: Sequence[Sequence[int]]) -> float:
    """Share of padding in all that is computed when each micro-batch is as wide as its longest row."""
    rows = [lengths[list(part)] for part in micro_batches]
    return 1 - float(sum(x.sum() for x in rows) / sum(len(x) * x.max() for x in rows))


def response_lengths(sigma: float, rows: int, total: int, longest: int, rng: np.random.Generator) -> np.ndarray:
    """Log-normal lengths in random order, from 1 to ``longest``, whose sum is exactly ``total``.

    Raises:
        ValueError: there are no such lengths.
    """
    if not rows <= total <= rows * longest:
        raise ValueError(f"{rows} responses of 1 to {longest} tokens cannot have {total} tokens")
    shape = np.exp(sigma * rng.standard_normal(rows))
    # Scaled before they are cut, so that cutting does not change the mean. Scales in thousandths.
    cut = lambda scale: np.clip(scale * shape / 1000, 1, longest).astype(np.int64)
    beyond = bisect_right(range(math.ceil(1000 * longest / shape.min()) + 1), total, key=lambda x: int(cut(x).sum()))
    lengths = cut(beyond - 1)
    lengths[np.flatnonzero(lengths < longest)[: total - lengths.sum()]] += 1
    return lengths


@dataclass(frozen=True)
class Batch:
    """What one update learns from."""

    table: pa.Table
    lengths: np.ndarray
    """Tokens of each row, with the prompt."""
    minibatches: list[np.ndarray]
    """Rows of each optimizer step."""

    @classmethod
    def random(cls, settings: Settings, sigma: float, rng: np.random.Generator) -> Batch:
        """The columns that learners read of the experience, with old log-probabilities near those of a random model."""
        from rlhf_dist.data.ragged import Ragged

        s = settings
        rows = s.rows * s.optimizer_steps
        lengths = response_lengths(sigma, rows, rows * s.mean, s.longest, rng)
        total = int(lengths.sum())
        ids: Callable[[int], np.ndarray] = lambda n: rng.integers(3, s.vocabulary, n, dtype=np.int32)
        normal = lambda center, deviation: rng.normal(center, deviation, total).astype(np.float32)
        old = normal(-math.log(s.vocabulary), 0.1)
        columns = {
            "response_ids": ids(total),
            "response_mask": np.ones(total, np.uint8),
            "rollout_logprobs": old,
            "old_logprobs": old,
            "ref_logprobs": old,
            "advantages": normal(0, 1),
            "values": normal(0, 0.2),
            "returns": normal(0, 1),
        }
        prompts = Ragged.to_arrow(ids(rows * s.prompt), np.full(rows, s.prompt))
        table = pa.table({"prompt_ids": prompts} | {n: Ragged.to_arrow(x, lengths) for n, x in columns.items()})
        return cls(table, lengths + s.prompt, np.split(np.arange(rows), s.optimizer_steps))

    def bucketed(self, micro_batch_tokens: int) -> list[list[list[int]]]:
        """Our micro-batches, as the learner plans them."""
        from rlhf_dist.data.batching import micro_batches

        return [
            [rows[part].tolist() for part in micro_batches(self.lengths[rows], 1, 0, micro_batch_tokens)]
            for rows in self.minibatches
        ]

    def in_order(self, micro_batch_tokens: int) -> list[list[list[int]]]:
        """Micro-batches of a fixed number of rows: as many as fit when all are as long as the longest."""
        size = max(1, micro_batch_tokens // int(self.lengths.max()))
        return [[rows[i : i + size].tolist() for i in range(0, len(rows), size)] for rows in self.minibatches]


def show_ratios(runs: Sequence[Run]) -> None:
    """Ours over each of the others, with the goals, and whether a token costs more where lengths differ more."""
    medians = REPORT.medians(runs)
    over = {kind: REPORT.paired(runs, "tokens_per_second", OURS, kind) for kind in (BARE, DEEPSPEED)}
    table = Table("role", "spread", f"ours / {BARE}", "goal", f"ours / {DEEPSPEED}", "time per token / equal")
    for role in ROLES:
        for spread in SPREADS:
            speed = medians[role, spread, OURS]["tokens_per_second"]
            goal = f">= {GOALS[spread]}" if spread in GOALS else "–"
            slower = medians[role, "equal", OURS]["tokens_per_second"] / speed
            ratios = [f"{over[kind][role, spread]:.2f}" for kind in (BARE, DEEPSPEED)]
            table.add_row(role, spread, ratios[0], goal, ratios[1], f"{slower:.2f}")
    Console(width=WIDTH).print(table)


if __name__ == "__main__":
    main()
