"""Training regimes: which pairs of timesteps (t_64, t_32) a run shows its network, and how far a path is from them.

    independent    each clock uniform, by itself (published)
    same           one clock, uniform: t_32 = t_64
    shift:D        the curve λ_32 = λ_64 + D, λ = log SNR; D > 0: the coarse scale is ahead
    heuristic:F    the curve t_32 = F t_64, 0 < F <= 1
    band:W         all pairs with |λ_64 - λ_32| <= W; 0 is `same`, inf is `independent`
    path:FILE      along the path of a schedule file: each of its steps as often, and evenly in t within a step
    band:PATH,W    t_64 as on a path, t_32 evenly within W/2 in λ of where the path has it; 0 is the path, inf all
    band:PATH,W-V  such a band whose width changes evenly from W at the first step of the run to V at the last one
    follow:W       a band of width W around a path that is planned again in the course of the run (`replanning`)

A curve or band:W is seen from both clocks, each the leading one in half of the pairs: the leading clock is uniform, and
the other one is what belongs to it, uniform over that in a band. Where it belongs beyond the end of the schedule it
waits there, so that a curve begins at pure noise in both scales and ends where both are clean.

The PATH of a band is `diagonal` (λ_32 = λ_64), `image` (λ_32 = λ_64 + log 4: noise on one image, as it is in the 2x2
means), `shift:D`, `heuristic:F` or the schedule FILE of one. Here t_64 always leads, uniform over the schedule or as
along the FILE, and the timestep nearest to the path belongs to every band; beyond the schedule that is its end.
`follow` starts at `diagonal` in the over-complete representation and at `image` in the residual one.

Shapes: T training timesteps, B pairs, M places on a path.
"""

import copy
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch

from checkpoint import CLASSIFIERS, MODEL_CLASSES
from paths.path import Path
from paths.schedule_file import load_schedule
from planning.students import off_student_note, student_path
from scheduler import DDIMScheduler

PARAMETERS = {
    "shift": "log SNR",
    "heuristic": "a factor in (0, 1]",
    "band": "log SNR >= 0, or PATH,WIDTH with PATH diagonal, image, shift:D, heuristic:F or a schedule file and WIDTH "
    "log SNR >= 0 or two finite ones such as 4-1",
    "path": "a schedule file",
    "follow": "a finite log SNR > 0",
}
FIRST_PATHS = {"overcomplete": "diagonal", "residual": "image"}  # Of `follow`.
NAMES = ("independent", "same", *PARAMETERS)
SUBDIVISIONS = 1000  # Of a step of a path, for its pairs.
FAR = 1.5  # Beyond this distance in log SNR, over both clocks, a network extrapolates.
NOISE_OF_MEANS = math.log(4)  # By which the log SNR of the 2x2 mean of a noisy image is above that of the image.


def default_regime(model_type: str) -> str | None:
    """What a model or classifier is trained with unless told otherwise; None for those of one scale."""
    model = (MODEL_CLASSES | CLASSIFIERS).get(model_type)
    if model is None:  # Of a row of results that another version wrote.
        return "independent"
    if model.num_scales == 1:
        return None
    return "same" if model.one_clock else "independent"


class Regime(NamedTuple):
    """What a text such as `band:shift:2,4-1` says; `str` gives one text for all that say the same."""

    name: str  # of NAMES
    parameter: float | str | None = None  # its number or file, in a band around a path that of the path
    around: str | None = None  # what kind of path the band is around; of `follow` itself
    widths: tuple[float, float] | None = None  # of that band, in log SNR, at the first and at the last step

    @property
    def changes(self) -> bool:
        """Whether what is drawn depends on how much of the run is over."""
        return self.widths is not None and self.widths[0] != self.widths[1]

    def width(self, progress: float) -> float:
        """Of a band around a path, when this share of the run is over."""
        first, last = self.widths
        return first + (last - first) * progress if self.changes else first

    def __str__(self) -> str:
        if self.name == "follow":
            return f"follow:{self.widths[0]:g}"
        parameter = self.parameter if isinstance(self.parameter, str) else f"{self.parameter or 0:g}"
        text = ":".join([self.around or self.name, parameter][: 1 if self.parameter is None else 2])
        if self.widths is None:
            return text
        return f"band:{text},{'-'.join(f'{width:g}' for width in self.widths[: 1 + self.changes])}"


def parse_regime(text: str) -> Regime:
    """The regime that a text such as `band:2` names. Raises ValueError for any other text."""
    name, colon, parameter = text.partition(":")
    if name not in NAMES or bool(colon) != (name in PARAMETERS):
        known = ", ".join(f"{known}:{PARAMETERS[known]}" if known in PARAMETERS else known for known in NAMES)
        raise ValueError(f"'{text}' is no regime of timestep pairs; choose one of {known}.")
    try:
        if name == "band" and "," in parameter:
            path, _, widths = parameter.rpartition(",")
            return Regime(name, *_parse_path(path), _parse_widths(widths))
        value = _parse_parameter(name, parameter) if colon else None
        return Regime(name, None, name, (value, value)) if name == "follow" else Regime(name, value)
    except ValueError as error:
        raise ValueError(f"'{text}' is no regime of timestep pairs: {name} needs {PARAMETERS[name]}.") from error


def _parse_parameter(name: str, text: str) -> float | str:
    if name == "path":
        return text
    value = float(text)
    good = {
        "shift": math.isfinite(value),
        "heuristic": 0 < value <= 1,
        "band": value >= 0,
        "follow": 0 < value < math.inf,
    }
    if not good[name]:
        raise ValueError(text)
    return value


def _parse_path(text: str) -> tuple[float | str | None, str]:
    # Parameter and kind. What is no rule is a file, which may also be written as in `path:FILE`.
    if text in ("diagonal", "image"):
        return None, text
    kind, _, parameter = text.partition(":")
    if kind in ("shift", "heuristic"):
        return _parse_parameter(kind, parameter), kind
    if not text.removeprefix("path:"):
        raise ValueError(text)
    return text.removeprefix("path:"), "path"


def _parse_widths(text: str) -> tuple[float, float]:
    pairs = [(text, text)] + [(text[:k], text[k + 1 :]) for k, letter in enumerate(text) if letter == "-"]
    for words in pairs:
        try:
            first, last = map(float, words)
        except ValueError:  # This may be the sign of an exponent.
            continue
        if min(first, last) >= 0 and (first == last or max(first, last) < math.inf):
            return first, last
    raise ValueError(text)


def check_regime(text: str | None, model_type: str) -> None:
    """Raise ValueError for a `--t_pairs` that is no regime, or that a type of model cannot be trained with."""
    if text is None:
        return
    regime = parse_regime(text)
    if default_regime(model_type) == "same" and regime.name != "same":
        raise ValueError(f"a model with one shared timestep cannot be trained with --t_pairs {text}; leave it out.")
    if regime.name == "follow" and model_type in CLASSIFIERS:
        raise ValueError(f"--t_pairs {text} plans by the errors of predictions, and a classifier has none; use band.")
    if regime.name == "follow" and MODEL_CLASSES[model_type].num_predictions == 1:
        raise ValueError(
            f"--t_pairs {text} plans by the errors of both scales; a '{model_type}' model has one, so use band."
        )


def resolve_regime(text: str | None, model_type: str, read: Callable[[str], Path] = load_schedule) -> dict[str, Any]:
    """What the config of a run says of its regime, from its `--t_pairs` or None: `t_pairs` and `t_pairs_points`.

    A path is named by its fingerprint and kept point by point, since its file may change. read: from a schedule file to
    the path in the process of the run. Raises what `check_regime` raises, ValueError for a schedule of other than two
    scales, and what `read` raises.
    """
    check_regime(text, model_type)
    text = default_regime(model_type) if text is None else text
    if text is None:
        return {"t_pairs": None, "t_pairs_points": None}
    regime = parse_regime(text)
    if "path" not in (regime.name, regime.around):
        return {"t_pairs": str(regime), "t_pairs_points": None}
    path = read(regime.parameter)
    if path.num_scales != 2:
        raise ValueError(
            f"schedule file {regime.parameter} moves {path.num_scales} scale(s); --t_pairs needs one of two."
        )
    return {
        "t_pairs": str(regime._replace(parameter=path.fingerprint())),
        "t_pairs_points": [list(point) for point in path.points],
    }


def pair_probabilities(config: dict[str, Any], log_snr: torch.Tensor, progress: float = 1.0) -> torch.Tensor:
    """The probability of every pair (row t_64, column t_32) under the regime of a config: float64 `[T, T]`, sum 1.

    config: with the keys of `resolve_regime`; for `follow` with `representation`, and with `regime_state` once it has
    moved (`TimestepPairs.state`). log_snr: `[T]`, of the noise schedule. progress: the share of the run that is over,
    for a band whose width changes.
    """
    regime = parse_regime(config["t_pairs"])
    count = len(log_snr)
    if regime.around is not None:
        return _around(*_places(regime, config, log_snr), regime.width(progress), log_snr)
    if regime.name == "independent":
        return torch.full((count, count), 1 / count**2, dtype=torch.float64)
    return _by_leader(regime, config, log_snr).sum(0)


def _by_leader(regime: Regime, config: dict[str, Any], log_snr: torch.Tensor) -> torch.Tensor:
    # The probability of every pair where the fine clock leads, and where the coarse one does: [2, T, T], sum 1.
    count = len(log_snr)
    if regime.name == "path":
        pairs = _along(config["t_pairs_points"])
        index = pairs @ torch.tensor([count, 1])
        fine = (torch.bincount(index, minlength=count**2) / len(index)).double().view(count, count)
        return torch.stack([fine, torch.zeros_like(fine)])
    t = torch.arange(count, dtype=torch.float64)
    if regime.name == "same":
        belongs = [t[:, None] == t, t[:, None] == t]
    elif regime.name == "heuristic":
        belongs = [_nearest(t, regime.parameter * t), _nearest(t, t / regime.parameter)]
    elif regime.name == "shift":
        belongs = [_nearest(log_snr, log_snr + regime.parameter), _nearest(log_snr, log_snr - regime.parameter)]
    else:
        belongs = [_distances(log_snr) <= regime.parameter] * 2
    # Row: the leading clock. Column: the other one.
    fine_leads, coarse_leads = ((rows / rows.sum(1, keepdim=True) / count) for rows in (b.double() for b in belongs))
    return torch.stack([fine_leads, coarse_leads.T]) / 2


def _nearest(values: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    # For each target the one nearest value, as a mask [T, T]; infinite targets are nearest to their own kind.
    distance = (values - targets[:, None]).abs().nan_to_num(0.0)
    return torch.zeros_like(distance, dtype=torch.bool).scatter_(1, distance.argmin(1, keepdim=True), True)


def _distances(log_snr: torch.Tensor) -> torch.Tensor:
    # [T, T]; the timestep of zero SNR is at distance 0 from itself.
    return (log_snr[:, None] - log_snr).abs().nan_to_num(0.0, posinf=math.inf)


def _along(points: Sequence[Sequence[int]]) -> torch.Tensor:
    # Timesteps along a path, all equally likely: [N * SUBDIVISIONS, 2].
    corners = torch.tensor(points, dtype=torch.float64)  # [N + 1, 2]
    share = (torch.arange(SUBDIVISIONS, dtype=torch.float64) + 0.5) / SUBDIVISIONS
    pairs = corners[:-1, None] + share[:, None] * corners.diff(dim=0)[:, None]  # [N, SUBDIVISIONS, 2]
    return pairs.round().long().flatten(0, 1)


def _places(regime: Regime, config: dict[str, Any], log_snr: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    # Places on the path of a band, all equally likely: t_64 and log SNR of the coarse scale, [M] each.
    if regime.around == "path":
        t_64, t_32 = _along(config["t_pairs_points"]).T.contiguous().to(log_snr.device)
        return t_64, log_snr[t_32]
    t_64 = torch.arange(len(log_snr), device=log_snr.device)
    if regime.around == "follow":
        if config.get("regime_state") is not None:
            return t_64, config["regime_state"]["log_snr_32"].to(log_snr.device)
        regime = Regime("band", None, FIRST_PATHS[config.get("representation", "overcomplete")])
    if regime.around == "heuristic":
        return t_64, log_snr[(regime.parameter * t_64.double()).round().long()]
    lead = {"diagonal": 0.0, "image": NOISE_OF_MEANS, "shift": regime.parameter}[regime.around]
    return t_64, (log_snr + lead).clamp(log_snr[-1], log_snr[0])


def _interval(targets: torch.Tensor, width: float, log_snr: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    # The timesteps within width / 2 of each target [M] in log SNR, and the nearest one: first, and last plus one, [M].
    rising, targets = -log_snr, -targets
    # From the timestep of zero SNR an infinite band reaches back to all others.
    lower = (targets - width / 2).nan_to_num(nan=-math.inf, posinf=math.inf, neginf=-math.inf)
    first = torch.searchsorted(rising, lower)
    after = torch.searchsorted(rising, targets + width / 2, right=True)
    above = torch.searchsorted(rising, targets).clamp(max=len(rising) - 1)
    below = (above - 1).clamp(min=0)
    # Infinity has no distance from itself.
    is_above = (rising[above] == targets) | ((rising[above] - targets).abs() < (rising[below] - targets).abs())
    nearest = torch.where(is_above, above, below)
    return torch.minimum(first, nearest), torch.maximum(after, nearest + 1)


def _around(t_64: torch.Tensor, targets: torch.Tensor, width: float, log_snr: torch.Tensor) -> torch.Tensor:
    # The probability of every pair in a band around places on a path, [T, T].
    count = len(log_snr)
    rows, times = torch.stack([t_64, *_interval(targets, width, log_snr)], 1).unique(dim=0, return_counts=True)
    t, first, after = rows.T[..., None]  # [U, 1] each
    columns = torch.arange(count)
    inside = (columns >= first) & (columns < after)  # [U, T]
    shares = inside * (times[:, None].double() / len(t_64) / (after - first))
    return torch.zeros(count, count, dtype=torch.float64).index_add_(0, t[:, 0], shares)


class TimestepPairs:
    """Draws of pairs under the regime of a config (`resolve_regime`), for the noise schedule of a scheduler.

    Draws happen on the device of the tables of the scheduler. A band whose width changes is at its end, unless `at`
    says otherwise.
    """

    def __init__(self, config: dict[str, Any], scheduler: DDIMScheduler):
        self._log_snr = scheduler.log_snr
        self._regime = None if config["t_pairs"] is None else parse_regime(config["t_pairs"])
        self._progress = 1.0
        self._places = self._before = self._by_leader = self._cumulative = None
        self._rows: list[torch.Tensor] = []  # Made when a law first asks for them, for copies too.
        name = "independent" if self._regime is None else self._regime.name
        if self._regime is not None and self._regime.around is not None:
            self._places = _places(self._regime, config, self._log_snr)
            self._before = self._places[1]
        # Each by itself or all equal is drawn as published runs did, which goes on with their random numbers.
        elif name not in ("independent", "same"):
            self._by_leader = _by_leader(self._regime, config, self._log_snr.cpu()).to(self._log_snr.device)
            self._cumulative = _cumulative(self._by_leader.sum(0).flatten())
        self.same = name == "same"  # Whether both clocks are always equal.

    @property
    def leads(self) -> torch.Tensor:
        """Which timesteps of the fine and of the coarse clock lead in pairs that are drawn: bool `[2, T]`."""
        leads = torch.ones(2, len(self._log_snr), dtype=torch.bool, device=self._log_snr.device)
        if self._places is not None:
            leads = torch.zeros_like(leads)
            leads[0, self._places[0]] = True
        elif self._by_leader is not None:
            leads = torch.stack([self._by_leader[0].sum(1), self._by_leader[1].sum(0)]) > 0
        return leads

    def at(self, progress: float) -> "TimestepPairs":
        """The draws when this share of the run, 0 to 1, is over."""
        moved = copy.copy(self)
        moved._progress = progress
        return moved

    @property
    def follow_width(self) -> float | None:
        """Of the band of `follow`; None for every other regime."""
        return self._regime.widths[0] if self._regime is not None and self._regime.name == "follow" else None

    @property
    def state(self) -> dict[str, torch.Tensor] | None:
        """What a run that goes on from here has to know, on the CPU: of `follow` two float64 `[T]`, else None.

        log_snr_32 is the log SNR of the coarse scale on the present path, at every t_64, before_32 on the one before.
        """
        if self.follow_width is None:
            return None
        return {"log_snr_32": self._places[1].cpu(), "before_32": self._before.cpu()}

    def moved_to(self, log_snr_32: torch.Tensor) -> "TimestepPairs":
        """The draws of `follow` around another path, as `state` describes one."""
        moved = copy.copy(self)
        moved._before = self._places[1]
        moved._places = (self._places[0], log_snr_32.to(self._log_snr))
        return moved

    def draw(self, batch: int, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
        """t_64 and t_32, int64 `[B]` each; the second one means nothing to a model of one scale."""
        count = len(self._log_snr)
        options = {"generator": generator, "device": self._log_snr.device}
        if self._places is not None:
            t_64, targets = self._places  # [M] each
            place = torch.randint(len(t_64), (batch,), **options)
            uniform = torch.rand(batch, dtype=torch.float64, **options)
            first, after = _interval(targets[place], self._regime.width(self._progress), self._log_snr)  # [B] each
            return t_64[place], first + (uniform * (after - first)).long()
        if self._cumulative is None:
            t_64, t_32 = torch.randint(count, (2, batch), **options)
            return t_64, t_64 if self.same else t_32
        uniform = torch.rand(batch, dtype=torch.float64, **options)
        index = torch.searchsorted(self._cumulative, uniform, right=True)  # [B]
        return index // count, index % count

    def draw_by(
        self, densities: torch.Tensor, batch: int, generator: torch.Generator
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """t_64 and t_32 as of `draw`, where the clock that leads is not uniform; and how much likelier that made them.

        densities: float64 `[2, T]`, how likely each timestep of the fine and of the coarse clock is, relative to
        uniform. Where clocks are independent both lead, where they are equal and in a band around a path the fine one.
        The third value, float64 `[B]`, is the probability of the pair as a multiple of that of `draw`.
        """
        count = len(self._log_snr)
        uniform = torch.rand(2, batch, dtype=torch.float64, generator=generator, device=self._log_snr.device)
        if self._places is not None:
            t_64, targets = self._places  # [M] each
            weights = densities[0][t_64]
            place = torch.searchsorted(_cumulative(weights), uniform[0], right=True)
            first, after = _interval(targets[place], self._regime.width(self._progress), self._log_snr)  # [B] each
            t_32 = first + (uniform[1] * (after - first)).long()
            return t_64[place], t_32, weights[place] / weights.mean()
        if self._by_leader is None:
            both = torch.searchsorted(_cumulative(densities), uniform, right=True)  # [2, B]
            relative = densities.gather(1, both) / densities.mean(1, keepdim=True)
            if self.same:
                return both[0], both[0], relative[0]
            # A model of one scale is not shown the coarse clock.
            return *both, relative[0] if self._regime is None else relative.prod(0)
        if not self._rows:
            rows = torch.stack([self._by_leader[0], self._by_leader[1].T])  # [2, T, T]; row: the leading clock
            self._rows += [rows.sum(2), rows.cumsum(2)]
        shares, sums = self._rows
        weights = shares * densities  # [2, T]
        index = torch.searchsorted(_cumulative(weights.flatten()), uniform[0], right=True)
        row = sums.flatten(0, 1)[index]  # [B, T]
        other = torch.searchsorted(row, uniform[1, :, None] * row[:, -1:], right=True)[:, 0].clamp(max=count - 1)
        leader, first = index // count, index % count
        t_64, t_32 = torch.where(leader == 0, first, other), torch.where(leader == 0, other, first)
        by_leader = self._by_leader[:, t_64, t_32]  # [2, B]
        likelier = by_leader[0] * densities[0][t_64] + by_leader[1] * densities[1][t_32]
        return t_64, t_32, likelier / by_leader.sum(0) / weights.sum()


def _cumulative(weights: torch.Tensor) -> torch.Tensor:
    sums = weights.cumsum(-1)
    return sums / sums[..., -1:]


def _regime_of(config: dict[str, Any]) -> str | None:
    return config.get("t_pairs", default_regime(config["model_type"]))


def _epochs_trained(config: dict[str, Any]) -> float:
    # Whole ones where a checkpoint of an earlier version does not say how long an epoch is.
    return config["step"] / config["steps_per_epoch"] if "steps_per_epoch" in config else config["epoch"]


def _pairs_seen(config: dict[str, Any], log_snr: torch.Tensor) -> torch.Tensor | None:
    # Which pairs a checkpoint was trained on, bool [T, T], or None for all.
    regime = {"t_pairs_points": None} | config | {"t_pairs": _regime_of(config)}
    if regime["t_pairs"] in (None, "independent"):
        return None
    # Bands lie within each other, so that the first and the last one hold all.
    parts = (0.0, _epochs_trained(config) / config["epochs"]) if parse_regime(regime["t_pairs"]).changes else (1.0,)
    configs = [regime]
    if regime.get("regime_state") is not None:
        # Where a path has just been planned nothing was trained yet.
        names = ("before_32", "log_snr_32")[: 1 + (_epochs_trained(config) % config["replan_every"] > 0)]
        configs = [regime | {"regime_state": {"log_snr_32": regime["regime_state"][name]}} for name in names]
    seen = [pair_probabilities(each, log_snr, progress) > 0 for each in configs for progress in parts]
    seen = torch.stack(seen).any(0)
    return None if seen.all() else seen


def seen_range(config: dict[str, Any], scheduler: DDIMScheduler) -> torch.Tensor | None:
    """The least and the largest log SNR of the coarse scale that a checkpoint was trained on, float64 `[2, T]` by t_64.

    config: of the checkpoint. A t_64 that it never saw has the range of the nearest one that it saw. None if it saw
    every pair.
    """
    log_snr = scheduler.log_snr.cpu()
    seen = _pairs_seen(config, log_snr)
    if seen is None:
        return None
    rows = seen.any(1).nonzero()[:, 0]
    nearest = rows[(torch.arange(len(log_snr))[:, None] - rows).abs().argmin(1)]  # [T]
    least = torch.where(seen, log_snr, math.inf).amin(1)
    return torch.stack([least, torch.where(seen, log_snr, -math.inf).amax(1)])[:, nearest]


def off_regime_note(
    path: Path, config: dict[str, Any], scheduler: DDIMScheduler, coarse_from: str | None = None
) -> str | None:
    """One sentence if a path calls a network far from every pair of timesteps it was trained on, else None.

    config: of a checkpoint; one without a regime was trained with the default of its model. coarse_from: the feed of
    `diffusion.sampler.sample`; with "noisy" the coarse image is as noisy as the fine one makes it, wherever t_32 is.
    The distance of two pairs is the sum of their distances in log SNR by scale, and far is more than FAR. Of a band
    whose width changes all counts that was seen up to the checkpoint, of one that moves where it was trained on last,
    and before. A student has seen the points of its path, and no others.
    """
    if student_path(config) is not None:
        return off_student_note(path, config)
    log_snr = scheduler.log_snr.cpu()
    seen = _pairs_seen(config, log_snr)  # [T, T]
    if seen is None or path.num_scales != 2:
        return None
    called = path.points[:-1]
    if coarse_from == "noisy":
        called = [(t, (log_snr - log_snr[t] - NOISE_OF_MEANS).abs().argmin().item()) for t, _ in called]
    off = _distances_to(seen, called, log_snr).tolist()
    far = sum(distance > FAR for distance in off)
    if not far:
        return None
    return (
        f"this model was trained with --t_pairs {_regime_of(config)}, and {far} of the {path.nfe} calls of path "
        f"{path.kind} are more than {FAR:g} in log SNR, over both clocks, from all it saw, up to {max(off):.3g} at "
        f"fine and coarse timestep {called[off.index(max(off))]}; expect worse images than along a path of that regime."
    )


def _distances_to(seen: torch.Tensor, called: Sequence[Sequence[int]], log_snr: torch.Tensor) -> torch.Tensor:
    # From each pair called, [C, 2], to the nearest seen, [T, T]: that is next to it in one of the rows, on either side.
    distances, count = _distances(log_snr), len(log_snr)
    columns = torch.arange(count)
    before = torch.where(seen, columns, -1).cummax(1).values  # [T, T]; -1 where there is none
    behind = torch.where(seen, columns, count).flip(1).cummin(1).values.flip(1)  # and here T
    padded = torch.nn.functional.pad(distances, (1, 1), value=math.inf)  # [T, T + 2]
    t_64, t_32 = torch.tensor(called).T  # [C] each
    within = torch.minimum(*(padded[t_32[:, None], side[:, t_32].T + 1] for side in (before, behind)))  # [C, T]
    return (distances[t_64] + within).min(1).values
