"""Reward over-optimisation: what a run's evaluations say of proxy and gold as the policy moves away from its start.

A row is one evaluation: ``step``, its figures by name, ``NAME_std`` and ``NAME_stderr`` of each score, and, where there
is a reference, ``kl`` per sample and ``sqrt_kl``, the distance d = √KL(π ‖ π₀).

Source: Gao et al., 2210.10760.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from statistics import NormalDist
from typing import Any

import numpy as np

Row = dict[str, float]
#: The second term of Gao et al.'s two forms of the gain: d (α − β d) for best-of-n, d (α − β log d) for RL.
FORMS: dict[str, Callable[[np.ndarray], np.ndarray]] = {"bon": lambda d: d * d, "rl": lambda d: d * np.log(d)}
#: Evaluations away from the start that a fit needs.
FIT_FROM = 4
#: How often a figure that never falls may show a turn.
SIGNIFICANCE = 0.05


def row(step: int, evaluation: dict[str, Any]) -> Row:
    """The row of one evaluation, from what :func:`~rlhf_dist.evaluation.summary.summarize` says."""
    metrics = evaluation["metrics"]
    found = {"step": step, **metrics}
    for kind in ("std", "stderr"):
        found |= {f"{name}_{kind}": value for name, value in evaluation[kind].items()}
    if "kl" in metrics:
        found["sqrt_kl"] = math.sqrt(max(0.0, metrics["kl"]))  # an estimate of a KL near 0 may be negative
    return found


def summary(rows: Sequence[Row]) -> dict[str, Any]:
    """Of every score that ``rows``, in order of their steps, have: start, best, last, its turn, and both fits.

    Returns:
        ``evaluations``, their number, and for each name ``start``, ``best``, ``best_step`` and ``last``; ``turn``
        (``step``, ``kl``, ``sqrt_kl``) where :func:`turn` finds one, else None; ``fit_bon``, ``fit_rl`` as :func:`fit`.
    """
    found: dict[str, Any] = {"evaluations": len(rows)}
    for name in dict.fromkeys(key.removesuffix("_stderr") for r in rows for key in r if key.endswith("_stderr")):
        part = [r for r in rows if name in r]
        values = [r[name] for r in part]
        best = int(np.argmax(values))
        turned = turn(values, [r[f"{name}_stderr"] for r in part])
        away = [r for r in part[1:] if "sqrt_kl" in r]
        distance, gain = [r["sqrt_kl"] for r in away], [r[name] - values[0] for r in away]
        found[name] = {
            "start": values[0],
            "best": values[best],
            "best_step": part[best]["step"],
            "last": values[-1],
            "turn": None if turned is None else {k: part[turned][k] for k in ("step", "kl", "sqrt_kl") if k in part[0]},
            **{f"fit_{form}": fit(form, distance, gain) for form in FORMS},
        }
    return found


def turn(values: Sequence[float], stderr: Sequence[float]) -> int | None:
    """Where a figure turned: the index of its maximum, if the values after it are below it by more than noise.

    Compared are the maximum v and the mean m of the values after it: v − m > z √(se_v² + se_m²), with se_m² the mean of
    their squared standard errors. Any of the K − 1 values that have a successor could be the maximum by chance, so z is
    the normal quantile of 1 − 0.05 / (K − 1) (Bonferroni): of runs in which the figure never falls, one in twenty at
    most shows a turn. It is fewer in truth, since the evaluations share their prompts: differences vary less than the
    two errors say.

    Returns:
        None also where the last value is the maximum, or where there is one value only.
    """
    best = int(np.argmax(values))
    after = values[best + 1 :]
    if not after:
        return None
    z = NormalDist().inv_cdf(1 - SIGNIFICANCE / (len(values) - 1))
    noise = math.sqrt(stderr[best] ** 2 + float(np.mean(np.square(stderr[best + 1 :]))))
    return best if values[best] - float(np.mean(after)) > z * noise else None


def fit(form: str, distance: Sequence[float], gain: Sequence[float]) -> dict[str, float] | None:
    """Least squares of ``gain`` in d (α − β d), form "bon", or d (α − β log d), form "rl".

    Args:
        distance: d = √KL of each evaluation; those with 0 say nothing and are left out.
        gain: the figure minus its start.

    Returns:
        ``alpha``, ``beta`` and ``rmse``, the root mean square of what the fit leaves, in units of the figure; None with
        fewer than four distances above 0, or if all are equal.
    """
    d, y = np.asarray(distance), np.asarray(gain)
    d, y = d[d > 0], y[d > 0]
    if len(d) < FIT_FROM:
        return None
    terms = np.stack([d, -FORMS[form](d)], axis=1)
    coefficients, _, rank, _ = np.linalg.lstsq(terms, y)
    if rank < 2:
        return None
    rmse = float(np.sqrt(np.mean((terms @ coefficients - y) ** 2)))
    return {"alpha": float(coefficients[0]), "beta": float(coefficients[1]), "rmse": rmse}
