"""What a sampler returns exactly for Gaussian images along any path, and how far that is from the truth.

"Points" of a path are log SNRs λ, float64 `[N + 1, 2]`, fine first, that never fall; -inf is pure noise, and the last
point may be +inf, which is clean. One clock on the fine image alone, `[N + 1]`, is the special case λ_32 = -inf.
Modes and both representations are those of `truth.gaussian`. KL divergences are in nats. All of it is differentiable
in λ.
"""

import math

import torch

from diffusion.multistep import ScaleWalk
from diffusion.solvers import make_solver, with_rule
from diffusion.step import level_of_log_snr
from truth.gaussian import Law, LogSNR, Spectrum, low_snr, posterior_variance
from truth.posterior_mean import Pair, is_residual, signal_and_noise


def ddim_output(spectrum: Spectrum, points: LogSNR, representation: str = "overcomplete") -> Law:
    """`solver_output` of DDIM (η = 0, arXiv 2010.02502)."""
    return solver_output(spectrum, points, representation=representation)


def solver_output(
    spectrum: Spectrum, points: LogSNR, solver: str = "ddim", representation: str = "overcomplete"
) -> Law:
    """The exact law of the fine image that a solver without noise, and without a clamp, returns along points.

    points `[N + 1, 2]`, or `[N + 1]` for a model of the fine image alone. solver: one that has a rule
    (`diffusion.multistep`), by name. As in `diffusion.sampler.sample`, both scales start from independent N(0, I)
    whatever the first point, and a scale whose λ does not move keeps its image. The result is the variance-preserving
    state at the last point: the image itself if that is clean. Every low mode is a linear map of two numbers, every
    detail mode of one. In the residual pair both are of one, and the result is r + upsampled c, each in
    variance-preserving scale (compare `Spectrum.noised`). Raises ValueError unless the points never fall and only the
    last is +inf, for one clock in the residual pair, and for a solver without a rule.
    """
    residual = is_residual(representation)
    points = check_points(points, residual=residual)
    rule = make_solver(solver).rule
    if rule is None:
        raise ValueError(f"What '{solver}' returns has no closed form here; choose one of {', '.join(with_rule())}.")
    signal, noise = signal_and_noise(points)  # [N + 1, 2]
    levels = [list(map(level_of_log_snr, point)) for point in points]
    snr = points.exp()
    see = signal / noise.square()  # l̂ = posterior variance · (see_64 x_64 + see_32 x_32 / 2)
    # Coefficients of what each scale started from: of a low mode [2, m_L] in x_64 and in 2 x_32, of a detail mode.
    start = torch.eye(2, dtype=torch.float64)[:, :, None]
    fine, coarse = (each.expand(2, len(spectrum.low)) for each in (start[0], 2 * start[1]))
    detail = torch.ones_like(spectrum.high)
    if residual:
        fine = torch.zeros_like(fine)
    walks = [ScaleWalk(rule) for _ in range(3)]
    for k, (a, b) in enumerate(snr[:-1]):
        low = posterior_variance(spectrum.low, low_snr(a, b, representation))
        seen = low * ((0 if residual else see[k, 0]) * fine + see[k, 1] / 4 * coarse)
        moves = (points[k + 1] > points[k]).tolist()
        high = see[k, 0] * posterior_variance(spectrum.high, a) * detail
        states = [(fine, seen, 0), (coarse, seen, 1), (detail, high, 0)]
        moved = []
        for walk, (state, x0, scale) in zip(walks, states, strict=True):
            if moves[scale]:
                moved.append(walk.advance(state, x0, levels[k][scale], levels[k + 1][scale]))
            else:
                walk.rest()
                moved.append(state)
        fine, coarse, detail = moved
    low = coarse if residual else fine
    return Law(low.square().sum(0), detail.square())


def ddim_output_single(spectrum: Spectrum, log_snr_points: LogSNR) -> Law:
    """`ddim_output` of the single-scale baseline, which sees the fine image only: log SNRs `[N + 1]`."""
    points = torch.as_tensor(log_snr_points, dtype=torch.float64)
    if points.ndim != 1:
        raise ValueError(f"The points of one scale must be log SNRs [N + 1] but have shape {list(points.shape)}.")
    return ddim_output(spectrum, points)


def frozen_drift_output(
    spectrum: Spectrum, points: LogSNR, start: str = "noise", representation: str = "overcomplete"
) -> Law:
    """The exact law of the final fine state of the sampler that freezes x̂ during each step.

    In y_s = √γ_s z_s = γ_s x_s + W(γ_s) (stochastic localisation) the step is y' = y + x̂ Δγ + √Δγ n. The first point
    is drawn from N(0, I) in variance-preserving scale (`start="noise"`) or from the true law (`start="truth"`).
    Returned is the variance-preserving state at the last point, which must be finite: compare it with
    `spectrum.noised(points[-1, 0])`, the truth at the same noise, not with `spectrum`. In the residual pair it is
    r + upsampled c, to be compared with `spectrum.noised(points[-1], "residual")`.
    Raises ValueError for bad points, a clean or infinitely noisy end of a scale that the result holds, another start.
    """
    residual = is_residual(representation)
    points = check_points(points, finite_end=True, residual=residual)
    if start not in ("noise", "truth"):
        raise ValueError(f"Unknown start '{start}'; choose noise or truth.")
    snr = points.exp()
    g = low_snr(*snr.unbind(1), representation)
    if snr[-1, 0] == 0 or (residual and snr[-1, 1] == 0):
        held = "both images" if residual else "the fine image"
        raise ValueError(f"The last point must have a finite log SNR of {held}.")
    # A low mode l is known through y = y_64 and the sufficient statistic y_64 + y_32 / 2 = g l + W(g) alone, of which
    # the residual pair has no first term.
    (a, b), s, h = snr[0], spectrum.low, spectrum.high
    if start == "truth":
        y, cross, total = a**2 * s + a, a * g[0] * s + a, g[0] ** 2 * s + g[0]
        detail = a**2 * h + a
    else:
        y = cross = (a * (1 + a)).expand_as(s)
        total, detail = b * (1 + b) / 4 + (torch.zeros_like(y) if residual else y), (a * (1 + a)).expand_as(h)
    for k, step in enumerate(snr.diff(dim=0)):
        step_g = low_snr(step[0], step[1], representation)
        pull = posterior_variance(s, g[k])
        grow = 1 + pull * step_g
        y = y + 2 * pull * step[0] * cross + (pull * step[0]) ** 2 * total + step[0]
        cross = grow * (cross + pull * step[0] * total) + step[0]
        total = grow**2 * total + step_g
        detail = (1 + posterior_variance(h, snr[k, 0]) * step[0]) ** 2 * detail + step[0]
    end, end_32 = snr[-1]
    low = 16 * total / (end_32 * (1 + end_32)) if residual else y / (end * (1 + end))
    return Law(low, detail / (end * (1 + end)))


def chain_kl(spectrum: Spectrum, points: LogSNR, representation: str = "overcomplete") -> torch.Tensor:
    """KL(true chain ‖ frozen-drift chain) in nats, of the noisy images at all points, from the true law at points[0].

    Σ_k ½ [tr(Δγ C) - log det(I + Δγ C)] with C the posterior covariance at point k, which for two views of a low mode
    has rank one: Δγ C has the single eigenvalue c Δg, g = γ_64 + γ_32 / 4 (γ_32 / 4 in the residual pair). It equals
    Σ_k ½ Σ_s mse_s(γ^k) Δγ_s minus the information gained. points `[N + 1, 2]` or `[N + 1]`. Raises ValueError for
    bad points, a clean end, where it is infinite, and one clock in the residual pair.
    """
    snr = check_points(points, finite_end=True, residual=is_residual(representation)).exp()
    a, g = snr[:, 0], low_snr(*snr.unbind(1), representation)
    total = 0.0
    for s, seen in ((spectrum.low, g), (spectrum.high, a)):
        growth = posterior_variance(s, seen[:-1]) * seen.diff()[:, None]  # [N, m]
        total = total + (growth - torch.log1p(growth)).sum() / 2
    return total


def start_kl(spectrum: Spectrum, point: LogSNR, representation: str = "overcomplete") -> torch.Tensor:
    """KL(true law ‖ N(0, I)) in nats of the variance-preserving noisy images at one point, `[2]` or a single λ.

    With `chain_kl` it bounds the KL of what the frozen-drift sampler returns when it starts from N(0, I).
    """
    point = torch.as_tensor(point, dtype=torch.float64)
    residual = is_residual(representation)
    points = check_points(point[None].expand(2, *point.shape), finite_end=True, residual=residual)
    alpha_64, alpha_32 = points[0].sigmoid()
    s, h = spectrum.low, spectrum.high
    # The determinant is written as 1 + something small, so that little noise in λ is not lost at high noise.
    extra_64, extra_32, extra_h = alpha_64 * (s - 1), alpha_32 * (s / 4 - 1), alpha_64 * (h - 1)
    determinant = extra_64 + extra_32 + extra_64 * extra_32 - alpha_64 * alpha_32 * s**2 / 4
    if residual:
        extra_64, determinant = torch.zeros_like(s), extra_32
    low = (extra_64 + extra_32 - torch.log1p(determinant)).sum()
    return (low + (extra_h - torch.log1p(extra_h)).sum()) / 2


def w2_squared(spectrum: Spectrum | Law, output: Law | Spectrum, by_band: bool = False) -> torch.Tensor | Pair:
    """Squared 2-Wasserstein distance of two laws of fine images, Σ (√s - √v)², in units of x²; (low, high) by band."""
    bands = tuple((s.sqrt() - v.sqrt()).square().sum() for s, v in _bands(spectrum, output))
    return bands if by_band else sum(bands)


def kl(spectrum: Spectrum | Law, output: Law | Spectrum, by_band: bool = False) -> torch.Tensor | Pair:
    """KL(spectrum ‖ output), truth first, of two laws of fine images in nats; (low, high) by band."""
    # s/v - 1 through log1p keeps its digits where the laws agree.
    ratios = ((s - v) / v for s, v in _bands(spectrum, output))
    bands = tuple((r - torch.log1p(r)).sum() / 2 for r in ratios)
    return bands if by_band else sum(bands)


def check_points(points: LogSNR, finite_end: bool = False, residual: bool = False) -> torch.Tensor:
    """Points as float64 `[N + 1, 2]`, with -inf for the coarse scale of one clock.

    Raises ValueError unless they never fall and only the last is +inf, for a clean last one if the end must be finite,
    and for one clock in the residual pair.
    """
    points = torch.as_tensor(points, dtype=torch.float64)
    if points.ndim == 1 and residual:
        raise ValueError("points of the residual pair must be [N + 1, 2]; its coarse scale needs a clock too.")
    if points.ndim == 1:
        points = torch.stack([points, torch.full_like(points, -math.inf)], dim=1)
    if points.ndim != 2 or points.shape[1] != 2 or len(points) < 2:
        raise ValueError(f"points have shape {list(points.shape)} but must be [N + 1, 2], or [N + 1] for one clock.")
    if not (points[1:] >= points[:-1]).all():
        raise ValueError("points must be log SNRs that never fall, from noise to clean.")
    if torch.isposinf(points[:-1]).any():
        raise ValueError("Only the last point may be clean (+inf).")
    if finite_end and torch.isposinf(points[-1]).any():
        raise ValueError("The last point must have a finite log SNR here, not be clean (+inf).")
    return points


def _bands(spectrum: Spectrum | Law, output: Law | Spectrum) -> tuple[Pair, Pair]:
    return (spectrum.low, output.low), (spectrum.high, output.high)
