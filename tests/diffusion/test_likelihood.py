"""Likelihoods and latents of Gaussian images against closed forms, traces against matrices, and what is refused."""

import math

import numpy as np
import pytest
import torch

from diffusion.likelihood import bits_per_dim, dequantised, encode, log_likelihood
from diffusion.sampler import sample
from diffusion.solvers import make_solver
from images.representation import RESIDUAL
from model import LIFTDualTimestepModel, SingleTimestepModel
from paths.path import Path
from scheduler import DDIMScheduler, prediction_from
from truth.gaussian import GaussianDenoiser

# Processes with what networks predict in them. Only copies clamp nothing.
PROCESSES = [("linear", "epsilon"), ("cosine", "v"), ("cosine_zero_terminal", "x0"), ("linear", "velocity")]
PROCESSES += [("sub_vp_linear", "score"), ("ve", "epsilon"), ("flow", "velocity"), ("flow", "x0")]
ONE, TWO = Path([(999,), (0,)], "test", {}), Path([(999, 999), (0, 0)], "test", {})
PATHS = {
    "diagonal": TWO,
    "coarse first": Path([(999, 999), (900, 300), (600, 0), (0, 0)], "test", {}),
    "later start": Path([(800, 900), (800, 500), (0, 0)], "test", {}),
}
C, H, W = 1, 2, 4  # Of the pair.


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


def scheduler_of(schedule, prediction, representation="overcomplete"):
    return DDIMScheduler(beta_schedule=schedule, prediction_type=prediction, representation=representation)


class OneScale:
    """The exact denoiser of Gaussian images [C, H, W] of one scale, with a full covariance or one of pixels alone."""

    def __init__(self, scheduler, shape=(2, 2, 2), diagonal=False):
        count = math.prod(shape)
        self.scheduler, self.shape = scheduler, shape
        eye = torch.eye(count, dtype=torch.float64)
        self.basis = eye if diagonal else torch.linalg.qr(torch.randn(count, count, generator=rng(3)).double()).Q
        self.variances = 10 ** (2 * torch.rand(count, generator=rng(4)).double() - 1.5)
        self.mean = torch.randn(count, generator=rng(5)).double() / 2

    def draw(self, count, seed=6):
        modes = torch.randn(count, len(self.mean), generator=rng(seed)).double() * self.variances.sqrt()
        return (self.mean + modes @ self.basis).view(-1, *self.shape)

    def denoise(self, xs, ts):
        [x], [t] = xs, ts
        curves = self.scheduler.curves(t.double())
        curves = type(curves)(*(each[:, None] for each in curves))
        z = x.flatten(1).double()
        modes = (z - curves.alpha * self.mean) @ self.basis.T
        gain = curves.alpha * self.variances / (curves.alpha**2 * self.variances + curves.sigma**2)
        x0 = self.mean + (gain * modes) @ self.basis
        found = prediction_from(self.scheduler.prediction_type, x0, (z - curves.alpha * x0) / curves.sigma, curves)
        return (found.view_as(x).to(x.dtype),)

    def log_density(self, images, start=999):
        values = images.flatten(1).double() @ self.basis.T
        return density(self.scheduler, values, self.basis @ self.mean, self.variances, start)


class Pair:
    """The exact denoiser of Gaussian images of the residual pair, and their modes by a dense Haar basis."""

    def __init__(self, scheduler):
        self.scheduler = scheduler
        variances = 10 ** (2 * torch.rand(4, C, H // 2, W // 2, generator=rng(4)).double() - 1.5)
        self.mean = torch.randn(C, H, W, generator=rng(5)).double() / 2
        self.model = GaussianDenoiser(scheduler, variances[0], variances[1:], mean=self.mean)
        self.variances, self.denoise = variances.flatten(), self.model.denoise
        patterns = [[[1, 1], [1, 1]], [[1, -1], [1, -1]], [[1, 1], [-1, -1]], [[1, -1], [-1, 1]]]
        rows = [np.kron(cosine, np.array(p) / 2).ravel() for p in patterns for cosine in ([[1, 1]], [[1, -1]])]
        self.basis = torch.from_numpy(np.array(rows)) / math.sqrt(2)

    def log_density(self, images, starts=(999, 999)):
        """Of the image: low modes are those of the coarse image with its clock, but twice as large."""
        values, means = images.flatten(1) @ self.basis.T, self.basis @ self.mean.flatten()
        low, s = density(self.scheduler, values[:, :2] / 2, means[:2] / 2, self.variances[:2] / 4, starts[1]), 6
        high = density(self.scheduler, values[:, 2:], means[2:], self.variances[2:], starts[0])
        assert values.shape[1] == 2 + s
        return low - 2 * math.log(2) + high


def density(scheduler, values, means, variances, start):
    """log p of independent modes under the model: the map of each from timestep 0 to the start, and the prior there."""
    first = scheduler.inside(torch.zeros(1, dtype=torch.float64))
    (alpha, sigma), (alpha_end, sigma_end) = (
        (curves.alpha.item(), curves.sigma.item())
        for curves in map(scheduler.curves, (first, torch.tensor([float(start)], dtype=torch.float64)))
    )
    stretch = torch.hypot(alpha_end * variances.sqrt(), torch.tensor(sigma_end)) / torch.hypot(
        alpha * variances.sqrt(), torch.tensor(sigma)
    )
    z = alpha_end * means + stretch * alpha * (values - means)
    size = {"vp": 1.0, "ve": sigma_end}.get(scheduler.process, math.hypot(alpha_end, sigma_end))
    log_prior = -((z / size) ** 2) / 2 - math.log(size) - math.log(2 * math.pi) / 2
    return (log_prior + (stretch * alpha).log()).sum(1)


def test_the_density_of_the_test_is_that_of_the_data_where_noise_is_nothing():
    """The reference by itself: with little noise at timestep 0 and none of the image at the last it is a Gaussian."""
    truth = OneScale(scheduler_of("flow", "velocity"))
    images = truth.draw(4)
    covariance = truth.basis.T @ torch.diag(truth.variances) @ truth.basis
    expected = torch.distributions.MultivariateNormal(truth.mean, covariance).log_prob(images.flatten(1))
    torch.testing.assert_close(truth.log_density(images), expected, rtol=0, atol=1e-2)


@pytest.mark.parametrize("schedule, prediction", PROCESSES)
def test_one_scale_has_the_density_of_the_closed_form(schedule, prediction):
    truth, errors = OneScale(scheduler_of(schedule, prediction)), []
    images = truth.draw(3)
    for tolerance in (1e-3, 1e-7):
        found = log_likelihood(truth.denoise, truth.scheduler, ONE, (images,), None, tolerance=tolerance)
        errors.append((found.log_likelihood - truth.log_density(images)).abs().max().item() / truth.variances.numel())
    assert found.log_likelihood.dtype == torch.float64 and found.nfe.dtype == torch.int64
    assert errors[0] < 0.05 and errors[1] < 5e-5 and errors[1] < errors[0] / 5


@pytest.mark.parametrize("schedule, prediction", PROCESSES)
@pytest.mark.parametrize("path", PATHS.values(), ids=PATHS)
def test_the_residual_pair_has_the_density_of_its_image(schedule, prediction, path):
    """With two clocks, whichever way they go: the scales of Gaussian images of this pair are independent."""
    scheduler = scheduler_of(schedule, prediction, "residual")
    truth, errors = Pair(scheduler), []
    images = truth.model.draw(3, rng(6))
    for tolerance in (1e-3, 1e-7):
        found = log_likelihood(truth.denoise, scheduler, path, RESIDUAL.split(images), None, tolerance=tolerance)
        expected = truth.log_density(images, path.points[0])
        errors.append((found.log_likelihood - expected).abs().max().item() / images[0].numel())
    assert errors[0] < 0.05 and errors[1] < 5e-5 and errors[1] < errors[0] / 5


def test_the_density_of_the_pair_is_that_of_the_same_images_at_one_scale():
    """White images, of which both models are exact: the same density of the image, whatever it is split into."""
    both = []
    for representation in ("overcomplete", "residual"):
        scheduler = scheduler_of("flow", "velocity", representation)
        images = torch.randn(2, C, H, W, generator=rng(1)).double() / 2
        if representation == "residual":
            spread = torch.full((C, H // 2, W // 2), 0.25)
            denoise, path = GaussianDenoiser(scheduler, spread, spread.expand(3, -1, -1, -1)).denoise, TWO
            scales = RESIDUAL.split(images)
        else:
            truth = OneScale(scheduler, (C, H, W))
            truth.mean, truth.variances = truth.mean * 0, torch.full_like(truth.variances, 0.25)
            denoise, path, scales = truth.denoise, ONE, (images,)
        both.append(log_likelihood(denoise, scheduler, path, scales, None, tolerance=1e-6).log_likelihood)
    expected = torch.distributions.Normal(0, 0.5).log_prob(images).flatten(1).sum(1)
    torch.testing.assert_close(both[0], both[1], rtol=0, atol=1e-3)
    torch.testing.assert_close(both[0], expected, rtol=0, atol=1e-3)


def test_one_probe_is_exact_for_diagonal_jacobians():
    """vᵀ J v is the trace for v of +1 and -1, which normal directions would miss."""
    truth = OneScale(scheduler_of("cosine", "v"), (1, 8, 8), diagonal=True)
    images = truth.draw(3)
    for probes, seeds in ((1, [1, 2, 3]), (2, [7, 8, 9])):
        found = log_likelihood(truth.denoise, truth.scheduler, ONE, (images,), probes, seeds, tolerance=1e-6)
        torch.testing.assert_close(found.log_likelihood, truth.log_density(images), rtol=0, atol=64 * 2e-4)


def test_one_probe_is_exact_for_details_of_one_variance():
    """The directions of the subspace have coordinates of +1 and -1 there, so that their length is no chance."""
    scheduler = scheduler_of("cosine", "v", "residual")
    low, high = torch.full((2, 4, 4), 2.0), torch.full((3, 2, 4, 4), 0.05)
    denoiser = GaussianDenoiser(scheduler, low, high)
    scales = RESIDUAL.split(denoiser.draw(2, rng(6)))
    exact, probed = (
        log_likelihood(denoiser.denoise, scheduler, TWO, scales, probes, tolerance=1e-5).log_likelihood
        for probes in (None, 1)
    )
    torch.testing.assert_close(probed, exact, rtol=0, atol=1e-4)


def test_probes_have_the_exact_trace_in_expectation():
    truth = OneScale(scheduler_of("flow", "velocity"))
    images = truth.draw(1)
    exact = log_likelihood(truth.denoise, truth.scheduler, ONE, (images,), None).log_likelihood
    many = images.expand(256, -1, -1, -1)
    found = log_likelihood(truth.denoise, truth.scheduler, ONE, (many,), 4, range(256)).log_likelihood
    error = found.std() / 16
    assert 0.01 < error and (found.mean() - exact).abs() < 3.5 * error
    single = log_likelihood(truth.denoise, truth.scheduler, ONE, (many,), 1, range(256)).log_likelihood
    assert 1.6 < single.std() / found.std() < 2.4  # Four probes halve the deviation.


class Linear:
    """A network whose clean image is a matrix times the noisy one, at all times."""

    def __init__(self, matrix):
        self.matrix = matrix

    def denoise(self, xs, ts):
        return ((xs[0].flatten(1) @ self.matrix.T).view_as(xs[0]),)


def test_the_trace_of_a_linear_network():
    """In ve dz = (z - M z) dlog σ, so that ∫ div = (D - tr M) log(σ_T / σ_0), and latents follow by the exponential."""
    scheduler = scheduler_of("ve", "x0")
    matrix = torch.randn(8, 8, generator=rng(2)).double() / 8
    images = torch.randn(2, 2, 2, 2, generator=rng(1)).double()
    found = log_likelihood(Linear(matrix).denoise, scheduler, ONE, (images,), None, tolerance=1e-8)
    ratio = math.log((scheduler.sigmas[-1] / scheduler.sigmas[0]).item())
    flow = torch.linalg.matrix_exp((torch.eye(8).double() - matrix) * ratio) / scheduler.sigmas[-1]
    latents = images.flatten(1) @ flow.T
    torch.testing.assert_close(found.latents[0].flatten(1), latents, rtol=1e-4, atol=1e-5)
    ends = found.latents[0].flatten(1) * scheduler.sigmas[-1]
    prior = torch.distributions.Normal(0, scheduler.sigmas[-1]).log_prob(ends).sum(1)
    expected = prior + (8 - matrix.trace()) * ratio
    torch.testing.assert_close(found.log_likelihood, expected, rtol=1e-12, atol=1e-5)


@pytest.mark.parametrize("probes", [None, 2])
def test_an_image_depends_on_itself_and_its_seed_alone(probes):
    scheduler = scheduler_of("cosine", "v", "residual")
    truth = Pair(scheduler)
    images, seeds = truth.model.draw(5, rng(6)), [5, 3, 8, 0, 1]
    together = log_likelihood(truth.denoise, scheduler, TWO, RESIDUAL.split(images), probes, seeds)
    for rows in ([2], [4, 0], [1, 3]):
        chosen = [seeds[k] for k in rows]
        found = log_likelihood(truth.denoise, scheduler, TWO, RESIDUAL.split(images[rows]), probes, chosen)
        torch.testing.assert_close(found.log_likelihood, together.log_likelihood[rows], rtol=0, atol=1e-9)
        assert torch.equal(found.nfe, together.nfe[rows])
    other = log_likelihood(truth.denoise, scheduler, TWO, RESIDUAL.split(images), probes, [9, 9, 9, 9, 9])
    assert torch.equal(other.log_likelihood, together.log_likelihood) == (probes is None)


@pytest.mark.parametrize("schedule, prediction", [each for each in PROCESSES if each[0] != "flow"])
def test_decoding_brings_images_back(schedule, prediction):
    scheduler = scheduler_of(schedule, prediction)
    scheduler.clip_sample = False
    truth, errors = OneScale(scheduler), []
    images = truth.draw(3)
    for tolerance in (1e-3, 1e-5, 1e-7):
        encoded = encode(truth.denoise, scheduler, ONE, (images,), tolerance)
        solver = make_solver("ode", tolerance=tolerance)
        [found] = sample(truth.denoise, scheduler, ONE, encoded.latents, end="t0", solver=solver).images
        errors.append((found / scheduler.alphas[0] - images).abs().max().item())
    assert errors[0] < 0.1 and errors[2] < 5e-4 and errors[2] < errors[0] / 20


def test_decoding_the_pair_in_flow_ends_at_what_the_network_sees():
    """Half a timestep inside a clean image is seen as itself, but for noise of 1/1998 there."""
    scheduler = scheduler_of("flow", "velocity", "residual")
    scheduler.clip_sample = False
    truth = Pair(scheduler)
    images = truth.model.draw(3, rng(6))
    encoded = encode(truth.denoise, scheduler, PATHS["coarse first"], RESIDUAL.split(images), 1e-7)
    solver = make_solver("ode", tolerance=1e-7)
    found = sample(truth.denoise, scheduler, PATHS["diagonal"], encoded.latents, solver=solver).images[0]
    torch.testing.assert_close(found, images, rtol=0, atol=1e-4)


def test_latents_are_those_of_the_likelihood_and_normal():
    truth = OneScale(scheduler_of("ve", "score"), (4, 8, 8))
    images = truth.draw(8)
    encoded = encode(truth.denoise, truth.scheduler, ONE, (images,), 1e-5)
    found = log_likelihood(truth.denoise, truth.scheduler, ONE, (images,), 1, tolerance=1e-5)
    torch.testing.assert_close(found.latents[0], encoded.latents[0], rtol=0, atol=1e-3)
    assert (encoded.nfe > 8).all() and not encoded.latents[0].requires_grad
    assert abs(encoded.latents[0].std().item() - 1) < 0.05


def test_networks_work_and_are_left_as_they_are():
    """A trained kind of network, in float32 and with frozen weights; probes agree with the whole trace."""
    scheduler = scheduler_of("cosine", "v", "residual")
    torch.manual_seed(0)
    network = LIFTDualTimestepModel(hidden_dims=(8,), channels=1, representation="residual").requires_grad_(False)
    images = torch.rand(2, 1, 4, 4, generator=rng()) * 2 - 1
    exact = log_likelihood(network.eval().denoise, scheduler, TWO, RESIDUAL.split(images), None, tolerance=1e-3)
    many = RESIDUAL.split(images[:1].expand(64, -1, -1, -1))
    found = log_likelihood(network.denoise, scheduler, TWO, many, 4, range(64), tolerance=1e-3).log_likelihood
    assert exact.latents[0].dtype == torch.float32 and exact.log_likelihood.isfinite().all()
    assert abs(found.mean() - exact.log_likelihood[0]) < 4 * found.std() / 8 + 0.1
    # The details of the latents stay details.
    assert torch.nn.functional.avg_pool2d(exact.latents[0], 2).abs().max() < 1e-5


def test_the_clean_image_is_not_clamped():
    scheduler = scheduler_of("cosine", "v")
    truth = OneScale(scheduler)
    images = truth.draw(2) + 3  # Far outside [-1, 1].
    found = log_likelihood(truth.denoise, scheduler, ONE, (images,), None, tolerance=1e-7)
    torch.testing.assert_close(found.log_likelihood, truth.log_density(images), rtol=0, atol=0.01)
    assert scheduler.clip_sample


def test_grey_levels_are_spread_and_counted():
    """Images of independent uniform bytes have 8 bits per dimension, which a uniform density says too."""
    pixels = torch.randint(0, 256, (2, 1, 64, 64), generator=rng(), dtype=torch.uint8)
    images = dequantised(pixels, [3, 4])
    offsets = (images.double() + 1) * 127.5 - pixels.double()
    assert offsets.min() >= -0.5001 and offsets.max() <= 0.5001 and abs(offsets.mean()) < 0.02
    assert abs(offsets.std() - 12**-0.5) < 0.01
    assert torch.equal(dequantised(pixels[1:], [4]), images[1:])
    assert not torch.equal(dequantised(pixels[1:], [5]), images[1:])
    uniform = -math.log(256 / 127.5) * torch.ones(2, dtype=torch.float64) * 4096
    torch.testing.assert_close(bits_per_dim(uniform, 4096), torch.full((2,), 8.0, dtype=torch.float64))


def test_what_is_not_finite_is_refused():
    truth = OneScale(scheduler_of("cosine", "v"))

    def denoise(xs, ts):
        return tuple(x * math.nan for x in truth.denoise(xs, ts))

    for find in (encode, log_likelihood):
        with pytest.raises(ValueError, match="makes an image NaN or infinite"):
            find(denoise, truth.scheduler, ONE, (truth.draw(2),))


def test_more_calls_than_the_limit_are_refused():
    truth = OneScale(scheduler_of("cosine", "v"))
    with pytest.raises(ValueError, match=r"An image needs more than 20 network calls .* --tolerance 1e-09; raise"):
        log_likelihood(truth.denoise, truth.scheduler, ONE, (truth.draw(2),), tolerance=1e-9, max_calls=20)


def test_images_without_a_likelihood_are_refused():
    scheduler = scheduler_of("cosine", "v")
    pair = torch.zeros(1, 3, 4, 4), torch.zeros(1, 3, 2, 2)
    dual, single = LIFTDualTimestepModel((8,)), SingleTimestepModel((8,))
    with pytest.raises(ValueError, match="not defined for a model of the over-complete pair"):
        log_likelihood(dual.denoise, scheduler, TWO, pair)
    with pytest.raises(ValueError, match="reads 2 scales and predicts 1"):
        encode(single.denoise, scheduler, TWO, pair)
    assert encode(dual.denoise, scheduler, TWO, pair, 0.1).latents[1].shape == (1, 3, 2, 2)


@pytest.mark.parametrize(
    "options, says",
    [
        ({"probes": 0}, "1 probe or more"),
        ({"seeds": [1]}, "so many seeds"),
        ({"tolerance": 1e-14}, "--tolerance 1e-14 is too small"),
        ({"path": TWO}, r"The path has 2 scale\(s\) but the images have 1"),
    ],
)
def test_settings_that_make_no_sense_are_refused(options, says):
    truth = OneScale(scheduler_of("cosine", "v"))
    with pytest.raises(ValueError, match=says):
        log_likelihood(
            truth.denoise, truth.scheduler, **{"path": ONE, "scales": (truth.draw(2),), "probes": 1} | options
        )
