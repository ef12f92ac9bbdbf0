"""The coefficient of the KL penalty over a run. Numbers only: the driver, which has no tensors, holds it."""

from __future__ import annotations

import math


class FixedKLController:
    """A KL coefficient that stays as it is."""

    def __init__(self, coef: float) -> None:
        self.value = _non_negative(coef)

    def update(self, kl_per_sample: float, n_samples: int) -> None:
        """Does nothing; there so that the recipe need not know which controller it has."""

    def state_dict(self) -> dict[str, float]:
        return {"value": self.value}

    def load_state_dict(self, state: dict[str, float]) -> None:
        self.value = state["value"]


class AdaptiveKLController(FixedKLController):
    """Moves the coefficient until the KL per sample is at a target (Ziegler et al., 1909.08593).

    β ← β (1 + clip(KL / target − 1, ±0.2) · n / horizon). A batch of more samples than the horizon counts as one
    horizon: beyond five, β would turn negative.

    Args:
        coef: β at the start.
        target: wanted KL per sample, in nats, summed over its tokens.
        horizon: samples over which β can change by a factor of about 1.2.

    Raises:
        ValueError: if a number is negative, or target or horizon is 0.
    """

    def __init__(self, coef: float, target: float, horizon: float) -> None:
        super().__init__(coef)
        if target <= 0 or horizon <= 0:
            raise ValueError(f"target={target} and horizon={horizon} must both be above 0")
        self.target = target
        self.horizon = horizon

    def update(self, kl_per_sample: float, n_samples: int) -> None:
        """Move β after a batch of ``n_samples``, whose KL summed over tokens has the mean ``kl_per_sample`` (nats).

        Raises:
            ValueError: if the KL is NaN or infinite.
        """
        if not math.isfinite(kl_per_sample):
            raise ValueError(f"kl_per_sample={kl_per_sample}: the KL must be finite; look at the log-probabilities")
        error = max(-0.2, min(0.2, kl_per_sample / self.target - 1))
        self.value *= 1 + error * min(1.0, n_samples / self.horizon)


def _non_negative(coef: float) -> float:
    if not coef >= 0:
        raise ValueError(f"coef={coef}: the KL coefficient must be 0 or more")
    return coef


def kl_controller(
    coef: float, target: float | None = None, horizon: float = 1.0, state: dict[str, float] | None = None
) -> FixedKLController:
    """The controller for a ``target``, or a fixed coefficient where there is none; ``state`` of one to go on with."""
    controller = FixedKLController(coef) if target is None else AdaptiveKLController(coef, target, horizon)
    if state is not None:
        controller.load_state_dict(state)
    return controller
