"""Paths for Gaussian images that are optimal anywhere, free of any grid: points `[N + 1, 2]` as in `linear_sampler`."""

import itertools
import math
import warnings
from collections.abc import Callable, Sequence

import numpy as np
import torch
from scipy.optimize import OptimizeResult, minimize

from images.representation import REPRESENTATIONS
from truth.gaussian import Law, LogSNR, Spectrum
from truth.linear_sampler import chain_kl, check_points, kl, solver_output, w2_squared
from truth.posterior_mean import is_residual

# Projected gradient of log(value) per unit of λ below which an optimum counts as found.
GRADIENT_TOLERANCE = 1e-5


def _of_output(distance: Callable[[Spectrum, Law], torch.Tensor]) -> Callable[..., torch.Tensor]:
    def objective(
        spectrum: Spectrum, points: LogSNR, representation: str = "overcomplete", solver: str = "ddim"
    ) -> torch.Tensor:
        return distance(spectrum, solver_output(spectrum, points, solver, representation))

    return objective


# Functions of a spectrum, points, a representation and, but for the last, a solver.
OBJECTIVES: dict[str, Callable[..., torch.Tensor]] = {
    "w2": _of_output(w2_squared),
    "kl": _of_output(kl),
    "chain_kl": chain_kl,
}


def optimal_points(
    spectrum: Spectrum,
    num_steps: int,
    objective: str,  # a key of OBJECTIVES
    start: float | tuple[float, float],  # log SNR of the first point, finite; one number: isotropic noise on the image
    end: float | tuple[float, float],  # of the last; +inf is clean
    diagonal: bool = False,
    single_scale: bool = False,
    initial: LogSNR | None = None,  # [N + 1, 2] or, for one clock, [N + 1]: one more path to start from
    representation: str = "overcomplete",
    solver: str = "ddim",  # one of `with_rule`, of whose output w2 and kl are
    max_iterations: int = 1000,  # of each of three descents from the best start
) -> tuple[torch.Tensor, float]:
    """The path of N = num_steps steps from start to end that minimises an objective, and its value.

    objective: "w2" (squared, of the solver's output), "kl" (of that) or "chain_kl" (frozen drift, finite end).
    Points lie anywhere, free of any grid, and never fall; a scale may stand still. diagonal: the noise is isotropic on
    the image, λ_32 = λ_64 + `image_lead` of the representation. single_scale: the baseline with the fine image alone.
    Returns points float64 `[N + 1, 2]` (`[N + 1]` for single_scale).

    L-BFGS-B over the non-negative increments of λ with exact gradients, from several spacings and, in two dimensions,
    from the diagonal optimum with the coarse scale level, ahead and behind; the best is polished. The value is never
    above that of any of them or of `initial`. It is a local optimum, the best found: the problem is not convex.
    Warns (RuntimeWarning) if the projected gradient of log(value) has not fallen below `GRADIENT_TOLERANCE`.
    Raises ValueError for an unknown objective, num_steps < 1, ends that are not in order or not finite where they
    must be, or not on the diagonal for a diagonal, single_scale in the residual pair, an `initial` of another shape,
    order or end, chain_kl of another solver than DDIM, and a solver without a rule.
    """
    if objective not in OBJECTIVES:
        raise ValueError(f"Unknown objective '{objective}'; choose one of {', '.join(OBJECTIVES)}.")
    if objective == "chain_kl" and solver != "ddim":
        raise ValueError(f"chain_kl is the loss of a drift that is frozen in every step, which '{solver}' does not do.")
    if num_steps < 1:
        raise ValueError(f"num_steps is {num_steps} but must be at least 1.")
    if diagonal and single_scale:
        raise ValueError("A single scale has no diagonal; choose diagonal or single_scale.")
    if is_residual(representation) and single_scale:
        raise ValueError("A single scale is no residual pair; choose one of them, or the diagonal, which is the same.")
    image_lead = REPRESENTATIONS[representation].image_lead
    start, end = _axis_values(start, image_lead), _axis_values(end, image_lead)
    if not all(math.isfinite(s) and s <= e for s, e in zip(start, end, strict=True)):
        raise ValueError(f"start {start} must be finite and not above end {end}.")
    if objective == "chain_kl" and math.inf in end:
        raise ValueError("chain_kl is infinite for a clean end; give end a finite log SNR.")
    one_clock = diagonal or single_scale
    on_diagonal = start[0] + image_lead == start[1] and end[0] + image_lead == end[1]
    if one_clock and not on_diagonal:
        raise ValueError(
            f"One clock needs equal ends in both scales, log 4 apart in the residual pair; got {start} and {end}."
        )
    axes = [_Axis(s, e, num_steps) for s, e in zip(start, end, strict=True)][: 1 if one_clock else 2]

    def assemble(increments: torch.Tensor) -> torch.Tensor:
        columns = [axis.points(part) for axis, part in zip(axes, increments.split([a.size for a in axes]), strict=True)]
        if single_scale:
            return columns[0]
        return _on_diagonal(columns[0], image_lead) if diagonal else torch.stack(columns, dim=1)

    def value_of(points: torch.Tensor) -> torch.Tensor:
        options = {} if objective == "chain_kl" else {"solver": solver}
        return OBJECTIVES[objective](spectrum, points, representation, **options)

    def log_value(increments: np.ndarray) -> tuple[float, np.ndarray]:
        parts = np.split(increments, np.cumsum([a.size for a in axes])[:-1])
        if any(not (a.clean or part.any()) for a, part in zip(axes, parts, strict=True)):
            # A step so long that bounds clip it to zero leaves no ratio of increments: the line search must go back.
            return above_all, np.zeros_like(increments)
        theta = torch.tensor(increments, requires_grad=True)
        value = value_of(assemble(theta)).log()
        return value.item(), torch.autograd.grad(value, theta)[0].numpy()

    if one_clock or not on_diagonal:
        # With a clean end, the last step starts where most or where all modes are resolved.
        tops = [-math.log(float(torch.cat([spectrum.low, spectrum.high]).quantile(q))) for q in (0.5, 0.0)]
        tops = tops if math.inf in end else tops[:1]
        powers = (0.8, 1.2)
        starts = [[axis.spaced(power, top) for axis in axes] for top, power in itertools.product(tops, powers)]
    else:
        with warnings.catch_warnings(action="ignore"):  # A mere start need not be converged.
            level = optimal_points(
                spectrum, num_steps, objective, start, end, True, False, None, representation, solver, max_iterations
            )[0]
        starts = []
        for lead in (0.0, 1.0, -1.0):
            coarse = level[:, 1]
            shifted = torch.cat([coarse[:1], (coarse[1:-1] + lead).clamp(start[1], end[1]), coarse[-1:]])
            starts.append([axes[0].increments(level[:, 0]), axes[1].increments(shifted)])
    if initial is not None:
        starts.append(_initial_increments(initial, axes, start, end, num_steps, single_scale, image_lead))
    starts = [np.concatenate(increments) for increments in starts]
    if len(starts[0]) == 0:
        points = assemble(torch.zeros(0, dtype=torch.float64))
        return points, value_of(points).item()

    above_all = max(log_value(increments)[0] for increments in starts) + 1

    def descend(increments: np.ndarray, max_iterations: int) -> OptimizeResult:
        # ftol 0: the value is stationary to second order, so its change says little about the gradient.
        options = dict(maxiter=max_iterations, maxfun=2 * max_iterations, maxcor=20, ftol=0.0, gtol=GRADIENT_TOLERANCE)
        bounds = [(0, None)] * len(increments)
        return minimize(log_value, increments, jac=True, method="L-BFGS-B", bounds=bounds, options=options)

    tried = [descend(increments, 12) for increments in starts]
    result = min(tried, key=lambda r: r.fun)
    for _ in range(3):  # A new start forgets an estimate of the curvature that led nowhere.
        result = min(result, descend(result.x, max_iterations), key=lambda r: r.fun)
        gradient = log_value(result.x)[1]
        gradient = float(np.abs(np.where((result.x <= 0) & (gradient > 0), 0, gradient)).max())
        if gradient <= GRADIENT_TOLERANCE:
            break
    if not gradient <= GRADIENT_TOLERANCE:
        warnings.warn(
            f"The {objective} optimum with {num_steps} steps is not converged (relative gradient {gradient:.1e} per "
            f"unit of log SNR; {result.message}); pass its points as initial to go on.",
            RuntimeWarning,
            stacklevel=2,
        )
    points = assemble(torch.from_numpy(result.x))
    return points, value_of(points).item()


class _Axis:
    """One clock of a path as non-negative increments of λ: free if the end is clean, else scaled to reach it."""

    def __init__(self, start: float, end: float, num_steps: int):
        self.start, self.end, self.num_steps = start, end, num_steps
        self.clean = math.isinf(end)
        self.size = num_steps - self.clean

    def points(self, increments: torch.Tensor) -> torch.Tensor:
        moved = torch.cat([increments.new_zeros(1), increments.cumsum(0)])
        last = moved.new_tensor([self.end])
        if self.clean:
            return torch.cat([self.start + moved, last])
        inner = self.start + (self.end - self.start) * moved[:-1] / moved[-1]
        # Rounding may pass the end; a clamp would also cut the gradient there.
        return torch.cat([inner - (inner - self.end).clamp(min=0).detach(), last])

    def increments(self, column: torch.Tensor) -> np.ndarray:
        increments = column[: self.size + 1].diff().numpy()
        return increments if self.start < self.end else np.ones_like(increments)

    def spaced(self, power: float, top: float) -> np.ndarray:
        top = max(top, self.start + 1) if self.clean else self.end
        fraction = torch.linspace(0, 1, self.num_steps + 1, dtype=torch.float64)
        return self.increments(self.start + (top - self.start) * fraction**power)


def _initial_increments(
    initial: LogSNR,
    axes: list[_Axis],
    start: tuple,
    end: tuple,
    num_steps: int,
    single_scale: bool,
    image_lead: float,
) -> list[np.ndarray]:
    columns = torch.as_tensor(initial, dtype=torch.float64).detach()
    if columns.ndim == 1 and len(axes) == 1:
        columns = _on_diagonal(columns, image_lead)
    if columns.shape != (num_steps + 1, 2):
        raise ValueError(f"initial has shape {list(columns.shape)} but must be {num_steps + 1} points.")
    columns = check_points(columns)
    used = slice(0, 1) if single_scale else slice(0, 2)
    if not np.allclose(columns[0, used], start[used]) or not np.allclose(columns[-1, used], end[used]):
        raise ValueError(f"initial must go from {start} to {end}.")
    if len(axes) == 1 and not single_scale and not torch.equal(columns, _on_diagonal(columns[:, 0], image_lead)):
        raise ValueError(
            "initial must have equal log SNRs in both scales for a diagonal, log 4 apart in the residual pair."
        )
    return [axis.increments(columns[:, k]) for k, axis in enumerate(axes)]


def _axis_values(value: float | Sequence[float], image_lead: float) -> tuple[float, float]:
    values = torch.as_tensor(value, dtype=torch.float64)
    values = _on_diagonal(values, image_lead) if values.ndim == 0 else values.expand(2)
    return values[0].item(), values[1].item()


def _on_diagonal(log_snr_64: torch.Tensor, image_lead: float) -> torch.Tensor:
    return torch.stack([log_snr_64, log_snr_64 + image_lead], dim=-1)  # [..., 2]
