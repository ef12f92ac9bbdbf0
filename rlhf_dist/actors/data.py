"""Loading of data and models as Ray tasks: tables go into the object store, the driver gets references and counts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow as pa
import ray
from ray import ObjectRef

from rlhf_dist.actors.waiting import wait_for
from rlhf_dist.config import CompareConfig, Config


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
    from rlhf_dist.data.load import make_tokenizer

    tokenizer_dir = str(Path(folder) / "tokenizer")
    report = make_tokenizer(cfg, tokenizer_dir)
    report["tokenizer_dir"] = tokenizer_dir
    report["model_path"] = cfg.initial_model
    if cfg.initial_model is None:
        from rlhf_dist import models  # imports torch

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
def _write_samples(chunks: list[ObjectRef], prompts: pa.Table, tokenizer_dir: str, folder: str) -> None:
    from rlhf_dist.data import compare
    from rlhf_dist.data.tokenization import load_tokenizer

    samples = compare.collect(pa.concat_tables(ray.get(chunks)), prompts, load_tokenizer(tokenizer_dir))
    compare.write(samples, Path(folder) / compare.SAMPLES_FILE)


def write_samples(chunks: list[ObjectRef], prompts: ObjectRef, tokenizer_dir: str, folder: str) -> None:
    """The responses in rollouts, by prompt, into ``folder``."""
    wait_for(_write_samples.remote(chunks, prompts, tokenizer_dir, folder), "writing samples")


@ray.remote(num_cpus=0)
def _ask_people(folder: str, cfg: CompareConfig, seed: int) -> int:
    from rlhf_dist.data import compare

    return compare.ask_people(Path(folder), cfg.pairs, seed)


def ask_people(folder: str, cfg: CompareConfig, seed: int) -> int:
    """Write what people are asked about the samples in ``folder``; returns the number of pairs."""
    return wait_for(_ask_people.remote(folder, cfg, seed), "writing pairs")


@ray.remote(num_cpus=0)
def _compare_samples(folder: str, cfg: CompareConfig, seed: int, source: str) -> int:
    from rlhf_dist.config.base import load_function
    from rlhf_dist.data import compare

    if cfg.by == "people":
        return compare.by_people(Path(folder), source)
    return compare.by_function(Path(folder), load_function(cfg.by or ""), cfg.pairs, cfg.label_noise, seed, source)


def compare_samples(folder: str, cfg: CompareConfig, seed: int, source: str) -> int:
    """Write the comparisons of the samples in ``folder``, with ``source`` in every row; returns the number of pairs."""
    return wait_for(_compare_samples.remote(folder, cfg, seed, source), "comparing samples")


@ray.remote(num_cpus=0)
def _join_columns(table: pa.Table, parts: list[ObjectRef], stage: str) -> pa.Table:
    from rlhf_dist.data.experience import join

    return join(table, ray.get(parts), stage)


def join_columns(table: ObjectRef, parts: list[ObjectRef], stage: str) -> ObjectRef:
    """``table`` with the columns that the ranks of a group computed, each for its own rows."""
    return _join_columns.remote(table, parts, stage)


@ray.remote(num_cpus=0)
def _preferred_responses(table: pa.Table, at_most: int, seed: int) -> pa.Table:
    from rlhf_dist.data.preferences import preferred_responses

    return preferred_responses(table, at_most, seed)


def preferred_responses(table: ObjectRef, at_most: int, seed: int) -> ObjectRef:
    """The better responses of at most so many comparisons or rankings, as ``schema.DEMONSTRATION``."""
    return _preferred_responses.remote(table, at_most, seed)


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
