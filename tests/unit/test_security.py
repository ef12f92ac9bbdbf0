"""What docs/security.md says of the code, where no other test shows it."""

from __future__ import annotations

import ast
import json
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
import torch
import yaml
from tiny import LLAMA
from transformers import AutoModelForCausalLM, LlamaConfig

from rlhf_dist import models
from rlhf_dist.config_io import load
from rlhf_dist.data.tokenization import load_tokenizer
from rlhf_dist.observability.metrics import MetricsWriter

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "rlhf_dist"
CONFIGS = sorted(ROOT.glob("configs/**/*.yaml"))
#: Where a file may be read that can hold code: DeepSpeed's shards, which the run wrote itself.
UNPICKLES = {"engines/snapshots.py"}


def calls() -> Iterator[tuple[str, str, dict[str, ast.expr], ast.Call]]:
    """File, name, keywords and node of every call in the package."""
    for file in sorted(PACKAGE.rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Call):
                name = ast.unparse(node.func)
                yield file.relative_to(PACKAGE).as_posix(), name, {k.arg or "**": k.value for k in node.keywords}, node


def test_remote_code_is_off_by_default_and_in_every_config() -> None:
    assert load().model.trust_remote_code is False
    for file in CONFIGS:
        assert load(str(file)).model.trust_remote_code is False, file


def test_whoever_loads_a_model_or_tokenizer_is_told_about_remote_code() -> None:
    loading = [
        (file, keywords) for file, name, keywords, _ in calls() if name.endswith(".from_pretrained") or name == "LLM"
    ]
    assert len(loading) >= 4
    for file, keywords in loading:
        value = ast.unparse(keywords["trust_remote_code"])
        assert value in ("trust_remote_code", "model.trust_remote_code"), f"{file}: {value}"


@pytest.fixture
def with_code(tmp_path: Path) -> Path:
    """A model whose folder brings its own classes, which leave a file when they are imported."""
    names = {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnModel", "AutoTokenizer": ["own.OwnT", None]}
    config = {"model_type": "own", "auto_map": names, "architectures": ["OwnModel"]}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "OwnT", "auto_map": names}))
    (tmp_path / "own.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w').close()\n")
    return tmp_path


def test_code_of_a_model_does_not_run(with_code: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for loader in (
        lambda trust: models.load_policy(str(with_code), "float32", "sdpa", trust),
        lambda trust: models.load_scalar(str(with_code), "float32", "sdpa", trust),
        lambda trust: load_tokenizer(str(with_code), trust),
    ):
        with pytest.raises(ValueError):
            loader(False)
        assert not (with_code / "ran").exists()
    # With the switch it does run: the folder is one that would.
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(with_code / "cache"))
    monkeypatch.setattr(sys, "path", [*sys.path])
    with pytest.raises((AttributeError, OSError, ValueError)):
        models.load_policy(str(with_code), "float32", "sdpa", True)
    assert (with_code / "ran").exists()


def test_pickled_weights_are_refused(tmp_path: Path) -> None:
    config = LlamaConfig(**{k: v for k, v in LLAMA.items() if k != "model_type"}, vocab_size=32)
    model = AutoModelForCausalLM.from_config(config)
    config.save_pretrained(tmp_path)
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    for loader in (models.load_policy, models.load_scalar):
        with pytest.raises(OSError, match="safetensors"):
            loader(str(tmp_path), "float32", "sdpa")
    model.save_pretrained(tmp_path)
    assert models.load_policy(str(tmp_path), "float32", "sdpa").num_parameters() == model.num_parameters()


def test_samplers_take_safetensors_only() -> None:
    """vLLM's own choice, "auto", would fall back to pickled weights."""
    (formats,) = [keywords["load_format"] for _, name, keywords, _ in calls() if name == "LLM"]
    values = {node.value for node in ast.walk(formats) if isinstance(node, ast.Constant)}
    assert values == {"dummy", "safetensors"}


def test_what_can_run_code_when_it_is_read_is_read_in_one_place() -> None:
    loads = [(file, keywords) for file, name, keywords, _ in calls() if name == "torch.load"]
    assert loads
    for file, keywords in loads:
        assert ast.unparse(keywords["weights_only"]) == str(file not in UNPICKLES), file
    banned = {"eval", "exec", "yaml.load", "yaml.unsafe_load", "pickle.load", "pickle.loads", "os.system", "np.load"}
    assert not [(file, name) for file, name, _, _ in calls() if name in banned]
    assert not [file for file, _, keywords, _ in calls() if "shell" in keywords]


def test_http_checks_certificates_and_follows_no_redirection() -> None:
    """httpx does both unless told otherwise; tests/unit/test_endpoint.py has a certificate that nobody vouches for."""
    clients = [(file, set(keywords)) for file, name, keywords, _ in calls() if name.startswith("httpx.AsyncClient")]
    assert clients
    assert not [(file, found) for file, found in clients if found & {"verify", "follow_redirects", "cert", "**"}]


def test_the_metrics_endpoint_listens_on_loopback(tmp_path: Path) -> None:
    run = load().run
    assert run.prometheus_port == 0
    before = {c.laddr for c in psutil.Process().net_connections("inet") if c.status == psutil.CONN_LISTEN}
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    with MetricsWriter(tmp_path / "metrics.jsonl", port, run.prometheus_host):
        after = {c.laddr for c in psutil.Process().net_connections("inet") if c.status == psutil.CONN_LISTEN}
    assert {address.ip for address in after - before} == {"127.0.0.1"}


def test_sockets_of_our_own_name_an_address() -> None:
    servers = [(file, node) for file, name, _, node in calls() if name == "socket.create_server"]
    assert servers
    for file, node in servers:
        assert isinstance(node.args[0], ast.Tuple), file
        host = node.args[0].elts[0]
        assert not isinstance(host, ast.Constant), f"{file}: {ast.unparse(node)} listens on every network"


def test_secrets_of_the_environment_stay_out_of_the_run_folder(tmp_path: Path) -> None:
    """Of a run that fails before it starts Ray; tests/integration/test_reward_endpoint.py has whole ones."""
    secrets = {
        name: f"s3cr3t-{name.lower()}"
        for name in ("JUDGE_TOKEN", "HF_TOKEN", "AWS_SECRET_ACCESS_KEY", "RAY_AUTH_TOKEN")
    }
    judge = {"name": "judge", "url": "http://u:$JUDGE_TOKEN@127.0.0.1:9/score?k=$JUDGE_TOKEN"}
    tree = {
        "recipe": "ppo",
        "model": {"path": str(tmp_path / "model")},
        "data": {"format": "messages", "train": str(tmp_path / "missing.jsonl")},
        "reward": {"components": [{**judge, "headers": {"Authorization": "Bearer $JUDGE_TOKEN"}}]},
        "run": {"root": str(tmp_path / "runs"), "name": "job"},
    }
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(tree))
    command = [sys.executable, "-m", "rlhf_dist.main", "--config", str(tmp_path / "run.yaml")]
    environment = {**os.environ, **secrets, "HOME": str(tmp_path)}
    environment.pop("RAY_ADDRESS", None)
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 2, done.stderr
    assert "missing.jsonl" in done.stdout + done.stderr
    files = {file.name: file.read_bytes() for file in (tmp_path / "runs").rglob("*") if file.is_file()}
    assert {"config.yaml", "summary.json", "report.html", "driver.log"} <= set(files)
    assert b"$JUDGE_TOKEN" in files["config.yaml"], "the name is there, the value is not"
    for secret in secrets.values():
        assert secret not in done.stdout + done.stderr
        assert not [name for name, content in files.items() if secret.encode() in content]
