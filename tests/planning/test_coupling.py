import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import figures.coupling
from figure_checks import check_file, check_layout
from figures.coupling import CONDITION_TITLES, plot_coupling
from planning.coupling import CONDITIONS, COUPLING_ERRORS, against_own, measure_coupling, ratio_of_means
from planning.error_map import CLIPPED_MSES, MSES, error_map
from scheduler import DDIMScheduler
from truth.gaussian import GaussianDenoiser, Spectrum, mse

SCHEDULER = DDIMScheduler()
T_64 = [999, 700, 450, 200, 40, 0]
RESOLUTION, CHANNELS, COUNT = 8, 3, 400


@pytest.fixture(scope="module")
def exact():
    """The exact denoiser of images of 8x8 pixels, and draws of it."""
    spectrum = Spectrum.power_law(RESOLUTION, CHANNELS)
    half = RESOLUTION // 2
    denoiser = GaussianDenoiser(
        SCHEDULER, spectrum.low.view(CHANNELS, half, half), spectrum.high.view(3, CHANNELS, half, half)
    )
    return denoiser, denoiser.draw(COUNT, torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def measured(exact):
    denoiser, images = exact
    return measure_coupling(denoiser.denoise, SCHEDULER, images, T_64, seed=3, batch_size=150, progress=False)


def closed_form(spectrum, t_64, condition):
    """The error of the linear estimator l̂ = g (√a z_64 + √b z_32 / 2), g = s / (1 + s (a + b/4)), at any coarse input.

    With z_64 = √a l + n and z_32 = c u + k m of independent standard normal n and m, u the low mode shown, the error
    is (1 - g (a + √b c / 2))² s + g² (a + b k² / 4) for u = l, and for an independent u of the same variance s
    (1 - g a)² s + g² (a + b (c² s + k²) / 4).
    """
    t_32 = {"clean": 0, "noise": 999}.get(condition, 0 if condition.endswith("_at_0") else t_64)
    a, b = SCHEDULER.snr[t_64], SCHEDULER.snr[t_32]
    deviation = (1 - SCHEDULER.alphas_cumprod[t_32]).sqrt()
    share, noise = b.sqrt() / 2, 1.0
    if condition == "clean":
        share, noise = 1 / (2 * deviation), 0.0  # The signal is not scaled down, as the estimator believes it is.
    elif condition == "noise":
        share, noise = 0.0, 1 / deviation
    s, h = spectrum.low, spectrum.high
    g = s / (1 + s * (a + b / 4))
    if condition in ("noise", "shuffled", "shuffled_at_0"):
        low = (1 - g * a) ** 2 * s + g**2 * (a + b * (share**2 * s + noise**2) / 4)
    else:
        low = (1 - g * (a + b.sqrt() * share / 2)) ** 2 * s + g**2 * (a + b * noise**2 / 4)
    return (low.sum() + (h / (1 + h * a)).sum()).item()


@pytest.fixture(scope="module")
def truth(exact):
    spectrum = exact[0].spectrum()
    return torch.tensor([[closed_form(spectrum, t, condition) for condition in CONDITIONS] for t in T_64]).double()


# The closed form


def test_the_closed_form_agrees_with_the_optimal_errors(exact, truth):
    spectrum, infinity = exact[0].spectrum(), math.inf
    log_snr = SCHEDULER.log_snr[T_64]
    column = dict(zip(CONDITIONS, truth.T, strict=True))
    torch.testing.assert_close(column["own"], mse(spectrum, log_snr, log_snr)[0], rtol=1e-5, atol=0)
    torch.testing.assert_close(column["own_at_0"], mse(spectrum, log_snr, SCHEDULER.log_snr[0])[0], rtol=1e-5, atol=0)
    # A coarse image without any noise leaves the details, but for the noise that its timestep claims there is.
    details = (spectrum.high / (1 + spectrum.high * SCHEDULER.snr[T_64][:, None])).sum(1)
    torch.testing.assert_close(column["clean"][:4], details[:4], rtol=1e-3, atol=0)
    assert ((details < column["clean"]) & (column["clean"] < column["own_at_0"])).all()
    # Pure noise says nothing, and is hardly trusted.
    torch.testing.assert_close(column["noise"], mse(spectrum, log_snr, torch.tensor(-infinity))[0], rtol=1e-2, atol=0)


@pytest.mark.parametrize("condition", CONDITIONS)
def test_gaussian_images_have_the_errors_of_the_closed_form(measured, truth, condition):
    k = CONDITIONS.index(condition)
    compared = against_own(measured["mse_64"])
    own = truth[:, CONDITIONS.index("own")]
    for name, expected in (("mean", truth[:, k]), ("difference", truth[:, k] - own), ("ratio", truth[:, k] / own)):
        found, error = compared[name][:, k], compared[f"{name}_se"][:, k]
        # Fine images at t = 0 and coarse ones of equal timesteps are the same input, whose difference has no error.
        assert ((found - expected).abs() <= 4 * error + 1e-9 * expected.abs()).all(), (name, found, expected, error)


def test_the_test_tells_the_conditions_apart(measured):
    compared = against_own(measured["mse_64"])
    column = {name: k for k, name in enumerate(CONDITIONS)}
    z = compared["difference"] / compared["difference_se"]
    middle = T_64.index(450)
    assert (z[middle, [column["clean"], column["own_at_0"]]] < -10).all()
    assert (z[middle, [column["noise"], column["shuffled"], column["shuffled_at_0"]]] > 10).all()
    # Pairs share fine image and noise, and so differ by less than their errors vary.
    single = compared["mean_se"]
    assert compared["difference_se"][middle, column["noise"]] < 0.5 * single[middle, column["noise"]]


# The inputs


def test_own_is_a_cell_of_the_error_map(exact, measured):
    denoiser, images = exact
    found = error_map(denoiser.denoise, SCHEDULER, images, T_64, seed=3, batch_size=400, progress=False, maps="mse")
    names = MSES + CLIPPED_MSES
    line = torch.arange(len(T_64))
    for error in COUPLING_ERRORS:
        cells = found["mse_per_image"][names.index(error)].double()
        for condition, column in (("own", line), ("own_at_0", torch.full_like(line, len(T_64) - 1))):
            ours = measured[error][:, CONDITIONS.index(condition)]
            torch.testing.assert_close(ours, cells[line, column], rtol=1e-5, atol=0)
    assert (measured["mse_64"] != measured["clipped_mse_64"]).any()


def test_what_the_denoiser_is_given():
    images = torch.rand(6, 3, 4, 4, dtype=torch.float64) * 2 - 1
    x_32, calls = F.avg_pool2d(images, 2), []

    def denoise(xs, ts):
        calls.append((xs, ts))
        return tuple(torch.zeros_like(x) for x in xs)

    found = measure_coupling(denoise, SCHEDULER, images, [600, 30], progress=False)
    assert found["t_64"].tolist() == [600, 30]
    assert found["t_32"].tolist() == [[600, 0, 0, 999, 600, 0], [30, 0, 0, 999, 30, 0]]
    assert len(calls) == 2 * len(CONDITIONS)
    for i, t_64 in enumerate([600, 30]):
        given = dict(zip(CONDITIONS, calls[i * len(CONDITIONS) :], strict=False))
        for k, (xs, ts) in enumerate(given.values()):
            assert torch.equal(xs[0], given["own"][0][0])
            assert ts[0].tolist() == [t_64] * 6 and ts[1].tolist() == [found["t_32"][i, k]] * 6
        coarse = {name: xs[1] for name, (xs, _) in given.items()}
        torch.testing.assert_close(coarse["clean"], x_32)
        for name, t in (("own", t_64), ("own_at_0", 0)):
            signal, noise = SCHEDULER.alphas_cumprod[t].sqrt(), (1 - SCHEDULER.alphas_cumprod[t]).sqrt()
            torch.testing.assert_close(coarse[name], signal * x_32 + noise * coarse["noise"])
        partners = []
        for name in ("shuffled", "shuffled_at_0"):
            own = coarse[name.replace("shuffled", "own")]
            partners.append([next(j for j in range(6) if torch.equal(x, own[j])) for x in coarse[name]])
        assert partners[0] == partners[1]
        # One cycle through all images: nobody is its own partner.
        visited = [0]
        while len(visited) < 6:
            visited.append(partners[0][visited[-1]])
        assert sorted(visited) == list(range(6))


def test_the_size_of_calls_and_the_order_of_timesteps_do_not_matter(exact):
    denoiser, images = exact
    options = {"seed": 5, "progress": False}
    one = measure_coupling(denoiser.denoise, SCHEDULER, images[:9], [800, 100], batch_size=4, **options)
    other = measure_coupling(denoiser.denoise, SCHEDULER, images[:9], [100, 800], batch_size=9, **options)
    for error in COUPLING_ERRORS:
        torch.testing.assert_close(one[error], other[error].flip(0))


def test_calls_have_64_images_unless_told_otherwise():
    sizes = []

    def denoise(xs, ts):
        sizes.append((len(xs[0]), len(xs[1]), len(ts[0]), len(ts[1])))
        return xs

    measure_coupling(denoise, SCHEDULER, torch.zeros(65, 1, 2, 2), [500], progress=False)
    assert sizes == [(64,) * 4, (1,) * 4] * len(CONDITIONS)


def test_who_ignores_the_coarse_image_errs_alike(exact):
    denoiser, images = exact

    def blind(xs, ts):
        return denoiser.denoise((xs[0], torch.zeros_like(xs[1])), (ts[0], torch.full_like(ts[1], 999)))

    compared = against_own(measure_coupling(blind, SCHEDULER, images[:20], T_64, progress=False)["mse_64"])
    assert (compared["ratio"] == 1).all() and not compared["ratio_se"].any()
    assert not compared["difference"].any() and not compared["difference_se"].any()


@pytest.mark.parametrize("prediction_type", ["x0", "v"])
def test_the_prediction_type_does_not_matter(exact, measured, prediction_type):
    denoiser, images = exact
    scheduler = DDIMScheduler(prediction_type=prediction_type)
    other = GaussianDenoiser(scheduler, denoiser.variances[0], denoiser.variances[1:])
    found = measure_coupling(other.denoise, scheduler, images, T_64, seed=3, progress=False)
    torch.testing.assert_close(found["mse_64"], measured["mse_64"], rtol=1e-6, atol=1e-9)


def test_impossible_measurements_are_refused():
    def measure(images, t_64=(500,), **options):
        return measure_coupling(lambda xs, ts: xs, SCHEDULER, images, t_64, progress=False, **options)

    images = torch.zeros(2, 3, 4, 4)
    for bad in (images[:1], images[0], images.long(), images[..., :3]):
        with pytest.raises(ValueError, match="at least 2 images"):
            measure(bad)
    # The fewest and the first and last of what is allowed.
    assert measure(images, (999, 0), batch_size=1)["t_64"].tolist() == [999, 0]
    for t_64, named in (((), "none"), ((1000,), "1000"), ((5, -1), "-1")):
        with pytest.raises(ValueError, match=f"positive SNR in 0 to 999, at least one, but {named}"):
            measure(images, t_64)
    with pytest.raises(ValueError, match="batch_size is 0"):
        measure(images, batch_size=0)
    with pytest.raises(ValueError, match="not finite"):
        measure(images + math.nan)
    ending = DDIMScheduler(beta_schedule="cosine_zero_terminal", prediction_type="v")
    with pytest.raises(ValueError, match="positive SNR"):
        measure_coupling(lambda xs, ts: xs, ending, images, [999], progress=False)


# Ratios


def test_the_error_of_a_ratio_is_that_of_the_jackknife():
    generator = torch.Generator().manual_seed(0)
    below = 3 + torch.rand(2, 50, generator=generator, dtype=torch.float64)
    above = 2 * below + torch.randn(2, 50, generator=generator, dtype=torch.float64)
    ratio, error = ratio_of_means(above, below)
    keep = ~torch.eye(50, dtype=torch.bool)
    for row in range(2):
        left_out = torch.stack([above[row, k].mean() / below[row, k].mean() for k in keep])
        jackknife = ((49 / 50) * (left_out - left_out.mean()).square().sum()).sqrt()
        assert ratio[row] == pytest.approx((above[row].mean() / below[row].mean()).item())
        assert error[row] == pytest.approx(jackknife.item(), rel=0.02)


def test_what_both_means_share_has_no_error():
    below = torch.tensor([1.0, 5.0, 3.0])
    ratio, error = ratio_of_means(2 * below, below)
    assert ratio == 2 and error == 0
    ratio, error = ratio_of_means(torch.tensor([[6.0]]), torch.tensor([[3.0]]))
    assert ratio.tolist() == [2.0] and error.isnan().all()


# The figure

LOG_SNR_64 = SCHEDULER.log_snr[T_64].numpy()
RNG = np.random.default_rng(0)


def made_up_panels(columns=("raw weights", "EMA"), rows=("as predicted", "clamped to [-1, 1]"), names=CONDITIONS):
    return {
        (column, row): {name: (np.exp(RNG.uniform(-1, 2, 6)), RNG.uniform(0, 0.1, 6)) for name in names}
        for row in rows
        for column in columns
    }


def coupling_figure(panels):
    return figures.coupling._coupling_figure(panels, LOG_SNR_64, T_64, "title")


def test_every_condition_but_own_has_a_curve():
    assert ("own", *CONDITION_TITLES) == CONDITIONS


def test_the_figure_is_a_picture_of_the_announced_size(tmp_path):
    check_file(lambda file: plot_coupling(made_up_panels(), LOG_SNR_64, T_64, file, "title"), (1470, 1215), tmp_path)


@pytest.mark.parametrize("panels", [made_up_panels(), made_up_panels(("EMA",)), made_up_panels(names=("own", "clean"))])
def test_nothing_overlaps_or_leaves_the_page(panels):
    check_layout(coupling_figure(panels))


def test_ratios_are_drawn_against_the_log_snr():
    panels = made_up_panels()
    figure = coupling_figure(panels)
    for axes, (name, curves) in zip(figure.axes, panels.items(), strict=True):
        assert axes.get_title(loc="left") == ", ".join(name)
        for drawn, condition in zip(axes.containers, CONDITION_TITLES, strict=True):
            ratio, error = curves[condition]
            np.testing.assert_array_equal(drawn[0].get_xydata(), np.stack([LOG_SNR_64, ratio], 1))
            bars = np.array([segment[:, 1] for segment in drawn[2][0].get_segments()])
            np.testing.assert_allclose(bars, np.stack([ratio - error, ratio + error], 1))
        assert [line.get_ydata() for line in axes.lines if line.get_linestyle() == ":"] == [[1, 1]]
    labels = [text.get_text() for text in figure.legends[0].get_texts()]
    assert labels[1:] == list(CONDITION_TITLES.values())


def test_incomplete_coupling_is_refused(tmp_path):
    file = tmp_path / "figure.png"

    def draw(panels):
        plot_coupling(panels, LOG_SNR_64, T_64, file)

    panels, name = made_up_panels(), ("EMA", "as predicted")
    with pytest.raises(ValueError, match="no coupling to draw"):
        draw({})
    with pytest.raises(ValueError, match="no panel of EMA and as predicted"):
        draw({key: value for key, value in panels.items() if key != name})
    with pytest.raises(ValueError, match="dreamt of EMA, as predicted is unknown"):
        draw(panels | {name: {"dreamt": panels[name]["clean"]}})
    with pytest.raises(ValueError, match=r"clean of EMA, as predicted has ratios \[5\]"):
        draw(panels | {name: {"clean": (np.ones(5), np.ones(5))}})
    with pytest.raises(ValueError, match="not positive and finite"):
        draw(panels | {name: {"clean": (np.zeros(6), np.ones(6))}})
    assert not file.exists()
