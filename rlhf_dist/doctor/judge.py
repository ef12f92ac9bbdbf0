"""What the answers of the nodes mean. Pure functions: what was found on which node to findings."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from rlhf_dist.doctor.probes import Machine

#: Seconds by which clocks may differ: traces and logs of several nodes are read side by side.
CLOCK_LIMIT = 1.0
#: What Ray recommends, and warns below half of it.
OPEN_FILES = 8192
#: Share of a disk beyond which Ray spills no objects to it.
DISK_LIMIT = 0.95
#: Share of a node's memory beyond which Ray ends processes.
MEMORY_LIMIT = 0.95
#: Bytes for logs, models and rollouts of a small run.
SMALL_RUN = 2 * 2**30

GB = 2**30
REQUIRED = ("python", "ray", "torch", "vllm", "transformers", "deepspeed", "pyarrow", "source of rlhf_dist")


@dataclass(frozen=True)
class Finding:
    """One line of the examination."""

    level: Literal["ok", "warning", "fault"]
    """fault: a run would be stopped by it. warning: it would not, but may go worse than it could."""
    check: str
    found: str
    """What, and on which node."""
    advice: str = ""
    """What to do."""

    def __str__(self) -> str:
        return f"{self.found}. {self.advice}" if self.advice else self.found


def spread(values: Mapping[str, Any]) -> str:
    """``2.13 on A, B; 2.12 on C`` of what each of A, B and C has."""
    by_value: dict[str, list[str]] = {}
    for name, value in values.items():
        by_value.setdefault(str(value), []).append(name)
    if len(by_value) == 1 and len(values) > 1:
        return f"{next(iter(by_value))} on all nodes"
    return "; ".join(f"{value} on {', '.join(names)}" for value, names in by_value.items())


def versions(found: Mapping[str, Mapping[str, str]]) -> list[Finding]:
    """Versions of the libraries on every node, and of the driver."""
    faults = []
    for library in REQUIRED:
        values = {name: of.get(library, "none") for name, of in found.items()}
        if len(set(values.values())) > 1:
            advice = "Install the same on all nodes (make setup, or one image)"
            faults.append(Finding("fault", "versions", f"{library} differs: {spread(values)}", advice))
        elif "none" in values.values():
            faults.append(Finding("fault", "versions", f"{library} is installed nowhere", "Install it: make setup"))
    if faults:
        return faults
    first = next(iter(found.values()))
    return [Finding("ok", "versions", ", ".join(f"{name} {first[name]}" for name in REQUIRED))]


def files(found: Mapping[str, list[str]]) -> list[Finding]:
    """Problems of ``planner.check_files`` on every node."""
    where: dict[str, list[str]] = {}
    for name, problems in found.items():
        for problem in problems:
            where.setdefault(problem, []).append(name)
    advice = "Any node may be asked to read it: put it on a folder that all nodes see, or copy it to all of them"
    faults = []
    for problem, names in where.items():
        on = "every node" if len(names) == len(found) else ", ".join(names)
        faults.append(Finding("fault", "files", f"{problem} (on {on})", advice))
    return faults or [Finding("ok", "files", "models, data and functions of the config are on every node")]


def folder(key: str, path: str, found: Mapping[str, str]) -> list[Finding]:
    """Whether all nodes see, and can write to, the same folder; ``found`` has what is wrong on each node."""
    advice = "All nodes must mount the same file system there, writable by the user that runs Ray"
    faults = [Finding("fault", key, f"{path}: {name} {problem}", advice) for name, problem in found.items() if problem]
    alone = "writable" if len(found) == 1 else f"the same folder on {len(found)} nodes, writable from each"
    return faults or [Finding("ok", key, f"{path}: {alone}")]


def url(key: str, path: str, found: Mapping[str, str]) -> list[Finding]:
    """Whether every node can read and write at a URL, as far as its packages go; ``found`` has what each lacks."""
    lacking = {name: problem for name, problem in found.items() if problem}
    if lacking:
        advice = "Install it on all nodes (the extra cloud has s3fs and gcsfs)"
        return [Finding("fault", key, f"{path}: {spread(lacking)}", advice)]
    return [Finding("ok", key, f"{path}: its file system is installed on every node; nothing was written there")]


def disk(key: str, path: str, free: int, needed: float | None) -> list[Finding]:
    """Bytes that are free at ``path``; ``needed`` by the checkpoints, if that is known."""
    room = f"{free / GB:.1f} GB free at {path}{f', checkpoints take about {needed / GB:.1f} GB' if needed else ''}"
    if free < SMALL_RUN + (needed or 0):
        return [Finding("warning", key, room, "Make room, choose another folder, or lower run.keep_last")]
    return [Finding("ok", key, room)]


def shared_memory(found: Mapping[str, Machine]) -> list[Finding]:
    warnings = [
        Finding(
            "warning",
            "shared memory",
            f"{name}: Ray keeps its object store of {m.store / GB:.1f} GB in {m.store_folder}, as /dev/shm has only "
            f"{m.shm / GB:.1f} GB",
            "Make /dev/shm larger (docker run --shm-size, an emptyDir of medium Memory), or the store smaller "
            "(ray start --object-store-memory)",
        )
        for name, m in found.items()
        if m.store_folder != "/dev/shm"
    ]
    stores = spread({name: f"{m.store / GB:.1f} of {m.shm / GB:.1f} GB" for name, m in found.items()})
    return warnings or [Finding("ok", "shared memory", f"object store in /dev/shm: {stores}")]


def memory(found: Mapping[str, Machine]) -> list[Finding]:
    warnings = [
        Finding(
            "warning",
            "memory",
            f"{name}: {m.memory_available / GB:.1f} of {m.memory / GB:.1f} GB are left",
            "End what else runs there; Ray ends processes of a node whose memory is nearly full",
        )
        for name, m in found.items()
        if m.memory_available < 2 * (1 - MEMORY_LIMIT) * m.memory
    ]
    least = min(found, key=lambda name: found[name].memory_available)
    left = f"{found[least].memory_available / GB:.1f} of {found[least].memory / GB:.1f} GB are left on {least}"
    return warnings or [Finding("ok", "memory", f"{left}{', the least of all nodes' if len(found) > 1 else ''}")]


def temp(found: Mapping[str, Machine]) -> list[Finding]:
    """Disk of Ray's temporary folder."""
    warnings = [
        Finding(
            "warning",
            "disk of Ray",
            f"{name}: {m.temp} has {m.temp_free / GB:.1f} of {m.temp_size / GB:.1f} GB free",
            "Make room, or give another folder (ray start --temp-dir); Ray spills no objects to a full disk",
        )
        for name, m in found.items()
        if m.temp_free < (1 - DISK_LIMIT) * m.temp_size or m.temp_free < SMALL_RUN
    ]
    least = min(found, key=lambda name: found[name].temp_free)
    return warnings or [
        Finding("ok", "disk of Ray", f"{found[least].temp_free / GB:.1f} GB free at {found[least].temp} of {least}")
    ]


def open_files(found: Mapping[str, Machine]) -> list[Finding]:
    advice = "Raise it before ray start: ulimit -n 65536"
    low = [
        Finding("warning", "open files", f"{name}: a process may open {m.open_files} files", advice)
        for name, m in found.items()
        if m.open_files < OPEN_FILES
    ]
    return low or [Finding("ok", "open files", f"{min(m.open_files for m in found.values())} or more for each process")]


def clock(found: Mapping[str, tuple[float, float]]) -> list[Finding]:
    """Seconds by which the clock of a node is ahead of the driver's, and how far that may be off."""
    warnings = [
        Finding(
            "warning",
            "clock",
            f"{name} is {abs(ahead):.3f} s {'ahead of' if ahead > 0 else 'behind'} the driver (±{bound:.3f} s)",
            "Start a time service (chrony, ntpd); traces and logs of the nodes cannot be compared",
        )
        for name, (ahead, bound) in found.items()
        if abs(ahead) - bound > CLOCK_LIMIT
    ]
    most = max(abs(ahead) + bound for ahead, bound in found.values())
    return warnings or [Finding("ok", "clock", f"at most {1000 * most:.1f} ms between a node and the driver")]


def ports(unreachable: Mapping[str, Mapping[str, str]], ranges: Mapping[str, tuple[int, int]]) -> list[Finding]:
    """What each node could not reach, and from which range systems choose ports."""
    chosen = spread({name: f"{low} to {high}" for name, (low, high) in ranges.items()})
    advice = f"Open all TCP ports between the nodes; learners, gloo and NCCL use any of {chosen}"
    faults = [
        Finding("fault", "ports", f"{name} does not reach {other} at {problem}", advice)
        for name, problems in unreachable.items()
        for other, problem in problems.items()
    ]
    if faults:
        return faults
    if len(ranges) == 1:
        return [Finding("ok", "ports", "one node, nobody to reach")]
    return [Finding("ok", "ports", f"every node reaches every other; ports are chosen from {chosen}")]


def gpus(found: Mapping[str, Mapping[str, Any]], wanted: Mapping[str, float]) -> list[Finding]:
    """What torch sees on the nodes, and how many GPUs Ray has on each of them."""
    findings = []
    for name, of in found.items():
        if len(of["devices"]) < wanted[name]:
            text = f"{name}: Ray has {wanted[name]:g} GPUs there, torch sees {len(of['devices'])} (CUDA {of['cuda']})"
            advice = "Install the GPU build (make EXTRAS=gpu,dev setup) and a driver that fits; see nvidia-smi there"
            findings.append(Finding("fault", "GPUs", text, advice))
        for i, device in enumerate(of["devices"]):
            if device["free"] < 0.9 * device["bytes"]:
                text = f"{name}: GPU {i} has {device['free'] / GB:.1f} of {device['bytes'] / GB:.1f} GB free"
                findings.append(Finding("warning", "GPUs", text, "End what else uses it (nvidia-smi)"))
    for what in ("driver", "cuda", "nccl"):
        values = {name: of[what] for name, of in found.items()}
        if len(set(values.values())) > 1:
            advice = "Ranks of one group must run the same NCCL; use one image and one driver"
            findings.append(
                Finding("warning" if what == "driver" else "fault", "GPUs", f"{what}: {spread(values)}", advice)
            )
    kinds = {name: _devices(of["devices"]) for name, of in found.items()}
    if not findings:
        of = next(iter(found.values()))
        about = f"driver {of['driver']}, CUDA {of['cuda']}, NCCL {of['nccl']}"
        findings.append(Finding("ok", "GPUs", f"{spread(kinds)}; {about}"))
    return findings


def _devices(devices: list[dict[str, Any]]) -> str:
    names = [f"{d['name']} of {d['bytes'] / GB:.0f} GB" for d in devices]
    return " + ".join(f"{names.count(name)} x {name}" for name in dict.fromkeys(names))
