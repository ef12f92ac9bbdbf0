"""Figures of one optimizer step from those of its micro-batches and ranks."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

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
                whole[name] = max(whole[name], float(value)) if name.endswith("_max") else whole[name] + float(value)
    return whole
