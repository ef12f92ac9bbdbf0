"""LoRA: adapters beside frozen weights, and what a learner with them sends to the generators.

Source: Hu et al., 2106.09685. The adapters are peft's; the model keeps its class and its names, with the frozen weight
of an adapted layer under ``NAME.base_layer.weight``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from rlhf_dist.config import LoRAConfig

#: Names of the factors of an adapter on the wire; the generator adds their product to the weight of that name.
LEFT, RIGHT = ".lora_left", ".lora_right"
_ADAPTER = "default"

#: What to send: everything with the adapters merged in; what never changes; what changes with every step.
Content = Literal["merged", "frozen", "trained"]


def add_adapters(model: PreTrainedModel, cfg: LoRAConfig) -> PreTrainedModel:
    """Freeze ``model`` and put trainable adapters beside its linear layers.

    Raises:
        ValueError: no layer of the model is called what ``target_modules`` says.
    """
    import peft

    config = peft.LoraConfig(
        r=cfg.rank,
        lora_alpha=cfg.alpha if cfg.alpha is not None else 2 * cfg.rank,
        lora_dropout=cfg.dropout,
        target_modules=cfg.target_modules,
        task_type=peft.TaskType.CAUSAL_LM,
    )
    try:
        peft.inject_adapter_in_model(config, model, adapter_name=_ADAPTER)
    except ValueError as error:
        if "arget modules" not in str(error):
            raise
        names = sorted({name.rpartition(".")[2] for name, m in model.named_modules() if isinstance(m, nn.Linear)})
        raise ValueError(
            f"model.lora.target_modules={cfg.target_modules}: the model has no such layer; its linear layers are "
            f"called {', '.join(names)}"
        ) from None
    return model


@dataclass(frozen=True)
class Weight:
    """One weight of the model under its name without adapters, and the adapter beside it, if there is one."""

    name: str
    base: nn.Parameter
    layer: Any = None
    """peft's layer."""

    def parts(self, content: Content) -> list[nn.Parameter]:
        """The parameters that :meth:`tensors` reads: what ZeRO-3 has to gather; none if there is nothing to send."""
        if self.layer is None:
            frozen = not self.base.requires_grad
            return [] if content != "merged" and frozen != (content == "frozen") else [self.base]
        factors = [self.layer.lora_A[_ADAPTER].weight, self.layer.lora_B[_ADAPTER].weight]
        return {"merged": [self.base, *factors], "frozen": [self.base], "trained": factors}[content]

    def tensors(self, content: Content) -> dict[str, Tensor]:
        """What is sent of this weight, by name on the wire."""
        if self.layer is None or content == "frozen":
            return {self.name: self.base.detach()}
        left, right = self._factors()
        if content == "trained":
            return {self.name + LEFT: left, self.name + RIGHT: right}
        return {self.name: merge(self.base.detach(), left, right)}

    def _factors(self) -> tuple[Tensor, Tensor]:
        """``[out, r]`` and ``[r, in]`` in the orientation of the weight, with the scale of the adapter in the first."""
        a, b = self.layer.lora_A[_ADAPTER].weight.detach(), self.layer.lora_B[_ADAPTER].weight.detach()
        scaled = b * self.layer.scaling[_ADAPTER]
        if self.layer.fan_in_fan_out:  # GPT-2's layers hold the transpose
            return a.T.contiguous(), scaled.T.contiguous()
        return scaled, a


def merge(base: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """``base + left @ right``, computed in float32, in the type of ``base``."""
    return torch.addmm(base.float(), left.float(), right.float()).to(base.dtype)


def weights_of(model: nn.Module) -> list[Weight]:
    """All weights in model order; tied ones occur once, adapters belong to the weight beside them."""
    adapted: dict[str, Any] = {name: m for name, m in model.named_modules() if hasattr(m, "lora_A")}
    weights = []
    for name, parameter in model.named_parameters():
        place, _, kind = name.rpartition(".base_layer.")
        if place in adapted:
            weights.append(Weight(f"{place}.{kind}", parameter, adapted[place] if kind == "weight" else None))
        elif ".lora_" not in name:
            weights.append(Weight(name, parameter))
    return weights


def grouped(model: nn.Module, limit: int, content: Content) -> list[list[Weight]]:
    """Weights with something to send, in groups that close once they pass ``limit`` bytes."""
    groups: list[list[Weight]] = []
    size = limit
    for weight in weights_of(model):
        parts = weight.parts(content)
        if not parts:
            continue
        if size >= limit:
            groups.append([])
            size = 0
        groups[-1].append(weight)
        size += sum(_numel(p) * p.element_size() for p in parts)
    return groups


def _numel(parameter: nn.Parameter) -> int:
    """A ZeRO-3 shard has ``numel()`` 0."""
    return parameter.ds_numel if hasattr(parameter, "ds_numel") else parameter.numel()  # type: ignore[return-value]


def merged(tensors: Callable[[], Iterable[tuple[str, Tensor]]]) -> Iterator[tuple[str, Tensor]]:
    """Every weight, with the adapter beside it merged in; weights and factors may come in any order.

    Args:
        tensors: called twice, so that weights stream through while only the factors are held.

    Raises:
        KeyError: names a factor without a weight.
    """
    factors = {name: tensor for name, tensor in tensors() if name.endswith((LEFT, RIGHT))}
    for name, tensor in tensors():
        if name.endswith((LEFT, RIGHT)):
            continue
        left = factors.pop(name + LEFT, None)
        yield name, tensor if left is None else merge(tensor, left, factors.pop(name + RIGHT))
    if factors:
        raise KeyError(min(factors))
