"""Manifests of ``k8s/`` as kustomize renders them, and the rules that each must keep.

A rule takes all objects of a rendering and yields what is wrong, one line each. What a schema says and what KubeRay's
controller refuses is checked elsewhere (``../shared/k8s/validate.py``, kubernetes-validate); these are our own.
"""

from __future__ import annotations

import ipaddress
import re
import shlex
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from rlhf_dist import planner
from rlhf_dist.config import Config
from rlhf_dist.config_io import ConfigError, load
from rlhf_dist.main import _parser
from rlhf_dist.observability.metrics import prometheus_name

ROOT = Path(__file__).parents[1]
OVERLAYS = sorted(folder.name for folder in (ROOT / "k8s" / "overlays").iterdir())
#: Where the image has the repository.
(IMAGE_ROOT,) = set(re.findall(r"^WORKDIR (\S+)", (ROOT / "k8s" / "Dockerfile").read_text(), re.MULTILINE))

Objects = list[dict[str, Any]]


def renderer() -> list[str] | None:
    """The command that renders a folder, where there is one."""
    for command in (["kubectl", "kustomize"], ["kustomize", "build"]):
        if shutil.which(command[0]):
            return command
    return None


@cache
def _rendered(overlay: str) -> str:
    command = renderer()
    assert command is not None
    folder = ROOT / "k8s" / "overlays" / overlay
    return subprocess.run([*command, str(folder)], check=True, capture_output=True, text=True, timeout=60).stdout


def render(overlay: str) -> Objects:
    """All objects of an overlay, each time new ones."""
    return list(yaml.load_all(_rendered(overlay), Loader=yaml.CSafeLoader))


def of_kind(objects: Objects, *kinds: str) -> Objects:
    return [o for o in objects if o["kind"] in kinds]


def the(objects: Objects, *kinds: str) -> dict[str, Any]:
    """The only object of these kinds."""
    (found,) = of_kind(objects, *kinds)
    return found


def job(objects: Objects) -> dict[str, Any] | None:
    """Spec of the RayJob; None where there is a cluster without one."""
    jobs = of_kind(objects, "RayJob")
    return jobs[0]["spec"] if jobs else None


def cluster(objects: Objects) -> dict[str, Any]:
    """Spec of the Ray cluster, a job's or one by itself."""
    spec = the(objects, "RayJob", "RayCluster")["spec"]
    return spec.get("rayClusterSpec", spec)


def amount(quantity: str | int) -> float:
    """``10Gi`` -> 10737418240.0, ``500m`` -> 0.5."""
    number, unit = re.fullmatch(r"([\d.]+)(\w*)", str(quantity)).groups()  # type: ignore[union-attr]
    factors = {"": 1.0, "m": 1e-3} | {u: 10.0 ** (3 * i) for i, u in enumerate("kMGTP", 1)}
    return float(number) * (factors | {f"{u}i": 1024.0**i for i, u in enumerate("KMGTP", 1)})[unit]


@dataclass(frozen=True)
class Pod:
    """Pods of one kind, with what KubeRay adds to their labels and ports."""

    name: str
    count: int
    spec: dict[str, Any]
    labels: dict[str, str]
    own_labels: dict[str, str]
    group: dict[str, Any] | None
    """Of a Ray node: its group in the cluster's spec."""

    @property
    def container(self) -> dict[str, Any]:
        return self.spec["containers"][0]

    @property
    def limits(self) -> dict[str, Any]:
        return self.container.get("resources", {}).get("limits", {})

    @property
    def ports(self) -> dict[str, int]:
        added = {"metrics": 8080, "dashboard": 8265, "gcs": 6379, "client": 10001} if self.group else {}
        return added | {p["name"]: p["containerPort"] for p in self.container.get("ports", [])}

    def volume(self, path: str) -> dict[str, Any]:
        """What is mounted at ``path``; {} if nothing is."""
        names = [m["name"] for m in self.container.get("volumeMounts", []) if m["mountPath"] == path]
        return next((v for v in self.spec.get("volumes", []) if [v["name"]] == names), {})


def pods(objects: Objects) -> list[Pod]:
    """Head, workers, and the submitter where there is a job."""
    found = []
    spec = cluster(objects)
    for kind, group in [("head", spec["headGroupSpec"]), *(("worker", g) for g in spec["workerGroupSpecs"])]:
        template = group["template"]
        own = template.get("metadata", {}).get("labels", {})
        name = "headgroup" if kind == "head" else group["groupName"]
        added = {
            "ray.io/is-ray-node": "yes",
            "ray.io/node-type": kind,
            "ray.io/group": name,
            "app.kubernetes.io/name": "kuberay",
            "app.kubernetes.io/created-by": "kuberay-operator",
        }
        found.append(Pod(name, group.get("replicas", 1), template["spec"], added | own, own, group))
    if (ray_job := job(objects)) is not None:
        template = ray_job["submitterPodTemplate"]
        labels = template["metadata"]["labels"]
        found.append(Pod("submitter", 1, template["spec"], labels, labels, None))
    return found


def ray_nodes(objects: Objects) -> list[Pod]:
    return [pod for pod in pods(objects) if pod.group is not None]


def head(objects: Objects) -> Pod:
    return ray_nodes(objects)[0]


def workers(objects: Objects) -> list[Pod]:
    return ray_nodes(objects)[1:]


def entrypoint(objects: Objects) -> list[str]:
    """The job's command; that which would be submitted where there is a cluster without one."""
    ray_job = job(objects)
    return shlex.split(ray_job["entrypoint"] if ray_job else "python -m rlhf_dist.main --config /etc/rlhf/run.yaml")


def mounted_files(objects: Objects, folder: Path) -> dict[str, Path]:
    """The ConfigMap's files as the head has them: mount path to a folder that is written here."""
    maps = {o["metadata"]["name"]: o["data"] for o in of_kind(objects, "ConfigMap")}
    places = {}
    for mount in head(objects).container["volumeMounts"]:
        volume = head(objects).volume(mount["mountPath"])
        if "configMap" not in volume:
            continue
        place = folder / mount["name"]
        place.mkdir()
        for name, text in maps[volume["configMap"]["name"]].items():
            (place / name).write_text(text.replace(IMAGE_ROOT, str(ROOT)))
        places[mount["mountPath"]] = place
    return places


def config(objects: Objects) -> Config:
    """What the entry point runs.

    Raises:
        ConfigError, KeyError, ValueError: it would not start.
    """
    words = entrypoint(objects)
    if words[:3] != ["python", "-m", "rlhf_dist.main"]:
        raise ValueError(f"entrypoint is not python -m rlhf_dist.main: {words}")
    with tempfile.TemporaryDirectory() as folder:
        for path, place in mounted_files(objects, Path(folder)).items():
            words = [word.replace(path, str(place)) for word in words]
        args = _parser().parse_args(words[3:])
        return load(args.config, args.overrides)


# The rules

RULES: dict[str, Callable[[Objects], Iterator[str]]] = {}


def rule(check: Callable[[Objects], Iterator[str]]) -> Callable[[Objects], Iterator[str]]:
    RULES[check.__name__] = check
    return check


def broken(objects: Objects) -> dict[str, list[str]]:
    """Rules that are not kept, and how."""
    return {name: found for name, check in RULES.items() if (found := list(check(objects)))}


@rule
def names(objects: Objects) -> Iterator[str]:
    """KubeRay makes names of services, pods and clusters from these, which Kubernetes limits to 63 characters."""
    for o in of_kind(objects, "RayJob", "RayCluster"):
        limit = 47 if o["kind"] == "RayJob" else 53
        if len(o["metadata"]["name"]) > limit:
            yield f"{o['kind']} {o['metadata']['name']}: name is longer than {limit}"
    identities = [(o["kind"], o["metadata"]["name"]) for o in objects]
    yield from (f"{i} twice" for i in identities if identities.count(i) > 1)
    groups = [pod.name for pod in ray_nodes(objects)]
    yield from (f"group {g} twice" for g in groups if groups.count(g) > 1)


@rule
def submission(objects: Objects) -> Iterator[str]:
    """A submitter that may be started again, limits in time, a cluster that goes, retries that can go on."""
    spec = job(objects)
    if spec is None:
        return
    if spec.get("submissionMode", "K8sJobMode") != "K8sJobMode":
        yield f"submissionMode is {spec['submissionMode']}, not K8sJobMode"
    if not spec.get("activeDeadlineSeconds"):
        yield "no activeDeadlineSeconds"
    if not spec.get("shutdownAfterJobFinishes"):
        yield "no shutdownAfterJobFinishes" + (", which the ttl needs" if spec.get("ttlSecondsAfterFinished") else "")
    if spec.get("backoffLimit") and "clusterSelector" in spec:
        yield "backoffLimit with clusterSelector: a retry is a new cluster"
    if spec.get("backoffLimit") and re.search(r"run\.resume=never", spec["entrypoint"]):
        yield "backoffLimit with run.resume=never"


@rule
def least_privilege(objects: Objects) -> Iterator[str]:
    """What the Pod Security Standard `restricted` asks for, a root that is read-only, and no way to the API server."""
    accounts = {o["metadata"]["name"]: o for o in of_kind(objects, "ServiceAccount")}
    for pod in pods(objects):
        context = pod.spec.get("securityContext", {})
        if context.get("runAsNonRoot") is not True or context.get("runAsUser", 0) == 0:
            yield f"{pod.name}: may run as root"
        if context.get("seccompProfile") != {"type": "RuntimeDefault"}:
            yield f"{pod.name}: no seccomp profile"
        account = accounts.get(pod.spec.get("serviceAccountName", "default"))
        if account is None or account.get("automountServiceAccountToken") is not False:
            yield f"{pod.name}: not under a service account of its own without a token"
        if pod.spec.get("automountServiceAccountToken") is not False:
            yield f"{pod.name}: has a token of the API server"
        for container in [*pod.spec["containers"], *pod.spec.get("initContainers", [])]:
            own = container.get("securityContext", {})
            expected = {"allowPrivilegeEscalation": False, "readOnlyRootFilesystem": True}
            if any(own.get(key) is not value for key, value in expected.items()) or own.get("privileged"):
                yield f"{pod.name}/{container['name']}: privileges, or a root that can be written to"
            if own.get("capabilities") != {"drop": ["ALL"]}:
                yield f"{pod.name}/{container['name']}: keeps capabilities"
            if {"runAsUser", "runAsNonRoot", "seccompProfile"} & own.keys():
                yield f"{pod.name}/{container['name']}: overrides what the pod says"
    for namespace in of_kind(objects, "Namespace"):
        if namespace["metadata"]["labels"].get("pod-security.kubernetes.io/enforce") != "restricted":
            yield "the namespace does not enforce the restricted standard"


@rule
def closed_ports(objects: Objects) -> Iterator[str]:
    """Nothing is reachable from outside the cluster."""
    for o in of_kind(objects, "Service", "Ingress", "HTTPRoute"):
        yield f"{o['kind']} {o['metadata']['name']}: KubeRay makes the services that are needed"
    spec = cluster(objects)
    if spec["headGroupSpec"].keys() & {"serviceType", "headService", "enableIngress"}:
        yield "the head's service is exposed"
    for pod in pods(objects):
        if any(pod.spec.get(key) for key in ("hostNetwork", "hostPID", "hostIPC")):
            yield f"{pod.name}: on the host's network or processes"
        yield from (f"{pod.name}: host path {v['name']}" for v in pod.spec.get("volumes", []) if "hostPath" in v)
        yield from (f"{pod.name}: host port" for p in pod.container.get("ports", []) if "hostPort" in p)


@rule
def limits(objects: Objects) -> Iterator[str]:
    """Guaranteed: nobody is throttled, or killed for what neighbours do."""
    for pod in pods(objects):
        for container in pod.spec["containers"]:
            resources = container.get("resources", {})
            if resources.get("requests") != resources.get("limits"):
                yield f"{pod.name}/{container['name']}: requests {resources.get('requests')} are not the limits"
            if not {"cpu", "memory"} <= resources.get("limits", {}).keys():
                yield f"{pod.name}/{container['name']}: no limits"


@rule
def memory(objects: Objects) -> Iterator[str]:
    """Object store < shared memory < memory of the pod: otherwise the store goes to the disk, or the pod is killed."""
    for pod in ray_nodes(objects):
        assert pod.group is not None
        shm = pod.volume("/dev/shm").get("emptyDir", {})
        store = amount(pod.group["rayStartParams"].get("object-store-memory", 0))
        if shm.get("medium") != "Memory" or not 75e6 <= store < amount(shm.get("sizeLimit", 0)):
            yield f"{pod.name}: object store of {store:g} bytes, shared memory {shm}"
        elif amount(shm["sizeLimit"]) >= 0.75 * amount(pod.limits.get("memory", 0)):
            yield f"{pod.name}: {shm['sizeLimit']} of shared memory leave little of {pod.limits.get('memory')}"


@rule
def images(objects: Objects) -> Iterator[str]:
    """One image, the same Python and Ray everywhere, that does not change under a tag's name."""
    found = {c["image"] for pod in pods(objects) for c in pod.spec["containers"]}
    if len(found) > 1:
        yield f"several images: {sorted(found)}"
    for image in found:
        exact = re.search(r":\d+\.\d+\.\d+[\w.-]*$", image) or re.search(r"@sha256:[0-9a-f]{64}$", image)
        if not exact:
            yield f"{image}: pin it by digest or by an exact version"


@rule
def ray(objects: Objects) -> Iterator[str]:
    """The version of the lock, tokens, a head without processes, labels that KubeRay needs for its services."""
    spec = cluster(objects)
    (pinned,) = re.findall(r'"ray\[default\]==([\d.]+)"', (ROOT / "pyproject.toml").read_text())
    if spec.get("rayVersion") != pinned:
        yield f"rayVersion {spec.get('rayVersion')}, but the packages have {pinned}"
    if spec.get("authOptions") != {"mode": "token"}:
        yield "no token authentication"
    if spec["headGroupSpec"]["rayStartParams"].get("num-cpus") != "0":
        yield "processes may be placed on the head"
    for pod in ray_nodes(objects):
        taken = {k for k in pod.own_labels if k.startswith("ray.io/")} | {
            "app.kubernetes.io/name"
        } & pod.own_labels.keys()
        yield from (f"{pod.name}: label {label} is KubeRay's" for label in sorted(taken))
    for pod in workers(objects):
        assert pod.group is not None
        if not pod.group.get("minReplicas") == pod.count == pod.group.get("maxReplicas"):
            yield f"{pod.name}: the number of workers is not fixed"


@rule
def stopping(objects: Objects) -> Iterator[str]:
    """SIGTERM to the driver: time for its step and a checkpoint. Of a pod: time for `ray start` to drain, 30 s."""
    for pod in ray_nodes(objects):
        if pod.spec.get("terminationGracePeriodSeconds", 30) < 120:
            yield f"{pod.name}: less than 120 s to end"
    if (spec := job(objects)) is None:
        return
    variables = (yaml.safe_load(spec.get("runtimeEnvYAML") or "{}") or {}).get("env_vars", {})
    patience = float(variables.get("RAY_JOB_STOP_WAIT_TIME_S", 3))
    try:
        needed = config(objects).run.term_limit
    except (ConfigError, KeyError, ValueError):
        return  # which `entry_point` reports
    if patience < needed + 30:
        yield f"Ray kills the driver {patience:g} s after SIGTERM, but run.term_limit is {needed:g} s"


@rule
def entry_point(objects: Objects) -> Iterator[str]:
    """The command loads as a config, resumes, and writes where every attempt and every process can read it."""
    try:
        cfg = config(objects)
    except (ConfigError, KeyError, ValueError) as error:
        yield f"{type(error).__name__}: {error}"
        return
    if job(objects) is None:
        return
    if cfg.run.name is None:
        yield "no run.name: a retry would begin anew"
    if cfg.run.checkpoint_every == 0:
        yield "run.checkpoint_every is 0: a retry would begin anew"
    for pod in ray_nodes(objects):
        if "persistentVolumeClaim" not in pod.volume(cfg.run.root):
            yield f"{pod.name}: run.root={cfg.run.root} is no volume there"
    if (cfg.run.checkpoint_dir or "").startswith(("s3:", "gs:")):
        endpoint = ("8.8.8.8", 443)
        yield from (f"{p.name}: no way to {endpoint}" for p in ray_nodes(objects) if not leaves(objects, p, *endpoint))
    if any(":" in (d or "") for d in (cfg.data.dir,)) and not leaves(objects, head(objects), "8.8.8.8", 443):
        yield f"data.dir={cfg.data.dir}, but the head has no way to it"


@rule
def secrets(objects: Objects) -> Iterator[str]:
    """Keys come from Secrets, which are not in manifests."""
    yield from (f"Secret {o['metadata']['name']} in a manifest" for o in of_kind(objects, "Secret"))
    for pod in pods(objects):
        for variable in pod.container.get("env", []):
            private = re.search(r"KEY|TOKEN|SECRET|PASSW|CREDENTIAL", variable["name"])
            if private and "secretKeyRef" not in variable.get("valueFrom", {}):
                yield f"{pod.name}: {variable['name']} is not from a Secret"
    for o in of_kind(objects, "ConfigMap"):
        for name, text in o["data"].items():
            # A header with a secret reads $NAME, which is filled from the environment of the reward process.
            values = re.findall(r"(?im)(?:authorization|api[-_]?key|password)\W*?:(.+)$", text)
            yield from (f"{o['metadata']['name']}/{name}: holds a secret" for value in values if "$" not in value)


@rule
def volumes(objects: Objects) -> Iterator[str]:
    """What is mounted exists, and what is written to is writable."""
    known = {(o["kind"], o["metadata"]["name"]) for o in objects}
    for pod in pods(objects):
        here = {v["name"]: v for v in pod.spec.get("volumes", [])}
        for mount in pod.container.get("volumeMounts", []):
            if mount["name"] not in here:
                yield f"{pod.name}: mounts no such volume {mount['name']}"
        for volume in here.values():
            if "configMap" in volume and ("ConfigMap", volume["configMap"]["name"]) not in known:
                yield f"{pod.name}: no ConfigMap {volume['configMap']['name']}"
            claim = volume.get("persistentVolumeClaim", {}).get("claimName")
            if claim and ("PersistentVolumeClaim", claim) not in known:
                yield f"{pod.name}: no claim {claim}"
        home = next((e.get("value") for e in pod.container.get("env", []) if e["name"] == "HOME"), None)
        for path in ("/tmp", home):
            if path is None or "emptyDir" not in pod.volume(path) or "sizeLimit" not in pod.volume(path)["emptyDir"]:
                yield f"{pod.name}: {path or 'HOME'} is no bounded emptyDir"
    for o in of_kind(objects, "PersistentVolumeClaim"):
        if o["spec"]["accessModes"] != ["ReadWriteMany"]:
            yield f"{o['metadata']['name']}: the pods are on several nodes"


@rule
def placement(objects: Objects) -> Iterator[str]:
    """Every process of every stage finds a worker with its CPUs, GPUs and custom resources."""
    try:
        cfg = config(objects)
    except (ConfigError, KeyError, ValueError):
        return  # which `entry_point` reports
    nodes = []
    for pod in workers(objects):
        assert pod.group is not None
        own = {name: amount(value) for name, value in pod.group.get("resources", {}).items()}
        own |= {"CPU": amount(pod.limits.get("cpu", 0)), "GPU": amount(pod.limits.get("nvidia.com/gpu", 0))}
        nodes += [own] * pod.count
    used = {name for role in planner.roles(cfg) for name in role.resources}
    offered = {name for node in nodes for name in node} - {"CPU", "GPU"}
    yield from (f"no group has the resource {name!r}" for name in sorted(used - offered))
    yield from (f"nobody asks for the resource {name!r}" for name in sorted(offered - used) if job(objects))
    for stage in dict.fromkeys(role.stage for role in planner.roles(cfg)):
        free = [dict(node) for node in nodes]
        parts = [role for role in planner.roles(cfg) if role.stage == stage]
        for role in sorted(parts, key=lambda r: (-r.gpus, -r.cpus)):
            need = {"CPU": role.cpus, "GPU": role.gpus} | role.resources
            for _ in range(role.processes):
                fits = (n for n in free if all(n.get(k, 0) >= v - 1e-9 for k, v in need.items()))
                if (node := next(fits, None)) is None:
                    yield f"stage {stage}: no place for {role.role} ({need})"
                    break
                for name, value in need.items():
                    node[name] = node.get(name, 0) - value


@rule
def disruption(objects: Objects) -> Iterator[str]:
    """The head is not evicted for a node's sake."""
    for budget in of_kind(objects, "PodDisruptionBudget"):
        spec = budget["spec"]
        if not isinstance(spec.get("minAvailable"), int):
            yield "pods of a custom resource need minAvailable, as a number"
        elif matches(spec["selector"], head(objects).labels) and spec["minAvailable"] >= 1:
            return
    yield "no PodDisruptionBudget keeps the head"


@rule
def spot(objects: Objects) -> Iterator[str]:
    """Where workers may be taken away: the head may not, checkpoints are elsewhere, generators can be replaced."""
    keys = {
        e["key"]: e["values"]
        for pod in workers(objects)
        for term in _required(pod)
        for e in term["matchExpressions"]
        if e["operator"] == "In"
    }
    if not keys:
        return
    avoided = {
        e["key"]: e["values"] for term in _required(head(objects)) for e in term["matchExpressions"]
        if e["operator"] == "NotIn"
    }  # fmt: skip
    if avoided != keys or len(_required(head(objects))) != 1:
        yield f"the head may be on a spot node: it avoids {avoided}"
    cfg = config(objects)
    if cfg.weight_sync.transport != "object_store":
        yield f"weight_sync.transport={cfg.weight_sync.transport} cannot take in a generator that was started anew"
    if not (cfg.run.checkpoint_dir or "").startswith(("s3:", "gs:")) or cfg.run.checkpoint_every > 20:
        yield "checkpoints are rare, or not in an object store"


def _required(pod: Pod) -> list[dict[str, Any]]:
    affinity = pod.spec.get("affinity", {}).get("nodeAffinity", {})
    return affinity.get("requiredDuringSchedulingIgnoredDuringExecution", {}).get("nodeSelectorTerms", [])


@rule
def queue(objects: Objects) -> Iterator[str]:
    """What Kueue asks of a job that it is to start."""
    o = the(objects, "RayJob", "RayCluster")
    name = o["metadata"].get("labels", {}).get("kueue.x-k8s.io/queue-name")
    queues = {q["metadata"]["name"] for q in of_kind(objects, "LocalQueue")}
    if {name} - {None} != queues:
        yield f"queue {name} is not among {sorted(queues)}"
    if name and len(workers(objects)) > 17:
        yield "Kueue takes at most 17 worker groups"


@rule
def monitoring(objects: Objects) -> Iterator[str]:
    """What is scraped is there and may be reached; alerts are on metrics that are exported."""
    prometheus = {"app.kubernetes.io/name": "prometheus"}
    for monitor in of_kind(objects, "PodMonitor"):
        selected = [pod for pod in pods(objects) if matches(monitor["spec"]["selector"], pod.labels)]
        ports = {name: port for pod in selected for name, port in pod.ports.items()}
        for endpoint in monitor["spec"]["podMetricsEndpoints"]:
            if endpoint["port"] not in ports:
                yield f"{monitor['metadata']['name']}: no pod has a port {endpoint['port']}"
            for pod in selected:
                port = pod.ports.get(endpoint["port"])
                if port and not enters(objects, prometheus, "monitoring", pod, port):
                    yield f"{monitor['metadata']['name']}: Prometheus may not reach {pod.name}:{port}"
        if (spec := job(objects)) and f"run.prometheus_port={ports.get('rlhf-metrics')}" not in spec["entrypoint"]:
            yield "the driver does not export its metrics on the port `rlhf-metrics`"
    for group in (g for o in of_kind(objects, "PrometheusRule") for g in o["spec"]["groups"]):
        for alert in group["rules"]:
            unknown = set(re.findall(r"\brlhf_\w+", alert["expr"])) - exported()
            yield from (f"{alert['alert']}: nobody exports {metric}" for metric in sorted(unknown))


@cache
def exported() -> set[str]:
    """Prometheus names of the metrics that docs/operations.md lists; test_docs.py checks those against the code."""
    page = (ROOT / "docs" / "operations.md").read_text()
    figures = re.findall(r"`((?:rollout|train|timing|perf|weight_sync|eval)/[a-z]\w*)`", page)
    return {prometheus_name(f) for f in figures} | {"rlhf_steps_total", "rlhf_step"}


# What NetworkPolicies allow

#: Traffic that must pass, and nothing else: (from, to, port). Names of pods as in `pods`, or of the outside below.
OUTSIDE: dict[str, tuple[dict[str, str], str]] = {
    "operator": ({"app.kubernetes.io/component": "kuberay-operator"}, "kuberay"),
    "prometheus": ({"app.kubernetes.io/name": "prometheus"}, "monitoring"),
    "dns": ({"k8s-app": "kube-dns"}, "kube-system"),
    "neighbour": ({"app": "shell"}, "rlhf"),
    "stranger": ({"app": "shell"}, "default"),
}


def matches(selector: dict[str, Any], labels: dict[str, str]) -> bool:
    assert selector.keys() <= {"matchLabels"}, selector
    return all(labels.get(k) == v for k, v in selector.get("matchLabels", {}).items())


def enters(objects: Objects, labels: dict[str, str], namespace: str, to: Pod, port: int) -> bool:
    """Whether a pod with ``labels`` in ``namespace`` may open ``to:port``."""
    rules = [r for p in _policies(objects, to.labels, "Ingress") for r in p["spec"].get("ingress", [])]
    return any(_peer(objects, r["from"], labels, namespace) and _port(r, port) for r in rules)


def exits(objects: Objects, own: Pod, labels: dict[str, str], namespace: str, port: int) -> bool:
    """Whether ``own`` may open ``port`` of a pod with ``labels`` in ``namespace``."""
    rules = [r for p in _policies(objects, own.labels, "Egress") for r in p["spec"].get("egress", [])]
    return any(_peer(objects, r["to"], labels, namespace) and _port(r, port) for r in rules)


def leaves(objects: Objects, own: Pod, address: str, port: int) -> bool:
    """Whether ``own`` may open ``address:port`` outside the cluster."""
    rules = [r for p in _policies(objects, own.labels, "Egress") for r in p["spec"].get("egress", [])]
    inside = lambda block: ipaddress.ip_address(address) in ipaddress.ip_network(block)
    blocks = [(peer["ipBlock"], r) for r in rules for peer in r["to"] if "ipBlock" in peer]
    return any(inside(b["cidr"]) and not any(map(inside, b.get("except", []))) and _port(r, port) for b, r in blocks)


def _policies(objects: Objects, labels: dict[str, str], direction: str) -> Objects:
    policies = of_kind(objects, "NetworkPolicy")
    found = [p for p in policies if direction in p["spec"]["policyTypes"] and matches(p["spec"]["podSelector"], labels)]
    # No policy at all would let everything through.
    return found or [{"spec": {"ingress": [{"from": [{}]}], "egress": [{"to": [{}]}]}}]


def _peer(objects: Objects, peers: list[dict[str, Any]], labels: dict[str, str], namespace: str) -> bool:
    own = the(objects, "Namespace")["metadata"]["name"]
    for peer in peers:
        if "ipBlock" in peer:
            continue
        of_namespace = {"kubernetes.io/metadata.name": namespace}
        here = matches(peer["namespaceSelector"], of_namespace) if "namespaceSelector" in peer else namespace == own
        if peer == {} or (here and matches(peer.get("podSelector", {}), labels)):
            return True
    return False


def _port(rule: dict[str, Any], port: int) -> bool:
    return "ports" not in rule or port in [p["port"] for p in rule["ports"]]
