"""Manifests of ``k8s/``: every overlay keeps every rule, and a broken copy breaks the one that is meant."""

from __future__ import annotations

import importlib.util
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import yaml
from manifests import (
    IMAGE_ROOT,
    OUTSIDE,
    OVERLAYS,
    ROOT,
    RULES,
    Objects,
    broken,
    cluster,
    config,
    enters,
    exits,
    head,
    job,
    leaves,
    pods,
    ray_nodes,
    render,
    renderer,
    the,
    workers,
)

pytestmark = pytest.mark.skipif(renderer() is None, reason="neither kubectl nor kustomize is installed")

overlays = pytest.mark.parametrize("overlay", OVERLAYS)


@pytest.fixture(scope="module")
def validator(shared: Path) -> ModuleType:
    """``validate.py``: strict schemas of the projects' CRDs, and what KubeRay's controller refuses."""
    path = shared / "k8s" / "validate.py"
    if not path.is_file():
        pytest.skip(f"{path} is missing, which has the schemas of KubeRay, Kueue and the Prometheus operator")
    spec = importlib.util.spec_from_file_location("validate", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def refused(validator: ModuleType, shared: Path) -> Callable[[Objects], list[str]]:
    """What schemas and controller say against the custom kinds among some objects."""
    schemas = validator.read_bundle(shared / "k8s" / "schemas.json.gz")
    groups = {key.partition("/")[0] for key in schemas}
    options = SimpleNamespace(schema_only=False, kubernetes_version=None, allow_unknown=[], skip_core=False)

    def check(objects: Objects) -> list[str]:
        custom = [o for o in objects if o["apiVersion"].partition("/")[0] in groups]
        assert custom
        return [f"{o['kind']}: {error}" for o in custom for error in validator.check(o, schemas, options)[0]]

    return check


def core_errors(objects: Objects, version: str) -> list[str]:
    """What Kubernetes' own schemas say against the core kinds, pod templates of the Ray cluster included."""
    import kubernetes_validate

    kinds = {"v1", "policy/v1", "networking.k8s.io/v1"}
    core = [o for o in objects if o["apiVersion"] in kinds]
    core += [{"apiVersion": "v1", "kind": "Pod", "metadata": {"name": p.name}, "spec": p.spec} for p in pods(objects)]
    errors = []
    for o in core:
        try:
            kubernetes_validate.validate(o, version, strict=True)
        except kubernetes_validate.ValidationError as error:
            errors.append(f"{o['kind']} {o['metadata']['name']}: {error.message}")
    return errors


# What is there


def test_the_overlays() -> None:
    assert OVERLAYS == ["cpu-demo", "dev", "multi-node", "single-node-gpu", "spot"]
    for overlay in OVERLAYS:
        assert the(render(overlay), "RayJob", "RayCluster")["kind"] == ("RayCluster" if overlay == "dev" else "RayJob")
    assert len(workers(render("multi-node"))) == 4


@overlays
def test_every_rule_is_kept(overlay: str) -> None:
    assert broken(render(overlay)) == {}


@overlays
def test_schemas_and_controller_accept(overlay: str, refused: Callable[[Objects], list[str]]) -> None:
    assert refused(render(overlay)) == []


@overlays
@pytest.mark.parametrize("version", ["1.29", "1.33", "1.37"])
def test_kubernetes_accepts(overlay: str, version: str) -> None:
    pytest.importorskip("kubernetes_validate")
    assert core_errors(render(overlay), version) == []


@overlays
def test_every_kind_is_checked_by_a_schema(overlay: str, validator: ModuleType, shared: Path) -> None:
    schemas = validator.read_bundle(shared / "k8s" / "schemas.json.gz")
    core = {"v1", "policy/v1", "networking.k8s.io/v1"}
    for o in render(overlay):
        assert o["apiVersion"] in core or f"{o['apiVersion']}/{o['kind']}" in schemas, o["kind"]


@overlays
def test_the_config_is_one_of_the_image(overlay: str) -> None:
    """What run.yaml is based on lies in configs/, which the image has."""
    base = yaml.safe_load(the(render(overlay), "ConfigMap")["data"]["run.yaml"])["base"]
    assert base == "default" or (
        base.startswith(f"{IMAGE_ROOT}/configs/") and (ROOT / Path(base).relative_to(IMAGE_ROOT)).is_file()
    )
    dockerfile = (ROOT / "k8s" / "Dockerfile").read_text()
    assert "COPY configs configs" in dockerfile


@overlays
def test_the_dry_run_accepts_the_config(overlay: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Files and functions that the config names are there, from where the image starts the driver."""
    from rlhf_dist.planner import check_files

    monkeypatch.chdir(ROOT)
    assert check_files(config(render(overlay))) == []


def test_spot_differs_from_the_node_it_comes_from_only_in_placement() -> None:
    """Both learn the same from the same config."""
    trees = [config(render(o)).model_dump() for o in ("single-node-gpu", "spot")]
    for tree in trees:
        for key in ("run", "weight_sync", "generator"):
            del tree[key]
    assert trees[0] == trees[1]


# Who may reach whom

#: (overlay, from, to, port, allowed)
FLOWS = [
    ("cpu-demo", "worker", "headgroup", 6379, True),
    ("cpu-demo", "headgroup", "worker", 30000, True),
    ("multi-node", "learner", "generator", 29500, True),
    ("cpu-demo", "submitter", "headgroup", 8265, True),
    ("cpu-demo", "submitter", "headgroup", 10001, False),
    ("cpu-demo", "submitter", "headgroup", 6379, False),
    ("cpu-demo", "submitter", "worker", 8265, False),
    ("cpu-demo", "operator", "headgroup", 8265, True),
    ("cpu-demo", "operator", "headgroup", 6379, False),
    ("cpu-demo", "operator", "worker", 8265, False),
    ("cpu-demo", "prometheus", "headgroup", 8080, False),
    ("multi-node", "prometheus", "headgroup", 8080, True),
    ("multi-node", "prometheus", "headgroup", 44217, True),
    ("multi-node", "prometheus", "headgroup", 44227, True),
    ("multi-node", "prometheus", "headgroup", 9400, True),
    ("multi-node", "prometheus", "generator", 8080, True),
    ("multi-node", "prometheus", "headgroup", 8265, False),
    ("multi-node", "prometheus", "submitter", 8080, False),
    *((overlay, "neighbour", "headgroup", port, False) for overlay in OVERLAYS for port in (6379, 8080, 8265, 10001)),
    *((overlay, "stranger", "headgroup", port, False) for overlay in OVERLAYS for port in (6379, 8080, 8265, 10001)),
    ("cpu-demo", "worker", "dns", 53, True),
    ("cpu-demo", "submitter", "dns", 53, True),
    ("cpu-demo", "worker", "dns", 443, False),
    ("cpu-demo", "worker", "stranger", 8080, False),
    ("cpu-demo", "worker", "neighbour", 8080, False),
]


@pytest.mark.parametrize(("overlay", "source", "target", "port", "allowed"), FLOWS)
def test_flows(overlay: str, source: str, target: str, port: int, allowed: bool) -> None:
    """Both ends must agree; the outside has no policies of ours."""
    objects = render(overlay)
    inside = {pod.name: pod for pod in pods(objects)}
    passes = True
    if target in inside:
        labels, namespace = (inside[source].labels, "rlhf") if source in inside else OUTSIDE[source]
        passes &= enters(objects, labels, namespace, inside[target], port)
    if source in inside:
        labels, namespace = (inside[target].labels, "rlhf") if target in inside else OUTSIDE[target]
        passes &= exits(objects, inside[source], labels, namespace, port)
    assert passes is allowed


@overlays
@pytest.mark.parametrize(
    ("address", "port"), [("169.254.169.254", 80), ("169.254.169.254", 443), ("10.0.0.1", 443), ("8.8.8.8", 22)]
)
def test_nobody_gets_out(overlay: str, address: str, port: int) -> None:
    """To the cloud's metadata service, the API server, anything but HTTPS."""
    objects = render(overlay)
    assert not any(leaves(objects, pod, address, port) for pod in pods(objects))


def test_only_what_downloads_reaches_the_internet() -> None:
    out = {o: {p.name for p in pods(render(o)) if leaves(render(o), p, "8.8.8.8", 443)} for o in OVERLAYS}
    assert out["cpu-demo"] == out["dev"] == set()
    for overlay in ("single-node-gpu", "multi-node", "spot"):
        assert out[overlay] == {p.name for p in ray_nodes(render(overlay))}


# Broken copies


def spec(objects: Objects) -> dict[str, Any]:
    found = job(objects)
    assert found is not None
    return found


def worker(objects: Objects) -> dict[str, Any]:
    """The first worker group."""
    return cluster(objects)["workerGroupSpecs"][0]


def worker_pod(objects: Objects) -> dict[str, Any]:
    return worker(objects)["template"]["spec"]


def container(objects: Objects) -> dict[str, Any]:
    return worker_pod(objects)["containers"][0]


def head_pod(objects: Objects) -> dict[str, Any]:
    return cluster(objects)["headGroupSpec"]["template"]["spec"]


def set_config(objects: Objects, **sections: Any) -> None:
    data = the(objects, "ConfigMap")["data"]
    data["run.yaml"] = yaml.safe_dump(yaml.safe_load(data["run.yaml"]) | sections)


def drop(objects: Objects, kind: str, name: str | None = None) -> None:
    objects[:] = [o for o in objects if o["kind"] != kind or name not in (None, o["metadata"]["name"])]


def policy(objects: Objects, name: str) -> dict[str, Any]:
    return next(o for o in objects if o["kind"] == "NetworkPolicy" and o["metadata"]["name"] == name)["spec"]


#: Name of the rule (tests/manifests.py) that a change must break.
OURS: list[tuple[str, str, str, Callable[[Objects], Any]]] = [
    ("names", "long", "cpu-demo", lambda o: the(o, "RayJob")["metadata"].update(name="r" * 48)),
    ("names", "long cluster", "dev", lambda o: the(o, "RayCluster")["metadata"].update(name="r" * 54)),
    ("names", "group twice", "multi-node", lambda o: worker(o).update(groupName="generator")),
    ("names", "object twice", "cpu-demo", lambda o: o.append(the(o, "ConfigMap"))),
    ("submission", "typo in the mode", "cpu-demo", lambda o: spec(o).update(submissionMode="K8SJobMode")),
    ("submission", "no deadline", "cpu-demo", lambda o: spec(o).pop("activeDeadlineSeconds")),
    ("submission", "ttl without shutdown", "cpu-demo", lambda o: spec(o).pop("shutdownAfterJobFinishes")),
    ("submission", "retries on one cluster", "cpu-demo", lambda o: spec(o).update(clusterSelector={"a": "b"})),
    (
        "submission",
        "retries that must not resume",
        "cpu-demo",
        lambda o: spec(o).update(entrypoint=spec(o)["entrypoint"] + " run.resume=never"),
    ),
    ("least_privilege", "root", "cpu-demo", lambda o: worker_pod(o)["securityContext"].update(runAsUser=0)),
    ("least_privilege", "may be root", "cpu-demo", lambda o: head_pod(o)["securityContext"].pop("runAsNonRoot")),
    (
        "least_privilege",
        "root in the container",
        "cpu-demo",
        lambda o: container(o)["securityContext"].update(runAsUser=0),
    ),
    ("least_privilege", "seccomp", "cpu-demo", lambda o: worker_pod(o)["securityContext"].pop("seccompProfile")),
    ("least_privilege", "privileged", "cpu-demo", lambda o: container(o)["securityContext"].update(privileged=True)),
    ("least_privilege", "capabilities", "cpu-demo", lambda o: container(o)["securityContext"].pop("capabilities")),
    (
        "least_privilege",
        "root is writable",
        "multi-node",
        lambda o: container(o)["securityContext"].update(readOnlyRootFilesystem=False),
    ),
    (
        "least_privilege",
        "submitter",
        "spot",
        lambda o: spec(o)["submitterPodTemplate"]["spec"].pop("securityContext"),
    ),
    ("least_privilege", "token", "cpu-demo", lambda o: worker_pod(o).pop("automountServiceAccountToken")),
    ("least_privilege", "account", "cpu-demo", lambda o: head_pod(o).pop("serviceAccountName")),
    (
        "least_privilege",
        "namespace",
        "cpu-demo",
        lambda o: the(o, "Namespace")["metadata"]["labels"].pop("pod-security.kubernetes.io/enforce"),
    ),
    ("closed_ports", "host network", "cpu-demo", lambda o: head_pod(o).update(hostNetwork=True)),
    (
        "closed_ports",
        "host port",
        "cpu-demo",
        lambda o: head_pod(o)["containers"][0]["ports"][0].update(hostPort=8265),
    ),
    (
        "closed_ports",
        "node port",
        "cpu-demo",
        lambda o: o.append({"kind": "Service", "metadata": {"name": "ray"}, "spec": {"type": "NodePort"}}),
    ),
    (
        "closed_ports",
        "load balancer",
        "cpu-demo",
        lambda o: cluster(o)["headGroupSpec"].update(serviceType="LoadBalancer"),
    ),
    (
        "closed_ports",
        "host path",
        "cpu-demo",
        lambda o: worker_pod(o)["volumes"].append({"name": "host", "hostPath": {"path": "/"}}),
    ),
    ("limits", "requests", "cpu-demo", lambda o: container(o)["resources"].update(requests={"cpu": "1"})),
    ("limits", "none", "cpu-demo", lambda o: container(o).pop("resources")),
    ("limits", "of the submitter", "cpu-demo", lambda o: pods(o)[-1].container["resources"].pop("requests")),
    (
        "memory",
        "object store above shared memory",
        "single-node-gpu",
        lambda o: worker(o)["rayStartParams"].update({"object-store-memory": "100000000000"}),
    ),
    ("memory", "object store of any size", "cpu-demo", lambda o: worker(o)["rayStartParams"].clear()),
    (
        "memory",
        "shared memory above the pod's",
        "cpu-demo",
        lambda o: workers(o)[0].volume("/dev/shm")["emptyDir"].update(sizeLimit="11Gi"),
    ),
    (
        "memory",
        "shared memory on the disk",
        "cpu-demo",
        lambda o: workers(o)[0].volume("/dev/shm")["emptyDir"].pop("medium"),
    ),
    ("images", "latest", "cpu-demo", lambda o: [p.container.update(image="rlhf-dist:latest") for p in pods(o)]),
    ("images", "no tag", "cpu-demo", lambda o: [p.container.update(image="rlhf-dist") for p in pods(o)]),
    ("images", "two", "cpu-demo", lambda o: container(o).update(image="rlhf-dist:0.2.0-cpu")),
    ("ray", "version", "cpu-demo", lambda o: cluster(o).update(rayVersion="2.52.0")),
    ("ray", "no token", "dev", lambda o: cluster(o).pop("authOptions")),
    ("ray", "work on the head", "cpu-demo", lambda o: cluster(o)["headGroupSpec"]["rayStartParams"].pop("num-cpus")),
    (
        "ray",
        "KubeRay's label",
        "cpu-demo",
        lambda o: worker(o)["template"]["metadata"]["labels"].update({"app.kubernetes.io/name": "rlhf-dist"}),
    ),
    ("ray", "a group that grows", "cpu-demo", lambda o: worker(o).update(maxReplicas=4)),
    ("stopping", "grace", "cpu-demo", lambda o: worker_pod(o).pop("terminationGracePeriodSeconds")),
    ("stopping", "Ray's default", "cpu-demo", lambda o: spec(o).pop("runtimeEnvYAML")),
    ("stopping", "term_limit", "cpu-demo", lambda o: set_config(o, run={"name": "a", "term_limit": 80})),
    ("entry_point", "unknown key", "cpu-demo", lambda o: set_config(o, train={"step": 3})),
    ("entry_point", "no such base", "spot", lambda o: set_config(o, base="/opt/rlhf/configs/none.yaml")),
    ("entry_point", "no name", "cpu-demo", lambda o: set_config(o, run={})),
    ("entry_point", "no checkpoint", "cpu-demo", lambda o: set_config(o, run={"name": "a", "checkpoint_every": 0})),
    ("entry_point", "another program", "cpu-demo", lambda o: spec(o).update(entrypoint="python train.py")),
    (
        "entry_point",
        "option",
        "cpu-demo",
        lambda o: spec(o).update(entrypoint=spec(o)["entrypoint"].replace("run.root", "run.rot")),
    ),
    (
        "entry_point",
        "root is no volume",
        "cpu-demo",
        lambda o: spec(o).update(entrypoint=spec(o)["entrypoint"].replace("/runs", "/data")),
    ),
    ("entry_point", "object store without network", "spot", lambda o: drop(o, "NetworkPolicy", "https")),
    (
        "secrets",
        "in the environment",
        "cpu-demo",
        lambda o: container(o).update(env=[*container(o)["env"], {"name": "AWS_SECRET_ACCESS_KEY", "value": "x"}]),
    ),
    ("secrets", "in the manifest", "cpu-demo", lambda o: o.append({"kind": "Secret", "metadata": {"name": "a"}})),
    (
        "secrets",
        "in the config",
        "cpu-demo",
        lambda o: set_config(o, reward={"components": [{"url": "https://a/b", "headers": {"Authorization": "abc"}}]}),
    ),
    ("volumes", "mount", "cpu-demo", lambda o: worker_pod(o)["volumes"].pop()),
    ("volumes", "config", "cpu-demo", lambda o: the(o, "ConfigMap")["metadata"].update(name="other")),
    ("volumes", "claim", "cpu-demo", lambda o: drop(o, "PersistentVolumeClaim")),
    (
        "volumes",
        "of one node",
        "cpu-demo",
        lambda o: the(o, "PersistentVolumeClaim")["spec"].update(accessModes=["ReadWriteOnce"]),
    ),
    ("volumes", "home", "cpu-demo", lambda o: container(o).pop("env")),
    ("placement", "missing resource", "cpu-demo", lambda o: worker(o)["resources"].pop("generator")),
    (
        "placement",
        "typo in the config",
        "cpu-demo",
        lambda o: set_config(o, generator={"resources": {"generators": 1}}),
    ),
    ("placement", "too few", "multi-node", lambda o: worker(o)["resources"].update(learner="7")),
    ("placement", "too few nodes", "multi-node", lambda o: worker(o).update(replicas=3)),
    ("placement", "too few CPUs", "cpu-demo", lambda o: container(o)["resources"]["limits"].update(cpu="1")),
    (
        "placement",
        "too few GPUs",
        "single-node-gpu",
        lambda o: container(o)["resources"]["limits"].update({"nvidia.com/gpu": "4"}),
    ),
    ("disruption", "none", "cpu-demo", lambda o: drop(o, "PodDisruptionBudget")),
    (
        "disruption",
        "a form without effect",
        "cpu-demo",
        lambda o: the(o, "PodDisruptionBudget").update(spec={"maxUnavailable": 0, "selector": {}}),
    ),
    ("spot", "head", "spot", lambda o: head_pod(o).pop("affinity")),
    ("spot", "transport", "spot", lambda o: set_config(o, weight_sync={"transport": "nccl"})),
    ("spot", "checkpoints", "spot", lambda o: set_config(o, run={"name": "a", "checkpoint_every": 5})),
    ("queue", "none", "multi-node", lambda o: drop(o, "LocalQueue")),
    (
        "queue",
        "another",
        "multi-node",
        lambda o: the(o, "RayJob")["metadata"]["labels"].update({"kueue.x-k8s.io/queue-name": "other"}),
    ),
    ("monitoring", "port", "multi-node", lambda o: head_pod(o)["containers"][0].pop("ports")),
    ("monitoring", "network", "multi-node", lambda o: drop(o, "NetworkPolicy", "prometheus")),
    (
        "monitoring",
        "metric",
        "multi-node",
        lambda o: the(o, "PrometheusRule")["spec"]["groups"][0]["rules"][0].update(expr="rlhf_rollout_klf > 1"),
    ),
    (
        "monitoring",
        "driver",
        "multi-node",
        lambda o: spec(o).update(entrypoint=spec(o)["entrypoint"].replace("9400", "9500")),
    ),
]


@pytest.mark.parametrize(
    ("rule", "overlay", "change"), [pytest.param(r, o, c, id=f"{r}: {what}") for r, what, o, c in OURS]
)
def test_a_broken_copy_breaks_its_rule(rule: str, overlay: str, change: Callable[[Objects], Any]) -> None:
    objects = render(overlay)
    change(objects)
    assert list(RULES[rule](objects))


def test_a_header_that_names_a_variable_is_no_secret() -> None:
    objects = render("cpu-demo")
    headers = {"Authorization": "Bearer $TOKEN"}
    set_config(objects, reward={"components": [{"url": "https://a/b", "headers": headers}]})
    assert not list(RULES["secrets"](objects))


def test_every_rule_can_be_broken() -> None:
    assert {rule for rule, *_ in OURS} == RULES.keys()


#: What schemas or the controller must refuse, and a part of what they say.
REFUSED: list[tuple[str, str, Callable[[Objects], Any]]] = [
    ("unknown field submisionMode", "cpu-demo", lambda o: spec(o).update(submisionMode="K8sJobMode")),
    ("unknown field replica", "multi-node", lambda o: worker(o).update(replica=2)),
    ("unknown field volumeMount", "cpu-demo", lambda o: container(o).update(volumeMount=[])),
    ("is not of type", "cpu-demo", lambda o: worker(o)["rayStartParams"].update({"object-store-memory": 10**9})),
    ("is none of K8sJobMode", "cpu-demo", lambda o: spec(o).update(submissionMode="K8SJobMode")),
    ("longer than 47", "cpu-demo", lambda o: the(o, "RayJob")["metadata"].update(name="r" * 48)),
    ("longer than 53", "dev", lambda o: the(o, "RayCluster")["metadata"].update(name="r" * 54)),
    ("needs shutdownAfterJobFinishes", "cpu-demo", lambda o: spec(o).pop("shutdownAfterJobFinishes")),
    ("backoffLimit", "cpu-demo", lambda o: spec(o).update(clusterSelector={"ray.io/cluster": "a"})),
    (
        "both in rayStartParams and in resources",
        "multi-node",
        lambda o: worker(o)["rayStartParams"].update({"num-cpus": "1"}),
    ),
    (
        "restartPolicy must be Never with autoscaler v2",
        "cpu-demo",
        lambda o: (
            cluster(o).update(enableInTreeAutoscaling=True, autoscalerOptions={"version": "v2"}),
            worker_pod(o).update(restartPolicy="Always"),
        ),
    ),
    ("token authentication needs", "cpu-demo", lambda o: cluster(o).update(rayVersion="2.40.0")),
    ("unknown field groupes", "spot", lambda o: the(o, "PrometheusRule")["spec"].update(groupes=[])),
    ("unknown field queue", "multi-node", lambda o: the(o, "LocalQueue")["spec"].update(queue="a")),
]


@pytest.mark.parametrize(("message", "overlay", "change"), REFUSED, ids=[message for message, *_ in REFUSED])
def test_schemas_and_controller_refuse(
    message: str, overlay: str, change: Callable[[Objects], Any], refused: Callable[[Objects], list[str]]
) -> None:
    objects = render(overlay)
    change(objects)
    assert any(message in error for error in refused(objects)), refused(objects)


@pytest.mark.parametrize(
    "change",
    [
        lambda o: worker_pod(o).update(terminationGracePeriod=120),
        lambda o: policy(o, "dns").update(egres=[]),
        lambda o: the(o, "PodDisruptionBudget")["spec"].update(minAvailable=[1]),
        lambda o: the(o, "ConfigMap")["data"].update({"run.yaml": 3}),
    ],
    ids=["pod", "policy", "budget", "map"],
)
def test_kubernetes_refuses(change: Callable[[Objects], Any]) -> None:
    pytest.importorskip("kubernetes_validate")
    objects = render("cpu-demo")
    change(objects)
    assert core_errors(objects, "1.33") != []


@pytest.mark.parametrize(
    ("name", "source", "port"),
    [("deny-all", "stranger", 8265), ("jobs", "neighbour", 8265), ("ray-nodes", "stranger", 6379)],
)
def test_a_policy_that_is_opened_lets_strangers_in(name: str, source: str, port: int) -> None:
    """The flows above would notice."""
    objects = render("cpu-demo")
    if name == "deny-all":
        drop(objects, "NetworkPolicy")
    else:
        policy(objects, name)["ingress"][0]["from"].append({"namespaceSelector": {}, "podSelector": {}})
    assert enters(objects, *OUTSIDE[source], head(objects), port)


# Alerts

#: Two alerts, minute by minute: silent at first, and firing later.
ALERTS = """
rule_files: [rules.yaml]
evaluation_interval: 1m
tests:
  - interval: 1m
    input_series:
      - {series: 'rlhf_steps_total{namespace="rlhf", pod="head", stage="sft"}', values: '0+1x20 20x100'}
      - {series: 'rlhf_steps_total{namespace="rlhf", pod="head", stage="ppo"}', values: '_x20 0+1x30 30x70'}
      - {series: 'rlhf_rollout_kl{pod="head", stage="ppo"}', values: '0+1x120'}
    promql_expr_test:
      - {expr: 'count(ALERTS{alertname="RlhfNoProgress", alertstate="firing"})', eval_time: 60m, exp_samples: []}
      - expr: 'count(ALERTS{alertname="RlhfNoProgress", alertstate="firing"})'
        eval_time: 100m
        exp_samples: [{labels: '{}', value: 1}]
      - {expr: 'count(ALERTS{alertname="RlhfKlHigh", alertstate="firing"})', eval_time: 60m, exp_samples: []}
      - expr: 'count(ALERTS{alertname="RlhfKlHigh", alertstate="firing"})'
        eval_time: 70m
        exp_samples: [{labels: '{}', value: 1}]
"""


@pytest.mark.skipif(shutil.which("promtool") is None, reason="no promtool (Debian's package prometheus)")
def test_prometheus_accepts_the_alerts_and_they_fire(tmp_path: Path) -> None:
    (tmp_path / "rules.yaml").write_text(yaml.safe_dump(the(render("multi-node"), "PrometheusRule")["spec"]))
    (tmp_path / "test.yaml").write_text(ALERTS)
    for command in (["check", "rules", "rules.yaml"], ["test", "rules", "test.yaml"]):
        done = subprocess.run(["promtool", *command], cwd=tmp_path, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr


# The image


def lock(part: str) -> dict[str, str]:
    """Package to version, of one file of the lock."""
    text = (ROOT / "requirements" / f"{part}.txt").read_text()
    return dict(re.findall(r"^([a-z0-9-]+)==(\S+)", text, re.MULTILINE))


@pytest.mark.parametrize("target", ["cpu", "gpu"])
def test_the_lock_has_what_the_package_asks_for(target: str) -> None:
    import tomllib

    from packaging.requirements import Requirement
    from packaging.utils import canonicalize_name

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = [target, *(e for e in project["optional-dependencies"] if e not in ("cpu", "gpu"))]
    pinned = lock("common") | lock(target)
    for text in project["dependencies"] + [r for e in extras for r in project["optional-dependencies"][e]]:
        wanted = Requirement(text)
        version = pinned.get(canonicalize_name(wanted.name))
        fits = version is not None and wanted.specifier.contains(version)
        assert fits, f"{text}, the lock has {version}: run `make lock`"
    assert not lock("common").keys() & lock(target).keys()


@pytest.mark.parametrize("part", ["common", "cpu", "gpu"])
def test_every_package_of_the_lock_has_digests(part: str) -> None:
    entries = re.split(r"\n(?=[a-z0-9])", (ROOT / "requirements" / f"{part}.txt").read_text())[1:]
    assert entries
    for entry in entries:
        assert re.search(r"--hash=sha256:[0-9a-f]{64}", entry), entry.partition("\n")[0]


def test_the_image_is_what_the_manifests_name() -> None:
    from rlhf_dist import __version__

    tags = {overlay: head(render(overlay)).container["image"].partition(":")[2] for overlay in OVERLAYS}
    assert {tag.rpartition("-")[0] for tag in tags.values()} == {__version__}
    stages = set(re.findall(r"^FROM base AS (\w+)$", (ROOT / "k8s" / "Dockerfile").read_text(), re.MULTILINE))
    assert {tag.rpartition("-")[2] for tag in tags.values()} == stages == {"cpu", "gpu"}
    user = re.findall(r"^USER (\d+):(\d+)$", (ROOT / "k8s" / "Dockerfile").read_text(), re.MULTILINE)
    for overlay in OVERLAYS:
        context = head(render(overlay)).spec["securityContext"]
        assert user == [(str(context["runAsUser"]), str(context["runAsGroup"]))]
