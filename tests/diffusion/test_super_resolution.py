"""Super-resolution against exact denoisers, brute force and closed forms, and its stage from end to end."""

import csv
import math
import sys

import numpy as np
import pytest
import torch
from PIL import Image

import figures.images
import generate_sr
import image_folder
import train_lift
from checkpoint import load_model
from conftest import HARDWARE, STEPS, results_of
from data import coarse, load_images, read_png, save_png, split_holdout, to_float, to_uint8
from diffusion import super_resolution
from diffusion.sampler import IMAGES_PER_SEED, image_seeds
from diffusion.super_resolution import (
    UPSAMPLERS,
    image_quality,
    lpips_distance,
    lpips_missing,
    make_consistent,
    mean_deviation,
    noise_seeds,
    super_resolution_path,
    super_resolve,
    upsample,
    upscale_all,
)
from figure_checks import check_file, check_layout, render
from paths.families import diagonal
from paths.path import SPACINGS, Path
from scheduler import DDIMScheduler
from truth.gaussian import GaussianDenoiser
from truth.ideal import EmpiricalDenoiser

RNG = np.random.default_rng(0)
LOG_SNR = DDIMScheduler().log_snr.numpy()


def pixels_of(count, size=16, channels=3, low=0, high=256):
    return torch.from_numpy(RNG.integers(low, high, (count, channels, size, size), dtype=np.uint8))


def sr_path(num_steps=6, spacing="uniform_t", start=None):
    return super_resolution_path(diagonal(num_steps, spacing, 1, LOG_SNR, start=start))


class Spy:
    """A denoiser whose answer depends on both images, and which keeps what it was called with."""

    def __init__(self):
        self.asked = []

    def __call__(self, xs, ts):
        self.asked.append((tuple(x.clone() for x in xs), ts))
        return 0.5 * xs[0] + xs[1].repeat_interleave(2, 2).repeat_interleave(2, 3), 0.3 * xs[1] + 1


# The path and the sampling


@pytest.mark.parametrize("spacing", SPACINGS)
def test_the_fine_scale_alone_moves(spacing):
    base = diagonal(6, spacing, 1, LOG_SNR)
    path = super_resolution_path(base)
    assert path.points == tuple((t, 0) for (t,) in base.points) and path.nfe == 6
    assert path.provenance["base"]["spacing"] == spacing


def test_a_path_of_other_scales_is_refused():
    with pytest.raises(ValueError, match="has 2"):
        super_resolution_path(diagonal(6))
    given = torch.zeros(1, 3, 4, 4)
    moving = Path(((999, 9), (500, 8), (0, 0)), "hand-made", {})
    for path, says in ((diagonal(6), "rests at one"), (diagonal(6, num_scales=1), "1 scale"), (moving, "rests at one")):
        with pytest.raises(ValueError, match=says):
            list(super_resolve(Spy(), DDIMScheduler(), path, given, [1]))


@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_every_call_sees_the_coarse_image_as_given(eta):
    spy, path, given = Spy(), sr_path(start=800), to_float(pixels_of(3, 4))
    kept = given.clone()
    [upscaled] = super_resolve(spy, DDIMScheduler(), path, given, [7, 8, 9], eta=eta)
    assert len(spy.asked) == upscaled.nfe == path.nfe == 6
    for (t_64, t_32), (xs, ts) in zip(path.points, spy.asked, strict=False):
        assert torch.equal(xs[1], kept) and torch.equal(given, kept)
        assert (ts[0] == t_64).all() and (ts[1] == t_32).all() and t_32 == 0
    assert spy.asked[0][1][0].tolist() == [800] * 3
    # The first fine image is the noise of each seed and nothing else.
    for seed, noise in zip((7, 8, 9), spy.asked[0][0][0], strict=True):
        np.testing.assert_array_equal(noise, np.random.default_rng(seed).standard_normal((3, 8, 8), dtype=np.float32))
    assert upscaled.images.shape == (3, 3, 8, 8)


@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_an_image_does_not_depend_on_its_batch(eta):
    given, seeds = to_float(pixels_of(5, 4)), [3, 1, 4, 15, 9]

    def run(rows, batch_size):
        chosen = [seeds[k] for k in rows]
        batches = super_resolve(Spy(), DDIMScheduler(), sr_path(), given[rows], chosen, batch_size, eta=eta)
        return torch.cat([batch.images for batch in batches])

    together = run([0, 1, 2, 3, 4], 5)
    assert torch.equal(run([0, 1, 2, 3, 4], 2), together)
    assert torch.equal(run([4, 2], 1), together[[4, 2]])
    assert not torch.equal(together[0], together[1])


def test_the_noise_of_an_image_follows_from_its_pixels_and_the_seed():
    pixels = pixels_of(20, 4)
    seeds = noise_seeds(pixels, 5)
    assert len(set(seeds)) == 20 and all(seed in image_seeds(5, IMAGES_PER_SEED) for seed in seeds)
    assert noise_seeds(pixels[[7, 3]], 5) == [seeds[7], seeds[3]]
    assert noise_seeds(pixels, 6) == [seed + IMAGES_PER_SEED for seed in seeds]


@pytest.mark.parametrize("prediction_type", ["epsilon", "x0", "v"])
def test_a_perfect_denoiser_finds_the_original(prediction_type):
    # All originals but the last two differ in their coarse versions, and these two in nothing else.
    originals = to_float(pixels_of(6, 8)).double()
    originals[5] = originals[4] + torch.tensor([[0.1, -0.1], [-0.1, 0.1]]).repeat(4, 4)
    originals = originals.clamp(-0.9, 0.9)
    originals[5] = make_consistent(originals[5:], coarse(originals[4:5]))[0]
    scheduler = DDIMScheduler(prediction_type=prediction_type)
    denoise = EmpiricalDenoiser(scheduler, originals).denoise
    [found] = super_resolve(denoise, scheduler, sr_path(10), coarse(originals).float(), range(6))
    quality = image_quality_of_small(found.images, originals)
    assert (quality[:4] > 60).all()
    ambiguous = [max(image_quality_of_small(image.expand(2, -1, -1, -1), originals[4:])) for image in found.images[4:]]
    assert min(ambiguous) > 60
    # What it is given decides, and not the noise.
    [other] = super_resolve(denoise, scheduler, sr_path(10), coarse(originals).float()[[1, 0]], [0, 1])
    assert (image_quality_of_small(other.images, originals[[1, 0]]) > 60).all()


def image_quality_of_small(images, originals):
    return 10 * torch.log10(4 / (images.double() - originals).pow(2).flatten(1).mean(1))


def test_images_without_detail_come_out_as_their_pixels_enlarged():
    scheduler = DDIMScheduler()
    denoiser = GaussianDenoiser(scheduler, torch.full((3, 4, 4), 0.5), torch.zeros(3, 3, 4, 4))
    given = 0.8 * to_float(pixels_of(2, 4))
    [found] = super_resolve(denoiser.denoise, scheduler, sr_path(20), given, [0, 1])
    enlarged = given.repeat_interleave(2, 2).repeat_interleave(2, 3)
    assert (found.images - enlarged).abs().max() < 0.01


def test_an_image_that_is_not_finite_is_named():
    def denoise(xs, ts):
        broken = xs[0].clone()
        broken[xs[1][:, 0, 0, 0] > 0.9] = math.nan
        return broken, xs[1]

    given = torch.zeros(5, 3, 4, 4)
    given[3] = 1
    with pytest.raises(ValueError, match="image 3 NaN or infinite"):
        list(super_resolve(denoise, DDIMScheduler(), sr_path(), given, range(5), batch_size=2))


# Data consistency


def test_consistency_is_the_orthogonal_projection():
    fine, original, other = (to_float(pixels_of(4)) for _ in range(3))
    given = coarse(original)
    found = make_consistent(fine, given)
    torch.testing.assert_close(coarse(found), given, rtol=0, atol=1e-6)
    torch.testing.assert_close(make_consistent(found, given), found, rtol=0, atol=1e-6)
    # What it changes is at right angles to every difference of two images of this mean.
    doubles = [images.double() for images in (fine, original, make_consistent(other, given))]
    found = make_consistent(doubles[0], coarse(doubles[1]))
    apart = doubles[1] - make_consistent(doubles[2], coarse(doubles[1]))
    assert ((doubles[0] - found) * apart).flatten(1).sum(1).abs().max() < 1e-9
    squared = [(images - doubles[1]).pow(2).flatten(1).sum(1) for images in (found, doubles[0])]
    step = (found - doubles[0]).pow(2).flatten(1).sum(1)
    torch.testing.assert_close(squared[0] + step, squared[1])
    assert (step > 1).all()


def test_rounding_moves_a_mean_by_half_a_level_and_clipping_by_more():
    given = pixels_of(50, 8, low=100, high=156)
    fine = make_consistent(to_float(pixels_of(50, low=90, high=166)) + 0.003, to_float(given))
    assert fine.abs().max() < 1
    deviation = mean_deviation(to_uint8(fine), given)
    assert deviation.shape == (50,) and 0.1 < deviation.max() <= 0.5
    # (1, 1, 1, -1) moves to (1.5, 1.5, 1.5, -0.5), which is stored as (255, 255, 255, 64) in place of 4 x 255.
    block = torch.tensor([[[[1.0, 1.0], [1.0, -1.0]]]])
    clipped = to_uint8(make_consistent(block, torch.ones(1, 1, 1, 1)))
    assert mean_deviation(clipped, torch.full((1, 1, 1, 1), 255, dtype=torch.uint8)).tolist() == [255 - 207.25]


# Methods to compare with


def kernel_matrix(size, kernel, support):
    # Weights of every source pixel for every pixel of the picture of twice the size, whose borders weigh less.
    centres = (np.arange(2 * size) + 0.5) / 2
    distances = np.abs(centres[:, None] - (np.arange(size) + 0.5))
    weights = np.where(distances < support, kernel(distances), 0.0)
    return weights / weights.sum(1, keepdims=True)


def keys(x, a=-0.5):
    return np.where(x < 1, (a + 2) * x**3 - (a + 3) * x**2 + 1, a * (x**3 - 5 * x**2 + 8 * x - 4))


KERNELS = {
    "nearest": (lambda x: np.ones_like(x), 0.5),
    "bicubic": (keys, 2),
    "lanczos": (lambda x: np.sinc(x) * np.sinc(x / 3), 3),
}


@pytest.mark.parametrize("method", UPSAMPLERS)
@pytest.mark.parametrize("channels", [1, 3])
def test_upsampling_is_the_textbook_kernel(method, channels):
    given = pixels_of(3, 8, channels)
    matrix = kernel_matrix(8, *KERNELS[method])
    # Pillow rounds and clips after each of its two passes, of which that along the rows is first.
    expected = np.rint(given.numpy() @ matrix.T).clip(0, 255)
    expected = np.rint(matrix @ expected).clip(0, 255)
    found = upsample(given, method)
    assert found.dtype == torch.uint8 and found.shape == (3, channels, 16, 16)
    assert np.abs(found.numpy() - expected).max() <= (0 if method == "nearest" else 1)


def test_every_method_is_there_with_and_without_consistency():
    given, fine = pixels_of(2, 8, low=50, high=200), to_float(pixels_of(2))
    results = upscale_all(given, fine)
    assert list(results) == [
        "nearest", "bicubic", "lanczos", "lift", "bicubic consistent", "lanczos consistent", "lift consistent",
    ]  # fmt: skip
    assert torch.equal(results["lift"], to_uint8(fine)) and torch.equal(results["bicubic"], upsample(given, "bicubic"))
    for name in ("bicubic", "lanczos"):
        before, after = (mean_deviation(results[key], given) for key in (name, f"{name} consistent"))
        assert (after < before).all()
    assert torch.equal(results["lift consistent"], to_uint8(make_consistent(fine, to_float(given))))


# Metrics


@pytest.mark.parametrize("side", [16, 11])
def test_quality_is_that_of_the_formulas(monkeypatch, side):
    monkeypatch.setattr(super_resolution, "QUALITY_BATCH", 2)  # The last batch is smaller.
    originals = pixels_of(3, side)
    noisy = (originals.int() + torch.from_numpy(RNG.integers(-30, 31, originals.shape))).clamp(0, 255).to(torch.uint8)
    noisy[2] = originals[2]
    found = image_quality(noisy, originals)
    x, y = noisy.numpy().astype(float), originals.numpy().astype(float)
    for k in (0, 1):
        assert found.psnr[k].item() == pytest.approx(10 * math.log10(255**2 / ((x[k] - y[k]) ** 2).mean()), abs=1e-5)
    assert found.psnr[2] == math.inf and found.ssim[2].item() == pytest.approx(1)
    window = np.exp(-(np.arange(-5, 6) ** 2) / (2 * 1.5**2))
    window = np.outer(window, window) / window.sum() ** 2
    for k in range(3):
        places = []
        for c, i, j in np.ndindex(3, side - 10, side - 10):
            a, b = (image[k, c, i : i + 11, j : j + 11] for image in (x, y))
            mean_a, mean_b = (window * a).sum(), (window * b).sum()
            var_a, var_b = (window * a * a).sum() - mean_a**2, (window * b * b).sum() - mean_b**2
            both = (window * a * b).sum() - mean_a * mean_b
            c_1, c_2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
            contrast = (2 * both + c_2) / (var_a + var_b + c_2)
            places.append((2 * mean_a * mean_b + c_1) / (mean_a**2 + mean_b**2 + c_1) * contrast)
        assert found.ssim[k].item() == pytest.approx(np.mean(places), abs=1e-6)


def test_quality_refuses_what_it_cannot_compare(monkeypatch):
    with pytest.raises(ValueError, match="equal shapes of 11 pixels"):
        image_quality(pixels_of(2), pixels_of(1))
    with pytest.raises(ValueError, match="equal shapes of 11 pixels"):
        image_quality(pixels_of(1, 10), pixels_of(1, 10))
    monkeypatch.setitem(sys.modules, "torchmetrics.functional.image", None)
    with pytest.raises(RuntimeError, match="pip install torchmetrics"):
        image_quality(pixels_of(1), pixels_of(1))


def test_lpips_waits_for_its_weights(tmp_path, monkeypatch):
    import torchvision

    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    file = tmp_path / "hub/checkpoints/alexnet-owt-7be5be79.pth"
    assert str(file) in lpips_missing(64)
    file.parent.mkdir(parents=True)
    file.touch()
    assert lpips_missing(64) == lpips_missing(32) == "" and "32 pixels" in lpips_missing(31)
    # An untrained network of the same layers stands in; one class makes it small.
    torch.manual_seed(0)
    network = torchvision.models.AlexNet(num_classes=1)
    monkeypatch.setattr(torchvision.models, "alexnet", lambda weights: network)
    monkeypatch.setattr(super_resolution, "QUALITY_BATCH", 2)
    originals, others = pixels_of(3, 32), pixels_of(3, 32)
    assert lpips_distance(originals, originals) == 0
    one_by_one = [lpips_distance(others[k : k + 1], originals[k : k + 1]) for k in range(3)]
    assert min(one_by_one) > 0 and lpips_distance(others, originals) == pytest.approx(np.mean(one_by_one), rel=1e-5)
    grey = originals[:, :1]
    assert lpips_distance(grey, others[:, :1]) == pytest.approx(
        lpips_distance(grey.expand(-1, 3, -1, -1), others[:, :1].expand(-1, 3, -1, -1))
    )


# The figure


def columns_of(count, size=16, names=("input", "LIFT", "original")):
    images = {name: pixels_of(count, size, low=100, high=104).numpy() for name in names}
    images["input"] = images["input"][:, :, : size // 2, : size // 2]
    # The detail lies in the middle, so that the frame is whole.
    middle = slice(size // 2 - 1, size // 2 + 1)
    images[names[-1]][:, :, middle, middle] = np.array([[0, 255], [255, 0]])
    return images


def test_the_figure_shows_images_and_their_most_detailed_part(tmp_path):
    columns = columns_of(2)
    captions = {"LIFT": ["31.00 dB", "32.00 dB"]}
    figure = figures.images._super_resolution_figure(columns, "A title", captions)
    check_layout(figure)
    texts = [text.get_text() for text in figure.texts]
    assert [text for text in texts if text] == [
        "A title", "image", "input", "LIFT", "31.00 dB", "original", "detail", "image", "32.00 dB", "detail",
    ]  # fmt: skip
    shown = [image.get_array() for image in figure.images]
    assert len(shown) == 12 and {picture.shape for picture in shown} == {(192, 192, 3)}
    frame = np.array([230, 159, 0])  # #E69F00
    for k, (row, name) in enumerate((row, name) for row in range(2) for name in columns):
        whole, part = shown[6 * row + k % 3], shown[6 * row + 3 + k % 3]
        image = columns[name][row].transpose(1, 2, 0)
        side = len(image)
        expected = image.repeat(192 // side, 0).repeat(192 // side, 1)
        is_frame = (whole == frame).all(2) & (expected != frame).any(2)
        np.testing.assert_array_equal(whole[~is_frame], expected[~is_frame])
        # The frame lies around 6 of 16 pixels of a side, and those are what is shown below.
        rows, lines = (np.flatnonzero(is_frame.any(axis)) for axis in (1, 0))
        top, left = (rows[0] + 2) // 12, (lines[0] + 2) // 12
        assert rows[-1] - rows[0] == lines[-1] - lines[0] == 6 * 12 + 3
        assert top <= 7 and top + 6 >= 9 and left <= 7 and left + 6 >= 9
        cut = slice(top * side // 16, (top + 6) * side // 16), slice(left * side // 16, (left + 6) * side // 16)
        scale = 192 // (6 * side // 16)
        np.testing.assert_array_equal(part, image[cut].repeat(scale, 0).repeat(scale, 1))
    check_file(lambda file: figures.images.plot_super_resolution(columns_of(1), file), None, tmp_path)


@pytest.mark.parametrize("size", [16, 32, 48, 64, 80])
def test_the_figure_fits_its_page_at_any_size(size):
    names = (*"abcde", "input", "original")
    figure = figures.images._super_resolution_figure(columns_of(1, size, names), "", {})
    assert render(figure).shape[1] < 3000
    check_layout(figure)


def test_the_figure_refuses_unequal_columns(tmp_path):
    with pytest.raises(ValueError, match="no column"):
        figures.images.plot_super_resolution({}, tmp_path / "figure.png")
    columns = columns_of(2)
    columns["LIFT"] = columns["LIFT"][:1]
    with pytest.raises(ValueError, match="equally long but hold {'input': 2, 'LIFT': 1, 'original': 2}"):
        figures.images.plot_super_resolution(columns, tmp_path / "figure.png")


# The stage


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    """A stage that falls back on a default place writes it here, and finds no weights for LPIPS."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))


@pytest.fixture(scope="module")
def held_out(stage, tiny, run, tmp_path_factory):
    """A dual model that was trained without 4 of 12 images."""
    folder = tmp_path_factory.mktemp("held_out")
    stage(train_lift, *tiny(folder), "--cache_dir", run.cache, "--holdout", 4, "--epochs", 1, "--lr", 0.003)
    return folder / "checkpoints/lift_dual_timestep_1ep.pth"


def flags_of(checkpoint, run, *flags):
    return ["--checkpoint", checkpoint, *STEPS, *HARDWARE, "--cache_dir", run.cache, *flags]


def scores_of(folder):
    with open(folder / "sr_metrics.csv") as stream:
        return {row["method"]: row for row in csv.DictReader(stream)}


def originals_of(run, count=4):
    images = load_images("synthetic", 16, run.cache, limit=12)
    return torch.from_numpy(np.array(split_holdout(images, count)[1].pixels))


def write_images(folder, images, names="abcdefgh"):
    folder.mkdir(exist_ok=True)
    for name, pixels in zip(names, images, strict=False):
        save_png(pixels, folder / f"{name}.png")


def test_held_out_images_are_measured(stage, refused, run, held_out, tmp_path):
    flags = flags_of(held_out, run, "--output", "sr", "--batch_size", 3)
    output = stage(generate_sr, *flags).output
    assert "LPIPS is left out" in output and "TRAINED ON" not in output
    scores, originals = scores_of(tmp_path / "sr"), originals_of(run)
    given = to_uint8(coarse(to_float(originals)))
    loaded = load_model(held_out)
    [upscaled] = super_resolve(
        loaded.model.denoise, loaded.scheduler, sr_path(4), to_float(given), noise_seeds(given, 42)
    )
    results = upscale_all(given, upscaled.images)
    assert list(scores) == list(results)
    for name, row in scores.items():
        quality = image_quality(results[name], originals)
        # Batches of another size round otherwise.
        assert float(row["psnr"]) == pytest.approx(quality.psnr.mean().item(), abs=0.01)
        assert float(row["psnr_sd"]) == pytest.approx(quality.psnr.std().item(), abs=0.01)
        assert float(row["ssim"]) == pytest.approx(quality.ssim.mean().item(), abs=1e-3)
        assert f"{name:20} {float(row['psnr']):7.2f}" in output and row["lpips"] == ""
        assert row["nfe"] == ("4" if name.startswith("lift") else "0")
        assert (row["num_images"], row["of"], row["weights"], row["seed"]) == ("4", "holdout", "raw", "42")
        assert row["weights_fingerprint"] == loaded.fingerprint
        assert row["path_fingerprint"] == sr_path(4).fingerprint()
    with Image.open(tmp_path / "sr/sr.png") as figure:
        assert figure.width > 6 * 192 and figure.height > 8 * 192
    # The same again is the same, and other settings are refused before anything is lost.
    before = (tmp_path / "sr/sr_metrics.csv").read_bytes()
    stage(generate_sr, *flags)
    assert (tmp_path / "sr/sr_metrics.csv").read_bytes() == before
    refused(generate_sr, *flags, "--seed", 43, says=("another seed", "--force", "--output"))
    refused(generate_sr, *flags, "--num_images", 2, says=("another images_fingerprint",))
    stage(generate_sr, *flags, "--seed", 43, "--num_images", 2, "--force")
    assert scores_of(tmp_path / "sr")["lift"]["seed"] == "43" and len(scores_of(tmp_path / "sr")) == 7


def test_images_of_training_come_with_a_note(stage, run, tmp_path):
    ended = stage(generate_sr, *flags_of(run.lift, run, "--on", "train", "--num_images", 3, "--ema", "--eta", 0.5))
    assert "NOTE: THE NETWORK WAS TRAINED ON THESE IMAGES" in ended.output and "nothing shows" not in ended.output
    flags = ["--on", "train", "--dataset", "synthetic", "--limit", 5, "--output", tmp_path / "others"]
    ended = stage(generate_sr, *flags_of(run.lift, run, *flags))
    assert "is not what the network was trained on, and nothing shows what it saw of it" in ended.output
    assert "THE NETWORK WAS TRAINED" not in ended.output
    [row] = {(r["of"], r["num_images"], r["weights"], r["eta"]) for r in scores_of_default(tmp_path).values()}
    assert row == ("train", "3", "ema", "0.5")


def scores_of_default(folder):
    return scores_of(folder / results_of("dual") / "super_resolution/lift_dual_timestep_2ep_ema_4")


def test_another_data_set_may_be_measured(stage, run, tmp_path):
    write_images(tmp_path / "other", pixels_of(5))
    flags = flags_of(run.lift, run, "--dataset", tmp_path / "other", "--holdout", 2, "--output", "sr")
    assert "is not what the network was trained on" in stage(generate_sr, *flags).output
    assert scores_of(tmp_path / "sr")["lift"]["num_images"] == "2"


def test_a_folder_is_enlarged(stage, run, held_out, tmp_path):
    originals = originals_of(run)
    given = to_uint8(coarse(to_float(originals)))
    write_images(tmp_path / "small", given)
    flags = flags_of(held_out, run, "--input", "small")
    ended = stage(generate_sr, *flags, "--output", "big", "--batch_size", 3)
    assert "4 new with 4 network calls each" in ended.output and "grey levels at most" in ended.output
    assert "super-resolution: 4 of 4 images" in ended.notes
    made = torch.stack([read_png(tmp_path / f"big/{name}.png") for name in "abcd"])
    # They are those that are measured.
    stage(generate_sr, *flags_of(held_out, run, "--output", "sr", "--batch_size", 3))
    expected = scores_of(tmp_path / "sr")
    assert image_quality(made, originals).psnr.mean().item() == pytest.approx(
        float(expected["lift consistent"]["psnr"]), abs=1e-4
    )
    deviation = float(expected["lift consistent"]["mean_deviation"])
    assert mean_deviation(made, given).max().item() == pytest.approx(deviation, abs=1e-4)
    stage(generate_sr, *flags, "--no_consistency", "--batch_size", 3)
    folder = tmp_path / results_of("dual") / "super_resolution/lift_dual_timestep_1ep_raw_4_small"
    raw = [read_png(folder / f"{n}.png") for n in "abcd"]
    assert image_quality(torch.stack(raw), originals).psnr.mean().item() == pytest.approx(
        float(expected["lift"]["psnr"]), abs=1e-4
    )


def test_what_is_there_is_kept_unless_its_input_changed(stage, run, tmp_path):
    images = pixels_of(4, 8)
    write_images(tmp_path / "small", images[:2])
    flags = flags_of(run.lift, run, "--input", "small", "--output", "big", "--batch_size", 1)
    stage(generate_sr, *flags)
    times = {name: (tmp_path / f"big/{name}.png").stat().st_mtime_ns for name in "ab"}
    assert "all there already" in stage(generate_sr, *flags).output
    # Another image before the others changes none of them, and one that has changed is made again.
    before = read_png(tmp_path / "big/a.png")
    write_images(tmp_path / "small", images[2:], ("A", "b"))
    assert "2 new" in stage(generate_sr, *flags).output
    assert (tmp_path / "big/a.png").stat().st_mtime_ns == times["a"]
    assert (tmp_path / "big/b.png").stat().st_mtime_ns != times["b"]
    stage(generate_sr, *flags[:-4], "--output", "again", "--batch_size", 1)
    for name in ("A", "a", "b"):
        assert torch.equal(read_png(tmp_path / f"again/{name}.png"), read_png(tmp_path / f"big/{name}.png"))
    assert torch.equal(read_png(tmp_path / "again/a.png"), before)
    # An image that is gone keeps what was made of it, and --num_images takes some.
    (tmp_path / "big/b.png").unlink()
    assert "1 images in big: all there already" in stage(generate_sr, *flags, "--num_images", 1).output


def test_images_of_other_settings_are_replaced_on_demand(stage, refused, run, tmp_path):
    write_images(tmp_path / "small", pixels_of(2, 8))
    flags = flags_of(run.lift, run, "--input", "small", "--output", "big")
    stage(generate_sr, *flags)
    before = read_png(tmp_path / "big/a.png")
    refused(generate_sr, *flags, "--ema", says=("big", "weights_fingerprint", "--force"))
    refused(generate_sr, *flags, "--no_consistency", says=("another consistent",))
    (tmp_path / "small/b.png").unlink()
    stage(generate_sr, *flags, "--ema", "--force")
    assert not torch.equal(read_png(tmp_path / "big/a.png"), before) and not (tmp_path / "big/b.png").exists()
    write_images(tmp_path / "small", pixels_of(1, 8), "c")
    write_images(tmp_path / "big", pixels_of(1, 16), "c")
    refused(generate_sr, *flags, "--ema", says=("c.png", "was not made by this stage", "--force"))
    (tmp_path / "big/settings.json").write_text("[]")
    refused(generate_sr, *flags, "--ema", says=("settings.json is damaged", "--output"))


def test_grey_and_colour_become_what_the_model_takes(tmp_path):
    grey, colour = RNG.integers(0, 256, (8, 8), dtype=np.uint8), RNG.integers(0, 256, (8, 8, 4), dtype=np.uint8)
    Image.fromarray(grey).save(tmp_path / "grey.png")
    Image.fromarray(colour).save(tmp_path / "colour.png")
    (tmp_path / "notes.txt").write_text("no image")
    images = image_folder.read_folder(tmp_path, 8, 3)
    assert list(images) == ["colour", "grey"]
    alpha = colour[..., 3:] / 255
    on_white = np.rint(colour[..., :3] * alpha + 255 * (1 - alpha)).astype(np.uint8)
    np.testing.assert_array_equal(images["colour"], on_white.transpose(2, 0, 1))
    on_black = image_folder.read_folder(tmp_path, 8, 3, "black")["colour"]
    np.testing.assert_array_equal(on_black, np.rint(colour[..., :3] * alpha).transpose(2, 0, 1))
    np.testing.assert_array_equal(images["grey"], np.stack([grey] * 3))
    np.testing.assert_array_equal(image_folder.read_folder(tmp_path, 8, 1)["grey"], grey[None])
    assert image_folder.read_folder(tmp_path, 8, 1)["colour"].shape == (1, 8, 8)


def write_floats(folder):
    Image.fromarray(np.full((8, 8), 0.5, np.float32)).save(folder / "deep.tif")


def write_twins(folder):
    write_images(folder, pixels_of(1, 8))
    (folder / "a.bmp").write_bytes((folder / "a.png").read_bytes())


@pytest.mark.parametrize(
    ("prepare", "says"),
    [
        (lambda folder: None, ("holds no image", "8x8")),
        (lambda folder: folder.rmdir(), ("small is not a folder", "8x8")),
        (lambda folder: write_images(folder, pixels_of(1, 16)), ("a.png", "16x16 and not 8x8")),
        (lambda folder: (folder / "a.png").write_bytes(b"no picture"), ("a.png", "cannot be used")),
        (write_floats, ("deep.tif", "more than 16 bits")),
        (write_twins, ("a.png", "another image", "rename")),
    ],
)
def test_folders_that_cannot_be_enlarged_are_refused(refused, run, tmp_path, prepare, says):
    (tmp_path / "small").mkdir()
    prepare(tmp_path / "small")
    refused(generate_sr, *flags_of(run.lift, run, "--input", "small", "--output", "big"), says=says)


@pytest.mark.parametrize(
    ("flags", "status", "says"),
    [
        (["--output", "small", "--input", "small"], 1, ("is the folder of the input",)),
        (["--input", "small", "--num_images", 3], 1, ("--num_images 3", "2 images of small")),
        (["--num_images", 5, "--on", "train", "--limit", 4], 1, ("--num_images 5", "4 images")),
        ([], 1, ("none of 'synthetic'", "--holdout N", "--on train")),
        (["--holdout", 3], 1, ("was not trained without these 3 images",)),
        (["--start", 1000], 1, ("1000", "999")),
        (["--num_steps", 5000], 1, ("5000",)),
        (["--input", "small", "--on", "train"], 2, ("--on", "--input")),
        (["--no_consistency"], 2, ("--no_consistency",)),
        (["--eta", 2], 2, ("--eta",)),
    ],
)
def test_flags_that_make_no_sense_are_refused(refused, run, tmp_path, flags, status, says):
    load_images("synthetic", 16, run.cache, limit=4)
    write_images(tmp_path / "small", pixels_of(2, 8))
    refused(generate_sr, *flags_of(run.lift, run, *flags), says=says, status=status)


def test_a_model_with_one_clock_is_refused(refused, run):
    says = (run.baseline, "'baseline' model", "two clocks")
    refused(generate_sr, *flags_of(run.baseline, run, "--on", "train"), says=says)


def test_images_of_other_channels_are_refused(refused, run, tmp_path):
    write_images(tmp_path / "grey", pixels_of(4, 16, 1))
    load_images(str(tmp_path / "grey"), 16, run.cache)
    flags = flags_of(run.lift, run, "--dataset", tmp_path / "grey", "--on", "train")
    refused(generate_sr, *flags, says=("1 channel(s)", run.lift, "--dataset"))


def test_a_missing_package_is_said_before_sampling(refused, run, monkeypatch):
    monkeypatch.setitem(sys.modules, "torchmetrics.functional.image", None)
    monkeypatch.setattr(generate_sr, "super_resolve", lambda *args: pytest.fail("sampled"))
    refused(generate_sr, *flags_of(run.lift, run, "--on", "train"), says=("pip install torchmetrics",))


def test_help_shows_the_commands(stage, refused):
    output = stage(generate_sr, "--help").output
    assert output.startswith("usage: generate_sr.py") and generate_sr.__doc__.strip().splitlines()[0] in output
    refused(generate_sr, "--no_such_flag", says=(), status=2)
