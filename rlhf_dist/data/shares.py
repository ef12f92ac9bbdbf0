"""Figures of an optimizer step from those of its micro-batches and ranks; of a PPO step from its optimizer steps."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

#: Figures that every rank knows whole.
GLOBAL = ("lr", "grad_norm")


def add_up(parts: Iterable[Mapping[str, float]]) -> dict[str, float]:
    """Shares of a mean add up, NAME_max is the largest of all, ``GLOBAL`` the same in each."""
    whole: dict[str, float] = {}
    for part in parts:
        for name, value in part.items():
            if name not in whole or name in GLOBAL:
                whole[name] = float(value)
            else:
                whole[name] = max(whole[name], float(value)) if _is_largest(name) else whole[name] + float(value)
    return whole


def average(steps: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Means over ``steps``; of NAME_max the largest."""
    values = {name: [step[name] for step in steps] for name in steps[0]}
    return {name: max(x) if _is_largest(name) else sum(x) / len(x) for name, x in values.items()}


def _is_largest(name: str) -> bool:
    return name.endswith("_max")
