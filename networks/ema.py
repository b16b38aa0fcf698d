"""The exponential moving average (EMA) of weights over a training: how fast each step forgets, and what is left.

    ema_n = d_n ema_(n-1) + (1 - d_n) weights_n,   ema_0 = weights_0

d_n is a function of n alone, so that a resumed run goes on with the same bits.
"""

from typing import Any

USUAL_RAMPUP = 0.05  # Of EDM.
LARGEST_SHARE = 0.05  # Above it, an average shows the initial weights.


def ema_decay_after(steps: int, decay: float, rampup_ratio: float) -> float:
    """d_n of the step n = steps + 1: `decay`, or less while its half-life exceeds `rampup_ratio` times `steps`.

    The ramp-up of EDM (arXiv 2206.00364, `ema_rampup_ratio` of its training loop), in steps: half-lives h in
    d = 0.5^(1/h) are at most rampup_ratio (n - 1), so that the first step forgets the initial weights. 0 is none.
    """
    if rampup_ratio == 0:
        return decay
    return min(decay, 0.5 ** (1 / (rampup_ratio * steps))) if steps else 0.0


def initial_share(steps: int, decay: float, rampup_ratio: float) -> float:
    """The weight of the initial weights in the average after so many steps, from 0 to 1: the product of all d_n."""
    return 0.0 if rampup_ratio and steps else decay**steps


def ema_note(config: dict[str, Any], steps: int) -> str | None:
    """A clause about EMA weights that hold more than LARGEST_SHARE of the initial ones after so many steps, else None.

    config: of a checkpoint; one from before there was a ramp-up had none.
    """
    decay = config.get("ema_decay")
    share = 0.0 if decay is None else initial_share(steps, decay, config.get("ema_rampup_ratio", 0.0))
    if share <= LARGEST_SHARE:
        return None
    return f"the EMA weights still hold {share:.0%} of the initial weights after {steps:,} steps at decay {decay:g}"
