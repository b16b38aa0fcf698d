"""Local score machines of pairs against loops over blocks, ideal denoisers, and the machines of either scale alone."""

import itertools
import math

import pytest
import torch
import torch.nn.functional as F

import truth.local
from diffusion.sampler import sample
from exact_models import REPRESENTATIONS, rng
from images.representation import REPRESENTATIONS as KINDS
from paths.path import Path
from planning.error_map import error_map
from scheduler import DDIMScheduler
from truth.ideal import EmpiricalDenoiser
from truth.local import LocalDenoiser
from truth.local_pair import LocalPairDenoiser

MACHINES = [("ls", "zeros"), ("ls", "circular"), ("els", "zeros"), ("els", "circular"), ("bbels", "zeros")]
LEVELS = [(700, 300), (300, 700), (999, 500), (500, 20)]
NO_SIGNAL = 999  # Of a schedule that ends without any.
WAYS = {"shifts": 0, "products": 10**9}


@pytest.fixture(params=WAYS)
def way(request, monkeypatch):
    monkeypatch.setattr(truth.local, "PRODUCTS_UP_TO", WAYS[request.param])
    return request.param


def process(representation="overcomplete", prediction_type="x0", **settings):
    settings = {"beta_schedule": "cosine_zero_terminal", "clip_sample": False} | settings
    return DDIMScheduler(prediction_type=prediction_type, representation=representation, **settings)


def images_of(count, *shape, seed=1):
    return torch.rand(count, *shape, generator=rng(seed), dtype=torch.float64) * 2 - 1


def noisy_of(scheduler, images, levels=LEVELS, seed=2):
    """Noisy pairs of the first images, one for each pair of timesteps, and these."""
    generator, kind = rng(seed), scheduler.representation
    ts = tuple(torch.tensor(levels).T)
    xs = kind.split(images[torch.arange(len(levels)) % len(images)])
    noise = kind.project(tuple(torch.randn(x.shape, generator=generator, dtype=torch.float64) for x in xs))
    return tuple(scheduler.add_noise(x, e, t) for x, e, t in zip(xs, noise, ts, strict=True)), ts


def split(image, representation):
    """The scales of an image `[C, H, W]`, in fine pixels and means of blocks."""
    coarse = sum(image[:, i::2, j::2] for i, j in itertools.product(range(2), repeat=2)) / 4
    return (
        image if representation == "overcomplete" else image - coarse.repeat_interleave(2, 1).repeat_interleave(2, 2)
    ), coarse


def by_loops(us, precisions, images, machine, borders, side, representation):
    """The mean over candidates of one pair, block by block, from the definition in pixels of both scales."""
    channels, height, width = us[1].shape
    reach = side // 2
    scales = [split(image, representation) for image in images]

    def offsets(size):
        return range(size) if borders == "circular" and side >= size else range(-reach, reach + 1)

    def cut(place, size):
        return max(0, reach - place), max(0, place + reach - (size - 1))

    def block(x, factor, a, b):
        # Zeros outside.
        if borders == "circular":
            a, b = a % height, b % width
        elif not (0 <= a < height and 0 <= b < width):
            return torch.zeros(channels, factor, factor, dtype=torch.float64)
        return x[:, factor * a : factor * (a + 1), factor * b : factor * (b + 1)]

    result = torch.empty_like(us[0])
    places = list(itertools.product(range(height), range(width)))
    for a, b in places:
        logits, values = [], []
        for (image, pair), (p, q) in itertools.product(zip(images, scales, strict=True), places):
            if machine == "ls" and (p, q) != (a, b):
                continue
            if machine == "bbels" and (cut(p, height), cut(q, width)) != (cut(a, height), cut(b, width)):
                continue
            logit = 0.0
            for i, j in itertools.product(offsets(height), offsets(width)):
                if borders == "circular" or (0 <= a + i < height and 0 <= b + j < width):
                    for u, other, factor, precision in zip(us, pair, (2, 1), precisions, strict=True):
                        away = block(u, factor, a + i, b + j) - block(other, factor, p + i, q + j)
                        logit -= precision / 2 * away.square().sum().item()
            logits.append(logit)
            values.append(block(image, 2, p, q))
        weights = torch.tensor(logits, dtype=torch.float64).softmax(0)
        block(result, 2, a, b).copy_(torch.einsum("n,ncij->cij", weights, torch.stack(values)))
    return result


@pytest.mark.parametrize("representation", REPRESENTATIONS)
@pytest.mark.parametrize(("side", "channels"), [(1, 1), (3, 2), (5, 1)])
@pytest.mark.parametrize(("machine", "borders"), MACHINES)
def test_every_block_is_the_mean_over_its_candidates(machine, borders, side, channels, representation, way):
    scheduler, images = process(representation), images_of(2, channels, 4, 6)
    xs, ts = noisy_of(scheduler, images, [(700, 300), (300, 700)])
    found = LocalPairDenoiser(scheduler, images, machine, side, borders).denoise(xs, ts)
    for k in range(2):
        us = [x[k] / scheduler.alphas[t[k]] for x, t in zip(xs, ts, strict=True)]
        precisions = [scheduler.snr[t[k]].item() for t in ts]
        expected = by_loops(us, precisions, images, machine, borders, side, representation)
        for scale, part in zip(found, split(expected, representation), strict=True):
            torch.testing.assert_close(scale[k], part, rtol=1e-10, atol=1e-10)


def ideal(scheduler, images, xs, ts):
    return EmpiricalDenoiser(scheduler, images).denoise(xs, ts)


@pytest.mark.parametrize("representation", REPRESENTATIONS)
@pytest.mark.parametrize(
    ("machine", "borders", "side"), [("ls", "zeros", 5), ("ls", "circular", 3), ("bbels", "zeros", 7)]
)
def test_a_window_of_all_blocks_makes_the_ideal_denoiser_of_pairs(machine, borders, side, representation):
    scheduler, images = process(representation), images_of(5, 2, 4, 6)
    xs, ts = noisy_of(scheduler, images)
    found = LocalPairDenoiser(scheduler, images, machine, side, borders).denoise(xs, ts)
    for one, other in zip(found, ideal(scheduler, images, xs, ts), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("representation", REPRESENTATIONS)
@pytest.mark.parametrize("side", [3, 5])
def test_a_window_of_the_whole_torus_makes_the_ideal_denoiser_of_all_shifts_by_blocks(side, representation):
    scheduler, images = process(representation), images_of(3, 2, 4, 6)
    orbit = torch.cat([images.roll(shift, (2, 3)) for shift in itertools.product(range(0, 4, 2), range(0, 6, 2))])
    xs, ts = noisy_of(scheduler, images)
    found = LocalPairDenoiser(scheduler, images, "els", side, "circular").denoise(xs, ts)
    for one, other in zip(found, ideal(scheduler, orbit, xs, ts), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-10)
    # Shifts by one pixel belong to no pair of the orbit.
    more = torch.cat([orbit, orbit.roll(1, 3)])
    assert (found[0] - ideal(scheduler, more, xs, ts)[0]).abs().max() > 0.01


@pytest.mark.parametrize("representation", REPRESENTATIONS)
@pytest.mark.parametrize(("machine", "borders"), MACHINES)
def test_a_scale_without_signal_leaves_the_machine_of_the_other(machine, borders, representation, way):
    scheduler, images = process(representation), images_of(4, 2, 8, 6)
    plain = process()
    coarse_images = F.avg_pool2d(images, 2)
    denoiser = LocalPairDenoiser(scheduler, images, machine, 3, borders)
    xs, ts = noisy_of(scheduler, images, [(NO_SIGNAL, 300), (NO_SIGNAL, 20)])
    alone = LocalDenoiser(plain, coarse_images, machine, 3, borders)(xs[1], ts[1])
    torch.testing.assert_close(denoiser.denoise(xs, ts)[1], alone, rtol=1e-10, atol=1e-10)
    if representation == "overcomplete":
        xs, ts = noisy_of(scheduler, images, [(300, NO_SIGNAL), (20, NO_SIGNAL)])
        blocks = LocalDenoiser(plain, F.pixel_unshuffle(images, 2), machine, 3, borders)
        alone = F.pixel_shuffle(blocks(F.pixel_unshuffle(xs[0], 2), ts[0]), 2)
        torch.testing.assert_close(denoiser.denoise(xs, ts)[0], alone, rtol=1e-10, atol=1e-10)
    xs, ts = noisy_of(scheduler, images, [(NO_SIGNAL, NO_SIGNAL)])
    if machine == "ls":
        expected = scheduler.representation.split(images.mean(0, keepdim=True))
        for one, other in zip(denoiser.denoise(xs, ts), expected, strict=True):
            torch.testing.assert_close(one, other)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("representation", REPRESENTATIONS)
@pytest.mark.parametrize(("machine", "borders"), MACHINES)
def test_infinite_log_snrs_are_clean_and_pure_noise(machine, borders, representation, dtype):
    images = images_of(4, 1, 6, 6).to(dtype)
    denoiser = LocalPairDenoiser(process(representation), images, machine, 3, borders)
    xs = KINDS[representation].split(images.double())
    noise = tuple(torch.randn(x.shape, generator=rng(5), dtype=torch.float64) for x in xs)
    noise = KINDS[representation].project(noise)

    def mean(pair, *log_snrs):
        return denoiser.posterior_mean(pair, tuple(torch.full((4, 1, 1, 1), value).double() for value in log_snrs))

    # Of coarse images of their own, which no other has, clean ones say which blocks they are.
    for log_snr in (math.inf, 1e3, 60.0):
        torch.testing.assert_close(mean((noise[0], xs[1]), -math.inf, log_snr), images.double(), rtol=0, atol=1e-6)
        torch.testing.assert_close(mean((xs[0], noise[1]), log_snr, -math.inf), images.double(), rtol=0, atol=1e-6)
    for log_snr in (-math.inf, -1e3, -61.0):
        found = mean(noise, log_snr, log_snr)
        assert (found - found[0]).abs().max() < 1e-6
    assert mean(noise, math.inf, -math.inf).isfinite().all() and mean(noise, -60.0, 45.0).isfinite().all()


@pytest.mark.parametrize("representation", REPRESENTATIONS)
def test_els_on_the_torus_is_shifted_by_blocks_and_not_by_pixels(representation, way):
    scheduler, images = process(representation), images_of(4, 1, 8, 6)
    xs, ts = noisy_of(scheduler, images)

    def shifted(pair, rows, columns):
        return pair[0].roll((2 * rows, 2 * columns), (2, 3)), pair[1].roll((rows, columns), (2, 3))

    for machine, is_equivariant in (("els", True), ("ls", False)):
        denoiser = LocalPairDenoiser(scheduler, images, machine, 3, "circular")
        one = denoiser.denoise(shifted(xs, 1, 2), ts)
        other = shifted(denoiser.denoise(xs, ts), 1, 2)
        error = max((a - b).abs().max() for a, b in zip(one, other, strict=True))
        assert error < 1e-12 if is_equivariant else error > 0.1


@pytest.mark.parametrize(("machine", "borders"), MACHINES)
def test_a_row_of_pairs_does_not_depend_on_its_batch_to_the_bit(machine, borders, way):
    scheduler, images = process(), images_of(5, 2, 8, 8).float()
    # Two rows have the same noise levels.
    xs, ts = noisy_of(scheduler, images.double(), [(700, 300), (300, 700), (700, 300), (500, 20)])
    xs = tuple(x.float() for x in xs)

    def window(log_snr_64, log_snr_32):
        return 3 if log_snr_64 < log_snr_32 else 1

    denoiser = LocalPairDenoiser(scheduler, images, machine, window, borders)
    together = denoiser.denoise(xs, ts)
    for k in range(len(ts[0])):
        alone = denoiser.denoise(tuple(x[k : k + 1] for x in xs), tuple(t[k : k + 1] for t in ts))
        side = LocalPairDenoiser(scheduler, images, machine, 1 if k == 1 else 3, borders)
        same = side.denoise(tuple(x[k : k + 1] for x in xs), tuple(t[k : k + 1] for t in ts))
        for scale in range(2):
            assert torch.equal(together[scale][k], alone[scale][0])
            assert torch.equal(together[scale][k], same[scale][0])


@pytest.mark.parametrize("representation", REPRESENTATIONS)
@pytest.mark.parametrize(("machine", "borders"), MACHINES)
def test_fp32_of_pairs_is_as_good_as_float64_at_every_pair_of_levels(machine, borders, representation):
    scheduler, images = process(representation), images_of(16, 1, 12, 12)
    xs, ts = noisy_of(scheduler, images, list(itertools.product((999, 700, 300, 0), repeat=2)))
    exact = LocalPairDenoiser(scheduler, images.float().double(), machine, 3, borders).denoise(xs, ts)
    single = LocalPairDenoiser(scheduler, images.float(), machine, 3, borders)
    found = single.denoise(tuple(x.float() for x in xs), ts)
    for one, other in zip(found, exact, strict=True):
        assert (one - other).abs().max() < 2e-4


def test_memory_changes_nothing_of_pairs(way):
    scheduler, images = process(), images_of(9, 1, 6, 6)
    xs, ts = noisy_of(scheduler, images)
    for machine, borders in MACHINES:
        found = [
            LocalPairDenoiser(scheduler, images, machine, 3, borders, memory_mib=mib).denoise(xs, ts)[0]
            for mib in (0.01, 64)
        ]
        torch.testing.assert_close(*found, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("representation", REPRESENTATIONS)
def test_what_is_outside_the_space_of_residuals_is_not_seen(representation):
    scheduler, images = process(representation), images_of(4, 1, 6, 6)
    xs, ts = noisy_of(scheduler, images)
    other = xs[0] + torch.randn(xs[1].shape, generator=rng(6), dtype=torch.float64).repeat_interleave(
        2, 2
    ).repeat_interleave(2, 3)
    denoiser = LocalPairDenoiser(scheduler, images, "els", 3)
    same = (denoiser.denoise(xs, ts)[0] - denoiser.denoise((other, xs[1]), ts)[0]).abs().max() < 1e-10
    assert same == (representation == "residual")


@pytest.mark.parametrize("name", ["vp", "sub_vp", "ve", "flow"])
def test_every_process_shows_the_same_pair(name):
    scheduler, images = process(process=name, beta_schedule="cosine", prediction_type="v"), images_of(4, 1, 6, 6)
    xs, ts = noisy_of(scheduler, images, [(700, 300), (300, 700), (980, 500)])
    predictions = LocalPairDenoiser(scheduler, images, "els", 3).denoise(xs, ts)
    curves = [scheduler.curves(t.double()) for t in ts]
    preserving = [x / torch.hypot(c.alpha, c.sigma)[:, None, None, None] for x, c in zip(xs, curves, strict=True)]
    log_snrs = [2 * (c.alpha / c.sigma).log()[:, None, None, None] for c in curves]
    expected = LocalPairDenoiser(process(), images, "els", 3).posterior_mean(preserving, log_snrs)
    for prediction, x, t, clean in zip(predictions, xs, ts, (expected, F.avg_pool2d(expected, 2)), strict=True):
        torch.testing.assert_close(scheduler.predict_x0(prediction, t, x), clean, rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("representation", REPRESENTATIONS)
def test_samples_of_whole_windows_are_training_images(representation):
    scheduler, images = process(representation, "v", beta_schedule="cosine"), images_of(4, 1, 4, 4)
    path = Path(tuple((t, max(0, t - 100)) for t in (999, 800, 600, 400, 200, 50, 0)), "test", {})
    noise = tuple(torch.randn(3, 1, side, side, generator=rng(3), dtype=torch.float64) for side in (4, 2))
    denoiser = LocalPairDenoiser(scheduler, images, "ls", 3)
    found = sample(denoiser.denoise, scheduler, path, noise).images[0]
    assert torch.cdist(found.flatten(1), images.flatten(1)).min(1).values.max() < 1e-6


def test_errors_are_mapped_but_jacobians_are_refused():
    scheduler, images = process(beta_schedule="cosine"), images_of(6, 1, 6, 6)
    denoiser = LocalPairDenoiser(scheduler, images[2:], "els", 3)
    content = error_map(denoiser.denoise, scheduler, images[:2], [900, 500, 100], maps="mse", progress=False)
    assert (content["mse_64_low"] - 4 * content["mse_32"]).abs().max() < 1e-5 * content["mse_64_low"].max()
    with pytest.raises(ValueError, match="carries no gradient"):
        error_map(denoiser.denoise, scheduler, images[:2], [900, 500, 100], maps="blocks", progress=False)


def test_pairs_that_make_no_sense_are_refused():
    scheduler, images = process(), images_of(3, 1, 4, 4)
    for message, settings in {
        "Unknown local score machine 'best'": {"machine": "best"},
        "Unknown borders 'mirror'": {"borders": "mirror"},
        "cut no window": {"machine": "bbels", "borders": "circular"},
        "even height and width": {"images": images[..., 1:]},
        "must be odd and positive": {"window": 2},
        "memory_mib": {"memory_mib": 0},
        "Unknown representation 'half'": {"representation": "half"},
    }.items():
        with pytest.raises(ValueError, match=message):
            LocalPairDenoiser(**{"scheduler": scheduler, "images": images, "machine": "els", "window": 3} | settings)
    xs, ts = noisy_of(scheduler, images, [(700, 300)])
    with pytest.raises(ValueError, match="at log SNR .*, .* is 2"):
        LocalPairDenoiser(scheduler, images, "els", lambda fine, coarse: 2).denoise(xs, ts)
    with pytest.raises(ValueError, match="those of training"):
        LocalPairDenoiser(scheduler, images_of(3, 1, 6, 4), "els", 3).denoise(xs, ts)
