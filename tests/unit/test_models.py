"""The modules against transformers and a log-softmax in float64; how models are built, loaded and refused."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from tiny import LLAMA, SPECIAL, VOCAB, rollouts, tiny_llama
from transformers import AutoModelForSequenceClassification, PreTrainedModel

from rlhf_dist.data.batching import collate
from rlhf_dist.models import PolicyModule, ScalarModule, build_policy, load_policy, load_scalar

GPT2 = {"model_type": "gpt2", "n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 64, "initializer_range": 0.3}
QWEN3 = {**LLAMA, "model_type": "qwen3", "head_dim": 16}
ARCHITECTURES = [LLAMA, GPT2, QWEN3]
SHAPE = [(3, 4), (1, 6), (5, 0), (2, 1)]


@pytest.fixture(params=ARCHITECTURES, ids=lambda a: a["model_type"])
def policy(request: pytest.FixtureRequest) -> PreTrainedModel:
    return build_policy(request.param, VOCAB, SPECIAL, seed=0).eval()


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_logprobs_and_entropies_row_by_row(policy: PreTrainedModel, temperature: float) -> None:
    table = rollouts(SHAPE)
    batch = collate(table, [0, 1, 2, 3])
    logprobs, entropies, labels = [], [], table["response_ids"].to_pylist()
    with torch.no_grad():
        found, found_entropy = PolicyModule(policy, temperature)(batch, entropy="yes")
        for prompt, response in zip(table["prompt_ids"].to_pylist(), labels, strict=True):
            logits = policy(torch.tensor([prompt + response])).logits[0, len(prompt) - 1 : -1].double()
            full = torch.log_softmax(logits / temperature, -1)
            logprobs.append(full[range(len(response)), response].numpy())
            entropies.append(-(full.exp() * full).sum(-1).numpy())
    np.testing.assert_allclose(batch.gather(found), np.concatenate(logprobs), atol=1e-5)
    np.testing.assert_allclose(batch.gather(found_entropy), np.concatenate(entropies), atol=1e-5)
    assert not found[~batch.response].any()
    assert not found_entropy[~batch.response].any()


def test_in_float64_the_agreement_is_exact() -> None:
    policy = tiny_llama().double().eval()
    table = rollouts(SHAPE)
    batch = collate(table, [1])
    ids = table["prompt_ids"][1].as_py() + table["response_ids"][1].as_py()
    with torch.no_grad():
        found, _ = PolicyModule(policy)(batch)
        full = torch.log_softmax(policy(torch.tensor([ids])).logits[0, :-1], -1)
    expected = full[range(len(ids) - 1), ids[1:]]
    torch.testing.assert_close(found[batch.response], expected, atol=1e-13, rtol=0)


def test_the_entropy_is_computed_only_when_asked_for() -> None:
    assert PolicyModule(tiny_llama())(collate(rollouts(SHAPE), [0]))[1] is None


def test_a_dummy_takes_part_in_the_backward_pass() -> None:
    policy = tiny_llama()
    logprobs, entropy = PolicyModule(policy)(collate(rollouts(SHAPE), []), entropy="yes")
    (logprobs.sum() + entropy.sum()).backward()
    assert all(p.grad is not None and not p.grad.any() for p in policy.parameters())


def test_logits_before_the_first_response_are_not_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    policy = tiny_llama()
    seen = []
    policy.lm_head.register_forward_hook(lambda module, args, out: seen.append(out.shape))
    PolicyModule(policy)(collate(rollouts([(5, 2), (4, 3)]), [0, 1]))
    assert seen == [(2, 4, VOCAB)]


@pytest.fixture
def classifier(policy: PreTrainedModel, tmp_path: Path) -> PreTrainedModel:
    policy.save_pretrained(tmp_path)
    model = load_scalar(str(tmp_path), "float32", "sdpa").eval()
    torch.manual_seed(1)
    torch.nn.init.normal_(model.score.weight)
    return model


def test_scores_are_the_classifiers_own_logits(classifier: PreTrainedModel) -> None:
    table = rollouts(SHAPE)
    batch = collate(table, [0, 1, 2, 3])
    ids = [p + r for p, r in zip(table["prompt_ids"].to_pylist(), table["response_ids"].to_pylist(), strict=True)]
    with torch.no_grad():
        found = ScalarModule(classifier).scores(batch)
        expected = torch.cat([classifier(torch.tensor([row])).logits[0] for row in ids])
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)
    assert expected.unique().numel() == len(SHAPE)


def test_padding_does_not_matter(classifier: PreTrainedModel) -> None:
    table = rollouts(SHAPE)
    module = ScalarModule(classifier)
    with torch.no_grad():
        zeros, ones = (module.scores(collate(table, [0, 1, 2, 3], pad_id=pad)) for pad in (0, 1))
        alone = torch.cat([module.scores(collate(table, [row])) for row in range(4)])
    torch.testing.assert_close(zeros, ones, atol=1e-6, rtol=0)
    torch.testing.assert_close(zeros, alone, atol=1e-5, rtol=0)


def test_a_new_head_is_zero_and_a_trained_one_is_kept(tmp_path: Path) -> None:
    tiny_llama().save_pretrained(tmp_path / "policy")
    fresh = load_scalar(str(tmp_path / "policy"), "float32", "sdpa")
    assert not fresh.score.weight.any()
    with torch.no_grad():
        fresh.score.weight += 1
    fresh.save_pretrained(tmp_path / "trained")
    assert (load_scalar(str(tmp_path / "trained"), "float32", "sdpa").score.weight == 1).all()
    again = AutoModelForSequenceClassification.from_pretrained(tmp_path / "trained")
    assert again.config.num_labels == 1


def test_a_centered_model_keeps_its_mean_in_its_folder(classifier: PreTrainedModel, tmp_path: Path) -> None:
    batch = collate(rollouts(SHAPE), [0, 1, 2, 3])
    module = ScalarModule(classifier)
    with torch.no_grad():
        before, values = module.scores(batch), module(batch)
        assert before.mean().abs() > 0.01
        module.center(before.mean().item())
        torch.testing.assert_close(module.scores(batch), before - before.mean(), atol=1e-6, rtol=0)
        classifier.save_pretrained(tmp_path / "centered")
        again = ScalarModule(load_scalar(str(tmp_path / "centered"), "float32", "sdpa").eval())
        torch.testing.assert_close(again.scores(batch), before - before.mean(), atol=1e-6, rtol=0)
        torch.testing.assert_close(again(batch), values - before.mean(), atol=1e-6, rtol=0)  # a critic's values, too
        again.center(0.5)  # by a second training, whose reference scores lie higher
        torch.testing.assert_close(again.scores(batch), before - before.mean() - 0.5, atol=1e-6, rtol=0)


def test_loading_takes_the_dtype(tmp_path: Path) -> None:
    model = tiny_llama()
    model.save_pretrained(tmp_path)
    assert {p.dtype for p in load_policy(str(tmp_path), "bfloat16", "sdpa").parameters()} == {torch.bfloat16}
    same = load_policy(str(tmp_path), "float32", "sdpa")
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), same.parameters(), strict=True))


def test_the_seed_decides_the_initial_weights() -> None:
    weights = [tiny_llama(seed).lm_head.weight for seed in (0, 0, 1)]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


def test_vocabulary_and_special_tokens_are_filled_in() -> None:
    config = tiny_llama().config
    assert (config.vocab_size, config.bos_token_id, config.eos_token_id, config.pad_token_id) == (VOCAB, 1, 2, 0)


@pytest.mark.parametrize(
    ("architecture", "message"),
    [
        ({"hidden_size": 32}, "model.architecture needs model_type, for example llama"),
        ({"model_type": "lama"}, "model.architecture.model_type='lama' is not known to transformers"),
        ({**LLAMA, "hidden_sice": 32}, "model.architecture: llama has no config key 'hidden_sice'"),
    ],
)
def test_an_architecture_that_cannot_be_built(architecture: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build_policy(architecture, VOCAB, SPECIAL, seed=0)


@pytest.mark.parametrize("load", [load_policy, load_scalar])
def test_a_missing_folder_is_not_looked_up_on_the_hub(load, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no model in .*/nothing: expected a folder with config.json"):
        load(str(tmp_path / "nothing"), "float32", "sdpa")


def test_a_folder_without_a_config_is_no_model(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").touch()
    with pytest.raises(ValueError, match=r"expected a folder with config\.json"):
        load_policy(str(tmp_path), "float32", "sdpa")
