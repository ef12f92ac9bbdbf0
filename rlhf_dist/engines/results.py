"""What an engine hands out: finished samples, scored texts, and what was verified in a weight update."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass
class Sample:
    """One finished response."""

    lane: int
    group_id: int
    sample_index: int
    prompt_id: int
    prompt_ids: np.ndarray
    response_ids: list[int]
    logprobs: list[float]
    finish_reason: str
    policy_versions: np.ndarray
    """Of each token of the response."""


@dataclass
class TextScores:
    """Next-token distributions at every token of a text but the first: the ``k`` most likely tokens of each."""

    row: int
    """The caller's number."""
    token_ids: np.ndarray
    """``[n - 1, k]`` int32, most likely first."""
    logprobs: np.ndarray
    """``[n - 1, k]`` float32, at temperature 1."""


@dataclass
class SyncRecord:
    """What was verified in one weight update; all seconds are wall time."""

    version: int
    nbytes: int
    tensors: int
    load_seconds: float = 0.0
    verify_seconds: float = 0.0
    canary_diff: float = float("nan")
    """Learner against generator, new weights: :func:`canary_difference`."""
    canary_diff_old: float = float("nan")
    """The same against the generator's previous weights: what a skipped load would show."""
    reloaded_after: str = ""
    """Why the first attempt failed, if it did."""
    in_flight: int = 0
    """Requests that were running and ran on."""

    @property
    def canary_tells_apart(self) -> bool:
        """Whether the canary could tell the new weights from the old ones (a tiny step may not be visible)."""
        return self.canary_diff_old > 2 * self.canary_diff
