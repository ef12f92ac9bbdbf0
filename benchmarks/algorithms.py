"""Speed of our advantage estimators and policy losses beside verl's and TRL's, on the same tensors on a CPU.

    python -m benchmarks.algorithms            # 1,024 x 4,096 tokens, 7 repetitions, 2 threads

What is measured is what runs: our side goes through ``ADVANTAGE_ESTIMATORS`` and ``POLICY_LOSSES``, verl's through
its registered functions, TRL's through ``GRPOTrainer._compute_loss`` with a stand-in for the trainer. Nothing is timed
before both sides gave the same numbers, and they take turns, so that whatever else the machine does hits both.

Both libraries are optional, and without one only our side of its pairs is timed. README.md tells how to install them
in a folder of their own: verl's requirements forbid the transformers that this project needs.

Not compared: TRL's GAE, which stood in the middle of its PPO trainer's loop and went with that trainer in 1.13; TRL's
group advantages, which stay ``[B]`` there while ours and verl's are spread over the tokens; our ``reinforce``, which
neither has; ``decoupled_ppo``, whose weights verl takes from a helper that rejects samples, too.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import sys
import time
from collections.abc import Iterable, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from benchmarks.algorithm_pairs import Pair, Step, Tensors, advantage_pairs, loss_pairs, make_batch
from benchmarks.machine import describe

#: What is imported of each, and of what it imports that this project lacks. TRL's method is private and its stand-in
#: fits one release, verl's functions change as well: other releases count as missing.
REQUIREMENTS = {
    "verl": "verl==0.9.1 tensordict==0.10.0 codetiming==1.4.0 omegaconf==2.4.0 orjson==3.13.0 pyvers==0.2.3",
    "trl": "trl==1.16.0 accelerate==1.15.0 datasets==5.2.0 multiprocess==0.70.19 pandas==3.1.1 python-dateutil==4.0.0 "
    "xxhash==4.1.0",
}
THREADS = 2
#: Largest difference between the two sides, in units of their largest number: float32 sums of a million tokens.
TOLERANCE = 1e-5
WIDTH = 170
OUT = Path(__file__).parent / "results" / "algorithms.json"


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.algorithms", description=__doc__.split("\n", 1)[0])
    parser.add_argument("--rows", type=int, default=1024, help="samples in the batch, 2 or more (default: %(default)s)")
    parser.add_argument("--length", type=int, default=4096, help="tokens of the longest (default: %(default)s)")
    parser.add_argument("--repeats", type=int, default=7, help="timed runs of each side (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=OUT, help="the JSON file (default: %(default)s)")
    options = parser.parse_args(arguments)
    if options.rows < 2 or options.length < 2 or options.repeats < 1:
        parser.error("--rows and --length must be 2 or more, --repeats 1 or more")
    report = run(options.rows, options.length, options.repeats)
    show(report)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(report, indent=2) + "\n")


def run(rows: int, length: int, repeats: int) -> dict[str, Any]:
    """All figures, and what is needed to judge them, as JSON can hold it."""
    libraries, missing = import_libraries()
    verl, trl = libraries.get("verl"), libraries.get("trl")
    threads = torch.get_num_threads()
    torch.set_num_threads(THREADS)
    try:
        batch = make_batch(rows, length)
        pairs = [*advantage_pairs(batch, verl), *loss_pairs(batch, verl, trl)]
        results = [measure(pair, repeats, batch.mask, comparable=pair.library in libraries) for pair in pairs]
    finally:
        torch.set_num_threads(threads)
    return {
        "machine": {**describe(), "threads": THREADS},
        "versions": versions(libraries),
        "shape": {"rows": rows, "length": length, "trained_tokens": batch.tokens, "dtype": "float32"},
        "repeats": repeats,
        "missing": missing,
        "results": results,
    }


def import_libraries() -> tuple[dict[str, Any], list[str]]:
    """verl's module of algorithms and TRL's trainer by the names of their packages, and a line for each that lacks."""
    found, missing = {}, []
    for name, load in {"verl": _import_verl, "trl": _import_trl}.items():
        remedy = f"pip install --target DIR --no-deps {REQUIREMENTS[name]}, and run with PYTHONPATH=DIR"
        try:
            library, version = load(), metadata.version(name)
        except ImportError as error:  # PackageNotFoundError is one
            missing.append(f"{name} is not installed: {error}; {remedy}")
            continue
        if f"{name}=={version}" in REQUIREMENTS[name].split():
            found[name] = library
        else:
            missing.append(f"{name} {version} is not the release that is compared; {remedy}")
    return found, missing


def _import_verl() -> Any:
    from verl.trainer.ppo import core_algos

    return core_algos


def _import_trl() -> Any:
    """Without vLLM, which TRL imports wherever it finds it, and which takes longer than all that is measured here."""
    hide = "vllm" not in sys.modules
    if hide:
        sys.modules["vllm"] = None  # type: ignore[assignment]  # Python's way to say that there is none
    try:
        from trl.trainer.grpo_trainer import GRPOTrainer
    finally:
        if hide:
            del sys.modules["vllm"]
    return GRPOTrainer


def measure(pair: Pair, repeats: int, mask: Tensor, comparable: bool) -> dict[str, Any]:
    """Check that both sides agree, which also warms them up, then time them in turns; or ours alone.

    Raises:
        ValueError: if they do not agree, because then their times mean nothing.
    """
    ours = pair.run_ours()
    worst = difference(ours, pair.run_theirs(), mask) if comparable else None
    if worst is not None and not worst <= TOLERANCE:
        raise ValueError(
            f"{pair.ours} differs from {pair.library} {pair.theirs} by {worst:.2g} of the largest number, more than "
            f"{TOLERANCE:.0e}: the two definitions do not agree, or one side has a mistake"
        )
    del ours
    ours_seconds, theirs_seconds = [], []
    for _ in range(repeats):
        ours_seconds.append(seconds(pair.run_ours))
        if comparable:
            theirs_seconds.append(seconds(pair.run_theirs))
    ours_median = statistics.median(ours_seconds)
    theirs_median = statistics.median(theirs_seconds) if comparable else None
    return {
        "ours": pair.ours,
        "library": pair.library,
        "theirs": pair.theirs,
        "pass": "forward, backward" if pair.backward else "forward",
        "difference": worst,
        "ours_median": ours_median,
        "theirs_median": theirs_median,
        "ratio": None if theirs_median is None else theirs_median / ours_median,
        "ours_seconds": ours_seconds,
        "theirs_seconds": theirs_seconds,
    }


def difference(ours: Tensors, theirs: Tensors, mask: Tensor) -> float:
    """Largest difference on the trained tokens over the largest number there; the worst of the tensors.

    Outside the mask verl's whitened advantages are not 0; nothing reads them.
    """
    worst = []
    for a, b in zip(ours, theirs, strict=False):  # theirs may end in returns that ours do not mean
        a, b = (a[mask], b[mask]) if a.shape == mask.shape else (a, b)
        worst.append(float((a - b).abs().max() / b.abs().max()))
    return max(worst)


def seconds(step: Step) -> float:
    start = time.perf_counter()
    step()
    return time.perf_counter() - start


def versions(libraries: Iterable[str]) -> dict[str, str | None]:
    """None for a library that is not compared."""
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "rlhf_dist": metadata.version("rlhf_dist"),
        **{name: metadata.version(name) if name in libraries else None for name in REQUIREMENTS},
    }


def show(report: dict[str, Any]) -> None:
    """The medians as a table; what is missing stands below it."""
    machine, shape = report["machine"], report["shape"]
    title = f"{shape['rows']:,} x {shape['length']:,} tokens, float32, {machine['threads']} threads, {machine['cpu']}"
    table = Table(title=title)
    for heading in ("ours", "library", "theirs", "pass"):
        table.add_column(heading, overflow="fold")
    for heading in ("ours, ms", "theirs, ms", "theirs / ours"):
        table.add_column(heading, justify="right")
    for row in report["results"]:
        ours, theirs, ratio = row["ours_median"], row["theirs_median"], row["ratio"]
        figures = ["-", "-"] if ratio is None else [f"{1e3 * theirs:.2f}", f"{ratio:.2f}"]
        table.add_row(row["ours"], row["library"], row["theirs"], row["pass"], f"{1e3 * ours:.2f}", *figures)
    console = Console()
    if not console.is_terminal:  # a file or a pipe has room for whole names
        console.width = WIDTH
    console.print(table)
    for line in report["missing"]:
        console.print(line, markup=False, soft_wrap=True)


if __name__ == "__main__":
    main()
