"""The bound of the chain of DDPM: its known gaps, sums by hand, probabilities that sum to 1, and what is refused."""

import math

import numpy as np
import pytest
import torch
from scipy.stats import norm

from diffusion import elbo as module
from diffusion.elbo import NOISE, TIMESTEPS, bits_of_grey_levels, check_timesteps, ddpm_chain, elbo
from diffusion.likelihood import DEQUANTISATION, DIRECTIONS, bits_per_dim
from diffusion.solvers import Ancestral
from diffusion.step import Step
from images.representation import RESIDUAL
from model import LIFTDualTimestepModel, SingleTimestepModel
from paths.families import diagonal, log_snr_shift
from paths.path import Path
from scheduler import DDIMScheduler
from truth.gaussian import GaussianDenoiser

S = 0.5


def make(schedule="linear", prediction="x0", count=1000, representation="overcomplete", clip=False):
    return DDIMScheduler(count, schedule, prediction, clip, representation)


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


def white(scheduler, variance):
    """The exact denoiser of numbers N(0, variance), each by itself, of a network that predicts x0."""

    def denoise(xs, ts):
        alpha, sigma = scheduler.scales(ts[0], xs[0])
        return (alpha * variance / (alpha**2 * variance + sigma**2) * xs[0],)

    return denoise


def gap_of(ratios):
    """KL in nats of Gaussians of equal means whose variances are the ratio, summed."""
    ratios = np.asarray(ratios)
    return (ratios - 1 - np.log(ratios)).sum() / 2


class Square:
    """Noise whose products with an image s, s, -s, -s, and with itself, have the means of N(0, 1), exactly."""

    def __init__(self, seeds):
        self.count = len(seeds)

    def draw(self, shape, device):
        return torch.tensor([[1.0, -1.0], [1.0, -1.0]]).expand(self.count, *shape)


class Known:
    """Of N(0, s^2) and the linear schedule of 1000 steps, by the forward chain alone; index i is x_i given x_i+1."""

    betas = np.linspace(1e-4, 0.02, 1000)
    abar = np.cumprod(np.append(1, 1 - betas))
    marginal = abar * S**2 + 1 - abar
    backward = marginal[:-1] * betas / marginal[1:]
    tilde = betas * (1 - abar[:-1]) / (1 - abar[1:])
    clipped = np.append(tilde[1], tilde[1:])


@pytest.mark.parametrize(
    "variance, drawn, expected, rest",
    [("beta", Known.betas, 0.00109, None), ("beta_tilde", Known.clipped, 0.5699, 0.456), ("best", None, 0.0, None)],
)
def test_the_bound_has_its_known_gap(monkeypatch, variance, drawn, expected, rest):
    """Nats per dimension below the likelihood of Gaussian data, with the noise of every term at its second moments."""
    monkeypatch.setattr(module, "SeededNoise", Square)
    scheduler = make()
    chain = ddpm_chain(scheduler, diagonal(999, num_scales=1), "beta" if variance == "beta" else "beta_tilde")
    if variance == "best":
        drawn = Known.backward
        chain = chain._replace(ratios=torch.tensor((Known.tilde / drawn)[:0:-1].copy())[:, None], last=(drawn[0],))
    images = S * torch.tensor([[[[1.0, 1.0], [-1.0, -1.0]]]], dtype=torch.float64)
    found = elbo(white(scheduler, S**2), scheduler, chain, images)
    entropy = math.log(2 * math.pi * S**2) / 2 + 0.5
    gap = -found.elbo.item() / 4 - entropy
    assert gap == pytest.approx(gap_of(Known.marginal[-1]) + gap_of(Known.backward / drawn), abs=1e-8)
    assert gap == pytest.approx(expected, abs=5e-6 if variance == "beta" else 5e-5)
    assert found.nfe.item() == 1001
    torch.testing.assert_close(found.elbo, -(found.prior + found.steps + found.last))
    given = Known.abar[-1]  # KL of N(sqrt(abar) x, 1 - abar) from N(0, 1) at x^2 = s^2.
    assert found.prior.item() / 4 == pytest.approx((given * (S**2 - 1) - math.log(1 - given)) / 2, abs=1e-12)
    if rest is not None:  # Without the last step, whose exact variance is the first of `backward`.
        last = found.last.item() / 4 - math.log(2 * math.pi * math.e * Known.backward[0]) / 2
        assert gap - last == pytest.approx(rest, abs=5e-4)


def saying(denoise, shares):
    """A denoiser that says these shares v besides, by timestep `[T]` or one for all."""

    def call(xs, ts):
        v = (shares[t] if isinstance(shares, torch.Tensor) else torch.full(t.shape, shares) for t in ts)
        said = (2 * each.to(x.dtype)[:, None, None, None].expand_as(x) - 1 for each, x in zip(v, xs, strict=True))
        return tuple(torch.cat(pair, 1) for pair in zip(denoise(xs, ts), said, strict=True))

    return call


def test_the_bound_of_the_best_learned_variance_is_the_likelihood_but_for_the_prior(monkeypatch):
    """Of Gaussian data, with the v that the true chain has: entropy + KL(q_T || N) and nothing more."""
    monkeypatch.setattr(module, "SeededNoise", Square)
    scheduler = make()
    shares = np.log(Known.backward / Known.clipped) / np.log(Known.betas / Known.clipped)
    assert ((shares > 0) & (shares < 1)).all()
    chain = ddpm_chain(scheduler, diagonal(999, num_scales=1), "learned")
    images = S * torch.tensor([[[[1.0, 1.0], [-1.0, -1.0]]]], dtype=torch.float64)
    found = elbo(saying(white(scheduler, S**2), torch.from_numpy(shares)), scheduler, chain, images)
    entropy = math.log(2 * math.pi * S**2) / 2 + 0.5
    assert -found.elbo.item() / 4 - entropy == pytest.approx(gap_of(Known.marginal[-1]), abs=1e-9)
    assert gap_of(Known.marginal[-1]) < 1e-9
    # A tenth of a share off is seen at once.
    off = elbo(saying(white(scheduler, S**2), torch.from_numpy(shares) - 0.1), scheduler, chain, images)
    assert found.elbo.item() - off.elbo.item() > 0.01


@pytest.mark.parametrize("bytes_", [True, False])
@pytest.mark.parametrize("v, variance", [(1.0, "beta"), (0.0, "beta_tilde")])
@pytest.mark.parametrize("representation", ["overcomplete", "residual"])
def test_a_learned_variance_at_its_ends_is_that_of_the_ends(representation, v, variance, bytes_):
    """With both clocks on ways of their own, on which they rest at times."""
    scheduler = make("cosine", "epsilon", 30, representation, clip=True)
    path = diagonal(29, num_scales=1 if representation == "overcomplete" else 2, num_train_timesteps=30)
    if representation == "residual":
        path = log_snr_shift(path, math.log(4), scheduler.log_snr.numpy())
    pixels = torch.randint(0, 256, (2, 2, 4, 4), generator=rng(), dtype=torch.uint8)
    images = pixels if bytes_ else pixels.double() / 127.5 - 1
    chains = (ddpm_chain(scheduler, path, name) for name in ("learned", variance))
    found, expected = (elbo(saying(tiny, v), scheduler, chain, images) for chain in chains)
    for one, other in zip(found[:1] + found[2:], expected[:1] + expected[2:], strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5 if bytes_ else 1e-9, atol=1e-6)


def test_the_last_step_may_have_a_variance_of_its_own_for_each_block():
    x, mean = torch.randn(2, 3, 2, 4, 6, generator=rng()).double() / 50
    coarse = 1e-5 + torch.rand(3, 2, 2, 3, generator=rng(1)).double() / 1e4
    fine = torch.nn.functional.interpolate(
        1e-5 + torch.rand(3, 2, 2, 3, generator=rng(2)).double() / 1e4, scale_factor=2
    )
    found = module._last_step(x, mean, (fine, coarse), module.log_density)
    expected = torch.zeros(3, dtype=torch.float64)
    blocks = [torch.nn.functional.pixel_unshuffle(each, 2).unflatten(1, (2, 4)) for each in (x, mean)]
    for b, c, i, j in np.ndindex(3, 2, 2, 3):
        law = covariance(fine[b, c, 2 * i, 2 * j].item(), coarse[b, c, i, j].item())
        law = torch.distributions.MultivariateNormal(blocks[1][b, c, :, i, j], law)
        expected[b] += law.log_prob(blocks[0][b, c, :, i, j])
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-8)


def test_a_chain_that_wants_variances_refuses_a_network_that_says_none():
    scheduler = make(count=20)
    chain = ddpm_chain(scheduler, diagonal(19, num_scales=1, num_train_timesteps=20), "learned")
    with pytest.raises(ValueError, match="has not learnt the variance of its steps; pass --variance beta"):
        elbo(tiny, scheduler, chain, torch.zeros(1, 1, 4, 4))


def tiny(xs, ts):
    """A rough network of one or two scales, not linear, whose predictions depend on the times and on both scales."""
    mixed = xs[0].flatten(1).mean(1) + xs[-1].flatten(1).square().mean(1)
    return tuple(
        torch.tanh(x * (1 + k) - x.flip(-1) / 2 + (mixed + t / 10)[:, None, None, None])
        for k, (x, t) in enumerate(zip(xs, ts, strict=True))
    )


def draws(seed, shape, count):
    generator = np.random.default_rng((seed, NOISE))
    return [generator.standard_normal(shape, np.float32).astype(np.float64) for _ in range(count)]


@pytest.mark.parametrize("bytes_", [True, False])
@pytest.mark.parametrize("variance", ["beta", "beta_tilde"])
@pytest.mark.parametrize("prediction", ["epsilon", "x0", "v"])
def test_the_bound_is_the_sum_by_hand(prediction, variance, bytes_):
    """Of eight steps, by the formulas of arXiv 2006.11239 (eq. 6, 7 and 13) in NumPy."""
    steps, shape, seeds = 8, (2, 2, 4), [3, 11]
    scheduler = make("cosine_clipped", prediction, steps)
    pixels = torch.randint(0, 256, (2, *shape), generator=rng(), dtype=torch.uint8)
    pixels[0, 0, 0] = torch.tensor([0, 255, 0, 255])  # Both ends.
    x = pixels.numpy() / 127.5 - 1
    images = pixels if bytes_ else torch.from_numpy(x)
    chain = ddpm_chain(scheduler, diagonal(steps - 1, num_scales=1, num_train_timesteps=steps), variance)
    found = elbo(tiny, scheduler, chain, images, seeds=seeds)

    abar = scheduler.alphas_cumprod.numpy()
    before = np.append(1, abar[:-1])
    betas = 1 - abar / before
    tilde = betas * (1 - before) / (1 - abar)
    kept = betas if variance == "beta" else np.append(tilde[1], tilde[1:])
    for k, seed in enumerate(seeds):
        noise = draws(seed, shape, steps + 1)
        total = (abar[-1] * x[k] ** 2 - abar[-1] - np.log(1 - abar[-1])).sum() / 2

        def seen(t, e, k=k):
            z = abar[t] ** 0.5 * x[k] + (1 - abar[t]) ** 0.5 * e
            z = torch.from_numpy(z)[None]
            z = z.float() if bytes_ else z
            said = tiny((z,), (torch.tensor([t]),))[0][0].double().numpy()
            z = z[0].double().numpy()
            a, s = abar[t] ** 0.5, (1 - abar[t]) ** 0.5
            return z, {"epsilon": (z - s * said) / a, "x0": said, "v": a * z - s * said}[prediction]

        for t in range(steps - 1, 0, -1):
            z, x0 = seen(t, noise[steps - 1 - t])
            weights = before[t] ** 0.5 * betas[t], (1 - betas[t]) ** 0.5 * (1 - before[t])
            true, ours = ((weights[0] * clean + weights[1] * z) / (1 - abar[t]) for clean in (x[k], x0))
            ratio = tilde[t] / kept[t]
            total += ((true - ours) ** 2 / kept[t] + ratio - 1 - np.log(ratio)).sum() / 2
        lasts = []
        for e in noise[-2:]:
            _, x0 = seen(0, e)
            if bytes_:
                above = np.where(pixels[k] == 255, 1, norm.cdf((x[k] + 1 / 255 - x0) / kept[0] ** 0.5))
                below = np.where(pixels[k] == 0, 0, norm.cdf((x[k] - 1 / 255 - x0) / kept[0] ** 0.5))
                # Far above its grey level a probability is a difference of numbers near 1.
                upper = norm.sf((x[k] - 1 / 255 - x0) / kept[0] ** 0.5) - np.where(
                    pixels[k] == 255, 0, norm.sf((x[k] + 1 / 255 - x0) / kept[0] ** 0.5)
                )
                lasts.append(-np.log(np.where(x0 < x[k], upper, above - below)).sum())
            else:
                lasts.append(-norm.logpdf(x[k], x0, kept[0] ** 0.5).sum())
        assert -found.elbo[k].item() == pytest.approx(total + np.mean(lasts), rel=2e-4 if bytes_ else 1e-9)
        assert found.last[k].item() == pytest.approx(np.mean(lasts), rel=2e-4 if bytes_ else 1e-9)
    assert found.nfe.tolist() == [steps + 1] * 2 and found.elbo.dtype == torch.float64


@pytest.mark.parametrize("variance", ["beta", "beta_tilde"])
@pytest.mark.parametrize("schedule", ["linear", "cosine_zero_terminal", "sub_vp_linear", "ve"])
def test_the_chain_is_that_of_the_solver(schedule, variance):
    """KL of its steps from the true ones by the means and deviations of both, on a path that leaves out timesteps."""
    scheduler = make(schedule)
    path = Path([(999,), (700,), (300,), (20,), (0,)], "test", {})
    chain, solver = ddpm_chain(scheduler, path, variance), Ancestral(variance)
    z, x, x0 = torch.randn(3, 1, 1, 1, 5, generator=rng()).double()
    for k, ((t,), (t_next,)) in enumerate(zip(path.points, path.points[1:], strict=False)):

        def step(clean, noise, t=t, t_next=t_next):
            return solver.step(Step(scheduler, (t,), (t_next,), (z,), (clean,), None, lambda: (noise,)))[0]

        mean, none = step(x0, torch.zeros_like(z)), torch.zeros_like(z)
        deviation = (step(x0, torch.ones_like(z)) - mean).flatten()[0].item()
        (a, s), (a_next, s_next) = ((scheduler.alphas[i].item(), scheduler.sigmas[i].item()) for i in (t, t_next))
        # Bayes: z_next = a_next x + s_next e is seen once more through z = c z_next + d e'.
        c = a / a_next
        seen = s**2 - (c * s_next) ** 2
        true_variance = 1 / (1 / s_next**2 + c**2 / seen)
        true_mean = true_variance * (a_next * x / s_next**2 + c * z / seen)
        ratio = true_variance / deviation**2
        expected = ((true_mean - mean).square() / deviation**2 + ratio - 1 - math.log(ratio)).sum() / 2
        r, gain = chain.ratios[k, 0], chain.gains[k, 0]
        found = (5 * (r - 1 - r.log()) + r * gain * (x - x0).square().sum()) / 2
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(step(x, none), true_mean, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("deviation", [0.003, 0.01, 0.5])
@pytest.mark.parametrize("mean", [-30.0, -1.001, -0.3, 0.0, 0.77, 1.0, 8.0])
def test_grey_levels_have_probabilities(mean, deviation):
    """They sum to 1 over all levels, and agree with SciPy where that is exact."""
    x = torch.arange(256, dtype=torch.float64) / 127.5 - 1
    logs = module.log_probability(x, torch.full_like(x, mean), deviation)
    assert logs.isfinite().all() and logs.exp().sum().item() == pytest.approx(1, abs=1e-12)
    inner = norm.cdf((x[1:-1] + 1 / 255 - mean) / deviation) - norm.cdf((x[1:-1] - 1 / 255 - mean) / deviation)
    sure = np.abs(x[1:-1].numpy() - mean) < 4 * deviation
    np.testing.assert_allclose(logs[1:-1].exp().numpy()[sure], inner[sure], rtol=1e-9)
    # Far away probabilities are differences of those of tails.
    near, off = (np.abs(x[1:-1].numpy() - mean) + shift / 255 for shift in (-1, 1))
    near, off = (norm.logsf(edge / deviation) for edge in (near, off))
    expected = near + np.log(-np.expm1(off - near))
    beside = np.abs(x[1:-1].numpy() - mean) > 1 / 255
    np.testing.assert_allclose(logs[1:-1].numpy()[beside], expected[beside], rtol=1e-9)
    ends = norm.logcdf((1 / 255 - 1 - mean) / deviation), norm.logsf((1 - 1 / 255 - mean) / deviation)
    np.testing.assert_allclose(logs[[0, -1]], ends, rtol=1e-9, atol=1e-300)


def covariance(fine, coarse):
    return fine * (torch.eye(4) - 0.25).double() + coarse * torch.ones(4, 4).double()


@pytest.mark.parametrize("fine, coarse", [(1e-4, 1e-4), (1e-4, 2.5e-5), (4e-4, 1e-6)])
def test_the_last_step_of_the_pair_has_the_density_of_its_noise(fine, coarse):
    x, mean = torch.randn(2, 3, 2, 4, 6, generator=rng()).double() / 50
    found = module._last_step(x, mean, (fine, coarse), module.log_density)
    blocks = [torch.nn.functional.unfold(each.flatten(0, 1)[:, None], 2, stride=2) for each in (x, mean)]  # [6, 4, 6]
    law = torch.distributions.MultivariateNormal(torch.zeros(4).double(), covariance(fine, coarse))
    expected = law.log_prob((blocks[0] - blocks[1]).transpose(1, 2)).sum(1).view(3, 2).sum(1)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-8)
    # The same of the pair, in the subspace of details, with the log 2 of `likelihood`.
    (r, c), dims = RESIDUAL.split(x - mean), x[0].numel()
    pair = -(r.square().flatten(1).sum(1) / fine + c.square().flatten(1).sum(1) / coarse) / 2
    pair -= dims / 8 * (3 * math.log(2 * math.pi * fine) + math.log(2 * math.pi * coarse))
    torch.testing.assert_close(found, pair - dims / 4 * math.log(2), rtol=1e-10, atol=1e-8)


@pytest.mark.parametrize("fine, coarse", [(1e-4, 1e-4), (1e-4, 1e-5)])
def test_the_grey_levels_of_a_block_sum_to_one(fine, coarse):
    """Over all blocks of 19^4 grey levels about the mean, outside of which there is nothing to speak of."""
    levels = torch.cartesian_prod(*[torch.arange(89, 108).double()] * 4).view(-1, 1, 2, 2)
    x, mean = levels / 127.5 - 1, torch.tensor([[97.6, 98.2], [98.0, 98.9]]).double() / 127.5 - 1
    logs = module._last_step(x, mean.expand_as(x), (fine, coarse), module.log_probability)
    assert logs.exp().sum().item() == pytest.approx(1, abs=1e-6)
    # The noise of a block is shared, so that the mean over it is as sure as the coarse image.
    middle = x.flatten(1).mean(1)
    variance = (logs.exp() * (middle - mean.mean()).square()).sum().item()
    assert variance == pytest.approx(coarse, rel=0.15, abs=2e-6)


@pytest.mark.parametrize("variance", ["beta", "beta_tilde"])
@pytest.mark.parametrize("clocks", ["image", "equal"])
def test_the_bound_of_the_pair_lies_below_the_density_by_the_gap_of_its_bands(clocks, variance):
    """Each mode is a chain of its own, of which some steps rest; coarse ones are half the low modes."""
    low, high, count = 1.5, 0.04, 4000
    scheduler = make("cosine", count=30, representation="residual")
    path = diagonal(29, num_train_timesteps=30)
    if clocks == "image":
        path = log_snr_shift(path, math.log(4), scheduler.log_snr.numpy())
    chain = ddpm_chain(scheduler, path, variance)
    denoiser = GaussianDenoiser(scheduler, torch.full((1, 2, 2), low), torch.full((3, 1, 2, 2), high))
    images = denoiser.draw(count, rng(1))
    found = elbo(denoiser.denoise, scheduler, chain, images, seeds=range(count))
    blocks = torch.nn.functional.unfold(images, 2, stride=2).transpose(1, 2)
    law = torch.distributions.MultivariateNormal(torch.zeros(4).double(), covariance(high, low / 4))
    missing = law.log_prob(blocks).sum(1) - found.elbo

    expected, abar = 0.0, scheduler.alphas_cumprod.numpy()
    for scale, (modes, s) in enumerate(((12, high), (4, low / 4))):
        times = [t for k, (t) in enumerate(p[scale] for p in path.points) if not k or t != path.points[k - 1][scale]]
        levels, kept = [*abar[times], 1.0], 0.0
        ratios = [levels[0] * s + 1 - levels[0]]
        for now, after in zip(levels, levels[1:], strict=False):
            beta = 1 - now / after
            backward = (after * s + 1 - after) * beta / (now * s + 1 - now)
            tilde = beta * (1 - after) / (1 - now)
            kept = beta if variance == "beta" else tilde if after < 1 else kept  # Of the step before.
            ratios.append(backward / kept)
        expected += modes * gap_of(ratios)
    error = missing.std().item() / count**0.5
    assert missing.mean().item() == pytest.approx(expected, abs=4 * error) and error < 0.03 * expected
    assert missing.mean() > 20 * error


def test_drawn_steps_are_right_on_average_and_their_error_is_said():
    scheduler, count = make("linear", "epsilon", 200, clip=True), 600
    chain = ddpm_chain(scheduler, diagonal(199, num_scales=1, num_train_timesteps=200))
    images = torch.randint(0, 256, (1, 1, 4, 4), generator=rng(), dtype=torch.uint8).expand(count, -1, -1, -1)
    whole = elbo(tiny, scheduler, chain, images[:100], seeds=range(100))
    for drawn in (2, 7, 20):
        found = elbo(tiny, scheduler, chain, images, drawn, range(1000, 1000 + count))
        spread = found.elbo.std().item()
        error = math.hypot(spread / count**0.5, whole.elbo.std().item() / 10)
        assert abs(found.elbo.mean() - whole.elbo.mean()) < 3.5 * error
        assert found.nfe.tolist() == [drawn + 2] * count
        said = found.error.square().mean().sqrt().item()
        assert 0.85 * spread < said < 2 * spread
    assert spread < 0.1 * whole.elbo.mean().abs()
    said = whole.error.square().mean().sqrt().item()
    assert 0.85 * whole.elbo.std() < said < 1.5 * whole.elbo.std()


def test_steps_are_drawn_as_often_as_their_shares_say():
    shares = torch.tensor([0.02, 0.4, 0.03, 0.05, 0.3, 0.2], dtype=torch.float64)
    chosen = module._draw_steps(shares, 4, range(8000))
    found = torch.stack([(chosen == k).double().sum(1) for k in range(6)], 1)
    torch.testing.assert_close(found.mean(0), 4 * shares, rtol=0, atol=0.02)
    # The second step reaches from 0.02 to 0.42: all of no stratum of four, so that it has up to two draws.
    assert set(found[:, 1].tolist()) == {0.0, 1.0, 2.0} and (chosen.diff(dim=1) >= 0).all()


def test_the_error_of_all_steps_is_that_of_noise():
    """Steps near the image count several times as much as the next, which is no error."""
    scheduler = make()
    images = (S * torch.randn(1, 1, 16, 16, generator=rng())).double().expand(60, -1, -1, -1)
    chain = ddpm_chain(scheduler, diagonal(999, num_scales=1))
    found = elbo(white(scheduler, S**2), scheduler, chain, images, seeds=range(60))
    said = found.error.square().mean().sqrt().item()
    assert 0.75 * found.elbo.std() < said < 1.5 * found.elbo.std()


@pytest.mark.parametrize("drawn", [None, 5])
def test_an_image_depends_on_its_seed_alone(drawn):
    scheduler = make("cosine", "v", 12, "residual", clip=True)
    path = log_snr_shift(diagonal(11, num_train_timesteps=12), math.log(4), scheduler.log_snr.numpy())
    chain = ddpm_chain(scheduler, path, "beta_tilde")
    pixels = torch.randint(0, 256, (5, 3, 4, 4), generator=rng(), dtype=torch.uint8)
    seeds = [5, 3, 8, 0, 1]
    together = elbo(tiny, scheduler, chain, pixels, drawn, seeds)
    for rows in ([2], [4, 0], [1, 3]):
        found = elbo(tiny, scheduler, chain, pixels[rows], drawn, [seeds[k] for k in rows])
        for ours, theirs in zip(found, together, strict=True):
            torch.testing.assert_close(ours, theirs[rows], rtol=1e-6, atol=1e-6)
    other = elbo(tiny, scheduler, chain, pixels, drawn, [9] * 5)
    assert (other.elbo != together.elbo).all()
    assert len({DEQUANTISATION, DIRECTIONS, TIMESTEPS, NOISE}) == 4


def test_two_scales_have_one_bound_however_an_image_is_cut_in_time():
    """White images by one scale and by the pair with the clocks of the image: the same chain, but for rounded times."""
    found, count = [], 3000
    for representation in ("overcomplete", "residual"):
        scheduler = make("linear", "x0", 400, representation)
        path = diagonal(399, num_scales=1, num_train_timesteps=400)
        images = torch.randn(count, 1, 2, 2, generator=rng(2)).double() * S
        if representation == "residual":
            path = log_snr_shift(diagonal(399, num_train_timesteps=400), math.log(4), scheduler.log_snr.numpy())
            variances = torch.full((1, 1, 1), S**2)
            denoise = GaussianDenoiser(scheduler, variances, variances.expand(3, -1, -1, -1)).denoise
        else:
            denoise = white(scheduler, S**2)
        found.append(elbo(denoise, scheduler, ddpm_chain(scheduler, path), images, 40, range(count)).elbo)
    exact = torch.distributions.Normal(0, S).log_prob(images).flatten(1).sum(1)
    missing = [(exact - each).mean().item() / 4 for each in found]
    error = (exact - found[0]).std().item() / 4 / count**0.5
    assert missing[0] == pytest.approx(missing[1], abs=0.02 + 4 * error) and abs(missing[0]) < 0.02 + 4 * error


def test_clean_images_are_clamped_where_sampling_clamps():
    def far(xs, ts):
        return tuple(torch.full_like(x, 3.0) for x in xs)

    def near(xs, ts):
        return tuple(torch.full_like(x, 1.0) for x in xs)

    pixels = torch.randint(0, 256, (2, 1, 4, 4), generator=rng(), dtype=torch.uint8)
    chain = ddpm_chain(make(count=20), diagonal(19, num_scales=1, num_train_timesteps=20))
    clamped, unclamped = (elbo(far, make(count=20, clip=clip), chain, pixels).elbo for clip in (True, False))
    assert torch.equal(clamped, elbo(near, make(count=20), chain, pixels).elbo) and (unclamped < clamped).all()


def test_networks_work_and_are_left_as_they_are():
    """A trained kind of network, in float32; grey levels cost about as much as the density of their width."""
    scheduler = make("cosine", "v", 50, "residual", clip=True)
    torch.manual_seed(0)
    network = LIFTDualTimestepModel(hidden_dims=(8,), channels=1, representation="residual").eval()
    pixels = torch.randint(100, 156, (4, 1, 8, 8), generator=rng(), dtype=torch.uint8)
    chain = ddpm_chain(scheduler, diagonal(49, num_train_timesteps=50))
    found = elbo(network.denoise, scheduler, chain, pixels, 10)
    floats = elbo(network.denoise, scheduler, chain, pixels.float() / 127.5 - 1, 10)
    assert found.elbo.isfinite().all() and not found.elbo.requires_grad
    bits, dense = bits_of_grey_levels(found.elbo, 64), bits_per_dim(floats.elbo, 64)
    torch.testing.assert_close(bits, dense, rtol=0.02, atol=0.1)
    assert bits_of_grey_levels(torch.tensor(-math.log(256.0) * 64), 64).item() == pytest.approx(8)


def test_images_without_a_bound_are_refused():
    scheduler = make("cosine", "v", 20)
    chain = ddpm_chain(scheduler, diagonal(19, num_train_timesteps=20))
    images = torch.zeros(1, 3, 4, 4)
    with pytest.raises(ValueError, match="not defined for a model of the over-complete pair"):
        elbo(LIFTDualTimestepModel((8,)).denoise, scheduler, chain, images)
    residual = make("cosine", "v", 20, "residual")
    with pytest.raises(ValueError, match="reads 2 scales and predicts 1"):
        elbo(SingleTimestepModel((8,)).denoise, residual, chain, images)
    with pytest.raises(ValueError, match=r"process 'flow' has no chain of DDPM.*use --method ode\.$"):
        ddpm_chain(make("flow", "velocity"), diagonal(9))
    with pytest.raises(ValueError, match="Unknown variance 'alpha'; choose one of beta, beta_tilde"):
        ddpm_chain(scheduler, diagonal(9), "alpha")
    still = Path([(19, 0), (4, 0), (0, 0)], "test", {})
    with pytest.raises(ValueError, match="never moves"):
        ddpm_chain(residual, still, "beta_tilde")
    assert ddpm_chain(residual, still, "beta").last[1] == pytest.approx(1 - residual.alphas_cumprod[0].item())

    def broken(xs, ts):
        return tuple(x * math.nan for x in xs)

    with pytest.raises(ValueError, match="makes an image NaN or infinite"):
        elbo(broken, residual, chain, images)


@pytest.mark.parametrize(
    "options, says",
    [
        ({"num_timesteps": 1}, r"--timesteps 1 cannot be drawn of a chain of 19 steps; choose 2 to 18, or all\."),
        ({"num_timesteps": 19}, "--timesteps 19 cannot be drawn"),
        ({"seeds": [1]}, "2 images needs so many seeds, not 1"),
    ],
)
def test_settings_that_make_no_sense_are_refused(options, says):
    scheduler = make("cosine", "v", 20)
    chain = ddpm_chain(scheduler, diagonal(19, num_scales=1, num_train_timesteps=20))
    with pytest.raises(ValueError, match=says):
        elbo(tiny, scheduler, chain, torch.zeros(2, 1, 4, 4), **options)


@pytest.mark.parametrize("steps, words", [(1, "1 step"), (2, "2 steps")])
def test_of_the_shortest_chains_no_timesteps_are_drawn(steps, words):
    chain = ddpm_chain(make("cosine", "v", 20), diagonal(steps, num_scales=1, num_train_timesteps=20))
    says = f"--timesteps 2 cannot be drawn of a chain of {words}: a chain of so many steps is computed whole; pass "
    with pytest.raises(ValueError, match=f"{says}--timesteps all"):
        check_timesteps(2, chain)
