# SPDX-License-Identifier: Apache-2.0
"""Stops a fine-tuning that destroys the teacher, and says why."""

from __future__ import annotations

import math
from dataclasses import dataclass

from calib.distill.information import InformationSummary

__all__ = ["CollapseGuard", "GuardLimits"]


@dataclass(frozen=True)
class GuardLimits:
    """When a teacher counts as destroyed, on the data it is trained on.

    Source of the defaults: on digits and Gaussian mixtures useful runs up to lambda = 0.9 lost up to 10 points of
    training accuracy and 0.2 nats; runs that collapsed lost 40 to 90 points and 1.9 nats.
    """

    accuracy_drop: float = 0.20
    likelihood_drop: float = 1.0
    divergence_limit: float = 12.0


class CollapseGuard:
    """Compares a teacher in training with what it was; each check returns the reason to stop, or None."""

    def __init__(self, start: InformationSummary, limits: GuardLimits | None = None) -> None:
        self.start = start
        self.limits = limits or GuardLimits()

    def step(self, loss: float, divergence: float) -> str | None:
        """Checks one training step; both in nats. A divergence near ln(1/floor) means that rows have been left."""
        if not (math.isfinite(loss) and math.isfinite(divergence)):
            return f"the loss became {loss}; lower the learning rate or lambda"
        if divergence > self.limits.divergence_limit:
            return (
                f"outputs left their centroids (divergence {divergence:.1f} nats); "
                "refresh the centroids more often or lower lambda"
            )
        return None

    def epoch(self, now: InformationSummary) -> str | None:
        """Checks a pass over the training data."""
        lost = self.start.accuracy - now.accuracy
        if lost > self.limits.accuracy_drop:
            return (
                f"training accuracy fell from {self.start.accuracy:.1%} to {now.accuracy:.1%}; "
                "lower lambda or the learning rate, or refresh the centroids more often"
            )
        fallen = self.start.log_likelihood - now.log_likelihood
        if fallen > self.limits.likelihood_drop:
            return (
                f"log-likelihood fell by {fallen:.2f} nats to {now.log_likelihood:.2f}; "
                "lower lambda or the learning rate, or refresh the centroids more often"
            )
        return None
