"""The direction of imports, read from the source: who may know whom, and who may know Ray, vLLM and DeepSpeed."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[2] / "rlhf_dist"

#: Upper may import lower, never back; names of one rank do not know each other (but config_io reads config).
LAYERS = [
    ("main",),
    ("recipes",),
    ("run", "doctor"),
    ("artifacts",),
    ("dry_run",),
    ("manifest",),
    ("needs",),
    ("planner", "resuming", "connection"),
    ("actors",),
    ("engines", "checkpoint"),
    ("sizes",),
    ("models", "adapters"),
    ("evaluation",),
    ("data",),
    ("algorithms",),
    ("schema",),
    ("config_docs",),
    ("config", "config_io"),
]
RANK = {name: rank for rank, names in enumerate(LAYERS) for name in names}
#: Libraries that only these files may import.
OWNERS = {
    "deepspeed": {"engines/deepspeed.py", "engines/snapshots.py"},
    "vllm": {"engines/vllm.py", "engines/weight_sync.py"},
}


def imports(tree: ast.AST, package: tuple[str, ...]) -> Iterator[tuple[str, int]]:
    """Dotted names that a module imports, and the lines; ``from a import b`` gives ``a.b``. Also inside functions."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            # `from .x import y` in package a.b means a.b.x.y
            base = package[: len(package) - node.level + 1] if node.level else ()
            prefix = ".".join([*base, *([node.module] if node.module else [])])
            yield from ((f"{prefix}.{alias.name}", node.lineno) for alias in node.names)


def remotes(tree: ast.AST) -> Iterator[int]:
    """Lines that make an actor or a task: ``ray.remote`` in any position, or ``from ray import remote``."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and node.attr == "remote":
            if isinstance(node.value, ast.Name) and node.value.id == "ray":
                yield node.lineno
        elif isinstance(node, ast.ImportFrom) and node.module == "ray":
            yield from (node.lineno for alias in node.names if alias.name == "remote")


def violations(package: Path) -> list[str]:
    """``FILE:LINE: what is wrong`` for every import of the tree that goes against the rules."""
    found = []
    for file in sorted(package.rglob("*.py")):
        path = file.relative_to(package)
        inside = (package.name, *path.parts[:-1])
        tree = ast.parse(file.read_text(encoding="utf-8"), str(file))
        for name, line in imports(tree, inside):
            if problem := _problem(path, name, package.name):
                found.append(f"{package.name}/{path.as_posix()}:{line}: {problem}")
        if path.parts[0] != "actors":
            found += [f"{package.name}/{path.as_posix()}:{n}: ray.remote outside actors/" for n in remotes(tree)]
    return found


def _problem(path: Path, name: str, package: str) -> str | None:
    """What is wrong with ``path`` importing ``name``, if anything."""
    layer = path.parts[0].removesuffix(".py")
    top, _, rest = name.partition(".")
    if top != package:
        return _foreign_problem(path, layer, top)
    target = rest.split(".")[0]
    if layer == "__init__":
        return f"the package itself imports {name}: importing rlhf_dist must cost nothing"
    if target in ("", "__version__", layer):
        return None
    if layer == "observability":
        return f"observability is a leaf, it may not import {name}"
    if layer == "algorithms":
        return f"algorithms take tensors and numbers, they may not import {name}"
    if target == "observability":
        return None
    if layer not in RANK or target not in RANK:
        unknown = layer if layer not in RANK else target
        return f"{unknown} has no place among the layers; give it one in {Path(__file__).name}"
    if RANK[target] < RANK[layer] or (RANK[target] == RANK[layer] and layer != "config_io"):
        return f"{layer} may not import {target} ({' -> '.join('|'.join(names) for names in LAYERS)})"
    return None


def _foreign_problem(path: Path, layer: str, top: str) -> str | None:
    if top in OWNERS and path.as_posix() not in OWNERS[top]:
        return f"only {', '.join(sorted(OWNERS[top]))} may import {top}"
    if layer == "algorithms" and top != "torch" and top not in sys.stdlib_module_names:
        return f"algorithms may import torch only, not {top}"
    return None


def test_the_package_keeps_the_direction_of_imports() -> None:
    assert violations(PACKAGE) == []


def test_the_rules_see_the_whole_package() -> None:
    """Every library that has an owner is imported by it, so the owners' names are no dead letters."""
    for library, owners in OWNERS.items():
        for owner in owners:
            tree = ast.parse((PACKAGE / owner).read_text())
            assert library in {name.split(".")[0] for name, _ in imports(tree, ("rlhf_dist", "engines"))}
    assert any(remotes(ast.parse(file.read_text())) for file in (PACKAGE / "actors").glob("*.py"))


@pytest.mark.parametrize(
    ("file", "line", "source", "message"),
    [
        ("data/readers.py", 1, "import rlhf_dist.models", "data may not import models"),
        ("data/readers.py", 3, "\n\nfrom rlhf_dist import run", "data may not import run"),
        ("data/readers.py", 1, "from ..actors import group", "data may not import actors"),
        ("recipes/ppo.py", 1, "from rlhf_dist.main import main", "recipes may not import main"),
        ("run.py", 2, "def f():\n    from rlhf_dist.recipes import ppo", "run may not import recipes"),
        ("engines/shards.py", 1, "from rlhf_dist.checkpoint import newest", "engines may not import checkpoint"),
        ("config.py", 1, "from rlhf_dist.config_io import load", "config may not import config_io"),
        ("schema.py", 1, "from rlhf_dist.data.load import load_prompts", "schema may not import data"),
        ("algorithms/kl.py", 1, "from rlhf_dist.config import Config", "algorithms take tensors and numbers"),
        ("algorithms/kl.py", 1, "import numpy as np", "algorithms may import torch only, not numpy"),
        ("observability/trace.py", 1, "from rlhf_dist.schema import ROLLOUT", "observability is a leaf"),
        (
            "actors/learner.py",
            1,
            "import deepspeed.comm",
            "only engines/deepspeed.py, engines/snapshots.py may import deepspeed",
        ),
        (
            "engines/shards.py",
            1,
            "from vllm import LLM",
            "only engines/vllm.py, engines/weight_sync.py may import vllm",
        ),
        ("recipes/ppo.py", 3, "import ray\n\n@ray.remote(num_cpus=0)\ndef f(): ...", "ray.remote outside actors/"),
        ("recipes/ppo.py", 3, "import ray\n\nf = ray.remote(len)", "ray.remote outside actors/"),
        ("recipes/ppo.py", 1, "from ray import remote", "ray.remote outside actors/"),
        ("helpers.py", 1, "from rlhf_dist.config import Config", "helpers has no place among the layers"),
        ("__init__.py", 1, "from rlhf_dist.run import Run", "importing rlhf_dist must cost nothing"),
    ],
)
def test_a_violation_is_named_by_file_and_line(tmp_path: Path, file: str, line: int, source: str, message: str) -> None:
    target = tmp_path / "rlhf_dist" / file
    target.parent.mkdir(parents=True)
    target.write_text(source + "\n")
    found = violations(tmp_path / "rlhf_dist")
    assert len(found) == 1
    assert found[0].startswith(f"rlhf_dist/{file}:{line}: ")
    assert message in found[0]


@pytest.mark.parametrize(
    ("file", "source"),
    [
        ("main.py", "from rlhf_dist import __version__\nfrom rlhf_dist.recipes import ppo"),
        ("actors/learner.py", "import ray\nfrom .group import Group\n@ray.remote\nclass A: ..."),
        ("actors/learner.py", "from rlhf_dist.engines import deepspeed"),
        ("data/load.py", "from rlhf_dist.config import Config\nfrom rlhf_dist.observability import logs"),
        ("recipes/ppo.py", "from typing import Any\ndef f(actor: Any): return actor.update.remote()"),
        ("algorithms/kl.py", "import math\nimport torch\nfrom rlhf_dist.algorithms import losses"),
        ("engines/vllm.py", "import vllm"),
        ("config_io.py", "from rlhf_dist.config import Config"),
        ("observability/summary.py", "from rlhf_dist import __version__\nimport rich"),
    ],
)
def test_what_is_allowed_is_not_reported(tmp_path: Path, file: str, source: str) -> None:
    target = tmp_path / "rlhf_dist" / file
    target.parent.mkdir(parents=True)
    target.write_text(source + "\n")
    assert violations(tmp_path / "rlhf_dist") == []
