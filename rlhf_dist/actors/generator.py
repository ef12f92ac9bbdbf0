"""The generator: a Ray actor around one vLLM engine, whose step loop it owns."""

from __future__ import annotations

import hashlib
import os
import queue
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import ray

from rlhf_dist import schema
from rlhf_dist.actors.group import WATCH, Worker
from rlhf_dist.actors.outbox import Outbox
from rlhf_dist.actors.rollouts import ChunkInfo
from rlhf_dist.config import Config
from rlhf_dist.data.ragged import Ragged
from rlhf_dist.engines.results import Sample, SyncRecord

if TYPE_CHECKING:
    from rlhf_dist.engines.vllm import GeneratorEngine


def sample_seed(run_seed: int, group_id: int, sample_index: int) -> int:
    """Seed of one sample: restarts, retries and another number of generators do not change what is sampled."""
    digest = hashlib.blake2b(f"{run_seed}/{group_id}/{sample_index}".encode(), digest_size=4).digest()
    return int.from_bytes(digest, "little") >> 1


@dataclass(frozen=True)
class Command:
    """Something for the engine's thread to do between two steps."""

    call: Callable[[GeneratorEngine], Any]
    when_idle: bool
    """Only once everything that runs is finished; nothing new begins before."""
    answer: Future


@ray.remote(concurrency_groups=WATCH)  # type: ignore[call-overload]  # Ray 2.60 leaves it out of its types
class Generator(Worker):
    """One engine. Calls come in on Ray's threads; the engine lives in one thread of its own.

    Commands (add requests, load weights) wait in ``_inbox`` and run between two
    steps, in order. Finished samples leave through the outbox, in chunks.
    """

    def __init__(
        self,
        index: int,
        model_path: str,
        cfg: Config,
        stop_token_ids: list[int],
        from_learner: bool,
        context: int,
    ) -> None:
        super().__init__(f"generator {index}")
        self.index = index
        self.cfg = cfg
        # Where chunks depend on lengths alone, a run on one generator can be repeated bit for bit.
        self.outbox = Outbox(cfg.rollout.chunk_tokens, cfg.rollout.chunk_seconds if cfg.rollout.max_staleness else None)
        self._inbox: queue.Queue[Command] = queue.Queue()
        self._next: Command | None = None
        self._texts: dict[int, queue.Queue] = {}
        self._started: Future = Future()
        self._error: BaseException | None = None
        arguments = (model_path, stop_token_ids, from_learner, context)
        threading.Thread(target=self._loop, args=arguments, daemon=True, name="engine").start()

    def ready(self) -> int:
        return self._started.result()

    def submit(
        self, lane: int, prompts: pa.Table, groups: Sequence[tuple[int, int]], n: int, greedy: bool, version: int
    ) -> None:
        """Queue groups; :meth:`next_chunk` returns them.

        Args:
            lane: chunks hold samples of one lane only.
            prompts: ``schema.PROMPT``; its rows are looked up here, so tokens never pass through the driver.
            groups: ``(group_id, row of prompts)``.
            n: samples per group.
            greedy: one greedy response for each group as well.
            version: no token is sampled from older weights.
        """
        ids = Ragged.of(prompts, "prompt_ids")
        prompt_ids = prompts["prompt_id"].to_numpy()
        indices = [*range(n), *([schema.GREEDY] if greedy else [])]

        def submit(engine: GeneratorEngine) -> None:
            self.outbox.expect(lane, version, [group for group, _ in groups], len(indices))
            for group, row in groups:
                for i in indices:
                    seed = sample_seed(self.cfg.seed, group, i)
                    engine.add(lane, int(prompt_ids[row]), group, i, ids[row], seed, version)

        self._send(submit)

    def drop(self, lane: int) -> None:
        """Give up what a lane has here; nobody wants it any more."""

        def drop(engine: GeneratorEngine) -> None:
            engine.drop(lane)
            self.outbox.drop(lane)

        self._run(drop)

    def next_chunk(self) -> tuple[ChunkInfo, pa.Table]:
        """Block until a chunk is finished. Two returned objects, so that the driver owns the table unread."""
        samples = _checked(self.outbox.get())
        return _info(samples), rollout_table(samples)

    def next_tokens(self, table: pa.Table, rows: np.ndarray, k: int) -> tuple[dict[str, float], pa.Table]:
        """The ``k`` most likely tokens at each response token of ``rows``, at temperature 1, for distillation.

        Args:
            table: ``teacher_prompt_ids`` and ``response_ids``.

        Returns:
            numbers of ``rows`` and response ``tokens``, and the ``probability`` that the k tokens have together, summed
            over these; and ``row``, ``teacher_ids`` and ``teacher_logprobs`` with k numbers for each response token,
            one after the other.
        """
        prompts, responses = Ragged.of(table, "teacher_prompt_ids"), Ragged.of(table, "response_ids")
        finished: queue.Queue = queue.Queue()

        def submit(engine: GeneratorEngine) -> None:
            for row in rows:
                self._texts[int(row)] = finished
                engine.add_text(int(row), np.concatenate([prompts[row], responses[row]]), k)

        with self.trace.span(self.name, "next_tokens", rows=len(rows)):
            self._run(submit)
            scores = [_checked(finished.get()) for _ in rows]
        for row in rows:
            del self._texts[int(row)]
        order = [s.row for s in scores]
        lengths = responses.lengths[order]
        columns = {"row": pa.array(order, pa.int64())}
        for name, field in (("teacher_ids", "token_ids"), ("teacher_logprobs", "logprobs")):
            # The last positions are those of the response.
            parts = [
                getattr(s, field)[len(s.token_ids) - n :].reshape(-1) for s, n in zip(scores, lengths, strict=True)
            ]
            kind = schema.STAGE_COLUMNS[name]
            flat = np.concatenate([np.empty(0, kind.value_type.to_pandas_dtype()), *parts])
            columns[name] = Ragged.to_arrow(flat, lengths * k).cast(kind)
        probability = float(np.exp(columns["teacher_logprobs"].values.to_numpy()).sum())
        return {"rows": len(rows), "tokens": int(lengths.sum()), "probability": probability}, pa.table(columns)

    def load(self, version: int, parts: list[ray.ObjectRef], canaries: list[ray.ObjectRef]) -> dict[str, Any]:
        """Pull one version of the weights and pass the gate; returns what was verified, ``SyncRecord``.

        Args:
            parts: shards of each rank of the learner.
            canaries: of each rank; rank 0 has tokens and log-probabilities, the others None.
        """
        started = time.perf_counter()
        shards = [shard for of_rank in ray.get(parts) for shard in of_rank]
        pulled = time.perf_counter() - started

        def load(engine: GeneratorEngine) -> SyncRecord:
            with self.trace.span(self.name, "load", version=version):
                # The learner computes its canary meanwhile.
                return engine.load(version, shards, lambda: _canary(ray.get(canaries)))

        try:
            record = self._run(load, when_idle=self.cfg.rollout.drains)
        except RuntimeError as error:
            raise type(error)(f"generator {self.index}: {error}") from None
        return _figures(record, pulled)

    # The four calls of vLLM's weight transfer, for learners that push; each runs between two steps.

    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None:
        self._run(lambda engine: engine.init_weight_transfer_engine(init_info))

    def start_weight_update(self) -> None:
        self._run(lambda engine: engine.start_weight_update(), when_idle=self.cfg.rollout.drains)

    def update_weights(self, update_info: dict[str, Any]) -> None:
        self._run(lambda engine: engine.update_weights(update_info))

    def finish_weight_update(self, version: int) -> None:
        self._run(lambda engine: engine.finish_weight_update(version))

    def gate(self, version: int, *canaries: Any) -> dict[str, Any]:
        """Verify what was pushed; returns what was verified, ``SyncRecord``.

        Args:
            canaries: of each rank of the learner; rank 0 has tokens and log-probabilities, the others None.
        """
        canary = _canary(canaries)
        return _figures(self._run(lambda engine: engine.gate(version, *canary)), 0.0)

    def _run(self, command: Callable[[GeneratorEngine], Any], when_idle: bool = False) -> Any:
        """Run ``command(engine)`` in the engine's thread, between two steps; returns its result."""
        return self._send(command, when_idle).result()

    def _send(self, command: Callable[[GeneratorEngine], Any], when_idle: bool = False) -> Future:
        if self._error is not None:
            raise RuntimeError(f"generator {self.index} has failed: {self._error}") from self._error
        answer: Future = Future()
        self._inbox.put(Command(command, when_idle, answer))
        return answer

    def _loop(self, *arguments: Any) -> None:
        try:
            engine = self._make_engine(*arguments)
            self._started.set_result(os.getpid())
        except BaseException as error:  # noqa: BLE001  (the constructor's error must reach ready())
            self._error = error
            self._started.set_exception(error)
            return
        try:
            while True:
                self._commands(engine)
                with self.trace.span(self.name, "generate", running=engine.running) as figures:
                    figures |= self._decode(engine)
        except BaseException as error:  # noqa: BLE001  (a background thread: its death must reach every caller)
            self._error = error
            self.outbox.fail(error)
            for waiting in self._texts.values():
                waiting.put(error)

    def _make_engine(
        self, model_path: str, stop_token_ids: list[int], from_learner: bool, context: int
    ) -> GeneratorEngine:
        cfg = self.cfg
        with self.importing():
            from rlhf_dist.engines.vllm import GeneratorEngine

        with self.trace.span(self.name, "start"):
            return GeneratorEngine(
                model_path,
                cfg.model,
                cfg.rollout,
                cfg.generator,
                cfg.weight_sync,
                stop_token_ids=stop_token_ids,
                from_learner=from_learner,
                seed=cfg.seed,
                context=context,
                max_logprobs=max(20, cfg.distill.top_k),
            )

    def _decode(self, engine: GeneratorEngine) -> dict[str, int]:
        """Step until a command can run, or there is nothing to decode; returns how often, and with how many sequences
        in all."""
        steps = sequences = 0
        while True:
            # While a command waits for an idle engine, nothing new begins.
            samples, texts = engine.step(begin=self._next is None)
            steps += 1
            sequences += engine.running + len(samples) + len(texts)
            for sample in samples:
                self.outbox.add(sample)
            self.outbox.poll()
            for text in texts:
                self._texts[text.row].put(text)
            if self._next is not None:
                done = not engine.running
            else:
                done = not engine.active or not self._inbox.empty()
            if done:
                return {"steps": steps, "sequences": sequences}

    def _commands(self, engine: GeneratorEngine) -> None:
        """Run what waits in the inbox; block only when there is nothing to decode."""
        while True:
            if self._next is None:
                if engine.active and self._inbox.empty():
                    return
                self._next = self._inbox.get()
            if self._next.when_idle and engine.running:
                return
            command, self._next = self._next, None
            try:
                command.answer.set_result(command.call(engine))
            except BaseException as error:  # noqa: BLE001  (goes to the caller)
                command.answer.set_exception(error)


def _canary(of_ranks: Sequence[Any]) -> tuple[np.ndarray, np.ndarray]:
    return next(canary for canary in of_ranks if canary is not None)


def _checked(result: Any) -> Any:
    """What the engine's thread put into a queue: a result, or the error that ended it."""
    if isinstance(result, BaseException):
        raise result
    return result


def _figures(record: SyncRecord, pull_seconds: float) -> dict[str, Any]:
    return {**record.__dict__, "tells_apart": record.canary_tells_apart, "pull_seconds": pull_seconds}


def _info(samples: Sequence[Sample]) -> ChunkInfo:
    groups = list(dict.fromkeys(s.group_id for s in samples))
    n = len(samples) // len(groups)
    totals = lambda lengths: tuple(int(x) for x in np.reshape(lengths, (-1, n)).sum(1))
    return ChunkInfo(
        lane=samples[0].lane,
        groups=tuple(groups),
        samples=n,
        prompt_tokens=totals([len(s.prompt_ids) for s in samples]),
        response_tokens=totals([len(s.response_ids) for s in samples]),
    )


def rollout_table(samples: Sequence[Sample]) -> pa.Table:
    """Finished samples as ``schema.ROLLOUT``."""
    lengths = np.array([len(s.response_ids) for s in samples])
    flat = lambda values, dtype: np.concatenate([np.asarray(v, dtype) for v in values])
    ragged = lambda values, dtype: Ragged.to_arrow(flat(values, dtype), lengths)
    columns = {
        "prompt_id": pa.array([s.prompt_id for s in samples], pa.int64()),
        "group_id": pa.array([s.group_id for s in samples], pa.int64()),
        "sample_index": pa.array([s.sample_index for s in samples], pa.int32()),
        "prompt_ids": Ragged.to_arrow(
            flat([s.prompt_ids for s in samples], np.int32), np.array([len(s.prompt_ids) for s in samples])
        ),
        "response_ids": ragged([s.response_ids for s in samples], np.int32),
        "rollout_logprobs": ragged([s.logprobs for s in samples], np.float32),
        "policy_version": ragged([s.policy_versions for s in samples], np.int32),
        "finish_reason": pa.array([s.finish_reason for s in samples]).dictionary_encode(),
        "response_mask": Ragged.to_arrow(
            np.repeat(np.array([s.sample_index != schema.GREEDY for s in samples], np.uint8), lengths), lengths
        ),
    }
    return schema.check(pa.table(columns, schema=None).cast(schema.ROLLOUT), schema.ROLLOUT, "generator")
