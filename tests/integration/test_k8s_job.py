"""The RayJob of ``k8s/overlays/cpu-demo`` without Kubernetes: its entry point, environment and resources, run on a
local Ray cluster that has what its worker groups offer. A second attempt goes on where the first one died.
"""

from __future__ import annotations

import json
import shlex
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.error import URLError
from urllib.request import urlopen

import pytest
import yaml
from heads import Head, free_ports
from jobs import SHORTER
from manifests import (
    ROOT,
    Objects,
    amount,
    head,
    job,
    mounted_files,
    ray_nodes,
    render,
    renderer,
    workers,
)

from rlhf_dist.observability.metrics import read_metrics

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(renderer() is None, reason="neither kubectl nor kustomize is installed"),
]


class Attempt(Head):
    """One Ray cluster with the resources of the manifest's workers, and the job on it."""

    def __init__(self, objects: Objects, places: dict[str, Path], metrics_port: int) -> None:
        self.objects, self.places, self.metrics_port = objects, places, metrics_port
        variables = {e["name"]: e["value"] for e in head(objects).container["env"]}
        super().__init__(variables | {"PYTHONPATH": str(ROOT)}, self.offered())

    def offered(self) -> dict[str, str | int]:
        """One node that has what all worker pods have, and the head's place for the driver."""
        resources: dict[str, float] = {}
        for pod in workers(self.objects):
            assert pod.group is not None
            for name, value in pod.group["resources"].items():
                resources[name] = resources.get(name, 0) + pod.count * amount(value)
        cpus = sum(pod.count * amount(pod.limits["cpu"]) for pod in workers(self.objects))
        stores = (pod.group["rayStartParams"]["object-store-memory"] for pod in ray_nodes(self.objects) if pod.group)
        return {"num-cpus": int(cpus), "resources": json.dumps(resources), "object-store-memory": min(map(int, stores))}

    def submit(self) -> subprocess.Popen[str]:
        """The command of KubeRay's submitter in K8sJobMode (its BuildJobSubmitCommand); prints what the job prints."""
        spec = job(self.objects)
        assert spec is not None
        entry = spec["entrypoint"]
        for path, place in self.places.items():
            entry = entry.replace(path, str(place))
        entry += "".join(
            f" {shlex.quote(o)}"
            for o in [*SHORTER, "run.checkpoint_every=1", f"run.prometheus_port={self.metrics_port}"]
        )
        environment = json.dumps(json.dumps(yaml.safe_load(spec["runtimeEnvYAML"])))
        to = f"--address {self.address}"
        script = (
            f"until ray job list {to} >/dev/null 2>&1; do sleep 2; done; "
            f"if ! ray job status {to} attempt >/dev/null 2>&1; then "
            f"ray job submit {to} --no-wait --runtime-env-json {environment} --submission-id attempt -- {entry}; "
            f"fi; ray job logs {to} --follow attempt"
        )
        return subprocess.Popen(
            ["bash", "-ec", script],
            env=self.environment,
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )


@pytest.fixture
def attempts() -> Iterator[list[Attempt]]:
    started: list[Attempt] = []
    yield started
    for attempt in started:
        attempt.die()


def scrape(port: int) -> str:
    try:
        with urlopen(f"http://127.0.0.1:{port}/metrics", timeout=5) as answer:
            return answer.read().decode()
    except (URLError, ConnectionError):
        return ""


def test_the_job_of_the_manifest_and_its_retry(tmp_path: Path, attempts: list[Attempt]) -> None:
    objects = render("cpu-demo")
    places = mounted_files(objects, tmp_path) | {"/runs": tmp_path / "runs"}
    folder, port = tmp_path / "runs" / "cpu-demo", free_ports(1)[0]

    attempts.append(Attempt(objects, places, port))
    output = attempts[0].submit()
    steps: list[dict[str, Any]] = []
    exported = ""
    deadline = time.monotonic() + 600
    while not any(r["step"] >= 3 for r in steps):
        assert output.poll() is None, output.communicate()[0]
        assert time.monotonic() < deadline, "no third step of PPO"
        time.sleep(0.5)
        steps = [r for r in read_metrics(folder / "metrics.jsonl") if r["stage"] == "ppo"]
        exported = scrape(port) or exported
    attempts[0].die()
    output.communicate(timeout=60)
    assert 'rlhf_steps_total{stage="ppo"}' in exported, "what PrometheusRules are about is exported while it runs"
    done = max(r["step"] for r in read_metrics(folder / "metrics.jsonl") if r["stage"] == "ppo")
    saved = max(int(p.parent.name.split("_")[1]) for p in (folder / "checkpoints").glob("step_*/manifest.json"))
    assert saved >= 1

    # The retry: a new cluster, the same volume, the same command.
    attempts.append(Attempt(objects, places, port))
    text, _ = attempts[1].submit().communicate(timeout=600)
    assert attempts[1].status("attempt") == "SUCCEEDED", text
    summary = json.loads((folder / "summary.json").read_text())
    assert (summary["status"], summary["steps"]) == ("finished", 6), text
    assert "which is gone on with" in text
    records = [r for r in read_metrics(folder / "metrics.jsonl") if r["stage"] == "ppo"]
    assert [r["step"] for r in records] == [1, 2, 3, 4, 5, 6]
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines() if line.endswith("}")]
    again = [r["step"] for r in lines if r["stage"] == "ppo"][done:]
    assert again[0] >= saved + 1 >= 2, "it began after the checkpoint, not anew"
    assert sum(r["stage"] == "sft" for r in lines) == max(r["step"] for r in lines if r["stage"] == "sft")
