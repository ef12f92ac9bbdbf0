"""``ledger.jsonl``: which prompts were trained in which step, one line for each step, as it happened.

A step that a fault took back is trained again: the newest line of a step belongs to the line of updates that led to the
final weights, and a line ``{"back_to": 7}`` says that everything after step 7 was given up.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class TrainedStep:
    step: int
    version: int
    """Of the policy that the step made; no version is ever made twice."""
    rows: dict[int, int]
    """Groups that were trained, and their rows of the prompts."""


class TrainedLedger:
    """Appends to the file; continues one that is there."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.next_version = 1 + max((r["version"] for r in _records(self.path) if "version" in r), default=-1)
        """The lowest one that was never used."""
        torn = self.path.exists() and self.path.stat().st_size > 0 and not self.path.read_bytes().endswith(b"\n")
        self._file = open(self.path, "a")  # noqa: SIM115
        if torn:
            self._file.write("\n")

    def begin(self, step: int) -> int:
        """Training goes on after ``step``; returns the version to begin with."""
        version = self.next_version
        self._write({"back_to": step, "version": version})
        return version

    def trained(self, entry: TrainedStep) -> None:
        """Enter a step before its weights are published, so that their version counts as used."""
        self._write({"step": entry.step, "version": entry.version, "rows": entry.rows})

    def _write(self, record: dict[str, Any]) -> None:
        self._file.write(json.dumps(record) + "\n")
        self._file.flush()
        self.next_version = record["version"] + 1


def final_line(path: str | Path) -> list[TrainedStep]:
    """The steps that led to the final weights, in order."""
    steps: list[TrainedStep] = []
    for record in _records(Path(path)):
        if "back_to" in record:
            steps = [s for s in steps if s.step <= record["back_to"]]
        else:
            rows = {int(group): row for group, row in record["rows"].items()}
            steps.append(TrainedStep(record["step"], record["version"], rows))
    return steps


def _records(path: Path) -> list[dict[str, Any]]:
    """A last line that a killed run left torn is passed over: its step was never published."""
    found = []
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            found.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return found
