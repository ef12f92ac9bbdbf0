"""Whether a run folder can be gone on with, and what of its config may have changed since."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import yaml

from rlhf_dist.config import Config

#: Keys that change where and how fast things run, not what is learnt.
MAY_CHANGE = (
    r"description",
    r"run\..*",
    r"cluster\..*",
    r"generator\..*",
    r"reference\..*",
    r"weight_sync\..*",
    r".*\.learner\..*",
    r".*micro_batch_tokens",
    r"reward\.(replicas|cpus|gpus|resources)(\..*)?",
    r"reward\.components\.\d+\.(url|headers|timeout|retries)(\..*)?",
    r"evaluation\.(show_samples|cpus|gpus)",
)


def unfinished(folder: Path, cfg: Config) -> bool:
    """Whether ``folder`` holds a run that ``cfg`` goes on with; False if it holds none that has trained.

    Raises:
        ValueError: it is finished, or ``run.resume`` is never, or a key has changed that must not; names both values.
    """
    metrics = folder / "metrics.jsonl"
    if not metrics.exists() or metrics.stat().st_size == 0:  # nothing was trained
        return False
    status = json.loads((folder / "summary.json").read_text()).get("status")
    if status == "finished" or cfg.run.resume == "never":
        why = "is finished" if status == "finished" else f"was left {status}, and run.resume is never"
        raise ValueError(f"run.name={cfg.run.name}: the run in {folder} {why}; choose another name or remove it")
    before = yaml.safe_load((folder / "config.yaml").read_text())
    changed = [
        f"  {key}: {old!r} then, {new!r} now"
        for key, (old, new) in differences(before, cfg.model_dump(mode="json")).items()
        if not any(re.fullmatch(pattern, key) for pattern in MAY_CHANGE)
    ]
    if changed and cfg.run.resume != "changed":
        raise ValueError(
            f"run.name={cfg.run.name}: {folder} holds an unfinished run with another config:\n" + "\n".join(changed)
            + "\ngo on with the values it was started with, choose another run.name, or say run.resume=changed"
        )  # fmt: skip
    return True


def flat(tree: Any, key: str = "") -> dict[str, Any]:
    """Dotted keys of a tree, and its leaves; the elements of a list are numbered."""
    if isinstance(tree, list):
        tree = dict(enumerate(tree))
    if not isinstance(tree, dict):
        return {key: tree}
    return {k: v for name, part in tree.items() for k, v in flat(part, f"{key}.{name}" if key else str(name)).items()}


def differences(old: Any, new: Any, key: str = "") -> dict[str, tuple[Any, Any]]:
    """Dotted keys of two trees whose values differ, and both values; None where a tree has no such key."""
    if isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        old, new = dict(enumerate(old)), dict(enumerate(new))
    if not (isinstance(old, dict) and isinstance(new, dict)):
        return {} if old == new else {key: (old, new)}
    found: dict[str, tuple[Any, Any]] = {}
    for name in [*old, *(n for n in new if n not in old)]:
        found |= differences(old.get(name), new.get(name), f"{key}.{name}" if key else str(name))
    return found
