"""Consistency functions: their boundary, their ends, and multistep sampling of those that are known exactly."""

import math

import numpy as np
import pytest
import torch
from diffusers import CMStochasticIterativeScheduler

from diffusion.consistency import consistency_function
from diffusion.sampler import SeededNoise, sample
from diffusion.solvers import make_solver
from diffusion.step import level_of
from images.representation import REPRESENTATIONS
from paths.path import Path
from scheduler import PREDICTION_TYPES, DDIMScheduler

NAMES = ("cosine", "linear", "cosine_zero_terminal", "sub_vp_linear", "ve", "flow")
KINDS = [
    (name, prediction)
    for name in NAMES
    for prediction in PREDICTION_TYPES
    if prediction not in ("epsilon", "score") or name not in ("flow", "cosine_zero_terminal")
]
S, MEAN = 0.5, 0.3


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=rng(seed), dtype=torch.float64)


def path_of(*points):
    return Path([tuple(point) for point in points], "test", {})


def ratio(scheduler, t):
    return level_of(scheduler, t).ratio


@pytest.mark.parametrize("name, prediction", KINDS)
def test_at_timestep_0_it_is_the_image_whatever_the_network_says(name, prediction):
    scheduler = DDIMScheduler(beta_schedule=name, prediction_type=prediction, clip_sample=False)
    x, said = normal(3, 2, 4, 4), normal(3, 2, 4, 4, seed=1)
    for t in (0, torch.tensor([0, 0, 0]), torch.zeros(3, dtype=torch.float64)):
        x0 = scheduler.predict_x0(said, t, x)
        expected = x / scheduler.scales(t, x)[0]
        assert torch.equal(consistency_function(scheduler, x0, t, x), expected)
        single = consistency_function(scheduler, x0.float(), t, x.float())
        assert single.dtype == torch.float32
        torch.testing.assert_close(single, expected.float())
    # And at no other.
    t = torch.tensor([100] * 3)
    x0 = scheduler.predict_x0(said, t, x)
    assert not torch.allclose(consistency_function(scheduler, x0, t, x), x / scheduler.scales(t, x)[0])


@pytest.mark.parametrize("name, prediction", KINDS)
def test_it_is_euler_step_in_the_ratio_and_finite_at_the_noisiest_time(name, prediction):
    scheduler = DDIMScheduler(beta_schedule=name, prediction_type=prediction, clip_sample=False)
    x, said = normal(3, 2, 4, 4), normal(3, 2, 4, 4, seed=1)
    for t in (999, torch.tensor([999] * 3), torch.tensor([999.0] * 3, dtype=torch.float64)):
        assert consistency_function(scheduler, scheduler.predict_x0(said, t, x), t, x).isfinite().all()
    for t in (1, 300, 900):
        x0 = scheduler.predict_x0(said, t, x)
        found = consistency_function(scheduler, x0, t, x)
        hat, least, now = x / scheduler.alphas[t], ratio(scheduler, 0), ratio(scheduler, t)
        torch.testing.assert_close(found, hat + (least - now) * (hat - x0) / now, rtol=1e-9, atol=1e-9)
        # DDIM's step to timestep 0, which is alpha f.
        there = scheduler.step_from(x0, t, 0, x)
        torch.testing.assert_close(there, found * scheduler.alphas[0], rtol=1e-9, atol=1e-9)
        times = torch.tensor([t] * 3)
        torch.testing.assert_close(consistency_function(scheduler, x0, times, x), found)
        torch.testing.assert_close(consistency_function(scheduler, x0, times.double(), x), found, rtol=1e-6, atol=1e-6)


def test_of_v_it_is_nearly_that_of_the_paper():
    """Its c_out with images of deviation 1, and c_skip but for the noise of timestep 0."""
    scheduler = DDIMScheduler(beta_schedule="cosine", prediction_type="v", clip_sample=False)
    least = ratio(scheduler, 0)
    for t in (0, 5, 300, 900):
        now = ratio(scheduler, t)
        shape = torch.ones(1, 1, 1, 1, dtype=torch.float64)

        def at(x, v, t=t, shape=shape):
            x, v = shape * x, shape * v
            return consistency_function(scheduler, scheduler.predict_x0(v, t, x), t, x).item()

        skip, out = at(scheduler.alphas[t].item(), 0), at(0, 1)
        assert skip == pytest.approx(1 - now * (now - least) / (1 + now**2), rel=1e-9)
        assert out == pytest.approx(-(now - least) / math.hypot(1, now), rel=1e-9, abs=1e-15)
        assert skip == pytest.approx(1 / (1 + (now - least) ** 2), abs=least)


# Multistep sampling


def gaussian(scheduler):
    """A network whose consistency function is that of numbers N(MEAN, S^2), for each scale by itself."""
    least = ratio(scheduler, 0)

    def denoise(xs, ts):
        found = []
        for x, times in zip(xs, ts, strict=True):
            t = times[0].item()
            level = level_of(scheduler, t)
            # f = c x + d in x, of which the image that f is made of follows; where alpha is 0 x is the noise alone.
            shrink = math.sqrt((S**2 + least**2) / (level.alpha**2 * S**2 + level.sigma**2))
            f = MEAN + shrink * (x - level.alpha * MEAN)
            x0 = f if t == 0 else (f - least / level.sigma * x) / (1 - least * level.alpha / level.sigma)
            noise = (x - level.alpha * x0) / level.sigma if level.sigma else torch.zeros_like(x)
            found.append(scheduler.target(x0, noise, times))
        return tuple(found)

    return denoise


def start(scheduler, shapes, t=999):
    """What walks start from for images N(MEAN, S^2) that are noisy at t, and which `prior` makes of it."""
    alpha, sigma = scheduler.alphas[t].item(), scheduler.sigmas[t].item()
    size = scheduler.prior(torch.ones(1, dtype=torch.float64), t).item()
    noisy = [alpha * MEAN + math.hypot(alpha * S, sigma) * normal(*shape, seed=k) for k, shape in enumerate(shapes)]
    return [x / size for x in noisy]


@pytest.mark.parametrize("end", ["clean", "t0"])
@pytest.mark.parametrize("points", [[999, 0], [999, 500, 0], [999, 700, 400, 0]])
@pytest.mark.parametrize(
    "name, prediction", [("cosine", "v"), ("ve", "x0"), ("flow", "velocity"), ("linear", "epsilon")]
)
def test_every_step_lands_on_the_law_of_the_images_at_timestep_0(name, prediction, points, end):
    scheduler = DDIMScheduler(beta_schedule=name, prediction_type=prediction, clip_sample=False)
    noise = start(scheduler, [(4, 3, 64, 64), (4, 3, 32, 32)])
    draws = iter(range(10, 99))
    found = sample(
        gaussian(scheduler), scheduler, path_of(*((t, t) for t in points)), noise, end=end,
        draw=lambda shape: normal(4, *shape, seed=next(draws)), solver=make_solver("consistency"),
    )  # fmt: skip
    assert found.nfe == len(points) - 1
    scale = 1 if end == "clean" else scheduler.alphas[0].item()
    for image in found.images:
        hat = image / scale
        assert hat.mean().item() == pytest.approx(MEAN, abs=4.5 * S / math.sqrt(hat.numel()))
        expected = math.hypot(S, ratio(scheduler, 0))
        assert hat.std().item() == pytest.approx(expected, rel=4.5 / math.sqrt(2 * hat.numel()))


def test_one_step_is_exact():
    scheduler = DDIMScheduler(beta_schedule="cosine", prediction_type="v", clip_sample=False)
    [noise] = start(scheduler, [(2, 3, 8, 8)])
    path = path_of((999,), (0,))
    found = sample(gaussian(scheduler), scheduler, path, [noise], draw=SeededNoise([1, 2]).draw,
                   solver=make_solver("consistency"))  # fmt: skip
    spread = math.hypot(scheduler.alphas[-1].item() * S, scheduler.sigmas[-1].item())
    z = (noise - scheduler.alphas[-1] * MEAN) / spread
    torch.testing.assert_close(found.images[0], MEAN + math.hypot(S, ratio(scheduler, 0)) * z, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("representation", REPRESENTATIONS)
def test_each_scale_moves_by_its_own_clock_and_noise_stays_in_its_subspace(representation):
    scheduler = DDIMScheduler(
        beta_schedule="cosine", prediction_type="v", clip_sample=False, representation=representation
    )
    path = path_of((999, 999), (999, 400), (600, 400), (200, 0), (0, 0))
    noise = [normal(2, 3, 8, 8), normal(2, 3, 4, 4, seed=1)]
    states = []
    draw = SeededNoise([1, 2]).draw
    noises = []

    def watched(shape):
        noises.append(draw(shape).double())
        return noises[-1]

    def zeros(xs, ts):
        return tuple(torch.zeros_like(x) for x in xs)

    sample(zeros, scheduler, path, noise, draw=watched, callback=lambda k, xs: states.append(xs),
           solver=make_solver("consistency"))  # fmt: skip
    least, count = ratio(scheduler, 0), iter(noises)
    for k, (point, after) in enumerate(zip(path.points[:-1], path.points[1:], strict=True)):
        if k == 3:
            break  # The last step is to clean.
        fresh = [
            next(count) if t != t_next else states[k][s] for s, (t, t_next) in enumerate(zip(point, after, strict=True))
        ]
        fresh = scheduler.representation.project(tuple(fresh))
        for scale, (t, t_next) in enumerate(zip(point, after, strict=True)):
            x, there = states[k][scale], states[k + 1][scale]
            if t == t_next:
                assert torch.equal(x, there)
                continue
            now, later = level_of(scheduler, t), level_of(scheduler, t_next)
            f = least / now.sigma * x + (1 - least * now.alpha / now.sigma) * now.alpha * x
            expected = later.alpha * (f + math.sqrt(max(0, later.ratio**2 - least**2)) * fresh[scale])
            torch.testing.assert_close(there, expected, rtol=1e-7, atol=1e-9)
    for state in states:
        torch.testing.assert_close(scheduler.representation.project(state), state)


def test_steps_are_those_of_diffusers():
    """Of its images and its noise: next = f + sqrt(sigma'^2 - sigma_min^2) z."""
    theirs = CMStochasticIterativeScheduler(
        num_train_timesteps=40, sigma_min=0.02, sigma_max=100.0, clip_denoised=False
    )
    theirs.set_timesteps(timesteps=[39, 30, 20, 5])
    sigmas = theirs.sigmas.double()
    scheduler = DDIMScheduler(100_001, process="ve", prediction_type="x0", clip_sample=False)
    points = [int(np.abs(scheduler.sigmas.numpy() - sigma.item()).argmin()) for sigma in sigmas[:-1]]
    x, z = normal(1, 2, 4, 4) * 100, normal(1, 2, 4, 4, seed=1)
    f = normal(1, 2, 4, 4, seed=2)
    for k in range(2):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("diffusers.schedulers.scheduling_consistency_models.randn_tensor", lambda *a, **b: z)
            # What it is given is F; f = c_out F + c_skip x.
            skip, out = theirs.get_scalings_for_boundary_condition(sigmas[k])
            expected = theirs.step((f - skip * x) / out, theirs.timesteps[k], x).prev_sample
        least = ratio(scheduler, 0)
        now = scheduler.sigmas[points[k]].item()
        x0 = (f - least / now * x) / (1 - least / now)
        states = []
        path = path_of((points[k],), (points[k + 1],), (0,))
        record = lambda k, xs, states=states: states.append(xs[0])  # noqa: E731
        sample(lambda xs, ts, x0=x0: (x0,), scheduler, path, [x / now], draw=lambda shape: z, callback=record,
               solver=make_solver("consistency"))  # fmt: skip
        torch.testing.assert_close(states[1], expected.double(), rtol=1e-3, atol=1e-3)
