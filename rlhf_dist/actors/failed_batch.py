"""The folder of an update that met a number that is not finite: what it read, its model, what ``replay`` needs.

batch.parquet     the rows that the update read, with all columns; ``row`` is their number in the run's table
pretrain.parquet  the same of the text of PPO-ptx, where there was some
model/            the model before the optimizer step that failed, in Hugging Face's format
about.json        :class:`About`; written last, so a folder without it is not complete
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
from pydantic import BaseModel, ValidationError

from rlhf_dist.data.nonfinite import RowFigures, Source, columns_not_finite, listed
from rlhf_dist.observability.files import write_atomically

MODEL = "model"
ABOUT = "about.json"


class About(BaseModel):
    """What ``about.json`` says."""

    stage: str
    step: int
    """PPO step; of the other stages the optimizer step. From 1."""
    role: str
    objective: str
    optimizer_step: int
    """In the update, from 1: the one that failed."""
    steps_taken: int
    """Optimizer steps that this learner took before, those of the same update among them."""
    message: str
    faulty: list[str]
    """Rows that are not finite alone, with their columns that are not."""
    minibatches: dict[str, list[list[int]]]
    """Of each table its rows for every optimizer step of the update."""
    spec: dict[str, Any]
    """``LearnerSpec``: the sections of the config that the objective reads, and what else the learner began with."""

    @classmethod
    def read(cls, folder: Path) -> About:
        """What the folder says of itself.

        Raises:
            ValueError: it is no such folder, or it is not complete.
        """
        path = folder / ABOUT
        if not path.is_file():
            raise ValueError(
                f"{folder} holds no failed batch: expected a folder with {ABOUT}, batch.parquet and {MODEL}/, as a run "
                "that stops at a number that is not finite writes to failed/step_N. Files of rollouts/ have no model, "
                "and cannot be replayed"
            )
        try:
            about = cls.model_validate_json(path.read_text())
        except ValidationError as error:
            raise ValueError(f"{path} is damaged: {error.errors()[0]['msg']}") from None
        missing = [n for n in (*map(_file, about.minibatches), f"{MODEL}/config.json") if not (folder / n).is_file()]
        if missing:
            raise ValueError(f"{folder} is not complete: {', '.join(missing)} is missing")
        return about

    @property
    def place(self) -> str:
        """Which optimizer step it was."""
        steps = len(next(iter(self.minibatches.values())))
        return f"optimizer step {self.optimizer_step} of {steps} of the update, {self.steps_taken + 1} in all"

    def sources(self, folder: Path) -> list[Source]:
        """The tables, as the update read them.

        Raises:
            ValueError: a table has no longer the rows that the minibatches name.
        """
        sources = []
        for name, minibatches in self.minibatches.items():
            table = pq.read_table(folder / _file(name))
            rows = 1 + max(max(m) for m in minibatches)
            if table.num_rows != rows:
                raise ValueError(
                    f"{folder / _file(name)} has {table.num_rows} rows, the update read {rows}; change values, "
                    "and leave the rows and their order as they are"
                )
            sources.append(Source(name, table, [np.array(m, np.int64) for m in minibatches]))
        return sources


@dataclass(frozen=True)
class FailedBatch:
    """What a rank keeps of an update that failed."""

    optimizer_step: int
    steps_taken: int
    message: str
    faulty: list[str]
    sources: list[Source]

    @classmethod
    def of(
        cls, problem: str, optimizer_step: int, steps_taken: int, found: list[tuple[Source, list[RowFigures]]]
    ) -> FailedBatch:
        """Name the rows because of which a step failed; all of its rows, where none of them fails alone."""
        faulty = [source.describe(f) for source, figures in found for f in figures if not f.finite]
        if faulty:
            message = f"{problem}: {listed(faulty)}"
        else:
            names = [source.name_of(f.row) for source, figures in found for f in figures]
            message = f"{problem}, but each of its {len(names)} rows alone is finite: {listed(names)}"
        return cls(optimizer_step, steps_taken, message, faulty, [source for source, _ in found])

    def write(self, folder: Path, stage: str, step: int, spec: dict[str, Any]) -> None:
        """All but the model."""
        folder.mkdir(parents=True, exist_ok=True)
        kept = [source.kept() for source in self.sources]
        for source in kept:
            pq.write_table(source.table, folder / _file(source.name))
        about = About(
            stage=stage,
            step=step,
            role=spec["role"],
            objective=spec["objective"],
            optimizer_step=self.optimizer_step,
            steps_taken=self.steps_taken,
            message=self.message,
            faulty=self.faulty,
            minibatches={source.name: [rows.tolist() for rows in source.minibatches] for source in kept},
            spec=spec,
        )
        write_atomically(folder / ABOUT, about.model_dump_json(indent=1))


@dataclass(frozen=True)
class Replayed:
    """What a replay found in one table."""

    source: str
    rows: list[tuple[str, RowFigures, list[str]]]
    """Name, figures, and columns that are not finite."""
    loss: float
    """Of the whole minibatch."""
    norm_bound: float
    """The gradient norm of the whole minibatch is at most this."""

    @classmethod
    def of(cls, source: Source, figures: list[RowFigures], loss: float, norm_bound: float) -> Replayed:
        rows = [(source.name_of(f.row), f, columns_not_finite(source.table, f.row)) for f in figures]
        return cls(source.name, rows, loss, norm_bound)

    @property
    def finite(self) -> bool:
        return math.isfinite(self.loss) and math.isfinite(self.norm_bound) and all(f.finite for _, f, _ in self.rows)


def clear(folder: Path) -> None:
    """A run that goes on may fail again in the same step: what is there from the last time is complete no longer."""
    (folder / ABOUT).unlink(missing_ok=True)


def _file(source: str) -> str:
    return f"{source}.parquet"
