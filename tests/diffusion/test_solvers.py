"""Solvers against closed forms, an adaptive integrator, and those of diffusers on the same network."""

import copy
import math

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler, DPMSolverMultistepScheduler, HeunDiscreteScheduler, UniPCMultistepScheduler
from scipy.integrate import solve_ivp

from diffusion.guidance import ClassifierFree, ClassifierGuided
from diffusion.sampler import SeededNoise, sample, sample_seeds
from diffusion.solvers import SOLVERS, Ancestral, Langevin, make_solver
from diffusion.step import Step, level_of
from paths.path import Path
from scheduler import CLEAN, DDIMScheduler

DETERMINISTIC = ("ddim", "heun", "dpmpp_2m", "dpmpp_3m", "unipc")
T = 1_000_001


def exploding(count=T):
    """log sigma even in t from 100 to 0.02, so that any λ is a timestep."""
    return DDIMScheduler(count, prediction_type="x0", clip_sample=False, process="ve")


def path_of(points):
    return Path([tuple(int(t) for t in point) for point in points], "test", {})


# Convergence: jointly Gaussian numbers, whose denoiser is a matrix


COVARIANCE = np.array([[0.3, 0.2], [0.2, 0.25]])


def mean_of(covariance, xs, sigmas):
    """E[x0 | x0 + sigma noise], numbers `[scales]`."""
    return covariance @ np.linalg.solve(covariance + np.diag(np.square(sigmas)), xs)


def lines(num_scales, steps):
    """Timesteps on a curve from noise to t = 0 along which the second scale runs ahead."""
    s = np.linspace(0, 1, steps + 1)
    fine = (T - 1) * (1 - s)
    coarse = (T - 1) * (1 - s - 0.1 * np.sin(np.pi * s))
    return np.stack([fine, coarse][:num_scales], 1).round().astype(int)


def exact_end(scheduler, covariance, start):
    """The images at t = 0, by an integrator with error control, in x̂ along the same curve."""
    low, high = scheduler.sigmas[0].item(), scheduler.sigmas[-1].item()
    rate = math.log(high / low)

    def sigmas(s):
        shares = np.array([1 - s, 1 - s - 0.1 * math.sin(math.pi * s)][: len(start)])
        slopes = np.array([-1, -1 - 0.1 * math.pi * math.cos(math.pi * s)][: len(start)])
        values = low * np.exp(rate * shares)
        return values, values * rate * slopes

    def flow(s, xs):
        values, slopes = sigmas(s)
        return slopes * (xs - mean_of(covariance, xs, values)) / values

    return solve_ivp(flow, (0, 1), start, "DOP853", rtol=1e-12, atol=1e-12).y[:, -1]


@pytest.mark.parametrize("num_scales", [1, 2])
@pytest.mark.parametrize("name, order", [("ddim", 1), ("heun", 2), ("dpmpp_2m", 2), ("unipc", 3), ("dpmpp_3m", 3)])
def test_orders_of_convergence_on_gaussian_images(name, order, num_scales):
    scheduler, covariance = exploding(), COVARIANCE[:num_scales, :num_scales]
    noise = np.array([0.7, -1.3])[:num_scales]
    end = exact_end(scheduler, covariance, noise * scheduler.sigmas[-1].item())

    def denoise(xs, ts):
        values = np.array([x.item() for x in xs])
        means = mean_of(covariance, values, scheduler.sigmas[torch.stack(ts)[:, 0]].numpy())
        return tuple(torch.full((1, 1, 1, 1), mean, dtype=torch.float64) for mean in means)

    errors, counts = [], [32, 64, 128, 256]
    for count in counts:
        start = [torch.full((1, 1, 1, 1), value, dtype=torch.float64) for value in noise]
        found = sample(denoise, scheduler, path_of(lines(num_scales, count)), start, end="t0", solver=make_solver(name))
        assert found.nfe == (2 * count if name == "heun" else count)
        errors.append(max(abs(x.item() - y) for x, y in zip(found.images, end, strict=True)))
    slopes = -np.diff(np.log(errors)) / math.log(2)
    assert slopes[-1] > order - 0.3, (errors, slopes)
    # On one Gaussian number the errors of third order of dpmpp_3m all but cancel.
    assert slopes[-1] < order + (1.1 if (name, num_scales) == ("dpmpp_3m", 1) else 0.3), (errors, slopes)


# The same network in another library


def network(x, t):
    """Some noise prediction, not linear, of x `[B, C, H, W]` at timestep t."""
    return torch.tanh(1.3 * x + 0.2 * x.flip(-1)) * math.cos(t / 700) + 0.1 * x


TIMESTEPS = [999, 850, 700, 560, 430, 310, 200, 110, 40, 10]


def ours(name, count=3):
    scheduler = DDIMScheduler(beta_schedule="linear", clip_sample=False)
    noise = torch.randn(count, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    path = path_of([(t,) for t in (*TIMESTEPS, 0)])
    found = sample(lambda xs, ts: (network(xs[0], ts[0][0].item()),), scheduler, path, [noise], solver=SOLVERS[name]())
    return found, noise, scheduler


@pytest.mark.parametrize(
    "name, theirs",
    [
        ("dpmpp_2m", lambda: DPMSolverMultistepScheduler(solver_order=2, lower_order_final=False, **THEIRS)),
        ("unipc", lambda: UniPCMultistepScheduler(solver_order=2, solver_type="bh2", lower_order_final=True, **THEIRS)),
    ],
)
def test_multistep_solvers_equal_those_of_diffusers(name, theirs):
    found, x, _ = ours(name)
    reference = theirs()
    reference.set_timesteps(len(TIMESTEPS))
    # Their own choice of timesteps is another one.
    abar = reference.alphas_cumprod.double()
    reference.timesteps = torch.tensor(TIMESTEPS)
    sigmas = ((1 - abar) / abar).sqrt()[TIMESTEPS]
    reference.sigmas = torch.cat([sigmas, torch.zeros(1, dtype=torch.float64)])
    for t in TIMESTEPS:
        x = reference.step(network(x, t), t, x).prev_sample
    torch.testing.assert_close(found.images[0], x.float(), rtol=1e-4, atol=1e-4)
    assert found.nfe == len(TIMESTEPS)


THEIRS = {"beta_start": 1e-4, "beta_end": 0.02, "beta_schedule": "linear", "final_sigmas_type": "zero"}


def test_heun_equals_that_of_diffusers():
    found, noise, scheduler = ours("heun")
    reference = HeunDiscreteScheduler(beta_start=1e-4, beta_end=0.02, beta_schedule="linear")
    reference.set_timesteps(len(TIMESTEPS))
    sigmas = ((1 - scheduler.alphas_cumprod) / scheduler.alphas_cumprod).sqrt()[TIMESTEPS].tolist()
    twice = [sigmas[0], *(sigma for sigma in sigmas[1:] for _ in (0, 1)), 0.0]
    reference.sigmas = torch.tensor(twice, dtype=torch.float64)
    times = [TIMESTEPS[0], *(t for t in TIMESTEPS[1:] for _ in (0, 1))]
    reference.timesteps = torch.tensor([float(t) for t in times])
    x = noise.double() / scheduler.alphas[TIMESTEPS[0]]
    for k, t in enumerate(times):
        sigma = twice[k] if k == 0 or k % 2 == 0 else twice[k]
        scaled = x / math.sqrt(1 + sigma**2)
        reference._step_index = k
        x = reference.step(network(scaled, t), float(t), x).prev_sample
    torch.testing.assert_close(found.images[0], x.float(), rtol=1e-4, atol=1e-4)
    assert found.nfe == 2 * len(TIMESTEPS) - 1


# What is known of chains and dynamics


def parts_of(solver, scheduler, s, t, t_next):
    """A step of images N(0, s^2) through their exact denoiser as (factor of x, factors of the noises drawn)."""

    def seen(xs, point):
        now = level_of(scheduler, point[0])
        return tuple(x * now.alpha * s**2 / (now.alpha**2 * s**2 + now.sigma**2) for x in xs)

    def run(x, drawn):
        drawn = iter(drawn)
        xs = (torch.full((1, 1, 1, 1), x, dtype=torch.float64),)
        noise = lambda: (torch.full((1, 1, 1, 1), next(drawn), dtype=torch.float64),)  # noqa: E731
        solver.start()
        step = Step(scheduler, (t,), (t_next,), xs, seen(xs, (t,)), seen, noise)
        return solver.step(step)[0].item()

    rounds = solver.rounds if isinstance(solver, Langevin) else 1
    zeros = [0.0] * rounds
    noises = [run(0.0, [*zeros[:k], 1.0, *zeros[k + 1 :]]) for k in range(rounds)]
    return run(1.0, zeros), noises


def deviation(solver, scheduler, s, timesteps):
    """Standard deviation of what a chain makes of the noise of the process."""
    variance = scheduler.prior(torch.ones(1, dtype=torch.float64), timesteps[0]).item() ** 2
    for t, t_next in zip(timesteps, [*timesteps[1:], CLEAN], strict=True):
        factor, noises = parts_of(solver, scheduler, s, t, t_next)
        variance = factor**2 * variance + sum(noise**2 for noise in noises)
    return math.sqrt(variance)


def linear(**options):
    return DDIMScheduler(beta_schedule="linear", prediction_type="x0", clip_sample=False, **options)


@pytest.mark.parametrize("variance, expected", [("beta", 0.50075), ("beta_tilde", 0.4961)])
def test_the_chain_of_ddpm_has_its_known_deviation(variance, expected):
    """1,000 steps on N(0, 1/4), by the recursion of arXiv 2006.11239, eq. 7, and as it is known to four digits.

    With noise in the last step as well, which algorithm 2 leaves out, the larger variance would have 0.5009.
    """
    scheduler = linear()
    abar = [1.0, *scheduler.alphas_cumprod.tolist()]
    by_hand = 1.0
    for k in range(1000, 0, -1):
        beta, now, after = 1 - abar[k] / abar[k - 1], abar[k], abar[k - 1]
        share = math.sqrt(now) * 0.25 / (now * 0.25 + 1 - now)  # of x in the mean of the clean image
        factor = math.sqrt(after) * beta / (1 - now) * share + math.sqrt(now / after) * (1 - after) / (1 - now)
        drawn = 0.0 if k == 1 else beta if variance == "beta" else beta * (1 - after) / (1 - now)
        by_hand = factor**2 * by_hand + drawn
    found = deviation(Ancestral(variance), scheduler, 0.5, list(range(999, -1, -1)))
    assert found == pytest.approx(math.sqrt(by_hand), rel=1e-9)
    assert found == pytest.approx(expected, abs=6e-5)


@pytest.mark.parametrize("steps", [20, 60])
@pytest.mark.parametrize("process", ["vp", "sub_vp", "ve"])
def test_both_variances_of_the_chain_bound_the_truth(process, steps):
    scheduler = linear(process=process)
    timesteps = np.linspace(999, 0, steps).round().astype(int).tolist()
    tilde, beta = (deviation(Ancestral(name), scheduler, 0.5, timesteps) for name in ("beta_tilde", "beta"))
    assert tilde < 0.5 < beta


def test_euler_maruyama_comes_to_the_data_as_steps_grow():
    scheduler = exploding(100_001)
    errors = []
    for steps in (100, 200, 400, 800):
        timesteps = np.linspace(100_000, 0, steps).round().astype(int).tolist()
        solver, variance = make_solver("euler_maruyama"), scheduler.sigmas[-1].item() ** 2
        for t, t_next in zip(timesteps, timesteps[1:], strict=False):
            factor, [noise] = parts_of(solver, scheduler, 0.5, t, t_next)
            variance = factor**2 * variance + noise**2
        errors.append(abs(math.sqrt(variance) - math.hypot(0.5, 0.02)))
    slopes = -np.diff(np.log(errors)) / math.log(2)
    assert (slopes > 0.9).all() and errors[-1] < 2e-5, (errors, slopes)


def test_langevin_dynamics_has_its_known_variance():
    """Of N(0, v) by steps of a: v / (1 - a / (2 v)); 1.408 for v = 1.3 and a = 0.2."""
    scheduler = exploding(1001)
    t = int((scheduler.sigmas - 1).abs().argmin())
    sigma = scheduler.sigmas[t].item()
    v, a = 1.3 * sigma**2, 0.2 * sigma**2
    s = math.sqrt(v - sigma**2)
    factor, [noise] = parts_of(Langevin(1, 0.2), scheduler, s, t, t - 1)
    stationary = noise**2 / (1 - factor**2)
    assert stationary == pytest.approx(v / (1 - a / (2 * v)), rel=1e-9)
    assert stationary / sigma**2 == pytest.approx(1.408, abs=5e-4)
    factor, noises = parts_of(Langevin(4, 0.2), scheduler, s, t, t - 1)
    assert factor**2 * stationary + sum(noise**2 for noise in noises) == pytest.approx(stationary, rel=1e-9)


def white(scheduler, s=0.5):
    """The exact denoiser of pixels N(0, s^2), one scale or two independent ones."""

    def denoise(xs, ts):
        found = []
        for x, t in zip(xs, ts, strict=True):
            alpha, sigma = scheduler.scales(t, x)
            found.append(x * alpha * s**2 / (alpha**2 * s**2 + sigma**2))
        return tuple(found)

    return denoise


@pytest.mark.parametrize("name", ["pc", "langevin", "euler_maruyama", "ancestral"])
@pytest.mark.parametrize("process", ["vp", "ve"])
def test_stochastic_solvers_sample_the_data(name, process):
    scheduler = linear(process=process)
    timesteps = np.linspace(999, 0, 120).round().astype(int)
    path = path_of(np.stack([timesteps, timesteps], 1))
    solver = make_solver(name, **({"rounds": 40} if name == "langevin" else {}))
    expected = deviation(solver, scheduler, 0.5, timesteps[:-1].tolist()) if name == "ancestral" else 0.5
    [(_, found)] = sample_seeds(
        white(scheduler), scheduler, path, range(40), [(3, 16, 16), (3, 8, 8)], 40, solver=solver
    )
    assert found.nfe == solver.calls(path.nfe)
    for image in found.images:
        # 7,680 values have it to 1 %; what is more is left to so few steps.
        assert image.std().item() == pytest.approx(expected, rel=0.03 if name == "ancestral" else 0.06)


@pytest.mark.parametrize("name", SOLVERS)
def test_an_image_depends_on_its_seed_alone(name):
    scheduler, path = linear(), path_of([(999, 999), (700, 600), (300, 250), (100, 20), (0, 0)])
    options = {"eta": 0.5} if name == "ddim" else {}
    shapes = [(3, 8, 8), (3, 4, 4)]

    def images(seeds, batch_size):
        solver = make_solver(name, **options)
        batches = sample_seeds(white(scheduler), scheduler, path, seeds, shapes, batch_size, solver=solver)
        return torch.cat([found.images[0] for _, found in batches])

    together = images([3, 4, 5], 3)
    torch.testing.assert_close(images([5, 4], 1), together[[2, 1]])


# Processes, clocks that rest, and what goes on in between


@pytest.mark.parametrize("name", DETERMINISTIC)
def test_the_process_makes_no_difference(name):
    """The same sigma / alpha, and images that are the same but for alpha."""
    plain = exploding(1001)
    other = copy.copy(plain)
    scale = 1 / (1 + plain.sigmas)
    other.process, other.alphas, other.sigmas = "flow", scale, plain.sigmas * scale
    path = path_of([(1000, 1000), (800, 760), (600, 500), (420, 380), (300, 200), (150, 90), (0, 0)])

    def denoiser(scheduler):
        def denoise(xs, ts):
            hats = [x / scheduler.scales(t, x)[0] for x, t in zip(xs, ts, strict=True)]
            mean = hats[0].mean((2, 3), keepdim=True)
            return torch.tanh(hats[0]) * 0.7, torch.tanh(hats[1] + 0.2 * mean)

        return denoise

    noise = [torch.randn(2, 3, side, side, generator=torch.Generator().manual_seed(side)).double() for side in (8, 4)]
    one = sample(denoiser(plain), plain, path, noise, solver=make_solver(name))
    # Its noise at the start is sigma z, as a process with sigma = 1 there has it.
    start = [x * other.sigmas[-1] / torch.hypot(other.alphas[-1], other.sigmas[-1]) for x in noise]
    two = sample(denoiser(other), other, path, start, solver=make_solver(name))
    for a, b in zip(one.images, two.images, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", SOLVERS)
def test_a_scale_that_rests_keeps_its_image(name):
    scheduler = linear()
    path = path_of([(999, 999), (700, 999), (400, 999), (400, 500), (400, 200), (100, 200), (0, 0)])
    seen = []

    def record(k, xs):
        seen.append(xs)

    noise = [torch.randn(2, 3, side, side, generator=torch.Generator().manual_seed(side)) for side in (8, 4)]
    draw = SeededNoise([1, 2]).draw
    sample(white(scheduler), scheduler, path, noise, callback=record, draw=draw, solver=make_solver(name))
    for k, (before, after) in enumerate(zip(path.points, path.points[1:], strict=False)):
        for scale in (0, 1):
            same = torch.equal(seen[k][scale], seen[k + 1][scale])
            assert same == (before[scale] == after[scale]), (k, scale)


@pytest.mark.parametrize("name", ["dpmpp_2m", "dpmpp_3m", "unipc"])
def test_of_second_order_also_where_one_clock_rests(name):
    """Down one axis, then down the other: independent scales end where each would alone."""
    scheduler = exploding()
    s, start = 0.5, 0.8

    def exact():
        low, high = scheduler.sigmas[0].item(), scheduler.sigmas[-1].item()
        return start * high * math.hypot(s, low) / math.hypot(s, high)

    errors = []
    for count in (64, 128, 256):
        falling = np.linspace(T - 1, 0, count + 1).round().astype(int)
        points = [(t, T - 1) for t in falling] + [(0, t) for t in falling[1:]]
        noise = [torch.full((1, 1, 1, 1), start, dtype=torch.float64) for _ in (0, 1)]
        found = sample(white(scheduler, s), scheduler, path_of(points), noise, end="t0", solver=make_solver(name))
        errors.append(max(abs(x.item() - exact()) for x in found.images))
    slopes = -np.diff(np.log(errors)) / math.log(2)
    assert slopes[-1] > 1.8, (errors, slopes)


@pytest.mark.parametrize("name", ["dpmpp_2m", "dpmpp_3m", "unipc"])
def test_a_jump_back_forgets_what_was_seen(name):
    """From the point that a callback goes back to, the walk is that of its images alone."""
    scheduler = linear()
    path = path_of([(t,) for t in (999, 700, 400, 200, 0)])
    noise = torch.randn(1, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    other = torch.randn(1, 3, 4, 4, generator=torch.Generator().manual_seed(1))
    jumped = []

    def jump(k, xs):
        if k == 3 and not jumped:
            jumped.append(k)
            return 0, (other,)

    back = sample(white(scheduler), scheduler, path, [noise], callback=jump, solver=make_solver(name))
    alone = sample(white(scheduler), scheduler, path, [other], solver=make_solver(name))
    assert back.nfe == 7 and torch.equal(back.images[0], alone.images[0])


ENDS = {  # Of the schedule: no noise at its first timestep, and nothing else, or next to nothing, at its last.
    "flow": {"process": "flow", "prediction_type": "velocity"},
    "sub_vp": {"process": "sub_vp", "prediction_type": "x0", "beta_schedule": "cosine"},
    "zero terminal": {"prediction_type": "v", "beta_schedule": "cosine_zero_terminal"},
}


@pytest.mark.parametrize("end", ["clean", "t0"])
@pytest.mark.parametrize("schedule", ENDS)
@pytest.mark.parametrize("name", [*SOLVERS, "ddim of eta 1"])
def test_all_that_is_sampled_is_finite_at_both_ends_of_a_process(name, schedule, end):
    """Also where one scale has arrived long before the other, and where the end is no noise at all."""
    scheduler = DDIMScheduler(clip_sample=False, **ENDS[schedule])

    def denoise(xs, ts):
        found = []
        for x, t in zip(xs, ts, strict=True):
            alpha, sigma = scheduler.scales(t, x)
            x0 = x * alpha * 0.25 / (alpha**2 * 0.25 + sigma**2)
            noise = (x - alpha * x0) / sigma.clamp(min=1e-6)
            found.append(scheduler.target(x0, noise, t))
        return tuple(found)

    path = path_of([(999, 999), (900, 700), (600, 200), (300, 0), (100, 0), (3, 0), (0, 0)])
    draw = SeededNoise([1, 2, 3]).draw
    noise = [draw((3, side, side)).double() for side in (16, 8)]
    solver = make_solver("ddim", eta=1.0) if name == "ddim of eta 1" else make_solver(name)
    wide = lambda shape: draw(shape).double()  # noqa: E731
    found = sample(denoise, scheduler, path, noise, draw=wide, end=end, solver=solver)
    for image in found.images:
        assert image.isfinite().all()
        # Of the others so few steps make nothing.
        assert name in ("euler_maruyama", "pc", "langevin") or image.std() < 1


@pytest.mark.parametrize("variance", ["beta", "beta_tilde"])
def test_the_chain_draws_no_noise_where_none_is_left(variance):
    """A scale of flow that arrives at timestep 0 is the clean image that was seen there."""
    scheduler = DDIMScheduler(prediction_type="velocity", process="flow")
    x, x0, noise = (torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(k)) for k in range(3))
    step = Step(scheduler, (300,), (0,), (x,), (x0,), None, lambda: (noise,))
    torch.testing.assert_close(Ancestral(variance).step(step)[0], x0)


@pytest.mark.parametrize("process", ["sub_vp", "ve"])
def test_the_chain_is_that_of_the_same_snr_however_little_noise_there_is(process):
    """In float32, which has no digits for 1 - abar there."""
    scheduler = DDIMScheduler(1000, "linear", "x0", clip_sample=False, process=process)
    x0, noise, fresh = (torch.randn(1, 3, 4, 4, generator=torch.Generator().manual_seed(k)) for k in range(3))
    for t, t_next in ((3, 1), (1, 0), (40, 3)):
        x = scheduler.add_noise(x0, noise, t)
        found = scheduler.step_from(x0, t, t_next, x, 1.0, fresh) - scheduler.scales(t_next, x)[0] * x0
        ratio = (level_of(scheduler, t_next).ratio / level_of(scheduler, t).ratio) ** 2
        sigma = scheduler.sigmas[t_next].item()
        expected = sigma * (math.sqrt(ratio) * noise + math.sqrt(1 - ratio) * fresh)
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-3 * sigma + 1e-6)


def test_what_does_not_go_together_is_named():
    with pytest.raises(ValueError, match="Unknown solver 'plms'; choose one of ddim, ancestral, heun,"):
        make_solver("plms")
    with pytest.raises(ValueError, match="Unknown variance 'gamma'; choose one of beta, beta_tilde."):
        make_solver("ancestral", variance="gamma")
    scheduler, path, noise = linear(), path_of([(999,), (500,), (0,)]), [torch.zeros(1, 3, 4, 4)]
    with pytest.raises(ValueError, match="euler_maruyama draws noise at every step; pass draw"):
        sample(white(scheduler), scheduler, path, noise, solver=make_solver("euler_maruyama"))
    for name in ("heun", "pc", "langevin"):
        with pytest.raises(ValueError, match=f"{name} calls the network between points, where it has no coarse image"):
            two = path_of([(999, 999), (0, 0)])
            noise = [torch.zeros(1, 3, side, side) for side in (8, 4)]
            draw = SeededNoise([0]).draw
            sample(white(scheduler), scheduler, two, noise, draw=draw, coarse_from="x0", solver=make_solver(name))


# Learned variances


def saying(predict, v):
    """A denoiser that says v(x, t) besides."""

    def denoise(xs, ts):
        return tuple(torch.cat([predict(x, t), 2 * v(x, t) - 1], 1) for x, t in zip(xs, ts, strict=True))

    return denoise


@pytest.mark.parametrize("representation", ["overcomplete", "residual"])
@pytest.mark.parametrize("v, variance", [(0.0, "beta_tilde"), (1.0, "beta")])
@pytest.mark.parametrize("name", ["linear", "cosine_zero_terminal", "ve"])
def test_a_learned_variance_at_its_ends_walks_as_that_of_the_ends(name, v, variance, representation):
    scheduler = DDIMScheduler(1000, name, "x0", representation=representation)
    path = path_of([(999, 999), (800, 700), (800, 400), (300, 100), (40, 0), (0, 0)])
    noise = [torch.randn(2, 2, side, side, generator=torch.Generator().manual_seed(side)).double() for side in (8, 4)]
    plain = [lambda x, t: torch.tanh(x), lambda x, t: torch.full_like(x, v)]
    found = []
    for how in ("learned", variance):
        draw = SeededNoise([5, 6]).draw
        walk = sample(
            saying(*plain), scheduler, path, noise, draw=lambda s, d=draw: d(s).double(), solver=Ancestral(how)
        )
        found.append(walk.images)
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("respaced", [1000, 10])
def test_a_step_of_learned_variance_equals_that_of_diffusers(respaced):
    scheduler = DDIMScheduler(beta_schedule="linear", clip_sample=False)
    theirs = DDPMScheduler(
        beta_schedule="linear", beta_start=1e-4, beta_end=0.02, variance_type="learned_range", clip_sample=False
    )
    theirs.set_timesteps(respaced)
    for t in (900, 300, 100):
        generator = torch.Generator().manual_seed(t)
        x, predicted, said = torch.randn(3, 2, 3, 4, 4, generator=generator)
        expected = theirs.step(torch.cat([predicted, said], 1), t, x, torch.Generator().manual_seed(1)).prev_sample
        noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(1))
        _, (v,) = scheduler.split_variance((torch.cat([predicted, said], 1),), (x,))
        next_point = (t - 1000 // respaced,)
        x0 = scheduler.predict_x0(predicted, t, x)
        step = Step(scheduler, (t,), next_point, (x,), (x0,), None, lambda noise=noise: (noise,), variances=(v,))
        [found] = Ancestral("learned").step(step)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=2e-5)


def test_noise_of_a_residual_stays_in_its_subspace():
    """With a v of every pixel, of which a block has the mean."""
    scheduler = DDIMScheduler(1000, "linear", "x0", False, "residual")
    xs = scheduler.representation.project((torch.randn(1, 2, 4, 4).double(), torch.randn(1, 2, 2, 2).double()))
    outputs = tuple(torch.cat([x, torch.randn(x.shape).double()], 1) for x in xs)
    _, shares = scheduler.split_variance(outputs, xs)
    raw = torch.nn.functional.avg_pool2d((outputs[0][:, 2:] + 1) / 2, 2)
    torch.testing.assert_close(shares[0][..., ::2, ::2], raw)
    torch.testing.assert_close(shares[1], (outputs[1][:, 2:] + 1) / 2)
    zero = tuple(torch.zeros_like(x) for x in xs)
    noise = scheduler.representation.project(tuple(torch.randn_like(x) for x in xs))
    fine, _ = Ancestral("learned").step(
        Step(scheduler, (700, 700), (500, 400), zero, zero, None, lambda: noise, variances=shares)
    )
    assert torch.nn.functional.avg_pool2d(fine, 2).abs().max() < 1e-12 < 1e-3 < fine.abs().max()


def test_samples_of_the_best_learned_variance_have_the_deviation_of_the_data():
    """Of N(0, 1/4) and the exact mean, 10^5 draws by the chain of 1000 steps; those of its bounds are off as known."""
    s, count, scheduler = 0.5, 100_000, DDIMScheduler(1000, "linear", "x0", False)
    betas = np.linspace(1e-4, 0.02, 1000)
    abar = np.cumprod(np.append(1, 1 - betas))
    law = abar * s**2 + 1 - abar
    tilde = betas * (1 - abar[:-1]) / (1 - abar[1:])
    tilde[0] = tilde[1]
    best = torch.from_numpy(np.log(law[:-1] * betas / law[1:] / tilde) / np.log(betas / tilde))

    def exact(x, t):
        alpha, sigma = scheduler.scales(t, x)
        return alpha * s**2 / (alpha**2 * s**2 + sigma**2) * x

    denoise = saying(exact, lambda x, t: best[t].to(x.dtype)[:, None, None, None].expand_as(x))
    path, found = path_of([(t,) for t in range(999, -1, -1)]), {}
    for variance in ("learned", "beta", "beta_tilde"):
        generator = torch.Generator().manual_seed(0)

        def draw(shape, generator=generator):
            return torch.randn(1, *shape, generator=generator)

        noise = [draw((1, 250, 400))]
        [image] = sample(denoise, scheduler, path, noise, draw=draw, solver=Ancestral(variance)).images
        found[variance] = image.std().item()
    assert abs(found["learned"] - s) < 4 * s / (2 * count) ** 0.5
    # The noise is the same, so that ratios have much less of it.
    recursion = {}
    for variance, drawn in (("beta", betas), ("beta_tilde", tilde)):
        spread = 1.0
        for t in range(999, -1, -1):
            a, b = abar[t + 1], abar[t]
            gain = b**0.5 * betas[t] * a**0.5 * s**2 / law[t + 1] + (1 - betas[t]) ** 0.5 * (1 - b)
            spread = (gain / (1 - a)) ** 2 * spread + (drawn[t] if t else 0)
        recursion[variance] = spread**0.5
        assert found[variance] / found["learned"] == pytest.approx(recursion[variance] / s, abs=5e-4)
    # With the noise of the last step, which the walk leaves out, these are the deviations that DDPM is known for.
    drawn = {"beta": betas[0], "beta_tilde": tilde[0]}
    recursion = {name: math.hypot(spread, drawn[name] ** 0.5) for name, spread in recursion.items()}
    assert recursion == pytest.approx({"beta": 0.5009, "beta_tilde": 0.4961}, abs=1e-4)


def test_a_walk_without_the_variance_that_it_wants_is_refused():
    scheduler = DDIMScheduler(prediction_type="x0")
    with pytest.raises(
        ValueError, match="has not learnt the variance of its steps; pass --variance beta or beta_tilde"
    ):
        sample(
            lambda xs, ts: xs, scheduler, path_of([(999,), (0,)]), [torch.zeros(1, 1, 2, 2)],
            draw=torch.zeros, solver=Ancestral("learned"),
        )  # fmt: skip


def test_guidance_keeps_what_is_said_of_variances():
    """Free of a classifier it acts on all channels; a classifier moves the mean alone."""
    scheduler = DDIMScheduler(beta_schedule="linear")
    x, t, labels = torch.randn(2, 1, 4, 4), torch.tensor([500, 20]), torch.tensor([0, 1])

    def denoise(xs, ts, labels=None):
        return (torch.cat([xs[0].tanh(), xs[0].cos()], 1) + labels[:, None, None, None],)

    [free] = ClassifierFree(denoise, 2, 3.0)((x,), (t,), labels)
    without, told = (denoise((x,), (t,), each)[0] for each in (torch.tensor([2, 2]), labels))
    torch.testing.assert_close(free, without + 3 * (told - without))
    score = torch.randn(2, 1, 4, 4)
    guided = ClassifierGuided(denoise, lambda xs, ts, _: (score * xs[0]).flatten(1).sum(1), scheduler, 2.0)
    [moved] = guided((x,), (t,), labels)
    torch.testing.assert_close(moved[:, :1], told[:, :1] + scheduler.shift(2 * score, t, x))
    torch.testing.assert_close(moved[:, 1:], told[:, 1:])
