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
    """bf16, dense: half of the 1,979e12 with sparsity. NVIDIA H100 SXM5, data sheet."""
    hbm: float = 3.35e12
    """Bytes per second of memory, same source."""
    memory: float = 80e9
    """Bytes, same source."""
    pcie: float = 64e9
    """Bytes per second and direction to a GPU: gen 5, x16, same source (128 GB/s in both)."""
    network: float = 50e9
    """Bytes per second into a node for the object store: one port of 400 Gb/s (ConnectX-7, data sheet). That a node has
    one for it, beside the eight that belong to the GPUs of a DGX H100, is assumed."""
    node: int = 8
    """GPUs of a node: HGX and DGX H100; 2407.21783, section 3.3.1."""
    mfu: float = 0.40
    """Share of ``flops`` in training. The Llama 3 report (2407.21783, table 4) has 38 to 43 % for 405B, without layers
    that are computed again; that ZeRO-3 reaches the same, with them counted as work, is assumed."""
    prefill_mfu: float = 0.40
    """The same of forward passes alone, and of decoding where it is bound by arithmetic. Assumed: as in training."""
    hbm_share: float = 0.60
    """Share of ``hbm`` that decoding reaches, with the exchange between the GPUs of a generator in it. Assumed; with
    0.8 for the reads themselves it leaves a 405B model over four nodes 3 ms a step for the exchange."""
    network_share: float = 0.11
    """Share of ``network`` that the object store reaches: Ray's has been seen to take 45 Gb/s into a node from ten
    others (github.com/ray-project/ray/issues/42632); that a faster port does not help it is assumed."""
    copy_share: float = 0.50
    """Share of ``pcie`` that copies between host and GPU reach. Assumed."""
    overhead: float = 0.004
    """Seconds of a decoding step beside reading and multiplying: scheduling, launches, sampling; the scheduler of an
    engine whose weights change under way does not work a step ahead. Assumed."""
    memory_share: float = 0.90
    """Of ``memory`` for weights and cache: ``gpu_memory_utilization``, long 0.9 and in vLLM 0.32 0.92 by default; the
    activations are in the rest."""
    driver: float = 0.5
    """Seconds between two steps: log, ledger, advantages. Assumed."""
    interruptions: float = 419 / (16384 * 54 * 24)
    """For each GPU and hour: 419 unexpected ones in 54 days on 16,384 GPUs (2407.21783, section 3.3.4)."""
    generator_recovery: float = 300.0
    """Seconds until a generator that died loads weights again: a process starts, vLLM loads, compiles, captures its
    graphs. Assumed."""
    learner_recovery: float = 900.0
    """Seconds until learners that died go on from their checkpoint: processes start, all read it. Assumed."""
    max_num_seqs: int = 1024
    """Sequences that an engine decodes at once, where its memory has room: vLLM's default on an H100."""


#: Figures of the hardware that no data sheet has.
ASSUMED = (
    "network", "mfu", "prefill_mfu", "hbm_share", "network_share", "copy_share", "overhead", "driver",
    "generator_recovery", "learner_recovery",
)  # fmt: skip


@dataclass(frozen=True)
class Model:
    """Figures of the model's ``config.json``, and the size of its weights."""

    parameters: float
    layers: int
    kv_heads: int
    head: int = 128

    def kv_bytes(self, gpus: int) -> int:
        """Of a token in the bf16 cache of a generator; with more GPUs than heads vLLM keeps each head several times."""
        return 2 * self.layers * max(self.kv_heads, gpus) * self.head * 2


MODELS = {
    "7B": Model(7.6e9, 28, 4),  # Qwen2.5-7B
    "32B": Model(32.8e9, 64, 8),  # Qwen2.5-32B
    "70B": Model(70.6e9, 80, 8),  # Llama-3.1-70B
    "405B": Model(405.9e9, 126, 8),  # Llama-3.1-405B
}


def generator_gpus(model: Model, hardware: Hardware) -> int:
    """GPUs of one generator: the smallest power of two whose memory is at most half weights. Assumed."""
    return 2 ** max(0, math.ceil(math.log2(2 * model.parameters / (0.5 * hardware.memory))))


def least_learner_gpus(model: Model, hardware: Hardware) -> int:
    """Under ZeRO-3 with Adam, 16 bytes a parameter (1910.02054, section 3.1), in 0.7 of the memory.

    The rest is for activations; assumed.
    """
    return math.ceil(16 * model.parameters / (0.7 * hardware.memory))


def slots(model: Model, hardware: Hardware, tokens: float) -> int:
    """Sequences of ``tokens`` on average that a generator's cache has room for, ``max_num_seqs`` at most."""
    gpus = generator_gpus(model, hardware)
    room = hardware.memory_share * hardware.memory * gpus - 2 * model.parameters
    return max(1, min(hardware.max_num_seqs, int(room / (model.kv_bytes(gpus) * tokens))))


def gpu_costs(model: Model, hardware: Hardware, learner_gpus: int) -> Costs:
    """bf16; decoding is bound by memory or by arithmetic, prefill and training by arithmetic, a sync by its bytes.

    2 FLOPs for each parameter and token forward, 6 forward and backward, 8 with the layers computed again (gradient
    checkpointing); attention's own are left out, and the embedding counts although it only looks rows up. Every node of
    generators pulls the weights of its GPUs once, all side by side: nodes that have a copy pass it on.
    """
    h, n = hardware, model.parameters
    gpus = generator_gpus(model, h)
    copying = h.pcie * h.copy_share
    memory, forward = h.hbm * h.hbm_share * gpus, 2 * n / (h.flops * h.prefill_mfu)
    return Costs(
        step=h.overhead,
        weights=2 * n / memory,
        compute=forward / gpus,
        context=model.kv_bytes(gpus) / memory,
        prefill=forward / gpus,
        load=2 * n / gpus / copying,
        logprob_token=forward / learner_gpus,
        update_token=8 * n / (h.flops * h.mfu * learner_gpus),
        publish=2 * n / learner_gpus / copying,
        transfer=2 * n / max(1, gpus / h.node) / (h.network * h.network_share),
        driver=h.driver,
        # 2 bytes of weights and 12 of optimizer a parameter, copied to host memory by every GPU.
        checkpoint=14 * n / learner_gpus / copying,
    )
