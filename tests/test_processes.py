"""Processes as two curves: their formulas, conversions between predictions, and that all are one diffusion."""

import math

import pytest
import torch

from scheduler import PREDICTION_TYPES, PROCESSES, SCHEDULE_NAMES, VE_SIGMAS, DDIMScheduler

T = 1000
TIMES = torch.tensor([1.0, 30.0, 30.25, 500.5, 700.0, 997.75], dtype=torch.float64)


def make(process, prediction_type="v", beta_schedule="cosine", **options):
    return DDIMScheduler(T, beta_schedule, prediction_type, process=process, **options)


def images(seed=0, count=6):
    g = torch.Generator().manual_seed(seed)
    x = torch.rand(count, 3, 4, 4, generator=g, dtype=torch.float64) * 2 - 1
    return x, torch.randn(count, 3, 4, 4, generator=g, dtype=torch.float64)


def test_curves_are_those_of_the_papers():
    t = torch.arange(T, dtype=torch.float64)
    abar = make("vp").alphas_cumprod
    low, high = VE_SIGMAS
    expected = {
        "vp": (abar.sqrt(), (1 - abar).sqrt()),
        "sub_vp": (abar.sqrt(), 1 - abar),
        "ve": (torch.ones(T, dtype=torch.float64), torch.logspace(math.log10(low), math.log10(high), T).double()),
        "flow": (1 - t / 999, t / 999),
    }
    for process, (alpha, sigma) in expected.items():
        scheduler = make(process)
        torch.testing.assert_close(scheduler.alphas, alpha)
        torch.testing.assert_close(scheduler.sigmas, sigma, rtol=2e-6, atol=1e-12)
        torch.testing.assert_close(scheduler.snr[1:-1], ((alpha / sigma) ** 2)[1:-1], rtol=1e-5, atol=1e-12)
        assert scheduler.log_snr.isfinite().all() and (scheduler.log_snr.diff() < 0).all()
        x, noise = images()
        whole = torch.tensor([1, 30, 31, 500, 700, 999])
        noisy = scheduler.add_noise(x, noise, whole)
        for k, t_k in enumerate(whole):
            torch.testing.assert_close(noisy[k], alpha[t_k] * x[k] + sigma[t_k] * noise[k], rtol=1e-5, atol=1e-5)
        assert torch.equal(scheduler.add_noise(x, noise, -1), x)


@pytest.mark.parametrize("process", PROCESSES)
def test_whole_times_are_the_table(process):
    scheduler = make(process, "x0")
    whole = torch.arange(T)
    curves = scheduler.curves(whole.double())
    torch.testing.assert_close(curves.alpha, scheduler.alphas, rtol=1e-12, atol=0)
    x, noise = images(count=T)
    torch.testing.assert_close(
        scheduler.add_noise(x, noise, whole.double()), scheduler.add_noise(x, noise, whole), rtol=1e-10, atol=1e-10
    )


@pytest.mark.parametrize("schedule", SCHEDULE_NAMES)
@pytest.mark.parametrize("process", PROCESSES)
def test_between_whole_times_the_snr_falls_and_slopes_are_those_of_the_curves(process, schedule):
    scheduler = make(process, "x0", schedule)
    t = torch.linspace(0.0, 999.0, 7001, dtype=torch.float64)
    assert (scheduler.log_snr_at(t).diff() < 0).all()
    inside = t[(t > 1) & (t < 997.9)]
    step = 1e-4
    near = [scheduler.curves(inside + step * sign) for sign in (-1, 1)]
    at = scheduler.curves(inside)
    for name, slope in (("alpha", at.d_alpha), ("sigma", at.d_sigma)):
        measured = (getattr(near[1], name) - getattr(near[0], name)) / (2 * step) * 999
        # One-sided second derivatives of the pieces differ at whole times.
        torch.testing.assert_close(slope, measured, rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize("process", PROCESSES)
def test_the_time_of_a_log_snr_is_found(process):
    scheduler = make(process, "x0")
    torch.testing.assert_close(scheduler.time_of(scheduler.log_snr_at(TIMES)), TIMES, rtol=1e-10, atol=1e-8)


@pytest.mark.parametrize("times", [TIMES, TIMES.long()], ids=["real", "whole"])
@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
@pytest.mark.parametrize("process", PROCESSES)
def test_every_prediction_stands_for_the_image_and_the_noise(process, prediction_type, times):
    if process == "flow" and prediction_type in ("epsilon", "score"):
        pytest.skip("Refused at zero SNR.")
    scheduler = make(process, prediction_type)
    x0, noise = images()
    x = scheduler.add_noise(x0, noise, times)
    target = scheduler.target(x0, noise, times)
    torch.testing.assert_close(scheduler.predict_x0(target, times, x), x0, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(scheduler.predict_epsilon(target, times, x), noise, rtol=1e-6, atol=1e-6)


def test_predictions_by_their_definitions():
    x0, noise = images()
    torch.testing.assert_close(make("flow", "velocity").target(x0, noise, TIMES), noise - x0)
    ve = make("ve", "score")
    sigma = ve.curves(TIMES).sigma[:, None, None, None]
    torch.testing.assert_close(ve.target(x0, noise, TIMES), -(ve.add_noise(x0, noise, TIMES) - x0) / sigma**2)
    velocity, (low, high) = make("ve", "velocity"), VE_SIGMAS
    torch.testing.assert_close(velocity.target(x0, noise, TIMES), sigma * math.log(high / low) * noise)
    vp, abar = make("vp", "v"), make("vp").curves(TIMES).alpha[:, None, None, None] ** 2
    torch.testing.assert_close(vp.target(x0, noise, TIMES), abar.sqrt() * noise - (1 - abar).sqrt() * x0)


@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
@pytest.mark.parametrize("process", PROCESSES)
def test_min_snr_weighs_clean_errors_whatever_is_predicted(process, prediction_type):
    """The weighted error of the prediction is min(SNR, 5) times the error of the clean image."""
    if process == "flow" and prediction_type in ("epsilon", "score"):
        pytest.skip("Refused at zero SNR.")
    scheduler = make(process, prediction_type)
    t = torch.tensor([1, 40, 200, 500, 700, 990])
    x0, noise = images()
    x = scheduler.add_noise(x0, noise, t)
    wrong = x0 + 0.01 * images(seed=1)[0]
    alpha, sigma = scheduler.scales(t, x)
    errors = [scheduler.target(other, (x - alpha * other) / sigma, t) for other in (x0, wrong)]
    errors = (errors[0] - errors[1]).square().flatten(1).mean(1)
    clean = (wrong - x0).square().flatten(1).mean(1)
    torch.testing.assert_close(scheduler.min_snr_weight(5.0, t) * errors, scheduler.snr[t].clamp(max=5) * clean)


@pytest.mark.parametrize("eta", [0.0, 0.6, 1.0])
@pytest.mark.parametrize("process", PROCESSES)
def test_steps_are_those_of_the_same_diffusion(process, eta):
    """In x / alpha and sigma / alpha a step is that of DDIM with those, whatever the process (2010.02502, eq. 12)."""
    scheduler = make(process, "x0", clip_sample=False)
    (x0, noise), fresh = images(), images(seed=3)[1]
    t, t_next = torch.tensor([990, 700, 500, 200, 40, 3]), torch.tensor([700, 699, 40, 3, 39, -1])
    x = scheduler.add_noise(x0, noise, t)
    guess = images(seed=4)[0]
    stepped = scheduler.step_from(guess, t, t_next, x, eta, fresh)
    alpha, sigma = scheduler.scales(t, x)
    alpha_next, sigma_next = scheduler.scales(t_next, x)
    now, after = sigma / alpha, sigma_next / alpha_next
    ancestral = eta * (after / now) * (now**2 - after**2).sqrt()
    epsilon = (x / alpha - guess) / now
    expected = guess + (after**2 - ancestral**2).clamp(min=0).sqrt() * epsilon + ancestral * fresh
    torch.testing.assert_close(stepped / alpha_next, expected, rtol=1e-6, atol=1e-6)


def test_sampling_starts_from_the_noise_of_the_process_and_networks_see_unit_size():
    noise = images()[1]
    for process in PROCESSES:
        scale = VE_SIGMAS[1] if process == "ve" else 1.0
        scheduler = make(process)
        torch.testing.assert_close(scheduler.prior(noise, 999), scale * noise)
        shown = scheduler.shown(scheduler.add_noise(0 * noise, noise, 999), 999)
        torch.testing.assert_close(shown, noise, rtol=1e-3, atol=1e-3)
    x = images()[0]
    for t in (0, 400, 999):
        sigma = make("ve").sigmas[t]
        torch.testing.assert_close(make("ve").shown(x, t), x / (1 + sigma**2).sqrt())


@pytest.mark.parametrize("prediction_type", ["epsilon", "score"])
def test_noise_cannot_be_predicted_where_it_is_all_there_is(prediction_type):
    for options in ({"process": "flow"}, {"beta_schedule": "linear_zero_terminal"}):
        with pytest.raises(ValueError, match="zero SNR"):
            DDIMScheduler(prediction_type=prediction_type, **options)


def test_unknown_processes_and_times_are_refused():
    with pytest.raises(ValueError, match="Unknown process 'edm'; choose one of vp, sub_vp, ve, flow."):
        make("edm")
    with pytest.raises(ValueError, match="Timesteps lie in 0..999; got -0.5 to 3."):
        make("vp").curves(torch.tensor([-0.5, 3.0]))
    with pytest.raises(ValueError, match="Timesteps lie in 0..999"):
        make("flow").curves(torch.tensor([999.5]))
