"""How a preference (reward) model is judged on held-out comparisons: what it says, and how sure of it it may be.

``difference`` is everywhere the score of the chosen side minus that of the rejected one, ``[n]``, and ``preference``
the share of annotators who prefer the chosen side, ``[n]``: 1 where one person labelled, ½ where annotators tie.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

#: Bins of the win probability between 0 and 1; an even number, so that they mirror each other about ½.
BINS = 20
RESAMPLES = 10_000


def judge(pairs: pa.Table, seed: int) -> dict[str, Any]:
    """All figures of the outcomes of ``LearnerGroup.pair_outcomes``, as plain numbers, dicts and lists.

    Args:
        pairs: columns ``source``, ``difference``, ``preference`` and ``longer``, by how many tokens the chosen side is
            longer than the rejected one.
        seed: of the intervals.

    Returns:
        :func:`figures` of all pairs; ``calibration``; ``by_source`` and, where pairs have several annotators,
        ``by_agreement``: the figures of each part.

    Raises:
        ValueError: the annotators tie in every pair.
    """
    found = figures(pairs, seed)
    if found is None:
        raise ValueError(f"the annotators of all {pairs.num_rows} held-out pairs tie: there is no accuracy to measure")
    sources = sorted(set(pairs["source"].to_pylist()))
    parts = {s or "unknown": figures(pairs.filter(pc.equal(pairs["source"], s)), seed) for s in sources}
    difference, preference = _column(pairs, "difference"), _column(pairs, "preference")
    return {
        **found,
        "calibration": calibration(difference, preference),
        "by_source": {name: part for name, part in parts.items() if part},
        "by_agreement": by_agreement(pairs, seed),
    }


def figures(pairs: pa.Table, seed: int) -> dict[str, Any] | None:
    """Figures of one set of pairs, columns as in :func:`judge`; None where the annotators tie in every pair.

    ``accuracy``, ``longer_wins`` and ``shorter_wins`` are over the pairs that annotators could decide, the others over
    all: ``difference``, accuracy less the better of the two rules, with its 95 % ``interval``; ``log_likelihood`` of a
    pair in nats (a coin has −ln 2); ``brier`` (a coin has ¼); ``calibration_error``. The better rule is chosen on the
    same pairs, which favours it.
    """
    difference, preference = _column(pairs, "difference"), _column(pairs, "preference")
    decided = preference != 0.5
    if not decided.any():
        return None
    model = credit(difference, preference)[decided]
    longer = credit(_column(pairs, "longer"), preference)[decided]
    rule = longer if longer.mean() >= 0.5 else 1 - longer
    return {
        "pairs": pairs.num_rows,
        "accuracy": float(model.mean()),
        "longer_wins": float(longer.mean()),
        "shorter_wins": float((1 - longer).mean()),
        "difference": float(model.mean() - rule.mean()),
        "interval": paired_interval(model, rule, seed),
        "log_likelihood": float(log_likelihood(difference, preference).mean()),
        "brier": float(np.mean((win_probability(difference) - preference) ** 2)),
        "calibration_error": calibration_error(calibration(difference, preference)),
    }


def by_agreement(pairs: pa.Table, seed: int) -> dict[str, Any]:
    """:func:`figures` by the share of annotators who agree with their majority; {} where nobody disagrees with anybody.

    Parts are (0.5, 0.6], ... (0.9, 1]. A pair with a single annotator counts as one on which all agree.
    """
    preference = _column(pairs, "preference")
    share = np.maximum(preference, 1 - preference)
    if not ((share > 0.5) & (share < 1)).any():
        return {}
    # Rounded, because float32 has no 0.6.
    tenth = np.ceil(np.round(10 * share, 4)).astype(int)
    parts = {t: pairs.filter(pa.array(tenth == t)) for t in range(6, 11)}
    return {f"{(t - 1) / 10} to {t / 10}": figures(part, seed) for t, part in parts.items() if part.num_rows}


def credit(difference: np.ndarray, preference: np.ndarray) -> np.ndarray:
    """Of each pair 1 where scores and majority prefer the same side, ½ where either ties, 0 where they disagree."""
    return (1 + np.sign(difference) * np.sign(preference - 0.5)) / 2


def paired_interval(a: np.ndarray, b: np.ndarray, seed: int, level: float = 0.95) -> list[float]:
    """Percentile bootstrap interval of mean(a) − mean(b), where a[i] and b[i] are of one pair and drawn together.

    How often each value of a − b occurs in a resample of n pairs is a multinomial draw, which spares drawing n times
    ``RESAMPLES`` rows. Source: Efron & Tibshirani, An Introduction to the Bootstrap, 1993, section 13.3.
    """
    values, counts = np.unique(a - b, return_counts=True)
    drawn = np.random.default_rng(seed).multinomial(len(a), counts / len(a), RESAMPLES)
    low, high = np.quantile(drawn @ values / len(a), [(1 - level) / 2, (1 + level) / 2])
    return [float(low), float(high)]


def win_probability(difference: np.ndarray) -> np.ndarray:
    """σ(difference), of the chosen side (Bradley & Terry 1952)."""
    return np.exp(-np.logaddexp(0, -difference))


def log_likelihood(difference: np.ndarray, preference: np.ndarray) -> np.ndarray:
    """Of each pair's labels under the model, nats: y log p + (1 − y) log(1 − p), for y of the annotators."""
    return -preference * np.logaddexp(0, -difference) - (1 - preference) * np.logaddexp(0, difference)


def calibration(difference: np.ndarray, preference: np.ndarray, bins: int = BINS) -> dict[str, list[float]]:
    """Predicted win probability against observed frequency, in bins of equal width that hold something.

    **From both sides.** The chosen side is the one that won: of chosen sides all win, whatever the model predicts of
    them, and any model that is less than certain would look badly calibrated. A response has to be asked about before
    its label is known. So each pair counts twice, as (p, y) from the chosen and as (1 − p, 1 − y) from the rejected
    side. That is what one side drawn at random has in expectation, without the noise of the draw and without a seed.

    Returns:
        of each bin ``low`` (its lower edge), ``sides`` (how many, two for each pair), ``predicted`` (mean probability)
        and ``observed`` (mean label).
    """
    predicted = np.concatenate([win_probability(difference), win_probability(-difference)])
    label = np.concatenate([preference, 1 - preference])
    index = np.minimum((predicted * bins).astype(int), bins - 1)
    sides = np.bincount(index, minlength=bins)
    used = np.flatnonzero(sides)
    mean = lambda x: (np.bincount(index, x, bins)[used] / sides[used]).tolist()
    return {
        "low": (used / bins).tolist(),
        "sides": sides[used].tolist(),
        "predicted": mean(predicted),
        "observed": mean(label),
    }


def calibration_error(curve: dict[str, list[float]]) -> float:
    """Expected calibration error of :func:`calibration`: Σ over bins of share · |predicted − observed|.

    Equal to that of Guo et al. (1706.04599), who bin max(p, 1 − p) and compare it with the accuracy: bins mirror each
    other. It is above 0 for a calibrated model too, by about 0.4 √(B / n) with n pairs in B of their bins.
    """
    sides, predicted, observed = (np.array(curve[name]) for name in ("sides", "predicted", "observed"))
    return float(sides @ np.abs(predicted - observed) / sides.sum())


def _column(pairs: pa.Table, name: str) -> np.ndarray:
    return pairs[name].to_numpy().astype(np.float64)
