"""
Step caching for the sampler (TaylorSeer): an approximation, off by default.

  python world_model.py … --taylor        about twice as fast at 25 steps and more; docs/speed.md has its price

What the last layer says changes smoothly from step to step, so most steps can be extrapolated from those before.
"""

import math

from torch import Tensor


class TaylorSeer:
    """A `world_model.Denoiser` that computes one step in three of each branch, and extrapolates the others."""

    def __init__(self, denoiser, branches: int):
        self.denoiser = denoiser
        self.series = [TaylorSeries() for _ in range(branches)]

    def last_layer(self, x: Tensor, step: int, indices: list[int]) -> list[Tensor]:
        """What Denoiser.last_layer gives, or nearly so."""
        due = [k for k in indices if self.series[k].due()]
        computed = {}
        if due:
            computed = dict(zip(due, self.denoiser.last_layer(x, step, due), strict=True))
        return [self.series[k].next(computed.get(k)) for k in indices]


class TaylorSeries:
    """Values of which the first five are computed, then one in three.

    The values between are extrapolated by a Taylor series whose derivatives are finite differences of computed ones.
    """

    first, every, orders = 5, 3, 6

    def __init__(self):
        self.step = -1
        self.computed_step = None
        self.terms = []  # the value and its derivatives at that step

    def due(self) -> bool:
        """Whether the next value must be computed."""
        step = self.step + 1
        return step < self.first or (step - (self.first - 1)) % self.every == 0

    def next(self, y: Tensor | None = None) -> Tensor:
        """Take one step: y as it was computed, or None to extrapolate; returns the step's value."""
        self.step += 1
        if y is None:
            k = self.step - self.computed_step
            return sum(term * k**i / math.factorial(i) for i, term in enumerate(self.terms))
        terms = [y]
        if self.step >= self.first - 1:
            for before in self.terms[: self.orders]:
                terms.append((terms[-1] - before) / (self.step - self.computed_step))
        self.terms, self.computed_step = terms, self.step
        return y
