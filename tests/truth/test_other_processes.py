"""Optimal denoisers of every process are those of the variance-preserving one of the same SNR."""

import copy

import pytest
import torch

from diffusion.sampler import sample
from images.representation import REPRESENTATIONS
from paths.path import Path
from planning.error_map import error_map
from scheduler import PREDICTION_TYPES, DDIMScheduler
from truth.gaussian import GaussianDenoiser


def noisy(seed=0):
    g = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(4, 1, side, side, generator=g, dtype=torch.float64) for side in (8, 4))


def variances():
    g = torch.Generator().manual_seed(5)
    return 4 * torch.rand(1, 4, 4, generator=g).double(), torch.rand(3, 1, 4, 4, generator=g).double()


def preserving(scheduler):
    """The variance-preserving process with the SNR of another one, which predicts the clean image."""
    other = copy.copy(
        DDIMScheduler(prediction_type="x0", representation=scheduler.representation.name, clip_sample=False)
    )
    other.log_snr, other.snr = scheduler.log_snr, scheduler.snr
    other.alphas_cumprod = scheduler.log_snr.sigmoid()
    other.alphas, other.sigmas = other.alphas_cumprod.sqrt(), (1 - other.alphas_cumprod).sqrt()
    return other


@pytest.mark.parametrize("representation", REPRESENTATIONS)
@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
@pytest.mark.parametrize("process", ["sub_vp", "ve", "flow"])
def test_they_see_the_same_clean_image(process, prediction_type, representation):
    if process == "flow" and prediction_type in ("epsilon", "score"):
        pytest.skip("Refused at zero SNR.")
    scheduler = DDIMScheduler(1000, "cosine", prediction_type, False, representation, process)
    other = preserving(scheduler)
    ts = torch.tensor([20, 300, 700, 980]), torch.tensor([50, 200, 900, 600])
    xs = REPRESENTATIONS[representation].project(noisy())
    expected = GaussianDenoiser(other, *variances()).denoise(xs, ts)
    sizes = [(scheduler.alphas[t].square() + scheduler.sigmas[t].square()).sqrt()[:, None, None, None] for t in ts]
    scaled = tuple(x * size for x, size in zip(xs, sizes, strict=True))
    predictions = GaussianDenoiser(scheduler, *variances()).denoise(scaled, ts)
    found = scheduler.predict_clean(predictions, ts, scaled)
    for one, two in zip(found, expected, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("process", ["sub_vp", "ve"])
def test_ddim_lands_on_the_same_images(process):
    scheduler = DDIMScheduler(1000, "linear", "epsilon", False, "residual", process)
    other = preserving(scheduler)
    path = Path([(999, 999), (800, 700), (500, 380), (200, 100), (0, 0)], "test", {})
    noise = noisy(1)
    found = sample(GaussianDenoiser(scheduler, *variances()).denoise, scheduler, path, noise)
    # A process that does not end in noise of unit size starts from its own.
    size = (scheduler.prior(torch.ones(1, dtype=torch.float64), 999) / scheduler.sigmas[999]).item()
    start = [x * size * other.sigmas[999] for x in noise]
    expected = sample(GaussianDenoiser(other, *variances()).denoise, other, path, start)
    for one, two in zip(found.images, expected.images, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("process", ["sub_vp", "ve", "flow"])
def test_their_maps_are_positive_to_both_ends(process):
    """Where times lie between whole ones."""
    scheduler = DDIMScheduler(1000, "cosine", "velocity", False, "overcomplete", process)
    denoiser = GaussianDenoiser(scheduler, *variances())
    images = denoiser.draw(20, torch.Generator().manual_seed(0))
    grid = [999, 600, 300, 0]
    content = error_map(denoiser.denoise, scheduler, images.double(), grid, maps="mse", progress=False)
    assert (content["mse_64"] > 0).all() and content["mse_64"].isfinite().all()
