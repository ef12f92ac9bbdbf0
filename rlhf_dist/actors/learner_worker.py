"""One rank of a DeepSpeed group: what it holds is in its :class:`LearnerSpec`, the code path is the same for all."""

from __future__ import annotations

import itertools
import os
import socket
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import ray
from ray.actor import ActorHandle

from rlhf_dist import checkpoint
from rlhf_dist.actors import failed_batch
from rlhf_dist.actors.failed_batch import About, FailedBatch, Replayed
from rlhf_dist.actors.group import WATCH, Worker
from rlhf_dist.actors.learner_spec import LearnerSpec
from rlhf_dist.actors.transport import GeneratorClient
from rlhf_dist.data.experience import take
from rlhf_dist.data.nonfinite import RowFigures, Source
from rlhf_dist.data.shares import add_up


@ray.remote(concurrency_groups=WATCH | {"files": 1})  # type: ignore[call-overload]  # Ray 2.60 leaves it out of its types
class LearnerWorker(Worker):
    """One rank. Calls are collective: the driver sends every call to every rank, in the same order."""

    def __init__(self, spec: LearnerSpec, rank: int, world: int) -> None:
        super().__init__(f"{spec.role} {rank}")
        self.spec = spec
        self.rank = rank
        self.world = world
        self._client: GeneratorClient | None = None
        self._sender: Any = None
        self._sent: list[Any] = []
        self.failed: FailedBatch | None = None
        self._writer = ThreadPoolExecutor(1)
        self._written: Future[checkpoint.Files] = Future()

    @ray.method(num_returns=2)
    def address(self) -> tuple[str, int]:
        """Host and port where rank 0 gathers the group.

        The port stays open from here on: many seconds pass until the group meets there, and a port that is only
        looked up may be somebody else's by then.
        """
        host = ray.util.get_node_ip_address()
        self.meeting = socket.create_server((host, 0))  # on the address that the other ranks use, and no other
        return host, self.meeting.getsockname()[1]

    def setup(self, address: str, port: int) -> dict[str, Any]:
        """Join the group and load the model; returns pid, number of parameters and vocabulary."""
        with self.importing():
            from rlhf_dist import adapters, models  # noqa: F401
            from rlhf_dist.engines import deepspeed, objectives  # noqa: F401
        with self.trace.span(self.name, "start"):
            return self._load(address, port)

    def _load(self, address: str, port: int) -> dict[str, Any]:
        import torch

        from rlhf_dist import adapters, models
        from rlhf_dist.engines import deepspeed as engines
        from rlhf_dist.engines import objectives

        spec, m = self.spec, self.spec.model
        listening = self.meeting.detach() if self.rank == 0 else None
        self.store = engines.init_distributed(self.rank, self.world, address, port, listening)
        load = models.load_policy if spec.head == "policy" else models.load_scalar
        model = load(spec.model_path, m.dtype, m.attention, m.trust_remote_code)
        if m.lora.rank and spec.head == "policy" and spec.optim is not None:
            torch.manual_seed(spec.seed)  # every rank begins with the same adapters
            model = adapters.add_adapters(model, m.lora)
        if m.gradient_checkpointing and spec.optim is not None:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        self.vocab = model.config.vocab_size
        module: Any = (
            models.PolicyModule(model, spec.temperature) if spec.head == "policy" else models.ScalarModule(model)
        )
        parameters = sum(p.numel() for p in model.parameters())
        trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
        learner = spec.learner if spec.optim is not None else spec.learner.model_copy(update={"zero_stage": 3})
        universal = spec.restore is not None and spec.restore.converted
        self.engine = engines.LearnerEngine(module, learner, spec.optim, m.dtype, spec.total_steps, universal)
        if spec.restore is not None:
            with checkpoint.local_copy(spec.restore.folder) as folder:
                self.engine.load(folder)
        self.objective = _objective(spec)
        # Held-out data of a K-wise reward model are pairs.
        self.held_out_objective = objectives.PairwiseObjective() if spec.objective == "kwise" else self.objective
        self.pretraining = objectives.SFTObjective(spec.algo.ptx_coef, metric="ptx_loss")
        self.torch = torch
        self.wire_dtype = getattr(torch, spec.wire_dtype or m.dtype)
        return {
            "pid": os.getpid(),
            "parameters": parameters,
            "trained_parameters": trained,
            "vocab_size": self.vocab,
            "threads": torch.get_num_threads(),
        }

    def update(
        self,
        table: pa.Table,
        minibatches: Sequence[np.ndarray],
        pretrain: pa.Table | None = None,
        pretrain_minibatches: Sequence[np.ndarray] = (),
    ) -> list[dict[str, float]]:
        """One optimizer step per element of ``minibatches`` (rows of ``table``).

        Args:
            pretrain: text whose loss is added in each step (PPO-ptx), with its own rows for each.

        Returns for each step this rank's share of every metric; shares of all
        ranks add up to the global mean. ``lr`` and ``grad_norm`` are global.

        Raises:
            NonFiniteError: on every rank: loss or gradient of an optimizer step is not finite, here or in an earlier
                update. That step was not taken, nor will any other be; the model can still be exported.
        """
        from rlhf_dist.engines.deepspeed import NonFiniteError

        # Calls that were queued behind the one that failed: the model that is saved is the one before the failure.
        if self.failed is not None:
            raise NonFiniteError(self.failed.message)
        sources = [Source("batch", table, list(minibatches))]
        if pretrain is not None:
            sources.append(Source("pretrain", pretrain, list(pretrain_minibatches)))
        figures = []
        with self.trace.span(self.name, "update"):
            self.engine.train()
            for i in range(len(minibatches)):
                metrics: dict[str, float] = {}
                for source in sources:
                    metrics |= self._forward_backward(self._objective_of(source), source.table, source.minibatches[i])
                try:
                    figures.append({**metrics, **self.engine.step()})
                except NonFiniteError as error:
                    found = [(source, self._each_row(source, i)) for source in sources]
                    self.failed = FailedBatch.of(str(error), i + 1, self.engine.steps, found)
                    raise NonFiniteError(self.failed.message) from error
        return figures

    def _objective_of(self, source: Source) -> Any:
        return self.objective if source.name == "batch" else self.pretraining

    def _each_row(self, source: Source, step: int) -> list[RowFigures]:
        from rlhf_dist.engines.examine import each_row

        spec, objective = self.spec, self._objective_of(source)
        return each_row(self.engine, objective, source.table, source.minibatches[step], spec.pad_id, spec.packing)

    def evaluate(self, table: pa.Table, rows: np.ndarray) -> dict[str, float]:
        """Figures of the objective on ``rows``, without learning from them: this rank's share, as in :meth:`update`."""
        self.engine.train(False)
        with self.trace.span(self.name, "evaluate"), self.torch.no_grad():
            return self._forward_backward(self.held_out_objective, table, rows, backward=False)

    def keep(self, folder: str) -> None:
        """Write the state as it is now to the local ``folder``, for :meth:`go_back`."""
        write, _ = self.engine.snapshot(Path(folder))
        write()

    def go_back(self, folder: str) -> None:
        """Be again what :meth:`keep` has written; all ranks have."""
        self.engine.load(Path(folder))

    def _forward_backward(
        self, objective: Any, table: pa.Table, rows: np.ndarray, backward: bool = True
    ) -> dict[str, float]:
        """Add the gradient of ``objective`` on ``rows``; returns this rank's share of the metrics."""
        totals = objective.totals(table, rows)
        shares = []
        for batch in self._micro_batches(objective, table, rows):
            loss, parts = objective.loss(self.engine, batch, totals)
            if backward:
                self.engine.backward(loss)
            shares.append({name: float(value) for name, value in parts.items()})
        return add_up(shares)

    def failed_step(self) -> tuple[int, int] | None:
        """Of the update that failed, if one did: the optimizer step in it, from 1, and those taken before in all."""
        return (self.failed.optimizer_step, self.failed.steps_taken) if self.failed is not None else None

    def save_failed(self, folder: str, tokenizer_dir: str, stage: str, step: int) -> None:
        """Write the batch of the update that failed, and the model as it was before that optimizer step."""
        from pydantic import TypeAdapter

        assert self.failed is not None
        if self.rank == 0:
            failed_batch.clear(Path(folder))
        self.export(str(Path(folder) / failed_batch.MODEL), tokenizer_dir)
        if self.rank == 0:
            spec = TypeAdapter(LearnerSpec).dump_python(self.spec, mode="json")
            self.failed.write(Path(folder), stage, step, spec)

    def replay(self, folder: str) -> list[Replayed]:
        """Forward and backward, without a step, of what the update failed on: each row, then all in micro-batches."""
        from rlhf_dist.engines.examine import together

        about = About.read(Path(folder))
        step = about.optimizer_step - 1
        self.engine.train()
        found = []
        for source in about.sources(Path(folder)):
            objective, rows = self._objective_of(source), source.minibatches[step]
            figures = self._each_row(source, step)
            batches = self._micro_batches(objective, source.table, rows)
            whole = together(self.engine, objective, batches, objective.totals(source.table, rows))
            found.append(Replayed.of(source, figures, *whole))
        return found

    def _micro_batches(self, objective: Any, table: pa.Table, rows: np.ndarray) -> Iterator[Any]:
        from rlhf_dist.data.batching import micro_batches

        spec = self.spec
        plan = micro_batches(
            objective.lengths(table, rows), self.world, self.rank, spec.micro_batch_tokens, spec.packing
        )
        for part in plan:
            batch = objective.collate(table, rows[part].tolist(), spec.pad_id, spec.packing)
            yield batch.to(self.engine.device)

    def pair_outcomes(self, table: pa.Table) -> pa.Table:
        """Of this rank's pairs ``row``, ``source``, ``difference`` (score of the chosen side less that of the rejected
        one), ``longer`` (by how many tokens the chosen side is longer) and ``preference``.
        """
        from rlhf_dist.data.ragged import Ragged
        from rlhf_dist.engines.objectives import PairwiseObjective

        rows: list[int] = []
        difference: list[float] = []
        self.engine.train(False)
        with self.torch.no_grad():
            for batch in self._micro_batches(PairwiseObjective(), table, np.arange(table.num_rows)):
                scores = self.engine(batch).reshape(-1)[batch.last]
                rows += batch.rows
                difference += (scores[0::2] - scores[1::2]).tolist()[: len(batch.rows)]
        longer = Ragged.of(table, "chosen_ids").lengths - Ragged.of(table, "rejected_ids").lengths
        index = pa.array(rows, pa.int64())
        return pa.table(
            {
                "row": index,
                "source": table["source"].take(index),
                "difference": pa.array(difference, pa.float64()),
                "longer": pa.array(longer[rows]),
                "preference": table["preference"].take(index),
            }
        )

    def pair_logprobs(self, table: pa.Table) -> pa.Table:
        """``row``, ``ref_chosen`` and ``ref_rejected`` of this rank's pairs: what the policy gives to whole responses.

        Called before the first step, they are DPO's reference.
        """
        from rlhf_dist.engines import objectives

        rows: list[int] = []
        sums: list[float] = []
        self.engine.train(False)
        with self.torch.no_grad():
            for batch in self._micro_batches(objectives.PairwiseObjective(), table, np.arange(table.num_rows)):
                rows += batch.rows
                sums += objectives.pair_logprobs(self.engine, batch).tolist()[: 2 * len(batch.rows)]
        columns = {"ref_chosen": pa.array(sums[0::2], pa.float32()), "ref_rejected": pa.array(sums[1::2], pa.float32())}
        return pa.table({"row": pa.array(rows, pa.int64()), **columns})

    def logprobs(self, chunk: pa.Table, column: str, rows: np.ndarray | None = None) -> pa.Table:
        """``row`` and ``column``: log-probabilities of this rank's share of ``rows`` under the current policy."""
        with self.trace.span(self.name, "logprobs"):
            return self._per_token(take(chunk, rows), column, lambda batch: self.engine(batch)[0])

    def values(self, chunk: pa.Table, rows: np.ndarray | None = None) -> pa.Table:
        """``row`` and ``values`` of this rank's share of ``rows``."""
        with self.trace.span(self.name, "values"):
            return self._per_token(take(chunk, rows), "values", self.engine)

    def scores(self, chunk: pa.Table, column: str) -> pa.Table:
        """``row``, ``score`` and ``column`` (the component) of this rank's rows."""
        rows: list[int] = []
        values: list[float] = []
        for batch, out in self._forward(chunk, np.arange(chunk.num_rows), self.engine):
            rows += batch.rows
            values += out.reshape(-1)[batch.last].tolist()[: len(batch.rows)]
        score = pa.array(values, pa.float32())
        return pa.table({"row": pa.array(rows, pa.int64()), "score": score, column: score})

    def center(self, table: pa.Table) -> float:
        """Take the mean score of the responses in ``table`` off all scores from now on, the exported model's too.

        Args:
            table: ``schema.DEMONSTRATION``.

        Returns:
            that mean.
        """
        scores = self.scores(table, "score")["score"].to_numpy()
        mean = float(np.concatenate(self.engine.gather(scores)).mean(dtype=np.float64))
        module: Any = self.engine.module
        module.center(mean)
        return mean

    def _per_token(self, chunk: pa.Table, name: str, forward: Any) -> pa.Table:
        from rlhf_dist.data.batching import TokenColumn

        column = TokenColumn(chunk)
        for batch, out in self._forward(chunk, column.wanted, forward):
            column.add(batch, out)
        return column.table(name, with_skipped=self.rank == 0)

    def _forward(self, chunk: pa.Table, rows: np.ndarray, forward: Any) -> Iterator[tuple[Any, Any]]:
        from rlhf_dist.data.batching import collate, micro_batches, sequence_lengths

        spec = self.spec
        lengths = sequence_lengths(chunk, rows)
        self.engine.train(False)
        with self.torch.no_grad():
            for part in micro_batches(lengths, self.world, self.rank, spec.micro_batch_tokens, spec.packing):
                batch = collate(chunk, rows[part].tolist(), (), spec.pad_id, spec.packing).to(self.engine.device)
                yield batch, forward(batch)

    def weights(self, version: int) -> list[Any]:
        """This rank's shards of what changed in ``version``.

        Groups of parameters are dealt out to the ranks, so that each packs and
        sends its part. *Returned*, not put: the driver owns them, and they
        survive this process.
        """
        with self.trace.span(self.name, "push_weights"):
            # Ray has copied the shards of the version before when it returned them.
            shards = self._pack(version, "trained", [shard.data for shard in self._sent])
            self._sent = shards
        return shards

    def canary(self) -> tuple[np.ndarray, np.ndarray] | None:
        """From rank 0 tokens and log-probabilities of the canary; computed while the generators load the weights."""
        with self.trace.span(self.name, "canary"):
            canary = self._canary()
        return canary if self.rank == 0 else None

    def frozen_weights(self) -> list[Any]:
        """This rank's shards of what never changes: the weights beside adapters; empty where all are trained."""
        from rlhf_dist.engines.shards import FROZEN

        return self._pack(FROZEN, "frozen", [])

    def _pack(self, version: int, content: Literal["frozen", "trained"], buffers: Sequence[np.ndarray]) -> list[Any]:
        from rlhf_dist.engines.shards import pack

        # Every rank walks all groups, since gathering is collective, and packs its own.
        groups = enumerate(self.engine.named_weights(int(self.spec.shard_mb * 2**20), content))
        own = (group for i, group in groups if i % self.world == self.rank)
        buffer = itertools.chain(buffers, itertools.repeat(None))
        return [pack(version, group, self.wire_dtype, next(buffer)) for group in own]

    def push_weights(self, version: int, generators: list[ActorHandle]) -> tuple[np.ndarray, np.ndarray] | None:
        """Send ``version`` to ``generators`` by vLLM's own transport; rank 0 returns the canary."""
        with self.trace.span(self.name, "push_weights"):
            if self._client is None or self._sender is None:
                self._client, self._sender = self._connect(generators)
            self._client.version = version
            self._sender.send_weights()
            canary = self._canary()
        return canary if self.rank == 0 else None

    def _connect(self, generators: list[ActorHandle]) -> tuple[GeneratorClient, Any]:
        from rlhf_dist.engines import weight_sync

        client = GeneratorClient(generators, self.spec.generator_workers)
        group_bytes = int(self.spec.shard_mb * 2**20)
        source = weight_sync.weight_source(lambda: self.engine.named_weights(group_bytes), self.wire_dtype)
        sender = weight_sync.open_trainer(
            self.spec.transport,
            source,
            client,
            rank=self.rank,
            host=ray.util.get_node_ip_address(),
            world_size=client.world_size,
            buffer_bytes=group_bytes,
        )
        return client, sender

    def _canary(self) -> tuple[np.ndarray, np.ndarray]:
        """A fixed prompt of random tokens; its log-probabilities at temperature 1."""
        from rlhf_dist.data.batching import collate

        ids = np.random.default_rng(0).integers(0, self.vocab, self.spec.canary_length, dtype=np.int32)
        table = pa.table(
            {
                "prompt_ids": pa.array([ids[:1]], pa.list_(pa.int32())),
                "response_ids": pa.array([ids[1:]], pa.list_(pa.int32())),
            }
        )
        batch = collate(table, [0], (), self.spec.pad_id, False).to(self.engine.device)
        self.engine.train(False)
        with self.torch.no_grad():
            logprobs, _ = self.engine(batch, temperature=1.0)
        return ids, batch.gather(logprobs)

    def export(self, folder: str, tokenizer_dir: str) -> None:
        """Write the model in Hugging Face's format, with its tokenizer; returns when it is written."""
        self._export(Path(folder), tokenizer_dir)()

    def _export(self, folder: Path, tokenizer_dir: str) -> Callable[[], None]:
        """Copy the model; returns what writes it."""
        write_model = self.engine.export(folder, int(self.spec.shard_mb * 2**20))

        def write() -> None:
            write_model()
            if self.rank == 0:
                from rlhf_dist.data.tokenization import load_tokenizer, save_tokenizer

                save_tokenizer(load_tokenizer(tokenizer_dir), str(folder))

        return write

    def save(self, folder: str, tokenizer_dir: str) -> float:
        """Copy the whole state to memory, and begin to write it to ``folder`` (any URL); :meth:`written` waits.

        Writes ``learner/ROLE/`` and, of a policy, ``policy/``, which vLLM and transformers load.

        Returns:
            seconds that the copy took.
        """
        started = time.perf_counter()
        local, send = checkpoint.destination(folder)
        with self.trace.span(self.name, "save"):
            write_state, files = self.engine.snapshot(local / "learner" / self.spec.role)
            parts = [os.path.relpath(file, local) for file in files]
            writes = [write_state]
            if self.spec.head == "policy":
                writes.append(self._export(local / "policy", tokenizer_dir))
                parts += ["policy"] if self.rank == 0 else []

        def write() -> checkpoint.Files:
            for part in writes:
                part()
            described = checkpoint.describe(local, parts)
            send()
            return described

        self._written = self._writer.submit(write)
        return time.perf_counter() - started

    @ray.method(concurrency_group="files")
    def written(self, saved: float) -> checkpoint.Files:
        """Block until the files of this rank are written; beside whatever else it does.

        Args:
            saved: what :meth:`save` returned; makes Ray call this after it.
        """
        return self._written.result()


def _objective(spec: LearnerSpec) -> Any:
    from rlhf_dist.engines import objectives

    match spec.objective:
        case "sft":
            return objectives.SFTObjective()
        case "distill":
            return objectives.DistillObjective()
        case "pairwise":
            return objectives.PairwiseObjective()
        case "kwise":
            return objectives.KWiseObjective()
        case "dpo":
            return objectives.DPOObjective(spec.dpo)
        case "policy":
            return objectives.PolicyObjective(spec.algo, spec.max_response_length)
        case "critic":
            return objectives.CriticObjective(spec.algo)
        case None:
            return None
