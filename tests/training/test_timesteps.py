"""Laws and weights of timesteps, and their importance, against closed forms, quadrature and counting."""

import copy
import itertools
import math

import numpy as np
import pytest
import torch
from scipy.integrate import quad
from scipy.interpolate import PchipInterpolator
from scipy.stats import norm, truncnorm

import train_lift
from conftest import assert_same
from scheduler import PREDICTION_TYPES, DDIMScheduler
from training.objective import Denoising
from training.timesteps import (
    FEWEST,
    TIMESTEP_WEIGHTS,
    UNIFORM_SHARE,
    Importance,
    densities,
    law_name,
    parse_law,
    prediction_weight,
)

NAMES = ("cosine", "linear", "cosine_zero_terminal", "sub_vp_linear", "sub_vp_cosine_zero_terminal", "ve", "flow")
NO_NOISE = ("epsilon", "score")  # Undefined where a process ends without an image.
KINDS = [
    (name, prediction)
    for name, prediction in itertools.product(NAMES, PREDICTION_TYPES)
    if not (prediction in NO_NOISE and (name == "flow" or name.endswith("zero_terminal")))
]
WEIGHTS = [{"timestep_weights": name} for name in TIMESTEP_WEIGHTS[1:]] + [{"min_snr_gamma": 5.0}]


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


def log_snr(name, t):
    """log SNR at real t of 1000 timesteps, from the formulas of the processes."""
    tau = np.asarray(t, dtype=float) / 999
    if name == "flow":
        with np.errstate(divide="ignore"):
            return 2 * np.log((1 - tau) / tau)
    if name == "ve":
        return -2 * (math.log(0.02) + tau * math.log(5000))
    curve = np.cos((np.arange(1001) / 1000 + 0.008) / 1.008 * math.pi / 2) ** 2
    betas = np.linspace(1e-4, 0.02, 1000) if "linear" in name else np.minimum(1 - curve[1:] / curve[:-1], 0.999)
    root = np.cumprod(1 - betas) ** 0.5
    inner = 1000
    if name.endswith("zero_terminal"):
        root, inner = (root - root[-1]) * root[0] / (root[0] - root[-1]), 999
    values = PchipInterpolator(np.arange(inner), np.log(root[:inner] ** 2 / (1 - root[:inner] ** 2)))(999 * tau)
    if inner == 999:  # The square root of abar falls to 0 in a straight line.
        square = (root[998] * (999 - 999 * tau)) ** 2
        with np.errstate(divide="ignore", invalid="ignore"):
            values = np.where(tau > 998 / 999, np.log(square / (1 - square)), values)
    # sub_vp has abar / (1 - abar)^2, and 1 - abar = 1 / (1 + exp(values)).
    return values + np.logaddexp(0, values) if name.startswith("sub_vp") else values


# Laws of timesteps


@pytest.mark.parametrize("mean, deviation", [(-1.2, 1.2), (4.5, 3), (0, 0.02)])
def test_a_log_normal_of_ve_is_a_normal_cut_off_at_its_ends(mean, deviation):
    low, high = math.log(0.02), math.log(100)
    law = truncnorm((low - mean) / deviation, (high - mean) / deviation, mean, deviation)
    expected = 1000 * np.diff(law.cdf(np.linspace(low, high, 1001)))
    found = densities(f"log_normal:{mean},{deviation}", DDIMScheduler(beta_schedule="ve"))
    assert found.dtype == torch.float64 and found.mean().item() == pytest.approx(1, abs=1e-12)
    np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("name", NAMES)
def test_a_log_normal_of_every_process_counts_the_times_that_it_draws(name):
    t = np.linspace(0, 999, 500_001)
    levels = norm(-1.2, 1.2).ppf((np.arange(1_000_000) + 0.5) / 1_000_000)
    levels = levels[(levels > -log_snr(name, 0) / 2) & (levels < -log_snr(name, 999) / 2)]
    times = np.interp(levels, -log_snr(name, t[1:-1]) / 2, t[1:-1])
    counts = np.histogram(times, np.linspace(0, 999, 1001))[0]
    found = densities("log_normal", DDIMScheduler(beta_schedule=name, prediction_type="x0"))
    np.testing.assert_allclose(found, counts / counts.mean(), atol=5e-3)
    assert found.mean().item() == pytest.approx(1, abs=1e-12) and found.max() > 2


@pytest.mark.parametrize("mean, deviation", [(0, 1), (-0.7, 1.8)])
def test_a_logit_normal_is_the_integral_of_its_density(mean, deviation):
    def density(tau):
        return norm.pdf(math.log(tau / (1 - tau)), mean, deviation) / (tau * (1 - tau))

    found = densities(f"logit_normal:{mean},{deviation}", DDIMScheduler(50, "flow", "velocity"))
    expected = [50 * quad(density, k / 50 + 1e-15, (k + 1) / 50 - 1e-15)[0] for k in range(50)]
    np.testing.assert_allclose(found, expected, rtol=1e-6)


@pytest.mark.parametrize(
    "text, law, name",
    [
        ("uniform", ("uniform", 0, 0), "uniform"),
        ("importance", ("importance", 0, 0), "importance"),
        ("log_normal", ("log_normal", -1.2, 1.2), "log_normal:-1.2,1.2"),
        ("logit_normal", ("logit_normal", 0, 1), "logit_normal:0,1"),
        ("log_normal: -0.50,2e0", ("log_normal", -0.5, 2), "log_normal:-0.5,2"),
    ],
)
def test_one_way_to_write_a_law_comes_out(text, law, name):
    assert parse_law(text) == law == parse_law(name) and law_name(text) == name == law_name(name)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "normal",
        "uniform:1,2",
        "uniform:",
        "importance:0,1",
        "log_normal:",
        "log_normal:1",
        "log_normal:1,",
        "Uniform",
    ]
    + ["log_normal:1,2,3", "log_normal:nan,1", "log_normal:inf,1", "logit_normal:0,0", "logit_normal:0,-1"]
    + ["logit_normal:0,inf", "logit_normal:0,nan", "logit_normal:x,1"],
)
def test_what_is_no_law_is_refused(text):
    with pytest.raises(ValueError, match=f"^'{text}' is no law of timesteps; choose one of uniform"):
        parse_law(text)


def test_a_law_that_draws_nothing_is_refused(refused, tiny, cache, tmp_path):
    flags = [*tiny(tmp_path), "--cache_dir", cache, "--process", "ve", "--t_law"]
    for law in ("log_normal:50,0.1", "log_normal:-9,0.5"):
        says = [f"--t_law {law} draws no timestep of the process 've'", "-3.9 to 4.6 as log(sigma / alpha)"]
        refused(train_lift, *flags, law, says=says)
    # Of the timesteps that the regime leads by it has to draw one, too.
    with pytest.raises(ValueError, match="--t_law log_normal:4,0.1 draws no pair of --t_pairs"):
        config = {"t_pairs": "path:x", "t_pairs_points": [[9, 9], [0, 0]], "t_law": "log_normal:4,0.1"}
        Denoising(config, DDIMScheduler(beta_schedule="ve"))


# Weights of timesteps

INSIDE = (torch.tensor([1, 30, 500, 900, 997]), torch.tensor([0.6, 30.5, 511.25, 900.9, 998.4], dtype=torch.float64))
ENDS = (torch.tensor([0, 999]), torch.tensor([0, 0.01, 998.99, 999], dtype=torch.float64))


def weight_of(config, process, t):
    weight = prediction_weight(config, process)
    return torch.ones(len(t)) if weight is None else weight(t)


@pytest.mark.parametrize("name, prediction_type", KINDS)
def test_a_weighed_error_of_the_prediction_is_the_weighed_error_of_the_clean_image(name, prediction_type):
    process = DDIMScheduler(beta_schedule=name, prediction_type=prediction_type)
    for t in INSIDE:
        x0, noise, error = torch.randn(3, len(t), 1, 4, 4, dtype=torch.float64, generator=rng(3))
        noisy = process.add_noise(x0, noise, t)
        clean = process.predict_x0(process.target(x0, noise, t) + error, t, noisy)
        by_prediction, by_image = ((each**2).mean((1, 2, 3)).numpy() for each in (error, clean - x0))
        t, h = t.numpy(), 1e-4  # Timesteps, of which tau has 999.
        snr, slope = np.exp(log_snr(name, t)), (log_snr(name, t + h) - log_snr(name, t - h)) / (2 * h) * 999
        documented = [snr, snr + 4, -snr * slope, np.maximum(snr, 1), np.minimum(snr, 5)]
        for config, counts, within in zip(WEIGHTS, documented, (1e-6, 1e-6, 2e-4, 1e-6, 1e-6), strict=True):
            found = weight_of(config, process, torch.from_numpy(t)).numpy() * by_prediction
            np.testing.assert_allclose(found, counts * by_image, rtol=within, err_msg=f"{config} at {t}")
    for config, t in itertools.product(WEIGHTS, ENDS):
        weights = weight_of(config, process, t)
        assert weights.isfinite().all() and (weights >= 0).all() and weights.dtype == torch.float64
        if name == "flow":  # They are those half a timestep inside.
            torch.testing.assert_close(weights, weight_of(config, process, t.double().clamp(0.5, 998.5)))
    for config in ({}, {"timestep_weights": "published"}):
        assert prediction_weight(config, process) is None


@pytest.mark.parametrize("name", ["cosine", "linear", "sub_vp_linear", "ve"])
def test_an_error_of_the_noise_is_already_that_of_sigma2(name):
    process = DDIMScheduler(beta_schedule=name)
    for t in INSIDE + ENDS:
        torch.testing.assert_close(weight_of(WEIGHTS[0], process, t), torch.ones(len(t)).double())


# Importance

YES, NO = torch.tensor(True), torch.tensor(False)
ALL = torch.arange(1000)


def one_process(sums):
    return sums


def importance():
    """Of 100 bins of ten timesteps each."""
    return Importance(torch.ones(2, 1000, dtype=torch.bool))


def test_densities_of_importance_become_the_root_mean_squares():
    profile = torch.linspace(0, 3, 100).double().exp()[ALL // 10]
    # The same mean with more spread in the lower half: there the root mean square is larger by sqrt(2).
    spread = torch.where(ALL < 500, profile * 2 * (ALL % 2), profile)
    roots = torch.where(ALL < 500, 2**0.5, 1.0) * profile
    learnt = importance()
    for losses, steps in ((torch.rand(1000).double() * 50, 3), (spread, 200)):  # What was before is forgotten.
        for _ in range(steps):
            learnt.observe(losses, (ALL, 999 - ALL), YES, one_process)
    expected = UNIFORM_SHARE + (1 - UNIFORM_SHARE) * roots / roots.mean()
    torch.testing.assert_close(learnt.densities(), torch.stack([expected, expected.flip(0)]), rtol=1e-4, atol=1e-6)
    assert learnt.densities().mean(1).tolist() == pytest.approx([1, 1])


def test_only_timesteps_that_lead_are_waited_for_and_share_the_draws():
    leads = torch.stack([ALL < 300, ALL < 0])
    learnt, early = Importance(leads), torch.arange(300)
    learnt.observe((early // 10 + 1) ** 2.0, (early, early), YES, one_process)
    roots = (early // 10 + 1).double() ** 2
    expected = UNIFORM_SHARE + (1 - UNIFORM_SHARE) * roots / roots.mean()
    torch.testing.assert_close(learnt.densities()[0, :300], expected)
    assert (learnt.densities()[~leads] == 1).all()


def test_a_mean_is_over_all_losses_until_there_are_a_hundred():
    learnt = importance()
    for value, times in ((1.0, 1), (5.0, 3), (2.0, 2)):
        learnt.observe(torch.full((1000 * times,), value), (ALL.repeat(times),) * 2, YES, one_process)
    assert learnt.state["seen"].unique().tolist() == [60]
    assert learnt.state["squares"].unique().tolist() == pytest.approx([(10 * 1 + 30 * 25 + 20 * 4) / 60])
    for _ in range(2):  # Of a hundred losses these ten, and then more than there are.
        learnt.observe(torch.full((1000,), 2.0), (ALL, ALL), YES, lambda sums: 4 * sums)
    before = learnt.state["squares"][0, 0].item()
    learnt.observe(torch.full((1000,), 9.0), (ALL, ALL), YES, one_process)
    assert learnt.state["squares"].unique().tolist() == pytest.approx([0.9 * before + 0.1 * 81])


def test_importance_is_uniform_until_every_bin_is_known_and_learns_of_good_steps_alone():
    learnt, losses, later = importance(), (ALL + 1.0), ALL[ALL % 10 > 0]
    uniform = torch.ones(2, 1000).double()
    assert FEWEST == 10 and torch.equal(learnt.densities(), uniform)
    learnt.observe(losses[later], (later, later), YES, one_process)  # Nine in every bin.
    assert torch.equal(learnt.densities(), uniform)
    before = copy.deepcopy(learnt.state)
    for bad in (losses, losses * math.nan):
        learnt.observe(bad, (ALL, ALL), NO, one_process)
        assert_same(learnt.state, before)
    missing = ALL[(ALL // 10 != 40) & (ALL % 10 == 0)]
    learnt.observe(losses[missing], (missing, missing), YES, one_process)
    assert torch.equal(learnt.densities(), uniform)
    learnt.observe(losses[400:401], (ALL[400:401], ALL[500:501]), YES, one_process)
    assert torch.equal(learnt.densities(), uniform)  # The other clock has not been there.
    learnt.observe(losses[400:401], (ALL[400:401], ALL[400:401]), YES, one_process)
    assert learnt.densities()[:, 999].min() > 1.9 and learnt.densities()[:, 0].max() < 0.1
    learnt.observe(losses * 0, (ALL, ALL), YES, lambda sums: 1e3 * sums)  # Nothing to go by.
    assert torch.equal(learnt.densities(), uniform)
