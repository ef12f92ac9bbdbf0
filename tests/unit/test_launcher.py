"""The files of ``cluster/`` for Ray's cluster launcher, against the schema and the checks that Ray ships."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

ROOT = Path(__file__).parents[2]
FILES = ("cloud", "on_prem")


def read(name: str) -> dict[str, Any]:
    return yaml.safe_load((ROOT / "cluster" / f"{name}.yaml").read_text())


def prepared(tree: dict[str, Any]) -> dict[str, Any]:
    """As ``ray up`` completes and checks it before it speaks to the cloud or the hosts.

    Raises:
        jsonschema.ValidationError: a key or a type that Ray does not know.
        ValueError: node types that contradict each other.
    """
    from ray.autoscaler._private.util import prepare_config, validate_config

    complete = prepare_config(copy.deepcopy(tree))
    validate_config(complete)
    return complete


def start_commands(tree: dict[str, Any]) -> list[str]:
    return [*tree["head_start_ray_commands"], *tree["worker_start_ray_commands"]]


@pytest.mark.parametrize("name", FILES)
def test_it_keeps_rays_schema(name: str) -> None:
    import ray.autoscaler

    schema = json.loads((Path(ray.autoscaler.__file__).parent / "ray-schema.json").read_text())
    tree = read(name)
    jsonschema.validate(tree, schema)
    complete = prepared(tree)
    assert complete["head_node_type"] in complete["available_node_types"]
    assert start_commands(complete) == start_commands(tree), "Ray's own commands stand in the place of none"


BROKEN: list[tuple[str, Callable[[dict[str, Any]], Any]]] = [
    ("cloud", lambda tree: tree.update(idle_timeout=5)),
    ("cloud", lambda tree: tree.update(head_node_type="haed")),
    ("cloud", lambda tree: tree["available_node_types"]["worker"].update(min_worker=1)),
    ("cloud", lambda tree: tree["available_node_types"]["worker"].update(min_workers=2)),
    ("cloud", lambda tree: tree["auth"].update(user="ubuntu")),
    ("on_prem", lambda tree: tree.update(setup_comands=[])),
    ("on_prem", lambda tree: tree.update(rsync_exclude="runs")),
]


@pytest.mark.parametrize(("name", "change"), BROKEN)
def test_a_broken_copy_is_refused(name: str, change: Callable[[dict[str, Any]], Any]) -> None:
    tree = read(name)
    change(tree)
    with pytest.raises((jsonschema.ValidationError, ValueError)):
        prepared(tree)


def test_workers_are_spot_and_the_head_is_not() -> None:
    types = read("cloud")["available_node_types"]
    assert "InstanceMarketOptions" not in types["head"]["node_config"]
    assert types["worker"]["node_config"]["InstanceMarketOptions"] == {"MarketType": "spot"}
    assert types["head"]["resources"] == {"CPU": 0, "GPU": 0}, "nothing that a learner or a generator needs"


@pytest.mark.parametrize("name", FILES)
def test_nothing_is_open_to_others(name: str) -> None:
    """Tokens on every node, no dashboard beyond loopback, and on AWS no group that Ray opens SSH of to everybody."""
    tree = read(name)
    starts = [command for command in start_commands(tree) if "ray start" in command]
    assert len(starts) == 2
    for command in starts:
        assert "RAY_AUTH_MODE=token" in command
        assert "--dashboard-host" not in command
    assert "~/.ray/auth_token" in tree["file_mounts"].values()
    for kind in tree.get("available_node_types", {}).values():
        assert kind["node_config"]["SecurityGroupIds"]


@pytest.mark.parametrize("name", FILES)
def test_packages_come_from_the_lock(name: str) -> None:
    commands = read(name)["setup_commands"]
    assert any("make" in command and command.endswith(" setup") for command in commands)
    assert not any("pip install" in command for command in commands)
