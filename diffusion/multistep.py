"""Solvers of one call a step that are linear in the clean images they have seen, as one scale goes along a path.

In half the log SNR, l = log(alpha / sigma), with h = l' - l, a step is exact if (arXiv 2211.01095, eq. 8)

    x' = sigma'/sigma x + alpha' ∫ e^(u-h) x0(l + u) du,    u from 0 to h,

and each of these solvers puts a polynomial in u for x0: a constant, a line through the last two clean images, or a
parabola through the last three. So x' = sigma'/sigma x + alpha' Σ w_j x0_j, newest first, with weights that depend on
the places l_j alone and add up to 1 - e^-h.

A `ScaleWalk` applies them to whatever is linear: images of the sampler, modes of Gaussian images (differentiable in
l), and the coefficients that `planning.deviation` follows for many paths at once. Places are floats or tensors that
broadcast with the states.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch

from diffusion.step import Level

Number = float | torch.Tensor


class Rule:
    """Weights of the clean images in a step. This one holds the newest, which is DDIM."""

    order = 1  # Clean images that a step uses at most.

    def predictor(self, places: Sequence[Number], after: Number) -> list[Number]:
        """Weights of the clean images at `places`, newest first, in a step from places[0] to `after`."""
        return [-_expm1(places[0] - after)]

    def corrector(self, places: Sequence[Number], after: Number) -> list[Number] | None:
        """Weights of the clean image at `after`, and then of those at `places`, in the same step taken again.

        None for a rule that takes no step again.
        """
        return None


class Line(Rule):
    """DPM-Solver++(2M): the clean image half a step on, in a line through the last two (arXiv 2211.01095, alg. 2)."""

    order = 2

    def predictor(self, places: Sequence[Number], after: Number) -> list[Number]:
        [held] = super().predictor(places[:1], after)
        if len(places) == 1:
            return [held]
        onward = held * (after - places[0]) / (2 * (places[0] - places[1]))
        return [held + onward, -onward]


class Parabola(Rule):
    """The parabola in l through the last three, integrated exactly; a line through two, a constant through one.

    arXiv 2211.01095 has the expansion. Its published code halves the term of second order, and so does not reach third
    order; this does.
    """

    order = 3

    def predictor(self, places: Sequence[Number], after: Number) -> list[Number]:
        [held] = super().predictor(places[:1], after)
        if len(places) == 1:
            return [held]
        h, back = after - places[0], places[0] - places[1]
        # e^-h times the integrals of e^u u and e^u u^2 from 0 to h.
        first, second = h + _expm1(-h), h * h - 2 * h - 2 * _expm1(-h)
        slope = [1 / back, -1 / back]
        if len(places) == 2:
            return [held + first * slope[0], first * slope[1]]
        older = places[1] - places[2]
        bend = [each / (back + older) for each in (1 / back, -1 / back - 1 / older, 1 / older)]
        weights = [first * (s + back * b) + second * b for s, b in zip([*slope, 0], bend, strict=True)]
        return [held + weights[0], *weights[1:]]


class Corrected(Line):
    """UniPC-2 with B(h) = e^h - 1 (arXiv 2302.04867): a line, and the same step again once its end has been seen."""

    def corrector(self, places: Sequence[Number], after: Number) -> list[Number]:
        [held] = Rule.predictor(self, places[:1], after)
        if len(places) == 1:
            return [held / 2, held / 2]
        h = after - places[0]
        # The parabola through the end, the start and the point before, at 1, 0 and `place`; moments of u / h.
        place = (places[1] - places[0]) / h
        first, second = h - held, h * h - 2 * (h - held)
        end = (second / h**2 - place * first / h) / (1 - place)
        before = (second / h**2 - first / h) / (place * (place - 1))
        return [end, held - end - before, before]


class _Taken(NamedTuple):
    """A step that may be taken again."""

    x: torch.Tensor
    now: Level
    after: Level
    places: list[Number]
    x0s: list[torch.Tensor]
    end: torch.Tensor


class ScaleWalk:
    """One scale on its way along a path: states by a rule, from the clean images seen at the points.

    `advance` moves it, `rest` is told where it stays. A scale that rests forgets: what it saw before says nothing of
    where its image goes once it moves again, since the other scale has changed.
    """

    def __init__(self, rule: Rule):
        self.rule = rule
        self.rest()

    def rest(self) -> None:
        """Forget the points before."""
        self.seen: list[tuple[Number, torch.Tensor]] = []  # (place, clean image), newest first.
        self.taken: _Taken | None = None

    def advance(self, x: torch.Tensor, x0: torch.Tensor, now: Level, after: Level) -> torch.Tensor:
        """The state at `after`, from the state x and the clean image x0 seen in it at `now`.

        x and x0 broadcast with the numbers of both levels. A step that led to x is corrected first if the rule says so
        and x is what it led to, the same object: what was painted into is another state.
        """
        if self.taken is not None and self.taken.end is x:
            again = self.rule.corrector(self.taken.places, self.taken.after.log_snr)
            if again is not None:
                x = _combine(self.taken.x, self.taken.now, self.taken.after, again, [x0, *self.taken.x0s])
        self.seen = [(now.log_snr, x0), *self.seen][: self.rule.order]
        if not _is_finite(after.log_snr):  # Without noise there is the clean image alone.
            return after.alpha * x0
        # There is no distance to infinite places, nor from one.
        finite = _is_finite(now.log_snr)
        known = [old for old in self.seen if _is_finite(old[0])] if finite else self.seen[:1]
        places, x0s = (list(each) for each in zip(*known, strict=True))
        end = _combine(x, now, after, self.rule.predictor(places, after.log_snr), x0s)
        self.taken = _Taken(x, now, after, places, x0s, end) if finite else None
        return end


def _combine(x: torch.Tensor, now: Level, after: Level, weights: Sequence[Number], x0s: Sequence) -> torch.Tensor:
    moved = sum(weight * x0 for weight, x0 in zip(weights, x0s, strict=True))
    return after.sigma / now.sigma * x + after.alpha * moved


def _is_finite(value: Number) -> bool:
    return bool(value.isfinite().all()) if isinstance(value, torch.Tensor) else math.isfinite(value)


def _expm1(value: Number) -> Number:
    return torch.expm1(value) if isinstance(value, torch.Tensor) else math.expm1(value)
