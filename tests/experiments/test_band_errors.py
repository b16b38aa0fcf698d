"""Errors of the bands against Gaussian images, whose ideal denoiser has them in closed form."""

import csv
import math
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import band_errors
from conftest import HARDWARE
from images.representation import REPRESENTATIONS
from scheduler import DDIMScheduler
from truth.gaussian import GaussianDenoiser

LOG_SNR = -6 + math.log(4) * np.arange(8)
SHAPE = (2, 2, 3)  # [C, H/2, W/2]


def loaded_model(representation, num_scales=2):
    """The ideal denoiser of images with variances over three decades, as a model."""
    generator = torch.Generator().manual_seed(1)
    low, high = (
        10 ** (3 * torch.rand(shape, generator=generator, dtype=torch.float64) - 2) for shape in (SHAPE, (3, *SHAPE))
    )
    scheduler = DDIMScheduler(beta_schedule="cosine", prediction_type="v", representation=representation)
    denoiser = GaussianDenoiser(scheduler, low, high)

    def of_one_scale(xs, ts):
        noisiest = torch.full_like(ts[0], len(scheduler.log_snr) - 1)  # λ = -19.8 tells nothing of the image.
        return denoiser.denoise((xs[0], torch.zeros_like(xs[0][..., ::2, ::2])), (ts[0], noisiest))[:1]

    denoise = denoiser.denoise if num_scales == 2 else of_one_scale
    model = SimpleNamespace(num_predictions=num_scales, num_scales=num_scales)
    return SimpleNamespace(model=model, denoise=denoise, scheduler=scheduler, config={}), denoiser


@pytest.mark.parametrize(
    ("representation", "num_scales", "low_snr"), [("overcomplete", 1, 1), ("overcomplete", 2, 1.25), ("residual", 2, 1)]
)
def test_errors_of_the_ideal_denoiser_are_the_posterior_variances(representation, num_scales, low_snr):
    loaded, denoiser = loaded_model(representation, num_scales)
    images = denoiser.draw(4000, torch.Generator().manual_seed(2))
    found = band_errors.band_errors(loaded, images, LOG_SNR, batch_size=4000, progress=False)
    spectrum, snr = denoiser.spectrum(), torch.from_numpy(np.exp(LOG_SNR))[:, None]
    for band, variances, share in (("low", spectrum.low, low_snr), ("detail", spectrum.high, 1)):
        exact = (variances / (1 + share * snr * variances)).sum(1)
        values = found[band]
        assert values.shape == (8, 4000)
        # Timesteps are within 0.02 of the lines, in log SNR, and an error falls no faster than the SNR rises.
        error = 4 * values.std(1) / math.sqrt(4000) + 0.02 * exact
        assert ((values.mean(1) - exact).abs() < error).all()
        assert (error < 0.08 * exact).all()


def test_ratio_and_its_error_against_repeated_draws():
    generator = torch.Generator().manual_seed(3)
    reference = torch.rand(2000, 50, generator=generator, dtype=torch.float64) + 0.5
    errors = 0.8 * reference + 0.1 * torch.rand(2000, 50, generator=generator, dtype=torch.float64)
    ratios, spreads = zip(*map(band_errors.ratio, errors, reference), strict=True)
    assert np.mean(ratios) == pytest.approx(0.85, abs=1e-3)
    assert np.mean(spreads) == pytest.approx(np.std(ratios), rel=0.05)


def test_the_table_of_trained_models(stage, run, tmp_path):
    output = tmp_path / "folder/errors"
    lines = ("--noisiest", -5, "--lines", 3, "--num_images", 4, "--on", "train")
    flags = (f"one={run.baseline}", f"two={run.lift}", *lines, "--output", output)
    printed = stage(band_errors, *flags, "--cache_dir", run.cache, *HARDWARE).output
    with open(f"{output}.csv", newline="", encoding="utf-8") as stream:
        rows = list(csv.DictReader(stream))
    assert [row["model"] for row in rows] == ["one"] * 3 + ["two"] * 3
    for one, two in zip(rows[:3], rows[3:], strict=True):
        assert float(one["image_ratio"]) == 1 and float(one["image_ratio_se"]) == pytest.approx(0, abs=1e-12)
        assert float(two["low"]) + float(two["detail"]) == pytest.approx(float(two["image"]))
        for band in ("low", "detail", "image"):
            assert float(two[band]) / float(one[band]) == pytest.approx(float(two[f"{band}_ratio"]))
            assert f"{float(two['low_ratio']):.3f} ± {float(two['low_ratio_se']):.3f}" in printed
    assert Path(f"{output}.md").read_text(encoding="utf-8") == printed
    assert "raw weights, 4 train images" in printed and str(tmp_path) not in printed


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (("--lines", 30), ("log SNR -12 to", "--lines")),
        (("--num_images", 99, "--noisiest", -5, "--lines", 2), ("99", "2 to 12")),
        (("--on", "held_out"), ("all its images", "--on train")),
    ],
)
def test_what_cannot_be_measured_is_refused(refused, run, tmp_path, flags, says):
    flags = (f"one={run.baseline}", "--num_images", 4, "--on", "train", *flags, "--output", tmp_path / "errors")
    refused(band_errors, *flags, "--cache_dir", run.cache, *HARDWARE, says=says)


def test_lines_of_the_residual_pair_reach_log_4_further():
    assert band_errors.LINE_SPACING == REPRESENTATIONS["residual"].image_lead
    loaded, denoiser = loaded_model("residual")
    end = loaded.scheduler.log_snr[0].item()
    images = denoiser.draw(2, torch.Generator().manual_seed(2))
    options = dict(batch_size=2, progress=False)
    with pytest.raises(ValueError, match="--lines"):
        band_errors.band_errors(loaded, images, np.array([end - 1]), **options)
    found = band_errors.band_errors(loaded, images, np.array([end - 1.4]), **options)
    assert found["low"].shape == (1, 2)
