"""Training on stored pairs: every image keeps its noise, and closed forms of what that leaves to learn."""

import math

import numpy as np
import pytest
import torch

from diffusion.pairs import Pairs, pair_seeds
from diffusion.sampler import SeededNoise, sample
from paths.families import diagonal
from scheduler import DDIMScheduler
from training.objective import Denoising, step_generator
from training.pair_batches import PairBatches
from training.teaching import Teaching

SHAPES = [(1, 8, 8), (1, 4, 4)]
SIZE = 0.4  # Of an image, as a share of its noise.
CPU = torch.device("cpu")


def pairs_of(num_scales=2, count=11, labels=False):
    """x = SIZE eps, the exact coupling of the flow from noise to N(0, SIZE^2)."""
    seeds = pair_seeds(7, 0, count)
    noise = SeededNoise(seeds)
    scales = tuple(SIZE * noise.draw(shape).numpy() for shape in SHAPES[:num_scales])
    return Pairs(scales, np.arange(count) % 3 if labels else None, seeds, "c0ffee")


def flow(representation="overcomplete"):
    return DDIMScheduler(beta_schedule="flow", prediction_type="velocity", representation=representation)


def objective(**config):
    said = {"t_pairs": "independent", "t_pairs_points": None, "times": "real"}
    representation = config.pop("representation", "overcomplete")
    return Denoising(said | config, flow(representation))


def exact(xs, ts, labels=None):
    """The velocity (1 - s) eps, by the size of z = (s + (1 - s) tau) eps."""
    sizes = (SIZE + (1 - SIZE) * t.double().view(-1, 1, 1, 1) / 999 for t in ts)
    return tuple((x.double() * (1 - SIZE) / size).float() for x, size in zip(xs, sizes, strict=True))


@pytest.mark.parametrize("num_scales", [1, 2])
def test_every_image_has_the_noise_of_its_seed_whatever_the_batch_and_the_epoch(num_scales):
    pairs, seen = pairs_of(num_scales, labels=True), []
    batches = PairBatches(pairs, 4, 3, CPU)
    assert len(batches) == 2
    by_value = {x.tobytes(): row for row, x in enumerate(pairs.scales[0])}
    for epoch in range(3):
        whole = list(batches.epoch(epoch))
        for x_64, x_32, labels, noise in whole:
            rows = [by_value[x.numpy().tobytes()] for x in x_64]
            assert len({*rows}) == 4
            for row, label, *drawn in zip(rows, labels, *noise, strict=True):
                own = SeededNoise([pairs.seeds[row]])
                assert label == row % 3
                assert all(torch.equal(x, own.draw(shape)[0]) for x, shape in zip(drawn, SHAPES, strict=True))
            if num_scales == 2:
                assert torch.equal(x_32, torch.from_numpy(pairs.scales[1][rows]))
            seen.append(rows)
        # A run that goes on in the middle of an epoch sees what it would have seen.
        [(later, *_)] = batches.epoch(epoch, 1)
        assert torch.equal(later, whole[1][0])
    assert len({tuple(rows) for rows in seen}) == len(seen)


@pytest.mark.parametrize("count", [1, 2, 4])
def test_processes_see_the_rows_of_one_step(count):
    batches = PairBatches(pairs_of(), 8, 3, CPU)
    x_64, x_32, labels, noise = next(batches.epoch(0))
    drawn = objective().draw(x_64, x_32, step_generator(1, 0, CPU), labels=labels, noise=noise)
    each = 8 // count
    parts = [drawn.rows(slice(rank * each, (rank + 1) * each)) for rank in range(count)]
    assert torch.equal(torch.cat([part.noise_64 for part in parts]), noise[0])
    assert torch.equal(torch.cat([part.noise_32 for part in parts]), noise[1])


@pytest.mark.parametrize("representation", ["overcomplete", "residual"])
@pytest.mark.parametrize("t_pairs", ["independent", "same", "band:diagonal,1"])
def test_after_one_exact_reflow_nothing_is_left(representation, t_pairs):
    """On the lines of x = s eps the exact velocity has no loss, at any pair of times."""
    batches = PairBatches(pairs_of(), 8, 3, CPU)
    minimised = objective(t_pairs=t_pairs, representation=representation)
    for step, (x_64, x_32, _, noise) in enumerate(batches.epoch(0)):
        batch = minimised.draw(x_64, x_32, step_generator(1, step, CPU), noise=noise)
        losses = minimised.losses(exact, batch)
        assert set(losses) == {"loss_64", "loss_32"} and max(value.max().item() for value in losses.values()) < 1e-10
        assert (batch.t_64 != batch.t_32).any() == (t_pairs != "same")


def test_noise_given_to_another_image_is_seen():
    """E|(e' - s e) - (1 - s) eps|^2 where z = (1 - t) s e + t e': more than a tenth for every image."""
    x_64, x_32, _, noise = next(PairBatches(pairs_of(), 8, 3, CPU).epoch(0))
    minimised = objective()
    for shuffled in (tuple(each.roll(1, 0) for each in noise), None):
        batch = minimised.draw(x_64, x_32, step_generator(1, 0, CPU), noise=shuffled)
        assert min(value.min().item() for value in minimised.losses(exact, batch).values()) > 1e-3
        assert max(value.mean().item() for value in minimised.losses(exact, batch).values()) > 0.1


def test_stored_noise_is_never_dealt_out_again():
    x_64, x_32, _, noise = next(PairBatches(pairs_of(), 8, 3, CPU).epoch(0))
    minimised = objective(coupling="ot", model_type="dual")
    batch = minimised.draw(x_64, x_32, step_generator(1, 0, CPU), noise=tuple(each.roll(1, 0) for each in noise))
    assert torch.equal(batch.noise_64, noise[0].roll(1, 0))


@pytest.mark.parametrize("deviation", [0.4, 1.0])
def test_independent_noise_leaves_the_known_loss(deviation):
    """Of N(0, s^2) the integral of s^2 / ((1 - tau)^2 s^2 + tau^2), which is pi s / 2, in each dimension."""
    tau = (np.arange(100_000) + 0.5) / 100_000
    integral = np.mean(deviation**2 / ((1 - tau) ** 2 * deviation**2 + tau**2))
    assert integral == pytest.approx(math.pi * deviation / 2, rel=1e-6)

    def best(xs, ts):
        taus = [t.view(-1, 1, 1, 1) / 999 for t in ts]
        gains = [(tau - deviation**2 * (1 - tau)) / (tau**2 + deviation**2 * (1 - tau) ** 2) for tau in taus]
        return tuple((gain * x).float() for gain, x in zip(gains, xs, strict=True))

    generator = step_generator(5, 0, CPU)
    x_64, x_32 = (deviation * torch.randn(4000, *shape, generator=generator) for shape in SHAPES)
    minimised = objective()
    losses = minimised.losses(best, minimised.draw(x_64, x_32, generator))
    for values in losses.values():
        error = values.std().item() / len(values) ** 0.5
        assert abs(values.mean().item() - integral) < 4 * error < 0.05


def test_one_step_from_independent_noise_gives_the_mean():
    def best(xs, ts):  # Of N(mean, s^2), from the posterior mean of the clean image.
        found = []
        for x, t in zip(xs, ts, strict=True):
            tau = t.double().view(-1, 1, 1, 1) / 999
            variance = (1 - tau) ** 2 * SIZE**2 + tau**2
            clean = 0.25 + (1 - tau) * SIZE**2 / variance * (x - (1 - tau) * 0.25)
            noise = tau / variance * (x - (1 - tau) * 0.25)
            found.append((noise - clean).float())
        return tuple(found)

    noise = [SeededNoise(range(5)).draw(shape) for shape in SHAPES]
    images = sample(best, flow(), diagonal(1, "uniform_t", 2), noise).images
    for image in images:
        torch.testing.assert_close(image, torch.full_like(image, 0.25))


@pytest.mark.parametrize("times", ["whole", "real"])
def test_a_student_of_one_step_is_shown_noise_alone(times):
    x_64, x_32, _, noise = next(PairBatches(pairs_of(), 8, 3, CPU).epoch(0))
    minimised = objective(times=times, only_time=999, t_law="importance")
    batch = minimised.draw(x_64, x_32, step_generator(1, 0, CPU), noise=noise)
    assert batch.t_64.tolist() == batch.t_32.tolist() == [999] * 8 and batch.share is None
    assert batch.t_64.dtype == (torch.float64 if times == "real" else torch.int64)
    noisy, _ = minimised.noised(batch)
    assert all(torch.equal(z, each) for z, each in zip(noisy, noise, strict=True))
    losses = minimised.losses(exact, batch)
    assert max(value.max().item() for value in losses.values()) < 1e-10
    minimised.observe(losses, batch, torch.tensor(True), lambda values: values)
    assert minimised.state is None


def test_too_large_a_batch_and_mirrored_images_are_refused():
    with pytest.raises(ValueError, match="--batch_size 12 does not fit 11 pairs"):
        PairBatches(pairs_of(), 12, 3, CPU)

    class Loaded:
        config, file, learned_variance = {}, "teacher.pth", False

        def require_means(stage):
            """It is no consistency model."""

    Teaching(Loaded, {}).check({"flip": True, "network": "unet", "representation": "overcomplete"})
    same = {"flip": False, "network": "unet", "representation": "overcomplete"}
    with pytest.raises(ValueError, match="the data of the teacher teacher.pth is None, not feed"):
        Teaching(Loaded, {}, pairs_of()).check(same | {"data_fingerprint": "feed"})
    with pytest.raises(ValueError, match="--flip mirrors images"):
        Teaching(Loaded, {}, pairs_of()).check({"flip": True, "network": "unet", "representation": "overcomplete"})
