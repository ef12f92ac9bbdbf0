"""Results of stages, and when one that is there may stand for one that would be made.

The manifest of a result says from what it was made (``inputs``) and with which code and libraries (``made_with``). A
run that is gone on with keeps every result whose inputs are the same; another run takes over one whose code is too.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from functools import cache
from pathlib import Path
from typing import Any

from blake3 import blake3

from rlhf_dist import checkpoint
from rlhf_dist.config import Config, Stage
from rlhf_dist.observability.summary import versions
from rlhf_dist.resuming import MAY_CHANGE, differences, flat

#: Sections that each recipe reads beside ``seed``, ``model`` and ``data``.
READS: dict[str, tuple[str, ...]] = {
    "sft": ("sft",),
    "distill": ("distill",),
    "compare": ("compare", "rollout"),
    "reward_model": ("reward_model",),
    "dpo": ("dpo", "rollout", "reward", "evaluation"),
    "ppo": ("rollout", "algo", "train", "policy", "critic", "reward", "evaluation"),
}


def inputs(cfg: Config, stage: Stage, results: dict[str, Path], model: str, tokenizer: str) -> dict[str, Any]:
    """Everything on which the result of a stage depends, as a tree that JSON can hold.

    Args:
        results: folders of the stages that it reads, by name.
        model, tokenizer: folders, or a hub name, that the run starts from.
    """
    own = cfg.of(stage)
    tree = own.model_dump(mode="json")
    keys = flat({name: tree[name] for name in ("seed", "model", "data", *READS[stage.recipe])})
    keys.pop("data.dir")  # what the files say counts, not where they are
    judges = [metric.model for metric in own.evaluation.metrics if "evaluation" in READS[stage.recipe]]
    reads = [*stage.inputs, *(name for name in judges if name in results)]
    extra = own.distill.extra if stage.recipe == "distill" else None
    names = [name for name in (own.data.train, own.data.test, own.data.pretrain, extra) if name]
    files = {name: Path(own.data.dir or "") / name for name in names}
    if stage.recipe == "distill" and own.distill.context_file:
        files["context"] = Path(own.distill.context_file)
    return {
        "recipe": stage.recipe,
        "round": stage.round,
        "config": {k: v for k, v in keys.items() if not any(re.fullmatch(pattern, k) for pattern in MAY_CHANGE)},
        "data": {name: _digest(path) for name, path in files.items()},
        "model": _digest(Path(model)),
        "tokenizer": _digest(Path(tokenizer)),
        "stages": {name: _digest(results[name]) for name in reads},
    }


@cache
def made_with() -> dict[str, str]:
    """Digest of this package's source, and versions of the libraries."""
    digest = blake3()
    for path in sorted(Path(__file__).parent.rglob("*.py")):
        digest.update(path.read_bytes())
    return versions() | {"rlhf_dist": digest.hexdigest(16)}


def changed(folder: Path, wanted: dict[str, Any]) -> dict[str, tuple[Any, Any]]:
    """What a complete result was made from and what ``wanted`` says, where the two differ.

    Raises:
        ValueError: the result is not what its manifest says.
    """
    before = checkpoint.verify(folder)["inputs"]
    return differences(before, json.loads(json.dumps(wanted)))


def find(root: Path, name: str, wanted: dict[str, Any]) -> Path | None:
    """The newest result ``name`` of another run under ``root``, from the same inputs with the same code."""
    found = sorted(root.glob(f"*/{name}/{checkpoint.MANIFEST}"), key=os.path.getmtime, reverse=True)
    for manifest in found:
        about = _manifest(manifest)
        if about.get("made_with") == made_with() and not differences(about["inputs"], wanted):
            return manifest.parent
    return None


def _manifest(path: Path) -> dict[str, Any]:
    """Empty where it is damaged: a result of another run that nobody has to take."""
    try:
        return json.loads(path.read_text())
    except json.JSONDecodeError:
        return {}


def take_over(source: Path, folder: Path) -> None:
    """Make ``folder`` the same result; its files take no room where the file system can link them."""
    checkpoint.verify(source)
    partial = folder.with_name(f"{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    shutil.copytree(source, partial, copy_function=_link)
    partial.rename(folder)


def _link(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)


def _digest(path: Path) -> str:
    """Of a file, or of all files of a folder; a name that is no path stands for itself."""
    if (path / checkpoint.MANIFEST).exists():
        files = json.loads((path / checkpoint.MANIFEST).read_text())["files"]
        return blake3(json.dumps(files, sort_keys=True).encode()).hexdigest(16)
    if path.is_dir():
        files = {str(file.relative_to(path)): _content(file) for file in sorted(path.rglob("*")) if file.is_file()}
        return blake3(json.dumps(files).encode()).hexdigest(16)
    return _content(path) if path.is_file() else str(path)


def _content(file: Path) -> str:
    about = file.stat()
    return _read(file, about.st_size, about.st_mtime_ns)


@cache
def _read(file: Path, size: int, mtime_ns: int) -> str:
    """Once for all stages: every one of them asks for the model and the data."""
    return blake3().update_mmap(file).hexdigest(16)
