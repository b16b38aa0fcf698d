"""The adaptive solver against closed forms, and what it does when the network fails or calls run out."""

import math
import threading
from unittest import mock

import pytest
import torch

from diffusion.adaptive import solve_each
from diffusion.sampler import SeededNoise, sample
from diffusion.solvers import make_solver
from paths.path import Path
from scheduler import DDIMScheduler

DEVIATION = 0.5
# Processes with what networks predict in them, from the first of so many timesteps.
PROCESSES = [("linear", "epsilon"), ("cosine", "v"), ("cosine_zero_terminal", "x0"), ("sub_vp_linear", "score")]
PROCESSES += [("ve", "epsilon"), ("flow", "velocity")]


def scheduler_of(schedule, prediction):
    return DDIMScheduler(beta_schedule=schedule, prediction_type=prediction, clip_sample=False)


def exact(scheduler, counts=None):
    """The denoiser of independent normal numbers, which writes down how many images it is shown."""

    def denoise(xs, ts):
        if counts is not None:
            counts.append(len(xs[0]))
        predictions = []
        for x, t in zip(xs, ts, strict=True):
            alpha, sigma = scheduler.scales(t, x)
            x0 = alpha * DEVIATION**2 / (alpha**2 * DEVIATION**2 + sigma**2) * x
            noise = torch.where(sigma > 0, (x - alpha * x0) / sigma, 0)
            predictions.append(scheduler.target(x0, noise, t))
        return tuple(predictions)

    return denoise


def landing(scheduler, x):
    """Where the equation takes x from the last timestep to the first, and the clean image seen there."""
    first = scheduler.inside(torch.tensor([0.0], dtype=torch.float64))
    ends = [scheduler.curves(t.double()) for t in (first, torch.tensor([999.0]))]
    sizes = [math.hypot(curves.alpha.item() * DEVIATION, curves.sigma.item()) for curves in ends]
    alpha = ends[0].alpha.item()
    return x * sizes[0] / sizes[1] * alpha * DEVIATION**2 / sizes[0] ** 2


@pytest.mark.parametrize("schedule, prediction", PROCESSES)
@pytest.mark.parametrize("points", [[(999,), (0,)], [(999, 999), (999, 600), (300, 0), (0, 0)]])
def test_gaussian_images_arrive_where_the_equation_takes_them(schedule, prediction, points):
    """Each number is stretched by the ratio of its deviations, whatever the path; errors fall with the tolerance."""
    scheduler, path, errors = scheduler_of(schedule, prediction), Path(points, "test", {}), []
    noise = [SeededNoise([1, 2, 3]).draw((1, 2 * side, 2 * side)).double() for side in (2, 1)][: path.num_scales]
    starts = [scheduler.prior(each, 999) for each in noise]
    for tolerance in (1e-3, 1e-5, 1e-7):
        found = sample(exact(scheduler), scheduler, path, noise, solver=make_solver("ode", tolerance=tolerance))
        errors.append(
            max((x - landing(scheduler, s)).abs().max().item() for x, s in zip(found.images, starts, strict=True))
        )
    assert errors[1] < 1e-3 and errors[2] < 1e-4
    assert errors[2] < errors[0] / 50


def test_the_walk_may_end_with_the_noise_of_the_first_timestep():
    scheduler = scheduler_of("linear", "epsilon")
    noise = [SeededNoise([1]).draw((1, 4, 4)).double()]
    solver = make_solver("ode", tolerance=1e-7)
    [x] = sample(exact(scheduler), scheduler, Path([(999,), (0,)], "test", {}), noise, end="t0", solver=solver).images
    sizes = [math.hypot(scheduler.alphas[t] * DEVIATION, scheduler.sigmas[t]) for t in (0, 999)]
    torch.testing.assert_close(x, noise[0] * sizes[0] / sizes[1], rtol=0, atol=1e-5)


def test_calls_are_the_mean_of_what_images_were_shown():
    scheduler, counts = scheduler_of("cosine", "v"), []
    # The larger an image, the more steps its tolerance asks for.
    noise = [torch.ones(3, 1, 2, 2, dtype=torch.float64) * torch.tensor([0.0, 1.0, 1000.0])[:, None, None, None]]
    solver = make_solver("ode", tolerance=1e-6)
    found = sample(exact(scheduler, counts), scheduler, Path([(999,), (0,)], "test", {}), noise, solver=solver)
    assert found.nfe == round(sum(counts) / 3) and set(counts) == {1, 2, 3}
    # In company or alone, an image takes the same calls to the same place.
    alone, single = [], make_solver("ode", tolerance=1e-6)
    last = sample(exact(scheduler, alone), scheduler, Path([(999,), (0,)], "test", {}), [noise[0][2:]], solver=single)
    assert torch.equal(last.images[0], found.images[0][2:]) and last.nfe == len(counts)
    assert last.nfe > solver.calls(1)


def test_more_calls_than_the_limit_are_refused():
    scheduler = scheduler_of("cosine", "v")
    noise = [SeededNoise([1, 2]).draw((1, 4, 4))]
    with pytest.raises(ValueError, match=r"more than 20 network calls .* --tolerance 1e-09; raise --tolerance"):
        solver = make_solver("ode", tolerance=1e-9, max_calls=20)
        sample(exact(scheduler), scheduler, Path([(999,), (0,)], "test", {}), noise, solver=solver)


@pytest.mark.parametrize("error", [ValueError("shapes"), KeyboardInterrupt()])
def test_a_network_that_fails_ends_every_image(error):
    def slopes(rows, s, states):
        if s.max() > 0:
            raise error
        return -states

    with pytest.raises(type(error)):
        solve_each(slopes, torch.ones(4, 2).numpy(), 1e-3)


@pytest.mark.parametrize("first", [0.0, 0.1])
def test_what_is_not_finite_is_no_endless_search(first):
    def slopes(rows, s, states):
        return states * (math.nan if s.max() >= first else 1.0)

    with pytest.raises(ValueError, match="makes an image NaN or infinite"):
        solve_each(slopes, torch.ones(4, 2).numpy(), 1e-3)


def test_threads_that_cannot_all_start_end():
    started = []

    def start(thread, begin=threading.Thread.start):
        if len(started) == 3:
            raise RuntimeError("can't start new thread")
        started.append(thread)
        begin(thread)

    with mock.patch("threading.Thread.start", start), pytest.raises(RuntimeError, match="start new thread"):
        solve_each(lambda rows, s, states: -states, torch.ones(8, 2).numpy(), 1e-3)
    for thread in started:
        thread.join(10)
        assert not thread.is_alive()


def test_more_rows_than_threads_are_solved_in_turn():
    states = torch.linspace(1, 2, 7)[:, None].double().numpy()
    with mock.patch("diffusion.adaptive.MOST_THREADS", 3):
        found = solve_each(lambda rows, s, states: states, states, 1e-9)
    torch.testing.assert_close(found, states * math.e, rtol=1e-7, atol=0)


def test_tolerances_below_rounding_are_refused():
    with pytest.raises(ValueError, match="--tolerance 1e-14 is too small; choose 1e-12 or more"):
        make_solver("ode", tolerance=1e-14)


def test_rows_are_solved_for_themselves():
    """dy/ds = k y for row k is e^k at the end, and stiff rows take more steps."""
    seen = torch.zeros(5)

    def slopes(rows, s, states):
        seen.index_add_(0, torch.from_numpy(rows), torch.ones(len(rows)))
        return rows[:, None] * states

    found = solve_each(slopes, torch.ones(5, 3).numpy(), 1e-8)
    torch.testing.assert_close(torch.from_numpy(found), torch.arange(5.0).exp().double()[:, None].expand(5, 3))
    assert (seen.diff() > 0).all()
