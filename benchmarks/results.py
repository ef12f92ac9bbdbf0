"""What benchmarks share: raw runs as JSON, their medians as a table, and how they compare with the JSON that was there.

A *run* is one repetition: the columns of its case (what was measured: lengths, generators, ...) and its figures.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.machine import describe
from rlhf_dist.observability.summary import versions

FOLDER = Path(__file__).parent / "results"
#: Raised when the files change their form, so that old ones are not compared with new ones.
FORMAT = 1
#: Of a terminal that shows a whole table.
WIDTH = 150

Run = dict[str, Any]
#: A header and its rows, as the page of figures has them.
Rows = list[Sequence[str]]
#: Case -> medians of its figures.
Medians = dict[tuple[Any, ...], dict[str, float]]


def kept(path: Path) -> dict[str, Any]:
    """The ``machine`` and the ``runs`` so far of an experiment that takes hours. Each run is kept as it ends."""
    return json.loads(path.read_text()) if path.exists() else {"machine": describe(), "runs": []}


def keep(path: Path, results: Mapping[str, Any]) -> None:
    """Write what :func:`kept` reads."""
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(results, indent=1) + "\n")


@dataclass(frozen=True)
class Report:
    """Where the runs of one benchmark go and how they are shown.

    Args:
        name: of the JSON in ``benchmarks/results``, and of the command.
        case: columns that tell one case from another.
        figures: columns that are measured; a run may lack some.
    """

    name: str
    case: tuple[str, ...]
    figures: tuple[str, ...]

    def parser(self, description: str, repetitions: int) -> argparse.ArgumentParser:
        """Options that all benchmarks have; add those of your own."""
        parser = argparse.ArgumentParser(prog=f"python -m benchmarks.{self.name}", description=description)
        parser.add_argument("--small", action="store_true", help="does it run at all: few, short repetitions, no JSON")
        parser.add_argument("--repetitions", type=int, default=repetitions, metavar="N", help=f"default {repetitions}")
        parser.add_argument("--out", type=Path, metavar="FILE", help=f"default benchmarks/results/{self.name}.json")
        parser.add_argument("--table", action="store_true", help="measure nothing, print what the JSON holds")
        return parser

    def finish(self, runs: Sequence[Run], settings: Mapping[str, Any], options: argparse.Namespace) -> None:
        """Print the medians beside those of the JSON that is there, then write the runs in its place.

        ``settings``: all that the figures depend on and that no column of a run says; JSON. With ``--small`` nothing
        is compared, and only ``--out`` is written.
        """
        path = options.out or FOLDER / f"{self.name}.json"
        new = {"format": FORMAT, "machine": describe(), "versions": versions()}
        new |= {"settings": dict(settings), "runs": list(runs)}
        self.show(runs)
        if not options.small:
            self.compare(new, json.loads(path.read_text()) if path.exists() else None)
        if not options.small or options.out:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(new, indent=1) + "\n")

    def read(self, options: argparse.Namespace) -> list[Run]:
        """Runs of the JSON that is there; ends the program where there is none."""
        path = options.out or FOLDER / f"{self.name}.json"
        if not path.exists():
            raise SystemExit(f"{path} does not exist; measure first: python -m benchmarks.{self.name}")
        runs: list[Run] = json.loads(path.read_text())["runs"]
        return runs

    def medians(self, runs: Sequence[Run]) -> Medians:
        found: Medians = {}
        for case in dict.fromkeys(self._case(run) for run in runs):
            same = [run for run in runs if self._case(run) == case]
            values = {name: [run[name] for run in same if run.get(name) is not None] for name in self.figures}
            found[case] = {name: statistics.median(x) for name, x in values.items() if x}
        return found

    def paired(self, runs: Sequence[Run], figure: str, one: str, other: str) -> dict[tuple[Any, ...], float]:
        """By case without its last column, ``figure`` where that column is ``one`` over that where it is ``other``.

        The median of the ratios within each repetition, whose runs were made in turns: a machine that is slower
        for a while is slower for both.
        """
        column = self.case[-1]
        ratios: dict[tuple[Any, ...], list[float]] = {}
        by_repetition = {(*self._case(run), run["repetition"]): run[figure] for run in runs}
        for run in runs:
            if run[column] == one and (theirs := by_repetition.get((*self._case(run)[:-1], other, run["repetition"]))):
                ratios.setdefault(self._case(run)[:-1], []).append(run[figure] / theirs)
        return {case: statistics.median(found) for case, found in ratios.items()}

    def show(self, runs: Sequence[Run]) -> None:
        self._print(self.medians(runs), f"{self.name}: medians", number)

    def compare(self, new: Mapping[str, Any], old: Mapping[str, Any] | None) -> None:
        """Print new medians over old ones, case by case, where machine and form are the same."""
        console = Console()
        if old is None:
            console.print("there was no JSON to compare with")
        elif old.get("format") != FORMAT or old["machine"] != new["machine"]:
            console.print(f"not compared with the JSON that was there: its machine was {old.get('machine')}")
        else:
            after, before = self.medians(new["runs"]), self.medians(old["runs"])
            ratios = {
                case: {name: x / before[case][name] for name, x in row.items() if before[case].get(name)}
                for case, row in after.items()
                if case in before
            }
            self._print(ratios, f"{self.name}: over the figures before", "{:.2f}".format)

    def _case(self, run: Run) -> tuple[Any, ...]:
        return tuple(run[name] for name in self.case)

    def _print(self, rows: Medians, title: str, form: Callable[[float], str]) -> None:
        table = Table(*self.case, *self.figures, title=title)
        for case, row in rows.items():
            cells = (form(row[name]) if name in row else "–" for name in self.figures)
            table.add_row(*map(str, case), *cells)
        Console(width=WIDTH).print(table)


def number(x: float) -> str:
    """Three digits that count."""
    return f"{x:,.0f}" if abs(x) >= 100 or x == int(x) else f"{x:.3g}"


def print_rows(rows: Rows, title: str = "") -> None:
    """A table of the page on the terminal."""
    header, *cells = rows
    table = Table(*header, title=title)
    for row in cells:
        table.add_row(*row)
    Console(width=WIDTH).print(table)
