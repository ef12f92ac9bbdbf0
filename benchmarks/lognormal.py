"""A policy whose responses have log-normal lengths, by its weights alone: any sampler draws them, nothing is forced.

The policy is a Markov chain over words. Embeddings name the state, the layers add nothing to them (but cost what they
always cost), and the head holds the chain's transitions. A response draws one of ``PACES`` paces, whose mean lengths
are quantiles of the log-normal, and goes through ``PHASES`` phases of its pace, so that one pace has a narrow spread.
"""

from __future__ import annotations

import math
from pathlib import Path
from statistics import NormalDist
from typing import Any

PACES, PHASES = 13, 6
#: Of a word that does not follow; e^-30 is never sampled.
NEVER = -30.0


def mean_lengths(median: float, sigma: float) -> list[float]:
    """Words of a response by pace. The phases add their part to ``sigma``, so the paces are that much closer."""
    within = sum(1 / k**2 for k in range(PHASES, 10_000))  # variance of the logarithm of a sum of PHASES waits
    if sigma**2 <= within:
        raise ValueError(f"sigma={sigma}: {PHASES} phases alone have {math.sqrt(within):.2f}; take more")
    spread = NormalDist(math.log(median), math.sqrt(sigma**2 - within))
    return [max(float(PHASES), math.exp(spread.inv_cdf((i + 0.5) / PACES))) for i in range(PACES)]


def lognormal_policy(folder: Path, model: dict[str, Any], median: float, sigma: float) -> Path:
    """Write a policy with the tokenizer of the embedded world to ``folder``.

    Args:
        model: ``model.architecture``; Llama, ``hidden_size`` above ``PACES`` * ``PHASES``.
        median: words of a response.
        sigma: standard deviation of the logarithm of the words.
    """
    import torch

    from rlhf_dist.data.tokenization import save_tokenizer
    from rlhf_dist.data.world import SPECIAL, build_tokenizer
    from rlhf_dist.models import build_policy

    tokenizer = build_tokenizer()
    save_tokenizer(tokenizer, str(folder))
    special = {f"{k}_token_id": getattr(tokenizer, f"{k}_token_id") for k in ("bos", "eos", "pad")}
    policy = build_policy(model | {"tie_word_embeddings": False}, len(tokenizer), special, seed=0)
    words = range(len(SPECIAL) + 2, len(tokenizer))  # the two turn tokens are no words
    state = {word: i % (PACES * PHASES) for i, word in enumerate(words)}
    start = PACES * PHASES
    with torch.no_grad():
        for layer in policy.model.layers:
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
        embeddings = policy.get_input_embeddings().weight.zero_()
        for token in range(len(tokenizer)):
            embeddings[token, state.get(token, start)] = 1.0
        # What the last norm makes of a 1 among zeros.
        scale = 1 / math.sqrt(1 / policy.config.hidden_size + policy.config.rms_norm_eps)
        head = policy.get_output_embeddings().weight.zero_()
        table = _log_transitions(state, tokenizer.eos_token_id, len(tokenizer), mean_lengths(median, sigma))
        head[:, : start + 1] = torch.tensor(table) / scale
    policy.save_pretrained(folder)
    return folder


def _log_transitions(state: dict[int, int], eos: int, vocabulary: int, means: list[float]) -> list[list[float]]:
    """``[vocabulary, states + 1]``: log-probability of each token after each state; the last is before the response."""
    start = PACES * PHASES
    members = [[word for word, s in state.items() if s == i] for i in range(start)]
    table = [[NEVER] * (start + 1) for _ in range(vocabulary)]

    def go(before: int, after: int, probability: float) -> None:
        for word in members[after]:
            table[word][before] = math.log(probability / len(members[after])) if probability else NEVER

    for pace, mean in enumerate(means):
        onward = PHASES / mean
        first = pace * PHASES
        go(start, first, 1 / PACES)
        for i in range(first, first + PHASES):
            go(i, i, 1 - onward)
            if i + 1 < first + PHASES:
                go(i, i + 1, onward)
            else:
                table[eos][i] = math.log(onward)
    return table
