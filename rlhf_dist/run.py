"""One run: its folder, its connection to Ray, its log, and a clean end whatever happens.

Recipes get a :class:`Run` and say what to do; everything that every recipe
needs is here.
"""

from __future__ import annotations

import contextlib
import json
import os
import queue
import shlex
import signal
import threading
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import ray

from rlhf_dist import artifacts, checkpoint, connection, planner
from rlhf_dist.actors import diagnosis, waiting
from rlhf_dist.actors import group as actor_group
from rlhf_dist.actors.data import prepare_model
from rlhf_dist.actors.faults import Faults
from rlhf_dist.actors.group import Startable
from rlhf_dist.actors.learner import LearnerGroup
from rlhf_dist.actors.waiting import SETTLING, WaitLimitExceeded, WorkerFailed
from rlhf_dist.config import Config, Stage
from rlhf_dist.config_io import dump
from rlhf_dist.data.prompts import PromptOrder
from rlhf_dist.observability.logs import quiet_libraries
from rlhf_dist.observability.metrics import MetricsWriter
from rlhf_dist.observability.report import write_report
from rlhf_dist.observability.summary import Summary
from rlhf_dist.observability.terminal import Terminal
from rlhf_dist.observability.trace import Trace
from rlhf_dist.resuming import unfinished

#: Ray gives it to the driver of a job.
JOB_VARIABLE = "RAY_JOB_CONFIG_JSON_ENV_VAR"


class Interrupted(KeyboardInterrupt):
    """SIGTERM, or a limit after it. No other exception of a signal's handler leaves ``ray.get``: Ray 2.60 looks for
    signals while it waits, catches KeyboardInterrupt to raise one of its own, and drops the rest."""


class WaitingForPeople(Exception):
    """Nothing is left to do before somebody has done something; the same command goes on then."""


class Run:
    """State of one run in the driver. Use as a context manager::

        with Run(cfg) as run:
            pipeline(run)

    On the way out it releases every group, writes summary, trace and report,
    and leaves no process behind; ``exit_code`` says how it ended.
    """

    def __init__(self, cfg: Config, terminal: Terminal | None = None) -> None:
        self.cfg = cfg
        self.terminal = terminal or Terminal()
        self.folder, self.resumed = _run_folder(cfg)
        self.summary = Summary(self.path("summary.json") if self.resumed else None)
        self.trace = Trace()
        self.steps_done = 0
        self.exit_code = 0
        self.joined = False
        self.stop_requested: str | None = None
        """The signal that asks a run which can save to stop after its step."""
        self._stopped_by = "Ctrl-C"
        self._can_save = False
        self._diagnosed = False
        self._ending = False
        self.samples: list[dict[str, Any]] = []
        self.faults = Faults(cfg.run.max_restarts, self.terminal.warn, self.path("faults.jsonl"))
        self.failed_batch: str | None = None
        self.stage = cfg.stages[0]
        self.results: dict[str, Path] = {}
        """Folders of what the stages so far have made, by name."""
        self._groups: list[Startable] = []
        self._faults_noted: list[tuple[Any, Any]] = []
        self._open = contextlib.ExitStack()
        self._quiet = contextlib.ExitStack()

    def path(self, *parts: str) -> str:
        """A path inside the run folder."""
        return str(self.folder.joinpath(*parts))

    def __enter__(self) -> Run:
        quiet_libraries(self.path("logs", "driver.log"))
        # Ray prints what it thinks of every process that dies. The terminal has its own way to stdout.
        log = self._quiet.enter_context(open(self.path("logs", "driver.log"), "a"))
        self._quiet.enter_context(contextlib.redirect_stdout(log))
        (self.folder / "config.yaml").write_text(dump(self.cfg))
        self.summary.set("recipe", self.cfg.recipe)
        self.summary.set("rows_skipped", 0)
        self.summary.set("row_faults", {})
        self.summary.set("failed_batch", None)
        self.summary.write(self.path("summary.json"))
        waiting.limit = self.cfg.run.wait_limit
        self.terminal.title(f"rlhf_dist {self.cfg.recipe}: {self.cfg.description or self.folder.name}")
        self.terminal.info(f"run folder {self.folder}{', which is gone on with' if self.resumed else ''}")
        self._warn_of_short_stops()
        signal.signal(signal.SIGTERM, self._terminated)
        return self

    def _warn_of_short_stops(self) -> None:
        """A job's driver gets SIGKILL some seconds after SIGTERM, which Ray reads from the job's environment."""
        patience, needed = float(os.environ.get("RAY_JOB_STOP_WAIT_TIME_S", "3")), self.cfg.run.term_limit
        if JOB_VARIABLE in os.environ and patience < needed:
            self.terminal.warn(
                f"stopping this job leaves it {patience:g} s, and saving may take run.term_limit={needed:g} s: submit "
                "it with --runtime-env cluster/runtime_env.yaml, which sets RAY_JOB_STOP_WAIT_TIME_S, or lower that"
            )

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: Any) -> bool:
        # A second signal must not stop the clean-up half-way.
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGALRM):
            signal.signal(number, signal.SIG_IGN)
        self._ending = True
        for group in self._groups:
            group.stop_calling()
        handled = error is None or self._explain(error)
        self.summary.set("steps", self.steps_done)
        # The files come first: when the whole process group was signalled, Ray is dying too, and may not answer.
        self._write()
        if self.joined:
            self.finish_stage()
        ray.shutdown()  # ends every process of a local cluster
        self.terminal.info(f"{self.summary.get('status')}; report {self.folder / 'report.html'}")
        self._quiet.close()
        return handled

    @contextlib.contextmanager
    def saving(self) -> Iterator[None]:
        """While this lasts, SIGTERM asks for a checkpoint after the step instead of ending the run at once."""
        self._can_save = self.cfg.run.checkpoint_every > 0
        try:
            yield
        finally:
            self._can_save = False

    def _terminated(self, number: int, frame: Any) -> None:
        name = signal.Signals(number).name
        if not self._can_save or self.stop_requested:
            self._stopped_by = name
            raise Interrupted(name)
        self.stop_requested = name
        self.terminal.warn(f"{name}: saving after this step, within {self.cfg.run.term_limit:g} s (run.term_limit)")
        signal.signal(signal.SIGALRM, self._terminated)
        signal.setitimer(signal.ITIMER_REAL, max(self.cfg.run.term_limit, 1e-3))

    @contextlib.contextmanager
    def at(self, stage: Stage) -> Iterator[None]:
        """While this lasts, the run is in ``stage``: its config, its name and its folder."""
        whole = self.cfg
        self.stage, self.cfg = stage, whole.of(stage)
        try:
            yield
        finally:
            self.cfg = whole

    @property
    def result(self) -> str:
        """The folder of what the stage makes."""
        return self.path(self.stage.name)

    def beside(self, *parts: str) -> str:
        """A path beside the folder of the stage's result."""
        return self.path(self.stage.parent, *parts)

    def once(self, make: Callable[[], str], name: str | None = None) -> Path:
        """The result of the stage, which ``make`` writes to its folder, unless it was made before from the same inputs.

        Args:
            name: of a part of the stage that is kept by itself, and of its folder; default: the stage's result.

        Raises:
            ValueError: the run has it already, from other inputs; names what differs.
        """
        name = name or self.stage.name
        folder = Path(self.path(name))
        inputs = artifacts.inputs(self.cfg, self.stage, self.results, self.model_path, self.tokenizer_dir)
        if (folder / checkpoint.MANIFEST).exists():
            if changed := artifacts.changed(folder, inputs):
                lines = "\n".join(f"  {key}: {old!r} then, {new!r} now" for key, (old, new) in changed.items())
                raise ValueError(
                    f"{folder} was made from something else:\n{lines}\nchoose another run.name: what has not changed "
                    "is taken over from this run (pipeline.reuse)"
                )
            self.terminal.info(f"{name} is there already: {folder}")
            return self._figures_of(folder)
        reuse = self.cfg.recipe == "pipeline" and self.cfg.pipeline.reuse
        if reuse and (source := artifacts.find(self.folder.parent, name, inputs)):
            artifacts.take_over(source, folder)
            self.terminal.info(f"{name} is taken over from {source}, which was made from the same inputs")
            return self._figures_of(folder)
        self.summary.was_set.clear()
        make()
        about = {"inputs": inputs, "made_with": artifacts.made_with(), "figures": dict(self.summary.was_set)}
        checkpoint.seal(folder, about)
        self.write_summary()
        return folder

    def _figures_of(self, folder: Path) -> Path:
        """Put the figures of a stage that need not be made into the summary."""
        for key, value in json.loads((folder / checkpoint.MANIFEST).read_text())["figures"].items():
            self.summary.set(key, value)
        return folder

    def prompt_order(self, rows: int) -> PromptOrder:
        """In which order the stage takes its prompts: another one in every round."""
        return PromptOrder(rows, self.cfg.seed + 1_000_003 * self.stage.round, self.cfg.data.shuffle)

    def write_summary(self) -> None:
        """So that a run that goes on after a kill has the figures of this one."""
        self.summary.write(self.path("summary.json"))

    def _write(self) -> None:
        self.summary.set("faults", [asdict(fault) for fault in self.faults.faults])
        self.write_summary()
        self.trace.write(self.path("trace.json"))
        (self.folder / "samples.json").write_text(json.dumps(self.samples, indent=1))
        self._open.close()
        write_report(self.folder)

    def _explain(self, error: BaseException) -> bool:
        """Exit code, status and message for what ended the run."""
        if isinstance(error, KeyboardInterrupt):
            self.exit_code = 130
            self.summary.finish("interrupted", str(error) or self._stopped_by)
            self.terminal.warn("interrupted: stopping all processes")
            self.terminal.info(f"the same command with run.name={self.folder.name} goes on from here")
            return True
        if isinstance(error, WaitingForPeople):
            self.exit_code = 3
            self.summary.finish("waiting", str(error))
            self.terminal.info(f"waiting for people: {error}")
            self.terminal.info(f"the same command with run.name={self.folder.name} goes on when they are there")
            return True
        with open(self.path("logs", "driver.log"), "a") as log:
            log.write("".join(traceback.format_exception(error)))
        if isinstance(error, waiting.WaitLimitExceeded) and not self._diagnosed:
            self.diagnose()
        expected = isinstance(error, (ValueError, FloatingPointError, waiting.WorkerFailed))
        self.exit_code = 2 if isinstance(error, ValueError) else 1
        self.summary.finish("failed", f"{type(error).__name__}: {error}")
        self.terminal.error(f"{error}" if expected else f"{type(error).__name__}: {error}")
        self.terminal.info(f"logs of all processes: {self.folder / 'logs'}")
        if self.failed_batch is not None:
            self.terminal.info(f"the batch, and the model before that optimizer step: {self.failed_batch}")
            self.terminal.info(f"to replay it alone: python -m rlhf_dist.main replay {shlex.quote(self.failed_batch)}")
        return expected

    def _connect(self) -> None:
        """Join the cluster that is there, else start a local one."""
        address = self.cfg.cluster.joined
        self.joined = bool(address)
        if not address:
            # On a cluster that was joined, files may be where the workers are.
            if problems := planner.check_files(self.cfg):
                raise ValueError("\n".join(problems))
            actor_group.log_dir = self.path("logs")
        connection.connect(self.cfg.cluster)
        # ray.init has put its own handler in the place of ours.
        signal.signal(signal.SIGTERM, self._terminated)
        resources = ray.cluster_resources()
        if not address:  # a cluster that was joined may be busy now, or grow
            planner.check_fits(self.cfg, resources.get("CPU", 0), resources.get("GPU", 0))
        where = f"joined the cluster at {address}" if address else "started a local cluster"
        gpus = f", {resources['GPU']:g} GPUs" if resources.get("GPU") else ""
        self.terminal.info(f"Ray {ray.__version__}: {where}, {resources.get('CPU', 0):g} CPUs{gpus}")

    def prepare(self) -> None:
        """Metrics, Ray, tokenizer and initial model; sets ``tokenizer_dir``, ``model_path``, ``eos_id``, ``pad_id``."""
        # Not in __enter__: what fails here must end in __exit__, with its message and a summary.
        r = self.cfg.run
        self.metrics = self._open.enter_context(
            MetricsWriter(self.path("metrics.jsonl"), r.prometheus_port, r.prometheus_host)
        )
        self.trace.born("driver")
        with self.trace.span("driver", "connect"):
            self._connect()
        with self.trace.span("driver", "prepare_model"):
            self.model = prepare_model(self.cfg, str(self.folder))
        self.tokenizer_dir: str = self.model["tokenizer_dir"]
        self.model_path: str = self.model["model_path"]
        self.eos_id: int = self.model["eos_token_id"]
        self.pad_id: int = self.model["pad_token_id"] or 0
        self.note_rows("tokenizer", self.model)
        if "parameters" in self.model:
            self.terminal.info(
                f"built a model of {self.model['parameters']:,} parameters, vocabulary {self.model['vocab_size']}"
            )

    def note_rows(self, what: str, report: dict[str, Any]) -> None:
        """Report what a reader left out: on the terminal, and in ``rows_skipped`` and ``row_faults``.

        Stages that read the same rows find the same faults, which are reported once.
        """
        found = (report.get("faults"), report.get("messages"))
        if report.get("skipped") and found not in self._faults_noted:
            self._faults_noted.append(found)
            faults = Counter(self.summary.get("row_faults", {})) + Counter(report["faults"])
            self.summary.set("row_faults", dict(faults))
            self.summary.set("rows_skipped", faults.total())
            kinds = ", ".join(f"{count} x {kind}" for kind, count in report["faults"].items())
            self.terminal.warn(
                f"{what}: {report['skipped']} faulty rows skipped: {kinds}; the first: {report['messages'][0]}"
            )
        if report.get("tied"):
            self.terminal.info(f"{what}: {report['tied']} pairs left out, neither side is better")
        if report.get("no_pair"):
            self.terminal.info(f"{what}: {report['no_pair']} prompts left out, no pair of their responses is left")
        if report.get("too_long"):
            self.terminal.info(f"{what}: {report['too_long']} rows left out, longer than the limit")

    def start(self, **groups: Startable | None) -> None:
        """Wait for groups whose processes are starting side by side, and show who is up.

        None is nobody; groups that are up already are passed over.
        """
        present = {n: g for n, g in groups.items() if g is not None and g not in self._groups}
        self._groups += present.values()
        finished: queue.SimpleQueue[tuple[str, BaseException | None]] = queue.SimpleQueue()

        def wait(name: str, group: Startable) -> None:
            try:
                group.wait_ready()
                if not self._ending:
                    group.guard(self.faults)
                finished.put((name, None))
            except BaseException as error:  # noqa: BLE001  (raised below, in the thread of the run)
                finished.put((name, error))

        # A thread for each, so that every group is shown the moment it is up. Daemons: Python waits for all others
        # at its exit, a thread pool's included, and a run that failed or was interrupted must not wait for the rest.
        for item in present.items():
            threading.Thread(target=wait, args=item, daemon=True).start()
        with self.terminal.starting(dict.fromkeys(present, 1)) as starting, self.trace.span("driver", "start"):
            for _ in present:
                name, error = finished.get()
                if error is not None:
                    raise error
                starting.ready(name)

    def diagnose(self) -> list[diagnosis.Finding]:
        """Print where every process stands, those first that do not answer."""
        self._diagnosed = True
        findings = diagnosis.diagnose([process for group in self._groups for process in group.processes()])
        for finding in findings:
            self.terminal.info(str(finding))
        return findings

    def give_up(self, learners: Sequence[LearnerGroup], error: WorkerFailed) -> None:
        """End learners of which a rank died or hangs, or whose work was lost; they cannot go on from where they are.

        Raises:
            WorkerFailed: that happened too often, or something hangs that cannot be started anew.
        """
        if isinstance(error, WaitLimitExceeded):
            self.terminal.warn(str(error))
            hanging = [finding for finding in self.diagnose() if not finding.answers]
            if self.cfg.run.on_hang == "fail" or not hanging:
                raise error
            diagnosis.kill(hanging)
        deadline = time.monotonic() + SETTLING
        while not any(g.died for g in learners) and time.monotonic() < deadline:
            time.sleep(0.1)  # the news of a death may be on its way
        dead = [(g.role, rank, cause) for g in learners for rank, cause in g.died.items()]
        pauses = [self.faults.died(role, f"{role} {rank}", cause) for role, rank, cause in dead]
        if not dead:
            pauses = [self.faults.died("the step", "what the step needs", str(error))]
        for group in learners:
            self._groups.remove(group)
            group.release()
        time.sleep(max(pauses))

    def finish_stage(self) -> None:
        """Release every group that was started."""
        for group in self._groups:
            with contextlib.suppress(Exception):  # a dead actor cannot be released twice
                group.release()
        self._groups.clear()

    def log(self, stage: str, step: int, metrics: dict[str, float]) -> None:
        """Figures of one step: metrics.jsonl and Prometheus."""
        self.metrics.log(step, stage, metrics)

    def steps(self, done: int = 0) -> Iterator[int]:
        """PPO steps that are left when ``done`` of them were made; they count from 1."""
        self.steps_done = done
        for step in range(done + 1, self.cfg.train.steps + 1):
            yield step
            self.steps_done = step

    def collect_spans(self) -> None:
        """Fetch the traces of all groups that are up."""
        for group in self._groups:
            self.trace.add(group.spans())

    @contextlib.contextmanager
    def keeping_failed_batch(
        self, stage: str, learners: Sequence[LearnerGroup | None], step: int | None = None
    ) -> Iterator[None]:
        """If an update that is waited for inside met a number that is not finite, save its batch to ``failed/step_N``.

        Args:
            learners: in the order in which they are waited for.
            step: N; default: the number of the optimizer step, from 1.
        """
        try:
            yield
        except FloatingPointError:
            try:
                self._keep_failed_batch(stage, learners, step)
            except (ValueError, waiting.WorkerFailed) as error:  # the run must end with what went wrong first
                self.terminal.warn(f"the batch could not be saved: {error}")
            raise

    def _keep_failed_batch(self, stage: str, learners: Sequence[LearnerGroup | None], step: int | None) -> None:
        for learner in filter(None, learners):
            if (failed := learner.failed_step()) is None:
                continue
            number = failed[1] + 1 if step is None else step
            folder = self.path("failed", f"step_{number:06d}")
            learner.save_failed(folder, self.tokenizer_dir, stage, number)
            self.failed_batch = folder
            self.summary.set("failed_batch", folder)
            return

    def finish(self) -> None:
        self.summary.finish("finished")


def _run_folder(cfg: Config) -> tuple[Path, bool]:
    """The folder of the run, and whether it holds a run to go on with."""
    root = Path(cfg.run.root)
    if cfg.run.name is not None:
        folder = root / cfg.run.name
        resumed = unfinished(folder, cfg)
    else:
        stem = f"{cfg.recipe}-{time.strftime('%Y%m%d-%H%M%S')}"
        candidates = [root / stem, *(root / f"{stem}-{i}" for i in range(2, 100))]
        folder, resumed = next(c for c in candidates if not c.exists()), False
    (folder / "logs").mkdir(parents=True, exist_ok=True)
    return folder.resolve(), resumed
