"""Latents are what an autoencoder says they are, kept once, and sampling in them is sampling in pixels, rotated."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from autoencoders import save_autoencoder
from checkpoint import LoadedModel, build_scheduler
from data import ImageSet, fingerprint_array, to_float
from diffusion import space as spaces
from diffusion.sampler import sample
from diffusion.space import LatentSpace, PixelSpace, open_space, side_of
from evaluation.scoring import generate
from networks.autoencoder import Autoencoder, load_autoencoder
from paths.families import diagonal
from runtime.distributed import Processes
from training.latent_batches import LatentBatches
from training.objective import step_generator
from truth.ideal import EmpiricalDenoiser

CPU = torch.device("cpu")


class Rotation(nn.Module):
    """An exact orthogonal transform of P x P patches, with the interface of AutoencoderKL."""

    def __init__(self, patch=2, channels=3, scaling=1.0, shift=0.0, deviation=0.0, seed=0):
        super().__init__()
        size = channels * patch * patch
        matrix = torch.randn(size, size, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
        kernel = torch.linalg.qr(matrix).Q.float().view(size, channels, patch, patch)
        self.register_buffer("kernel", kernel)
        self.patch, self.deviation = patch, deviation
        self.config = {
            "in_channels": channels, "out_channels": channels, "latent_channels": size,
            "block_out_channels": (8,) * patch.bit_length(), "scaling_factor": scaling, "shift_factor": shift,
        }  # fmt: skip

    def encode(self, x):
        mean = nn.functional.conv2d(x, self.kernel, stride=self.patch)
        return SimpleNamespace(latent_dist=SimpleNamespace(mean=mean, std=torch.full_like(mean, self.deviation)))

    def decode(self, z):
        return SimpleNamespace(sample=nn.functional.conv_transpose2d(z, self.kernel, stride=self.patch))


def rotation(**options):
    return Autoencoder(Rotation(**options), "by hand")


def random_images(count, channels=3, side=16, seed=0):
    pixels = np.random.default_rng(seed).integers(0, 256, (count, channels, side, side), np.uint8)
    return ImageSet(pixels, "noise", fingerprint_array(pixels))


def config_of(space, **more):
    config = {"num_train_timesteps": 1000, "beta_schedule": "cosine", "prediction_type": "v", "resolution": 16}
    return config | {"latents": "by hand"} | space.said() | more


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Folders of tiny random autoencoders: one, and one of other weights, which halve twice; one within another."""
    folder = tmp_path_factory.mktemp("autoencoders")
    for seed, (name, levels) in enumerate({"one": 2, "other": 2, "deep": 3, "whole/vae": 2}.items()):
        save_autoencoder(folder / name, seed, levels, shift_factor=0.1 if name == "deep" else None)
    return folder


@pytest.mark.parametrize("name", ["one", "deep", "whole:vae"])
def test_it_is_what_diffusers_computes(folder, name):
    from diffusers import AutoencoderKL

    random_state = torch.get_rng_state()
    ours = load_autoencoder(str(folder / name))
    assert torch.equal(torch.get_rng_state(), random_state)
    theirs = AutoencoderKL.from_pretrained(folder / name.replace(":", "/")).eval()
    x = torch.rand(3, 3, 16, 16) * 2 - 1
    with torch.no_grad():
        distribution = theirs.encode(x).latent_dist
        back = theirs.decode(distribution.mean).sample
    with torch.autocast("cpu", torch.bfloat16):  # Which is left aside.
        mean, deviation = ours.posterior(x)
        image = ours.decode(mean, 3)
    torch.testing.assert_close(mean, distribution.mean, rtol=0, atol=0)
    torch.testing.assert_close(deviation, distribution.std, rtol=0, atol=0)
    torch.testing.assert_close(image, back, rtol=0, atol=0)
    assert not (mean.requires_grad or image.requires_grad)
    assert (ours.channels, ours.downscale) == (4, 4 if name == "deep" else 2)
    assert mean.shape[1:] == (4, 16 // ours.downscale, 16 // ours.downscale)
    assert (ours.scaling, ours.shift) == (0.5, 0.1 if name == "deep" else 0.0)


def test_weights_have_a_name(folder):
    prints = [load_autoencoder(str(folder / name)).fingerprint for name in ("one", "other", "deep", "one")]
    assert len(set(prints)) == 3 and prints[0] == prints[3]


def test_latents_are_shifted_then_scaled_and_back(tmp_path):
    space = LatentSpace(rotation(scaling=0.25, shift=0.5, deviation=0.125), 3)
    images = random_images(3)
    posteriors = torch.from_numpy(np.array(space.posteriors(images, tmp_path)))
    mean = Rotation().encode(to_float(torch.from_numpy(images.pixels))).latent_dist.mean
    torch.testing.assert_close(posteriors[:, 0], mean)
    noise = torch.randn_like(mean)
    drawn = space.draw(posteriors, noise)
    torch.testing.assert_close(drawn, (mean + 0.125 * noise - 0.5) / 4)
    back = space.draw(posteriors, torch.zeros_like(noise))
    torch.testing.assert_close(space.decode(back), to_float(torch.from_numpy(images.pixels)), rtol=0, atol=1e-5)
    assert np.array_equal(space.pixels(back).numpy(), images.pixels)
    # As it was scaled in training, whatever the autoencoder says by now.
    again = LatentSpace(rotation(scaling=9.0, shift=-3.0), 3, scaling=0.25, shift=0.5)
    assert np.array_equal(again.pixels(back).numpy(), images.pixels)


def test_nothing_is_clamped_or_rounded_on_the_way():
    x = torch.randn(9, 3, 16, 16) * 3
    space = LatentSpace(rotation(scaling=0.3, shift=0.2), 3)
    mean, _ = space.autoencoder.posterior(x)
    assert mean.abs().max() > 3
    torch.testing.assert_close(space.decode((mean - 0.2) * 0.3), x, rtol=0, atol=1e-5)
    config = config_of(space)
    assert not build_scheduler(config).clip_sample and build_scheduler(config | {"latents": None}).clip_sample
    assert side_of(config) == 8 and side_of({"resolution": 16}) == 16


class Ideal:
    """The ideal denoiser of finitely many images in one scale."""

    def __init__(self, scheduler, images):
        self.scheduler, self.images = scheduler, images

    def __call__(self, xs, ts, *labels):
        [x], [t] = xs, ts
        alpha, sigma = (each.double() for each in self.scheduler.scales(t, x.double()))
        apart = (x.double()[:, None] - alpha[:, None] * self.images.double()).flatten(2).square().sum(2)  # [B, M]
        weights = (-apart / (2 * sigma.flatten(1).square())).softmax(1)
        x0 = torch.einsum("bm,mchw->bchw", weights, self.images.double())
        noise = (x.double() - alpha * x0) / sigma
        return ((alpha * noise - sigma * x0).to(x),)


def test_sampling_in_latents_is_sampling_in_rotated_pixels(tmp_path):
    """The ideal denoiser of rotated images, from rotated noise, ends where that of the images does."""
    images, space = random_images(5), LatentSpace(rotation(), 3)
    latents = space.clean(images, np.arange(5), 0, tmp_path, CPU)
    x, noise = to_float(torch.from_numpy(images.pixels)), torch.randn(4, 3, 16, 16)
    assert latents.abs().max() > 1.5
    scheduler, path = build_scheduler(config_of(space)), diagonal(6, num_scales=1)
    made = sample(Ideal(scheduler, latents), scheduler, path, [space.autoencoder.posterior(noise)[0]]).images[0]
    expected = sample(Ideal(scheduler, x), scheduler, path, [noise]).images[0]
    torch.testing.assert_close(space.decode(made), expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("representation", ["overcomplete", "residual"])
def test_two_scales_of_latents_are_those_of_rotated_colours(tmp_path, representation):
    """The 2x2 mean commutes with a rotation of the colours of each pixel."""
    images, space = random_images(4), LatentSpace(rotation(patch=1), 3)
    latents = space.clean(images, np.arange(4), 0, tmp_path, CPU).double()
    x = to_float(torch.from_numpy(images.pixels)).double()
    noise = [torch.randn(3, 3, side, side).double() for side in (16, 8)]
    rotated = [space.autoencoder.posterior(each.float())[0].double() for each in noise]
    scheduler = build_scheduler(config_of(space, representation=representation))
    path = diagonal(5)
    made, expected = (
        sample(EmpiricalDenoiser(scheduler, data).denoise, scheduler, path, start).images[0]
        for data, start in ((latents, rotated), (x, noise))
    )
    torch.testing.assert_close(space.decode(made).double(), expected, rtol=0, atol=1e-4)


def test_generated_images_are_bytes_of_the_size_of_pixels(tmp_path, monkeypatch):
    """Of latents of training images, which are far outside of [-1, 1], those images come back."""
    autoencoder = rotation(scaling=2.0)
    images, space = random_images(3), LatentSpace(autoencoder, 3)
    latents = space.clean(images, np.arange(3), 0, tmp_path, CPU)
    monkeypatch.setattr(spaces, "_opened", lambda *_: autoencoder)
    config = config_of(space, weights="raw", epoch=1) | {"latents_is_here": False}
    scheduler = build_scheduler(config)
    network = nn.Linear(1, 1)
    network.num_scales, network.num_predictions, network.denoise = 1, 1, Ideal(scheduler, latents)
    loaded = LoadedModel(network, scheduler, config, "f" * 16, tmp_path / "model.pth")
    assert (loaded.side, loaded.image_shape) == (8, (3, 16, 16))
    made = generate(loaded, diagonal(20, num_scales=1), range(4), Processes("cpu"), batch_size=3).pixels.numpy()
    assert made.dtype == np.uint8 and made.shape == (4, 3, 16, 16)
    nearest = np.abs(made[:, None].astype(int) - images.pixels.astype(int)).max((2, 3, 4)).min(1)
    assert (nearest <= 1).all()


def batches_of(space, images, tmp_path, **options):
    return LatentBatches(space, tmp_path, images, 4, 7, CPU, **options)


def test_draws_have_the_mean_and_deviation_that_the_autoencoder_says(folder, tmp_path):
    space, images, count = LatentSpace(load_autoencoder(str(folder / "one")), 3), random_images(4), 600
    batches = batches_of(space, images, tmp_path)
    rows = torch.tensor([2, 0])
    drawn = torch.stack([batches.clean(rows, step) for step in range(count)]).double()  # [S, 2, c, r, r]
    mean, deviation = space.autoencoder.posterior(to_float(torch.from_numpy(images.pixels[[2, 0]])))
    mean, deviation = mean.double() * 0.5, deviation.double() * 0.5
    assert deviation.min() > 0.01
    z = (drawn.mean(0) - mean) / (deviation / count**0.5)
    assert z.abs().max() < 5 and abs(z.square().mean() - 1) < 0.2
    ratio = drawn.std(0) / deviation
    assert (ratio - 1).abs().max() < 5 / (2 * count) ** 0.5 and abs(ratio.mean() - 1) < 0.01
    # Of other numbers than noise and timesteps, the same at the same step of the same run.
    assert torch.equal(batches.clean(rows, 3), batches.clean(rows, 3))
    noise = torch.randn((2, 4, 8, 8), generator=step_generator(7, 3, CPU))
    draw = (batches.clean(rows, 3) - mean) / deviation
    assert abs((draw * noise).mean()) < 0.2 and not torch.equal(batches.clean(rows, 3), batches.clean(rows, 4))


def test_batches_are_latents_and_their_means_with_labels(tmp_path):
    images, space = random_images(11), LatentSpace(rotation(), 3)
    batches = batches_of(space, images, tmp_path, labels=np.arange(11), flip=True)
    assert len(batches) == 2 and batches.nbytes == 2 * 11 * 2 * 12 * 8 * 8 * 4
    back, mirrored = [], 0
    for x_64, x_32, labels in batches.epoch(1):
        torch.testing.assert_close(x_32, x_64.unfold(2, 2, 2).unfold(3, 2, 2).mean((4, 5)))
        for pixels, label in zip(space.pixels(x_64).numpy(), labels.tolist(), strict=True):
            turned = images.pixels[label][..., ::-1]
            mirrored += np.array_equal(pixels, turned)
            assert np.array_equal(pixels, images.pixels[label]) or np.array_equal(pixels, turned)
            back.append(label)
    assert len(set(back)) == 8 and 0 < mirrored < 8
    again = [labels for *_, labels in batches.epoch(1, first_batch=1)]
    assert again[0].tolist() == back[4:]


def test_latents_are_encoded_once(folder, tmp_path, monkeypatch):
    images, calls = random_images(10), []
    spaces = {name: LatentSpace(load_autoencoder(str(folder / name)), 3) for name in ("one", "other")}
    for name, space in spaces.items():
        own = space.autoencoder.posterior
        monkeypatch.setattr(
            space.autoencoder, "posterior", lambda x, name=name, own=own: calls.append((name, len(x))) or own(x)
        )
    first = np.array(spaces["one"].posteriors(images, tmp_path))
    assert calls == [("one", 8), ("one", 2)]
    again = spaces["one"].posteriors(images, tmp_path)
    assert len(calls) == 2 and isinstance(again, np.memmap) and np.array_equal(first, again)
    assert not np.array_equal(spaces["other"].posteriors(images, tmp_path), first) and len(calls) == 4
    assert not np.array_equal(spaces["one"].posteriors(images, tmp_path, mirrored=True), first)
    spaces["one"].posteriors(random_images(10, seed=1), tmp_path)
    assert len(calls) == 8
    # What is damaged is encoded again, to the same bits.
    [file] = tmp_path.glob(f"latents_{images.fingerprint}_{spaces['one'].autoencoder.fingerprint}.npy")
    file.write_bytes(file.read_bytes()[:-100])
    assert np.array_equal(spaces["one"].posteriors(images, tmp_path), first) and len(calls) == 10


def test_grey_images_are_three_equal_colours_and_the_mean_of_three(tmp_path):
    images, space = random_images(3, channels=1), LatentSpace(rotation(), 1)
    x = to_float(torch.from_numpy(images.pixels))
    latents = space.clean(images, np.arange(3), 0, tmp_path, CPU)
    torch.testing.assert_close(latents, Rotation().encode(x.repeat(1, 3, 1, 1)).latent_dist.mean)
    assert np.array_equal(space.pixels(latents).numpy(), images.pixels)
    coloured = Rotation().decode(torch.randn(2, 12, 8, 8)).sample
    latents, _ = space.autoencoder.posterior(coloured)
    torch.testing.assert_close(space.decode(latents), coloured.mean(1, keepdim=True), rtol=0, atol=1e-5)
    grey = LatentSpace(rotation(channels=1), 1)
    latents = grey.clean(images, np.arange(3), 0, tmp_path, CPU)
    assert latents.shape == (3, 4, 8, 8) and np.array_equal(grey.pixels(latents).numpy(), images.pixels)
    with pytest.raises(ValueError, match="is one of grey images"):
        LatentSpace(rotation(channels=1), 3)


def test_an_image_whose_latent_is_not_finite_is_named(tmp_path):
    space, images = LatentSpace(rotation(), 3), random_images(3)
    own = space.autoencoder.posterior
    broken = to_float(torch.from_numpy(images.pixels[1]))
    space.autoencoder.posterior = lambda x: tuple(
        torch.where((x == broken).flatten(1).all(1)[:, None, None, None], torch.nan, part) for part in own(x)
    )
    with pytest.raises(ValueError, match="latent of image 1 of 'noise' NaN"):
        space.posteriors(images, tmp_path)
    assert not list(tmp_path.glob("*.npy"))


def test_a_model_of_pixels_has_no_other_space(tmp_path):
    images = random_images(3)
    space = open_space({"resolution": 16, "channels": 3}, "model.pth", CPU)
    assert isinstance(space, PixelSpace)
    x = space.clean(images, np.array([2, 0]), 0, tmp_path, CPU)
    assert torch.equal(x, to_float(torch.from_numpy(images.pixels[[2, 0]])))
    assert np.array_equal(space.pixels(x).numpy(), images.pixels[[2, 0]])


def altered(folder, tmp_path, change):
    """A copy of an autoencoder with something changed: a function of its folder and its config."""
    place = tmp_path / "altered"
    place.mkdir()
    for file in (folder / "one").iterdir():
        (place / file.name).write_bytes(file.read_bytes())
    config = json.loads((place / "config.json").read_text())
    change(place, config)
    if (place / "config.json").exists():
        (place / "config.json").write_text(json.dumps(config))
    return str(place)


WEIGHTS = "diffusion_pytorch_model.safetensors"
CHANGES = {
    "cut short": (lambda p, c: (p / WEIGHTS).write_bytes((p / WEIGHTS).read_bytes()[:5000]), "can be read"),
    "no weights": (lambda p, c: (p / WEIGHTS).unlink(), "can be read"),
    "no config": (lambda p, c: (p / "config.json").unlink(), "can be read"),
    "another class": (lambda p, c: c.update(_class_name="UNet2DModel"), "holds a UNet2DModel, not an AutoencoderKL"),
    "other sizes": (lambda p, c: c.update(latent_channels=8), "can be read"),
    "more layers": (lambda p, c: c.update(layers_per_block=2), "are not those of its config"),
    "no scaling": (lambda p, c: c.update(scaling_factor=0.0), "has a scaling_factor of 0.0"),
}


@pytest.mark.parametrize("name", CHANGES)
def test_what_is_no_autoencoder_is_refused(folder, tmp_path, name):
    change, says = CHANGES[name]
    with pytest.raises(ValueError, match=says) as caught:
        load_autoencoder(altered(folder, tmp_path, change))
    assert "\n" not in str(caught.value)


def test_weights_that_are_not_finite_are_refused(folder, tmp_path):
    from safetensors.torch import load_file, save_file

    def change(place, config):
        state = load_file(place / WEIGHTS)
        state["decoder.conv_in.bias"][0] = torch.nan
        save_file(state, place / WEIGHTS, {"format": "pt"})

    with pytest.raises(ValueError, match="weights that are not finite"):
        load_autoencoder(altered(folder, tmp_path, change))


def test_places_that_are_none_are_said(folder, monkeypatch):
    with pytest.raises(FileNotFoundError, match="is no folder"):
        load_autoencoder("./gone/with/it")
    with pytest.raises(RuntimeError, match="the hub did not give it"):  # There is no network in tests.
        load_autoencoder("nobody/nothing")
    with pytest.raises(ValueError, match="pass --latents .*whole:vae"):
        load_autoencoder(str(folder / "whole"))
    monkeypatch.setitem(__import__("sys").modules, "diffusers", None)
    with pytest.raises(RuntimeError, match="pip install diffusers"):
        load_autoencoder(str(folder / "one"))
