"""What a sampler returns, against the sampler itself, dense covariances of its chain and simulation."""

import math

import numpy as np
import pytest
import scipy.linalg
import torch
import torch.nn.functional as F

from diffusion.sampler import sample
from diffusion.solvers import SOLVERS, make_solver
from exact_models import (
    INF,
    N_32,
    N_64,
    REPRESENTATIONS,
    C,
    H,
    W,
    compose,
    fine_of,
    model,
    parts,
    rng,
    small_spectrum,
    tied,
)
from paths.path import Path
from scheduler import DDIMScheduler
from truth.gaussian import GaussianDenoiser, Law, Spectrum, information, mse
from truth.linear_sampler import (
    chain_kl,
    ddim_output,
    ddim_output_single,
    frozen_drift_output,
    kl,
    solver_output,
    start_kl,
    w2_squared,
    with_rule,
)

WITH_RULE = ("ddim", "dpmpp_2m", "dpmpp_3m", "unipc")
UNSEEN = torch.tensor([1e-300], dtype=torch.float64)  # The variance of a mode that adds nothing to any sum.

PATHS = {
    "diagonal": [(999, 999), (700, 700), (350, 350), (100, 100), (0, 0)],
    "coarse ahead": [(999, 999), (999, 600), (800, 300), (400, 300), (200, 0), (0, 0)],
    "fine ahead": [(999, 999), (600, 900), (0, 500), (0, 0)],
    # Long enough for a parabola before a rest and after it, and for a step to be corrected after a rest.
    "both rest": [
        *[(999, 999), (900, 930), (780, 850), (600, 700), (600, 500), (600, 300)],
        *[(450, 200), (300, 200), (180, 200), (80, 120), (30, 60), (10, 20), (0, 0)],
    ],
}

RISING = torch.tensor([[-4.0, -4.5], [-2.0, -1.0], [0.5, 0.0], [1.0, 2.5], [3.0, 2.7]], dtype=torch.float64)


def log_snr_points(scheduler, path, end):
    points = torch.stack([scheduler.log_snr[list(point)] for point in path.points])
    if end == "clean":
        points[-1] = INF
    return points


@pytest.mark.parametrize("representation", REPRESENTATIONS)
@pytest.mark.parametrize("end", ["clean", "t0"])
@pytest.mark.parametrize("name", PATHS)
@pytest.mark.parametrize("solver", WITH_RULE)
def test_output_is_the_linear_map_of_the_sampler(solver, name, end, representation):
    scheduler = DDIMScheduler(clip_sample=False)
    denoiser, basis, _ = model(scheduler, centred=True, representation=representation)
    path = Path(tuple(PATHS[name]), name, {})
    eye = torch.eye(N_64 + N_32, dtype=torch.float64)
    noise = (eye[:, :N_64] @ fine_of(representation), eye[:, N_64:])
    noise = (noise[0].reshape(-1, C, H, W), noise[1].reshape(-1, C, H // 2, W // 2))
    samples = sample(denoiser.denoise, scheduler, path, noise, end=end, solver=make_solver(solver))
    images = compose(samples.images, representation)
    covariance = basis @ images.T @ images @ basis.T
    law = solver_output(denoiser.spectrum(), log_snr_points(scheduler, path, end), solver, representation)
    torch.testing.assert_close(covariance, torch.diag(torch.cat([law.low, law.high])), rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("end", ["clean", "t0"])
@pytest.mark.parametrize("solver", WITH_RULE)
def test_single_scale_output_is_the_linear_map_of_the_sampler(solver, end):
    scheduler = DDIMScheduler(clip_sample=False)
    denoiser, basis, s = model(scheduler)

    def denoise(xs, ts):
        alpha_bar = scheduler.alphas_cumprod[ts[0][0]]
        gain = torch.diag(alpha_bar.sqrt() * s / (alpha_bar * s + 1 - alpha_bar))
        x0 = xs[0].flatten(1) @ basis.T @ gain @ basis
        return (((xs[0].flatten(1) - alpha_bar.sqrt() * x0) / (1 - alpha_bar).sqrt()).view_as(xs[0]),)

    path = Path(((999,), (750,), (500,), (300,), (120,), (0,)), "diagonal", {})
    noise = torch.eye(N_64, dtype=torch.float64).view(-1, C, H, W)
    images = sample(denoise, scheduler, path, [noise], end=end, solver=make_solver(solver)).images[0].flatten(1)
    line = log_snr_points(scheduler, path, end)[:, 0]
    law = solver_output(denoiser.spectrum(), line, solver)
    if solver == "ddim":
        for one, other in zip(law, ddim_output_single(denoiser.spectrum(), line), strict=True):
            assert torch.equal(one, other)
    covariance = torch.diag(torch.cat([law.low, law.high]))
    torch.testing.assert_close(basis @ images.T @ images @ basis.T, covariance, rtol=1e-9, atol=1e-10)


def test_solvers_without_a_rule_have_no_closed_form():
    assert with_rule() == list(WITH_RULE)
    others = [name for name in SOLVERS if name not in WITH_RULE]
    assert {"heun", "ancestral", "ode"} <= set(others)
    for name in others:
        with pytest.raises(
            ValueError, match=f"'{name}' returns has no closed form here; choose one of ddim, dpmpp_2m,"
        ):
            solver_output(small_spectrum(), [-4.0, 0.0, 4.0], name)
    # DDIM that draws noise is no map of the noise it starts from.
    assert make_solver("ddim", eta=1.0).rule is None and make_solver("ddim").rule is not None


def test_ddim_covariance_is_that_of_100k_samples():
    scheduler = DDIMScheduler(clip_sample=False)
    low, high = torch.tensor([[[4.0]]]), torch.tensor([0.5, 0.1, 0.02]).view(3, 1, 1, 1)
    denoiser = GaussianDenoiser(scheduler, low, high)
    path = Path(((999, 999), (800, 650), (400, 300), (150, 150), (0, 0)), "test", {})
    count = 100_000
    noise = [torch.randn(count, 1, n, n, generator=rng(9), dtype=torch.float64) for n in (2, 1)]
    images = sample(denoiser.denoise, scheduler, path, noise).images[0].flatten(1)
    haar = torch.tensor(scipy.linalg.hadamard(4)) / 2  # Rows: low, along W, along H, both.
    modes = images @ haar.double().T
    covariance = modes.T @ modes / count
    law = ddim_output(denoiser.spectrum(), log_snr_points(scheduler, path, "clean"))
    exact = torch.cat([law.low, law.high])
    error = torch.outer(exact, exact).sqrt() / math.sqrt(count)
    error += torch.diag(error.diag() * (math.sqrt(2) - 1))
    assert ((covariance - torch.diag(exact)).abs() < 4 * error).all()
    # The sampler's law is told apart from the truth by the same sample.
    assert (exact - torch.cat([low.flatten(), high.flatten()])).abs().max() > 20 * error.max()


@pytest.mark.parametrize("representation", REPRESENTATIONS)
def test_ddim_output_tends_to_the_truth(representation):
    spectrum = small_spectrum()
    values = []
    for num_steps in (100, 200, 400):
        line = torch.linspace(-14, 14, num_steps, dtype=torch.float64)
        line = torch.cat([line, torch.tensor([INF])])
        output = ddim_output(spectrum, torch.stack([line, line + 0.5], 1), representation)
        values.append(w2_squared(spectrum, output).item())
    # First order in the step: W2 halves, its square falls to a quarter.
    assert values[1] / values[0] == pytest.approx(0.25, abs=0.03)
    assert values[2] / values[1] == pytest.approx(0.25, abs=0.03)
    assert values[2] < 1e-3


@pytest.mark.parametrize("start, orders", [(-6.0, (1, 2, 2, 3)), (-16.0, (1, 2, 3, 3))])
@pytest.mark.parametrize("representation", ["one clock", "residual"])
def test_outputs_have_the_order_of_their_solver(representation, start, orders):
    """Against the flow itself, which stretches a mode by the ratio of its true deviations.

    The first step of dpmpp_2m and of dpmpp_3m is one of DDIM, with an error of second order, as far as what is seen
    changes there: at λ = -6 it does, at -16 next to nothing is seen.
    """
    spectrum = small_spectrum()
    residual = representation == "residual"
    representation = "residual" if residual else "overcomplete"

    def points(count):
        line = torch.linspace(start, 5, count + 1, dtype=torch.float64)
        return torch.stack([line, line + 0.5], 1) if residual else line

    first, last = (spectrum.noised(points(1)[k], representation) for k in (0, 1))
    # A low mode is twice one of the coarse image.
    exact = torch.cat([(4 if residual else 1) * last.low / first.low, last.high / first.high])
    for solver, order in zip(WITH_RULE, orders, strict=True):
        errors = []
        for count in (75, 150, 300):
            found = torch.cat(solver_output(spectrum, points(count), solver, representation))
            errors.append((found.sqrt() - exact.sqrt()).norm().item())
        slopes = [math.log2(a / b) for a, b in zip(errors, errors[1:], strict=False)]
        assert abs(slopes[-1] - order) < 0.25, (solver, errors, slopes)


@pytest.mark.parametrize("representation", REPRESENTATIONS)
@pytest.mark.parametrize("solver", WITH_RULE)
def test_outputs_differentiate_in_the_points(solver, representation):
    spectrum = small_spectrum()
    inner = torch.tensor([[-2.0, -1.0], [0.5, 2.0], [1.5, 2.5], [2.5, 4.0]], dtype=torch.float64, requires_grad=True)

    def value(inner):
        ends = inner.new_tensor([[-5.0, -5.0]]), inner.new_tensor([[INF, INF]])
        points = torch.cat([ends[0], inner, ends[1]])
        return w2_squared(spectrum, solver_output(spectrum, points, solver, representation))

    assert torch.autograd.gradcheck(value, inner)


def dense_chains(s, points, start="truth", representation="overcomplete"):
    """Covariances of (y_64, y_32) of one low mode at all points, true and sampled, built step by step."""
    snr = points.exp()
    n = len(snr)
    shows = torch.tensor([1.0 if representation == "overcomplete" else 0.0, 0.5], dtype=torch.float64)
    flat = snr.flatten() * shows.repeat(n)  # y's mean per unit of the mode.
    same_scale = torch.arange(2 * n)[:, None] % 2 == torch.arange(2 * n) % 2
    wiener = torch.minimum(snr.flatten()[:, None], snr.flatten()) * same_scale
    truth = s * torch.outer(flat, flat) + wiener

    # Columns of `path` say how each state depends on 2n independent standard normals.
    if start == "truth":
        first = torch.linalg.cholesky(truth[:2, :2])
    else:
        first = torch.diag((snr[0] * (1 + snr[0])).sqrt())
    states = [torch.cat([first, torch.zeros(2, 2 * n - 2, dtype=torch.float64)], 1)]
    for k in range(n - 1):
        step = snr[k + 1] - snr[k]
        precision = 1 / s + shows.square() @ snr[k]
        drift = torch.outer(shows, shows) / precision
        state = (torch.eye(2) + step[:, None] * drift) @ states[-1]
        state[:, 2 * k + 2 : 2 * k + 4] += torch.diag(step.sqrt())
        states.append(state)
    sampled = torch.cat(states)
    return truth, sampled @ sampled.T


def dense_kl(p, q):
    ratio = torch.linalg.solve(q, p)
    return (ratio.trace() - len(p) - torch.logdet(ratio)) / 2


@pytest.mark.parametrize("representation", REPRESENTATIONS)
def test_chain_kl_is_that_of_the_dense_joint_laws(representation):
    for s in (8.0, 0.7, 0.05):
        spectrum = Spectrum(torch.tensor([s], dtype=torch.float64), UNSEEN)
        chains = dense_chains(torch.tensor(s, dtype=torch.float64), RISING, representation=representation)
        assert chain_kl(spectrum, RISING, representation).item() == pytest.approx(dense_kl(*chains).item(), rel=1e-7)


def test_chain_kl_of_one_clock_is_that_of_details():
    line = RISING[:, 0]
    alone = chain_kl(Spectrum(UNSEEN, torch.tensor([2.0])), RISING)
    assert chain_kl(Spectrum(torch.tensor([2.0]), UNSEEN), line).item() == pytest.approx(alone.item())


@pytest.mark.parametrize("representation", REPRESENTATIONS)
def test_chain_kl_is_the_left_riemann_sum_less_the_information(representation):
    spectrum = small_spectrum()
    points = torch.tensor([[-6.0, -6.0], [-6.0, -1.0], [-2.0, 1.0], [1.0, 1.0], [4.0, 5.0]], dtype=torch.float64)
    errors = torch.stack(mse(spectrum, points[:-1, 0], points[:-1, 1], representation), 1)  # [N, 2]
    riemann = (errors * points.exp().diff(dim=0)).sum() / 2
    gained = information(spectrum, *points[-1], representation) - information(spectrum, *points[0], representation)
    value = chain_kl(spectrum, points, representation).item()
    assert value == pytest.approx((riemann - gained).item(), abs=1e-6)
    assert value > 1


def test_chain_kl_vanishes_in_the_limit_of_many_steps():
    spectrum = small_spectrum()
    values = [chain_kl(spectrum, torch.linspace(-8, 4, n + 1, dtype=torch.float64)).item() for n in (200, 400)]
    assert values[1] / values[0] == pytest.approx(0.5, abs=0.02)


@pytest.mark.parametrize("representation", REPRESENTATIONS)
def test_start_kl_is_that_of_the_dense_laws(representation):
    spectrum, point = small_spectrum(), torch.tensor([-3.0, -1.0], dtype=torch.float64)
    alpha_64, alpha_32 = point.sigmoid()
    eye = torch.eye(2, dtype=torch.float64)
    expected = 0.0
    for s in spectrum.low:
        cross = (alpha_64 * alpha_32).sqrt() * s / 2
        covariance = [[alpha_64 * s + 1 - alpha_64, cross], [cross, alpha_32 * s / 4 + 1 - alpha_32]]
        held = slice(0 if representation == "overcomplete" else 1, 2)
        expected += dense_kl(torch.tensor(covariance, dtype=torch.float64)[held, held], eye[held, held]).item()
    for h in spectrum.high:
        expected += dense_kl((alpha_64 * h + 1 - alpha_64).view(1, 1), eye[:1, :1]).item()
    assert start_kl(spectrum, point, representation).item() == pytest.approx(expected, rel=1e-10)
    assert start_kl(spectrum, torch.tensor([-INF, -INF]), representation).item() == 0
    assert start_kl(spectrum, -3.0) < start_kl(spectrum, point)


@pytest.mark.parametrize("representation", REPRESENTATIONS)
@pytest.mark.parametrize("start", ["truth", "noise"])
def test_frozen_drift_output_is_the_margin_of_the_dense_chain(start, representation):
    spectrum, ends = small_spectrum(), RISING[-1].exp()
    law = frozen_drift_output(spectrum, RISING, start, representation)
    for s, value in zip(spectrum.low, law.low, strict=True):
        last = dense_chains(s, RISING, start, representation)[1].diag()[-2:] / (ends * (1 + ends))
        # A low mode is one of the fine image, or twice one of the coarse image.
        expected = last[0] if representation == "overcomplete" else 4 * last[1]
        assert value.item() == pytest.approx(expected.item(), rel=1e-10)
    # A detail mode is a low mode of which the coarse image shows nothing.
    alone = frozen_drift_output(Spectrum(spectrum.high, spectrum.high), RISING[:, 0], start=start)
    torch.testing.assert_close(law.high, alone.low)


@pytest.mark.parametrize("representation", REPRESENTATIONS)
def test_frozen_drift_output_is_no_farther_than_its_chain(representation):
    spectrum = small_spectrum()
    truth = spectrum.noised(RISING[-1] if representation == "residual" else RISING[-1, 0], representation)
    chain = chain_kl(spectrum, RISING, representation)
    assert kl(truth, frozen_drift_output(spectrum, RISING, "truth", representation)) <= chain
    bound = chain + start_kl(spectrum, RISING[0], representation)
    assert 0 < kl(truth, frozen_drift_output(spectrum, RISING, representation=representation)) <= bound
    fine = torch.linspace(-16, 0, 3001, dtype=torch.float64)[:, None] + RISING[-1]
    assert kl(truth, frozen_drift_output(spectrum, fine, representation=representation)) < 1e-5


def falling_snr(num_steps=7, seed=0):
    """Arbitrary points [N + 1] of one clock on the image, from pure noise to clean."""
    inner = 10 * torch.rand(num_steps - 1, generator=rng(seed), dtype=torch.float64) - 4
    return torch.cat([torch.tensor([-INF]), inner.sort().values, torch.tensor([INF])])


def single_scale_denoiser(scheduler, basis, s, mean):
    """One clock on the image alone, by a dense matrix, in v-prediction."""

    def denoise(xs, ts):
        alpha_bar = scheduler.alphas_cumprod[ts[0][0]]
        gain = basis.T @ torch.diag(alpha_bar.sqrt() * s / (alpha_bar * s + 1 - alpha_bar)) @ basis
        x0 = mean + (xs[0].flatten(1) - alpha_bar.sqrt() * mean) @ gain
        epsilon = (xs[0].flatten(1) - alpha_bar.sqrt() * x0) / (1 - alpha_bar).sqrt()
        return ((alpha_bar.sqrt() * epsilon - (1 - alpha_bar).sqrt() * x0).view_as(xs[0]),)

    return denoise


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("first", [-INF, -4.0])
def test_tied_clocks_of_the_residual_pair_are_one_clock_on_the_image(first, seed):
    line = falling_snr(seed=seed)
    line[0] = first
    points = tied(line)
    # A schedule whose timesteps are just these log SNRs, but for the clean end, where the path has timestep 0.
    rungs = points[:-1].flatten().sort(descending=True).values
    scheduler = DDIMScheduler(len(rungs), "cosine_zero_terminal", "v", clip_sample=False)
    scheduler.log_snr, scheduler.snr, scheduler.alphas_cumprod = rungs, rungs.exp(), rungs.sigmoid()
    timesteps = [[int((rungs == value).nonzero()[0]) for value in point] for point in points[:-1]] + [[0, 0]]

    denoiser, basis, s = model(scheduler, representation="residual")
    noise = torch.randn(3, C, H, W, generator=rng(20 + seed), dtype=torch.float64)
    one_clock = single_scale_denoiser(scheduler, basis, s, parts()[3].flatten())
    path = Path([point[:1] for point in timesteps], "one clock", {})
    expected = sample(one_clock, scheduler, path, [noise]).images[0].flatten(1)

    # The mean of a noisy image is the coarse image at 4 times the SNR once its noise has the scale of that SNR.
    scale = 2 * ((1 + math.exp(first)) / (1 + 4 * math.exp(first))) ** 0.5
    fine = (noise.flatten(1) @ fine_of("residual")).view_as(noise)
    pair = (fine, scale * F.avg_pool2d(noise, 2))
    images = sample(denoiser.denoise, scheduler, Path(timesteps, "tied", {}), pair).images
    torch.testing.assert_close(compose(images, "residual"), expected, rtol=1e-10, atol=1e-10)

    law, alone = ddim_output(denoiser.spectrum(), points, "residual"), ddim_output_single(denoiser.spectrum(), line)
    torch.testing.assert_close(law.low * scale**2 / 4, alone.low, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(law.high, alone.high, rtol=1e-10, atol=1e-12)


def test_distances_are_the_dense_formulas():
    spectrum = small_spectrum()
    law = Law(torch.tensor([5.0, 1.0, 0.2]).double(), torch.tensor([0.1, 0.05]).double())
    basis = torch.linalg.qr(torch.randn(5, 5, generator=rng(2), dtype=torch.float64)).Q
    p, q = (basis @ torch.diag(torch.cat([x.low, x.high])) @ basis.T for x in (spectrum, law))
    root = scipy.linalg.sqrtm(p.numpy())
    w2 = np.trace(p.numpy() + q.numpy() - 2 * scipy.linalg.sqrtm(root @ q.numpy() @ root).real)
    assert w2_squared(spectrum, law).item() == pytest.approx(w2, rel=1e-8)
    assert kl(spectrum, law).item() == pytest.approx(dense_kl(p, q).item(), rel=1e-10)
    for distance in (w2_squared, kl):
        bands = distance(spectrum, law, by_band=True)
        assert (bands[0] + bands[1]).item() == pytest.approx(distance(spectrum, law).item())
        swapped = distance(spectrum, Law(law.low, spectrum.high), by_band=True)
        assert swapped[0] == bands[0] and swapped[1] == 0 < bands[1]


@pytest.mark.parametrize(
    "points, message",
    [
        ([[0.0, 0.0]], "shape"),
        ([[0.0, 0.0, 0.0], [1.0, 1.0, 1.0]], "shape"),
        ([[0.0, 0.0], [1.0, -1.0]], "never fall"),
        ([[0.0, 0.0], [math.nan, 1.0]], "never fall"),
        ([[0.0, 0.0], [1.0, INF], [INF, INF]], "Only the last"),
    ],
)
def test_bad_points_are_refused(points, message):
    for function in (ddim_output, chain_kl, frozen_drift_output):
        with pytest.raises(ValueError, match=message):
            function(small_spectrum(), torch.tensor(points))


def test_a_point_says_what_is_wrong_with_it():
    spectrum = small_spectrum()
    with pytest.raises(ValueError, match=r"one scale must be log SNRs \[N \+ 1\] but have shape \[2, 2\]"):
        ddim_output_single(spectrum, [[0.0, 0.0], [1.0, 1.0]])
    with pytest.raises(ValueError, match="Unknown start 'zero'; choose noise or truth"):
        frozen_drift_output(spectrum, [0.0, 1.0], "zero")
    # Pure noise to the end holds nothing of the fine image, and in the residual pair not of either.
    for points, representation, held in (
        ([[-INF, 0.0], [-INF, 1.0]], "overcomplete", "the fine image"),
        ([[-INF, 0.0], [-INF, 1.0]], "residual", "both images"),
        ([[0.0, -INF], [1.0, -INF]], "residual", "both images"),
    ):
        with pytest.raises(ValueError, match=f"finite log SNR of {held}"):
            frozen_drift_output(spectrum, points, "noise", representation)
    for function in (ddim_output, chain_kl):
        with pytest.raises(ValueError, match="its coarse scale needs a clock too"):
            function(spectrum, [0.0, 1.0], "residual")


def test_a_clean_end_is_refused_where_it_is_infinite():
    for function in (chain_kl, frozen_drift_output):
        for points in ([0.0, INF], [0.0, 1.0, INF], [0.0, 1.0, 2.0, INF]):
            with pytest.raises(ValueError, match="finite"):
                function(small_spectrum(), points)
