"""What a complete checkpoint is: a folder whose manifest, with size and digest of every file, was written last.

Without a manifest a folder does not count. So a process may die at any moment
of a save, also where renaming is not atomic (object stores).
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from blake3 import blake3

MANIFEST = "manifest.json"


def seal(folder: Path, about: dict[str, Any]) -> None:
    """Declare ``folder`` complete: write its manifest, with ``about`` (step, version ...) in it."""
    files = {
        str(p.relative_to(folder)): {"bytes": p.stat().st_size, "blake3": _digest(p)}
        for p in sorted(folder.rglob("*"))
        if p.is_file() and p.name != MANIFEST
    }
    (folder / MANIFEST).write_text(json.dumps({**about, "files": files}, indent=1))


def verify(folder: Path) -> dict[str, Any]:
    """The manifest of a complete checkpoint.

    Raises:
        ValueError: no manifest, or a file that is missing or differs from it.
    """
    try:
        manifest = json.loads((folder / MANIFEST).read_text())
    except FileNotFoundError:
        raise ValueError(f"{folder} is no complete checkpoint: it has no {MANIFEST}") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{folder / MANIFEST} is damaged: {error}") from None
    if not isinstance(manifest, dict) or not isinstance(manifest.get("files"), dict):
        raise ValueError(f"{folder / MANIFEST} is damaged: it lists no files")
    for name, expected in manifest["files"].items():
        path = folder / name
        if not path.is_file():
            raise ValueError(f"checkpoint {folder}: {name} is missing")
        if path.stat().st_size != expected["bytes"]:
            raise ValueError(
                f"checkpoint {folder}: {name} has {path.stat().st_size} bytes, expected {expected['bytes']}"
            )
        if _digest(path) != expected["blake3"]:
            raise ValueError(f"checkpoint {folder}: the content of {name} does not match its digest")
    return manifest


def complete(root: Path) -> list[Path]:
    """Folders under ``root`` with a manifest, oldest first."""
    return sorted(p.parent for p in root.glob(f"step_*/{MANIFEST}"))


def prune(root: Path, keep: int) -> None:
    """Remove all but the newest ``keep`` complete checkpoints; the manifest goes first."""
    for folder in complete(root)[:-keep]:
        (folder / MANIFEST).unlink()
        shutil.rmtree(folder)


def _digest(path: Path) -> str:
    return blake3().update_mmap(path).hexdigest()
