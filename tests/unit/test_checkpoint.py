"""A checkpoint is complete or absent, and every kind of damage is named."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path

import fsspec
import pytest

from rlhf_dist.checkpoint import (
    MANIFEST,
    complete,
    describe,
    destination,
    local_copy,
    newest,
    prune,
    seal,
    verify,
)


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
    assert [Path(p).name for p in complete(tmp_path)] == ["step_000005", "step_000010", "step_000020"]
    assert complete(tmp_path / "nowhere") == []


def test_prune_keeps_the_newest_and_what_is_being_written(tmp_path: Path) -> None:
    for step in (5, 10, 20):
        make(tmp_path, step)
    unfinished = make(tmp_path, 30, done=False)
    prune(tmp_path, keep=2)
    assert [Path(p).name for p in complete(tmp_path)] == ["step_000010", "step_000020"]
    assert unfinished.is_dir()
    assert not (tmp_path / "step_000005").exists()
    prune(tmp_path, keep=2)
    assert len(complete(tmp_path)) == 2


def test_the_manifest_is_readable_by_people(folder: Path) -> None:
    text = (folder / MANIFEST).read_text()
    assert list(json.loads(text)) == ["step", "policy_version", "files"]
    assert "\n" in text


def test_prune_keeps_the_best_beside_the_newest(tmp_path: Path) -> None:
    for step, score in ((5, 0.9), (10, None), (20, 0.5), (30, 0.7), (40, None)):
        seal(make(tmp_path, step, done=False), {"step": step, "score": score})
    prune(tmp_path, keep=1, keep_best=2)
    assert [Path(p).name for p in complete(tmp_path)] == ["step_000005", "step_000030", "step_000040"]


def test_prune_keeps_the_first_of_those_that_are_as_good(tmp_path: Path) -> None:
    for step, score in ((5, 0.1), (10, 0.9), (20, 0.9), (30, 0.2)):
        seal(make(tmp_path, step, done=False), {"step": step, "score": score})
    prune(tmp_path, keep=1, keep_best=1)
    assert [Path(p).name for p in complete(tmp_path)] == ["step_000010", "step_000030"]


def test_the_newest_that_is_whole_is_found_and_the_others_are_named(tmp_path: Path) -> None:
    assert newest(tmp_path) == (None, [])
    for step in (5, 10, 20):
        make(tmp_path, step)
    (tmp_path / "step_000020" / "weights").unlink()
    found, faults = newest(tmp_path)
    assert found is not None
    assert (Path(found.folder).name, found.manifest["step"]) == ("step_000010", 10)
    [fault] = faults
    assert "step_000020: weights is missing" in fault


def test_an_object_store_keeps_the_same_promise(tmp_path: Path) -> None:
    """fsspec's store in memory: no local paths, no renaming."""
    root = "memory://bucket/run/checkpoints"
    for step in (5, 10):
        folder = f"{root}/step_{step:06d}"
        local, send = destination(folder)
        (local / "policy").mkdir(parents=True)
        (local / "policy" / "weights").write_bytes(bytes(step))
        files = describe(local)
        send()
        assert not local.exists(), "the staging is gone"
        assert step == 5 or len(complete(root)) == 1, "not complete without its manifest"
        seal(folder, {"step": step}, files)
    found, faults = newest(root)
    assert found is not None
    assert faults == []
    assert found.manifest["step"] == 10
    with local_copy(f"{found.folder}/policy") as local:
        assert (local / "weights").read_bytes() == bytes(10)
    fs = fsspec.filesystem("memory")
    fs.pipe_file("/bucket/run/checkpoints/step_000010/policy/weights", b"x" * 10)
    found, faults = newest(root)
    assert found is not None
    assert found.manifest["step"] == 5
    assert "the content of policy/weights does not match" in faults[0]
    prune(root, keep=1)
    assert [p.rpartition("/")[2] for p in complete(root)] == ["step_000010"]
    assert not fs.exists("/bucket/run/checkpoints/step_000005")


def test_a_checkpoint_cut_off_at_any_byte_is_named(tmp_path: Path) -> None:
    """Fifty cuts, the manifest among what is cut; each time the checkpoint before is used."""
    rng = random.Random(0)
    make(tmp_path, 5)
    for cut in range(50):
        folder = tmp_path / "step_000010"
        (folder / "learner").mkdir(parents=True)
        (folder / "learner" / "shard.pt").write_bytes(rng.randbytes(5000))
        (folder / "state").write_bytes(rng.randbytes(300))
        seal(folder, {"step": 10})
        file = rng.choice([folder / "learner" / "shard.pt", folder / "state", folder / MANIFEST])
        data = file.read_bytes()
        file.write_bytes(data[: rng.randrange(len(data))])
        found, faults = newest(tmp_path)
        assert found is not None
        assert found.manifest["step"] == 5, f"cut {cut} of {file.name}"
        [fault] = faults
        assert file.name in fault
        shutil.rmtree(folder)
