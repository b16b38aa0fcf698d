"""Latents of Gaussian images against closed forms, the way there and back, and files of latents."""

import json
import math

import numpy as np
import pytest
import torch

from diffusion.adaptive import Ode
from diffusion.latents import Latents, decode, load_latents, save_latents
from diffusion.likelihood import encode
from diffusion.sampler import SeededNoise, sample, scale_shapes
from diffusion.solvers import make_solver
from images.representation import OVERCOMPLETE, RESIDUAL
from model import LIFTDualTimestepModel
from paths.path import Path
from scheduler import DDIMScheduler, prediction_from
from truth.gaussian import GaussianDenoiser

ONE, TWO = Path([(999,), (0,)], "test", {}), Path([(999, 999), (0, 0)], "test", {})
COARSE_FIRST = Path([(999, 999), (900, 300), (600, 0), (0, 0)], "test", {})
LATER = Path([(800, 900), (800, 500), (0, 0)], "test", {})
# What networks predict, in every process; flow ends half a timestep inside.
PROCESSES = [
    ("cosine", "v"),
    ("linear", "epsilon"),
    ("sub_vp_linear", "score"),
    ("ve", "epsilon"),
    ("flow", "velocity"),
]


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


def scheduler_of(schedule, prediction, representation="overcomplete"):
    return DDIMScheduler(beta_schedule=schedule, prediction_type=prediction, representation=representation)


class Pixels:
    """The exact denoiser of images [1, 8, 8] of one scale whose pixels are independent Gaussians."""

    def __init__(self, scheduler):
        self.scheduler = scheduler
        self.variances = 10 ** (2 * torch.rand(1, 8, 8, generator=rng(4)).double() - 1.5)
        self.mean = torch.randn(1, 8, 8, generator=rng(5)).double() / 2

    def draw(self, count):
        return self.mean + self.variances.sqrt() * torch.randn(count, 1, 8, 8, generator=rng(6)).double()

    def denoise(self, xs, ts):
        [x], [t] = xs, ts
        curves = self.scheduler.curves(t.double())
        curves = type(curves)(*(each.view(-1, 1, 1, 1) for each in curves))
        x, spread = x.double(), curves.alpha**2 * self.variances + curves.sigma**2
        x0 = self.mean + curves.alpha * self.variances / spread * (x - curves.alpha * self.mean)
        found = prediction_from(self.scheduler.prediction_type, x0, (x - curves.alpha * x0) / curves.sigma, curves)
        return (found.to(xs[0].dtype),)


def latent_of(scheduler, images, mean, variances, start=999):
    """The latent of independent modes: the way up keeps what a mode is in deviations of its marginal at each time.

    That has mean alpha m and variance alpha² s + sigma²; walks begin at alpha_0 x, where the deviation is not that of
    the image, and end where the prior has its size.
    """
    first = scheduler.inside(torch.zeros(1, dtype=torch.float64))
    begin, end = scheduler.curves(first), scheduler.curves(torch.tensor([float(start)], dtype=torch.float64))
    deviation = (end.alpha**2 * variances + end.sigma**2).sqrt() / (begin.alpha**2 * variances + begin.sigma**2).sqrt()
    z = end.alpha * mean + deviation * begin.alpha * (images - mean)
    return z / scheduler.prior(torch.ones(1, dtype=torch.float64), start)


def worst(one, other):
    return (one.double() - other.double()).abs().max().item()


@pytest.mark.parametrize("schedule, prediction", PROCESSES)
def test_one_scale_has_the_latents_of_the_closed_form_and_comes_back(schedule, prediction):
    truth = Pixels(scheduler_of(schedule, prediction))
    images = truth.draw(3)
    expected = latent_of(truth.scheduler, images, truth.mean, truth.variances)
    there, back = [], []
    for tolerance in (1e-3, 1e-5, 1e-7):
        encoded = encode(truth.denoise, truth.scheduler, ONE, (images,), tolerance)
        there.append(worst(encoded.latents[0], expected))
        decoded = decode(truth.denoise, truth.scheduler, ONE, encoded.latents, Ode(tolerance))
        back.append(worst(decoded.images, images))
        assert decoded.nfe.shape == encoded.nfe.shape == (3,) and (decoded.nfe > 7).all()
    # Log SNR between whole timesteps has kinks, which costs orders of the method.
    assert there[0] > 4 * there[1] > 8 * there[2] and there[1] < 2e-3 and there[2] < 5e-4
    assert back[0] > 2 * back[1] > 3 * back[2] and back[1] < 5e-3 and back[2] < 1e-4


@pytest.mark.parametrize("representation", ["residual", "overcomplete"])
@pytest.mark.parametrize("path", [TWO, COARSE_FIRST, LATER], ids=["diagonal", "coarse first", "later start"])
@pytest.mark.parametrize("schedule, prediction", [("cosine", "v"), ("ve", "x0"), ("flow", "velocity")])
def test_pairs_come_back_along_any_path(representation, path, schedule, prediction):
    """The over-complete pair too, whose images have no density: a pair has latents."""
    if schedule == "flow" and path is COARSE_FIRST:
        pytest.skip("a coarse image that has come to timestep 0 of flow is known, to which a Gaussian has no answer")
    scheduler = scheduler_of(schedule, prediction, representation)
    spread = 10 ** (2 * torch.rand(4, 1, 4, 4, generator=rng(4)).double() - 1.5)
    truth = GaussianDenoiser(scheduler, spread[0], spread[1:])
    images, errors = truth.draw(3, rng(6)), []
    pair = {"residual": RESIDUAL, "overcomplete": OVERCOMPLETE}[representation].split(images)
    for tolerance in (1e-3, 1e-5, 1e-7):
        encoded = encode(truth.denoise, scheduler, path, pair, tolerance)
        decoded = decode(truth.denoise, scheduler, path, encoded.latents, Ode(tolerance))
        errors.append(worst(decoded.images, images))
    assert [x.shape[1:] for x in encoded.latents] == [(1, 8, 8), (1, 4, 4)]
    assert errors[0] > 3 * errors[1] > 4 * errors[2] and errors[2] < 2e-4


def test_a_network_brings_images_back_in_flow_where_the_coarse_one_comes_first(network):
    """It waits at timestep 0, and on the way up half a timestep before: up to noise of 1/1998 the same."""
    scheduler = scheduler_of("flow", "velocity")
    images = torch.rand(2, 1, 8, 8, generator=rng()) * 2 - 1
    encoded = encode(network.denoise, scheduler, COARSE_FIRST, OVERCOMPLETE.split(images), 1e-7)
    assert worst(decode(network.denoise, scheduler, COARSE_FIRST, encoded.latents, Ode(1e-7)).images, images) < 2e-3


def test_both_scales_of_the_residual_pair_have_latents_of_their_own_clock():
    """White images, of which every detail and every 2x2 mean is independent of the others."""
    scheduler = scheduler_of("cosine", "v", "residual")
    low = torch.full((1, 4, 4), 0.25)
    truth = GaussianDenoiser(scheduler, low, low.expand(3, -1, -1, -1))
    images = truth.draw(2, rng(6))
    fine, coarse = RESIDUAL.split(images)
    found = encode(truth.denoise, scheduler, COARSE_FIRST, (fine, coarse), 1e-7).latents
    quarter = torch.tensor(0.25, dtype=torch.float64)
    assert worst(found[0], latent_of(scheduler, fine, 0 * fine, quarter)) < 1e-4
    # A mean of four has a quarter of the variance.
    assert worst(found[1], latent_of(scheduler, coarse, 0 * coarse, quarter / 4)) < 1e-4


@pytest.fixture(scope="module")
def network():
    torch.manual_seed(0)
    return LIFTDualTimestepModel(hidden_dims=(8,), channels=1).eval().requires_grad_(False)


def test_samples_by_ode_have_the_noise_they_were_made_from_as_latents(network):
    scheduler = scheduler_of("cosine", "v")
    noise = [SeededNoise([3, 4]).draw(shape) for shape in scale_shapes(2, 1, 8)]
    solver = Ode(1e-6)
    made = sample(network.denoise, scheduler.unclamped(), TWO, noise, end="t0", solver=solver).images
    pair = tuple(x / scheduler.alphas[0].item() for x in made)
    found = encode(network.denoise, scheduler, TWO, pair, 1e-6)
    for latent, drawn in zip(found.latents, noise, strict=True):
        assert worst(latent, drawn) < 1e-3
    decoded = decode(network.denoise, scheduler, TWO, tuple(noise), Ode(1e-6))
    assert torch.equal(decoded.images, pair[0]) and torch.equal(decoded.nfe, torch.from_numpy(solver.spent.spent))


def test_an_image_comes_back_in_any_company():
    truth = Pixels(scheduler_of("cosine", "v"))
    images = truth.draw(5)
    together = encode(truth.denoise, truth.scheduler, ONE, (images,), 1e-4)
    back = decode(truth.denoise, truth.scheduler, ONE, together.latents, Ode(1e-4))
    for rows in ([2], [4, 0]):
        alone = encode(truth.denoise, truth.scheduler, ONE, (images[rows],), 1e-4)
        assert torch.equal(alone.latents[0], together.latents[0][rows])
        assert torch.equal(alone.nfe, together.nfe[rows])
        again = decode(truth.denoise, truth.scheduler, ONE, alone.latents, Ode(1e-4))
        assert torch.equal(again.images, back.images[rows]) and torch.equal(again.nfe, back.nfe[rows])


def test_images_outside_the_range_come_back_as_nothing_is_clamped():
    truth = Pixels(scheduler_of("cosine", "v"))
    images = truth.draw(2) + 3
    encoded = encode(truth.denoise, truth.scheduler, ONE, (images,), 1e-6)
    assert worst(decode(truth.denoise, truth.scheduler, ONE, encoded.latents, Ode(1e-6)).images, images) < 3e-3
    clamped = sample(truth.denoise, truth.scheduler, ONE, encoded.latents, end="t0", solver=Ode(1e-6)).images[0]
    assert worst(clamped, images) > 0.5 and truth.scheduler.clip_sample
    # The last call of the other end takes noise of timestep 0 away.
    ended = decode(truth.denoise, truth.scheduler, ONE, encoded.latents, Ode(1e-6), end="clean")
    assert 3e-3 < worst(ended.images, images) < 0.1 and (ended.nfe > 8).all()


def test_any_solver_decodes():
    truth = Pixels(scheduler_of("cosine", "v"))
    images, path = truth.draw(2), Path([(t,) for t in (999, 900, 700, 500, 300, 100, 0)], "test", {})
    latents = encode(truth.denoise, truth.scheduler, ONE, (images,), 1e-6).latents
    for name in ("ddim", "heun", "ancestral"):
        draw = SeededNoise([1, 2]).draw
        solver = make_solver(name)
        found = decode(truth.denoise, truth.scheduler, path, latents, solver, end="clean", draw=draw)
        assert found.nfe.tolist() == [solver.calls(6)] * 2
        draw = SeededNoise([1, 2]).draw
        plain = sample(truth.denoise, truth.scheduler.unclamped(), path, latents, draw=draw, solver=make_solver(name))
        assert torch.equal(found.images, plain.images[0])


# Files


def some_latents(count=3):
    scales = torch.randn(count, 3, 8, 8, generator=rng()), torch.randn(count, 3, 4, 4, generator=rng(1))
    made_by = {"weights_fingerprint": "w", "path_fingerprint": "p", "tolerance": 1e-4}
    names = ("a", "é\udcff", "x" * 200)[:count]
    return Latents(scales, names, made_by, ("1", "2", "3")[:count], {"calls_up": (1.0, 2.0, 3.0)[:count]})


def same(one, other):
    assert all(torch.equal(x, y) for x, y in zip(one.scales, other.scales, strict=True))
    assert [x.dtype for x in one.scales] == [torch.float32] * len(one.scales)
    assert (one.names, one.settings, one.fingerprints) == (other.names, other.settings, other.fingerprints)
    assert one.measured == other.measured


def test_files_hold_latents_as_they_are(tmp_path):
    latents = some_latents()
    save_latents(tmp_path / "a.npz", latents)
    same(load_latents(tmp_path / "a.npz"), latents)
    one = Latents(latents.scales[:1], latents.names, latents.settings)
    save_latents(tmp_path / "one.npz", one)
    same(load_latents(tmp_path / "one.npz"), one)
    # As the page says to edit them.
    content = dict(np.load(tmp_path / "a.npz"))
    content["fine"] = -content["fine"].astype(np.float64)
    np.savez(tmp_path / "edited.npz", **content)
    edited = load_latents(tmp_path / "edited.npz")
    assert torch.equal(edited.scales[0], -latents.scales[0]) and edited.names == latents.names


def test_rows_join_and_replace_others():
    latents = some_latents()
    first, other = latents.row(0), some_latents(1)
    changed = Latents((other.scales[0] + 1, other.scales[1]), ("a",), latents.settings, ("9",), {"calls_up": (9.0,)})
    same(first.with_others(latents.row(1)).with_others(latents.row(2)), latents)
    joined = latents.with_others(changed)
    assert joined.names == ("é\udcff", "x" * 200, "a") and joined.fingerprints == ("2", "3", "9")
    assert joined.measured == {"calls_up": (2.0, 3.0, 9.0)} and torch.equal(joined.scales[0][2:], changed.scales[0])


@pytest.mark.parametrize(
    "change, says",
    [
        (lambda c: c.pop("names"), "names"),
        (lambda c: c.pop("fine") is c.pop("coarse"), "it lacks latents"),
        (lambda c: c.update(fine=c["fine"][0]), "it lacks latents"),
        (lambda c: c.update(fine=c["fine"][:2]), "it has 3 names and 2 fine"),
        (lambda c: c.update(coarse=c["coarse"][:2]), "it has 3 names and 2 coarse"),
        (lambda c: c.update(names=np.array(json.dumps(["a", "a", "b"]))), "two images have one name"),
        (lambda c: c.update(names=np.array(json.dumps(["a", "../b", "c"]))), "'../b' is no name"),
        (lambda c: c.update(settings=np.array("{}")), "what made them"),
        (lambda c: c.update(fine=c["fine"] * math.nan), "NaN or infinite"),
        (lambda c: c.update(fine=np.array([object()])), "ValueError|pickle"),
    ],
)
def test_other_files_are_refused(tmp_path, change, says):
    save_latents(tmp_path / "a.npz", some_latents())
    content = dict(np.load(tmp_path / "a.npz"))
    change(content)
    np.savez(tmp_path / "a.npz", **content)
    with pytest.raises(ValueError, match=rf"a\.npz .*({says}).*; write it again"):
        load_latents(tmp_path / "a.npz")


def test_damaged_files_are_refused(tmp_path):
    file = tmp_path / "a.npz"
    save_latents(file, some_latents())
    whole = file.read_bytes()
    flipped = bytearray(whole)
    flipped[len(whole) // 3] ^= 255
    for content in (b"", b"text", whole[: len(whole) // 2], bytes(flipped)):
        file.write_bytes(content)
        with pytest.raises(ValueError, match=r"a\.npz is damaged or no file of latents \(.*\); remove it\.$"):
            load_latents(file, "remove it")
    with pytest.raises(FileNotFoundError, match=r"b\.npz does not exist; write one with encode\.py"):
        load_latents(tmp_path / "b.npz")
