"""Training regimes: which pairs of timesteps (t_64, t_32) a run shows its network, and how far a path is from them.

    independent    each clock uniform, by itself (published)
    same           one clock, uniform: t_32 = t_64
    shift:D        the curve λ_32 = λ_64 + D, λ = log SNR; D > 0: the coarse scale is ahead
    heuristic:F    the curve t_32 = F t_64, 0 < F <= 1
    band:W         all pairs with |λ_64 - λ_32| <= W; 0 is `same`, inf is `independent`
    path:FILE      along the path of a schedule file: each of its steps as often, and evenly in t within a step

A curve or band is seen from both clocks, each the leading one in half of the pairs: the leading clock is uniform, and
the other one is what belongs to it, uniform over that in a band. Where it belongs beyond the end of the schedule it
waits there, so that a curve begins at pure noise in both scales and ends where both are clean.

Shapes: T training timesteps, B pairs.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch

from path import Path
from schedule_file import load_schedule
from scheduler import DDIMScheduler

PARAMETERS = {"shift": "log SNR", "heuristic": "a factor in (0, 1]", "band": "log SNR >= 0", "path": "a schedule file"}
NAMES = ("independent", "same", *PARAMETERS)
SUBDIVISIONS = 1000  # Of a step of a path, for its pairs.
FAR = 1.5  # Beyond this distance in log SNR, over both clocks, a network extrapolates.
NOISE_OF_MEANS = math.log(4)  # By which the log SNR of the 2x2 mean of a noisy image is above that of the image.


def default_regime(model_type: str) -> str | None:
    """What a model is trained with unless told otherwise; None for the baseline, which has one scale."""
    return {"baseline": None, "shared_t": "same"}.get(model_type, "independent")


def parse_regime(text: str) -> tuple[str, float | str | None]:
    """Name and parameter of a regime such as `band:2`. Raises ValueError for any other text."""
    name, colon, parameter = text.partition(":")
    if name not in NAMES or bool(colon) != (name in PARAMETERS):
        known = ", ".join(f"{known}:{PARAMETERS[known]}" if known in PARAMETERS else known for known in NAMES)
        raise ValueError(f"'{text}' is no regime of timestep pairs; choose one of {known}.")
    if name in ("independent", "same"):
        return name, None
    if name == "path":
        return name, parameter
    try:
        value = float(parameter)
    except ValueError:
        value = math.nan
    good = {"shift": math.isfinite(value), "heuristic": 0 < value <= 1, "band": value >= 0}[name]
    if not good:
        raise ValueError(f"'{text}' is no regime of timestep pairs: {name} needs {PARAMETERS[name]}.")
    return name, value


def resolve_regime(text: str | None, model_type: str) -> dict[str, Any]:
    """What the config of a run says of its regime, from its `--t_pairs` or None: `t_pairs` and `t_pairs_points`.

    A path is named by its fingerprint and kept point by point, since its file may change. Raises ValueError for a
    regime that is none, a model that cannot be trained with it, a schedule of other than two scales, and what
    `load_schedule` raises.
    """
    default = default_regime(model_type)
    regime = default if text is None else text
    if regime is None:
        return {"t_pairs": None, "t_pairs_points": None}
    name, parameter = parse_regime(regime)
    if default == "same" and name != "same":
        raise ValueError(f"a model with one shared timestep cannot be trained with --t_pairs {regime}; leave it out.")
    if name != "path":
        return {"t_pairs": name if parameter is None else f"{name}:{parameter:g}", "t_pairs_points": None}
    path = load_schedule(parameter)
    if path.num_scales != 2:
        raise ValueError(f"schedule file {parameter} moves {path.num_scales} scale(s); --t_pairs needs one of two.")
    return {"t_pairs": f"path:{path.fingerprint()}", "t_pairs_points": [list(point) for point in path.points]}


def pair_probabilities(config: dict[str, Any], log_snr: torch.Tensor) -> torch.Tensor:
    """The probability of every pair (row t_64, column t_32) under the regime of a config: float64 `[T, T]`, sum 1.

    config: with the keys of `resolve_regime`. log_snr: `[T]`, of the noise schedule.
    """
    name, parameter = parse_regime(config["t_pairs"])
    count = len(log_snr)
    if name == "independent":
        return torch.full((count, count), 1 / count**2, dtype=torch.float64)
    if name == "path":
        return _along(config["t_pairs_points"], count)
    t = torch.arange(count, dtype=torch.float64)
    if name == "same":
        belongs = [t[:, None] == t, t[:, None] == t]
    elif name == "heuristic":
        belongs = [_nearest(t, parameter * t), _nearest(t, t / parameter)]
    elif name == "shift":
        belongs = [_nearest(log_snr, log_snr + parameter), _nearest(log_snr, log_snr - parameter)]
    else:
        belongs = [_distances(log_snr) <= parameter] * 2
    # Row: the leading clock. Column: the other one.
    fine_leads, coarse_leads = ((rows / rows.sum(1, keepdim=True) / count) for rows in (b.double() for b in belongs))
    return (fine_leads + coarse_leads.T) / 2


def _nearest(values: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    # For each target the one nearest value, as a mask [T, T]; infinite targets are nearest to their own kind.
    distance = (values - targets[:, None]).abs().nan_to_num(0.0)
    return torch.zeros_like(distance, dtype=torch.bool).scatter_(1, distance.argmin(1, keepdim=True), True)


def _distances(log_snr: torch.Tensor) -> torch.Tensor:
    # [T, T]; the timestep of zero SNR is at distance 0 from itself.
    return (log_snr[:, None] - log_snr).abs().nan_to_num(0.0, posinf=math.inf)


def _along(points: Sequence[Sequence[int]], count: int) -> torch.Tensor:
    corners = torch.tensor(points, dtype=torch.float64)  # [N + 1, 2]
    share = (torch.arange(SUBDIVISIONS, dtype=torch.float64) + 0.5) / SUBDIVISIONS
    pairs = corners[:-1, None] + share[:, None] * corners.diff(dim=0)[:, None]  # [N, SUBDIVISIONS, 2]
    index = pairs.round().long().flatten(0, 1) @ torch.tensor([count, 1])
    return (torch.bincount(index, minlength=count**2) / len(index)).double().view(count, count)


class TimestepPairs:
    """Draws of pairs under the regime of a config (`resolve_regime`), for the noise schedule of a scheduler.

    Draws happen on the device of the tables of the scheduler.
    """

    def __init__(self, config: dict[str, Any], scheduler: DDIMScheduler):
        self._count = scheduler.num_train_timesteps
        self._device = scheduler.log_snr.device
        self._same = config["t_pairs"] == "same"
        self._cumulative = None
        # Each by itself or all equal is drawn as published runs did, which goes on with their random numbers.
        if config["t_pairs"] not in (None, "independent", "same"):
            cumulative = pair_probabilities(config, scheduler.log_snr.cpu()).flatten().cumsum(0)
            self._cumulative = (cumulative / cumulative[-1]).to(self._device)

    def draw(self, batch: int, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
        """t_64 and t_32, int64 `[B]` each; the second one means nothing to a model of one scale."""
        options = {"generator": generator, "device": self._device}
        if self._cumulative is None:
            t_64, t_32 = torch.randint(self._count, (2, batch), **options)
            return t_64, t_64 if self._same else t_32
        uniform = torch.rand(batch, dtype=torch.float64, **options)
        index = torch.searchsorted(self._cumulative, uniform, right=True)  # [B]
        return index // self._count, index % self._count


def off_regime_note(
    path: Path, config: dict[str, Any], scheduler: DDIMScheduler, coarse_from: str | None = None
) -> str | None:
    """One sentence if a path calls a network far from every pair of timesteps it was trained on, else None.

    config: of a checkpoint; one without a regime was trained with the default of its model. coarse_from: the feed of
    `sampler.sample`; with "noisy" the coarse image is as noisy as the fine one makes it, wherever t_32 is. The distance
    of two pairs is the sum of their distances in log SNR by scale, and far is more than FAR.
    """
    regime = {"t_pairs": default_regime(config["model_type"]), "t_pairs_points": None} | config
    if regime["t_pairs"] in (None, "independent") or path.num_scales != 2:
        return None
    log_snr = scheduler.log_snr.cpu()
    distances = _distances(log_snr)  # [T, T]
    seen = pair_probabilities(regime, log_snr).nonzero()  # [S, 2]
    called = path.points[:-1]
    if coarse_from == "noisy":
        called = [(t, (log_snr - log_snr[t] - NOISE_OF_MEANS).abs().argmin().item()) for t, _ in called]
    off = [(distances[i, seen[:, 0]] + distances[j, seen[:, 1]]).min().item() for i, j in called]
    far = sum(distance > FAR for distance in off)
    if not far:
        return None
    return (
        f"this model was trained with --t_pairs {regime['t_pairs']}, and {far} of the {path.nfe} calls of path "
        f"{path.kind} are more than {FAR:g} in log SNR, over both clocks, from all it saw, up to {max(off):.3g} at "
        f"(t_64, t_32) = {called[off.index(max(off))]}; expect worse images than along a path of that regime."
    )
