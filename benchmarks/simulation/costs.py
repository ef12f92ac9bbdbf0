"""What things cost, in seconds: of a GPU cluster from data sheets, by arithmetic; nothing here was measured on GPUs."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Costs:
    """Seconds, of one generator and of all learners together. A token is one of a prompt or a response."""

    step: float = 0.0
    """Of a decoding step, whatever runs."""
    weights: float = 0.0
    """To read the weights once, and ..."""
    compute: float = 0.0
    """... to multiply with them for each sequence: a step takes the longer of the two."""
    sequence: float = 0.0
    """For each sequence of a step."""
    context: float = 0.0
    """For each token in the cache."""
    prefill: float = 0.0
    """For each token of a prompt; the samples of a group share it."""
    load: float = 0.0
    """New weights, from their arrival at a generator until their gate has passed; nothing is decoded meanwhile."""
    message: float = 0.0
    """From a finished chunk to the driver."""
    score_token: float = 0.0
    """Reward and reference, beside everything else."""
    experience: float = 0.0
    """Of a step, from the last column to the advantages."""
    logprob_token: float = 0.0
    """The policy's log-probabilities before the update, on the learners."""
    update: float = 0.0
    """Of a step, whatever its size."""
    update_token: float = 0.0
    publish: float = 0.0
    """Of the learners, to pack their weights."""
    transfer: float = 0.0
    """From packed weights to their arrival at the generators."""
    driver: float = 0.0
    """Between two steps."""
    checkpoint: float = 0.0
    """For which the step waits."""

    def decoding(self, sequences: int, context: int) -> float:
        """Of one step."""
        return self._constant(sequences) + self.context * context

    def stretch(self, steps: int, sequences: int, context: int) -> float:
        """Of ``steps`` steps of the same sequences, which have ``context`` tokens in the first one."""
        grown = steps * context + sequences * steps * (steps - 1) / 2
        return steps * self._constant(sequences) + self.context * grown

    def steps_in(self, seconds: float, sequences: int, context: int) -> int:
        """Steps that have begun within ``seconds``: the last one is over then or later."""
        square = self.context * sequences / 2
        linear = self.decoding(sequences, context) - square
        if square == 0:
            steps = seconds / linear
        else:
            steps = (math.sqrt(linear**2 + 4 * square * seconds) - linear) / (2 * square)
        # What rounding adds is no step.
        return max(1, math.ceil(steps * (1 - 1e-12) - 1e-9))

    def _constant(self, sequences: int) -> float:
        return self.step + max(self.weights, self.compute * sequences) + self.sequence * sequences


@dataclass(frozen=True)
class Hardware:
    """One GPU and its share of a node; every figure can be given with ``--set NAME=VALUE``."""

    flops: float = 989e12
    """bf16, dense. NVIDIA H100 SXM5, data sheet."""
    hbm: float = 3.35e12
    """Bytes per second of memory, same source."""
    memory: float = 80e9
    """Bytes, same source."""
    pcie: float = 64e9
    """Bytes per second and direction to a GPU: gen 5, x16, same source (128 GB/s in both)."""
    network: float = 50e9
    """Bytes per second into a node: one port of 400 Gb/s (ConnectX-7, data sheet)."""
    node: int = 8
    """GPUs of a node."""
    mfu: float = 0.40
    """Share of ``flops`` in training. The Llama 3 report (2407.21783, table 4) has 38 to 43 %."""
    prefill_mfu: float = 0.40
    """The same of forward passes alone, and of decoding where it is bound by arithmetic. Assumed."""
    hbm_share: float = 0.60
    """Share of ``hbm`` that decoding reaches, with the exchange between the GPUs of a generator in it. Assumed."""
    network_share: float = 0.50
    """Share of ``network`` that the object store reaches between nodes, and of ``pcie``. Assumed."""
    overhead: float = 0.004
    """Seconds of a decoding step beside reading and multiplying: scheduling, launches, sampling. Assumed."""
    memory_share: float = 0.90
    """Of ``memory`` that vLLM uses for weights and cache: ``gpu_memory_utilization``'s usual value."""
    driver: float = 0.5
    """Seconds between two steps: log, ledger, advantages. Assumed."""
    interruptions: float = 419 / (16384 * 54 * 24)
    """For each GPU and hour: 419 unexpected ones in 54 days on 16,384 GPUs (2407.21783, section 3.3.4)."""
    generator_recovery: float = 300.0
    """Seconds until a generator that died loads weights again. Assumed."""
    learner_recovery: float = 900.0
    """Seconds until learners that died go on from their checkpoint. Assumed."""
    max_num_seqs: int = 1024
    """Sequences that an engine decodes at once, where its memory has room."""


@dataclass(frozen=True)
class Model:
    """Figures of the model's ``config.json``."""

    parameters: float
    layers: int
    kv_heads: int
    head: int = 128

    @property
    def kv_bytes(self) -> int:
        """Of a token in the cache, bf16."""
        return 2 * self.layers * self.kv_heads * self.head * 2


MODELS = {
    "7B": Model(7.6e9, 28, 4),  # Qwen2.5-7B
    "32B": Model(32.8e9, 64, 8),  # Qwen2.5-32B
    "70B": Model(70.6e9, 80, 8),  # Llama-3.1-70B
    "405B": Model(405.9e9, 126, 8),  # Llama-3.1-405B
}


def generator_gpus(model: Model, hardware: Hardware) -> int:
    """GPUs of one generator: the smallest power of two whose memory is at most half weights."""
    return 2 ** max(0, math.ceil(math.log2(2 * model.parameters / (0.5 * hardware.memory))))


def least_learner_gpus(model: Model, hardware: Hardware) -> int:
    """Under ZeRO-3 with Adam, 16 bytes a parameter (1910.02054, section 3.1), in 0.7 of the memory."""
    return math.ceil(16 * model.parameters / (0.7 * hardware.memory))


def slots(model: Model, hardware: Hardware, tokens: float) -> int:
    """Sequences of ``tokens`` on average that a generator's cache has room for, ``max_num_seqs`` at most.

    The average is that of sequences half way through: vLLM takes pages as they are needed.
    """
    gpus = generator_gpus(model, hardware)
    room = hardware.memory_share * hardware.memory * gpus - 2 * model.parameters
    return max(1, min(hardware.max_num_seqs, int(room / (model.kv_bytes * tokens))))


def gpu_costs(model: Model, hardware: Hardware, learner_gpus: int) -> Costs:
    """bf16; decoding is bound by memory or by arithmetic, prefill and training by arithmetic, a sync by its bytes.

    2 FLOPs for each parameter and token forward, 6 forward and backward, 8 with the layers computed again (gradient
    checkpointing); attention's own are left out. Every node of generators pulls all weights once, side by side.
    """
    h, n = hardware, model.parameters
    gpus = generator_gpus(model, h)
    memory, forward = h.hbm * h.hbm_share * gpus, h.flops * h.prefill_mfu
    learners = h.flops * h.mfu * learner_gpus
    return Costs(
        step=h.overhead,
        weights=2 * n / memory,
        compute=2 * n / (forward * gpus),
        context=model.kv_bytes / memory,
        prefill=2 * n / (forward * gpus),
        load=2 * n / gpus / (h.pcie * h.network_share),
        logprob_token=2 * n / (h.flops * h.prefill_mfu * learner_gpus),
        update_token=8 * n / learners,
        publish=2 * n / learner_gpus / (h.pcie * h.network_share),
        transfer=2 * n / max(1, gpus / h.node) / (h.network * h.network_share),
        driver=h.driver,
        # 12 bytes of optimizer a parameter, copied to host memory by every GPU.
        checkpoint=14 * n / learner_gpus / (h.pcie * h.network_share),
    )
