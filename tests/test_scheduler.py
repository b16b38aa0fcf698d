import math

import pytest
import torch
from diffusers import DDIMScheduler as ReferenceScheduler
from diffusers.schedulers.scheduling_ddim import betas_for_alpha_bar, rescale_zero_terminal_snr

from scheduler import (
    BETA_SCHEDULES,
    CLEAN,
    PREDICTION_TYPES,
    SCHEDULE_NAMES,
    DDIMScheduler,
    make_alphas_cumprod,
)

REFERENCE_NAMES = {"epsilon": "epsilon", "x0": "sample", "v": "v_prediction"}


def images(seed=0, dtype=torch.float64):
    """Clean images in [-1, 1] and standard normal noise, `[2, 3, 4, 4]`."""
    g = torch.Generator().manual_seed(seed)
    x = torch.rand(2, 3, 4, 4, generator=g, dtype=torch.float64) * 2 - 1
    return x.to(dtype), torch.randn(2, 3, 4, 4, generator=g, dtype=torch.float64).to(dtype)


def prediction_type_for(name):
    return "v" if name.endswith("_zero_terminal") else "epsilon"


def test_cosine_clipped_has_the_published_values():
    scheduler = DDIMScheduler()
    for t, value in {0: 0.9999, 500: 0.49210, 990: 0.0038319, 999: 0.0031948}.items():
        assert scheduler.alphas_cumprod[t].item() == pytest.approx(value, rel=2e-5)
    assert scheduler.log_snr[0].item() == pytest.approx(9.210, abs=5e-4)
    assert scheduler.log_snr[999].item() == pytest.approx(-5.743, abs=5e-4)


def test_cosine_clipped_is_a_plain_product():
    product = 1.0
    table = make_alphas_cumprod("cosine_clipped")
    for t in range(1000):
        curve = [math.cos((u / 1000 + 0.008) / 1.008 * math.pi / 2) ** 2 for u in (t, t + 1)]
        product *= 1 - min(max(1 - curve[1] / curve[0], 1e-4), 0.02)
        assert table[t].item() == pytest.approx(product, rel=1e-12)


def test_cosine_equals_diffusers_and_almost_ends_in_noise():
    table = make_alphas_cumprod("cosine")
    reference = torch.cumprod(1 - betas_for_alpha_bar(1000).double(), dim=0)  # Their betas are float32.
    torch.testing.assert_close(table, reference, rtol=1e-3, atol=1e-9)
    assert table[999].item() == pytest.approx(2.4e-9, rel=0.02)


def test_cosine_of_the_report_is_a_plain_product_between_its_bounds():
    table, product, clipped = make_alphas_cumprod("cosine_report"), 1.0, []
    for t in range(1000):
        curve = [math.cos((u / 1000 + 0.008) / 1.008 * math.pi / 2) ** 2 for u in (t, t + 1)]
        beta = 1 - curve[1] / curve[0]
        clipped += [t] * (not 1e-4 <= beta <= 0.9999)
        product *= 1 - min(max(beta, 1e-4), 0.9999)
        assert table[t].item() == pytest.approx(product, rel=1e-12)
    # The first betas are raised and the last one is lowered; between them, abar is cos² again.
    assert clipped[:1] == [0] and clipped[-1] == 999 and len(clipped) < 30
    first = clipped[-2] + 1
    curve = [math.cos((u / 1000 + 0.008) / 1.008 * math.pi / 2) ** 2 for u in (first, 999)]
    assert (table[998] / table[first - 1]).item() == pytest.approx(curve[1] / curve[0], rel=1e-9)
    assert (table[999] / table[998]).item() == pytest.approx(1e-4, rel=1e-9)


def test_linear_has_its_end_points():
    table = make_alphas_cumprod("linear")
    assert 1 - table[0].item() == pytest.approx(1e-4, rel=1e-9)
    assert 1 - (table[999] / table[998]).item() == pytest.approx(0.02, rel=1e-9)
    reference = ReferenceScheduler(beta_start=1e-4, beta_end=0.02, beta_schedule="linear").alphas_cumprod
    torch.testing.assert_close(table, reference.double(), rtol=1e-3, atol=0)


@pytest.mark.parametrize("name", SCHEDULE_NAMES)
def test_tables_are_float64_falling_and_consistent(name):
    scheduler = DDIMScheduler(beta_schedule=name, prediction_type=prediction_type_for(name))
    abar = scheduler.alphas_cumprod
    assert abar.shape == (1000,)
    assert abar.dtype == scheduler.snr.dtype == scheduler.log_snr.dtype == torch.float64
    assert (abar.diff() < 0).all() and 0 <= abar[-1] and abar[0] < 1
    torch.testing.assert_close(scheduler.snr / (1 + scheduler.snr), abar)
    torch.testing.assert_close(scheduler.log_snr, abar.log() - torch.log1p(-abar))


@pytest.mark.parametrize("base", BETA_SCHEDULES)
def test_zero_terminal_ends_at_exactly_zero_and_keeps_the_start(base):
    plain = make_alphas_cumprod(base)
    scheduler = DDIMScheduler(beta_schedule=base + "_zero_terminal", prediction_type="v")
    table = scheduler.alphas_cumprod
    assert table[-1] == 0 and scheduler.snr[-1] == 0 and scheduler.log_snr[-1] == -math.inf
    assert table[0].item() == pytest.approx(plain[0].item(), rel=1e-14)
    betas = 1 - plain / torch.cat([torch.ones(1, dtype=torch.float64), plain[:-1]])
    reference = torch.cumprod(1 - rescale_zero_terminal_snr(betas), dim=0)
    torch.testing.assert_close(table, reference, rtol=1e-9, atol=0)


def test_conversions_undo_each_other():
    x0, epsilon = images()
    for t in (0, 10, 500, 999):
        abar = make_alphas_cumprod("cosine_clipped")[t]
        x = abar.sqrt() * x0 + (1 - abar).sqrt() * epsilon
        v = abar.sqrt() * epsilon - (1 - abar).sqrt() * x0
        schedulers = {name: DDIMScheduler(prediction_type=name) for name in ("epsilon", "x0", "v")}
        for name, prediction in (("epsilon", epsilon), ("x0", x0), ("v", v)):
            torch.testing.assert_close(schedulers[name].predict_x0(prediction, t, x), x0)
            torch.testing.assert_close(schedulers[name].predict_epsilon(prediction, t, x), epsilon)
        # (x, v) is (x0, epsilon) turned by an angle, so it has the same length.
        torch.testing.assert_close(x**2 + v**2, x0**2 + epsilon**2)


@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
def test_target_stands_for_the_clean_image(prediction_type):
    scheduler = DDIMScheduler(prediction_type=prediction_type)
    x0, noise = images()
    t = torch.tensor([30, 900])
    x = scheduler.add_noise(x0, noise, t)
    torch.testing.assert_close(scheduler.predict_x0(scheduler.target(x0, noise, t), t, x), x0)


def test_noise_is_added_per_image_at_its_own_timestep():
    scheduler = DDIMScheduler()
    x0, noise = images()
    t = torch.tensor([10, 999])
    x = scheduler.add_noise(x0, noise, t)
    for k in range(2):
        abar = scheduler.alphas_cumprod[t[k]].item()
        torch.testing.assert_close(x[k], math.sqrt(abar) * x0[k] + math.sqrt(1 - abar) * noise[k])
        torch.testing.assert_close(scheduler.add_noise(x0, noise, int(t[k]))[k], x[k])
    assert torch.equal(scheduler.add_noise(x0, noise, CLEAN), x0)
    assert scheduler.add_noise(x0.float(), noise.float(), t).dtype == torch.float32


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("clip", [True, False])
@pytest.mark.parametrize("prediction_type", REFERENCE_NAMES)
@pytest.mark.parametrize("name", ["cosine_clipped", "linear", "cosine_zero_terminal"])
def test_steps_equal_those_of_diffusers(name, prediction_type, clip, eta):
    if name == "cosine_zero_terminal" and prediction_type == "epsilon":
        pytest.skip("Noise prediction is refused at zero terminal SNR.")
    ours = DDIMScheduler(beta_schedule=name, prediction_type=prediction_type, clip_sample=clip)
    theirs = ReferenceScheduler(
        prediction_type=REFERENCE_NAMES[prediction_type],
        clip_sample=clip,
        set_alpha_to_one=True,
        timestep_spacing="trailing",
    )
    theirs.alphas_cumprod = ours.alphas_cumprod.clone()  # Theirs are float32, too coarse to compare with.
    theirs.final_alpha_cumprod = torch.tensor(1.0, dtype=torch.float64)
    theirs.set_timesteps(20)
    timesteps = theirs.timesteps.tolist()
    assert timesteps[0] == 999 and len(timesteps) == 20
    g = torch.Generator().manual_seed(3)
    x = torch.randn(2, 3, 4, 4, generator=g, dtype=torch.float64)
    for t in timesteps:
        prediction = torch.randn(x.shape, generator=g, dtype=torch.float64)  # Often far outside [-1, 1].
        noise = torch.randn(x.shape, generator=g, dtype=torch.float64)
        options = {"variance_noise": noise} if eta else {}
        expected = theirs.step(prediction, t, x, eta=eta, use_clipped_model_output=True, **options).prev_sample
        t_next = t - 50 if t >= 50 else CLEAN
        got = ours.step(prediction, t, t_next, x, eta=eta, noise=noise if eta else None)
        # They square a rounded root, which leaves 1e-16 of variance, 1e-8 of noise, where none is due.
        torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-7)
        x = got


def test_step_is_euler_in_sigma_hat():
    scheduler = DDIMScheduler(clip_sample=False)
    x, epsilon = images()
    sigma_hat = ((1 - scheduler.alphas_cumprod) / scheduler.alphas_cumprod).sqrt()
    for t, t_next in [(999, 0), (999, 998), (500, 3), (1, 0)]:
        x_next = scheduler.step(epsilon, t, t_next, x)
        x_hat = x / scheduler.alphas_cumprod[t].sqrt()
        x_hat_next = x_next / scheduler.alphas_cumprod[t_next].sqrt()
        torch.testing.assert_close(x_hat_next, x_hat + (sigma_hat[t_next] - sigma_hat[t]) * epsilon)
    x_clean = scheduler.step(epsilon, 500, CLEAN, x)
    torch.testing.assert_close(x_clean, x / scheduler.alphas_cumprod[500].sqrt() - sigma_hat[500] * epsilon)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("name", SCHEDULE_NAMES)
@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
def test_step_with_the_true_answer_lands_on_the_noisy_image(prediction_type, name, dtype):
    if prediction_type in ("epsilon", "score") and name != "cosine_clipped":
        prediction_type = prediction_type_for(name)
    scheduler = DDIMScheduler(beta_schedule=name, prediction_type=prediction_type)
    x0, noise = images(dtype=dtype)
    for t, t_next in [(999, 998), (999, 0), (990, 935), (500, 499), (500, CLEAN), (1, 0), (0, CLEAN)]:
        ts = torch.full((2,), t)
        answer = scheduler.target(x0, noise, ts)
        got = scheduler.step(answer, t, t_next, scheduler.add_noise(x0, noise, ts))
        assert got.dtype == dtype
        tolerance = 8 * torch.finfo(dtype).eps
        if prediction_type in ("epsilon", "score"):  # Rounding of x is divided by the little signal that x holds.
            tolerance /= scheduler.alphas_cumprod[t].sqrt().item()
        torch.testing.assert_close(got, scheduler.add_noise(x0, noise, t_next), rtol=0, atol=tolerance)


@pytest.mark.parametrize("eta", [0.0, 0.7, 1.0])
@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
def test_step_to_clean_is_the_clamped_prediction(prediction_type, eta):
    x, prediction = images()
    prediction = 3 * prediction
    scheduler = DDIMScheduler(prediction_type=prediction_type)
    x0 = scheduler.predict_x0(prediction, 500, x)
    assert x0.abs().max() > 1
    got = scheduler.step(prediction, 500, CLEAN, x, eta=eta, noise=torch.randn_like(x))
    torch.testing.assert_close(got, x0.clamp(-1, 1))


@pytest.mark.parametrize("clip", [True, False])
@pytest.mark.parametrize("representation", ["overcomplete", "residual"])
@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
def test_clean_scales_are_clamped_as_one_image(prediction_type, representation, clip):
    scheduler = DDIMScheduler(prediction_type=prediction_type, representation=representation, clip_sample=clip)
    generator = torch.Generator().manual_seed(4)
    x0s, noises = (
        [2 * torch.randn(2, 1, side, side, generator=generator, dtype=torch.float64) for side in (4, 2)]
        for _ in range(2)
    )

    def means(x):
        return x.reshape(2, 1, 2, 2, 2, 2).mean((3, 5))

    def enlarged(x):
        return x.repeat_interleave(2, 2).repeat_interleave(2, 3)

    if representation == "residual":  # Whose blocks sum to zero.
        x0s[0], noises[0] = (x - enlarged(means(x)) for x in (x0s[0], noises[0]))
    ts = torch.tensor([400, 20]), torch.tensor([7, 650])
    xs = [scheduler.add_noise(x0, noise, t) for x0, noise, t in zip(x0s, noises, ts, strict=True)]
    predictions = [scheduler.target(x0, noise, t) for x0, noise, t in zip(x0s, noises, ts, strict=True)]
    expected = list(x0s)
    if clip and representation == "overcomplete":
        expected = [x0.clamp(-1, 1) for x0 in x0s]
    elif clip:
        image = (x0s[0] + enlarged(x0s[1])).clamp(-1, 1)
        expected = [image - enlarged(means(image)), means(image)]
    for found, wanted in zip(scheduler.predict_clean(predictions, ts, xs), expected, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-9)
    if representation == "overcomplete":
        # A model may predict the first scale alone.
        [alone] = scheduler.predict_clean(predictions[:1], ts, xs)
        torch.testing.assert_close(alone, expected[0], rtol=1e-9, atol=1e-9)


def test_clamped_step_derives_the_noise_again():
    scheduler = DDIMScheduler(prediction_type="x0")
    x, _ = images()
    abar, abar_next = scheduler.alphas_cumprod[800], scheduler.alphas_cumprod[700]
    got = scheduler.step(torch.full_like(x, 5.0), 800, 700, x)
    epsilon = (x - abar.sqrt()) / (1 - abar).sqrt()
    torch.testing.assert_close(got, abar_next.sqrt() + (1 - abar_next).sqrt() * epsilon)


@pytest.mark.parametrize("t", [1, 250, 998, 999])
def test_eta_one_is_the_ddpm_posterior(t):
    scheduler = DDIMScheduler(prediction_type="x0")
    x0, x = images()
    abar, abar_next = scheduler.alphas_cumprod[t], scheduler.alphas_cumprod[t - 1]
    alpha = abar / abar_next
    zero, one = torch.zeros_like(x), torch.ones_like(x)
    mean = scheduler.step(x0, t, t - 1, x, eta=1.0, noise=zero)
    posterior_mean = abar_next.sqrt() * (1 - alpha) / (1 - abar) * x0 + alpha.sqrt() * (1 - abar_next) / (1 - abar) * x
    torch.testing.assert_close(mean, posterior_mean)
    variance = (scheduler.step(x0, t, t - 1, x, eta=1.0, noise=one) - mean) ** 2
    torch.testing.assert_close(variance, ((1 - abar_next) / (1 - abar) * (1 - alpha)).expand_as(x))


@pytest.mark.parametrize("eta", [0.0, 0.3, 1.0])
def test_every_eta_keeps_the_noise_level(eta):
    scheduler = DDIMScheduler(prediction_type="x0")
    g = torch.Generator().manual_seed(0)
    x0 = torch.full((1, 1, 200, 200), 0.25, dtype=torch.float64)
    first, fresh = (torch.randn(x0.shape, generator=g, dtype=torch.float64) for _ in range(2))
    x = scheduler.step(x0, 900, 400, scheduler.add_noise(x0, first, 900), eta=eta, noise=fresh)
    abar = scheduler.alphas_cumprod[400].item()
    assert (x - math.sqrt(abar) * x0).var().item() == pytest.approx(1 - abar, rel=0.05)  # 7 standard errors.


def test_nothing_moves_or_changes_in_place():
    scheduler = DDIMScheduler()
    before = {name: getattr(scheduler, name).clone() for name in ("alphas_cumprod", "snr", "log_snr")}
    moved = scheduler.to("meta")
    x, noise = images()
    copies = x.clone(), noise.clone()
    scheduler.step(noise, 999, 500, x, eta=0.5, noise=noise)
    scheduler.add_noise(x, noise, torch.tensor([1, 2]))
    assert torch.equal(x, copies[0]) and torch.equal(noise, copies[1])
    for name, table in before.items():
        assert getattr(moved, name).device.type == "meta"
        assert torch.equal(getattr(scheduler, name), table)
    assert moved.beta_schedule == "cosine_clipped" and moved.prediction_type == "epsilon"


@pytest.mark.parametrize(
    "options, message",
    [
        (
            {"beta_schedule": "cosin"},
            r"^Unknown beta schedule 'cosin'; choose one of cosine_clipped, .*zero_terminal\.$",
        ),
        ({"beta_schedule": "_zero_terminal"}, r"^Unknown beta schedule '_zero_terminal'; choose one of "),
        (
            {"prediction_type": "eps"},
            r"^Unknown prediction type 'eps'; choose one of epsilon, x0, v, velocity, score\.$",
        ),
        ({"representation": "haar"}, r"^Unknown representation 'haar'; choose one of overcomplete, residual\.$"),
        (
            {"beta_schedule": "cosine_zero_terminal"},
            r"'vp cosine_zero_terminal' ends at zero SNR.*use .* v, velocity or x0\.$",
        ),
    ],
)
def test_wrong_settings_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        DDIMScheduler(**options)


@pytest.mark.parametrize("t, t_next", [(5, 5), (5, 6), (CLEAN, CLEAN), (0, -2), (1000, 5)])
def test_steps_that_do_not_go_down_are_refused(t, t_next):
    x, noise = images()
    with pytest.raises(ValueError, match=rf"^A DDIM step must go from a timestep in 0\.\.999.*got {t} to {t_next}\.$"):
        DDIMScheduler().step(noise, t, t_next, x)


def test_eta_is_checked():
    x, noise = images()
    for eta in (-0.1, 1.1, math.nan):
        with pytest.raises(ValueError, match=r"^eta must lie in \[0, 1\]"):
            DDIMScheduler().step(noise, 5, 4, x, eta=eta, noise=noise)
    with pytest.raises(ValueError, match=r"^A step with eta = 0\.5 needs noise"):
        DDIMScheduler().step(noise, 5, 4, x, eta=0.5)


@pytest.mark.parametrize("prediction_type", ["epsilon", "x0", "v"])
def test_a_timestep_per_image_is_as_many_steps(prediction_type):
    scheduler = DDIMScheduler(prediction_type=prediction_type)
    g = torch.Generator().manual_seed(0)
    x, prediction = (torch.randn(4, 3, 4, 4, generator=g, dtype=torch.float64) for _ in range(2))
    t, t_next = torch.tensor([999, 400, 30, 0]), torch.tensor([500, 399, CLEAN, CLEAN])
    together = scheduler.step(prediction, t, t_next, x)
    for k in range(4):
        row = slice(k, k + 1)
        alone = scheduler.step(prediction[row], int(t[k]), int(t_next[k]), x[row])
        torch.testing.assert_close(together[row], alone, rtol=0, atol=0)
    with pytest.raises(ValueError, match="lower one"):
        scheduler.step(prediction, t, torch.tensor([500, 400, CLEAN, CLEAN]), x)


@pytest.mark.parametrize("prediction_type", ["epsilon", "x0", "v"])
def test_noise_that_a_prediction_stands_for(prediction_type):
    scheduler = DDIMScheduler(prediction_type=prediction_type)
    g = torch.Generator().manual_seed(1)
    x, noise = (torch.randn(3, 1, 4, 4, generator=g, dtype=torch.float64) for _ in range(2))
    t = torch.tensor([900, 400, 3])
    noisy, target = scheduler.add_noise(x, noise, t), scheduler.target(x, noise, t)
    torch.testing.assert_close(scheduler.predict_epsilon(target, t, noisy), noise, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("prediction_type", ["epsilon", "x0", "v"])
@pytest.mark.parametrize("gamma", [0.3, 5.0])
def test_min_snr_weighs_the_error_of_the_clean_image(prediction_type, gamma):
    # arXiv 2303.09556: whatever is predicted, the loss is min(SNR, gamma) times that of the clean image.
    scheduler = DDIMScheduler(prediction_type=prediction_type)
    generator = torch.Generator().manual_seed(0)
    x, noise, x0 = (torch.randn(5, 1, 4, 4, generator=generator, dtype=torch.float64) for _ in range(3))
    t = torch.tensor([0, 100, 400, 700, 999])
    alpha_bar = scheduler.alphas_cumprod[t].view(-1, 1, 1, 1)
    z = alpha_bar.sqrt() * x + (1 - alpha_bar).sqrt() * noise
    epsilon = (z - alpha_bar.sqrt() * x0) / (1 - alpha_bar).sqrt()
    velocity = alpha_bar.sqrt() * epsilon - (1 - alpha_bar).sqrt() * x0
    prediction = {"epsilon": epsilon, "x0": x0, "v": velocity}[prediction_type]
    error = (prediction - scheduler.target(x, noise, t)).square().flatten(1).mean(1)
    snr = (alpha_bar / (1 - alpha_bar)).flatten()
    expected = torch.where(snr < gamma, snr, gamma) * (x0 - x).square().flatten(1).mean(1)
    torch.testing.assert_close(error * scheduler.min_snr_weight(gamma, t), expected)
