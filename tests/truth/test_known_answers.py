"""Answers that are known without training for DDPM, DDIM, NCSN, score SDEs and flow matching, on Gaussian numbers.

Images are N(0, s^2) and their denoiser is exact, so that all is linear and every figure has a closed form. Independent
normal numbers are held as orthogonal axes: the squared length of an image is then its variance, exactly, also where a
solver divides by lengths, and one walk of `sample` says what a chain makes of its noise.
"""

import math

import numpy as np
import pytest
import torch
from scipy.integrate import quad

from diffusion.sampler import sample
from diffusion.solvers import PC_SNR, Ancestral, Langevin, make_solver
from diffusion.step import Step, level_of
from paths.families import diagonal
from paths.path import Path
from scheduler import CLEAN, PREDICTION_TYPES, PROCESSES, DDIMScheduler
from truth.gaussian import GaussianDenoiser
from truth.ideal import EmpiricalDenoiser

S = 0.5


def make(process="vp", prediction_type="x0", beta_schedule="linear", count=1000):
    return DDIMScheduler(count, beta_schedule, prediction_type, clip_sample=False, process=process)


def exact(scheduler, s=S):
    """The optimal denoiser of numbers N(0, s^2), each by itself, in the prediction type of the scheduler."""

    def denoise(xs, ts):
        alpha, sigma = scheduler.scales(ts[0], xs[0])
        x0 = alpha * s**2 / (alpha**2 * s**2 + sigma**2) * xs[0]
        # At timestep 0 of flow there is no noise, and nothing is divided by it.
        return (scheduler.target(x0, (xs[0] - alpha * x0) / sigma.clamp(min=1e-300), ts[0]),)

    return denoise


def posterior(scheduler, s=S):
    """GaussianDenoiser as a function of numbers and times `[n]`: of images of details alone, which one scale shows."""
    model = GaussianDenoiser(scheduler, torch.zeros(1, 1, 1), torch.full((3, 1, 1, 1), s**2))
    pattern = torch.tensor([[1.0, -1.0], [-1.0, 1.0]], dtype=torch.float64)

    def predict(x, t):
        coarse = torch.zeros(len(x), 1, 1, 1, dtype=x.dtype)
        return model.denoise((x[:, None, None, None] * pattern, coarse), (t, t))[0][:, 0, 0, 0]

    return predict


def one_clock(timesteps):
    return Path([(int(t),) for t in timesteps], "test", {})


def variances(scheduler, solver, path, end="clean"):
    """Variances of the images of a walk at every point of a path."""
    axes = iter(torch.eye(1 + getattr(solver, "rounds", 2) * path.nfe, dtype=torch.float64)[:, None, None, None])
    found = []
    options = {"draw": lambda shape: next(axes), "callback": lambda k, xs: found.append(xs[0].square().sum().item())}
    sample(exact(scheduler), scheduler, path, [next(axes)], end=end, solver=solver, **options)
    return np.array(found)


# DDPM: the bound of the likelihood, and the noise of the last step


def chain(variance, s):
    """The chain of DDPM as the solver makes it: factors of x_t and variances of the noise for t = 1 to 1000."""
    scheduler, solver = make(), Ancestral(variance)
    x, noise = torch.eye(2, dtype=torch.float64)[:, None, None, None]
    factors, drawn = [], []
    for t in range(1000):
        x0s = exact(scheduler, s)((x,), (t,))
        step = Step(scheduler, (t,), (t - 1 if t else CLEAN,), (x,), x0s, None, lambda: (noise,))
        factor, deviation = solver.step(step)[0].flatten().tolist()
        factors.append(factor)
        drawn.append(deviation**2)
    # The solver draws no noise in the last step. The bound needs some: beta, that of the decoder (2006.11239, eq. 13),
    # and in place of beta tilde, which is 0 there, that of the step before, as the code of 2102.09672 has it.
    drawn[0] = 1 - scheduler.alphas_cumprod[0].item() if variance == "beta" else drawn[1]
    return np.array(factors), np.array(drawn)


def truth_of_chain(s):
    """Betas, variances of x_0 to x_1000, and those of x_{t-1} given x_t, by the forward chain alone."""
    betas, marginal = np.linspace(1e-4, 0.02, 1000), [s**2]
    for beta in betas:
        marginal.append((1 - beta) * marginal[-1] + beta)
    marginal = np.array(marginal)
    return betas, marginal, marginal[:-1] * betas / marginal[1:]


@pytest.mark.parametrize("variance, s, expected", [("beta", S, 0.0011), ("beta_tilde", S, 0.570), ("beta", 1.0, 0.0)])
def test_the_bound_of_ddpm_has_its_known_gap(variance, s, expected):
    """Nats per dimension between the bound and the likelihood, of the whole chain and summed over its steps."""
    factors, drawn = chain(variance, s)
    betas, marginal, backward = truth_of_chain(s)
    # Cross entropy of the chain, less the entropy of the joint law; log 2 pi cancels.
    shared = np.sqrt(1 - betas) * marginal[:-1]  # Covariances of x_{t-1} and x_t.
    missed = marginal[:-1] - 2 * factors * shared + factors**2 * marginal[1:]
    entropy = (1001 + math.log(s**2) + np.log(betas).sum()) / 2
    gap = ((missed / drawn + np.log(drawn)).sum() + marginal[-1]) / 2 - entropy

    def divergence(ratios):  # Of Gaussians of equal means, the start N(0, 1) among them.
        return sum(ratio - 1 - math.log(ratio) for ratio in (marginal[-1], *ratios)) / 2

    assert gap == pytest.approx(divergence(backward / drawn), abs=1e-9)  # Sums of a thousand logarithms cancel.
    assert gap == pytest.approx(expected, abs=5e-5 if variance == "beta" else 5e-4)  # As printed.
    assert divergence(missed / backward) == pytest.approx(0, abs=1e-9)  # Of the optimal variance.


@pytest.mark.parametrize("variance, s", [("beta", 1.0), ("beta_tilde", 1e-7)])
def test_each_variance_of_the_chain_is_exact_at_its_extreme(variance, s):
    """The larger for images of unit variance, the smaller for a single image; the last step is as `chain` says."""
    # Of 1 - abar / abar', 1e-4 at the clean end, 12 digits are left; s^2 = 1e-14 is 1e-10 of it.
    np.testing.assert_allclose(chain(variance, s)[1][1:], truth_of_chain(s)[2][1:], rtol=1e-9)


def test_with_noise_in_the_last_step_ddpm_has_the_deviation_of_the_paper():
    """Its algorithm 2 and the solver leave that out; `tests/diffusion/test_solvers.py` has .50075 of it."""
    variance = 1.0
    for factor, noise in zip(*(each[::-1] for each in chain("beta", S)), strict=True):
        variance = factor**2 * variance + noise
    assert math.sqrt(variance) == pytest.approx(0.5009, abs=5e-5)


# DDIM: Euler's method, the same in every process


@pytest.mark.parametrize("steps, expected", [(1, 0.0016), (10, 0.370), (50, 0.471)])
def test_ddim_has_its_known_deviation(steps, expected):
    scheduler = make(prediction_type="epsilon")
    ratios = (1 / np.cumprod(1 - np.linspace(1e-4, 0.02, 1000)) - 1) ** 0.5
    # Strides of T / N from 999 down, the last of which is the step to clean (999, 899, ..., 99), are those of the
    # known figures. The diagonal of LIFT is 999, 899, ..., 100: .3692 in 10 steps.
    strides = one_clock([*(1000 * k // steps - 1 for k in range(steps, 0, -1)), 0])
    for path, rounding in ((strides, 5e-4), (diagonal(steps, num_scales=1), 1e-3)):
        [image], nfe = sample(exact(scheduler), scheduler, path, [torch.ones(1, 1, 1, 1, dtype=torch.float64)])
        assert nfe == steps
        now = ratios[[t for (t,) in path.points[:-1]]]
        by_hand = math.hypot(1, now[0]) * (1 - now * (now - [*now[1:], 0]) / (S**2 + now**2)).prod()
        assert image.item() == pytest.approx(by_hand, rel=1e-9)  # 1 - abar / abar' has 12 digits or more.
        assert image.item() == pytest.approx(expected, abs=min(rounding, 0.05 * expected))


def curved(x):
    """Some clean image seen in x / alpha, not linear."""
    return 0.8 * torch.tanh(1.5 * x + 0.3)


@pytest.mark.parametrize("process", PROCESSES)
def test_ddim_is_euler_in_sigma_over_alpha_all_the_way(process):
    scheduler, seen = make(process, "velocity"), []
    timesteps = [998, 900, 750, 500, 320, 200, 90, 30, 4, 1]

    def denoise(xs, ts):
        alpha, sigma = scheduler.scales(ts[0], xs[0])
        x0 = curved(xs[0] / alpha)
        return (scheduler.target(x0, (xs[0] - alpha * x0) / sigma, ts[0]),)

    noise = torch.randn(8, 1, 1, 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    path = one_clock([*timesteps, 0])
    sample(denoise, scheduler, path, [noise], callback=lambda k, xs: seen.append(xs[0].flatten().numpy()))
    alphas, sigmas = scheduler.alphas.numpy()[timesteps], scheduler.sigmas.numpy()[timesteps]
    x, ratios = seen[0] / alphas[0], sigmas / alphas
    for k, (now, after) in enumerate(zip(ratios, ratios[1:], strict=False), start=1):
        x = x + (after - now) * (x - curved(torch.from_numpy(x)).numpy()) / now
        # Noise of up to 1000 times the image, which is taken away, leaves 13 of 16 digits.
        np.testing.assert_allclose(seen[k] / alphas[k], x, rtol=0, atol=1e-12 * ratios[0])


def test_ddim_of_flow_is_euler_of_the_velocity():
    """x + (tau' - tau) u, from pure noise to tau = 0 (arXiv 2209.03003)."""
    scheduler = make("flow", "velocity")
    timesteps = [999, 800, 500, 200, 40, 0]
    x = torch.linspace(-2, 2, 9, dtype=torch.float64)[:, None, None, None]

    def velocity(xs, ts):
        return (torch.sin(2 * xs[0]) - int(ts[0][0]) / 999 * xs[0],)

    found = sample(velocity, scheduler, one_clock(timesteps), [x], end="t0").images[0]
    for t, t_next in zip(timesteps, timesteps[1:], strict=False):
        x = x + (t_next - t) / 999 * velocity((x,), ([t],))[0]
    torch.testing.assert_close(found, x, rtol=0, atol=1e-12)


def test_ddim_sees_the_same_clean_images_in_every_process():
    """At real timesteps of equal sigma / alpha, from 80 to 0.03, which every process passes."""
    levels = torch.from_numpy(np.geomspace(80, 0.03, 13))
    start = 80 * torch.randn(8, 1, 1, 1, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    walks = {}
    for process in PROCESSES:
        scheduler = make(process, "velocity")
        times = scheduler.time_of(-2 * levels.log())[:, None].expand(-1, len(start))
        x, walks[process] = scheduler.scales(times[0], start)[0] * start, []
        for t, t_next in zip(times, times[1:], strict=False):
            alpha, sigma = scheduler.scales(t, x)
            wanted = curved(x / alpha)
            x0 = scheduler.predict_x0(scheduler.target(wanted, (x - alpha * wanted) / sigma, t), t, x)
            walks[process].append(x0)
            x = scheduler.step_from(x0, t, t_next, x)
    for process in PROCESSES[1:]:
        # Timesteps have 13 digits after the point, and sigma / alpha of 80 rises by up to 10 from one to the next.
        torch.testing.assert_close(torch.stack(walks[process]), torch.stack(walks["vp"]), rtol=0, atol=1e-9)


# NCSN: annealed Langevin dynamics


@pytest.mark.parametrize("prediction_type", ["score", "epsilon"])
def test_annealed_langevin_is_that_of_its_paper(prediction_type):
    """x + a s / 2 + sqrt(a) z with a = step (sigma / sigma_L)^2 (arXiv 1907.05600, algorithm 1), twice the solver's a.

    At the end x + sigma_L^2 s (arXiv 2006.09011).
    """
    scheduler, rounds, rate = make("ve", prediction_type), 3, 0.1
    sigmas = np.geomspace(100, 0.02, 10)[:-1]  # Even in log sigma; the path's last point, 0.02, is not called.
    step = 2 * rate * sigmas[-1] ** 2
    expected = [sigmas[0] ** 2]
    for sigma in sigmas:
        variance, a = expected[-1], step * (sigma / sigmas[-1]) ** 2
        for _ in range(rounds):
            variance = (1 - a / 2 / (S**2 + sigma**2)) ** 2 * variance + a
        expected.append(variance)
    expected[-1] *= (1 - sigmas[-1] ** 2 / (S**2 + sigmas[-1] ** 2)) ** 2
    found = variances(scheduler, Langevin(rounds, rate), one_clock(range(999, -1, -111)))
    np.testing.assert_allclose(found, expected, rtol=1e-10)


@pytest.mark.parametrize("process", ["vp", "sub_vp", "ve"])
def test_sigma_squared_times_the_error_of_the_score_is_that_of_the_noise(process):
    score, epsilon = (make(process, kind) for kind in ("score", "epsilon"))
    t = torch.tensor([1, 5, 200, 600, 999])
    weight = score.sigmas[t].square()
    torch.testing.assert_close(weight * score.error_ratio(t), epsilon.error_ratio(t), rtol=1e-12, atol=0)
    x0, noise, wrong = torch.randn(3, 5, 1, 4, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    alpha, sigma = score.scales(t, x0)
    other = noise - alpha / sigma * (wrong - x0)  # With the other clean image it makes the same noisy one.
    by_score, by_noise = (
        (each.target(x0, noise, t) - each.target(wrong, other, t)).square().mean((1, 2, 3)) for each in (score, epsilon)
    )
    torch.testing.assert_close(weight * by_score, by_noise, rtol=1e-9, atol=0)


# Score SDE: the reverse equation, its corrector, and the equation without noise


def errors_of_variance(process, name):
    """Of solvers in 50, 100, 200 and 400 steps even in log(sigma / alpha), as shares of the variance of noisy data."""
    scheduler = make(process, beta_schedule="cosine", count=100_001)  # So many that steps are even.
    errors = []
    for steps in (50, 100, 200, 400):
        levels = torch.linspace(-2 * math.log(50), -2 * math.log(0.02), steps + 1, dtype=torch.float64)
        times = scheduler.time_of(levels).round().long().tolist()
        path = one_clock(times if times[-1] == 0 else [*times, 0])
        end = level_of(scheduler, times[-1])
        found = variances(scheduler, make_solver(name), path, end="t0")[steps]
        errors.append(found / (end.alpha**2 * S**2 + end.sigma**2) - 1)
    return np.array(errors)


@pytest.mark.parametrize("process", PROCESSES)
def test_the_reverse_equation_comes_to_the_variance_of_the_data(process):
    """In first order. For ve, in steps h of log sigma^2, what is of first order is none, and second order is left.

    It is s^4 h times the integral over u = sigma^2 of (u / (s^2 + u) - 1/2) / (s^2 + u)^2 from 0 to infinity.
    """
    leading = quad(lambda u: (u / (S**2 + u) - 0.5) / (S**2 + u) ** 2, 0, math.inf)[0]
    assert leading == pytest.approx(0, abs=1e-9)
    errors = np.abs(errors_of_variance(process, "euler_maruyama"))
    order = 2 if process == "ve" else 1
    slope = math.log2(errors[-2] / errors[-1])
    assert order - 0.2 < slope < order + 0.1 and errors[-1] < 3e-3, errors


@pytest.mark.parametrize("process", PROCESSES)
def test_the_corrector_leaves_the_variance_that_its_length_stands_for(process):
    """However many the steps, that is not v of the data: the variance V is stationary at V = v + r^2 v, r = 0.16.

    A score of length sqrt(V) / v makes Langevin steps of a = 2 r^2 v^2 / V, which keep V = v / (1 - a / (2 v)).
    """
    errors = np.abs(errors_of_variance(process, "pc") - PC_SNR**2)
    assert (np.diff(errors) < 0).all() and errors[-1] < 1e-4, errors


@pytest.mark.parametrize("s", [S, 2.0])
@pytest.mark.parametrize("process", PROCESSES)
def test_the_velocity_carries_the_deviation_exactly(process, s):
    """dx / dtau = E[velocity | x]: at every whole time x has grown as the deviation of noisy data has."""
    scheduler = make(process, "velocity")
    nodes, weights = (torch.from_numpy(each) for each in np.polynomial.legendre.leggauss(8))
    times = (torch.arange(999)[:, None] + (nodes + 1) / 2).flatten()  # Between whole ones the curves are smooth.
    slopes = posterior(scheduler, s)(torch.ones_like(times), times)
    growth = (slopes.view(999, 8) @ weights / 2).cumsum(0) / 999
    curves = scheduler.curves(torch.arange(1000).double())
    deviation = torch.hypot(curves.alpha * s, curves.sigma)
    # The quadrature is exact to rounding, of a sum of a thousand intervals.
    torch.testing.assert_close(growth, (deviation[1:] / deviation[0]).log(), rtol=0, atol=1e-12)


# Flow matching


@pytest.mark.parametrize("s", [S, 1.0])
def test_the_loss_of_flow_has_its_known_floor(s):
    """pi s / 2 per dimension: by quadrature, by the table of errors, and of random images."""
    floor = quad(lambda tau: s**2 / ((1 - tau) ** 2 * s**2 + tau**2), 0, 1)[0]
    assert floor == pytest.approx(math.pi * s / 2, rel=1e-9)
    scheduler, t = make("flow", "velocity"), torch.arange(1, 999)
    alpha, sigma = scheduler.alphas[t], scheduler.sigmas[t]
    inner = scheduler.error_ratio(t) * s**2 * sigma**2 / (alpha**2 * s**2 + sigma**2)
    table = [1.0, *inner.tolist(), s**2]  # At one end the noise is not to be seen, at the other the image.
    assert np.trapezoid(table, dx=1 / 999) == pytest.approx(floor, rel=1e-5)  # Slopes at the ends, / (12 999^2).
    g = torch.Generator().manual_seed(0)
    x0, noise = torch.randn(2, 200_000, generator=g, dtype=torch.float64) * torch.tensor([[s], [1.0]])
    times = 999 * torch.rand(200_000, generator=g, dtype=torch.float64)
    seen = posterior(scheduler, s)(scheduler.add_noise(x0, noise, times), times)
    losses = (scheduler.target(x0, noise, times) - seen).square()
    error = losses.std().item() / math.sqrt(len(losses))
    assert error < 0.005 * floor and abs(losses.mean().item() - floor) < 4 * error


@pytest.mark.parametrize("s", [1.0, S])
def test_the_straightness_of_flow_is_known(s):
    """S along the trajectories Z of the equation itself: 2 - pi / 2 per dimension for s = 1."""
    # Z is sqrt((1 - tau)^2 s^2 + tau^2) of its noise, of which it has s at the image.
    slope = quad(lambda tau: (tau - (1 - tau) * s**2) ** 2 / ((1 - tau) ** 2 * s**2 + tau**2), 0, 1)[0]
    expected = slope - (1 - s) ** 2
    assert s != 1 or expected == pytest.approx(2 - math.pi / 2, rel=1e-9)
    scheduler, walked = make("flow", "velocity"), []
    times, z = torch.arange(999, -1, -1), torch.ones(1, 1, 1, 1, dtype=torch.float64)
    options = {"callback": lambda k, xs: walked.append(xs[0].item()), "end": "t0", "solver": make_solver("heun")}
    sample(exact(scheduler, s), scheduler, one_clock(times), [z], **options)
    walked = torch.tensor(walked, dtype=torch.float64)
    velocities = exact(scheduler, s)((walked[:, None, None, None],), (times,))[0].flatten()
    bends = (walked[0] - walked[-1] - velocities).square()
    found = np.trapezoid(bends.flip(0).numpy(), dx=1 / 999)
    assert found == pytest.approx(expected, abs=1e-5)  # Heun's method in 999 steps has it to 4e-6.


@pytest.mark.parametrize("prediction_type", ["velocity", "v", "x0"])
def test_one_step_of_flow_from_pure_noise_gives_the_mean(prediction_type):
    scheduler = make("flow", prediction_type)
    g = torch.Generator().manual_seed(0)
    images = torch.rand(5, 1, 4, 4, generator=g, dtype=torch.float64)
    xs = tuple(torch.randn(3, 1, side, side, generator=g, dtype=torch.float64) for side in (4, 2))
    low, high = torch.full((1, 2, 2), 0.3), torch.full((3, 1, 2, 2), 0.1)
    for model in (GaussianDenoiser(scheduler, low, high, mean=images.mean(0)), EmpiricalDenoiser(scheduler, images)):
        times = torch.full((3,), 999.0, dtype=torch.float64)
        seen = scheduler.predict_clean(model.denoise(xs, (times, times)), (times, times), xs)
        torch.testing.assert_close(seen[0], images.mean(0).expand(3, -1, -1, -1), rtol=0, atol=1e-12)
        found = sample(model.denoise, scheduler, Path([(999, 999), (0, 0)], "test", {}), xs).images[0]
        torch.testing.assert_close(found, images.mean(0).expand(3, -1, -1, -1), rtol=0, atol=1e-12)


# Every process and prediction


@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
@pytest.mark.parametrize("process", PROCESSES)
def test_every_prediction_has_the_error_that_is_left_to_bayes(process, prediction_type):
    """The error of the optimal prediction, by quadrature over images and noise, is the variance it has given x."""
    if process == "flow" and prediction_type in ("epsilon", "score"):
        pytest.skip("Refused at zero SNR.")
    scheduler = make(process, prediction_type)
    t = torch.tensor([2, 60, 300, 700, 960])
    alpha, sigma, d_alpha, d_sigma = scheduler.curves(t.double())
    ones = torch.ones_like(alpha)
    of_x0, of_noise = {
        "epsilon": (0 * ones, ones),
        "x0": (ones, 0 * ones),
        "v": (-sigma, alpha),
        "velocity": (d_alpha, d_sigma),
        "score": (0 * ones, -1 / sigma),
    }[prediction_type]
    variance = alpha**2 * S**2 + sigma**2
    # Both are Gaussian: Var - Cov^2 / Var, which is a square over the variance of x.
    expected = S**2 * (of_x0 * sigma - of_noise * alpha).square() / variance
    posterior_variance = S**2 * sigma**2 / variance
    torch.testing.assert_close(scheduler.error_ratio(t) * posterior_variance, expected, rtol=1e-9, atol=0)
    # The rule of two points, +-1 deviation for each of image and noise, is exact for squares of linear functions.
    x0, noise = (each.repeat(len(t)) for each in torch.tensor([[S, S, -S, -S], [1, -1, 1, -1]], dtype=torch.float64))
    times = t.repeat_interleave(4)
    seen = posterior(scheduler)(scheduler.add_noise(x0, noise, times), times)
    found = (scheduler.target(x0, noise, times) - seen).square().view(-1, 4).mean(1)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=0)
