"""A checkpoint is complete or absent, and every kind of damage is named."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from rlhf_dist.checkpoint import MANIFEST, complete, prune, seal, verify


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "step_000010"
    (folder / "policy").mkdir(parents=True)
    (folder / "policy" / "model.safetensors").write_bytes(bytes(range(256)) * 100)
    (folder / "policy" / "config.json").write_text("{}")
    (folder / "empty").touch()
    seal(folder, {"step": 10, "policy_version": 10})
    return folder


def test_a_sealed_folder_verifies(folder: Path) -> None:
    manifest = verify(folder)
    assert (manifest["step"], manifest["policy_version"]) == (10, 10)
    assert set(manifest["files"]) == {"policy/model.safetensors", "policy/config.json", "empty"}
    assert manifest["files"]["policy/model.safetensors"]["bytes"] == 25600


def test_without_a_manifest_it_does_not_count(folder: Path) -> None:
    (folder / MANIFEST).unlink()
    assert complete(folder.parent) == []
    with pytest.raises(ValueError, match=r"step_000010 is no complete checkpoint: it has no manifest.json"):
        verify(folder)


def truncate(folder: Path) -> None:
    file = folder / "policy" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:1000])


def flip(folder: Path) -> None:
    file = folder / "policy" / "model.safetensors"
    data = bytearray(file.read_bytes())
    data[12345] ^= 1
    file.write_bytes(data)


def remove(folder: Path) -> None:
    (folder / "policy" / "config.json").unlink()


def tear_manifest(folder: Path) -> None:
    file = folder / MANIFEST
    file.write_text(file.read_text()[:-20])


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (truncate, "policy/model.safetensors has 1000 bytes, expected 25600"),
        (flip, "the content of policy/model.safetensors does not match its digest"),
        (remove, "policy/config.json is missing"),
        (tear_manifest, r"step_000010/manifest.json is damaged: .*line"),
        (lambda f: (f / MANIFEST).write_text("[]"), r"manifest.json is damaged: it lists no files"),
        (lambda f: (f / MANIFEST).write_text('{"step": 10}'), r"manifest.json is damaged: it lists no files"),
        (lambda f: (f / MANIFEST).write_bytes(b"\xff\xfe\x00"), r"manifest.json is damaged"),
    ],
    ids=["truncated", "flipped", "missing", "torn manifest", "list", "no files", "not text"],
)
def test_damage_is_named(folder: Path, damage, message: str) -> None:
    damage(folder)
    with pytest.raises(ValueError, match=message):
        verify(folder)


def test_files_beside_the_listed_ones_do_no_harm(folder: Path) -> None:
    (folder / "notes.txt").write_text("mine")
    verify(folder)


def test_sealing_again_takes_in_what_changed(folder: Path) -> None:
    flip(folder)
    seal(folder, {"step": 10})
    assert MANIFEST not in verify(folder)["files"]


def make(root: Path, step: int, done: bool = True) -> Path:
    folder = root / f"step_{step:06d}"
    folder.mkdir(parents=True)
    (folder / "weights").write_text(str(step))
    if done:
        seal(folder, {"step": step})
    return folder


def test_complete_ones_are_listed_oldest_first(tmp_path: Path) -> None:
    for step, done in ((20, True), (5, True), (30, False), (10, True)):
        make(tmp_path, step, done)
    (tmp_path / "other").mkdir()
    assert [p.name for p in complete(tmp_path)] == ["step_000005", "step_000010", "step_000020"]
    assert complete(tmp_path / "nowhere") == []


def test_prune_keeps_the_newest_and_what_is_being_written(tmp_path: Path) -> None:
    for step in (5, 10, 20):
        make(tmp_path, step)
    unfinished = make(tmp_path, 30, done=False)
    prune(tmp_path, keep=2)
    assert [p.name for p in complete(tmp_path)] == ["step_000010", "step_000020"]
    assert unfinished.is_dir()
    assert not (tmp_path / "step_000005").exists()
    prune(tmp_path, keep=2)
    assert len(complete(tmp_path)) == 2


def test_the_manifest_is_readable_by_people(folder: Path) -> None:
    text = (folder / MANIFEST).read_text()
    assert list(json.loads(text)) == ["step", "policy_version", "files"]
    assert "\n" in text
