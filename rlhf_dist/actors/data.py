"""Loading of data and models as Ray tasks: tables go into the object store, the driver gets references and counts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow as pa
import ray
from ray import ObjectRef

from rlhf_dist.actors.waiting import wait_for
from rlhf_dist.config import Config


@ray.remote(num_cpus=0, num_returns=2)
def _load(kind: str, *args: Any) -> tuple[pa.Table, dict[str, Any]]:
    from rlhf_dist.data import load

    return getattr(load, f"load_{kind}")(*args)


def load_table(kind: str, *args: Any) -> tuple[ObjectRef, dict[str, Any]]:
    """Reference and report of ``load_KIND`` in :mod:`rlhf_dist.data.load`."""
    table, report = _load.remote(kind, *args)
    return table, wait_for(report, f"loading {kind}")


@ray.remote(num_cpus=0)
def _prepare(cfg: Config, folder: str) -> dict[str, Any]:
    from rlhf_dist import models
    from rlhf_dist.data.load import make_tokenizer

    tokenizer_dir = str(Path(folder) / "tokenizer")
    report = make_tokenizer(cfg, tokenizer_dir)
    report["tokenizer_dir"] = tokenizer_dir
    report["model_path"] = cfg.model.path
    if cfg.model.path is None:
        special = {k: report[k] for k in ("bos_token_id", "eos_token_id", "pad_token_id")}
        model = models.build_policy(cfg.model.architecture, report["vocab_size"], special, cfg.seed)
        report["model_path"] = str(Path(folder) / "initial_model")
        model.save_pretrained(report["model_path"])
        report["parameters"] = model.num_parameters()
    return report


def prepare_model(cfg: Config, folder: str) -> dict[str, Any]:
    """Write tokenizer and, if it is to be built, the initial model to ``folder``; returns their paths and token ids."""
    return wait_for(_prepare.remote(cfg, folder), "preparing tokenizer and model")


@ray.remote(num_cpus=0)
def _concatenate(chunks: list[ObjectRef]) -> pa.Table:
    return pa.concat_tables(ray.get(chunks))


def concatenate(chunks: list[ObjectRef]) -> ObjectRef:
    """One table of several."""
    return _concatenate.remote(chunks)


@ray.remote(num_cpus=0)
def _join_columns(table: pa.Table, parts: list[ObjectRef], stage: str) -> pa.Table:
    from rlhf_dist.data.experience import join

    return join(table, ray.get(parts), stage)


def join_columns(table: ObjectRef, parts: list[ObjectRef], stage: str) -> ObjectRef:
    """``table`` with the columns that the ranks of a group computed, each for its own rows."""
    return _join_columns.remote(table, parts, stage)


@ray.remote(num_cpus=0)
def _write_arrow(table: pa.Table, path: str) -> None:
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    with pa.OSFile(path, "wb") as file, pa.ipc.new_file(file, table.schema) as writer:
        writer.write_table(table.combine_chunks())


def write_arrow(table: ObjectRef, path: str) -> None:
    """Write an Arrow file (Feather), in one piece; returns when it is written."""
    wait_for(_write_arrow.remote(table, path), f"writing {path}")


@ray.remote(num_cpus=0, num_returns=2)
def _read_arrow(path: str) -> tuple[pa.Table, int]:
    table = pa.ipc.open_file(pa.memory_map(path)).read_all()
    return table, table.num_rows


def read_arrow(path: str) -> tuple[ObjectRef, int]:
    """The table of :func:`write_arrow`, and its number of rows."""
    read: Any = _read_arrow
    table, rows = read.remote(path)
    return table, wait_for(rows, f"reading {path}")


@ray.remote(num_cpus=0)
def _read_parquet(path: str) -> pa.Table:
    import pyarrow.parquet as pq

    return pq.read_table(path)


def read_parquet(path: str) -> ObjectRef:
    """A table that an earlier run has written."""
    return _read_parquet.remote(path)
