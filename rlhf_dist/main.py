"""Entry point: ``python -m rlhf_dist.main [--config FILE] [key.path=value ...]``; and ``replay``, ``doctor``."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from rlhf_dist import __version__
from rlhf_dist.config_io import ConfigError, dump, load


def main(argv: Sequence[str] | None = None) -> int:
    """Exit code: 0 finished, 1 failed, 2 a mistake in config or data, 3 waiting for people, 130 interrupted."""
    arguments = sys.argv[1:] if argv is None else list(argv)
    if arguments[:1] == ["replay"]:
        return _replay(arguments[1:])
    if arguments[:1] == ["doctor"]:
        return _doctor(arguments[1:])
    parser = _parser()
    args = parser.parse_args(arguments)
    if args.emit and not args.dry_run:
        parser.error("--emit belongs to --dry-run")
    try:
        cfg = load(args.config, args.overrides)
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if args.print_config:
        print(dump(cfg), end="")
        return 0
    if args.dry_run:
        from rlhf_dist.dry_run import dry_run

        return dry_run(cfg, args.emit)
    # Ray reads it when it is imported: nothing but ``Run`` starts a cluster, least of all a call after its end.
    os.environ.setdefault("RAY_ENABLE_AUTO_CONNECT", "0")
    if not cfg.cluster.joined:
        _listen_on_loopback()
    from rlhf_dist.recipes.pipeline import pipeline
    from rlhf_dist.run import Run

    try:
        run = Run(cfg)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    with run:
        run.prepare()
        pipeline(run)
        run.finish()
    return run.exit_code


def _replay(arguments: Sequence[str]) -> int:
    """Exit code: 0 finite now, 1 the fault is there again, 2 no such folder, 130 interrupted."""
    parser = argparse.ArgumentParser(
        prog="python -m rlhf_dist.main replay",
        description="Run a batch again on which a run stopped because a loss or a gradient was not finite: every row "
        "alone, then the whole minibatch, forward and backward, on one learner rank of this machine.",
    )
    parser.add_argument("folder", metavar="FOLDER", type=Path, help="RUN/failed/step_N")
    folder = parser.parse_args(arguments).folder
    _listen_on_loopback()
    from rlhf_dist.recipes.replay import replay

    try:
        return replay(folder)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130


def _doctor(arguments: Sequence[str]) -> int:
    """Exit code: 0 nothing would stop a run, 1 something would, 2 a mistake in the config, 130 interrupted."""
    parser = argparse.ArgumentParser(
        prog="python -m rlhf_dist.main doctor",
        description="Check the cluster that a run of this config would join, or start: versions, files, folders, "
        "ports, memory, GPUs, clocks and resources of every node. One line for each check; trains nothing.",
    )
    parser.add_argument("--config", metavar="FILE", help="YAML file, as for a run")
    parser.add_argument("overrides", nargs="*", metavar="key.path=value", help="override any key, as for a run")
    args = parser.parse_args(arguments)
    try:
        cfg = load(args.config, args.overrides)
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if not cfg.cluster.joined:
        _listen_on_loopback()
    from rlhf_dist.doctor.examine import doctor

    try:
        return doctor(cfg)
    except KeyboardInterrupt:
        return 130


def _listen_on_loopback() -> None:
    """For a cluster of this machine alone, which needs no other network: nobody else is to reach its ports.

    Before Ray is imported, which is when it reads the first: with it, a node's address is 127.0.0.1 on Linux too.
    """
    os.environ.setdefault("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    os.environ.setdefault("NCCL_SOCKET_IFNAME", "lo")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m rlhf_dist.main",
        description="Train language models from human feedback on Ray, vLLM and DeepSpeed. "
        "Without arguments: the embedded miniature world, SFT -> reward model -> PPO, on two cores.",
        epilog="`replay FOLDER` runs a batch again on which a run stopped; see `replay --help`. "
        "`doctor` checks a cluster before a run; see `doctor --help`.",
    )
    parser.add_argument("--config", metavar="FILE", help="YAML file; see configs/ (default: the embedded one)")
    parser.add_argument("--print-config", action="store_true", help="print the resolved config as YAML and exit")
    parser.add_argument(
        "--dry-run", action="store_true", help="check config and files, print sizes and placement, exit"
    )
    parser.add_argument(
        "--emit",
        choices=["k8s"],
        help="with --dry-run: print the worker groups for Kubernetes instead; see k8s/README.md",
    )
    parser.add_argument("--version", action="version", version=f"rlhf_dist {__version__}")
    parser.add_argument("overrides", nargs="*", metavar="key.path=value", help="override any key, e.g. train.steps=20")
    return parser


if __name__ == "__main__":
    sys.exit(main())
