"""Run a command on the head of ``cluster/namespaces.sh``, and say what each node's cable has carried meanwhile.

    cluster/namespaces.sh -n 3 -k RUNS -- python tests/on_nodes.py REPORT [--cut NODE METRICS STEP] -- COMMAND...

Args:
    REPORT: JSON with the exit code, and of every node the bytes that it received and sent.
    --cut: takes the cable of NODE away once METRICS has a line of PPO's STEP.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import ray

from rlhf_dist.observability.metrics import read_metrics


@ray.remote(num_cpus=0)
def carried() -> tuple[int, int]:
    """Bytes that this node's interface has received and sent."""
    for line in Path("/proc/self/net/dev").read_text().splitlines():
        name, _, figures = line.partition(":")
        if name.strip() == "eth0":
            columns = figures.split()
            return int(columns[0]), int(columns[8])
    raise RuntimeError("this node has no interface eth0")


def traffic() -> dict[str, tuple[int, int]]:
    """Of every node that is alive."""
    names = [name for node in ray.nodes() if node["Alive"] for name in node["Resources"] if name.startswith("node")]
    names = [name for name in names if not name.startswith("node:")]
    return {name: ray.get(carried.options(resources={name: 0.01}).remote(), timeout=60) for name in names}


def main() -> int:
    split = sys.argv.index("--")
    arguments, command = sys.argv[1:split], sys.argv[split + 1 :]
    report = Path(arguments[0])
    ray.init(address=os.environ["RAY_ADDRESS"], logging_level="error", log_to_driver=False)
    before = traffic()
    program = subprocess.Popen(command)
    if "--cut" in arguments:
        node, metrics, step = arguments[2:5]
        while program.poll() is None and not any(
            r["stage"] == "ppo" and r["step"] >= int(step) for r in read_metrics(Path(metrics))
        ):
            time.sleep(0.1)
        subprocess.run(["ray-node", "cut", node], check=True)
    code = program.wait()
    after = traffic()
    moved = {
        name: {"received": after[name][0] - before[name][0], "sent": after[name][1] - before[name][1]} for name in after
    }
    report.write_text(json.dumps({"code": code, "nodes": moved}))
    return code


if __name__ == "__main__":
    sys.exit(main())
