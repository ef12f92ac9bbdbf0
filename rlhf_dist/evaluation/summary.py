"""Figures of a set of samples: means, by group, best-of-n, and a few samples to read."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from rlhf_dist.data.ragged import Ragged
from rlhf_dist.evaluation.best_of_n import best_weights, kl_bound

#: Samples that are kept for reading.
SHOWN = 8


def summarize(
    table: pa.Table,
    prompts: pa.Table,
    tokenizer: Any,
    group_by: str | None,
    n_samples: int,
    best_of_n: Sequence[int] = (),
) -> dict[str, Any]:
    """Summarise samples whose scores are joined in.

    Args:
        table: ``schema.ROLLOUT``, sorted by group and sample; with ``score``, ``score/NAME`` (components of the
            reward) and ``metric/NAME`` (other figures) as far as they were computed. A null is a score that was given
            up; figures are over the others.
        prompts: ``schema.PROMPT``.
        group_by: field of the source rows.
        n_samples: samples per prompt.
        best_of_n: each at most ``n_samples``.

    Returns:
        ``metrics``: mean ``reward`` (the weighted sum) and of every component and figure; ``response_length_mean``,
        ``truncated_rate``, ``distinct_2``; with ``ref_logprobs`` also ``kl`` per sample and ``ref_perplexity``, of the
        samples under the reference. ``std`` of the samples, and ``stderr`` of the mean, of reward, components and
        figures; ``by_group``; ``best_of_n``, for each n (as text, for JSON) what to expect of every figure in the
        sample that the reward prefers among n of a prompt (:func:`~rlhf_dist.evaluation.best_of_n.best_weights`; over
        the prompts whose samples all have a reward), and ``kl_bound``, its KL to this policy at most; ``samples``;
        ``unscored``: samples without a reward.
    """
    # Nulls become NaN here.
    scores = {"reward": table["score"].to_numpy()} if "score" in table.column_names else {}
    components = [c for c in table.column_names if c.startswith("score/")]
    # A reward of one component is that component; it need not be said twice.
    for column in [c for c in table.column_names if c.startswith("metric/")] + components * (len(components) > 1):
        scores[column.partition("/")[2]] = table[column].to_numpy()
    metrics = _means(scores)
    metrics["response_length_mean"] = float(Ragged.of(table, "response_ids").lengths.mean())
    metrics["truncated_rate"] = float(
        pc.mean(pc.equal(table["finish_reason"].cast(pa.string()), "length").cast(pa.float64())).as_py()
    )
    metrics["distinct_2"] = distinct_bigrams(Ragged.of(table, "response_ids"))
    if "ref_logprobs" in table.column_names:
        metrics["ref_perplexity"] = float(np.exp(-Ragged.of(table, "ref_logprobs").values.mean()))
        difference = Ragged.of(table, "rollout_logprobs").values - Ragged.of(table, "ref_logprobs").values
        metrics["kl"] = float(difference.sum() / table.num_rows)
    rows = table["prompt_id"].to_numpy()
    fields = [json.loads(f) for f in prompts["fields"].take(pa.array(rows)).to_pylist()]
    result: dict[str, Any] = {
        "metrics": metrics,
        "std": {name: float(x[~np.isnan(x)].std()) for name, x in scores.items() if name in metrics},
        "stderr": {name: _stderr(x, n_samples) for name, x in scores.items() if name in metrics},
        "by_group": {},
        "best_of_n": _best_of_n(scores, n_samples, best_of_n) if "reward" in scores else {},
        "samples": _samples(table, prompts, tokenizer, scores, n_samples),
        "unscored": int(np.isnan(scores["reward"]).sum()) if "reward" in scores else 0,
    }
    if group_by is not None:
        groups = np.array([str(f.get(group_by, "")) for f in fields])
        for group in sorted(set(groups)):
            result["by_group"][group] = _means({name: x[groups == group] for name, x in scores.items()})
    return result


def _best_of_n(scores: dict[str, np.ndarray], n_samples: int, sizes: Sequence[int]) -> dict[str, dict[str, float]]:
    by_prompt = {name: x.reshape(-1, n_samples) for name, x in scores.items()}
    complete = ~np.isnan(by_prompt["reward"]).any(1)
    if not complete.any():
        return {}
    found = {}
    for n in sizes:
        weights = best_weights(by_prompt["reward"][complete], n)
        means = {name: float((weights * x[complete]).sum(1).mean()) for name, x in by_prompt.items()}
        found[str(n)] = means | {"kl_bound": kl_bound(n)}
    return found


def _stderr(x: np.ndarray, n_samples: int) -> float:
    """Standard error of the mean of the samples that have a score; infinite where they are all of one prompt.

    The samples of a prompt are alike, so prompts are what is counted as independent (cluster-robust).
    """
    prompts = int((~np.isnan(x)).reshape(-1, n_samples).any(1).sum())
    if prompts < 2:
        return math.inf
    deviations = np.nansum((x - np.nanmean(x)).reshape(-1, n_samples), axis=1)
    return float(np.sqrt(prompts / (prompts - 1) * (deviations**2).sum()) / (~np.isnan(x)).sum())


def _means(scores: dict[str, np.ndarray]) -> dict[str, float]:
    """Over the samples that have a score; figures that no sample has are left out."""
    return {name: float(x[~np.isnan(x)].mean()) for name, x in scores.items() if not np.isnan(x).all()}


def distinct_bigrams(responses: Ragged) -> float:
    """distinct-2 (Li et al., 1510.03055): different pairs of neighbouring tokens, as a share of all pairs.

    Depends on how much text there is; compare sets of equal size only.
    """
    ids, n = responses.values.astype(np.int64), len(responses.values)
    inside = np.ones(max(0, n - 1), bool)
    ends = responses.offsets[1:-1]
    inside[ends[(ends > 0) & (ends < n)] - 1] = False  # a pair that spans two responses
    pairs = (ids[:-1] << 32 | ids[1:])[inside]
    return len(np.unique(pairs)) / len(pairs) if len(pairs) else 0.0


def _samples(
    table: pa.Table, prompts: pa.Table, tokenizer: Any, scores: dict[str, np.ndarray], n: int
) -> list[dict[str, Any]]:
    rows = np.arange(0, table.num_rows, n)[:SHOWN]
    part = table.take(pa.array(rows))
    texts = tokenizer.batch_decode(part["response_ids"].to_pylist(), skip_special_tokens=True)
    asked = prompts["prompt"].take(part["prompt_id"]).to_pylist()
    return [
        {
            "prompt": p,
            "response": t,
            "scores": {name: round(float(x[r]), 4) for name, x in scores.items() if not np.isnan(x[r])},
        }
        for p, t, r in zip(asked, texts, rows, strict=True)
    ]
