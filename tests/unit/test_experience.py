"""Joining what the stages computed, and advantages against computations by hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from tiny import ragged, rollouts

from rlhf_dist import schema
from rlhf_dist.config import AlgoConfig, RewardConfig
from rlhf_dist.data.experience import (
    Joinable,
    ScoreScale,
    ages,
    estimate_advantages,
    groups_without_reward,
    groups_without_spread,
    join,
    join_batch,
    shape_scores,
)
from rlhf_dist.schema import with_columns

FUNCTION = {"components": [{"name": "r", "function": "m:f"}]}
PLAIN = RewardConfig(**FUNCTION)
SHAPE = [(2, 3), (1, 1), (3, 2), (2, 4)]
SCORES = [1.0, 3.0, -2.0, 0.5]


def part(rows: list[int], **columns: Any) -> pa.Table:
    return pa.table({"row": pa.array(rows, pa.int64()), **columns})


def scored(rows: list[int]) -> pa.Table:
    return part(rows, score=pa.array([float(10 * r) for r in rows], pa.float32()))


# Joining


def test_parts_of_several_ranks_are_put_in_order() -> None:
    chunk = rollouts(SHAPE)
    joined = join(chunk, [scored([3, 1]), scored([0, 2])], "reward")
    assert joined["score"].to_pylist() == [0, 10, 20, 30]
    assert joined["response_ids"].equals(chunk["response_ids"])
    assert "row" not in joined.column_names


def test_a_rank_may_have_nothing() -> None:
    empty = part([], score=pa.array([], pa.float32()))
    assert join(rollouts(SHAPE), [scored([0, 1, 2, 3]), empty], "reward")["score"].to_pylist() == [0, 10, 20, 30]


def test_ragged_columns_follow_their_rows() -> None:
    values = lambda rows: ragged([SHAPE[r][1] for r in rows], lambda n: np.full(n, n), pa.float32())
    parts = [part([2, 0], values=values([2, 0])), part([1, 3], values=values([1, 3]))]
    assert join(rollouts(SHAPE), parts, "critic")["values"].to_pylist() == [[3] * 3, [1], [2] * 2, [4] * 4]


@pytest.mark.parametrize("rows", [[0, 1, 2], [0, 1, 2, 2], [0, 1, 1, 2, 3], [0, 1, 2, 4], []])
def test_a_row_that_is_missing_or_there_twice(rows: list[int]) -> None:
    with pytest.raises(ValueError, match=r"critic returned rows \[.*\].* for a chunk of 4 rows"):
        join(rollouts(SHAPE), [scored(rows)], "critic")


def whole(chunk: pa.Table, scores: pa.Table) -> Joinable:
    return Joinable(chunk, None, {"reward": [scores]}, {})


def test_a_slice_of_a_chunk_has_its_own_rows_of_every_stage() -> None:
    chunk, rows = rollouts([(1, 2)] * 6, n_samples=2), np.array([4, 5, 0, 1])
    values = part([0, 1, 2, 3], values=ragged([2] * 4, lambda n: np.full(n, 7), pa.float32()))
    sliced = Joinable(chunk, rows, {"reward": [scored([0, 1, 2, 3, 4, 5])]}, {"critic": [values]})
    joined = join_batch([sliced])
    assert joined["group_id"].to_pylist() == [0, 0, 2, 2]
    assert joined["score"].to_pylist() == [0, 10, 40, 50]
    assert joined["values"].to_pylist() == [[7, 7]] * 4
    narrow = join_batch([Joinable(chunk, rows, {"reward": [scored(range(6))]}, {})], ["group_id", "sample_index"])
    assert narrow.column_names == ["group_id", "sample_index", "score"]
    assert narrow["score"].to_pylist() == [0, 10, 40, 50]


def test_chunks_arrive_in_any_order_and_come_out_by_group_and_sample() -> None:
    table = rollouts([(1, 2)] * 6, n_samples=2)
    late, early = table.slice(4), table.take(pa.array([1, 0, 3, 2]))
    joined = join_batch([whole(late, scored([0, 1])), whole(early, scored([0, 1, 2, 3]))])
    assert joined["group_id"].to_pylist() == [0, 0, 1, 1, 2, 2]
    assert joined["sample_index"].to_pylist() == [0, 1, 0, 1, 0, 1]
    assert joined["score"].to_pylist() == [10, 0, 30, 20, 0, 10]
    assert joined["response_ids"].to_pylist() == table["response_ids"].to_pylist()


def test_chunks_whose_dictionaries_differ() -> None:
    table = rollouts([(1, 2)] * 4)
    i = table.column_names.index("finish_reason")
    reasons = [pa.array(r).dictionary_encode() for r in (["stop", "length"], ["length", "stop"])]
    chunks = [table.slice(2 * n, 2).set_column(i, "finish_reason", r) for n, r in enumerate(reasons)]
    joined = join_batch([whole(chunk, scored([0, 1])) for chunk in chunks])
    assert joined["finish_reason"].to_pylist() == ["stop", "length", "length", "stop"]


# Advantages


def joined_batch(n_samples: int = 1, reasons: list[str] | None = None, holes: bool = False, **columns: Any) -> pa.Table:
    """Four rows with scores and log-probabilities; reference and values where ``columns`` has them."""
    q = [b for _, b in SHAPE]
    table = rollouts(SHAPE, n_samples, holes=holes)
    if reasons:
        i = table.column_names.index("finish_reason")
        table = table.set_column(i, "finish_reason", pa.array(reasons).dictionary_encode())
    rng = np.random.default_rng(3)
    new = {"score": pa.array(SCORES, pa.float32())}
    for name in ("old_logprobs", *columns):
        new[name] = ragged(q, lambda n: rng.normal(size=n), pa.float32())
    return with_columns(table, pa.table(new), "test")


def rows(table: pa.Table, column: str) -> list[np.ndarray]:
    return [np.array(x, np.float64) for x in table[column].to_pylist()]


def assert_rows(table: pa.Table, column: str, expected: list[np.ndarray]) -> None:
    for found, wanted in zip(rows(table, column), expected, strict=True):
        np.testing.assert_allclose(found, wanted, atol=1e-5)


def rewards_by_hand(table: pa.Table, kl_coef: float, scores: list[float]) -> list[np.ndarray]:
    """Score on the last trained token, minus the KL on each (k1)."""
    out = []
    zipped = zip(rows(table, "old_logprobs"), rows(table, "ref_logprobs"), rows(table, "response_mask"), strict=True)
    for i, (old, ref, mask) in enumerate(zipped):
        r = np.where(mask == 1, -kl_coef * (old - ref), 0.0)
        if mask.any():
            r[np.flatnonzero(mask)[-1]] += scores[i]
        out.append(r)
    return out


@pytest.mark.parametrize("holes", [False, True])
def test_gae_with_kl(holes: bool) -> None:
    algo = AlgoConfig(gamma=0.9, gae_lambda=0.8, whiten_advantages=False, kl_coef=0.3)
    table = joined_batch(holes=holes, ref_logprobs=1, values=1)
    found, _ = estimate_advantages(table, algo, PLAIN, 0.3, ScoreScale(), 8)
    rewards = rewards_by_hand(table, 0.3, SCORES)
    advantages, returns = [], []
    for r, v, mask in zip(rewards, rows(table, "values"), rows(table, "response_mask"), strict=True):
        a, ret, after, value_after = np.zeros(len(r)), np.zeros(len(r)), 0.0, 0.0
        for t in np.flatnonzero(mask)[::-1]:
            after = r[t] + 0.9 * value_after - v[t] + 0.9 * 0.8 * after
            a[t], ret[t], value_after = after, after + v[t], v[t]
        advantages.append(a)
        returns.append(ret)
    assert_rows(found, "rewards", rewards)
    assert_rows(found, "advantages", advantages)
    assert_rows(found, "returns", returns)


def test_whitening_is_over_all_trained_tokens() -> None:
    algo = AlgoConfig(advantage_estimator="reinforce", gamma=0.5, whiten_advantages=True)
    table = joined_batch(holes=True)
    found, _ = estimate_advantages(table, algo, PLAIN, 0.0, ScoreScale(), 8)
    returns = []
    for score, mask in zip(SCORES, rows(table, "response_mask"), strict=True):
        ahead = mask[::-1].cumsum()[::-1]
        returns.append(np.where(mask == 1, score * 0.5 ** (ahead - 1), 0.0))
    trained = np.concatenate([x[m == 1] for x, m in zip(returns, rows(table, "response_mask"), strict=True)])
    white = [
        np.where(m == 1, (x - trained.mean()) / trained.std(ddof=1), 0)
        for x, m in zip(returns, rows(table, "response_mask"), strict=True)
    ]
    assert_rows(found, "advantages", white)


@pytest.mark.parametrize("estimator", ["rloo", "grpo", "dr_grpo"])
@pytest.mark.parametrize("in_reward", [True, False])
def test_group_estimators_compare_total_rewards(estimator: str, in_reward: bool) -> None:
    kl = {"kl_coef": 0.3} if in_reward else {"kl_coef": 0.3, "use_kl_loss": True, "kl_estimator": "k3"}
    algo = AlgoConfig(advantage_estimator=estimator, **kl)
    table = joined_batch(n_samples=2, ref_logprobs=1)
    found, figures = estimate_advantages(table, algo, PLAIN, 0.3, ScoreScale(), 8)
    rewards = rewards_by_hand(table, 0.3 if in_reward else 0.0, SCORES)
    totals = np.array([r.sum() for r in rewards]).reshape(2, 2)
    other = totals[:, ::-1]
    centred = totals - totals.mean(1, keepdims=True)
    expected = {
        "rloo": totals - other,
        "dr_grpo": centred,
        "grpo": centred / (totals.std(1, ddof=1, keepdims=True) + 1e-6),
    }[estimator].reshape(-1)
    assert_rows(found, "rewards", rewards)
    assert_rows(found, "advantages", [np.full(q, a) for (_, q), a in zip(SHAPE, expected, strict=True)])
    assert figures["rollout/zero_std_groups"] == 0


def test_groups_with_equal_scores_are_counted() -> None:
    table = joined_batch(n_samples=2)
    i = table.column_names.index("score")
    table = table.set_column(i, "score", pa.array([1.0, 1.0, 0.0, 2.0], pa.float32()))
    found, figures = estimate_advantages(table, AlgoConfig(advantage_estimator="grpo"), PLAIN, 0.0, ScoreScale(), 8)
    assert figures["rollout/zero_std_groups"] == 1
    assert rows(found, "advantages")[0].tolist() == [0, 0, 0]


def test_the_score_is_normalised_then_clipped_then_fined() -> None:
    reward = RewardConfig(**FUNCTION, normalize=True, clip=1.0, missing_eos_penalty=0.25)
    table = joined_batch(reasons=["stop", "stop", "length", "length"])
    algo = AlgoConfig(advantage_estimator="reinforce", whiten_advantages=False)
    found, figures = estimate_advantages(table, algo, reward, 0.0, ScoreScale(mean=0.5, std=2.0), 8)
    # (1, 3, -2, 0.5) -> (0.25, 1.25, -1.25, 0) -> clip -> (0.25, 1, -1, 0) -> fine of the truncated
    shaped = [0.25, 1.0, -1.25, -0.25]
    assert [float(r.sum()) for r in rows(found, "rewards")] == pytest.approx(shaped)
    assert [float(a[0]) for a in rows(found, "advantages")] == pytest.approx(shaped)
    assert found["score"].to_pylist() == SCORES, "the raw score stays in the table"
    assert figures["rollout/shaped_reward_mean"] == pytest.approx(np.mean(shaped))
    assert figures["rollout/truncated_rate"] == 0.5


def test_a_long_response_is_fined_softly() -> None:
    """DAPO, eq. 13, by hand: limit 4 and cache 2, so lengths 3, 2, 1, 4 (SHAPE) lose (3-2)/2, 0, 0, 1."""
    reward = RewardConfig(**FUNCTION, soft_overlong_cache=2)
    shaped = shape_scores(joined_batch(), reward, ScoreScale(), 4)
    lengths = np.array([q for _, q in SHAPE])
    np.testing.assert_allclose(shaped, SCORES - np.clip((lengths - 2) / 2, 0, 1))


def test_cut_off_responses_can_be_left_out_of_training() -> None:
    table = joined_batch(reasons=["stop", "length", "stop", "length"])
    plain, figures = estimate_advantages(
        table, AlgoConfig(advantage_estimator="reinforce_plus_plus"), PLAIN, 0.0, ScoreScale(), 8
    )
    algo = AlgoConfig(advantage_estimator="reinforce_plus_plus", mask_truncated=True)
    found, again = estimate_advantages(table, algo, PLAIN, 0.0, ScoreScale(), 8)
    assert [sum(m) for m in found["response_mask"].to_pylist()] == [SHAPE[0][1], 0, SHAPE[2][1], 0]
    assert found["advantages"] == plain["advantages"], "they count in the whitening"
    assert again == figures


def with_greedy(table: pa.Table, scores: list[float]) -> pa.Table:
    """Each group's first row once more, as its greedy response with a score of its own."""
    groups = table["group_id"].to_pylist()
    first = [groups.index(g) for g in dict.fromkeys(groups)]
    greedy = table.take(pa.array(first))
    columns = {
        "sample_index": pa.array([schema.GREEDY] * len(first), pa.int32()),
        "score": pa.array(scores, pa.float32()),
        "response_mask": pa.array([[0] * len(x) for x in greedy["response_ids"].to_pylist()], pa.list_(pa.uint8())),
    }
    for name, column in columns.items():
        greedy = greedy.set_column(greedy.column_names.index(name), name, column)
    return pa.concat_tables([table, greedy]).sort_by([("group_id", "ascending"), ("sample_index", "ascending")])


def test_remax_compares_with_the_greedy_response_of_the_same_prompt() -> None:
    table = joined_batch(n_samples=2)
    algo = AlgoConfig(advantage_estimator="remax")
    found, figures = estimate_advantages(with_greedy(table, [10.0, -1.0]), algo, PLAIN, 0.0, ScoreScale(), 8)
    assert found.num_rows == 4, "greedy responses are not trained"
    baseline = [10.0, 10.0, -1.0, -1.0]
    assert_rows(found, "advantages", [np.full(q, r - b) for (_, q), r, b in zip(SHAPE, SCORES, baseline, strict=True)])
    assert figures["rollout/reward_mean"] == pytest.approx(np.mean(SCORES))


def test_groups_without_spread_are_found() -> None:
    table = joined_batch(n_samples=2)
    i = table.column_names.index("score")
    table = table.set_column(i, "score", pa.array([1.0, 1.0, 0.0, 2.0], pa.float32()))
    groups = table["group_id"].to_pylist()
    assert groups_without_spread(table) == [groups[0]]
    assert groups_without_spread(with_greedy(table, [5.0, 0.0])) == [groups[0]], "a greedy response adds no spread"


def test_groups_without_a_reward_are_found_and_never_trained() -> None:
    table = joined_batch(n_samples=2)
    i = table.column_names.index("score")
    first, second = dict.fromkeys(table["group_id"].to_pylist())
    for scores, lacking in (([None, None, 1, 1], [first]), ([2, None, 1, 1], [first]), ([1, 1, 2, 2], [])):
        table = table.set_column(i, "score", pa.array(scores, pa.float32()))
        assert groups_without_reward(table) == lacking
        assert groups_without_spread(table) == [g for g in (first, second) if g not in lacking]
    assert groups_without_reward(with_greedy(table, [1.0, None])) == [second], "the baseline counts too"

    broken = table.set_column(i, "score", pa.array([1, 2, None, 3], pa.float32()))
    algo = AlgoConfig(advantage_estimator="grpo")
    with pytest.raises(ValueError, match=rf"column 'score' has 1 null values, in groups \[{second}\]"):
        estimate_advantages(broken, algo, PLAIN, 0.0, ScoreScale(), 8)


def test_an_estimator_of_ones_own() -> None:
    algo = AlgoConfig(advantage_estimator="test_experience:sign_of_the_score", kl_coef=0)
    found, _ = estimate_advantages(joined_batch(), algo, PLAIN, 0.0, ScoreScale(), 8)
    assert_rows(found, "advantages", [np.full(q, np.sign(s)) for (_, q), s in zip(SHAPE, SCORES, strict=True)])


def sign_of_the_score(terms: Any) -> tuple[Any, Any]:
    return terms.scores.sign()[:, None] * terms.mask, None


def test_scores_that_never_vary_do_not_explode() -> None:
    reward = RewardConfig(**FUNCTION, normalize=True)
    algo = AlgoConfig(advantage_estimator="reinforce", whiten_advantages=False)
    found, _ = estimate_advantages(joined_batch(), algo, reward, 0.0, ScoreScale(mean=1.0, std=0.0), 8)
    assert np.isfinite(rows(found, "rewards")[0]).all()
    assert rows(found, "rewards")[0].sum() == 0


def test_figures_by_hand() -> None:
    column = pa.array(SCORES, pa.float32())
    table = with_columns(joined_batch(holes=True, ref_logprobs=1), pa.table({"score/r": column}), "test")
    algo = AlgoConfig(advantage_estimator="reinforce")
    _, figures = estimate_advantages(table, algo, PLAIN, 0.1, ScoreScale(), 8)
    old, ref, mask = (np.concatenate(rows(table, n)) for n in ("old_logprobs", "ref_logprobs", "response_mask"))
    expected = {
        "rollout/kl": (old - ref)[mask == 1].sum() / 4,
        "rollout/reward_mean": np.mean(SCORES),
        "rollout/reward_std": np.std(SCORES),
        "rollout/shaped_reward_mean": np.mean(SCORES),
        "rollout/response_length_mean": 2.5,
        "rollout/response_length_max": 4,
        "rollout/truncated_rate": 0.0,
        "rollout/score/r": np.mean(SCORES),
    }
    assert figures == pytest.approx(expected, rel=1e-5)


def test_ages_and_the_gap_by_age_by_hand() -> None:
    table = joined_batch(holes=True)
    versions = [[4 - (i + j) % 3 for j in range(b)] for i, (_, b) in enumerate(SHAPE)]
    i = table.column_names.index("policy_version")
    table = table.set_column(i, "policy_version", pa.array(versions, pa.list_(pa.int32())))
    old, rollout, mask = (np.concatenate(rows(table, n)) for n in ("old_logprobs", "rollout_logprobs", "response_mask"))
    age, gap = 4 - np.concatenate(versions)[mask == 1], np.abs(old - rollout)[mask == 1]
    expected = {
        "train/policy_age": age.mean(),
        "train/policy_age_max": 2,
        "train/rollout_logprob_abs_diff": gap.mean(),
        "train/rollout_logprob_abs_diff_max": gap.max(),
        **{f"train/policy_age_share/age_{a}": (age == a).mean() for a in range(3)},
        **{f"train/rollout_logprob_abs_diff/age_{a}": gap[age == a].mean() for a in range(3)},
    }
    assert ages(table, 4) == pytest.approx(expected, rel=1e-5)
    assert not any("diff" in name for name in ages(table, 4, recomputed=False)), "nothing is known before the update"


def test_the_samplers_own_logprobs_as_those_before_the_update() -> None:
    table = joined_batch().drop_columns("old_logprobs")
    algo = AlgoConfig(advantage_estimator="reinforce", old_logprobs="sampler")
    found, _ = estimate_advantages(table, algo, PLAIN, 0.0, ScoreScale(), 8)
    assert found["old_logprobs"].equals(found["rollout_logprobs"])


def test_without_logprobs_before_the_update_the_samplers_tell_the_kl() -> None:
    table = joined_batch(holes=True, ref_logprobs=1)
    without = table.drop_columns("old_logprobs")
    algo = AlgoConfig(advantage_estimator="reinforce", use_kl_loss=True, kl_estimator="k3")
    found, figures = estimate_advantages(without, algo, PLAIN, 0.1, ScoreScale(), 8)
    sampled, ref, mask = (np.concatenate(rows(table, n)) for n in ("rollout_logprobs", "ref_logprobs", "response_mask"))
    assert figures["rollout/kl"] == pytest.approx((sampled - ref)[mask == 1].sum() / 4, rel=1e-5)
    assert "old_logprobs" not in found.column_names, "the update computes them"
    expected, _ = estimate_advantages(table, algo, PLAIN, 0.1, ScoreScale(), 8)
    assert found["advantages"].equals(expected["advantages"])


def test_a_row_without_response_tokens() -> None:
    q = [3, 0]
    table = rollouts([(2, n) for n in q])
    new = {"score": pa.array([1.0, 5.0], pa.float32()), "old_logprobs": ragged(q, np.zeros, pa.float32())}
    algo = AlgoConfig(advantage_estimator="reinforce", whiten_advantages=False)
    found, _ = estimate_advantages(with_columns(table, pa.table(new), "test"), algo, PLAIN, 0.0, ScoreScale(), 8)
    assert found["advantages"].to_pylist() == [[1.0, 1.0, 1.0], []]


def test_a_batch_without_any_response_token() -> None:
    table = rollouts([(2, 0), (1, 0)])
    new = {"score": pa.array([1.0, 5.0], pa.float32()), "old_logprobs": ragged([0, 0], np.zeros, pa.float32())}
    algo = AlgoConfig(advantage_estimator="reinforce")
    found, _ = estimate_advantages(with_columns(table, pa.table(new), "test"), algo, PLAIN, 0.0, ScoreScale(), 8)
    assert found["advantages"].to_pylist() == [[], []]
    assert ages(found, 0)["train/rollout_logprob_abs_diff"] == 0


# The file of a step


def writer(folder: Path, tokenizer_dir: Path) -> Any:
    """The process's class without Ray around it: it runs here."""
    from rlhf_dist.actors.experience import Experience
    from rlhf_dist.data.tokenization import save_tokenizer
    from rlhf_dist.data.world import build_tokenizer

    save_tokenizer(build_tokenizer(), str(tokenizer_dir))
    return Experience.__ray_metadata__.modified_class(AlgoConfig(), PLAIN, 8, str(tokenizer_dir), 0, str(folder))


def test_rollouts_are_written_with_their_texts(tmp_path: Path) -> None:
    import pyarrow.parquet as pq

    table = joined_batch()
    process = writer(tmp_path / "rollouts", tmp_path / "tokenizer")
    process._write(7, table)
    process.flush()
    found = pq.read_table(tmp_path / "rollouts" / "step_000007.parquet")
    assert found.column_names == ["prompt", "response", *table.column_names]
    assert found["response"].to_pylist() == process.tokenizer.batch_decode(table["response_ids"].to_pylist())
    assert [p.name for p in (tmp_path / "rollouts").iterdir()] == ["step_000007.parquet"]


def test_the_file_of_a_process_that_died_is_written_by_the_next(tmp_path: Path) -> None:
    import pyarrow.parquet as pq

    table = joined_batch()
    process = writer(tmp_path / "rollouts", tmp_path / "tokenizer")
    process.ensure_written(3, table)
    path = tmp_path / "rollouts" / "step_000003.parquet"
    assert pq.read_table(path).num_rows == table.num_rows
    process._write(3, table.slice(0, 2))
    process.ensure_written(3, table)
    assert pq.read_table(path).num_rows == 2, "what is there stays; the step that was taken back was removed first"


def test_a_file_that_cannot_be_written_stops_the_run(tmp_path: Path) -> None:
    (tmp_path / "rollouts").write_text("in the way")
    process = writer(tmp_path / "rollouts", tmp_path / "tokenizer")
    with pytest.raises(OSError, match="rollouts"):
        process._write(1, joined_batch())
