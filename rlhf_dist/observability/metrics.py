"""Figures of every step: appended to ``metrics.jsonl`` and shown on a Prometheus endpoint.

A line of ``metrics.jsonl`` reads ``{"step": 3, "stage": "ppo", "time": 1700000000.1, "rollout/reward_mean": 0.4}``.
A figure that is not finite is ``null`` there, and a further key ``nonfinite`` says what it was
(``{"train/kl": "nan"}``); Prometheus gets the NaN or infinity itself.

In Prometheus ``rollout/reward_mean`` is the gauge ``rlhf_rollout_reward_mean{stage="ppo"}``; durations end in
``_seconds``, lengths in ``_tokens``. ``rlhf_steps_total`` counts the steps of each stage.
"""

from __future__ import annotations

import errno
import json
import math
import re
import socket
import time
from collections.abc import Mapping
from pathlib import Path
from threading import Thread
from types import TracebackType
from typing import Any
from wsgiref.simple_server import WSGIServer

from prometheus_client import CollectorRegistry, Counter, Gauge, start_http_server

RESERVED = ("step", "stage", "time", "nonfinite")


class MetricsWriter:
    """Appends to ``path`` and, with a port, serves the newest figures on ``http://host:port/metrics``.

    Args:
        path: ``metrics.jsonl``; made if missing, continued if there.
        prometheus_port: port of the endpoint; 0 turns it off.
        prometheus_host: address that it listens on.

    Raises:
        ValueError: the port cannot be opened; names ``run.prometheus_port`` or ``run.prometheus_host``.
    """

    def __init__(self, path: str | Path, prometheus_port: int = 0, prometheus_host: str = "127.0.0.1") -> None:
        # Not the library's global registry: vLLM and Ray put their own metrics there.
        self.registry = CollectorRegistry()
        self._steps = Counter("rlhf_steps", "Steps that were logged", ["stage"], registry=self.registry)
        self._step = Gauge("rlhf_step", "Number of the newest step", ["stage"], registry=self.registry)
        self._gauges: dict[str, Gauge] = {}
        self._exported = {"rlhf_step", "rlhf_steps"}
        self._server = _serve(self.registry, prometheus_port, prometheus_host) if prometheus_port else None
        path = Path(path)
        torn = path.exists() and path.stat().st_size > 0 and not path.read_bytes().endswith(b"\n")
        self._file = open(path, "a", encoding="utf-8")  # noqa: SIM115
        if torn:  # a killed run left half a line; do not glue the next one to it
            self._file.write("\n")

    def log(self, step: int, stage: str, metrics: Mapping[str, float]) -> None:
        """Write one line and update the gauges.

        Args:
            step: number of the step within the stage.
            stage: ``sft``, ``reward_model``, ``ppo`` ...; a label in Prometheus.
            metrics: figures by name, such as ``rollout/reward_mean``. ``timing/*`` are seconds.

        Raises:
            ValueError: a reserved name, or a value that is no number.
        """
        record: dict[str, Any] = {"step": int(step), "stage": stage, "time": round(time.time(), 3)}
        numbers = {name: _number(name, value) for name, value in metrics.items()}
        record |= {name: value if math.isfinite(value) else None for name, value in numbers.items()}
        odd = {name: str(value) for name, value in numbers.items() if not math.isfinite(value)}
        if odd:
            record["nonfinite"] = odd
        self._file.write(json.dumps(record, allow_nan=False) + "\n")
        self._file.flush()
        self._steps.labels(stage).inc()
        self._step.labels(stage).set(step)
        for name, value in numbers.items():
            self._gauge(name).labels(stage).set(value)

    def close(self) -> None:
        """Close the file and free the port. May be called twice."""
        self._file.close()
        if self._server is not None:
            server, thread = self._server
            server.shutdown()
            server.server_close()
            thread.join()
            self._server = None

    def __enter__(self) -> MetricsWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()

    def _gauge(self, name: str) -> Gauge:
        if name not in self._gauges:
            exported = prometheus_name(name)
            # Two names may differ only in characters that Prometheus has not: keep both.
            while exported in self._exported:
                exported += "_2"
            self._exported.add(exported)
            self._gauges[name] = Gauge(exported, f"{name} of the newest step", ["stage"], registry=self.registry)
        return self._gauges[name]


def prometheus_name(name: str) -> str:
    """``timing/generate`` -> ``rlhf_timing_generate_seconds``: prefix, legal characters, unit at the end."""
    exported = "rlhf_" + re.sub(r"[^a-zA-Z0-9_]", "_", name)
    if name.startswith("timing/"):
        unit = "_seconds"
    elif name == "perf/throughput":
        unit = "_tokens_per_second"
    elif re.search(r"_length(_\w+)?$", name):
        unit = "_tokens"
    else:
        unit = ""
    return exported if exported.endswith(unit) else exported + unit


def read_metrics(path: str | Path) -> list[dict[str, Any]]:
    """The records of ``metrics.jsonl`` in the order of their first appearance; [] if there is no file.

    A resumed run logs some steps again: the newest record of a stage and step counts. A torn line, which a killed
    run leaves, is passed over.
    """
    path = Path(path)
    records: dict[tuple[str, int], dict[str, Any]] = {}
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines() if path.exists() else []:
        try:
            record = json.loads(line)
        except json.JSONDecodeError:
            continue
        if isinstance(record, dict) and "stage" in record and "step" in record:
            records[record["stage"], record["step"]] = record
    return list(records.values())


def _number(name: str, value: Any) -> int | float:
    if name in RESERVED:
        raise ValueError(f"metric {name!r}: this name is a key of every record; choose another, such as 'train/{name}'")
    try:
        return value if isinstance(value, int) else float(value)
    except (TypeError, ValueError):
        raise ValueError(f"metric {name!r} must be a number, got {type(value).__name__} {value!r}") from None


def _serve(registry: CollectorRegistry, port: int, host: str) -> tuple[WSGIServer, Thread]:
    try:
        return start_http_server(port, addr=host, registry=registry)
    except OSError as error:
        if isinstance(error, socket.gaierror) or error.errno == errno.EADDRNOTAVAIL:
            raise ValueError(
                f"run.prometheus_host={host!r} is no address of this machine ({error}); use 127.0.0.1 for this "
                "machine only, 0.0.0.0 for all networks"
            ) from error
        raise ValueError(
            f"run.prometheus_port={port}: cannot listen on {host}:{port} ({error}); is another run using it? Choose "
            "another port, or 0 to turn the endpoint off"
        ) from error
