"""One vLLM engine: requests in, finished samples out, verified weight updates between two steps.

vLLM runs inside this process (``VLLM_ENABLE_V1_MULTIPROCESSING=0``), so the
caller owns the step loop: a weight update happens between two steps, and
nothing can be sampled while it does.
"""

from __future__ import annotations

import os
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, get_args

import numpy as np
import torch

os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
# Thread counts come from OMP_NUM_THREADS (see actors.group); vLLM's binding asks for one NUMA node per worker.
os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")

from vllm import LLM, SamplingParams
from vllm.config import WeightTransferConfig
from vllm.config.lora import MaxLoRARanks
from vllm.inputs import tokens_input
from vllm.lora.request import LoRARequest
from vllm.sampling_params import RequestOutputKind

from rlhf_dist import schema
from rlhf_dist.config import GeneratorConfig, ModelConfig, RolloutConfig, WeightSyncConfig
from rlhf_dist.engines import weight_sync
from rlhf_dist.engines.adapter_files import AdapterFiles
from rlhf_dist.engines.canary import canary_difference
from rlhf_dist.engines.results import Sample, SyncRecord, TextScores
from rlhf_dist.engines.shards import Shard, WeightSyncError

#: Largest :func:`canary_difference` between learner and generator that a correct sync shows.
#: float32: other kernels and orders of summation. bfloat16: 8 bits of mantissa through all layers.
TOLERANCE = {"float32": 1e-4, "bfloat16": 0.3}
#: Returns ``[C]`` tokens of the fixed canary prompt, and ``[C - 1]`` the learner's log-probabilities of ``tokens[1:]``.
Canary = Callable[[], tuple[np.ndarray, np.ndarray]]
#: Version of weights that came from a checkpoint instead of a learner.
FROM_DISK = -1


@dataclass
class _Pending:
    """A sample that is asked for."""

    lane: int
    prompt_id: int
    group_id: int
    sample_index: int
    prompt_ids: np.ndarray
    seed: int
    version: int
    """No token may come from older weights."""
    salt: int = FROM_DISK
    """The version under which it entered vLLM, and whose cache it may share."""

    @property
    def request(self) -> str:
        return f"{self.lane}-{self.group_id}-{self.sample_index}"


class GeneratorEngine:
    """vLLM behind four verbs: ``add``, ``step``, ``load``, ``canary``. Not thread-safe: one thread owns it.

    ``load`` is ``start_weight_update``, ``update_weights``, ``finish_weight_update`` and ``gate`` in one; transports
    that push call them one by one. From the start of an update until its gate has passed nothing new begins, and what
    finishes is held.

    With ``rollout.in_flight_updates`` ``keep`` or ``recompute``, an update comes between two steps of requests that
    run on: their later tokens are of the new version, and each token says of which it is. Requests wait here, not in
    vLLM, until there is room for them, so that none takes the salt of a version and starts under the next.
    """

    def __init__(
        self,
        model_path: str,
        model: ModelConfig,
        rollout: RolloutConfig,
        generator: GeneratorConfig,
        sync: WeightSyncConfig,
        *,
        stop_token_ids: list[int],
        from_learner: bool,
        seed: int,
        context: int,
        max_logprobs: int = 20,
    ) -> None:
        weight_sync.register()
        if generator.enforce_eager:
            # vLLM compiles the rank of a sampled token even then: seconds before the first token, on a CPU.
            torch.compiler.set_stance("force_eager")
        # The coarser of the two types decides.
        self.precision = "bfloat16" if "bfloat16" in (model.dtype, sync.wire_dtype) else "float32"
        self.tolerance = sync.canary_tolerance or TOLERANCE[self.precision]
        self.rollout = rollout
        self.stop_token_ids = stop_token_ids
        self.version = FROM_DISK
        self.max_num_seqs = generator.max_num_seqs
        self.shares_prefixes = generator.enable_prefix_caching
        self.staged = generator.tensor_parallel_size > 1
        self._canary_old: np.ndarray | None = None
        self._verified = not from_learner
        self._update = SyncRecord(FROM_DISK, 0, 0)
        self._broken: str | None = None
        self._queue: deque[_Pending] = deque()
        self._pending: dict[str, _Pending] = {}
        self._texts: dict[str, tuple[int, int, int]] = {}
        self._held: list[Any] = []
        # Adapters that vLLM serves stand beside weights from disk, which nobody sends.
        served = from_learner and model.lora.rank > 0 and model.lora.serve == "adapters"
        self._adapters = AdapterFiles(model.lora) if served else None
        self._lora: LoRARequest | None = None
        self.llm = LLM(
            model=model_path,
            dtype=model.dtype,
            # With a learner the weights start random and only a complete sync makes them right: what a sync leaves
            # out cannot hide behind an equal tensor from disk.
            load_format="dummy" if from_learner and not served else "safetensors",
            skip_tokenizer_init=not rollout.stop,
            trust_remote_code=model.trust_remote_code,
            max_model_len=context,
            max_logprobs=max_logprobs,
            tensor_parallel_size=generator.tensor_parallel_size,
            distributed_executor_backend="mp" if self.staged else None,
            # One more, so that the canary never waits for a place.
            max_num_seqs=generator.max_num_seqs + 1,
            enforce_eager=generator.enforce_eager,
            enable_prefix_caching=generator.enable_prefix_caching,
            seed=seed,
            # A step ahead, vLLM would label the last token before an update with the version after it: only where
            # nothing is under way at an update.
            async_scheduling=None if rollout.drains else False,
            disable_log_stats=True,
            # Processed log-probabilities include the temperature, as the learner's do.
            logprobs_mode="processed_logprobs",
            weight_transfer_config=WeightTransferConfig(backend=sync.transport),
            enable_lora=served,
            max_loras=1,
            # Not the head: where vLLM 0.32 prepares it, prompt_logprobs fail beside running requests.
            lora_target_modules=model.lora.target_modules if served else None,
            max_lora_rank=next(rank for rank in get_args(MaxLoRARanks) if rank >= model.lora.rank),
            **_device_options(generator, context),
        )
        self.engine = self.llm.llm_engine
        self.vocabulary = self.engine.model_config.get_vocab_size()
        self.engine.set_weight_version(str(FROM_DISK))
        if sync.transport == weight_sync.BACKEND:
            self.init_weight_transfer_engine({})

    @property
    def running(self) -> int:
        """Requests inside vLLM."""
        return len(self._pending) + len(self._texts)

    @property
    def active(self) -> bool:
        """Whether :meth:`step` has something to do: nothing is decoded in the middle of an update."""
        return self._verified and bool(self.running or self._can_begin())

    def add(
        self,
        lane: int,
        prompt_id: int,
        group_id: int,
        sample_index: int,
        prompt_ids: np.ndarray,
        seed: int,
        version: int = FROM_DISK,
    ) -> None:
        """Queue one sample. Equal seed, weights and prompt give equal tokens, whatever else is in the batch.

        Args:
            sample_index: ``schema.GREEDY`` for a greedy response.
            version: it waits until these weights, or newer ones, have passed the gate.
        """
        self._queue.append(_Pending(lane, prompt_id, group_id, sample_index, prompt_ids, seed, version))

    def drop(self, lane: int) -> None:
        """Forget the samples of a lane, those that wait and those that are under way."""
        self._queue = deque(p for p in self._queue if p.lane != lane)
        gone = [request for request, pending in self._pending.items() if pending.lane == lane]
        self.engine.abort_request(gone)
        for request in gone:
            del self._pending[request]

    def _can_begin(self) -> bool:
        ready = self._queue and self._queue[0].version <= self.version
        return bool(ready) and self._verified and self.running < self.max_num_seqs

    def _begin(self) -> None:
        """Move requests into vLLM while there is room."""
        while self._can_begin():
            pending = self._queue.popleft()
            pending.salt = self.version
            greedy = pending.sample_index == schema.GREEDY
            params = SamplingParams(
                temperature=0.0 if greedy else self.rollout.temperature,
                top_p=1.0 if greedy else self.rollout.top_p,
                top_k=0 if greedy else self.rollout.top_k,
                max_tokens=self.rollout.max_response_length,
                stop_token_ids=self.stop_token_ids,
                stop=self.rollout.stop or None,
                seed=pending.seed,
                logprobs=0,
                flat_logprobs=True,
                detokenize=bool(self.rollout.stop),
                output_kind=RequestOutputKind.FINAL_ONLY,
            )
            # A cache entry of another version would mix policies inside one sample.
            prompt = tokens_input(pending.prompt_ids.tolist(), cache_salt=str(pending.salt))
            self.engine.add_request(pending.request, prompt, params, lora_request=self._lora)
            self._pending[pending.request] = pending

    def add_text(self, row: int, token_ids: np.ndarray, k: int) -> None:
        """Queue a text whose next-token distributions are wanted.

        Raises:
            WeightSyncError: the weights have not passed the gate.
        """
        if not self._verified:
            raise WeightSyncError("nothing can be scored before a weight update has passed the gate")
        request = f"text-{row}"
        params = SamplingParams(
            max_tokens=1,
            temperature=0.0,
            prompt_logprobs=k,
            flat_logprobs=True,
            detokenize=False,
            output_kind=RequestOutputKind.FINAL_ONLY,
        )
        prompt = tokens_input(token_ids.tolist(), cache_salt=str(self.version))
        self.engine.add_request(request, prompt, params)
        self._texts[request] = (row, len(token_ids), k)

    def step(self, begin: bool = True) -> tuple[list[Sample], list[TextScores]]:
        """Decode one token of every running request; returns what finished.

        Args:
            begin: whether requests that wait may begin.
        """
        if begin:
            self._begin()
        finished = self._held + [out for out in self.engine.step() if out.finished]
        self._held = []
        texts = [self._scores(out) for out in finished if out.request_id in self._texts]
        samples = [self._sample(out) for out in finished if out.request_id in self._pending]
        return [s for s in samples if s is not None], texts

    def _scores(self, out: Any) -> TextScores:
        row, length, k = self._texts.pop(out.request_id)
        flat = out.prompt_logprobs
        # For each token but the first: the token that stands there, then the k most likely ones.
        shape = (length - 1, k + 1)
        return TextScores(
            row=row,
            token_ids=np.array(flat.token_ids, np.int32).reshape(shape)[:, 1:],
            logprobs=np.array(flat.logprobs, np.float32).reshape(shape)[:, 1:],
        )

    def _sample(self, out: Any) -> Sample | None:
        """None: the sample has to be taken again."""
        pending = self._pending.pop(out.request_id)
        completion = out.outputs[0]
        spans = completion.weight_versions
        if self.shares_prefixes and self.rollout.in_flight_updates == "keep" and int(spans[0].version) != pending.salt:
            # vLLM had no room for it before the weights changed. With the salt of the old version it may have shared
            # that version's cache of the prompt.
            self._queue.appendleft(pending)
            return None
        return Sample(
            lane=pending.lane,
            group_id=pending.group_id,
            sample_index=pending.sample_index,
            prompt_id=pending.prompt_id,
            prompt_ids=pending.prompt_ids,
            response_ids=list(completion.token_ids),
            logprobs=list(completion.logprobs.logprobs),
            finish_reason=completion.finish_reason,
            policy_versions=np.repeat([int(s.version) for s in spans], [s.end - s.start for s in spans]),
        )

    def load(self, version: int, shards: list[Shard], canary: Canary) -> SyncRecord:
        """Load one version and pass the gate; what fails is loaded once more from scratch.

        Args:
            canary: called when the weights are in.

        Raises:
            WeightSyncError: names version and tensor, or the canary's difference.
        """
        try:
            return self._load(version, shards, canary)
        except WeightSyncError as first:
            if self._broken:
                raise
            record = self._load(version, shards, canary)
            record.reloaded_after = str(first)
            return record

    def _load(self, version: int, shards: list[Shard], canary: Canary) -> SyncRecord:
        if self._adapters:
            return self._load_adapters(self._adapters, version, shards, canary)
        staged = weight_sync.StagedShards(shards) if self.staged else None
        try:
            self.start_weight_update()
            self.update_weights({"version": version, "shards": staged.info if staged else shards})
            self.finish_weight_update(version)
        finally:
            if staged:
                staged.release()
        return self.gate(version, *canary())

    def _load_adapters(self, files: AdapterFiles, version: int, shards: list[Shard], canary: Canary) -> SyncRecord:
        """The same for adapters that vLLM serves: it replaces them in place, also for requests that run on."""
        self._begin_update()
        self._update.nbytes = files.write(version, shards)
        self._update.tensors = sum(len(shard.names) for shard in shards)
        self._lora = LoRARequest("policy", 1, files.path, load_inplace=True)
        if not self.engine.add_lora(self._lora):
            raise WeightSyncError(f"version {version}: vLLM did not take the adapters")
        self.engine.set_weight_version(str(version))
        self._end_update(version)
        return self.gate(version, *canary())

    def _restart_running(self) -> None:
        """Take back every sample that is under way: its last tokens come from weights that cannot be trusted."""
        self.engine.abort_request(list(self._pending))
        self._queue.extendleft(reversed(self._pending.values()))
        self._pending.clear()
        self._held.clear()

    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None:
        """Connect to the learner; ``init_info`` is the transport's own."""
        self.llm.init_weight_transfer_engine({"init_info": init_info})

    def start_weight_update(self) -> None:
        """Begin an update, between two steps.

        Raises:
            WeightSyncError: requests are running that must be finished first, or tensor-parallel workers failed in an
                earlier update.
        """
        if self._broken:
            raise WeightSyncError(f"the workers have failed in an earlier update, start them anew: {self._broken}")
        self._begin_update()
        self.llm.start_weight_update()

    def _begin_update(self) -> None:
        if self.running and self.rollout.drains:
            raise WeightSyncError(f"weights cannot be loaded while {self.running} requests are running")
        self._verified = False
        self._update = SyncRecord(FROM_DISK, 0, 0, load_seconds=-time.perf_counter(), in_flight=self.running)

    def update_weights(self, update_info: dict[str, Any]) -> None:
        """One payload of the transport.

        Raises:
            WeightSyncError: names version and tensor.
        """
        nbytes, tensors = weight_sync.payload_size(update_info)
        self._update.nbytes += nbytes
        self._update.tensors += tensors
        try:
            self.llm.update_weights({"update_info": update_info})
        except RuntimeError as error:
            if not self.staged:
                raise
            # The executor of vLLM 0.32 stops at the first worker that fails and takes the answers of the others for
            # those of the next call.
            self._broken = str(error)
            raise WeightSyncError(str(error)) from error

    def finish_weight_update(self, version: int) -> None:
        """The last payload is in; :meth:`gate` must pass before anything is sampled.

        Raises:
            WeightSyncError: no weights had come.
        """
        try:
            self.llm.finish_weight_update(weight_version=str(version))
        except WeightSyncError:
            self.llm.finish_weight_update()  # else vLLM takes the update for one that is still going on
            raise
        self._end_update(version)

    def _end_update(self, version: int) -> None:
        # Frees the cache of the old version; cache_salt keeps versions apart where this cannot, since requests run on.
        self.engine.reset_prefix_cache(reset_running_requests=self.rollout.in_flight_updates == "recompute")
        self._update.version = version
        self._update.load_seconds += time.perf_counter()

    def gate(self, version: int, canary_ids: np.ndarray, expected: np.ndarray) -> SyncRecord:
        """Compare the canary under the new weights with the learner's; both as in :data:`Canary`.

        Raises:
            WeightSyncError: names the version and the difference.
        """
        record, started = self._update, time.perf_counter()
        reported = self.llm.get_weight_version()
        if not record.version == version or reported != str(version):
            raise WeightSyncError(f"version {version} is expected, {record.version} was loaded, vLLM has {reported}")
        found = self.canary(canary_ids)
        record.canary_diff = canary_difference(found, expected, self.vocabulary)
        if self._canary_old is not None:
            record.canary_diff_old = canary_difference(self._canary_old, expected, self.vocabulary)
        record.verify_seconds = time.perf_counter() - started
        if not record.canary_diff <= self.tolerance:  # also catches NaN
            self._restart_running()
            raise WeightSyncError(
                f"canary of version {version}: log-probabilities of learner and generator differ by "
                f"{record.canary_diff:.3g}, allowed are {self.tolerance:.3g} ({self.precision})"
            )
        self._canary_old = found
        self.version = version
        self._verified = True
        return record

    def canary(self, token_ids: np.ndarray) -> np.ndarray:
        """``[C - 1]`` log-probabilities of ``token_ids[1:]`` under the current weights."""
        params = SamplingParams(max_tokens=1, temperature=0.0, prompt_logprobs=0, detokenize=False)
        # Weights that failed the gate and the next attempt may have one version, so the version is no salt here.
        prompt = tokens_input(token_ids.tolist(), cache_salt=f"canary-{time.monotonic_ns()}")
        self.engine.add_request("canary", prompt, params, lora_request=self._lora)
        finished: dict[str, Any] = {}
        while "canary" not in finished:
            # Requests that run on get a token of the new version; it leaves when the gate has passed.
            finished = {out.request_id: out for out in self.engine.step() if out.finished}
            self._held += [out for request, out in finished.items() if request != "canary"]
        positions = finished["canary"].prompt_logprobs[1:]  # nothing precedes the first token
        return np.array([p[int(t)].logprob for p, t in zip(positions, token_ids[1:], strict=True)], np.float32)


def _device_options(generator: GeneratorConfig, context: int) -> dict[str, Any]:
    if generator.gpus:
        return {"gpu_memory_utilization": generator.gpu_memory_utilization}
    return {
        "kv_cache_memory_bytes": int(generator.kv_cache_gb * 2**30),
        # A prompt that is prefilled in parts rewinds the generator of its seed, which torch's CPU generators cannot
        # ("CPU Generator does not use offset", vLLM 0.32). So every prompt is prefilled in one step.
        "enable_chunked_prefill": False,
        "max_num_batched_tokens": max(8192, context),
    }
