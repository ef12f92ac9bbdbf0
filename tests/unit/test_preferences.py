"""Figures of a preference model against loops over pairs, closed forms and labels drawn from known probabilities."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from tiny import comparisons, rankings

from rlhf_dist import schema
from rlhf_dist.data.preferences import flip_labels, preferred_responses
from rlhf_dist.evaluation.preferences import (
    calibration,
    calibration_error,
    credit,
    judge,
    log_likelihood,
    paired_interval,
    win_probability,
)


def drawn(n: int, scale: float = 1.0, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Score differences, and labels drawn from their Bradley-Terry probabilities; the differences are then scaled."""
    rng = np.random.default_rng(seed)
    difference = rng.normal(size=n)
    wins = rng.random(n) < 1 / (1 + np.exp(-difference))
    # As the data have it: the side that won is the chosen one.
    return scale * np.where(wins, difference, -difference), np.ones(n)


def outcomes(n: int = 400, preference: Any = 1.0, source: Any = "a", seed: int = 0) -> pa.Table:
    """Random outcomes with ties of scores and of lengths."""
    rng = np.random.default_rng(seed)
    columns = {
        "row": np.arange(n),
        "difference": np.round(rng.normal(0.3, 1, n), 1),
        "longer": rng.integers(-3, 3, n),
        "preference": np.broadcast_to(np.asarray(preference, np.float32), n),
    }
    return pa.table({**columns, "source": np.broadcast_to(source, n).tolist()})


# Accuracy and the two rules


def test_credit_by_hand() -> None:
    difference = np.array([2.0, -1.0, 0.0, 3.0, 1.0])
    assert credit(difference, np.array([1.0, 1.0, 1.0, 0.5, 2 / 3])).tolist() == [1, 0, 0.5, 0.5, 1]


def test_figures_against_a_loop() -> None:
    table = outcomes(preference=np.random.default_rng(1).choice([0.5, 2 / 3, 1.0], 400))
    found = judge(table, seed=0)
    right: dict[str, list[float]] = {"difference": [], "longer": []}
    for row in table.to_pylist():
        if row["preference"] != 0.5:
            for name, credits in right.items():
                credits.append(1.0 if row[name] > 0 else 0.5 if row[name] == 0 else 0.0)
    assert 200 < len(right["longer"]) < 350, "annotators tie in some"
    accuracy, longer = (sum(credits) / len(credits) for credits in right.values())
    assert found["pairs"] == 400
    assert found["accuracy"] == pytest.approx(accuracy)
    assert (found["longer_wins"], found["shorter_wins"]) == pytest.approx((longer, 1 - longer))
    assert longer < 0.5, "so that the other rule is the one to beat"
    assert found["difference"] == pytest.approx(accuracy - (1 - longer))
    low, high = found["interval"]
    assert low < found["difference"] < high


def test_a_rule_as_a_model_has_no_lead() -> None:
    table = outcomes()
    rule = pa.array(-np.array(table["longer"].to_pylist(), float))  # the better of the two here
    found = judge(table.set_column(table.column_names.index("difference"), "difference", rule), seed=0)
    assert found["accuracy"] == found["shorter_wins"] > 0.5
    assert (found["difference"], found["interval"]) == (0, [0, 0])


# The interval


def test_the_interval_is_the_normal_one_for_many_pairs() -> None:
    rng = np.random.default_rng(0)
    a, b = rng.choice([0, 0.5, 1], 5000, p=[0.3, 0.1, 0.6]), rng.choice([0, 1], 5000)
    error = (a - b).std() / math.sqrt(5000)
    expected = [(a - b).mean() - 1.96 * error, (a - b).mean() + 1.96 * error]
    assert paired_interval(a, b, seed=0) == pytest.approx(expected, abs=0.05 * error)
    assert paired_interval(a, b, seed=0) == paired_interval(a, b, seed=0) != paired_interval(a, b, seed=1)
    half = paired_interval(a, b, seed=0, level=0.5)
    assert half[0] == pytest.approx((a - b).mean() - 0.6745 * error, abs=0.05 * error)


def test_the_interval_is_that_of_drawn_rows() -> None:
    """The bootstrap as the textbook has it: rows drawn with replacement, few enough that the normal one is wrong."""
    rng = np.random.default_rng(0)
    a, b = np.array([1, 1, 1, 0.5, 0, 1, 1, 1, 1]), np.array([1, 0, 0, 1, 0, 1, 1, 0, 1])
    rows = rng.integers(0, len(a), (200_000, len(a)))
    expected = np.quantile((a - b)[rows].mean(1), [0.025, 0.975])
    assert paired_interval(a, b, seed=0) == pytest.approx(expected, abs=0.06)


def test_pairing_makes_the_interval_shorter() -> None:
    a = np.random.default_rng(0).integers(0, 2, 1000).astype(float)
    b = a.copy()
    b[:50] = 1 - b[:50]
    low, high = paired_interval(a, b, seed=0)
    apart = paired_interval(a, np.random.default_rng(1).permutation(b), seed=0)
    assert high - low < 0.5 * (apart[1] - apart[0])


def test_the_interval_covers_as_often_as_it_says() -> None:
    rng = np.random.default_rng(3)
    hits = 0
    for trial in range(300):
        a, b = (rng.random((2, 200)) < [[0.6], [0.5]]).astype(float)
        low, high = paired_interval(a, b, seed=trial)
        hits += low <= 0.1 <= high
    assert 0.91 < hits / 300 < 0.985


# Calibration


def test_labels_from_the_models_own_probabilities_are_calibrated() -> None:
    errors = [calibration_error(calibration(*drawn(n))) for n in (1000, 10_000, 1_000_000)]
    assert errors[0] > errors[1] > errors[2]
    assert errors[2] < 0.002
    assert all(error < 2 * 0.4 * math.sqrt(10 / n) for error, n in zip(errors, (1000, 10_000, 1_000_000), strict=True))


def test_a_model_that_is_too_sure_of_itself() -> None:
    """Scores three times too large: the error is E|σ(3d) − σ(d)|."""
    difference, preference = drawn(400_000, scale=3)
    sure = np.abs(difference)
    expected = np.mean(1 / (1 + np.exp(-sure)) - 1 / (1 + np.exp(-sure / 3)))
    assert calibration_error(calibration(difference, preference)) == pytest.approx(expected, abs=0.003)


def test_one_probability_by_hand() -> None:
    """A model that always says 0.9 and is right in six of ten."""
    logit = math.log(9)
    curve = calibration(np.array([logit] * 6 + [-logit] * 4), np.ones(10), bins=4)
    assert curve["low"] == [0, 0.75]
    assert curve["sides"] == [10, 10]
    assert curve["predicted"] == pytest.approx([0.1, 0.9])
    assert curve["observed"] == pytest.approx([0.4, 0.6])
    assert calibration_error(curve) == pytest.approx(0.3)


def test_the_error_is_that_of_guo_et_al() -> None:
    """Confidence max(p, 1 − p) in ten bins from ½ to 1, against the accuracy of the side that was predicted."""
    rng = np.random.default_rng(0)
    difference = rng.normal(0.4, 1.5, 3000)
    error = 0.0
    for i in range(10):
        members = []
        for d in difference:
            confidence = max(1 / (1 + math.exp(-d)), 1 / (1 + math.exp(d)))
            if 0.5 + i / 20 <= confidence < 0.55 + i / 20:
                members.append((confidence, float(d > 0)))
        if members:
            gap = sum(c for c, _ in members) / len(members) - sum(r for _, r in members) / len(members)
            error += len(members) / len(difference) * abs(gap)
    assert calibration_error(calibration(difference, np.ones(3000))) == pytest.approx(error)


def test_the_curve_is_symmetric_and_takes_shares() -> None:
    difference, preference = np.array([0.3, -1.2, 2.0, 0.1]), np.array([2 / 3, 1.0, 0.9, 0.5])
    curve = calibration(difference, preference)
    mirrored = calibration(-difference, 1 - preference)
    for name, values in curve.items():
        assert values == pytest.approx(mirrored[name])
    total = np.array(curve["sides"])
    assert total.sum() == 8
    assert total @ np.array(curve["observed"]) == pytest.approx(4), "of each pair one side wins"
    assert total @ np.array(curve["predicted"]) == pytest.approx(4)


def test_a_model_without_an_opinion() -> None:
    curve = calibration(np.zeros(7), np.ones(7))
    assert (curve["predicted"], curve["observed"], curve["sides"]) == ([0.5], [0.5], [14])
    found = judge(outcomes().set_column(1, "difference", pa.array(np.zeros(400))), seed=0)
    assert (found["accuracy"], found["brier"], found["calibration_error"]) == (0.5, 0.25, 0)
    assert found["log_likelihood"] == pytest.approx(-math.log(2))


def test_probabilities_and_likelihoods_in_float64() -> None:
    difference = np.array([-1000.0, -3.0, 0.0, 0.7, 1000.0])
    expected = [0, 1 / (1 + math.exp(3)), 0.5, 1 / (1 + math.exp(-0.7)), 1]
    assert win_probability(difference) == pytest.approx(expected, rel=1e-12)
    y = np.array([1.0, 0.25, 2 / 3, 0.9, 0.0])
    found = log_likelihood(difference, y)
    assert (found[0], found[-1]) == (-1000, -1000), "finite, where the probability is 0 in float64"
    for value, p, label in zip(found[1:-1], expected[1:-1], y[1:-1], strict=True):
        assert value == pytest.approx(label * math.log(p) + (1 - label) * math.log(1 - p), rel=1e-12)


# Parts


def test_figures_by_source_and_by_agreement() -> None:
    shares = np.tile([2 / 3, 1.0, 0.5, 0.6], 100)
    sources = np.repeat(["helpful", "", "unsure"], [200, 196, 4])
    table = outcomes(preference=shares, source=sources)
    found = judge(table, seed=0)
    assert list(found["by_source"]) == ["unknown", "helpful", "unsure"]
    for name, source in (("unknown", ""), ("helpful", "helpful")):
        alone = judge(table.filter(pa.array(sources == source)), seed=0)
        assert found["by_source"][name] == {k: alone[k] for k in found["by_source"][name]}
    assert list(found["by_agreement"]) == ["0.5 to 0.6", "0.6 to 0.7", "0.9 to 1.0"]
    assert [part["pairs"] for part in found["by_agreement"].values()] == [100, 100, 100]
    whole = sum(part["accuracy"] for part in found["by_agreement"].values()) / 3
    assert whole == pytest.approx(found["accuracy"]), "ties of the annotators have no part in either"


def test_one_annotator_has_nobody_to_agree_with() -> None:
    assert judge(outcomes(), seed=0)["by_agreement"] == {}
    assert judge(outcomes(preference=np.tile([0.5, 1.0], 200)), seed=0)["by_agreement"] == {}


def test_pairs_without_a_majority_are_refused_or_left_out() -> None:
    with pytest.raises(ValueError, match="the annotators of all 400 held-out pairs tie"):
        judge(outcomes(preference=0.5), seed=0)
    table = outcomes(preference=np.repeat([1.0, 0.5], 200), source=np.repeat(["a", "b"], 200))
    assert list(judge(table, seed=0)["by_source"]) == ["a"]


# Tables


PAIRS = comparisons([(2, 3, 1), (1, 1, 4), (3, 2, 2), (1, 5, 5)] * 100)


@pytest.mark.parametrize("share", [0.1, 0.4, 0.5])
def test_flipped_labels_keep_the_pairs(share: float) -> None:
    flipped, count = flip_labels(PAIRS, share, seed=0)
    schema.check(flipped, schema.COMPARISON, "pairs")
    swapped = 0
    for a, b in zip(PAIRS.to_pylist(), flipped.to_pylist(), strict=True):
        if a != b:
            swapped += 1
            assert b == a | {"chosen_ids": a["rejected_ids"], "rejected_ids": a["chosen_ids"]}
    assert swapped == count
    assert abs(count - 400 * share) < 3 * math.sqrt(400 * share * (1 - share))
    assert flip_labels(PAIRS, share, seed=0)[0] == flipped != flip_labels(PAIRS, share, seed=1)[0]


def test_more_noise_flips_what_less_noise_flips() -> None:
    clean = PAIRS["chosen_ids"].to_pylist()
    flipped: list[set[int]] = []
    for share in (0.1, 0.3, 0.5):
        ids = flip_labels(PAIRS, share, seed=0)[0]["chosen_ids"].to_pylist()
        flipped.append({i for i, (a, b) in enumerate(zip(clean, ids, strict=True)) if a != b})
    assert flipped[0] < flipped[1] < flipped[2]


def test_preferred_responses_of_comparisons_and_of_rankings() -> None:
    table = preferred_responses(PAIRS, at_most=50, seed=0)
    assert schema.check(table, schema.DEMONSTRATION, "reference").num_rows == 50
    wanted = [(r["prompt_ids"], r["chosen_ids"]) for r in PAIRS.to_pylist()]
    found = [(r["prompt_ids"], r["response_ids"]) for r in table.to_pylist()]
    assert all(pair in wanted for pair in found)
    assert len(set(map(str, found))) > 40, "drawn without replacement, from all rows"
    ranked = rankings([(2, (3, 1, 2)), (1, (2, 4))], [(0, 0, 1), (0.5,)])
    best = preferred_responses(ranked, at_most=9, seed=0).to_pylist()
    expected = [(r["prompt_ids"], r["responses"][i]) for r, i in zip(ranked.to_pylist(), (1, 0), strict=True)]
    assert sorted((r["prompt_ids"], r["response_ids"]) for r in best) == sorted(expected)
