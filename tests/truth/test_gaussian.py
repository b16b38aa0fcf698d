"""The closed-form denoiser against dense linear algebra, exact Jacobians and simulation."""

import itertools
import math

import numpy as np
import pytest
import scipy.fft
import torch
import torch.nn.functional as F

from exact_models import (
    INF,
    LOG_4,
    N_32,
    N_64,
    REPRESENTATIONS,
    C,
    H,
    W,
    data_set,
    dense_basis,
    fine_of,
    model,
    noisy,
    parts,
    pooling,
    rng,
    small_spectrum,
    tied,
)
from planning.error_map import error_map
from scheduler import DDIMScheduler
from truth.gaussian import (
    QUANTISATION_VARIANCE,
    GaussianDenoiser,
    Spectrum,
    exact_heatmap,
    information,
    jacobian_maps,
    mse,
    mse_maps,
)
from truth.ideal import EmpiricalDenoiser
from truth.linear_sampler import chain_kl, ddim_output, frozen_drift_output, start_kl
from truth.optimal_points import optimal_points


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


@pytest.mark.parametrize("representation", REPRESENTATIONS)
@pytest.mark.parametrize("point", [(-3.0, 2.0), (0.5, 0.5), (4.0, -INF)])
def test_noised_images_have_the_dense_covariance(representation, point):
    denoiser, basis, s = model()
    images = basis.T @ torch.diag(s) @ basis
    a, b = torch.tensor(point, dtype=torch.float64).sigmoid()
    fine, enlarge = fine_of(representation), 4 * pooling().T @ pooling()
    if representation == "overcomplete":
        covariance, at = a * images + (1 - a) * torch.eye(N_64, dtype=torch.float64), point[0]
    else:
        # The sum of both scales: r + noise in its subspace, and the enlarged coarse image with noise of its own.
        kept = a.sqrt() * fine + b.sqrt() * enlarge
        covariance, at = kept @ images @ kept.T + (1 - a) * fine @ fine.T + 4 * (1 - b) * enlarge, point
    law = denoiser.spectrum().noised(at, representation)
    torch.testing.assert_close(basis @ covariance @ basis.T, torch.diag(torch.cat(law)), rtol=1e-10, atol=1e-10)


def test_maps_are_of_finite_log_snrs_on_a_line_and_of_two_predictions():
    spectrum = small_spectrum()
    for function in (mse_maps, jacobian_maps):
        with pytest.raises(ValueError, match="must be finite numbers"):
            function(spectrum, [0.0, INF])
        with pytest.raises(ValueError, match=r"lines of a grid \[n\], but are \[1, 2\]"):
            function(spectrum, [[0.0, 1.0]])
    with pytest.raises(ValueError, match="Unknown Jacobian 'v'; choose eps or x0"):
        jacobian_maps(spectrum, [0.0], of="v")


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
    content = exact_heatmap(spectrum, scheduler, t_grid, representation="residual")
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


@pytest.mark.parametrize("arguments", [(7,), (1,), (0,), (-2,), (8, 0), (8, 1, 2.0, 0.0), (8, 1, 2.0, math.nan)])
def test_power_law_refuses_what_is_no_image(arguments):
    with pytest.raises(ValueError, match="even resolution, at least 1 channel and a positive variance"):
        Spectrum.power_law(*arguments)


def test_the_smallest_power_law_has_one_mode_of_each_band():
    # Of 2x2 pixels every DCT coefficient is a Haar one, and |k| is 0, 1, 1 and √2.
    spectrum = Spectrum.power_law(2, 1, 2.0, 0.7)
    power = torch.tensor([1, 1, 1, 1 / 2], dtype=torch.float64) * 0.7 * 4 / 3.5
    torch.testing.assert_close(torch.cat([spectrum.low, spectrum.high]), power)


def test_two_images_are_enough_and_modes_may_have_no_variance():
    spectrum, found = Spectrum.of_images(data_set(2))
    half = data_set(2).diff(dim=0).square().sum().item() / 2  # Of both deviations from the mean, divided by 2 - 1.
    assert (spectrum.low.sum() + spectrum.high.sum()).item() == pytest.approx(half, rel=1e-6)
    low, high = torch.zeros_like(found.low), torch.zeros_like(found.high)
    still = GaussianDenoiser(DDIMScheduler(), low, high, mean=found.mean)
    torch.testing.assert_close(still.draw(2, rng()), found.mean.expand(2, -1, -1, -1))
    with pytest.raises(ValueError, match="positive finite"):
        still.spectrum()


def test_an_exact_heatmap_counts_the_dimensions_of_its_images():
    spectrum, scheduler = Spectrum.power_law(8, 2), DDIMScheduler()
    content = exact_heatmap(spectrum, scheduler, [999, 0], channels=2)
    counts = [content[f"num_{name}"] for name in ("dims_64", "dims_32", "pixels_64", "pixels_32")]
    assert counts == [128, 32, 64, 16] and content["representation"] == "overcomplete"
    assert torch.equal(content["mse_64_low"], 4 * content["mse_32"])
    with pytest.raises(ValueError, match="128 modes are no images of 3 channels"):
        exact_heatmap(spectrum, scheduler, [999, 0])
