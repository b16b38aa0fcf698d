"""Single pixels of local score machines against whole images of them, and windows that calibration must find."""

import math

import pytest
import torch

from exact_models import rng
from scheduler import DDIMScheduler
from truth.local import LocalDenoiser
from truth.local_pair import LocalPairDenoiser
from truth.local_windows import Calibration, LocalPairPixels, LocalPixels, State, calibrate

MACHINES = [("ls", "zeros"), ("ls", "circular"), ("els", "zeros"), ("els", "circular"), ("bbels", "zeros")]
EVERY_NOISE = torch.tensor([999, 700, 300, 20])


def process(**settings):
    return DDIMScheduler(prediction_type="x0", clip_sample=False, **settings)


def images_of(count, *shape, dtype=torch.float64):
    return torch.rand(count, *shape, generator=rng(1), dtype=dtype) * 2 - 1


def noisy_of(scheduler, images, ts):
    noise = torch.randn(len(ts), *images.shape[1:], generator=rng(2), dtype=images.dtype)
    return scheduler.add_noise(images[: len(ts)], noise, ts)


def all_places(height, width):
    return torch.cartesian_prod(torch.arange(height), torch.arange(width))


@pytest.mark.parametrize("side", [1, 3, 5, 7, 11])
@pytest.mark.parametrize(("machine", "borders"), MACHINES)
def test_pixels_are_those_of_the_whole_image(machine, borders, side):
    """5 x 6: windows that fit, that both borders cut, and that are all of the torus; at all noise levels."""
    scheduler, images = process(), images_of(5, 2, 5, 6)
    xs = noisy_of(scheduler, images, EVERY_NOISE)
    whole = LocalDenoiser(scheduler, images, machine, side, borders)(xs, EVERY_NOISE)  # [4, 2, 5, 6]
    pixels = LocalPixels(scheduler, images, machine, side, borders).pixels_at((xs,), (EVERY_NOISE,), all_places(5, 6))
    assert pixels.shape == (4, 30, 2)
    torch.testing.assert_close(pixels.transpose(1, 2).reshape(whole.shape), whole, rtol=0, atol=1e-10)


def test_pixels_of_other_processes_and_of_chunks_are_the_same(monkeypatch):
    """The flow, whose first timestep has no signal at all; and one training image at a time."""
    scheduler = DDIMScheduler(process="flow", prediction_type="x0", clip_sample=False)
    images = images_of(6, 1, 4, 4)
    xs = noisy_of(scheduler, images, EVERY_NOISE)
    machine = LocalPixels(scheduler, images, "els", 3, "circular")
    pixels = machine.pixels_at((xs,), (EVERY_NOISE,), all_places(4, 4))
    torch.testing.assert_close(pixels[:, :, 0].view(4, 4, 4), machine(xs, EVERY_NOISE)[:, 0], rtol=0, atol=1e-10)
    monkeypatch.setattr("truth.local_windows.MEMORY_MIB", 1e-6)
    torch.testing.assert_close(machine.pixels_at((xs,), (EVERY_NOISE,), all_places(4, 4)), pixels, rtol=0, atol=1e-12)


def test_single_precision_is_near_double_with_hardly_any_noise():
    scheduler, images = process(), images_of(8, 1, 12, 12)
    ts, places = torch.tensor([2, 10]), all_places(12, 12)[::7]
    xs = noisy_of(scheduler, images, ts)
    found = [
        LocalPixels(scheduler, images.to(dtype), "els", 5, "circular").pixels_at((xs.to(dtype),), (ts,), places)
        for dtype in (torch.float32, torch.float64)
    ]
    torch.testing.assert_close(*found, rtol=0, atol=2e-4)


@pytest.mark.parametrize(("machine", "borders"), MACHINES)
def test_calibration_finds_the_window_of_a_machine_in_place_of_a_network(machine, borders):
    """A network that is such a machine, with other windows at other noise levels, is met exactly, and nowhere else."""
    scheduler, images = process(), images_of(6, 1, 8, 8) * 0.3
    truth = {800: 7, 600: 5, 400: 3}
    states = []
    for t, side in truth.items():
        ts = torch.full((2,), t)
        xs = noisy_of(scheduler, images, ts)
        clean = LocalDenoiser(scheduler, images, machine, side, borders)(xs, ts)
        states.append(State((xs,), (ts,), clean, (scheduler.log_snr[t].item(),)))
    machines = [LocalPixels(scheduler, images, machine, side, borders) for side in (1, 3, 5, 7, 9)]
    found = calibrate(machines, states, all_places(8, 8)[::3])
    assert found.sides == tuple(truth.values())
    for row, side in zip(found.errors, truth.values(), strict=True):
        assert row[found.windows.index(side)] < 1e-20
        assert min(error for error, window in zip(row, found.windows, strict=True) if window != side) > 1e-8
    table = found.table()
    assert [table(scheduler.log_snr[t].item()) for t in truth] == list(truth.values())


def test_table_of_a_calibration_that_begins_with_pure_noise():
    scheduler = DDIMScheduler(process="flow", prediction_type="x0", clip_sample=False)
    images = images_of(4, 1, 4, 4)
    states = [
        State((torch.zeros(1, 1, 4, 4).double(),), (torch.tensor([t]),), images.mean(0)[None], (level,))
        for t, level in ((999, -math.inf), (500, 0.0))
    ]
    found = calibrate(
        [LocalPixels(scheduler, images, "els", side, "circular") for side in (1, 3)], states, all_places(4, 4)
    )
    assert math.isfinite(found.levels[0][0])
    assert found.table()(-math.inf) == found.sides[0]


def test_the_smallest_of_equal_windows_is_taken():
    assert Calibration(((0.0,),), (3, 5, 7), ((2.0, 1.0, 1.0),)).sides == (5,)


@pytest.mark.parametrize("representation", ["overcomplete", "residual"])
def test_windows_of_pairs_are_found_in_blocks(representation):
    """A machine of both scales in place of a network, with a window for each pair of timesteps."""
    scheduler = process(representation=representation)
    images = images_of(6, 1, 8, 8) * 0.3
    states, sides = [], {(800, 700): 5, (600, 200): 3}
    for ts, side in sides.items():
        times = tuple(torch.full((2,), t) for t in ts)
        scales = scheduler.representation.split(images[:2])
        noise = scheduler.representation.project(tuple(torch.randn(x.shape, generator=rng(3)).double() for x in scales))
        xs = tuple(scheduler.add_noise(x, n, t) for x, n, t in zip(scales, noise, times, strict=True))
        clean = LocalPairDenoiser(scheduler, images, "els", side, "circular")(*xs, *times)
        level = tuple(scheduler.log_snr[t].item() for t in ts)
        states.append(State(xs, times, scheduler.representation.compose(clean), level))
    machines = [LocalPairPixels(scheduler, images, "els", side, "circular") for side in (1, 3, 5)]
    found = calibrate(machines, states, all_places(8, 8))
    assert found.sides == (5, 3) and max(map(min, found.errors)) < 1e-20
    assert [found.table()(*state.level) for state in states] == [5, 3]
