"""What a complete checkpoint is: a folder whose manifest, with size and digest of every file, was written last.

Without a manifest a folder does not count. So a process may die at any moment
of a save, also where renaming is not atomic (object stores). Folders are local
paths or any URL that fsspec knows (``s3://``, ``gs://`` ...).
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import fsspec
from blake3 import blake3

from rlhf_dist.observability.files import write_atomically

MANIFEST = "manifest.json"
#: Name of a file, relative to the folder, to its ``bytes`` and ``blake3``.
Files = dict[str, dict[str, Any]]


def seal(folder: str | Path, about: dict[str, Any], files: Files | None = None) -> None:
    """Declare ``folder`` complete: write its manifest, with ``about`` (step, version ...) in it.

    Args:
        files: as :func:`describe` says, from whoever wrote them; default: all that a local folder holds.
    """
    text = json.dumps({**about, "files": describe(Path(folder)) if files is None else files}, indent=1)
    fs, path = fsspec.url_to_fs(str(folder))
    if not _is_local(fs):
        fs.pipe_file(f"{path}/{MANIFEST}", text.encode())
        return
    write_atomically(Path(path) / MANIFEST, text)


def describe(folder: Path, parts: Sequence[str] = ("",)) -> Files:
    """Size and digest of every file under a local folder; makes sure that all of them are on the disk.

    Args:
        parts: files and sub-folders that count; default: all.
    """
    files: Files = {}
    found = [p for part in parts for p in ((folder / part).rglob("*") if (folder / part).is_dir() else [folder / part])]
    for path in sorted(p for p in found if p.is_file() and p.name != MANIFEST):
        with open(path, "rb") as file:
            os.fsync(file.fileno())
        files[str(path.relative_to(folder))] = {"bytes": path.stat().st_size, "blake3": _local_digest(path)}
    return files


def verify(folder: str | Path) -> dict[str, Any]:
    """The manifest of a complete checkpoint.

    Raises:
        ValueError: no manifest, or a file that is missing or differs from it.
    """
    fs, path = fsspec.url_to_fs(str(folder))
    manifest = _manifest(fs, path)
    for name, expected in manifest["files"].items():
        file = f"{path}/{name}"
        if not fs.isfile(file):
            raise ValueError(f"checkpoint {path}: {name} is missing")
        if (size := fs.size(file)) != expected["bytes"]:
            raise ValueError(f"checkpoint {path}: {name} has {size} bytes, expected {expected['bytes']}")
        if _digest(fs, file) != expected["blake3"]:
            raise ValueError(f"checkpoint {path}: the content of {name} does not match its digest")
    return manifest


def _manifest(fs: Any, path: str) -> dict[str, Any]:
    try:
        manifest = json.loads(fs.cat_file(f"{path}/{MANIFEST}"))
    except FileNotFoundError:
        raise ValueError(f"{path} is no complete checkpoint: it has no {MANIFEST}") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}/{MANIFEST} is damaged: {error}") from None
    if not isinstance(manifest, dict) or not isinstance(manifest.get("files"), dict):
        raise ValueError(f"{path}/{MANIFEST} is damaged: it lists no files")
    return manifest


def complete(root: str | Path) -> list[str]:
    """Folders under ``root`` with a manifest, oldest first."""
    fs, path = fsspec.url_to_fs(str(root))
    fs.invalidate_cache()  # object stores keep listings
    return sorted(str(fs.unstrip_protocol(m)).removeprefix("file://").rpartition("/")[0]
                  for m in fs.glob(f"{path}/step_*/{MANIFEST}"))  # fmt: skip


@dataclass(frozen=True)
class Checkpoint:
    """A complete one that was verified."""

    folder: str
    manifest: dict[str, Any]


def newest(root: str | Path) -> tuple[Checkpoint | None, list[str]]:
    """The newest checkpoint that is what its manifest says, and what is wrong with newer ones."""
    faults: list[str] = []
    for folder in reversed(complete(root)):
        try:
            return Checkpoint(folder, verify(folder)), faults
        except ValueError as error:
            faults.append(str(error))
    return None, faults


def prune(root: str | Path, keep: int, keep_best: int = 0) -> None:
    """Remove all but the newest ``keep`` complete checkpoints and the first ``keep_best`` with the highest ``score``.

    The manifest goes first, so that what is half removed does not count.
    """
    fs, _ = fsspec.url_to_fs(str(root))
    folders = complete(root)
    kept = set(folders[-keep:])
    if keep_best:
        scored = [(_manifest(*fsspec.url_to_fs(f)).get("score"), f) for f in folders]
        kept |= {f for _, f in sorted((-score, f) for score, f in scored if score is not None)[:keep_best]}
    for folder in folders:
        if folder not in kept:
            fs.rm_file(f"{folder}/{MANIFEST}")
            remove(folder)


def remove(folder: str) -> None:
    """Remove what a save that failed has left."""
    fs, path = fsspec.url_to_fs(folder)
    if fs.exists(path):
        fs.rm(path, recursive=True)


def destination(folder: str) -> tuple[Path, Callable[[], None]]:
    """A local folder to write to, and what sends its files to ``folder`` when they are written.

    A local ``folder`` is that folder itself, and nothing need be sent.
    """
    fs, path = fsspec.url_to_fs(folder)
    if _is_local(fs):
        return Path(path), lambda: None
    staging = tempfile.TemporaryDirectory(prefix="rlhf_dist_save_")

    def send() -> None:
        with staging:
            fs.put(f"{staging.name}/", f"{path}/", recursive=True)

    return Path(staging.name), send


@contextmanager
def local_copy(folder: str) -> Iterator[Path]:
    """``folder`` as a local one to read from: itself, or a copy that lasts as long as the context."""
    fs, path = fsspec.url_to_fs(folder)
    if _is_local(fs):
        yield Path(path)
        return
    with tempfile.TemporaryDirectory(prefix="rlhf_dist_load_") as staging:
        fs.get(f"{path}/", f"{staging}/", recursive=True)
        yield Path(staging)


def merged(parts: Sequence[Files]) -> Files:
    """The files of several writers."""
    return {name: about for part in parts for name, about in part.items()}


def _digest(fs: Any, path: str) -> str:
    if _is_local(fs):
        return _local_digest(path)
    digest = blake3()
    with fs.open(path, "rb") as file:
        while block := file.read(2**24):
            digest.update(block)
    return digest.hexdigest()


def _local_digest(path: str | Path) -> str:
    return blake3().update_mmap(path).hexdigest()


def _is_local(fs: Any) -> bool:
    return isinstance(fs, fsspec.implementations.local.LocalFileSystem)
