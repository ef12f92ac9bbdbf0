"""Puts the tables of ``docs/benchmarks.md`` in place, from the JSON in ``benchmarks/results``.

    python -m benchmarks.page            # write
    python -m benchmarks.page --check    # exit code 1 where the page is not what the JSON says

The prose is written by hand. A table stands between ``<!-- table: NAME -->`` and ``<!-- end -->``, and its NAME is in
``TABLES``; every JSON of a :class:`~benchmarks.results.Report` has a table of its medians by its own name.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Callable
from pathlib import Path

from benchmarks import iterated, learning, memory, overoptimization, preference_model
from benchmarks.results import FOLDER, Report, Rows, Run, number

PAGE = Path(__file__).parents[1] / "docs" / "benchmarks.md"
MARKED = re.compile(r"(?P<begin><!-- table: (?P<name>[\w-]+) -->\n).*?(?P<end><!-- end -->)", re.DOTALL)
#: Name -> file and how its runs are shown: header and rows.
TABLES: dict[str, tuple[str, Callable[[list[Run]], Rows]]] = {
    "learning": ("learning", learning.rows),
    "learning-stale": ("learning", learning.rows_stale),
    "preference_model": ("preference_model", preference_model.rows),
    "preference_model-noise": ("preference_model", preference_model.rows_noise),
    "overoptimization": ("overoptimization", overoptimization.rows),
    "iterated": ("iterated", iterated.rows),
    "memory": ("memory", memory.rows),
}


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.page", description="Tables of docs/benchmarks.md.")
    parser.add_argument("--check", action="store_true", help="write nothing")
    args = parser.parse_args()
    old = PAGE.read_text()
    new = filled(old)
    if args.check:
        return int(old != new)
    PAGE.write_text(new)
    return 0


def filled(text: str) -> str:
    """The page with every table made anew."""
    return MARKED.sub(lambda found: f"{found['begin']}{markdown(rows_of(found['name']))}\n{found['end']}", text)


def rows_of(name: str) -> Rows:
    """Header and rows of a table.

    Raises:
        ValueError: no such table.
    """
    file, rows = TABLES.get(name, (name, medians_of(name)))
    path = FOLDER / f"{file}.json"
    if not path.exists():
        raise ValueError(f"docs/benchmarks.md has a table {name}, and there is no {path.name} in benchmarks/results")
    return rows(json.loads(path.read_text())["runs"])


def medians_of(name: str) -> Callable[[list[Run]], Rows]:
    """Rows of a benchmark that has a ``REPORT``."""

    def rows(runs: list[Run]) -> Rows:
        report = report_of(name)
        medians = report.medians(runs)
        figures = [f for f in report.figures if any(f in row for row in medians.values())]
        header = [label.replace("_", " ") for label in (*report.case, *figures)]
        cells = lambda row: [number(row[f]) if f in row else "" for f in figures]
        return [header, *([*map(str, case), *cells(row)] for case, row in medians.items())]

    return rows


def report_of(name: str) -> Report:
    import importlib

    report = getattr(importlib.import_module(f"benchmarks.{name}"), "REPORT", None)
    if not isinstance(report, Report):
        raise ValueError(f"benchmarks.{name} has no REPORT, and benchmarks.page no table {name}")
    return report


def markdown(rows: Rows) -> str:
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join([lines[0], "|" + "---|" * len(rows[0]), *lines[1:]])


if __name__ == "__main__":
    sys.exit(main())
