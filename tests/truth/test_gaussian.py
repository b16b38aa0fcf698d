"""The closed-form model against dense linear algebra, exact Jacobians, simulation and brute force."""

import itertools
import math

import numpy as np
import pytest
import scipy.fft
import scipy.linalg
import torch
import torch.nn.functional as F

from diffusion.sampler import sample
from paths.path import Path
from planning.error_map import error_map
from scheduler import DDIMScheduler
from truth import gaussian
from truth.gaussian import (
    OBJECTIVES,
    QUANTISATION_VARIANCE,
    EmpiricalDenoiser,
    GaussianDenoiser,
    Law,
    Spectrum,
    chain_kl,
    ddim_output,
    ddim_output_single,
    frozen_drift_output,
    information,
    jacobian_maps,
    kl,
    mse,
    mse_maps,
    optimal_points,
    start_kl,
    w2_squared,
)

C, H, W = 2, 4, 6
N_64, N_32 = C * H * W, C * H * W // 4
INF = math.inf
REPRESENTATIONS = ("overcomplete", "residual")
LOG_4 = math.log(4)
UNSEEN = torch.tensor([1e-300], dtype=torch.float64)  # The variance of a mode that adds nothing to any sum.


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


def variances(*shape, seed=1):
    """Spread over three decades, so that every noise level resolves some modes and not others."""
    return 10 ** (3 * torch.rand(shape, generator=rng(seed), dtype=torch.float64) - 2)


def parts():
    rotation = torch.linalg.qr(torch.randn(C, C, generator=rng(3), dtype=torch.float64)).Q
    mean = torch.randn(C, H, W, generator=rng(4), dtype=torch.float64)
    return variances(C, H // 2, W // 2), variances(3, C, H // 2, W // 2, seed=2), rotation, mean


def small_spectrum():
    return Spectrum(torch.tensor([8.0, 0.7, 0.05]), torch.tensor([0.3, 0.02]))


def dense_basis(rotation):
    """Rows are modes as flat images, low band first: DCT of SciPy, Haar patterns by Kronecker product."""
    patterns = [[[1, 1], [1, 1]], [[1, -1], [1, -1]], [[1, 1], [-1, -1]], [[1, -1], [-1, 1]]]
    rows = []
    for pattern, c, i, j in itertools.product(patterns, range(C), range(H // 2), range(W // 2)):
        coefficients = np.zeros((H // 2, W // 2))
        coefficients[i, j] = 1
        band = np.kron(scipy.fft.idctn(coefficients, norm="ortho"), np.array(pattern) / 2)
        rows.append(np.multiply.outer(rotation[c].numpy(), band).ravel())
    return torch.from_numpy(np.array(rows))


def pooling():
    eye = torch.eye(N_64, dtype=torch.float64).view(N_64, C, H, W)
    return F.avg_pool2d(eye, 2).flatten(1).T  # [N_32, N_64]


def fine_of(representation):
    """The matrix [N_64, N_64] that takes an image to its fine scale; 4 poolingᵀ copies a coarse pixel to its block."""
    eye = torch.eye(N_64, dtype=torch.float64)
    return eye if representation == "overcomplete" else eye - 4 * pooling().T @ pooling()


def compose(images, representation):
    """Fine images [B, N_64] of both scales."""
    fine, coarse = (x.flatten(1) for x in images)
    return fine if representation == "overcomplete" else fine + 4 * coarse @ pooling()


def model(scheduler=None, centred=False, representation="overcomplete"):
    """The denoiser, its dense basis and variances [N_64]."""
    low, high, rotation, mean = parts()
    scheduler = scheduler or DDIMScheduler(clip_sample=False)
    denoiser = GaussianDenoiser(
        scheduler, low, high, rotation, None if centred else mean, representation=representation
    )
    return denoiser, dense_basis(rotation), torch.cat([low.flatten(), high.flatten()])


def noisy(scheduler, t_64, t_32, count=3):
    x = torch.randn(count, C, H, W, generator=rng(7), dtype=torch.float64)
    y = torch.randn(count, C, H // 2, W // 2, generator=rng(8), dtype=torch.float64)
    return (x, y), (torch.full((count,), t_64), torch.full((count,), t_32))


def test_dense_basis_is_orthonormal():
    basis = dense_basis(parts()[2])
    torch.testing.assert_close(basis @ basis.T, torch.eye(N_64, dtype=torch.float64))


@pytest.mark.parametrize("representation", REPRESENTATIONS)
@pytest.mark.parametrize("prediction_type", ["epsilon", "x0", "v"])
@pytest.mark.parametrize("ts", [(999, 999), (999, 0), (0, 999), (400, 650), (0, 0)])
def test_denoiser_is_dense_gaussian_conditioning(prediction_type, ts, representation):
    schedule = "cosine_clipped" if prediction_type == "epsilon" else "cosine_zero_terminal"
    scheduler = DDIMScheduler(beta_schedule=schedule, prediction_type=prediction_type)
    denoiser, basis, s = model(scheduler, representation=representation)
    xs, timesteps = noisy(scheduler, *ts)
    predictions = denoiser.denoise(xs, timesteps)

    alpha_64, alpha_32 = scheduler.alphas_cumprod[list(ts)]
    covariance = basis.T @ torch.diag(s) @ basis
    mean, fine = parts()[3].flatten(), fine_of(representation)
    xs = ((xs[0].flatten(1) @ fine).view_as(xs[0]), xs[1])
    # Coordinates of the fine scale, orthonormal: its noise is white in them.
    seen = torch.eye(N_64, dtype=torch.float64) if representation == "overcomplete" else basis[N_32:]
    observe = torch.cat([alpha_64.sqrt() * seen, alpha_32.sqrt() * pooling()])
    noise = torch.cat([(1 - alpha_64).expand(len(seen)), (1 - alpha_32).expand(N_32)])
    y = torch.cat([xs[0].flatten(1) @ seen.T, xs[1].flatten(1)], 1)
    gain = covariance @ observe.T @ torch.linalg.inv(observe @ covariance @ observe.T + torch.diag(noise))
    x0_64 = mean + (y - mean @ observe.T) @ gain.T
    for x, x0, prediction, t in zip(xs, (x0_64 @ fine.T, x0_64 @ pooling().T), predictions, timesteps, strict=True):
        x0 = x0.view_as(x)
        alpha_bar = scheduler.alphas_cumprod[t[0]]
        epsilon = (x - alpha_bar.sqrt() * x0) / (1 - alpha_bar).sqrt()
        expected = {"epsilon": epsilon, "x0": x0, "v": alpha_bar.sqrt() * epsilon - (1 - alpha_bar).sqrt() * x0}
        torch.testing.assert_close(prediction, expected[prediction_type], rtol=1e-8, atol=1e-8)


def test_denoiser_treats_samples_by_their_own_timesteps():
    denoiser = model()[0]
    xs, _ = noisy(None, 0, 0)
    ts = (torch.tensor([999, 300, 0]), torch.tensor([10, 500, 999]))
    together = denoiser(*xs, *ts)
    for k in range(3):
        alone = denoiser(*(x[k : k + 1] for x in xs), *(t[k : k + 1] for t in ts))
        for a, b in zip(alone, together, strict=True):
            torch.testing.assert_close(a, b[k : k + 1])


def test_denoiser_returns_the_dtype_of_the_images_and_can_be_cast():
    denoiser = model()[0]
    xs, ts = noisy(None, 0, 700)
    exact = denoiser(*xs, *ts)
    for module in (denoiser, model()[0].float()):
        out = module(*(x.float() for x in xs), *ts)
        assert all(o.dtype == torch.float32 for o in out)
        for o, e in zip(out, exact, strict=True):
            torch.testing.assert_close(o.double(), e, rtol=1e-3, atol=1e-3)


def test_denoiser_refuses_wrong_parts():
    low, high, rotation, mean = parts()
    scheduler = DDIMScheduler()
    with pytest.raises(ValueError, match="low \\[C, H/2, W/2\\]"):
        GaussianDenoiser(scheduler, low, high[:2])
    with pytest.raises(ValueError, match="not negative"):
        GaussianDenoiser(scheduler, -low, high)
    with pytest.raises(ValueError, match="orthogonal"):
        GaussianDenoiser(scheduler, low, high, 2 * rotation)
    with pytest.raises(ValueError, match="mean has shape"):
        GaussianDenoiser(scheduler, low, high, rotation, mean[:, 1:])


def test_draws_have_the_dense_covariance():
    denoiser, basis, s = model()
    count = 20_000
    x = denoiser.draw(count, rng(5)) - parts()[3]
    modes = x.flatten(1) @ basis.T / s.sqrt()
    covariance = modes.T @ modes / count
    deviation = (covariance - torch.eye(N_64, dtype=torch.float64)).abs()
    assert deviation.max() < 5 * math.sqrt(2 / count)


@pytest.mark.parametrize("representation", REPRESENTATIONS)
@pytest.mark.parametrize("of", ["eps", "x0"])
def test_jacobian_maps_are_those_of_the_denoiser(of, representation):
    scheduler = DDIMScheduler(prediction_type={"eps": "epsilon", "x0": "x0"}[of])
    denoiser = model(scheduler, representation=representation)[0]
    t_grid = [999, 550, 30]
    maps = jacobian_maps(denoiser.spectrum(), scheduler.log_snr[t_grid], of=of, representation=representation)
    for (i, t_64), (j, t_32) in itertools.product(enumerate(t_grid), repeat=2):
        xs, ts = noisy(scheduler, t_64, t_32, count=1)
        rows = torch.func.jacrev(lambda a, b, ts=ts: denoiser(a, b, *ts), argnums=(0, 1))(*xs)
        for name, block in zip(("HH", "HL", "LH", "LL"), [block for row in rows for block in row], strict=True):
            assert maps[name][i, j].item() == pytest.approx(block.square().sum().item(), rel=1e-9, abs=1e-25)


@pytest.mark.parametrize("ts", [(999, 0), (550, 700), (30, 999)])
def test_jacobian_of_the_residual_pair_is_diagonal_in_its_subspace(ts):
    scheduler = DDIMScheduler()
    denoiser, basis, s = model(scheduler, representation="residual")
    xs, timesteps = noisy(scheduler, *ts, count=1)
    rows = torch.func.jacrev(lambda a, b: denoiser(a, b, *timesteps), argnums=(0, 1))(*xs)
    (hh, hl), (lh, ll) = [
        [block.reshape(size, -1) for block in row] for size, row in zip((N_64, N_32), rows, strict=True)
    ]
    a, b = scheduler.snr[list(ts)]
    # The coarse image is half a low band: its basis is that of the band, pooled and doubled to be orthonormal.
    coarse = 2 * basis[:N_32] @ pooling().T
    exact = torch.cat([torch.zeros(N_32), (1 + a).sqrt() / (1 + s[N_32:] * a)])
    torch.testing.assert_close(basis @ hh @ basis.T, torch.diag(exact), rtol=1e-9, atol=1e-10)
    exact = (1 + b).sqrt() / (1 + s[:N_32] * b / 4)
    torch.testing.assert_close(coarse @ ll @ coarse.T, torch.diag(exact), rtol=1e-9, atol=1e-10)
    assert hl.abs().max() < 1e-12 and lh.abs().max() < 1e-12


def test_error_map_of_drawn_images_agrees_with_the_maps():
    scheduler, t_grid = DDIMScheduler(), [950, 500, 20]
    denoiser = model(scheduler)[0]
    x = denoiser.draw(3000, rng(6))
    result = error_map(denoiser.denoise, scheduler, x, t_grid, num_probes=1, batch_size=3000, progress=False)
    expected = mse_maps(denoiser.spectrum(), scheduler.log_snr[t_grid])
    for scale, values in zip(("mse_64", "mse_32"), expected, strict=True):
        error = result[scale + "_se"]
        assert ((result[scale] - values).abs() < 4 * error).all()
        assert (error < 0.03 * values).all()
    for name, values in jacobian_maps(denoiser.spectrum(), scheduler.log_snr[t_grid]).items():
        assert ((result["jacobian"][name] - values).abs() < 4.5 * result["jacobian_se"][name] + 1e-9 * values).all()


@pytest.mark.parametrize("representation", REPRESENTATIONS)
def test_mse_is_the_trace_of_the_dense_posterior_covariance(representation):
    denoiser, basis, s = model()
    a, b, pool, fine = 3.0, 20.0, pooling(), fine_of(representation)
    precision = basis.T @ torch.diag(1 / s) @ basis + a * fine.T @ fine + b * pool.T @ pool
    covariance = torch.linalg.inv(precision)
    point = (denoiser.spectrum(), math.log(a), math.log(b), representation)
    mse_64, mse_32 = mse(*point)
    assert mse_64.item() == pytest.approx((fine @ covariance @ fine.T).trace().item(), rel=1e-10)
    assert mse_32.item() == pytest.approx((pool @ covariance @ pool.T).trace().item(), rel=1e-10)
    gained = (torch.logdet(precision) + s.log().sum()) / 2
    assert information(*point).item() == pytest.approx(gained.item(), rel=1e-10)


@pytest.mark.parametrize("representation, total", [("overcomplete", 9.07), ("residual", 0.32)])
def test_maps_broadcast_like_the_pointwise_functions(representation, total):
    spectrum, grid = small_spectrum(), torch.tensor([-5.0, 0.0, 1.0, 4.0], dtype=torch.float64)
    pointwise = mse(spectrum, grid[:, None], grid, representation)
    for whole, pair in zip(mse_maps(spectrum, grid, representation), pointwise, strict=True):
        torch.testing.assert_close(whole, pair.expand(4, 4))
    assert mse(spectrum, -INF, -INF, representation)[0].item() == pytest.approx(total)
    assert mse(spectrum, INF, -INF, representation)[0].item() == 0


@pytest.mark.parametrize("representation", REPRESENTATIONS)
def test_information_and_mse_are_derivatives_of_each_other(representation):
    spectrum = small_spectrum()
    snr = torch.tensor([0.8, 3.0], dtype=torch.float64, requires_grad=True)
    log_snr = snr.log()
    gradient = torch.autograd.grad(information(spectrum, *log_snr, representation), snr, retain_graph=True)[0]
    errors = torch.stack(mse(spectrum, *log_snr, representation))
    torch.testing.assert_close(gradient, errors.detach() / 2)
    rows = [torch.autograd.grad(e, snr, retain_graph=True)[0] for e in errors]
    assert rows[0][1].item() == pytest.approx(rows[1][0].item(), rel=1e-12)
    # Bands that share nothing tell nothing of each other.
    assert rows[0][1] < 0 if representation == "overcomplete" else rows[0][1] == 0


PATHS = {
    "diagonal": [(999, 999), (700, 700), (350, 350), (100, 100), (0, 0)],
    "coarse ahead": [(999, 999), (999, 600), (800, 300), (400, 300), (200, 0), (0, 0)],
    "fine ahead": [(999, 999), (600, 900), (0, 500), (0, 0)],
}


def log_snr_points(scheduler, path, end):
    points = torch.stack([scheduler.log_snr[list(point)] for point in path.points])
    if end == "clean":
        points[-1] = INF
    return points


@pytest.mark.parametrize("representation", REPRESENTATIONS)
@pytest.mark.parametrize("end", ["clean", "t0"])
@pytest.mark.parametrize("name", PATHS)
def test_ddim_output_is_the_linear_map_of_the_sampler(name, end, representation):
    scheduler = DDIMScheduler(clip_sample=False)
    denoiser, basis, _ = model(scheduler, centred=True, representation=representation)
    path = Path(tuple(PATHS[name]), name, {})
    eye = torch.eye(N_64 + N_32, dtype=torch.float64)
    noise = (eye[:, :N_64] @ fine_of(representation), eye[:, N_64:])
    noise = (noise[0].reshape(-1, C, H, W), noise[1].reshape(-1, C, H // 2, W // 2))
    images = compose(sample(denoiser.denoise, scheduler, path, noise, end=end).images, representation)
    covariance = basis @ images.T @ images @ basis.T
    law = ddim_output(denoiser.spectrum(), log_snr_points(scheduler, path, end), representation)
    torch.testing.assert_close(covariance, torch.diag(torch.cat([law.low, law.high])), rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("end", ["clean", "t0"])
def test_single_scale_output_is_the_linear_map_of_the_sampler(end):
    scheduler = DDIMScheduler(clip_sample=False)
    denoiser, basis, s = model(scheduler)

    def denoise(xs, ts):
        alpha_bar = scheduler.alphas_cumprod[ts[0][0]]
        gain = torch.diag(alpha_bar.sqrt() * s / (alpha_bar * s + 1 - alpha_bar))
        x0 = xs[0].flatten(1) @ basis.T @ gain @ basis
        return (((xs[0].flatten(1) - alpha_bar.sqrt() * x0) / (1 - alpha_bar).sqrt()).view_as(xs[0]),)

    path = Path(((999,), (750,), (300,), (0,)), "diagonal", {})
    noise = torch.eye(N_64, dtype=torch.float64).view(-1, C, H, W)
    images = sample(denoise, scheduler, path, [noise], end=end).images[0].flatten(1)
    law = ddim_output_single(denoiser.spectrum(), log_snr_points(scheduler, path, end)[:, 0])
    covariance = torch.diag(torch.cat([law.low, law.high]))
    torch.testing.assert_close(basis @ images.T @ images @ basis.T, covariance, rtol=1e-9, atol=1e-10)


def test_ddim_covariance_is_that_of_100k_samples():
    scheduler = DDIMScheduler(clip_sample=False)
    low, high = torch.tensor([[[4.0]]]), torch.tensor([0.5, 0.1, 0.02]).view(3, 1, 1, 1)
    denoiser = GaussianDenoiser(scheduler, low, high)
    path = Path(((999, 999), (800, 650), (400, 300), (150, 150), (0, 0)), "test", {})
    count = 100_000
    noise = [torch.randn(count, 1, n, n, generator=rng(9), dtype=torch.float64) for n in (2, 1)]
    images = sample(denoiser.denoise, scheduler, path, noise).images[0].flatten(1)
    haar = torch.tensor(scipy.linalg.hadamard(4)) / 2  # Rows: low, along W, along H, both.
    modes = images @ haar.double().T
    covariance = modes.T @ modes / count
    law = ddim_output(denoiser.spectrum(), log_snr_points(scheduler, path, "clean"))
    exact = torch.cat([law.low, law.high])
    error = torch.outer(exact, exact).sqrt() / math.sqrt(count)
    error += torch.diag(error.diag() * (math.sqrt(2) - 1))
    assert ((covariance - torch.diag(exact)).abs() < 4 * error).all()
    # The sampler's law is told apart from the truth by the same sample.
    assert (exact - torch.cat([low.flatten(), high.flatten()])).abs().max() > 20 * error.max()


@pytest.mark.parametrize("representation", REPRESENTATIONS)
def test_ddim_output_tends_to_the_truth(representation):
    spectrum = small_spectrum()
    values = []
    for num_steps in (100, 200, 400):
        line = torch.linspace(-14, 14, num_steps, dtype=torch.float64)
        line = torch.cat([line, torch.tensor([INF])])
        output = ddim_output(spectrum, torch.stack([line, line + 0.5], 1), representation)
        values.append(w2_squared(spectrum, output).item())
    # First order in the step: W2 halves, its square falls to a quarter.
    assert values[1] / values[0] == pytest.approx(0.25, abs=0.03)
    assert values[2] / values[1] == pytest.approx(0.25, abs=0.03)
    assert values[2] < 1e-3


@pytest.mark.parametrize("representation", REPRESENTATIONS)
def test_outputs_differentiate_in_the_points(representation):
    spectrum = small_spectrum()
    inner = torch.tensor([[-2.0, -1.0], [0.5, 2.0]], dtype=torch.float64, requires_grad=True)

    def value(inner):
        ends = inner.new_tensor([[-5.0, -5.0]]), inner.new_tensor([[INF, INF]])
        return w2_squared(spectrum, ddim_output(spectrum, torch.cat([ends[0], inner, ends[1]]), representation))

    assert torch.autograd.gradcheck(value, inner)


RISING = torch.tensor([[-4.0, -4.5], [-2.0, -1.0], [0.5, 0.0], [1.0, 2.5], [3.0, 2.7]], dtype=torch.float64)


def dense_chains(s, points, start="truth", representation="overcomplete"):
    """Covariances of (y_64, y_32) of one low mode at all points, true and sampled, built step by step."""
    snr = points.exp()
    n = len(snr)
    shows = torch.tensor([1.0 if representation == "overcomplete" else 0.0, 0.5], dtype=torch.float64)
    flat = snr.flatten() * shows.repeat(n)  # y's mean per unit of the mode.
    same_scale = torch.arange(2 * n)[:, None] % 2 == torch.arange(2 * n) % 2
    wiener = torch.minimum(snr.flatten()[:, None], snr.flatten()) * same_scale
    truth = s * torch.outer(flat, flat) + wiener

    # Columns of `path` say how each state depends on 2n independent standard normals.
    if start == "truth":
        first = torch.linalg.cholesky(truth[:2, :2])
    else:
        first = torch.diag((snr[0] * (1 + snr[0])).sqrt())
    states = [torch.cat([first, torch.zeros(2, 2 * n - 2, dtype=torch.float64)], 1)]
    for k in range(n - 1):
        step = snr[k + 1] - snr[k]
        precision = 1 / s + shows.square() @ snr[k]
        drift = torch.outer(shows, shows) / precision
        state = (torch.eye(2) + step[:, None] * drift) @ states[-1]
        state[:, 2 * k + 2 : 2 * k + 4] += torch.diag(step.sqrt())
        states.append(state)
    sampled = torch.cat(states)
    return truth, sampled @ sampled.T


def dense_kl(p, q):
    ratio = torch.linalg.solve(q, p)
    return (ratio.trace() - len(p) - torch.logdet(ratio)) / 2


@pytest.mark.parametrize("representation", REPRESENTATIONS)
def test_chain_kl_is_that_of_the_dense_joint_laws(representation):
    for s in (8.0, 0.7, 0.05):
        spectrum = Spectrum(torch.tensor([s], dtype=torch.float64), UNSEEN)
        chains = dense_chains(torch.tensor(s, dtype=torch.float64), RISING, representation=representation)
        assert chain_kl(spectrum, RISING, representation).item() == pytest.approx(dense_kl(*chains).item(), rel=1e-7)


def test_chain_kl_of_one_clock_is_that_of_details():
    line = RISING[:, 0]
    alone = chain_kl(Spectrum(UNSEEN, torch.tensor([2.0])), RISING)
    assert chain_kl(Spectrum(torch.tensor([2.0]), UNSEEN), line).item() == pytest.approx(alone.item())


@pytest.mark.parametrize("representation", REPRESENTATIONS)
def test_chain_kl_is_the_left_riemann_sum_less_the_information(representation):
    spectrum = small_spectrum()
    points = torch.tensor([[-6.0, -6.0], [-6.0, -1.0], [-2.0, 1.0], [1.0, 1.0], [4.0, 5.0]], dtype=torch.float64)
    errors = torch.stack(mse(spectrum, points[:-1, 0], points[:-1, 1], representation), 1)  # [N, 2]
    riemann = (errors * points.exp().diff(dim=0)).sum() / 2
    gained = information(spectrum, *points[-1], representation) - information(spectrum, *points[0], representation)
    value = chain_kl(spectrum, points, representation).item()
    assert value == pytest.approx((riemann - gained).item(), abs=1e-6)
    assert value > 1


def test_chain_kl_vanishes_in_the_limit_of_many_steps():
    spectrum = small_spectrum()
    values = [chain_kl(spectrum, torch.linspace(-8, 4, n + 1, dtype=torch.float64)).item() for n in (200, 400)]
    assert values[1] / values[0] == pytest.approx(0.5, abs=0.02)


@pytest.mark.parametrize("representation", REPRESENTATIONS)
def test_start_kl_is_that_of_the_dense_laws(representation):
    spectrum, point = small_spectrum(), torch.tensor([-3.0, -1.0], dtype=torch.float64)
    alpha_64, alpha_32 = point.sigmoid()
    eye = torch.eye(2, dtype=torch.float64)
    expected = 0.0
    for s in spectrum.low:
        cross = (alpha_64 * alpha_32).sqrt() * s / 2
        covariance = [[alpha_64 * s + 1 - alpha_64, cross], [cross, alpha_32 * s / 4 + 1 - alpha_32]]
        held = slice(0 if representation == "overcomplete" else 1, 2)
        expected += dense_kl(torch.tensor(covariance, dtype=torch.float64)[held, held], eye[held, held]).item()
    for h in spectrum.high:
        expected += dense_kl((alpha_64 * h + 1 - alpha_64).view(1, 1), eye[:1, :1]).item()
    assert start_kl(spectrum, point, representation).item() == pytest.approx(expected, rel=1e-10)
    assert start_kl(spectrum, torch.tensor([-INF, -INF]), representation).item() == 0
    assert start_kl(spectrum, -3.0) < start_kl(spectrum, point)


@pytest.mark.parametrize("representation", REPRESENTATIONS)
@pytest.mark.parametrize("start", ["truth", "noise"])
def test_frozen_drift_output_is_the_margin_of_the_dense_chain(start, representation):
    spectrum, ends = small_spectrum(), RISING[-1].exp()
    law = frozen_drift_output(spectrum, RISING, start, representation)
    for s, value in zip(spectrum.low, law.low, strict=True):
        last = dense_chains(s, RISING, start, representation)[1].diag()[-2:] / (ends * (1 + ends))
        # A low mode is one of the fine image, or twice one of the coarse image.
        expected = last[0] if representation == "overcomplete" else 4 * last[1]
        assert value.item() == pytest.approx(expected.item(), rel=1e-10)
    # A detail mode is a low mode of which the coarse image shows nothing.
    alone = frozen_drift_output(Spectrum(spectrum.high, spectrum.high), RISING[:, 0], start=start)
    torch.testing.assert_close(law.high, alone.low)


@pytest.mark.parametrize("representation", REPRESENTATIONS)
def test_frozen_drift_output_is_no_farther_than_its_chain(representation):
    spectrum = small_spectrum()
    truth = spectrum.noised(RISING[-1] if representation == "residual" else RISING[-1, 0], representation)
    chain = chain_kl(spectrum, RISING, representation)
    assert kl(truth, frozen_drift_output(spectrum, RISING, "truth", representation)) <= chain
    bound = chain + start_kl(spectrum, RISING[0], representation)
    assert 0 < kl(truth, frozen_drift_output(spectrum, RISING, representation=representation)) <= bound
    fine = torch.linspace(-16, 0, 3001, dtype=torch.float64)[:, None] + RISING[-1]
    assert kl(truth, frozen_drift_output(spectrum, fine, representation=representation)) < 1e-5


def falling_snr(num_steps=7, seed=0):
    """Arbitrary points [N + 1] of one clock on the image, from pure noise to clean."""
    inner = 10 * torch.rand(num_steps - 1, generator=rng(seed), dtype=torch.float64) - 4
    return torch.cat([torch.tensor([-INF]), inner.sort().values, torch.tensor([INF])])


def tied(line):
    """The points at which both scales of the residual pair are parts of one image with isotropic noise."""
    return torch.stack([line, line + LOG_4], 1)


def single_scale_denoiser(scheduler, basis, s, mean):
    """One clock on the image alone, by a dense matrix, in v-prediction."""

    def denoise(xs, ts):
        alpha_bar = scheduler.alphas_cumprod[ts[0][0]]
        gain = basis.T @ torch.diag(alpha_bar.sqrt() * s / (alpha_bar * s + 1 - alpha_bar)) @ basis
        x0 = mean + (xs[0].flatten(1) - alpha_bar.sqrt() * mean) @ gain
        epsilon = (xs[0].flatten(1) - alpha_bar.sqrt() * x0) / (1 - alpha_bar).sqrt()
        return ((alpha_bar.sqrt() * epsilon - (1 - alpha_bar).sqrt() * x0).view_as(xs[0]),)

    return denoise


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("first", [-INF, -4.0])
def test_tied_clocks_of_the_residual_pair_are_one_clock_on_the_image(first, seed):
    line = falling_snr(seed=seed)
    line[0] = first
    points = tied(line)
    # A schedule whose timesteps are just these log SNRs, but for the clean end, where the path has timestep 0.
    rungs = points[:-1].flatten().sort(descending=True).values
    scheduler = DDIMScheduler(len(rungs), "cosine_zero_terminal", "v", clip_sample=False)
    scheduler.log_snr, scheduler.snr, scheduler.alphas_cumprod = rungs, rungs.exp(), rungs.sigmoid()
    timesteps = [[int((rungs == value).nonzero()[0]) for value in point] for point in points[:-1]] + [[0, 0]]

    denoiser, basis, s = model(scheduler, representation="residual")
    noise = torch.randn(3, C, H, W, generator=rng(20 + seed), dtype=torch.float64)
    one_clock = single_scale_denoiser(scheduler, basis, s, parts()[3].flatten())
    path = Path([point[:1] for point in timesteps], "one clock", {})
    expected = sample(one_clock, scheduler, path, [noise]).images[0].flatten(1)

    # The mean of a noisy image is the coarse image at 4 times the SNR once its noise has the scale of that SNR.
    scale = 2 * ((1 + math.exp(first)) / (1 + 4 * math.exp(first))) ** 0.5
    fine = (noise.flatten(1) @ fine_of("residual")).view_as(noise)
    pair = (fine, scale * F.avg_pool2d(noise, 2))
    images = sample(denoiser.denoise, scheduler, Path(timesteps, "tied", {}), pair).images
    torch.testing.assert_close(compose(images, "residual"), expected, rtol=1e-10, atol=1e-10)

    law, alone = ddim_output(denoiser.spectrum(), points, "residual"), ddim_output_single(denoiser.spectrum(), line)
    torch.testing.assert_close(law.low * scale**2 / 4, alone.low, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(law.high, alone.high, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("log_snr", [-6.0, 0.3, 5.0])
def test_isotropic_noise_on_the_image_is_four_times_the_snr_on_the_coarse_one(log_snr):
    spectrum = small_spectrum()
    pair = (spectrum, log_snr, log_snr + LOG_4, "residual")
    alone = mse(spectrum, log_snr, -INF)[0].item()
    mse_64, mse_32 = mse(*pair)
    assert (mse_64 + 4 * mse_32).item() == pytest.approx(alone, rel=1e-12)
    assert information(*pair).item() == pytest.approx(information(spectrum, log_snr, -INF).item(), rel=1e-12)
    line = torch.linspace(log_snr, log_snr + 3, 5, dtype=torch.float64)
    assert chain_kl(spectrum, tied(line), "residual").item() == pytest.approx(chain_kl(spectrum, line).item(), rel=1e-9)
    # The posterior mean given z_64 is that given its two parts.
    denoiser, basis, s = model(representation="residual")
    mean = parts()[3]
    x = torch.randn(3, C, H, W, generator=rng(7), dtype=torch.float64)
    a = math.exp(log_snr)
    z = x * math.sqrt(1 + a)
    expected = mean + (
        (z - math.sqrt(a) * mean).flatten(1) @ basis.T * (math.sqrt(a) * s / (1 + a * s)) @ basis
    ).view_as(x)
    coarse = 2 * F.avg_pool2d(z, 2) / math.sqrt(1 + 4 * a)
    fine = (x.flatten(1) @ fine_of("residual")).view_as(x)
    log_snrs = [torch.full((3, 1, 1, 1), v, dtype=torch.float64) for v in (log_snr, log_snr + LOG_4)]
    torch.testing.assert_close(denoiser.posterior_mean((fine, coarse), log_snrs), expected, rtol=1e-10, atol=1e-10)


def test_the_residual_heatmap_is_the_maps_on_its_grid():
    spectrum, scheduler, t_grid = Spectrum.power_law(8), DDIMScheduler(), [999, 400, 0]
    content = gaussian.exact_heatmap(spectrum, scheduler, t_grid, representation="residual")
    log_snr = scheduler.log_snr[t_grid]
    for name, value in zip(("mse_64", "mse_32"), mse_maps(spectrum, log_snr, "residual"), strict=True):
        assert torch.equal(content[name], value)
    # Neither scale learns of the other: every map is constant along the other's clock.
    assert (content["mse_64"] == content["mse_64"][:, :1]).all() and (content["mse_32"] == content["mse_32"][:1]).all()
    assert (content["mse_64_low"] == 0).all() and (content["jacobian"]["HL"] == 0).all()
    assert (content["num_dims_64"], content["num_dims_32"], content["num_pixels_64"]) == (9 * 16, 3 * 16, 64)


def test_representations_that_do_not_fit_are_refused():
    spectrum, line = small_spectrum(), torch.tensor([-3.0, 2.0])
    for function in (ddim_output, chain_kl, frozen_drift_output, start_kl):
        arguments = (line, "noise", "residual") if function is frozen_drift_output else (line, "residual")
        with pytest.raises(ValueError, match="needs a clock too"):
            function(spectrum, *(arguments if function is not start_kl else (-3.0, "residual")))
    with pytest.raises(ValueError, match="log SNR per scale"):
        spectrum.noised(-3.0, "residual")
    with pytest.raises(ValueError, match="both images"):
        frozen_drift_output(spectrum, [[-3.0, -INF], [2.0, -INF]], "noise", "residual")
    for call in (
        lambda: mse(spectrum, 0.0, 0.0, "haar"),
        lambda: optimal_points(spectrum, 3, "w2", -5.0, INF, representation="haar"),
        lambda: EmpiricalDenoiser(DDIMScheduler(), data_set(), representation="haar"),
    ):
        with pytest.raises(ValueError, match="Unknown representation 'haar'"):
            call()
    with pytest.raises(ValueError, match="no residual pair"):
        optimal_points(spectrum, 3, "w2", -5.0, INF, single_scale=True, representation="residual")
    with pytest.raises(ValueError, match="log 4 apart"):
        optimal_points(spectrum, 3, "w2", (-5.0, -5.0), INF, diagonal=True, representation="residual")


def test_distances_are_the_dense_formulas():
    spectrum = small_spectrum()
    law = Law(torch.tensor([5.0, 1.0, 0.2]).double(), torch.tensor([0.1, 0.05]).double())
    basis = torch.linalg.qr(torch.randn(5, 5, generator=rng(2), dtype=torch.float64)).Q
    p, q = (basis @ torch.diag(torch.cat([x.low, x.high])) @ basis.T for x in (spectrum, law))
    root = scipy.linalg.sqrtm(p.numpy())
    w2 = np.trace(p.numpy() + q.numpy() - 2 * scipy.linalg.sqrtm(root @ q.numpy() @ root).real)
    assert w2_squared(spectrum, law).item() == pytest.approx(w2, rel=1e-8)
    assert kl(spectrum, law).item() == pytest.approx(dense_kl(p, q).item(), rel=1e-10)
    for distance in (w2_squared, kl):
        bands = distance(spectrum, law, by_band=True)
        assert (bands[0] + bands[1]).item() == pytest.approx(distance(spectrum, law).item())
        swapped = distance(spectrum, Law(law.low, spectrum.high), by_band=True)
        assert swapped[0] == bands[0] and swapped[1] == 0 < bands[1]


@pytest.mark.parametrize(
    "points, message",
    [
        ([[0.0, 0.0]], "shape"),
        ([[0.0, 0.0, 0.0], [1.0, 1.0, 1.0]], "shape"),
        ([[0.0, 0.0], [1.0, -1.0]], "never fall"),
        ([[0.0, 0.0], [math.nan, 1.0]], "never fall"),
        ([[0.0, 0.0], [1.0, INF], [INF, INF]], "Only the last"),
    ],
)
def test_bad_points_are_refused(points, message):
    for function in (ddim_output, chain_kl, frozen_drift_output):
        with pytest.raises(ValueError, match=message):
            function(small_spectrum(), torch.tensor(points))


def test_a_clean_end_is_refused_where_it_is_infinite():
    for function in (chain_kl, frozen_drift_output):
        with pytest.raises(ValueError, match="finite"):
            function(small_spectrum(), [0.0, INF])


def hand_made(num_steps, start, end, top=6.0):
    """Diagonals of several spacings, leads of either scale, and both cascades."""
    last = top if math.isinf(end) else end
    u = torch.linspace(0, 1, num_steps + 1, dtype=torch.float64)
    lines = [start + (last - start) * u**p for p in (0.5, 1, 2)]
    pairs = [(line, line) for line in lines] + [(lines[0], lines[1]), (lines[1], lines[0])]
    first = start + (last - start) * (2 * u).clamp(max=1)
    second = start + (last - start) * (2 * u - 1).clamp(min=0)
    points = [torch.stack(pair, 1) for pair in [*pairs, (first, second), (second, first)]]
    for p in points:
        p[-1] = end
    return points


CASES = [("w2", INF), ("w2", 5.0), ("kl", 5.0), ("chain_kl", 5.0)]


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("objective, end", CASES)
def test_optimum_beats_hand_made_paths_and_its_neighbours(objective, end):
    spectrum, start, num_steps = Spectrum.power_law(8, 1), -6.0, 6
    value_of = OBJECTIVES[objective]
    paths = hand_made(num_steps, start, end)
    points, value = optimal_points(spectrum, num_steps, objective, start, end)
    level, level_value = optimal_points(spectrum, num_steps, objective, start, end, diagonal=True)
    line, line_value = optimal_points(spectrum, num_steps, objective, start, end, single_scale=True)
    assert value <= level_value <= min(value_of(spectrum, p).item() for p in paths[:3])
    assert line_value <= min(value_of(spectrum, p[:, 0]).item() for p in paths[:3])
    for path in paths:
        assert value <= value_of(spectrum, path).item()
    again = optimal_points(spectrum, num_steps, objective, start, end, initial=paths[-1])[1]
    assert again == pytest.approx(value, rel=1e-4)
    for p, v, shape in ((points, value, (7, 2)), (level, level_value, (7, 2)), (line, line_value, (7,))):
        assert p.shape == shape and p.dtype == torch.float64
        assert (p[0] == start).all() and (p[-1] == end).all() and (p[1:] >= p[:-1]).all()
        assert v == value_of(spectrum, p).item()
        for seed in range(40):
            noise = torch.randn(p.shape, generator=rng(seed), dtype=torch.float64) * 0.03
            moved = p + (noise[:, :1].expand_as(p) if p is level else noise)
            moved = moved.sort(0).values.clamp(start, end)
            moved[0], moved[-1] = start, end
            assert value_of(spectrum, moved).item() > v * (1 - 1e-9)
    assert torch.equal(level[:, 0], level[:, 1])


@pytest.mark.parametrize("objective, end", CASES)
def test_optimum_of_two_steps_is_that_of_a_scan(objective, end):
    spectrum = small_spectrum()
    start = -5.0
    points, value = optimal_points(spectrum, 2, objective, start, end)
    grid = torch.linspace(start, min(end, 9.0), 43, dtype=torch.float64)
    scan = torch.tensor(
        [
            [OBJECTIVES[objective](spectrum, torch.tensor([[start, start], [a, b], [end, end]])) for b in grid]
            for a in grid
        ]
    )
    assert value <= scan.min()
    assert value == pytest.approx(scan.min().item(), rel=0.02)
    i, j = divmod(int(scan.argmin()), len(grid))
    assert (points[1] - torch.stack([grid[i], grid[j]])).abs().max() < 0.5


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("objective, end", [("w2", INF), ("chain_kl", 5.0)])
def test_optimum_of_the_residual_pair_is_that_of_each_band_alone(objective, end):
    spectrum, start = Spectrum.power_law(8, 1), -14.0  # Here the start of c from N(0, I) is as good as that of x_64.
    case = (6, objective, start, end)
    points, value = optimal_points(spectrum, *case, representation="residual")
    # One clock on the image treats all modes alike, and so the modes of one band like an image of their own.
    bands = [Spectrum(modes[:1], modes[1:]) for modes in (spectrum.high, spectrum.low)]
    (details, detail_value), (low, low_value) = [optimal_points(band, *case, single_scale=True) for band in bands]
    assert value == pytest.approx(detail_value + low_value, rel=1e-4)
    assert (points - torch.stack([details, low + LOG_4], 1))[:-1].abs().max() < 0.02
    assert points[-1].tolist() == [end, end + LOG_4]

    options = dict(diagonal=True, representation="residual")
    level, level_value = optimal_points(spectrum, *case, **options)
    assert torch.equal(level, tied(level[:, 0])) and level[0, 0] == start
    assert value < level_value == OBJECTIVES[objective](spectrum, level, "residual").item()
    one_clock = optimal_points(spectrum, *case, single_scale=True)[1]
    assert level_value == pytest.approx(one_clock, rel=1e-4)
    again = optimal_points(spectrum, *case, initial=level[:, 0], **options)[1]
    assert again == pytest.approx(level_value, rel=1e-6)


def test_a_schedule_of_its_own_lowers_the_detail_error_several_fold_at_equal_low_error():
    spectrum, num_steps, start = Spectrum.power_law(64, channels=1), 18, -10.0
    options = dict(objective="w2", start=start, end=INF, representation="residual")
    level, _ = optimal_points(spectrum, num_steps, diagonal=True, **options)
    own, _ = optimal_points(spectrum, num_steps, **options)
    # The clock of the coarse scale stays that of the image: its error cannot change.
    mixed = torch.stack([own[:, 0], level[:, 1]], 1)
    errors = [
        [v.item() for v in w2_squared(spectrum, ddim_output(spectrum, points, "residual"), by_band=True)]
        for points in (level, own, mixed)
    ]
    (low, detail), (own_low, own_detail), (mixed_low, mixed_detail) = errors
    assert mixed_low == low and own_low <= low
    assert mixed_detail == own_detail < detail / 3


def test_optimum_holds_a_scale_still_exactly_where_that_is_best():
    # Started at far too much signal, the fine scale waits for the coarse one, which then waits at its end.
    points, _ = optimal_points(Spectrum.power_law(8, 1, variance=1.0), 6, "w2", -1.0, 5.0)
    assert (points[:3, 0] == -1.0).all() and (points[1:3, 1] > -1.0).all()
    assert (points[-2:, 1] == 5.0).all() and points[-2, 0] < 5.0
    fixed, value = optimal_points(small_spectrum(), 4, "w2", (-6.0, -6.0), (INF, -6.0))
    assert (fixed[:, 1] == -6.0).all() and value == w2_squared(small_spectrum(), ddim_output(small_spectrum(), fixed))


def test_optimum_of_one_step_has_no_freedom():
    spectrum = small_spectrum()
    for end in (INF, 3.0):
        points, value = optimal_points(spectrum, 1, "w2", -5.0, end)
        assert points.tolist() == [[-5.0, -5.0], [end, end]]
        assert value == w2_squared(spectrum, ddim_output(spectrum, points)).item()


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("start", [-14.0, -13.0, -12.0])
def test_optimum_survives_a_step_that_bounds_clip_to_zero(start):
    # From so far away the first point alone matters little, and the search tries increments that all vanish.
    spectrum = Spectrum.power_law(8, 1)
    value = optimal_points(spectrum, 6, "chain_kl", start, 5.0, single_scale=True)[1]
    nearer = optimal_points(spectrum, 6, "chain_kl", -10.0, 5.0, single_scale=True)[1]
    assert value == pytest.approx(nearer, rel=1e-3)


def test_optimum_says_when_it_is_not_converged(monkeypatch):
    monkeypatch.setattr(gaussian, "GRADIENT_TOLERANCE", 1e-30)
    with pytest.warns(RuntimeWarning, match="not converged"):
        optimal_points(small_spectrum(), 3, "w2", -5.0, INF, diagonal=True)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ((3, "fid", -5.0, 5.0), "Unknown objective"),
        ((0, "w2", -5.0, 5.0), "at least 1"),
        ((3, "w2", 5.0, -5.0), "not above"),
        ((3, "w2", -INF, 5.0), "finite"),
        ((3, "chain_kl", -5.0, INF), "clean end"),
        ((3, "w2", (-5.0, -6.0), INF, True), "equal ends"),
        ((3, "w2", -5.0, INF, True, True), "no diagonal"),
        ((2, "w2", -5.0, INF, False, False, [[-5.0, -5.0], [INF, INF]]), "3 points"),
        ((1, "w2", -5.0, INF, False, False, [[-4.0, -5.0], [INF, INF]]), "must go from"),
        ((2, "w2", -5.0, INF, True, False, [[-5.0, -5.0], [0.0, 1.0], [INF, INF]]), "equal log SNRs"),
    ],
)
def test_bad_optimisations_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        optimal_points(small_spectrum(), *arguments)


def test_power_law_is_the_haar_split_of_a_dct_field():
    n, exponent, variance = 8, 1.7, 0.4
    spectrum = Spectrum.power_law(n, 2, exponent, variance)
    i, j = np.meshgrid(range(n), range(n), indexing="ij")
    power = np.maximum(np.hypot(i, j), 1.0) ** -exponent
    power *= variance * n * n / power.sum()
    # Rows of `fields` are the images of independent DCT coefficients of the right standard deviation.
    fields = np.array([scipy.fft.idctn(unit.reshape(n, n), norm="ortho") for unit in np.eye(n * n)])
    fields *= np.sqrt(power).reshape(-1, 1, 1)
    p, q, r, t = fields[:, ::2, ::2], fields[:, ::2, 1::2], fields[:, 1::2, ::2], fields[:, 1::2, 1::2]
    bands = [(p + q + r + t) / 2, (p - q + r - t) / 2, (p + q - r - t) / 2, (p - q - r + t) / 2]
    transforms = {"even": scipy.fft.dct, "odd": scipy.fft.dst}
    kinds = [("even", "even"), ("even", "odd"), ("odd", "even"), ("odd", "odd")]
    got = [spectrum.low.view(2, 4, 4), *spectrum.high.view(3, 2, 4, 4)]
    for band, (rows, columns), values in zip(bands, kinds, got, strict=True):
        modes = transforms[rows](transforms[columns](band, norm="ortho", axis=2), norm="ortho", axis=1)
        for channel in values:
            np.testing.assert_allclose(channel.numpy(), (modes**2).sum(0), rtol=1e-10)
    assert (spectrum.low.sum() + spectrum.high.sum()).item() == pytest.approx(variance * 2 * n * n)


def test_spectrum_of_images_recovers_the_model_they_were_drawn_from():
    low, high, rotation, mean = parts()
    low[1] *= 20  # Principal colours are ordered by variance, weakest first.
    count = 20_000
    images = GaussianDenoiser(DDIMScheduler(), low, high, rotation, mean).draw(count, rng(11))
    spectrum, found = Spectrum.of_images(images, batch_size=3000)
    tolerance = 5 * math.sqrt(2 / count)
    assert (spectrum.low / low.flatten() - 1).abs().max() < tolerance
    assert (spectrum.high / high.flatten() - 1).abs().max() < 2 * tolerance
    overlap = (found.rotation @ rotation.T).abs()
    torch.testing.assert_close(overlap, torch.eye(C, dtype=torch.float64), atol=0.02, rtol=0)
    assert (found.mean - mean).abs().max() < 0.3
    rebuilt = GaussianDenoiser(DDIMScheduler(), *found)
    torch.testing.assert_close(rebuilt.spectrum().low, spectrum.low)
    assert found.low.shape == low.shape and found.high.shape == high.shape


def test_spectrum_of_grey_images_is_floored():
    grey = torch.randn(50, 1, 4, 4, generator=rng()).expand(-1, 3, -1, -1)
    spectrum, found = Spectrum.of_images(grey)
    assert (found.low[:2] == QUANTISATION_VARIANCE).all() and (found.low[2] > 0.1).all()
    with pytest.raises(ValueError, match="at least 2"):
        Spectrum.of_images(grey[:1])
    with pytest.raises(ValueError, match="even height"):
        Spectrum.of_images(grey[..., 1:])


def test_spectrum_files_round_trip(tmp_path):
    spectrum = small_spectrum()
    file = tmp_path / "folder" / "spectrum.npz"
    spectrum.save(file)
    loaded = Spectrum.load(file)
    assert torch.equal(loaded.low, spectrum.low) and torch.equal(loaded.high, spectrum.high)


def test_bad_spectrum_files_are_named(tmp_path):
    file = tmp_path / "bad.npz"
    with pytest.raises(FileNotFoundError, match="bad.npz does not exist"):
        Spectrum.load(file)
    file.write_bytes(b"PK\x03\x04 not a zip")
    with pytest.raises(ValueError, match="bad.npz is damaged"):
        Spectrum.load(file)
    np.savez(file, sL=np.ones(3))
    with pytest.raises(ValueError, match="bad.npz is not a spectrum.*sL or sH"):
        Spectrum.load(file)
    for bad in ([1.0, -1.0], [1.0, math.nan], [0.0], [[1.0]]):
        np.savez(file, sL=np.ones(3), sH=np.array(bad))
        with pytest.raises(ValueError, match="bad.npz cannot be used.*high"):
            Spectrum.load(file)
    np.savez(file, sL=np.ones(3), sH=np.array(["a"], dtype=object))
    with pytest.raises(ValueError, match="bad.npz"):
        Spectrum.load(file)


def test_power_law_refuses_odd_sizes():
    with pytest.raises(ValueError, match="even resolution"):
        Spectrum.power_law(7)


def data_set(count=7):
    return torch.rand(count, C, H, W, generator=rng(12), dtype=torch.float64) * 2 - 1


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
