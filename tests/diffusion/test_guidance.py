"""Guidance of Gaussian mixtures, whose classes, posterior means and Bayes classifier have closed forms."""

import itertools

import pytest
import torch

from diffusion.guidance import ClassifierFree, ClassifierGuided, Unconditional
from exact_models import REPRESENTATIONS, Mixture
from scheduler import PREDICTION_TYPES, DDIMScheduler

PROCESSES = ("linear", "cosine", "sub_vp_linear", "ve", "flow")
SCALES = [(1, "overcomplete"), *((2, name) for name in REPRESENTATIONS)]
KINDS = [
    (process, prediction)
    for process, prediction in itertools.product(PROCESSES, PREDICTION_TYPES)
    if process != "flow" or prediction not in ("epsilon", "score")
]
TIMES = [(300, 300), (80, 500), (700, 250)]


def mixture(process, prediction="epsilon", num_scales=1, representation="overcomplete"):
    scheduler = DDIMScheduler(1000, process, prediction, clip_sample=False, representation=representation)
    return Mixture(scheduler, num_scales)


def at(model, times, count=4):
    ts = tuple(torch.full((count,), t) for t in times[: model.num_scales])
    return *model.draw(ts, count), ts


def apart(one, other):
    """The largest difference, in units of the largest value of a scale."""
    return max(((a - b).abs().max() / b.abs().max()).item() for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize(("num_scales", "representation"), SCALES)
@pytest.mark.parametrize(("process", "prediction"), KINDS)
def test_both_guidances_of_a_mixture_are_one(process, prediction, num_scales, representation):
    """The Bayes classifier knows what the class-conditional posterior means know (arXiv 2207.12598, section 3.2)."""
    model = mixture(process, prediction, num_scales, representation)
    for times in TIMES:
        xs, labels, ts = at(model, times)
        told, free = model.denoise(xs, ts, labels), Unconditional(model.denoise)
        assert apart(free(xs, ts, labels), told) > 1e-5  # There is something to guide towards.
        for scale in (0.0, 0.5, 1.0, 3.0):
            by_itself = ClassifierFree(model.denoise, model.null, scale)(xs, ts, labels)
            by_classifier = ClassifierGuided(free, model.log_probability, model.scheduler, scale)(xs, ts, labels)
            assert apart(by_classifier, by_itself) < 1e-8


@pytest.mark.parametrize(("process", "prediction"), KINDS)
def test_both_are_affine_in_the_scale(process, prediction):
    model = mixture(process, prediction, 2)
    xs, labels, ts = at(model, TIMES[1])
    free, told = model.denoise(xs, ts), model.denoise(xs, ts, labels)

    def by_itself(scale):
        return ClassifierFree(model.denoise, model.null, scale)(xs, ts, labels)

    def by_classifier(scale):
        return ClassifierGuided(model.denoise, model.log_probability, model.scheduler, scale)(xs, ts, labels)

    assert apart(by_itself(0.0), free) < 1e-12 and apart(by_itself(1.0), told) < 1e-12
    assert apart(by_classifier(0.0), told) == 0
    for guided in (by_itself, by_classifier):
        low, high, between = guided(0.0), guided(2.0), guided(0.5)
        assert apart(high, low) > 1e-3
        assert apart(between, tuple(0.75 * a + 0.25 * b for a, b in zip(low, high, strict=True))) < 1e-11


@pytest.mark.parametrize("t", [2, 100, 500, 998])
@pytest.mark.parametrize("process", ["linear", "cosine_clipped"])
def test_the_mean_of_an_ancestral_step_moves_by_a_share_of_the_gradient(process, t):
    """beta / sqrt(1 - beta) times scale and gradient: with beta the variance of the step, algorithm 1 of 2105.05233."""
    model = mixture(process)
    scheduler, scale = model.scheduler, 1.7
    xs, labels, ts = at(model, (t,))
    leaf = xs[0].clone().requires_grad_()
    [gradient] = torch.autograd.grad(model.log_probability((leaf,), ts, labels).sum(), leaf)
    guided = ClassifierGuided(Unconditional(model.denoise), model.log_probability, scheduler, scale)
    [after], [before] = (
        tuple(scheduler.step(each, t, t - 1, xs[0], eta=1.0, noise=torch.zeros_like(xs[0])) for each in predictions)
        for predictions in (guided(xs, ts, labels), model.denoise(xs, ts))
    )
    beta = 1 - (scheduler.alphas_cumprod[t] / scheduler.alphas_cumprod[t - 1]).item()
    expected = beta / (1 - beta) ** 0.5 * scale * gradient
    assert torch.allclose(after - before, expected, rtol=1e-7, atol=1e-12 * before.abs().max().item())


def test_the_posterior_mean_of_the_mixture_is_the_score():
    """Tweedie: x + sigma^2 grad log p = alpha E[x0 | x], by the density of the mixture itself."""
    model = mixture("linear")
    xs, _, ts = at(model, (400,))
    alpha, sigma = model.scheduler.scales(ts[0], xs[0])
    leaf = xs[0].clone().requires_grad_()
    spread = alpha.flatten()[0] ** 2 * 0.4**2 + sigma.flatten()[0] ** 2
    away = leaf.flatten(1)[:, None] - alpha.flatten()[0] * model.means
    density = (model.log_prior - away.square().sum(2) / (2 * spread)).logsumexp(1)
    [score] = torch.autograd.grad(density.sum(), leaf)
    assert torch.allclose((xs[0] + sigma.square() * score) / alpha, model.clean(xs, ts)[0], rtol=1e-10, atol=1e-12)


def test_a_scale_that_the_classifier_does_not_read_is_left_as_it_is():
    model, fine = mixture("linear", num_scales=2), mixture("linear")
    xs, labels, ts = at(model, TIMES[1])

    def log_probability(xs, ts, labels):
        return fine.log_probability(xs[:1], ts[:1], labels)

    guided = ClassifierGuided(model.denoise, log_probability, model.scheduler, 2.0)(xs, ts, labels)
    told = model.denoise(xs, ts, labels)
    assert torch.equal(guided[1], told[1]) and apart(guided[:1], told[:1]) > 1e-4


def test_where_nothing_of_the_image_is_left_there_is_nothing_to_guide():
    for process, prediction in (("flow", "velocity"), ("cosine_zero_terminal", "v"), ("cosine_zero_terminal", "x0")):
        model = mixture(process, prediction)
        xs, labels, ts = at(model, (999,))
        guided = ClassifierGuided(
            Unconditional(model.denoise), lambda xs, ts, labels: xs[0].flatten(1).sum(1), model.scheduler, 5.0
        )
        assert torch.equal(guided(xs, ts, labels)[0], model.denoise(xs, ts)[0])


def test_what_is_predicted_beside_the_image_is_left_as_it_is():
    model = mixture("linear")
    xs, labels, ts = at(model, (400,))

    def with_variance(xs, ts, labels=None):
        return tuple(torch.cat([each, torch.full_like(each, 0.3)], 1) for each in model.denoise(xs, ts, labels))

    wide, usual = (
        ClassifierGuided(denoise, model.log_probability, model.scheduler, 2.0)(xs, ts, labels)[0]
        for denoise in (with_variance, model.denoise)
    )
    channels = usual.shape[1]
    assert torch.equal(wide[:, :channels], usual) and (wide[:, channels:] == 0.3).all()


def test_calls_are_counted():
    model = mixture("linear")
    assert ClassifierGuided(model.denoise, model.log_probability, model.scheduler, 1.0).calls == 2
    twice = ClassifierFree(model.denoise, model.null, 2.0)
    assert ClassifierGuided(twice, model.log_probability, model.scheduler, 1.0).calls == 3
