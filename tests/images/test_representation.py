"""Representations: exact inverses, orthogonal bands, the noise that belongs to them, and what follows them."""

import copy
import itertools
import math
import pickle

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import compute_heatmap_30
import eval_fid_batch
import generate_sr
import generate_with_path_30
import inpaint
import train_lift
from checkpoint import build_model, build_scheduler, load_model
from conftest import assert_same
from diffusion.sampler import sample, sample_seeds, scale_shapes
from diffusion.super_resolution import super_resolution_path, super_resolve
from evaluation.results_table import read_rows
from images.representation import OVERCOMPLETE, REPRESENTATIONS, RESIDUAL, upsample_nearest
from inpaint import scale_masks
from model import LIFTBaselineModel, LIFTDualTimestepModel, NoTimestepModel, SingleTimestepModel
from networks.pretrained import write_pretrained
from paths.families import diagonal, log_snr_shift
from paths.optimal import Readings, kl_cost, kl_step_cost
from paths.path import Path, timestep_grid
from planning.choice import PathSettings, choose_path
from planning.error_map import error_map, largest_deviation
from planning.map_file import load_heatmap
from planning.map_paths import KLProblem, kl_refined
from planning.regimes import resolve_regime
from scheduler import PREDICTION_TYPES, DDIMScheduler
from training.objective import Denoising, TrainingBatch
from truth.gaussian import GaussianDenoiser, Spectrum, exact_heatmap, jacobian_maps

BOTH = pytest.mark.parametrize("kind", REPRESENTATIONS.values(), ids=REPRESENTATIONS)


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def haar(size: int) -> torch.Tensor:
    """Orthonormal rows [size²/4, size²]: the low band of the Haar transform of a size x size image."""
    rows = torch.zeros(size // 2, size // 2, size, size, dtype=torch.float64)
    for i in range(size // 2):
        for j in range(size // 2):
            rows[i, j, 2 * i : 2 * i + 2, 2 * j : 2 * j + 2] = 0.5
    return rows.flatten(2).flatten(0, 1)


@BOTH
def test_split_and_compose_are_inverse(kind):
    images = normal(3, 2, 8, 6)
    fine, coarse = kind.split(images)
    assert torch.allclose(kind.compose((fine, coarse)), images, rtol=0, atol=1e-15)
    assert torch.equal(coarse, F.avg_pool2d(images, 2))
    assert_same(kind.project((fine, coarse))[1], coarse)
    assert torch.allclose(kind.project((fine, coarse))[0], fine, atol=1e-15)


def test_over_complete_images_and_noise_are_left_as_they_are():
    pair = normal(1, 1, 4, 4), normal(1, 1, 2, 2)
    assert OVERCOMPLETE.project(pair) is pair and OVERCOMPLETE.finished(pair) is pair
    assert OVERCOMPLETE.split(pair[0])[0] is pair[0] and OVERCOMPLETE.compose(pair) is pair[0]


def test_directions_are_orthonormal_and_span_the_space_of_the_pair():
    """Unit numbers become an orthonormal basis of the images that `project` leaves as they are, and zeros."""
    units = torch.eye(24, dtype=torch.float64).split([16, 8], 1)
    numbers = units[0].view(24, 1, 4, 4), units[1].view(24, 2, 2, 2)
    assert OVERCOMPLETE.directions(numbers) is numbers
    fine, coarse = RESIDUAL.directions(numbers)
    assert torch.equal(coarse, numbers[1])
    vectors = fine[:16].flatten(1)
    counted = vectors.abs().sum(1) > 0
    assert counted.sum() == 12
    eye = torch.eye(12, dtype=torch.float64)
    torch.testing.assert_close(vectors[counted] @ vectors[counted].T, eye, rtol=0, atol=1e-15)
    low, every = haar(4), torch.eye(16, dtype=torch.float64)
    torch.testing.assert_close(vectors.T @ vectors, every - low.T @ low, rtol=0, atol=1e-15)


def test_the_residual_is_the_haar_detail():
    images, low = normal(5, 1, 4, 4), haar(4)
    fine, coarse = RESIDUAL.split(images)
    flat = images.flatten(1)
    assert torch.allclose(coarse.flatten(1), flat @ low.T / 2)
    assert torch.allclose(fine.flatten(1), flat @ (torch.eye(16, dtype=torch.float64) - low.T @ low))
    assert F.avg_pool2d(fine, 2).abs().max() < 1e-15
    # Orthogonal: Pythagoras holds for every image.
    assert torch.allclose(flat.square().sum(1), fine.square().flatten(1).sum(1) + 4 * coarse.square().flatten(1).sum(1))


def test_noise_of_an_image_is_that_of_the_pair_at_four_times_the_coarse_snr():
    # The covariance of (r, c) of white noise, from the matrix of the linear map on a basis.
    basis = torch.eye(16, dtype=torch.float64).view(16, 1, 4, 4)
    fine, coarse = (part.flatten(1) for part in RESIDUAL.split(basis))  # Rows: images of basis vectors.
    assert torch.allclose(coarse.T @ coarse, torch.eye(4, dtype=torch.float64) / 4)
    assert torch.allclose(fine.T @ coarse, torch.zeros(16, 4, dtype=torch.float64))
    eigenvalues = torch.linalg.eigvalsh(fine.T @ fine)
    assert torch.allclose(eigenvalues, torch.tensor([0.0] * 4 + [1.0] * 12, dtype=torch.float64), atol=1e-12)
    assert RESIDUAL.fine_share == 12 / 16 and RESIDUAL.image_lead == pytest.approx(math.log(4))
    # Noise drawn for the pair has the law of noise drawn for the image, but for the variance of its coarse half.
    assert_same(RESIDUAL.project((basis, basis))[0], fine.view(16, 1, 4, 4))


@BOTH
def test_copies_and_pickles_are_the_same_object(kind):
    assert copy.deepcopy(kind) is kind and pickle.loads(pickle.dumps(kind)) is kind


def test_a_clamp_acts_on_the_image():
    images = 1.5 * normal(4, 3, 8, 8)
    clamped = RESIDUAL.clamp(RESIDUAL.split(images))
    assert torch.allclose(RESIDUAL.compose(clamped), images.clamp(-1, 1), atol=1e-15)
    assert images.abs().amax() > 1
    assert_same(OVERCOMPLETE.clamp((images,)), (images.clamp(-1, 1),))


@pytest.mark.parametrize("model_class", [LIFTDualTimestepModel, LIFTBaselineModel])
def test_a_network_knows_of_details_alone(model_class):
    torch.manual_seed(0)
    plain, model = (model_class((8, 8), representation=name) for name in REPRESENTATIONS)
    model.load_state_dict(plain.state_dict())
    assert sum(p.numel() for p in model.parameters()) == sum(p.numel() for p in plain.parameters())
    xs, ts = (normal(2, 3, 8, 8).float(), normal(2, 3, 4, 4, seed=1).float()), (torch.tensor([500, 3]),) * 2
    fine, coarse = model.denoise(xs, ts)
    assert F.avg_pool2d(fine, 2).abs().max() < 1e-6
    # Of the input it reads the projection, and it gives that of what the same weights say of it.
    shifted = xs[0] + upsample_nearest(normal(2, 3, 4, 4, seed=2).float()), xs[1]
    for one, other in zip(model.denoise(shifted, ts), (fine, coarse), strict=True):
        assert torch.allclose(one, other, atol=1e-4)
    said = plain.denoise(RESIDUAL.project(xs), ts)
    assert torch.allclose(fine, RESIDUAL.project(said)[0], atol=1e-5) and torch.allclose(coarse, said[1], atol=1e-5)


@pytest.mark.parametrize("model_class", [SingleTimestepModel, NoTimestepModel])
def test_models_without_a_coarse_prediction_compose_no_image(model_class):
    with pytest.raises(ValueError, match="predicts no coarse image"):
        model_class((8, 8), representation="residual")


def test_unknown_representations_are_refused():
    for build in (lambda: LIFTDualTimestepModel((8, 8), representation="x"), lambda: DDIMScheduler(representation="x")):
        with pytest.raises(ValueError, match="^Unknown representation 'x'; choose one of overcomplete, residual"):
            build()


def test_a_config_decides_the_representation_of_model_and_schedule():
    config = {"model_type": "dual", "hidden_dims": [8, 8], "channels": 3, "num_train_timesteps": 1000}
    config |= {"beta_schedule": "cosine", "prediction_type": "v"}
    for said, expected in (({}, OVERCOMPLETE), ({"representation": "residual"}, RESIDUAL)):
        assert build_model(config | said).representation is expected
        assert build_scheduler(config | said).representation is expected
    build_model(config | {"model_type": "baseline", "representation": "overcomplete"})


class FixedPairs:
    """Timesteps that are the same for every image."""

    def __init__(self, t_64, t_32):
        self.ts = t_64, t_32

    same = False

    def at(self, progress):
        return self

    def draw(self, batch, generator):
        return tuple(torch.full((batch,), t) for t in self.ts)


@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
def test_the_loss_is_that_of_the_image_where_the_clocks_are_tied(prediction_type):
    # With noise n on the image, r and c see n - up(An) and 2 An; errors of clean images weigh alike on both sides.
    scheduler = DDIMScheduler(prediction_type=prediction_type, representation="residual")
    images, error = normal(4, 3, 8, 8), 0.1 * normal(4, 3, 8, 8, seed=1)
    t_64, t_32 = (torch.full((4,), t) for t in (400, 300))
    clean = RESIDUAL.split(images)
    noise = RESIDUAL.project((normal(4, 3, 8, 8, seed=2), normal(4, 3, 4, 4, seed=3)))
    batch = TrainingBatch(*clean, *noise, t_64, t_32)
    wrong = RESIDUAL.split(error)
    targets = [scheduler.target(x, n, t) for x, n, t in zip(clean, noise, (t_64, t_32), strict=True)]
    objective = Denoising(resolve_regime(None, "dual"), scheduler)
    losses = objective.losses(lambda *_: tuple(t + e for t, e in zip(targets, wrong, strict=True)), batch)
    # 9 and 3 dimensions of every 12 of the image.
    total = 0.75 * losses["loss_64"] + 0.25 * 4 * losses["loss_32"]
    assert torch.allclose(total, error.square().flatten(1).mean(1))


@BOTH
def test_training_draws_images_and_noise_of_the_representation(kind):
    x_64 = normal(2, 3, 8, 8)
    objective = Denoising(resolve_regime(None, "dual"), DDIMScheduler(representation=kind.name))
    objective.pairs = FixedPairs(9, 5)
    batch = objective.draw(x_64, F.avg_pool2d(x_64, 2), torch.Generator().manual_seed(0))
    assert_same((batch.x_64, batch.x_32), kind.split(x_64))
    mean = F.avg_pool2d(batch.noise_64, 2).abs().max()
    assert mean < 1e-6 if kind is RESIDUAL else mean > 0.1
    assert F.avg_pool2d(batch.noise_32, 2).abs().max() > 0.1


def exact(kind, scheduler, image):
    """A denoiser that knows the image."""
    clean = kind.split(image)

    def denoise(xs, ts):
        alpha_bars = (scheduler.alphas_cumprod[t][:, None, None, None] for t in ts)
        noises = [(x - a.sqrt() * c) / (1 - a).sqrt() for x, c, a in zip(xs, clean, alpha_bars, strict=True)]
        return tuple(scheduler.target(c, n, t) for c, n, t in zip(clean, noises, ts, strict=True))

    return denoise


@BOTH
@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_sampling_ends_on_the_image_that_is_predicted(kind, eta):
    scheduler = DDIMScheduler(representation=kind.name, prediction_type="v")
    image = normal(2, 3, 8, 8).clamp(-1, 1)
    states = []
    path = log_snr_shift(diagonal(5), 1.0, scheduler.log_snr.numpy())
    noise = (normal(2, 3, 8, 8, seed=1), normal(2, 3, 4, 4, seed=2))
    draws = iter(range(10, 100))
    fine, coarse = sample(
        exact(kind, scheduler, image), scheduler, path, noise, eta, lambda k, xs: states.append(xs),
        draw=lambda shape: normal(2, *shape, seed=next(draws)),
    ).images  # fmt: skip
    assert torch.allclose(fine, image, atol=1e-6) and torch.allclose(coarse, F.avg_pool2d(image, 2), atol=1e-6)
    if kind is RESIDUAL:
        assert all(F.avg_pool2d(xs[0], 2).abs().max() < 1e-12 for xs in states)


def test_tied_clocks_sample_what_one_scale_samples():
    """A denoiser of the image, tied clocks and the same start give the DDIM of the image, clamped or not."""
    # Any table may be the coarse one's: timesteps of the fine scale, four times the SNR.
    one, tied = (DDIMScheduler(representation=name) for name in REPRESENTATIONS)
    gamma = 4 * one.snr
    weight = normal(48, 48, seed=5) / 20

    def x0_of(image):  # Some image, not a linear function of the noisy one.
        return torch.tanh(image.flatten(1) @ weight).view_as(image) * 1.5

    def single(xs, ts):
        a = one.alphas_cumprod[ts[0]][:, None, None, None]
        return ((xs[0] - a.sqrt() * x0_of(xs[0])) / (1 - a).sqrt(),)

    def alpha_bar(t, x):
        table = gamma / (1 + gamma) if x.shape[-1] == 2 else one.alphas_cumprod
        return torch.tensor(1.0 if t == -1 else table[t].item(), dtype=x.dtype)

    tied._alpha_bar = alpha_bar

    def pair(xs, ts):
        a, b = (alpha_bar(int(t[0]), x) for t, x in zip(ts, xs, strict=True))
        # z / sqrt(abar) of the image is that of its parts, composed.
        x_64 = a.sqrt() * RESIDUAL.compose((xs[0] / a.sqrt(), xs[1] / b.sqrt()))
        clean = RESIDUAL.split(x0_of(x_64))
        return tuple((x - s.sqrt() * c) / (1 - s).sqrt() for x, c, s in zip(xs, clean, (a, b), strict=True))

    start = normal(3, 3, 4, 4)
    t = 900
    a, b = one.alphas_cumprod[t], gamma[t] / (1 + gamma[t])
    # The same noisy image: r as it is, and c = Ax / sqrt(abar) times the sqrt(abar) of its own clock.
    pairs = RESIDUAL.split(start)[0], F.avg_pool2d(start, 2) / a.sqrt() * b.sqrt()
    steps = [900, 700, 650, 300, 20, 0]
    for clip in (True, False):
        one.clip_sample = tied.clip_sample = clip
        expected = sample(single, one, Path([(s,) for s in steps], "d", {}), (start,)).images[0]
        got = sample(pair, tied, Path([(s, s) for s in steps], "d", {}), pairs).images[0]
        assert torch.allclose(got, expected, rtol=0, atol=1e-10)


def test_super_resolution_of_residuals_is_consistent_by_construction():
    torch.manual_seed(0)
    model = LIFTDualTimestepModel((8, 8), representation="residual").eval()
    scheduler = DDIMScheduler(representation="residual", prediction_type="v")
    coarse = normal(3, 3, 4, 4).float().clamp(-1, 1)
    path = super_resolution_path(diagonal(4, num_scales=1))
    [upscaled] = super_resolve(model.denoise, scheduler, path, coarse, [1, 2, 3])
    assert (F.avg_pool2d(upscaled.images, 2) - coarse).abs().max() < 1e-6
    assert upscaled.images.std() > 0.1


@BOTH
@pytest.mark.parametrize("of", ["eps", "x0"])
@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
def test_maps_are_the_exact_jacobians_in_the_subspace(prediction_type, of, kind):
    """Whatever the network predicts: directions that are no noise of their scale have no part in any block."""
    scheduler = DDIMScheduler(prediction_type=prediction_type, representation=kind.name)
    spectrum = Spectrum.power_law(8, channels=1)
    denoiser = GaussianDenoiser(scheduler, spectrum.low.view(1, 4, 4), spectrum.high.view(3, 1, 4, 4))
    grid = [800, 300, 60]
    exact = jacobian_maps(spectrum, scheduler.log_snr[grid], of, kind.name)
    found = error_map(denoiser.denoise, scheduler, normal(1, 1, 8, 8), grid, 400, progress=False, maps="blocks", of=of)
    for name, norms in exact.items():
        # Of one image, so that the standard error is that over probes.
        assert ((found["jacobian"][name] - norms).abs() <= 5 * found["jacobian_se"][name] + 1e-12).all(), name
    assert found["num_dims_64"] == (48 if kind is RESIDUAL else 64)


def test_errors_of_a_denoiser_that_says_zero_are_the_energies_of_the_bands():
    scheduler = DDIMScheduler(representation="residual", prediction_type="x0")
    images = normal(4, 3, 8, 8).clamp(-1, 1)
    result = error_map(
        lambda xs, ts: tuple(torch.zeros_like(x) for x in xs), scheduler, images, [700, 10], maps="mse", progress=False
    )
    fine, coarse = RESIDUAL.split(images)
    for name, energy in (("mse_64", fine), ("mse_32", coarse), ("clipped_mse_64", fine), ("clipped_mse_32", coarse)):
        expected = energy.square().flatten(1).sum(1).mean()
        assert torch.allclose(result[name], expected.expand(2, 2))
    assert not result["mse_64_low"].any() and largest_deviation(result, result) == 0


def test_the_kl_of_bands_is_that_of_orthonormal_coefficients():
    """Weighing c at its own clock with 4^p is weighing l = 2c, of error 4 m, at the SNR of l."""
    rng = np.random.default_rng(0)
    mse_64, mse_32 = (np.sort(rng.uniform(1, 2, (5, 5)))[:, ::-1] for _ in range(2))
    snr = np.exp(np.linspace(-4, 4, 5))
    for weight in (0.0, 0.5, 1.0):
        problem = KLProblem.of_maps(mse_64, mse_32, np.zeros((5, 5)), snr, weight, "residual")
        assert not problem.bands
        ours = kl_step_cost(*problem[:3], (1, 2), (3, 3), weight)
        ends = [Readings(mse_64[c], 4 * mse_32[c], snr[c[0]], snr[c[1]] / 4) for c in ((1, 2), (3, 3))]
        assert ours == pytest.approx(kl_cost(*ends, weight))


def test_samples_depend_on_their_seed_alone():
    torch.manual_seed(0)
    model = LIFTDualTimestepModel((8, 8), representation="residual").eval()
    scheduler = DDIMScheduler(representation="residual")
    options = (scale_shapes(2, 3, 8), 4)
    [(_, three)] = sample_seeds(model.denoise, scheduler, diagonal(3), [1, 2, 3], *options)
    [(_, one)] = sample_seeds(model.denoise, scheduler, diagonal(3), [3], *options)
    assert torch.allclose(three.images[0][2], one.images[0][0], atol=1e-5)


class LoadedStub:
    """What `choose_path` looks at."""

    def __init__(self, kind):
        self.scheduler = DDIMScheduler(representation=kind.name)
        self.model = LIFTDualTimestepModel((8, 8), representation=kind.name)
        self.config = {"model_type": "dual"}


@BOTH
def test_on_the_image_diagonal_both_scales_have_the_noise_of_one_image(kind):
    loaded = LoadedStub(kind)
    path = choose_path(PathSettings(), "image_diagonal", 9, loaded)
    log_snr = loaded.scheduler.log_snr.numpy()
    t_64, t_32 = np.array(path.points).T
    assert t_64.tolist() == [t for (t,) in diagonal(9, num_scales=1).points] and (t_32[0], t_32[-1]) == (999, 0)
    for t, u in zip(t_64[1:-1], t_32[1:-1], strict=True):
        assert u == np.abs(log_snr - min(log_snr[t] + kind.image_lead, log_snr[0])).argmin()
    if kind is OVERCOMPLETE:
        assert path.points == diagonal(9).points


def test_the_best_image_diagonal_is_that_of_an_enumeration():
    scheduler = DDIMScheduler(representation="residual")
    log_snr = scheduler.log_snr.numpy()
    grid = timestep_grid(12, 1000, "uniform_log_snr", 999, log_snr)
    spectrum = Spectrum.power_law(8)
    heatmap = exact_heatmap(spectrum, scheduler, grid, representation="residual")

    def bands(lam):  # Errors and clocks of details and of the low band, on the tied line.
        low = min(lam + math.log(4), log_snr[0]) - math.log(4)
        return [((s / (1 + s * math.exp(x))).sum().item(), x) for s, x in ((spectrum.high, lam), (spectrum.low, low))]

    def cost(lams):
        points = [bands(lam) for lam in lams]
        return sum(
            (m - n) * (y - x) / 2
            for here, there in zip(points, points[1:], strict=False)
            for (m, x), (n, y) in zip(here, there, strict=True)
        )

    inner = log_snr[grid][1:-1]
    best = min(cost([log_snr[999], *chosen, log_snr[0]]) for chosen in itertools.combinations(inner, 3))
    found = kl_refined(heatmap, log_snr, 4, 1.0, diagonal=True, num_lines=12)
    # Interpolated between lines the optimum can only be better, but for the error of interpolation.
    assert found.cost <= best * 1.01
    assert cost([log_snr[t] for t, _ in found.path.points]) <= best * 1.01
    for t, u in found.path.points[1:-1]:
        assert u == np.abs(log_snr - min(log_snr[t] + math.log(4), log_snr[0])).argmin()


@pytest.mark.parametrize("jumps", [(1, 1), (2, 2)])
def test_inpainting_of_residuals_keeps_what_is_known(jumps):
    torch.manual_seed(0)
    model = LIFTDualTimestepModel((8, 8), representation="residual").eval().requires_grad_(False)
    scheduler = DDIMScheduler(representation="residual", prediction_type="v")
    images = normal(2, 3, 8, 8).float().clamp(-1, 1)
    mask = torch.ones(8, 8, dtype=torch.bool)
    mask[:, 3:6] = False  # Through the middle of blocks.
    path = log_snr_shift(diagonal(5), math.log(4), scheduler.log_snr.numpy())
    states = []

    def spy(xs, ts):
        states.append(xs)
        return model.denoise(xs, ts)

    options = {"jump_length": jumps[0], "jump_repeats": jumps[1]}
    [samples] = inpaint.inpaint(spy, scheduler, path, images, scale_masks(mask, 8, 2), [1, 2], **options)
    assert torch.equal(samples.images[0][:, :, mask], images[:, :, mask])
    assert not torch.allclose(samples.images[0], images, atol=0.01)
    assert all(F.avg_pool2d(xs[0], 2).abs().max() < 1e-5 for xs in states)
    with pytest.raises(ValueError, match="leaves none whole"):
        list(inpaint.inpaint(spy, scheduler, path, images, scale_masks(torch.eye(8) > 0, 8, 2), [1, 2]))
    # Known means: of the coarse mask, whatever the residual is.
    small = torch.rand(4, 4, generator=torch.Generator().manual_seed(1)) < 0.5
    [samples] = inpaint.inpaint(model.denoise, scheduler, path, images, scale_masks(small, 8, 2), [1, 2], **options)
    apart = (F.avg_pool2d(samples.images[0] - images, 2)).abs()
    assert apart[:, :, small].max() <= 1e-6 < 0.05 < apart[:, :, ~small].max()


def test_an_exported_model_keeps_its_representation(tmp_path):
    torch.manual_seed(0)
    model = LIFTDualTimestepModel((8, 8), representation="residual").eval()
    write_pretrained(tmp_path, model, {"hidden_dims": [8, 8], "channels": 3, "representation": "residual"})
    back = LIFTDualTimestepModel.from_pretrained(tmp_path)
    assert back.representation is RESIDUAL
    xs, ts = (normal(1, 3, 8, 8).float(), normal(1, 3, 4, 4).float()), (torch.tensor([7]),) * 2
    assert_same(back.denoise(xs, ts), model.denoise(xs, ts))


def test_every_stage_reads_the_representation_of_the_checkpoint(stage, tiny, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    # On all pairs, which the best cascade needs.
    flags = ["--representation", "residual", "--preset", "improved", "--t_pairs", "independent", "--holdout", 3]
    stage(train_lift, *tiny(tmp_path), *flags)
    checkpoint = tmp_path / "checkpoints/lift_dual_timestep_2ep.pth"
    loaded = load_model(checkpoint)
    assert loaded.model.representation is RESIDUAL and loaded.scheduler.representation is RESIDUAL
    assert loaded.config["loss_weights"] == [0.75, 0.25] and loaded.config["t_pairs"] == "independent"
    heatmap = tmp_path / "heatmap.pth"
    data = ["--cache_dir", tmp_path / "cache", "--device", "cpu", "--precision", "fp32"]
    flags = ["--checkpoint", checkpoint, *data[2:]]
    steps = ["--num_steps", 4]
    stage(compute_heatmap_30, *flags, *data[:2], "--grid", 4, "--K", 1, "--num_images", 2, *steps, "--output", heatmap)
    content = load_heatmap(heatmap)
    assert (
        content["representation"] == "residual" and content["num_dims_64"] == 9 * 64 and not content["mse_64_low"].any()
    )
    for kind in ("image_diagonal", "kl", "kl_diagonal", "dp_total", "cascade:best"):
        folder = tmp_path / kind.replace(":", "_")
        more = ["--path_type", kind, "--heatmap", heatmap, *steps, "--num_images", 2, "--output", folder]
        stage(generate_with_path_30, *flags, *more)
        assert len(list(folder.glob("[0-9]*.png"))) == 2
    stage(generate_sr, *flags, *data[:2], "--num_images", 2, "--num_steps", 2, "--output", tmp_path / "sr")
    scores = [
        "--model_type",
        "lift",
        "--checkpoint_dir",
        tmp_path / "checkpoints",
        "--epochs",
        2,
        "--metrics",
        "swd",
        "--num_images",
        4,
    ]
    stage(eval_fid_batch, *scores, "--path_type", "image_diagonal", *steps, *data, "--output", tmp_path / "scores.csv")
    [row] = read_rows(tmp_path / "scores.csv")
    assert (row["representation"], row["path_type"]) == ("residual", "image_diagonal")
