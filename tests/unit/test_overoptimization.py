"""Turns and fits of Gao et al., on figures whose truth is known; false alarms counted."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from rlhf_dist.evaluation import overoptimization
from rlhf_dist.evaluation.overoptimization import fit, turn

D = np.sqrt([0.01, 0.2, 0.9, 2.0, 5.0, 11.0])


@pytest.mark.parametrize(("form", "second"), [("bon", D**2), ("rl", D * np.log(D))])
def test_a_fit_finds_the_coefficients(form: str, second: np.ndarray) -> None:
    gain = 0.7 * D - 0.15 * second
    assert fit(form, D, gain) == pytest.approx({"alpha": 0.7, "beta": 0.15, "rmse": 0.0}, abs=1e-10)
    noisy = gain + np.array([0.01, -0.02, 0.01, 0.03, -0.01, 0.0])
    found = fit(form, D, noisy)
    assert found is not None
    left = lambda alpha, beta: float(np.sqrt(np.mean((noisy - alpha * D + beta * second) ** 2)))
    assert found["rmse"] == pytest.approx(left(found["alpha"], found["beta"]))
    for alpha, beta in ((0.001, 0), (-0.001, 0), (0, 0.001), (0, -0.001)):
        assert left(found["alpha"] + alpha, found["beta"] + beta) > found["rmse"]


def test_a_fit_needs_four_distances() -> None:
    assert fit("rl", [0.0, 0.1, 0.2, 0.3], [0, 1, 2, 3]) is None, "the start is no distance"
    assert fit("bon", [0.5, 0.5, 0.5, 0.5], [1, 1, 1, 1]) is None, "one distance fits any two coefficients"
    assert fit("bon", [0.0, 0.1, 0.2, 0.3, 0.4], [9, 0.1, 0.2, 0.3, 0.4]) is not None


def test_a_turn_by_hand() -> None:
    up_and_down, error = [0.4, 0.6, 0.8, 0.6, 0.5], [0.01] * 5
    assert turn(up_and_down, error) == 2
    assert turn([0.8, 0.5, 0.5], error[:3]) == 0, "training only made it worse"
    assert turn([0.4, 0.5, 0.6], error[:3]) is None, "still rising"
    assert turn([0.4], error[:1]) is None
    # 0.25 below the maximum; z of 1 - 0.05 / 4 is 2.2414, the noise √2 times the standard error.
    limit = 0.25 / (2.2414 * math.sqrt(2))
    assert turn(up_and_down, [0.99 * limit] * 5) == 2
    assert turn(up_and_down, [1.01 * limit] * 5) is None
    assert turn(up_and_down, [math.inf] * 5) is None, "one prompt says nothing"


def test_a_figure_that_does_not_fall_seldom_turns() -> None:
    """Ten evaluations of a figure that stays or rises, 2,000 times; noise as large as it says, half of it shared."""
    rng = np.random.default_rng(0)
    for slope, most in ((0.0, 0.05), (0.05, 0.05)):
        shared, own = rng.normal(size=(2000, 1)), rng.normal(size=(2000, 10))
        values = slope * np.arange(10) + math.sqrt(0.5) * shared + math.sqrt(0.5) * own
        assert np.mean([turn(v.tolist(), [1.0] * 10) is not None for v in values]) <= most
    fallen = -np.array([4, 2, 0, 0, 2, 4, 6, 8, 8, 8]) + rng.normal(size=(200, 10))
    assert np.mean([turn(v.tolist(), [1.0] * 10) is not None for v in fallen]) > 0.9


def evaluation(reward: float, gold: float, kl: float | None) -> dict[str, Any]:
    metrics = {"reward": reward, "gold": gold, "response_length_mean": 9.0} | ({} if kl is None else {"kl": kl})
    return {"metrics": metrics, "std": {"reward": 1.0, "gold": 0.5}, "stderr": {"reward": 0.02, "gold": 0.01}}


def test_rows_and_their_summary() -> None:
    figures = [(0.0, 0.5, -1e-7), (1.0, 0.7, 1.0), (2.0, 0.8, 4.0), (3.0, 0.6, 9.0), (4.0, 0.4, 16.0)]
    rows = [overoptimization.row(10 * i, evaluation(*f)) for i, f in enumerate(figures)]
    assert rows[2]["sqrt_kl"] == 2
    assert rows[0]["sqrt_kl"] == 0, "an estimate of a KL of 0 may be below it"
    assert {"step", "reward_std", "gold_stderr", "response_length_mean"} <= rows[0].keys()
    found = overoptimization.summary(rows)
    assert found["evaluations"] == 5
    assert found.keys() == {"evaluations", "reward", "gold"}, "a length has no turn"
    gold = found["gold"]
    assert (gold["start"], gold["best"], gold["best_step"], gold["last"]) == (0.5, 0.8, 20, 0.4)
    assert gold["turn"] == {"step": 20, "kl": 4.0, "sqrt_kl": 2.0}
    assert gold["fit_bon"]["beta"] > 0
    assert found["reward"]["turn"] is None
    # Over distances of 1, 2, 3, 4 the proxy rises by the distance itself.
    assert found["reward"]["fit_rl"] == pytest.approx({"alpha": 1, "beta": 0, "rmse": 0}, abs=1e-12)


def test_without_a_reference_there_are_turns_but_no_distances() -> None:
    golds = (0.5, 0.8, 0.3, 0.3)
    rows = [overoptimization.row(i, evaluation(float(i), gold, None)) for i, gold in enumerate(golds)]
    gold = overoptimization.summary(rows)["gold"]
    assert gold["turn"] == {"step": 1}
    assert gold["fit_rl"] is gold["fit_bon"] is None
