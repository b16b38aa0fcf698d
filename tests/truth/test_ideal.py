"""The ideal denoiser of a few images against a loop over them."""

import math

import pytest
import torch
import torch.nn.functional as F

from diffusion.sampler import sample
from exact_models import REPRESENTATIONS, C, H, W, data_set, fine_of, noisy, rng
from paths.path import Path
from scheduler import DDIMScheduler
from truth.ideal import EmpiricalDenoiser


@pytest.mark.parametrize("representation", REPRESENTATIONS)
@pytest.mark.parametrize("chunk_size", [1, 3, 100])
@pytest.mark.parametrize("ts", [(999, 999), (600, 850), (850, 600), (500, 700)])
def test_empirical_denoiser_is_a_loop_over_images(ts, chunk_size, representation):
    scheduler, images = DDIMScheduler(), data_set()
    denoiser = EmpiricalDenoiser(scheduler, images, chunk_size, representation)
    xs, timesteps = noisy(scheduler, *ts)
    fine = fine_of(representation)
    xs = ((xs[0].flatten(1) @ fine).view_as(xs[0]), xs[1])
    predictions = denoiser.denoise(xs, timesteps)
    alphas = [scheduler.alphas_cumprod[t].item() for t in ts]
    spread = 0.0
    for k in range(len(xs[0])):
        weights = []
        for y in images:
            ys = ((fine @ y.flatten()).view_as(y), F.avg_pool2d(y, 2))
            distances = [
                ((x[k] - math.sqrt(a) * z) ** 2).sum().item() / (1 - a) for x, z, a in zip(xs, ys, alphas, strict=True)
            ]
            weights.append(math.exp(-sum(distances) / 2))
        spread = max(spread, min(weights) / max(weights))
        x0 = sum(w * y for w, y in zip(weights, images, strict=True)) / sum(weights)
        x0s = ((fine @ x0.flatten()).view_as(x0), F.avg_pool2d(x0, 2))
        for x, z, a, prediction in zip(xs, x0s, alphas, predictions, strict=True):
            expected = (x[k] - math.sqrt(a) * z) / math.sqrt(1 - a)
            torch.testing.assert_close(prediction[k], expected, rtol=1e-9, atol=1e-9)
    assert 1e-12 < spread < 1


def test_empirical_denoiser_returns_the_nearest_image_at_low_noise_and_the_mean_at_none():
    scheduler = DDIMScheduler(beta_schedule="cosine_zero_terminal", prediction_type="x0")
    images = data_set()
    denoiser = EmpiricalDenoiser(scheduler, images.float()).float()
    near = (images[[4, 2]] + 0.01 * torch.randn(2, C, H, W, generator=rng(), dtype=torch.float64)).float()
    zero = torch.zeros(2, dtype=torch.long)
    x0_64, x0_32 = denoiser(near, F.avg_pool2d(near, 2), zero, zero)
    torch.testing.assert_close(x0_64, images[[4, 2]].float())
    torch.testing.assert_close(x0_32, F.avg_pool2d(images[[4, 2]], 2).float())
    x0_64, _ = denoiser(near, F.avg_pool2d(near, 2), zero + 999, zero + 999)
    torch.testing.assert_close(x0_64, images.mean(0).float().expand_as(x0_64))
    # Far from every image, the weights must not underflow.
    assert denoiser(100 + near, F.avg_pool2d(near, 2), zero, zero)[0].isfinite().all()


def test_sampling_with_the_empirical_denoiser_returns_the_images():
    scheduler, images = DDIMScheduler(), data_set()
    path = Path(tuple((t, t) for t in (999, 800, 600, 400, 200, 50, 0)), "test", {})
    noise = noisy(scheduler, 0, 0, count=5)[0]
    result = sample(EmpiricalDenoiser(scheduler, images).denoise, scheduler, path, noise).images[0]
    assert torch.cdist(result.flatten(1), images.flatten(1)).min(1).values.max() < 1e-6


def test_empirical_denoiser_is_differentiable_and_refuses_bad_input():
    scheduler, images = DDIMScheduler(), data_set(3)
    denoiser = EmpiricalDenoiser(scheduler, images)
    xs, ts = noisy(scheduler, 700, 800, count=1)
    assert torch.autograd.gradcheck(lambda a, b: denoiser(a, b, *ts), tuple(x.requires_grad_() for x in xs))
    with pytest.raises(ValueError, match="even height"):
        EmpiricalDenoiser(scheduler, images[..., 1:])
    with pytest.raises(ValueError, match="chunk_size"):
        EmpiricalDenoiser(scheduler, images, 0)
