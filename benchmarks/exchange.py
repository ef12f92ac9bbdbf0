"""What it costs to hand rollouts from one process to another: Arrow chunks beside lists, padded tensors and a memcpy.

    python -m benchmarks.exchange                       # 64 kB to 1 GB, within a node and between two
    python -m benchmarks.exchange --sizes 0.064 16 --nodes 1

One actor holds samples with log-normal lengths, another one reads every number of what it gets, once. ``seconds`` is
from the driver's call until the answer is there; ``microseconds``, ``gb_per_second`` and ``copies`` (of the payload
into fresh memory) are those beyond the time that the reading alone takes. ``zero_copy`` is 1 where all that was read
lies in the store that the processes of a node share. Three forms of the same samples, with the same payload:

arrow    a table of ``schema.ROLLOUT``, as our generators send it
lists    Python lists of numbers, pickled
padded   a dict of tensors ``[samples, longest]``

Two nodes are two raylets on this machine: the bytes go through gRPC and the loopback device into a second object store.
"""

from __future__ import annotations

import argparse
import itertools
import os
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import ray

from benchmarks.results import Report, Run
from benchmarks.weight_sync import copy_seconds
from rlhf_dist.actors.generator import rollout_table

SIZES = (0.064, 1.0, 16.0, 128.0, 1000.0)
#: Of the other forms: more would take gigabytes as Python objects, and ten times its size padded.
LARGEST_OTHERS = 128.0
KINDS = ("arrow", "lists", "padded")
PROMPT, MEDIAN, SIGMA, LONGEST = 128, 256, 1.0, 4096
#: Bytes of a token of a response in ``schema.ROLLOUT``: id, log-probability, version, mask.
TOKEN_BYTES = 13
REPORT = Report(
    "exchange",
    case=("nodes", "mb", "kind"),
    figures=("seconds", "microseconds", "gb_per_second", "copies", "sent_mb", "zero_copy", "spilled_mb"),
)


def main() -> None:
    parser = REPORT.parser(__doc__, repetitions=7)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--sizes", type=float, nargs="+", default=SIZES, metavar="MB")
    parser.add_argument("--nodes", type=int, nargs="+", choices=[1, 2], default=[1, 2])
    args = parser.parse_args()
    if args.table:
        REPORT.show(REPORT.read(args))
        return
    if args.small:
        args.sizes, args.nodes, args.repetitions = [0.064], [1], 1
    runs = [run for nodes in args.nodes for run in measure(nodes, args.sizes, args.repetitions)]
    lengths = {"prompt": PROMPT, "median": MEDIAN, "sigma": SIGMA, "longest": LONGEST}
    REPORT.finish(runs, {"lengths": lengths, "largest_others_mb": LARGEST_OTHERS}, args)


def measure(nodes: int, sizes: Sequence[float], repetitions: int) -> Iterator[Run]:
    with actors(nodes, max(sizes)) as (source, reader, spill):
        for mb in sizes:
            ray.get(source.make.remote(mb))
            for repetition, kind in itertools.product(range(-1, repetitions), KINDS):
                if kind != "arrow" and mb > LARGEST_OTHERS:
                    continue
                run = exchange(source, reader, kind) | {"spilled_mb": megabytes(spill)}
                if repetition >= 0:  # the first of each compiles, and maps the store's pages
                    yield {"nodes": nodes, "mb": mb, "kind": kind, "repetition": repetition, **run}


def exchange(source: Any, reader: Any, kind: str) -> Run:
    """One object from source to reader."""
    started = time.perf_counter()
    sent = source.give.remote(kind)
    found = ray.get(reader.read.remote(sent))
    seconds = time.perf_counter() - started
    beyond = seconds - found["reading"]
    return {
        "seconds": seconds,
        "reading": found["reading"],
        "microseconds": 1e6 * beyond,
        "gb_per_second": found["payload"] / 1e9 / beyond,
        "copies": beyond / copy_seconds(found["payload"]),
        "sent_mb": found["sent"] / 1e6,
        "zero_copy": found["shared"],
    }


@contextmanager
def actors(nodes: int, largest_mb: float) -> Iterator[tuple[Any, Any, Path]]:
    """Source and reader, on as many nodes, and the folder where Ray spills to."""
    from ray.cluster_utils import Cluster

    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    # A payload of one size, and the same padded: up to ten times as large.
    store = int(min(12 * largest_mb, 6000) * 1e6) + 200 * 2**20
    node: dict[str, Any] = {"num_cpus": 1, "object_store_memory": store}
    cluster = Cluster(initialize_head=True, head_node_args={**node, "resources": {"node1": 1}})
    if nodes == 2:
        cluster.add_node(**node, resources={"node2": 1})
    try:
        context: Any = ray.init(address=cluster.address, log_to_driver=False)
        cluster.wait_for_nodes()
        source: Any = ray.remote(Source).options(num_cpus=0, resources={"node1": 0.1}).remote()
        reader: Any = ray.remote(Reader).options(num_cpus=0, resources={f"node{nodes}": 0.1}).remote()
        ray.get([source.ready.remote(), reader.ready.remote()])
        yield source, reader, Path(context.address_info["session_dir"])
    finally:
        ray.shutdown()
        cluster.shutdown()


class Source:
    """Has the same samples in three forms."""

    def ready(self) -> None:
        self.forms: dict[str, Any] = {}

    def make(self, mb: float) -> None:
        """Samples of ``mb`` in all."""
        samples = make_samples(int(mb * 1e6))
        self.forms = {"arrow": rollout_table(samples)}
        if mb <= LARGEST_OTHERS:
            self.forms |= {"lists": as_lists(samples), "padded": padded(samples)}

    def give(self, kind: str) -> Any:
        return self.forms[kind]


class Reader:
    """Reads what it gets."""

    def ready(self) -> None:
        import torch

        torch.set_num_threads(1)

    def read(self, value: Any) -> dict[str, Any]:
        """Seconds of the reading, bytes that came and bytes that count, and whether they lie in the shared store."""
        started = time.perf_counter()
        arrays = list(arrays_of(value))
        checksum = sum(float(array.sum(dtype=np.float64)) for array in arrays)
        reading = time.perf_counter() - started
        assert np.isfinite(checksum)
        stores = store_mappings()
        return {
            "reading": reading,
            "sent": sum(array.nbytes for array in arrays),
            "payload": payload_bytes(value),
            "shared": float(all(lies_in(stores, array) for array in arrays)),
        }


def make_samples(nbytes: int) -> list[SimpleNamespace]:
    """Finished samples, as the engine gives them out; their numbers are random, their lengths log-normal."""
    rng = np.random.default_rng(0)
    samples: list[SimpleNamespace] = []
    total = 0
    while total < nbytes:
        n = int(np.clip(MEDIAN * np.exp(SIGMA * rng.standard_normal()), 1, LONGEST))
        samples.append(
            SimpleNamespace(
                prompt_id=len(samples),
                group_id=len(samples),
                sample_index=0,
                prompt_ids=rng.integers(0, 50_000, PROMPT, np.int32),
                response_ids=rng.integers(0, 50_000, n, np.int32),
                logprobs=rng.standard_normal(n, np.float32),
                policy_versions=np.full(n, 3, np.int32),
                finish_reason="stop",
            )
        )
        total += 4 * PROMPT + TOKEN_BYTES * n
    return samples


def as_lists(samples: Sequence[SimpleNamespace]) -> dict[str, list[list[float]]]:
    names = ("prompt_ids", "response_ids", "logprobs", "policy_versions")
    columns = {name: [getattr(s, name).tolist() for s in samples] for name in names}
    return columns | {"mask": [[1] * len(s.response_ids) for s in samples]}


def padded(samples: Sequence[SimpleNamespace]) -> dict[str, Any]:
    """``[samples, longest]`` tensors, as trainers without ragged columns hold them."""
    import torch
    from torch.nn.utils.rnn import pad_sequence

    stack = lambda rows: pad_sequence([torch.from_numpy(row) for row in rows], batch_first=True)
    columns = {name: stack([getattr(s, name) for s in samples]) for name in ("prompt_ids", "response_ids", "logprobs")}
    versions = stack([s.policy_versions for s in samples])
    return columns | {"policy_versions": versions, "mask": stack([np.ones(len(s.logprobs), np.uint8) for s in samples])}


def arrays_of(value: Any) -> Iterator[np.ndarray]:
    """All numbers of any form; of lists, arrays that have to be made first, which is how they are used."""
    if isinstance(value, pa.Table):
        for column in value.columns:
            for chunk in column.chunks:
                flat = chunk.flatten() if pa.types.is_list(chunk.type) else chunk
                if pa.types.is_dictionary(flat.type):
                    flat = flat.indices
                yield flat.to_numpy(zero_copy_only=True)
    else:
        for rows in value.values():
            yield from (np.asarray(row) for row in rows) if isinstance(rows, list) else [rows.numpy()]


def payload_bytes(value: Any) -> int:
    """Bytes of the prompts and responses, without padding: the same in every form."""
    if isinstance(value, pa.Table):
        tokens, rows = len(value["response_ids"].combine_chunks().flatten()), value.num_rows
    elif isinstance(value["mask"], list):
        tokens, rows = sum(map(len, value["mask"])), len(value["mask"])
    else:
        tokens, rows = int(value["mask"].sum()), len(value["mask"])
    return TOKEN_BYTES * tokens + 4 * PROMPT * rows


def store_mappings() -> list[range]:
    """Where this process maps the object store, which the raylet and all others on the node map too."""
    lines = [line.split() for line in Path("/proc/self/maps").read_text().splitlines() if "plasma" in line]
    return [range(*(int(end, 16) for end in line[0].split("-"))) for line in lines]


def lies_in(mappings: Sequence[range], array: np.ndarray) -> bool:
    return array.nbytes == 0 or any(array.ctypes.data in mapping for mapping in mappings)


def megabytes(session: Path) -> float:
    """Of objects that Ray has on disk, because its stores were full."""
    return sum(file.stat().st_size for file in session.glob("ray_spilled_objects*/*")) / 1e6


if __name__ == "__main__":
    main()
