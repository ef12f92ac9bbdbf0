"""LoRA beside peft's own merging: what is sent, what is trained, what comes out merged."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from sync_models import build
from tiny import tiny_llama
from transformers import PreTrainedModel

from rlhf_dist.adapters import LEFT, RIGHT, add_adapters, grouped, merged, weights_of
from rlhf_dist.config import LoRAConfig

LORA = LoRAConfig(rank=3, alpha=12)
both = pytest.mark.parametrize("name", ["llama", "gpt2"])


def make(name: str, folder: Path) -> tuple[PreTrainedModel, PreTrainedModel]:
    """A model with adapters that do something (peft starts the second factor at zero), and how it was without."""
    plain = tiny_llama() if name == "llama" else build("gpt2", tied=True, folder=folder)
    model = add_adapters(copy.deepcopy(plain), LORA)
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.1 * torch.randn_like(parameter)
    return model, plain


def sent(model: PreTrainedModel, content: Any) -> dict[str, torch.Tensor]:
    return {n: t for group in grouped(model, 1, content) for w in group for n, t in w.tensors(content).items()}


@both
def test_merged_weights_are_those_of_peft(name: str, tmp_path: Path) -> None:
    import peft

    model, plain = make(name, tmp_path)
    found = sent(model, "merged")
    assert list(found) == [n for n, _ in plain.named_parameters()], "names and order of the model without adapters"
    config = peft.LoraConfig(r=3, lora_alpha=12, target_modules="all-linear", task_type="CAUSAL_LM")
    reference = peft.get_peft_model(copy.deepcopy(plain), config)
    adapters = {f"base_model.model.{n}": p for n, p in model.state_dict().items() if "lora_" in n}
    assert not reference.load_state_dict(adapters, strict=False).unexpected_keys
    expected = dict(reference.merge_and_unload().named_parameters())
    changed = 0
    for weight, tensor in found.items():
        torch.testing.assert_close(tensor, expected[weight], atol=1e-6, rtol=1e-6)
        changed += not torch.equal(tensor, plain.get_parameter(weight))
    assert changed == sum(w.layer is not None for w in weights_of(model)) > 0


@both
def test_what_is_frozen_and_what_is_trained_make_the_whole(name: str, tmp_path: Path) -> None:
    model, plain = make(name, tmp_path)
    frozen, factors, whole = (sent(model, c) for c in ("frozen", "trained", "merged"))
    assert frozen.keys() == dict(plain.named_parameters()).keys()
    assert all(torch.equal(frozen[n], p) for n, p in plain.named_parameters())
    assert all(n.endswith((LEFT, RIGHT)) for n in factors)
    assert sum(t.numel() for t in factors.values()) == sum(p.numel() for p in model.parameters() if p.requires_grad)
    found = dict(merged(lambda: [*frozen.items(), *factors.items()]))
    assert found.keys() == whole.keys()
    assert all(torch.equal(found[n], whole[n]) for n in whole)


def test_without_adapters_everything_is_trained() -> None:
    model = tiny_llama()
    assert sent(model, "frozen") == {}
    for content in ("trained", "merged"):
        found = sent(model, content)
        assert all(found[n].data_ptr() == p.data_ptr() for n, p in model.named_parameters())
        assert len(found) == len(list(model.parameters()))


def test_groups_close_at_their_size() -> None:
    model = tiny_llama()
    sizes = [sum(w.base.nbytes for w in group) for group in grouped(model, 20_000, "merged")]
    assert sum(sizes) == sum(p.nbytes for p in model.parameters())
    largest = max(p.nbytes for p in model.parameters())
    assert all(20_000 <= size < 20_000 + largest for size in sizes[:-1])


def test_a_factor_without_its_weight_is_named() -> None:
    pairs = [("a", torch.zeros(2, 2)), ("b" + LEFT, torch.zeros(2, 1)), ("b" + RIGHT, torch.zeros(1, 2))]
    with pytest.raises(KeyError, match="lora_left"):
        list(merged(lambda: pairs))


def test_only_adapters_of_the_named_layers_are_trained() -> None:
    model = add_adapters(tiny_llama(), LoRAConfig(rank=2, target_modules=["q_proj", "v_proj"]))
    names = {n for n, p in model.named_parameters() if p.requires_grad}
    assert len(names) == 2 * 2 * 2
    assert all("lora_" in n and ("q_proj" in n or "v_proj" in n) for n in names)


def test_layers_that_are_not_there_are_named_with_those_that_are() -> None:
    with pytest.raises(ValueError, match=r"target_modules=\['c_attn'\]: .* called down_proj, gate_proj, k_proj"):
        add_adapters(tiny_llama(), LoRAConfig(rank=2, target_modules=["c_attn"]))
