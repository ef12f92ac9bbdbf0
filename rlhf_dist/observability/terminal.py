"""What the user sees while a run goes on.

On a terminal: live progress bars. In a pipe, a file or ``ray job logs``: plain lines without control characters, one
for every tenth of a stage and at least one in 15 seconds of progress.

    terminal = Terminal()
    terminal.title("miniature world")
    with terminal.starting({"generator": 1, "policy": 2}) as starting:
        starting.ready("generator")
    with terminal.stage("SFT", total=1500) as bar:
        bar.update(step, {"loss": 1.23, "tokens/s": 12000})

All text of users and models is shown as it is: no markup is interpreted, control characters are escaped.
"""

from __future__ import annotations

import io
import os
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Literal, TextIO

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, SpinnerColumn, Task
from rich.progress import TimeElapsedColumn as ElapsedColumn
from rich.rule import Rule
from rich.table import Table
from rich.text import Text

from rlhf_dist.observability.formats import duration, human, printable

PLAIN_WIDTH = 120
PLAIN_INTERVAL = 15.0
SAMPLE_CHARACTERS = 600


class Bar:
    """The progress of one stage. Made by :meth:`Terminal.stage`."""

    def __init__(self, name: str, total: int | None, start: int, changed: Callable[[Bar], None]) -> None:
        self.name = printable(name)
        self.total = total
        self.step = start
        self.figures: dict[str, Any] = {}
        self._changed = changed
        self._began = time.monotonic()
        # The first steps are slow (compilation, cold caches): the speed is that of the last 20 updates.
        self._marks: deque[tuple[float, int]] = deque([(self._began, start)], maxlen=21)

    def update(self, step: int, figures: Mapping[str, Any] | None = None) -> None:
        """Say that ``step`` steps are done. ``figures`` replace those shown before, in the order of importance."""
        self.step = step
        if figures is not None:
            self.figures = dict(figures)
        self._marks.append((time.monotonic(), step))
        self._changed(self)

    @property
    def percent(self) -> str:
        return f"{100 * self.step / self.total:.0f} %" if self.total else ""

    @property
    def times(self) -> str:
        """Elapsed, and how much is left where that can be told."""
        now = time.monotonic()
        elapsed = duration(now - self._began)
        (since, first), (at, last) = self._marks[0], self._marks[-1]
        if not self.total or last <= first or at <= since or self.step >= self.total:
            return f"{elapsed} elapsed"
        left = (self.total - self.step) * (at - since) / (last - first) - (now - at)
        return f"{elapsed} elapsed, {duration(left)} left"

    def figures_text(self, width: int | None = None) -> str:
        """``loss 1.23  tokens/s 12k``; with ``width``, as many figures as fit."""
        text = ""
        for name, value in self.figures.items():
            longer = f"{text}  {printable(name)} {human(value)}" if text else f"{printable(name)} {human(value)}"
            if width is not None and len(longer) > width:
                break
            text = longer
        return text


class Starting:
    """The start-up of groups of processes. Made by :meth:`Terminal.starting`."""

    def __init__(self, groups: Mapping[str, int], changed: Callable[[str], None]) -> None:
        self.groups = dict(groups)
        self.up = dict.fromkeys(groups, 0)
        self.began = time.monotonic()
        self._changed = changed

    def ready(self, name: str, count: int = 1) -> None:
        """``count`` more processes of the group are up.

        Raises:
            ValueError: no such group.
        """
        if name not in self.up:
            raise ValueError(f"no group {name!r} is starting; expected one of {', '.join(self.up)}")
        self.up[name] += count
        self._changed(name)

    @property
    def missing(self) -> str:
        """``policy 0/2, critic 1/2``; empty when all are up."""
        return ", ".join(f"{g} {self.up[g]}/{n}" for g, n in self.groups.items() if self.up[g] < n)


class Terminal:
    """Everything that a run says. ``file`` is standard output by default."""

    def __init__(self, file: TextIO | None = None) -> None:
        file = sys.stdout if file is None else file
        if isinstance(file, io.TextIOWrapper):
            # A terminal or pipe with a small alphabet must not end a run.
            file.reconfigure(errors="replace")
        self.live = file.isatty() and os.environ.get("TERM", "dumb") not in ("dumb", "unknown")
        width = None if self.live or "COLUMNS" in os.environ else PLAIN_WIDTH
        # force_terminal: FORCE_COLOR in the environment must not put escape sequences into a log file.
        self.console = Console(file=file, force_terminal=self.live, width=width, highlight=False, markup=False)

    def title(self, text: str) -> None:
        """A heading."""
        if self.live:
            self.console.print(Rule(Text(printable(text), style="bold"), align="left"))
        else:
            self._line(f"== {printable(text)} ==")

    def info(self, text: str) -> None:
        """A line for the user."""
        self._line(printable(text))

    def warn(self, text: str) -> None:
        """A line that should not be overlooked."""
        self._line(f"warning: {printable(text)}", "yellow")

    def error(self, text: str) -> None:
        """Why the run ends."""
        self._line(f"error: {printable(text)}", "bold red")

    def finding(self, level: Literal["ok", "warning", "fault"], check: str, text: str) -> None:
        """One line of a list of checks, whatever line breaks ``text`` has."""
        style = {"warning": "yellow", "fault": "bold red"}.get(level, "")
        self._line(f"{level:7}  {printable(check)}: {printable(' '.join(text.split()))}", style)

    def table(self, title: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
        """A table; figures are rounded and right-aligned, None is shown as ``-``."""
        grid = Table(title=Text(printable(title), style="bold"), title_justify="left", box=SIMPLE_HEAD)
        for i, column in enumerate(columns):
            figures = all(not isinstance(row[i], str) for row in rows)
            grid.add_column(Text(printable(column)), justify="right" if figures else "left", overflow="fold")
        for row in rows:
            grid.add_row(*(Text(human(cell)) for cell in row))
        self.console.print(grid)

    def samples(self, title: str, rows: Sequence[Mapping[str, Any]]) -> None:
        """Samples one below the other: each key of a row (prompt, response, score ...) is a labelled paragraph."""
        self.title(title)
        for row in rows:
            grid = Table.grid(padding=(0, 2))
            grid.add_column(style="dim", no_wrap=True)
            grid.add_column(overflow="fold")
            for label, value in row.items():
                grid.add_row(Text(printable(label)), Text(_shortened(human(value))))
            self.console.print(grid)
            self.console.print()

    @contextmanager
    def stage(self, name: str, total: int | None = None, start: int = 0) -> Iterator[Bar]:
        """Show the progress of a stage of ``total`` steps (None if unknown), of which ``start`` were done before."""
        if self.live:
            with self._live_stage(name, total, start) as bar:
                yield bar
            return
        lines = _PlainLines(self._line)
        bar = Bar(name, total, start, lines.changed)
        self._line(f"{bar.name}: started" + (f", {total} steps" if total else ""))
        try:
            yield bar
        except BaseException as error:
            self._line(f"{bar.name}: stopped by {type(error).__name__} at step {bar.step}, {bar.times}")
            raise
        lines.finish(bar)

    @contextmanager
    def _live_stage(self, name: str, total: int | None, start: int) -> Iterator[Bar]:
        narrow = self.console.width < 90
        columns = _Named(), BarColumn(8 if narrow else 24), _Percent(), _Figures(self.console, narrow), _Times()
        with Progress(*columns, console=self.console, refresh_per_second=4) as progress:
            bar = Bar(name, total, start, lambda bar: progress.update(task, completed=bar.step))
            task = progress.add_task("", total=total, completed=start, bar=bar)
            yield bar

    @contextmanager
    def starting(self, groups: Mapping[str, int]) -> Iterator[Starting]:
        """Show the start-up of groups (name -> number of processes) while it happens."""
        if self.live:
            columns = SpinnerColumn(finished_text="✓"), _Named(), MofNCompleteColumn(), ElapsedColumn()
            with Progress(*columns, console=self.console) as progress:
                starting = Starting(groups, lambda name: progress.update(tasks[name], completed=starting.up[name]))
                tasks = {g: progress.add_task(printable(g), total=n, bar=None) for g, n in groups.items()}
                yield starting
            return

        def changed(name: str) -> None:
            if starting.up[name] == groups[name]:
                self._line(f"{printable(name)}: ready after {duration(time.monotonic() - starting.began)}")

        starting = Starting(groups, changed)
        self._line(
            "starting " + ", ".join(f"{printable(g)} x{n}" if n > 1 else printable(g) for g, n in groups.items())
        )
        try:
            yield starting
        except BaseException as error:
            self._line(f"start-up stopped by {type(error).__name__}; not ready: {starting.missing or 'nothing'}")
            raise

    def _line(self, text: str, style: str = "") -> None:
        # A pipe has no width: its lines are not wrapped.
        self.console.print(Text(text, style=style), soft_wrap=not self.live)


class _PlainLines:
    """Decides when a stage writes a line in a log: at every tenth, and after 15 seconds."""

    def __init__(self, write: Callable[[str], None]) -> None:
        self._write = write
        self._shown_at = time.monotonic()
        self._shown_tenth = 0
        self._shown_step: int | None = None

    def changed(self, bar: Bar) -> None:
        tenth = 10 * bar.step // bar.total if bar.total else 0
        if tenth > self._shown_tenth or time.monotonic() - self._shown_at >= PLAIN_INTERVAL:
            self._shown_tenth = tenth
            self._show(bar)

    def finish(self, bar: Bar) -> None:
        if self._shown_step != bar.step:
            self._show(bar)

    def _show(self, bar: Bar) -> None:
        steps = f"step {bar.step}/{bar.total}" if bar.total else f"step {bar.step}"
        parts = (bar.percent, steps, bar.figures_text(), bar.times)
        self._write(f"{bar.name}: " + " | ".join(part for part in parts if part))
        self._shown_at, self._shown_step = time.monotonic(), bar.step


class _Named(ProgressColumn):
    def render(self, task: Task) -> Text:
        bar = task.fields["bar"]
        return Text(bar.name if bar else task.description, style="bold", no_wrap=True, overflow="ellipsis")


class _Percent(ProgressColumn):
    def render(self, task: Task) -> Text:
        return Text(task.fields["bar"].percent, justify="right", no_wrap=True)


class _Figures(ProgressColumn):
    def __init__(self, console: Console, narrow: bool) -> None:
        self._console, self._bar_width = console, 8 if narrow else 24
        super().__init__()

    def render(self, task: Task) -> Text:
        bar: Bar = task.fields["bar"]
        # The other columns: name, bar, percent, times, and a space between each two of the five.
        room = self._console.width - len(bar.name) - self._bar_width - len(bar.percent) - len(bar.times) - 4
        return Text(bar.figures_text(max(0, room)), style="cyan", no_wrap=True)


class _Times(ProgressColumn):
    def render(self, task: Task) -> Text:
        return Text(task.fields["bar"].times, style="dim", no_wrap=True, overflow="ellipsis")


def _shortened(text: str) -> str:
    if len(text) <= SAMPLE_CHARACTERS:
        return text
    return f"{text[:SAMPLE_CHARACTERS]} ... ({len(text) - SAMPLE_CHARACTERS} more characters)"
