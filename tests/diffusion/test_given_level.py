"""Coarse images that are given at a noise level: what a network is shown and told of them, against exact denoisers."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from data import coarse
from diffusion.sampler import sample
from diffusion.solvers import make_solver
from diffusion.super_resolution import LEVEL_NOISE, super_resolution_path, super_resolve
from exact_models import N_64, C, H, W, model, pooling, rng
from model import CascadeModel, LIFTDualTimestepModel
from paths.families import cascade, diagonal
from paths.path import Path, timestep_of_level
from scheduler import CLEAN, DDIMScheduler
from truth.gaussian import posterior_variance

REPRESENTATIONS = ("overcomplete", "residual")
LEVELS = (0, 1, 300, 700, 999)


def path_at(level, num_steps=6, scheduler=None, spacing="uniform_t", start=None):
    table = None if scheduler is None else scheduler.log_snr.numpy()
    return super_resolution_path(diagonal(num_steps, spacing, 1, table, start=start), level)


class Spy:
    """A denoiser whose answer depends on all that it is shown, and which keeps it; it predicts one scale or two."""

    def __init__(self, num_predictions=1, channels=1):
        self.asked, self.num_predictions, self.channels = [], num_predictions, channels

    def __call__(self, xs, ts, labels=None):
        self.asked.append((xs, ts, labels))
        up = F.interpolate(xs[1], scale_factor=2)
        fine = (0.5 * xs[0] + 0.3 * up + ts[1].view(-1, 1, 1, 1) / 2000).repeat(1, self.channels, 1, 1)
        return (fine, (0.3 * xs[1] + 1).repeat(1, self.channels, 1, 1))[: self.num_predictions]


def given_images(count=3, side=4, channels=3, seed=5):
    return torch.rand(count, channels, side, side, generator=rng(seed)) * 1.6 - 0.8


def upscaled(denoise, scheduler, path, given, seeds, **options):
    return torch.cat([each.images for each in super_resolve(denoise, scheduler, path, given, seeds, **options)])


# What a network is shown and told


@pytest.mark.parametrize("process", ["cosine_clipped", "cosine_zero_terminal", "ve", "flow", "sub_vp_linear"])
@pytest.mark.parametrize("level", LEVELS)
def test_the_level_is_both_applied_and_told(process, level):
    kind = {"ve": "epsilon", "flow": "velocity"}.get(process, "v")
    scheduler, spy = DDIMScheduler(beta_schedule=process, prediction_type=kind), Spy()
    given = given_images(1, 64)
    [result] = super_resolve(spy, scheduler, path_at(level), given, [7])
    assert result.nfe == len(spy.asked) == 6
    z = spy.asked[0][0][1]
    for xs, ts, _ in spy.asked:
        assert torch.equal(xs[1], z) and ts[1].tolist() == [level] and ts[1].dtype == torch.long
    alpha, sigma = scheduler.alphas[level].item(), scheduler.sigmas[level].item()
    if level == 0:
        assert torch.equal(z, given)
        return
    noise = (z - alpha * given) / sigma
    # Of 12288 standard normals the deviation is known to 0.006, and the correlation with the image is none to 0.009.
    assert noise.std().item() == pytest.approx(1, abs=0.02)
    assert abs(torch.corrcoef(torch.stack([noise.flatten(), given.flatten()]))[0, 1]) < 0.03
    drawn = np.random.default_rng((7, LEVEL_NOISE)).standard_normal(given.shape[1:], dtype=np.float32)
    torch.testing.assert_close(noise[0], torch.from_numpy(drawn), rtol=0, atol=1e-4 / sigma)


def test_the_noise_of_the_start_is_that_of_the_seed_at_every_level():
    starts = {}
    for level in LEVELS:
        spy = Spy()
        upscaled(spy, DDIMScheduler(), path_at(level), given_images(2), [7, (8, 2)], eta=1.0)
        starts[level] = spy.asked[0][0][0]
        assert torch.equal(starts[level], starts[0])
    for seed, start in zip((7, (8, 2)), starts[0], strict=True):
        np.testing.assert_array_equal(start, np.random.default_rng(seed).standard_normal((3, 8, 8), dtype=np.float32))


@pytest.mark.parametrize("eta", [0.0, 1.0])
@pytest.mark.parametrize("level", [0, 400])
def test_an_image_depends_neither_on_its_batch_nor_on_its_company(level, eta):
    given, seeds = given_images(5), [3, (1, 1), (1, 2), 15, 9]
    labels = [0, 1, 2, 1, 0]

    class Told(Spy):
        def __call__(self, xs, ts, labels):
            [fine] = super().__call__(xs, ts, labels)
            return (fine + labels.view(-1, 1, 1, 1) / 10,)

    def run(rows, batch_size):
        options = {"batch_size": batch_size, "eta": eta, "labels": [labels[k] for k in rows]}
        return upscaled(Told(), DDIMScheduler(), path_at(level), given[rows], [seeds[k] for k in rows], **options)

    together = run([0, 1, 2, 3, 4], 5)
    assert torch.equal(run([0, 1, 2, 3, 4], 2), together)
    assert torch.equal(run([4, 2], 1), together[[4, 2]])


def test_the_level_of_a_log_snr_is_the_nearest_timestep():
    table = DDIMScheduler(beta_schedule="cosine_zero_terminal", prediction_type="v").log_snr.numpy()
    assert timestep_of_level(math.inf, table) == 0 and timestep_of_level(-math.inf, table) == 999
    assert timestep_of_level(-math.inf, DDIMScheduler().log_snr.numpy()) == 999
    for level in (-5.0, 0.0, 2.3):
        distances = [abs(value - level) for value in table.tolist()]
        assert timestep_of_level(level, table) == distances.index(min(distances))


# Timestep 0 is plain super-resolution


@pytest.mark.parametrize("representation", REPRESENTATIONS)
@pytest.mark.parametrize("kind", [LIFTDualTimestepModel, CascadeModel])
def test_a_clean_image_is_plain_super_resolution_bit_for_bit(kind, representation):
    torch.manual_seed(0)
    network = kind((8, 16), representation=representation).eval().requires_grad_(False)
    scheduler = DDIMScheduler(prediction_type="v", representation=representation)
    given, path = given_images(2, 8), path_at(0)
    found = upscaled(network.denoise, scheduler, path, given, [1, 2])
    noise = [np.random.default_rng(k).standard_normal((3, 16, 16), dtype=np.float32) for k in (1, 2)]
    x = torch.from_numpy(np.stack(noise))
    [x] = scheduler.representation.project((x,))
    zero = torch.zeros(2, dtype=torch.long)
    for (t, _), after in zip(path.points, [*(t for t, _ in path.points[1:-1]), CLEAN], strict=False):
        out = network(x, given, torch.full((2,), t), zero)
        x0 = scheduler.predict_x0(out[0] if isinstance(out, tuple) else out, t, x)
        if representation == "overcomplete":
            x0 = x0.clamp(-1, 1)
        else:
            image = (x0 + given.repeat_interleave(2, 2).repeat_interleave(2, 3)).clamp(-1, 1)
            x0 = image - F.interpolate(F.avg_pool2d(image, 2), scale_factor=2)
        x = scheduler.step_from(x0, t, after, x)
    expected = x if representation == "overcomplete" else x + F.interpolate(given, scale_factor=2)
    assert torch.equal(found, expected) and found.std() > 0.05


@pytest.mark.parametrize("representation", REPRESENTATIONS)
@pytest.mark.parametrize("solver", ["ddim", "heun", "dpmpp_2m", "ode"])
def test_what_a_dual_model_says_of_the_given_image_counts_for_nothing(representation, solver):
    scheduler = DDIMScheduler(prediction_type="v", representation=representation)
    given, results = given_images(2), []
    for num_predictions in (1, 2):
        options = {"solver": make_solver(solver)}
        results.append(upscaled(Spy(num_predictions), scheduler, path_at(250, 3), given, [1, 2], **options))
    assert torch.equal(*results)


def test_the_image_of_residuals_keeps_the_mean_of_the_given_one():
    scheduler = DDIMScheduler(representation="residual", clip_sample=False)
    given, spy = given_images(2), Spy()
    found = upscaled(
        lambda xs, ts: scheduler.representation.project(spy(xs, ts)), scheduler, path_at(500), given, [1, 2]
    )
    torch.testing.assert_close(coarse(found), given, rtol=0, atol=1e-5)


# The last timestep ignores the image


@pytest.mark.parametrize("kind", [LIFTDualTimestepModel, CascadeModel])
def test_pure_noise_hides_the_image_whatever_the_network(kind):
    torch.manual_seed(0)
    network = kind((8, 16)).eval().requires_grad_(False)
    scheduler = DDIMScheduler(beta_schedule="cosine_zero_terminal", prediction_type="v")
    one, other = given_images(2, 8), given_images(2, 8, seed=6)

    def at(level, given):
        return upscaled(network.denoise, scheduler, path_at(level), given, [1, 2])

    assert torch.equal(at(999, one), at(999, other))
    assert (at(300, one) - at(300, other)).abs().max() > 1e-3
    assert (at(999, one)[0] - at(999, one)[1]).abs().max() > 1e-3


# Exact denoisers


def affine(scheduler, denoise, path, given, level_noise, solver):
    """The walk as an affine map of the noise of its start: what no noise becomes [N_64], and each mode of noise."""
    basis = model(scheduler)[1]
    noise = torch.cat([torch.zeros(1, N_64, dtype=torch.float64), basis]).view(-1, C, H, W)
    shown = (x.expand(len(noise), -1, -1, -1) for x in (given, level_noise))
    given, level_noise = (x.contiguous() for x in shown)
    samples = sample(denoise, scheduler, path, (noise, level_noise), solver=make_solver(solver), given=given)
    out = samples.images[0].flatten(1)
    return out[0], out[1:] - out[0]


def exact(solver, level, representation="overcomplete"):
    scheduler = DDIMScheduler(
        beta_schedule="cosine", prediction_type="v", clip_sample=False, representation=representation
    )
    denoiser, basis, variances = model(scheduler, representation=representation)
    given = torch.randn(1, C, H // 2, W // 2, generator=rng(31), dtype=torch.float64) / 4
    noise = torch.randn(given.shape, generator=rng(32), dtype=torch.float64)
    path = path_at(level, 60 if solver != "ddim" else 600, scheduler, "uniform_log_snr")
    centre, response = affine(scheduler, denoiser.denoise, path, given, noise, solver)
    return scheduler, denoiser, basis, variances, given, noise, centre, response


@pytest.mark.parametrize(("solver", "within"), [("ddim", 0.02), ("heun", 0.01), ("dpmpp_3m", 0.005), ("unipc", 0.005)])
@pytest.mark.parametrize("level", [150, 500, 850])
def test_the_walk_draws_from_the_posterior_of_gaussian_images(solver, within, level):
    scheduler, denoiser, basis, variances, given, noise, centre, response = exact(solver, level)
    b = scheduler.snr[level]
    low = len(variances) // 4
    seen = torch.cat([posterior_variance(variances[:low], b / 4), variances[low:]])
    # Every mode of noise becomes the same mode, as large as what is not known of it.
    gains = basis @ response.T  # [N_64, N_64], rows: modes of the image
    torch.testing.assert_close(gains.diagonal(), seen.sqrt(), rtol=within, atol=1e-3)
    assert (gains - gains.diag().diag()).abs().max() < 1e-9
    # E[x | z] = m + s A' (A s A' + I / b)^-1 (x_32 + n / sqrt(b) - A m), by dense matrices.
    covariance = basis.T @ (variances[:, None] * basis)
    pool = pooling()
    observed = given.flatten() + noise.flatten() / b.sqrt()
    inverse = torch.linalg.inv(pool @ covariance @ pool.T + torch.eye(len(pool), dtype=torch.float64) / b)
    mean = denoiser.mean.flatten()
    expected = mean + covariance @ pool.T @ inverse @ (observed - pool @ mean)
    torch.testing.assert_close(centre, expected, rtol=0, atol=0.01)
    assert (expected - mean).abs().max() > 0.08


def test_details_of_residuals_are_drawn_on_the_given_mean():
    *_, basis, variances, given, _, centre, response = exact("dpmpp_3m", 400, "residual")
    low = len(variances) // 4
    gains = basis @ response.T
    assert gains[:low].abs().max() < 1e-9 and gains[:, :low].abs().max() < 1e-9
    torch.testing.assert_close(gains.diagonal()[low:], variances[low:].sqrt(), rtol=0.005, atol=1e-3)
    torch.testing.assert_close(pooling() @ centre, given.flatten(), rtol=0, atol=1e-9)


def test_at_pure_noise_the_posterior_is_the_law_of_all_images():
    scheduler, denoiser, basis, variances, _, _, centre, response = exact("dpmpp_3m", 999)
    torch.testing.assert_close((basis @ response.T).diagonal(), variances.sqrt(), rtol=0.005, atol=1e-3)
    torch.testing.assert_close(centre, denoiser.mean.flatten(), rtol=0, atol=0.02)


# Solvers


@pytest.mark.parametrize("solver", ["ancestral", "euler_maruyama", "pc", "langevin", "consistency"])
def test_solvers_that_draw_leave_the_given_image_alone(solver):
    spy, scheduler, given = Spy(), DDIMScheduler(prediction_type="v"), given_images(2)
    made = make_solver(solver)
    [result] = super_resolve(spy, scheduler, path_at(300, 4), given, [1, 2], solver=made)
    assert result.nfe == len(spy.asked) == made.calls(4) and result.images.isfinite().all()
    for xs, ts, _ in spy.asked:
        assert torch.equal(xs[1], spy.asked[0][0][1]) and (ts[1] == 300).all()


def test_the_learnt_variance_of_the_fine_scale_is_read():
    spies = [Spy(channels=2), Spy(2, channels=2)]
    given, path = given_images(2), path_at(300, 4)
    found = []
    for spy in spies:
        options = {"solver": make_solver("ancestral", variance="learned")}
        found.append(upscaled(spy, DDIMScheduler(prediction_type="v"), path, given, [1, 2], **options))
    assert torch.equal(*found) and found[0].shape == (2, 3, 8, 8)


def test_adaptive_steps_meet_the_others():
    scheduler, given = DDIMScheduler(prediction_type="v", clip_sample=False), given_images(2, 4, C)[:, :, :2, :3]
    network = model(scheduler)[0]
    options = {"ode": make_solver("ode", tolerance=1e-6), "dpmpp_3m": make_solver("dpmpp_3m")}
    found = {}
    for name, solver in options.items():
        path = path_at(400, 1 if name == "ode" else 200, scheduler, "uniform_log_snr", start=950)
        found[name] = upscaled(network.denoise, scheduler, path, given, [1, 2], solver=solver)
    # SciPy's error is 1e-6 a step, and the walk between fixed points is of third order.
    assert (found["ode"] - found["dpmpp_3m"]).abs().max() < 0.01 < found["ode"].std()


# What is refused


def test_a_given_image_needs_a_path_on_which_it_rests():
    noise = torch.zeros(1, 3, 8, 8), torch.zeros(1, 3, 4, 4)
    for path, says in (
        (diagonal(4), "rests at one timestep, and path diagonal moves it"),
        (cascade(4), "rests at one timestep, and path cascade moves it"),
    ):
        with pytest.raises(ValueError, match=says):
            sample(Spy(), DDIMScheduler(), path, noise, given=noise[1])
    with pytest.raises(ValueError, match="no coarse feed beside it"):
        sample(Spy(), DDIMScheduler(), path_at(0), noise, given=noise[1], coarse_from="noisy")
    with pytest.raises(ValueError, match="needs a path of two scales"):
        sample(Spy(), DDIMScheduler(), diagonal(4, num_scales=1), noise[:1], given=noise[1])
    with pytest.raises(ValueError, match="timesteps must be 0 or larger"):
        super_resolution_path(diagonal(4, num_scales=1), -1)


def test_the_path_of_a_level_ends_clean_and_says_so():
    path = path_at(300, 4)
    assert [t_32 for _, t_32 in path.points] == [300] * 4 + [0] and path.points[-1] == (0, 0)
    assert path.provenance["level"] == 300 and "level" not in path_at(0).provenance
    assert path_at(0).points == Path([(t, 0) for (t,) in diagonal(6, num_scales=1).points], "x", {}).points


def test_an_image_that_is_not_finite_is_called_by_its_name():
    def broken(xs, ts):
        return (torch.where(torch.arange(2).view(2, 1, 1, 1) == 1, math.nan, xs[0]),)

    names = ["of seed 9", "of seed 8"]
    with pytest.raises(ValueError, match="image of seed 8 NaN or infinite"):
        list(super_resolve(broken, DDIMScheduler(), path_at(0), given_images(2), [9, 8], names=names))
