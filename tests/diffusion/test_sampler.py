import functools
import math
from unittest import mock

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import generate_with_path_30
import train_lift
from baseline_model import BaselineModel
from data import read_png
from diffusion import sampler
from diffusion.sampler import (
    COARSE_FEEDS,
    IMAGES_PER_SEED,
    SeededNoise,
    check_finite,
    coarse_feed,
    compile_denoiser,
    image_seeds,
    in_full_batches,
    sample,
    sample_greedy,
    sample_seeds,
    scale_shapes,
)
from diffusion.solvers import make_solver
from model import LIFTBaselineModel, LIFTDualTimestepModel, NoTimestepModel, SingleTimestepModel
from paths.families import diagonal
from paths.optimal import find_optimal_path_n_steps_lambda
from paths.path import Path, path_from_cells, timestep_grid
from runtime.device import MIN_COMPILED_CALLS, compile_or_not, resolve_compile
from scheduler import CLEAN, DDIMScheduler


def two_scale(*points):
    return Path(points, "hand-made", {})


def optimised():
    rng = np.random.default_rng(0)
    grid = timestep_grid(30)
    log_snr = DDIMScheduler().log_snr.numpy()[grid]
    cells, _ = find_optimal_path_n_steps_lambda(rng.random((30, 30)), rng.random((30, 30)), log_snr)
    return path_from_cells(cells, grid, "dp_total", {})


PATHS = {
    "diagonal": diagonal(18),
    "published diagonal": diagonal(18, "published"),
    "one scale": diagonal(7, num_scales=1),
    "single step": diagonal(1),
    "cascade": two_scale((999, 999), (999, 400), (999, 0), (500, 0), (0, 0)),
    "fine first": two_scale((999, 999), (300, 999), (0, 999), (0, 200), (0, 0)),
    "optimised": optimised(),
    "three scales": Path(((999, 999, 999), (999, 500, 100), (300, 300, 0), (0, 0, 0)), "hand-made", {}),
}


def start_noise(path, batch=2, seed=0, dtype=torch.float32, size=8):
    g = torch.Generator().manual_seed(seed)
    return [torch.randn(batch, 3, size >> s, size >> s, generator=g, dtype=dtype) for s in range(path.num_scales)]


def fading(xs, ts):
    return tuple(0.5 * x for x in xs)


class Recorder:
    """A denoiser that keeps what it was called with."""

    def __init__(self, denoise=fading):
        self.denoise, self.asked = denoise, []

    def __call__(self, xs, ts):
        self.asked.append((xs, ts))
        return self.denoise(xs, ts)


@pytest.mark.parametrize("end", ["clean", "t0"])
@pytest.mark.parametrize("path", PATHS.values(), ids=PATHS.keys())
def test_one_call_at_every_point_but_the_last(path, end):
    recorder, noise, seen = Recorder(), start_noise(path), []
    result = sample(recorder, DDIMScheduler(), path, noise, end=end, callback=lambda k, xs: seen.append((k, xs)))
    assert len(recorder.asked) == result.nfe == path.nfe
    for (_, ts), point in zip(recorder.asked, path.points, strict=False):
        assert [t.tolist() for t in ts] == [[t, t] for t in point]
        assert all(t.dtype == torch.long for t in ts)
    assert [k for k, _ in seen] == list(range(path.nfe + 1))
    for (xs, _), (_, images) in zip(recorder.asked, seen, strict=False):
        assert all(x is image for x, image in zip(xs, images, strict=True))
    assert all(a is b for a, b in zip(seen[0][1], noise, strict=True))
    assert all(a is b for a, b in zip(seen[-1][1], result.images, strict=True))
    assert [x.shape for x in result.images] == [x.shape for x in noise]


@pytest.mark.parametrize("end", ["clean", "t0"])
@pytest.mark.parametrize("path", PATHS.values(), ids=PATHS.keys())
def test_a_scale_that_does_not_move_keeps_its_image(path, end):
    seen = []
    sample(fading, DDIMScheduler(), path, start_noise(path), end=end, callback=lambda k, xs: seen.append(xs))
    for k, (here, there) in enumerate(zip(path.points, path.points[1:], strict=False)):
        for s in range(path.num_scales):
            moves = here[s] != there[s] or (end == "clean" and k == path.nfe - 1)
            assert torch.equal(seen[k][s], seen[k + 1][s]) != moves


def test_arguments_are_left_as_they_were():
    path = PATHS["cascade"]
    noise = start_noise(path)
    copies = [x.clone() for x in noise]
    sample(fading, DDIMScheduler(), path, noise)
    assert all(torch.equal(a, b) for a, b in zip(noise, copies, strict=True))


class Gaussian:
    """Independent N(mean, deviation²) pixels and the exact noise prediction for them."""

    def __init__(self, scheduler, means, deviations):
        self.abar, self.means, self.deviations = scheduler.alphas_cumprod, means, deviations

    def __call__(self, xs, ts):
        out = []
        for x, t, mean, deviation in zip(xs, ts, self.means, self.deviations, strict=True):
            abar = self.abar[t][:, None, None, None]
            gain = abar.sqrt() * deviation**2 / (abar * deviation**2 + 1 - abar)
            posterior_mean = mean + gain * (x - abar.sqrt() * mean)
            out.append((x - abar.sqrt() * posterior_mean) / (1 - abar).sqrt())
        return tuple(out)


@pytest.mark.parametrize("end", ["clean", "t0"])
@pytest.mark.parametrize("path", PATHS.values(), ids=PATHS.keys())
def test_gaussian_pixels_follow_their_recursion(path, end):
    scheduler = DDIMScheduler(clip_sample=False)
    means, deviations = (0.3, -0.2, 0.1)[: path.num_scales], (0.5, 0.25, 0.7)[: path.num_scales]
    noise = start_noise(path, dtype=torch.float64)
    images = sample(Gaussian(scheduler, means, deviations), scheduler, path, noise, end=end).images
    for s in range(path.num_scales):
        abars = [scheduler.alphas_cumprod[point[s]].item() for point in path.points]
        if end == "clean":
            abars[-1] = 1.0
        sigmas = [((1 - a) / a) ** 0.5 for a in abars]
        # Euler in x / sqrt(abar): a step multiplies the distance to the mean by (s² + σσ') / (s² + σ²).
        offset = noise[s].numpy() / abars[0] ** 0.5 - means[s]
        for sigma, sigma_next in zip(sigmas, sigmas[1:], strict=False):
            offset = offset * (deviations[s] ** 2 + sigma * sigma_next) / (deviations[s] ** 2 + sigma**2)
        np.testing.assert_allclose(images[s].numpy(), abars[-1] ** 0.5 * (means[s] + offset), rtol=1e-9, atol=1e-11)


def test_many_steps_reach_the_spread_of_the_images():
    scheduler = DDIMScheduler(beta_schedule="cosine", clip_sample=False)
    path = diagonal(999, num_scales=1)
    noise = torch.tensor([[[[1.0, -2.0]]]], dtype=torch.float64)
    images = sample(Gaussian(scheduler, (0.3,), (0.5,)), scheduler, path, [noise]).images[0]
    # The exact flow takes quantiles to quantiles: x = mean + deviation * noise.
    torch.testing.assert_close(images, 0.3 + 0.5 * noise, rtol=0, atol=0.02)


def test_both_scales_step_from_the_images_of_the_same_point():
    scheduler = DDIMScheduler(clip_sample=False)
    path = PATHS["optimised"]
    coupling = np.array([[0.6, 0.3], [-0.2, 0.5]])

    def denoise(xs, ts):
        return tuple(a * xs[0] + b * xs[1] for a, b in coupling)

    noise = [torch.tensor([[[[1.3]]]], dtype=torch.float64), torch.tensor([[[[-0.4]]]], dtype=torch.float64)]
    images = sample(denoise, scheduler, path, noise).images
    abar = scheduler.alphas_cumprod.numpy()
    z = np.array([1.3, -0.4])
    for k, (here, there) in enumerate(zip(path.points, path.points[1:], strict=False)):
        a = abar[list(here)]
        a_next = np.ones(2) if k == path.nfe - 1 else abar[list(there)]
        epsilon = coupling @ z
        moved = np.sqrt(a_next / a) * (z - np.sqrt(1 - a) * epsilon) + np.sqrt(1 - a_next) * epsilon
        z = np.where(a_next != a, moved, z)
    np.testing.assert_allclose([x.item() for x in images], z, rtol=1e-9)


def test_independent_scales_are_sampled_as_if_alone():
    scheduler = DDIMScheduler()
    path = diagonal(9)
    noise = start_noise(path)
    together = sample(fading, scheduler, path, noise).images
    for s in range(2):
        alone = sample(fading, scheduler, diagonal(9, num_scales=1), noise[s : s + 1]).images
        assert torch.equal(together[s], alone[0])


@pytest.mark.parametrize("eta", [0.5, 1.0])
def test_fresh_noise_enters_as_the_ddim_equations_say(eta):
    scheduler = DDIMScheduler(clip_sample=False)
    path = PATHS["optimised"]
    denoise = Gaussian(scheduler, (0.3, -0.2), (0.5, 0.25))
    drawn = []

    def draw(shape):
        drawn.append(torch.randn(2, *shape, generator=generator, dtype=torch.float64))
        return drawn[-1]

    generator = torch.Generator().manual_seed(5)
    noise = start_noise(path, dtype=torch.float64)
    images = sample(denoise, scheduler, path, noise, eta=eta, draw=draw).images

    xs, used = list(noise), 0
    for k, (here, there) in enumerate(zip(path.points, path.points[1:], strict=False)):
        predictions = denoise(xs, [torch.full((2,), t) for t in here])
        for s, (t, t_next) in enumerate(zip(here, there, strict=True)):
            last = k == path.nfe - 1
            if t == t_next and not last:
                continue
            a = scheduler.alphas_cumprod[t].item()
            a_next = 1.0 if last else scheduler.alphas_cumprod[t_next].item()
            sigma = eta * ((1 - a_next) / (1 - a) * (1 - a / a_next)) ** 0.5
            x0 = (xs[s] - (1 - a) ** 0.5 * predictions[s]) / a**0.5
            kept = max(1 - a_next - sigma**2, 0) ** 0.5
            xs[s] = a_next**0.5 * x0 + kept * predictions[s] + sigma * drawn[used]
            used += 1
    assert used == len(drawn)
    for got, expected in zip(images, xs, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("path", PATHS.values(), ids=PATHS.keys())
def test_true_noise_brings_the_clean_image_back(path):
    scheduler = DDIMScheduler()
    epsilons = start_noise(path, seed=1, dtype=torch.float64)
    cleans = [x.tanh() for x in start_noise(path, seed=2, dtype=torch.float64)]
    start = [scheduler.add_noise(x, e, t) for x, e, t in zip(cleans, epsilons, path.points[0], strict=True)]
    for end, t in (("clean", CLEAN), ("t0", 0)):
        images = sample(lambda xs, ts: tuple(epsilons), scheduler, path, start, end=end).images
        for image, clean, epsilon in zip(images, cleans, epsilons, strict=True):
            torch.testing.assert_close(image, scheduler.add_noise(clean, epsilon, t), rtol=0, atol=1e-10)


def test_clean_images_stay_in_range():
    path = PATHS["optimised"]
    images = sample(lambda xs, ts: tuple(-3 * x for x in xs), DDIMScheduler(), path, start_noise(path)).images
    assert all(x.abs().max() <= 1 for x in images)


MODELS = {
    BaselineModel: PATHS["one scale"],
    LIFTDualTimestepModel: PATHS["optimised"],
    LIFTBaselineModel: diagonal(7),
    SingleTimestepModel: PATHS["optimised"],
    NoTimestepModel: PATHS["cascade"],
}


def generate(model, path, seeds, batch_size, coarse_from="x0", **options):
    shapes = scale_shapes(model.num_scales, 3, 16)
    options["coarse_from"] = coarse_feed(model, coarse_from)
    starts = {}

    def keep(k, xs):
        if k == 0:
            batches.append(xs)

    batches, images = [], {}
    batches_of_seeds = sample_seeds(
        model.denoise, DDIMScheduler(), path, seeds, shapes, batch_size, callback=keep, **options
    )
    for chosen, samples in batches_of_seeds:
        assert samples.nfe == path.nfe and len(chosen) <= batch_size
        for row, seed in enumerate(chosen):
            starts[seed] = [x[row] for x in batches[-1]]
            images[seed] = [x[row] for x in samples.images]
    assert list(images) == list(seeds)
    return starts, images


# A model that predicts all it reads is the same with every feed.
FED = [(model_class, "x0") for model_class in MODELS] + [(SingleTimestepModel, "noisy"), (NoTimestepModel, "noisy")]


@pytest.mark.parametrize("eta", [0.0, 0.5])
@pytest.mark.parametrize(("model_class", "coarse_from"), FED)
def test_an_image_depends_on_its_seed_alone(model_class, coarse_from, eta):
    torch.manual_seed(0)
    model, path = model_class(hidden_dims=(8, 16)).eval(), MODELS[model_class]
    seeds = list(image_seeds(42, 5))
    starts, images = generate(model, path, seeds, 5, coarse_from, eta=eta)
    others = [(seeds, 1), (seeds, 2), (seeds[::-1], 3), ([seeds[3], 7, seeds[1]], 3)]
    for other_seeds, batch_size in others:
        other_starts, other_images = generate(model, path, other_seeds, batch_size, coarse_from, eta=eta)
        for seed in set(seeds) & set(other_seeds):
            for s in range(model.num_scales):
                assert torch.equal(starts[seed][s], other_starts[seed][s])
                # Convolutions round differently at other batch sizes, by 2e-5 after these steps.
                torch.testing.assert_close(images[seed][s], other_images[seed][s], rtol=0, atol=1e-4)
    assert (images[seeds[0]][0] - images[seeds[1]][0]).abs().max() > 0.1


class Pixelwise:
    """A denoiser without sums over pixels, whose result has the same bits at every batch size."""

    num_scales = num_predictions = 2
    denoise = staticmethod(fading)


def blending(xs, ts):
    """One prediction, of the fine scale, from both images."""
    return (0.4 * xs[0] + 0.3 * xs[1].repeat_interleave(2, 2).repeat_interleave(2, 3),)


class PixelwiseFine(Pixelwise):
    num_predictions = 1
    denoise = staticmethod(blending)


@pytest.mark.parametrize("eta", [0.0, 0.5])
@pytest.mark.parametrize(
    ("model", "coarse_from"), [(Pixelwise, "x0"), *((PixelwiseFine, feed) for feed in COARSE_FEEDS)]
)
def test_the_sampler_itself_adds_no_dependence_on_the_batch(model, coarse_from, eta):
    seeds = list(image_seeds(42, 6))
    starts, images = generate(model, PATHS["optimised"], seeds, 6, coarse_from, eta=eta)
    for other_seeds, batch_size in [(seeds, 1), (seeds, 4), (seeds[::-1], 3)]:
        other_starts, other_images = generate(model, PATHS["optimised"], other_seeds, batch_size, coarse_from, eta=eta)
        for seed in seeds:
            assert all(torch.equal(a, b) for a, b in zip(starts[seed], other_starts[seed], strict=True))
            assert all(torch.equal(a, b) for a, b in zip(images[seed], other_images[seed], strict=True))


def fed_by_hand(denoise, scheduler, path, noise, feed, eta, end, draws):
    """What `sample` makes of a denoiser of the fine scale, with a fine image twice the size of the coarse one."""

    def mean(x):
        return (x[..., ::2, ::2] + x[..., ::2, 1::2] + x[..., 1::2, ::2] + x[..., 1::2, 1::2]) / 4

    abar = scheduler.alphas_cumprod.tolist()
    fine, coarse_image = noise
    if feed == "noisy":
        coarse_image = mean(fine)
    for k in range(path.nfe):
        (t, _), (t_next, coarse_next) = path.points[k], path.points[k + 1]
        is_clean = end == "clean" and k == path.nfe - 1
        (epsilon,) = denoise((fine, coarse_image), None)
        x0 = (fine - (1 - abar[t]) ** 0.5 * epsilon) / abar[t] ** 0.5
        x0 = x0.clamp(-1, 1) if scheduler.clip_sample else x0
        if t_next != t or is_clean:
            a_next = 1.0 if is_clean else abar[t_next]
            sigma = eta * ((1 - a_next) / (1 - abar[t]) * (1 - abar[t] / a_next)) ** 0.5
            epsilon = (fine - abar[t] ** 0.5 * x0) / (1 - abar[t]) ** 0.5
            fine = a_next**0.5 * x0 + max(1 - a_next - sigma**2, 0) ** 0.5 * epsilon
            if eta > 0:
                fine = fine + sigma * next(draws)
        if feed == "noisy":
            coarse_image = mean(fine)
        elif is_clean:
            coarse_image = mean(x0)
        else:
            a_coarse = abar[coarse_next]
            coarse_image = a_coarse**0.5 * mean(x0) + (1 - a_coarse) ** 0.5 * next(draws)
    return fine, coarse_image


@pytest.mark.parametrize("clip_sample", [True, False])
@pytest.mark.parametrize("end", ["clean", "t0"])
@pytest.mark.parametrize("eta", [0.0, 0.7])
@pytest.mark.parametrize("feed", COARSE_FEEDS)
@pytest.mark.parametrize("name", ["diagonal", "cascade", "fine first", "optimised"])
def test_a_fed_coarse_image_is_made_as_a_plain_loop_makes_it(name, feed, eta, end, clip_sample):
    path, scheduler = PATHS[name], DDIMScheduler(clip_sample=clip_sample)
    noise, drawn = start_noise(path, dtype=torch.float64), []

    def draw(shape):
        drawn.append(torch.randn(2, *shape, generator=generator, dtype=torch.float64))
        return drawn[-1]

    generator, recorder = torch.Generator().manual_seed(5), Recorder(blending)
    result = sample(recorder, scheduler, path, noise, eta, end=end, draw=draw, coarse_from=feed)
    left = iter(drawn)
    expected = fed_by_hand(blending, scheduler, path, noise, feed, eta, end, left)
    assert next(left, None) is None and result.nfe == len(recorder.asked) == path.nfe
    for x, y in zip(result.images, expected, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-7, atol=1e-7)
    # A denoiser is told both timesteps, whatever it makes of them.
    assert [tuple(t[0].item() for t in ts) for _, ts in recorder.asked] == list(path.points[:-1])


def test_a_feed_is_for_models_that_read_what_they_do_not_predict():
    feeds = {model_class: coarse_feed(model_class((8, 8)), "noisy") for model_class in MODELS}
    assert {model_class for model_class, feed in feeds.items() if feed} == {SingleTimestepModel, NoTimestepModel}
    assert set(feeds.values()) == {None, "noisy"}
    path = diagonal(3)
    noise = start_noise(path)
    with pytest.raises(ValueError, match=r"^The denoiser predicts 1 of 2 scales, .* coarse_from = None\.$"):
        sample(blending, DDIMScheduler(), path, noise)
    for feed in COARSE_FEEDS:
        with pytest.raises(ValueError, match=rf"^The denoiser predicts 2 of 2 scales, .* coarse_from = {feed}\.$"):
            sample(fading, DDIMScheduler(), path, noise, coarse_from=feed, draw=torch.zeros)
    with pytest.raises(ValueError, match="needs fresh noise"):
        sample(blending, DDIMScheduler(), path, noise, coarse_from="x0")
    with pytest.raises(ValueError, match=r"^Unknown coarse feed 'x1'; choose one of x0, noisy\.$"):
        sample(blending, DDIMScheduler(), path, noise, coarse_from="x1")


@pytest.mark.parametrize("end", ["clean", "t0"])
@pytest.mark.parametrize("path", PATHS.values(), ids=PATHS.keys())
def test_a_callback_may_go_back_with_other_images(path, end):
    # Twice back over the whole of what lies behind, and once from the images that are already done.
    scheduler, noise, recorder = DDIMScheduler(), start_noise(path), Recorder()
    jumps = [(path.nfe - 1, 0), (path.nfe - 1, path.nfe // 2)] * (path.nfe > 1) + [(path.nfe, path.nfe - 1)]
    left, seen, handed = list(jumps), [], {}

    def callback(k, xs):
        seen.append(k)
        if left and left[0][0] == k:
            handed[len(recorder.asked)] = tuple(1 - x for x in xs)
            return left.pop(0)[1], handed[len(recorder.asked)]

    result = sample(recorder, scheduler, path, noise, end=end, callback=callback)
    xs, k, waiting, visited = tuple(noise), 0, list(jumps), []
    while True:
        if waiting and waiting[0][0] == k:
            xs, k = tuple(1 - x for x in xs), waiting.pop(0)[1]
        if k == path.nfe:
            break
        visited.append(k)
        clean = end == "clean" and k == path.nfe - 1
        steps = zip(fading(xs, None), path.points[k], path.points[k + 1], xs, strict=True)
        xs = tuple(scheduler.step(e, t, CLEAN if clean else u, x) if clean or u != t else x for e, t, u, x in steps)
        k += 1
    assert result.nfe == len(recorder.asked) == len(visited) > path.nfe
    assert [tuple(t[0].item() for t in ts) for _, ts in recorder.asked] == [path.points[k] for k in visited]
    # A point that was jumped to is not announced again.
    assert seen == [0, *(k + 1 for k in visited)] and not left
    for call, images in handed.items():
        assert all(a is b for a, b in zip(recorder.asked[call][0], images, strict=True))
    for x, y in zip(result.images, xs, strict=True):
        assert torch.equal(x, y)


def test_a_callback_may_replace_the_images_where_it_is():
    path, recorder = diagonal(4), Recorder()
    replaced = {k: tuple(torch.full_like(x, k) for x in start_noise(path)) for k in range(5)}
    result = sample(recorder, DDIMScheduler(), path, start_noise(path), callback=lambda k, xs: (k, replaced[k]))
    assert result.nfe == 4 and result.images is replaced[4]
    assert all(xs is replaced[k] for k, (xs, _) in enumerate(recorder.asked))


@pytest.mark.parametrize(("at", "to"), [(0, 1), (2, 3), (2, -1), (4, 5)])
def test_a_callback_cannot_go_on(at, to):
    recorder, path = Recorder(), diagonal(4)
    with pytest.raises(ValueError, match=rf"^A callback at point {at} must go on from point 0 to {at}, not from {to}"):
        sample(recorder, DDIMScheduler(), path, start_noise(path), callback=lambda k, xs: (to, xs) if k == at else None)
    assert len(recorder.asked) == at


def test_fresh_noise_changes_the_image_but_not_its_start():
    torch.manual_seed(0)
    model = LIFTDualTimestepModel(hidden_dims=(8, 16)).eval()
    runs = [generate(model, diagonal(5), [3], 1, eta=eta) for eta in (0.0, 1.0)]
    assert torch.equal(runs[0][0][3][0], runs[1][0][3][0])
    assert (runs[0][1][3][0] - runs[1][1][3][0]).abs().max() > 0.1


def test_noise_is_standard_normal_and_independent_across_seeds_scales_and_draws():
    source = SeededNoise(range(50))
    draws = [source.draw(shape) for shape in ((3, 16, 16), (3, 8, 8), (3, 16, 16))]
    assert [d.shape for d in draws] == [(50, 3, 16, 16), (50, 3, 8, 8), (50, 3, 16, 16)]
    assert all(d.dtype == torch.float32 for d in draws)
    for d in draws:
        n = d.numel()
        assert abs(d.mean().item()) < 5 / n**0.5
        assert abs(d.var().item() - 1) < 5 * (2 / n) ** 0.5
    rows = torch.stack([d.flatten(1)[:, :192] for d in draws]).flatten(0, 1)  # [150, 192]
    correlations = (rows @ rows.T / 192).fill_diagonal_(0)
    assert correlations.abs().max() < 6.5 / 192**0.5


def test_one_and_two_scales_of_a_seed_start_from_the_same_fine_noise():
    one, two = SeededNoise([1, 2]), SeededNoise([1, 2])
    assert torch.equal(one.draw((3, 8, 8)), two.draw(scale_shapes(2, 3, 8)[0]))
    assert scale_shapes(2, 1, 32) == [(1, 32, 32), (1, 16, 16)]


def test_evaluation_seeds_share_no_image():
    ranges = [image_seeds(seed, IMAGES_PER_SEED) for seed in (0, 1, 2, 42)]
    for a, b in zip(ranges, ranges[1:], strict=False):
        assert len(a) == IMAGES_PER_SEED and a[-1] < b[0]
    assert image_seeds(42, 10) == image_seeds(42, 1000)[:10]
    assert image_seeds(0, 1) == range(1)
    with pytest.raises(ValueError, match=r"^Seed -1 is negative; choose 0 or a positive integer"):
        image_seeds(-1, 1)
    with pytest.raises(ValueError, match=r"^1000001 images exceed the 1000000 that one seed provides; use several"):
        image_seeds(0, IMAGES_PER_SEED + 1)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("at", [(1, 0, 0, 0), (1, 2, 3, 3), (2, 1, 0, 3)])
def test_the_first_image_that_is_not_finite_anywhere_is_named(value, at):
    images = torch.zeros(4, 3, 4, 4)
    check_finite(images, range(10, 14))
    images[at] = value
    with pytest.raises(ValueError, match=f"^The network makes image {10 + at[0]} NaN or infinite; use another"):
        check_finite(images, range(10, 14))
    images[3] = value
    with pytest.raises(ValueError, match=f"makes image {'abcd'[at[0]]} NaN"):
        check_finite(images, "abcd")


def test_no_gradient_is_kept():
    model = LIFTDualTimestepModel(hidden_dims=(8, 8))
    images = sample(model.denoise, DDIMScheduler(), diagonal(2), start_noise(diagonal(2))).images
    assert not any(x.requires_grad for x in images)


def test_half_precision_predictions_leave_the_images_in_float32():
    path = diagonal(4)
    noise = start_noise(path)
    exact = sample(fading, DDIMScheduler(), path, noise).images
    rounded = sample(lambda xs, ts: tuple(p.bfloat16() for p in fading(xs, ts)), DDIMScheduler(), path, noise).images
    for a, b in zip(exact, rounded, strict=True):
        assert b.dtype == torch.float32
        torch.testing.assert_close(a, b, rtol=0, atol=0.1)


def test_mistakes_raise_one_clear_sentence_before_any_call():
    recorder, path = Recorder(), diagonal(3)
    with pytest.raises(ValueError, match=r"^The path has 2 scale\(s\) but the model samples 1\.$"):
        sample(recorder, DDIMScheduler(), path, start_noise(path)[:1])
    with pytest.raises(ValueError, match=r"^Unknown end 'T0'; choose one of clean, t0\.$"):
        sample(recorder, DDIMScheduler(), path, start_noise(path), end="T0")
    assert recorder.asked == []
    with pytest.raises(ValueError, match=r"^ddim draws noise at every step; pass draw"):
        sample(recorder, DDIMScheduler(), path, start_noise(path), eta=0.5)
    with pytest.raises(ValueError, match=r"^A DDIM step must go from a timestep in 0\.\.99 to a lower one"):
        sample(recorder, DDIMScheduler(num_train_timesteps=100), path, start_noise(path))


def test_shared_clock_model_refuses_a_path_off_the_diagonal():
    model = LIFTBaselineModel(hidden_dims=(8, 8)).eval()
    with pytest.raises(ValueError, match="can only follow a diagonal path"):
        sample(model.denoise, DDIMScheduler(), PATHS["cascade"], start_noise(PATHS["cascade"]))


class Copies(TorchDispatchMode):
    """Counts what is copied from the host to another device."""

    count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        if function.overloadpacket in (torch.ops.aten._to_copy, torch.ops.aten.copy_):
            self.count += out.device.type != "cpu" and any(x.device.type == "cpu" for x in args)
        return out


@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_a_step_copies_nothing_to_the_device(eta):
    path = PATHS["optimised"]
    noise = [x.to("meta") for x in start_noise(path)]
    with Copies() as copies:
        images = sample(
            fading, DDIMScheduler(), path, noise, eta=eta, draw=lambda shape: torch.empty(2, *shape, device="meta")
        ).images
    assert copies.count == 0 and all(x.device.type == "meta" for x in images)
    with copies:
        torch.as_tensor(torch.ones(()), device="meta")
    assert copies.count == 1


def test_the_next_noise_is_drawn_before_the_images_are_handed_over():
    drawn = []

    class Watched(SeededNoise):
        def draw(self, shape, device="cpu"):
            drawn.append(len(self._generators))
            return super().draw(shape, device)

    with mock.patch.object(sampler, "SeededNoise", Watched):
        batches = sample_seeds(fading, DDIMScheduler(), diagonal(2), range(5), scale_shapes(2, 3, 8), 2)
        counts = [(len(chosen), len(drawn)) for chosen, _ in batches]
        assert counts == [(2, 4), (2, 6), (1, 6)] and drawn == [2, 2, 2, 2, 1, 1]
        assert list(sample_seeds(fading, DDIMScheduler(), diagonal(2), [], scale_shapes(2, 3, 8), 2)) == []


def test_smaller_batches_are_filled_up_and_larger_ones_left():
    recorder = Recorder(lambda xs, ts: tuple(x * t[:, None, None, None] for x, t in zip(xs, ts, strict=True)))
    denoise = in_full_batches(recorder, 4)
    for count in (1, 3, 4, 5):
        xs = tuple(torch.randn(count, 3, size, size).to(memory_format=torch.channels_last) for size in (8, 4))
        ts = (torch.arange(count), torch.arange(count) + 7)
        predictions = denoise(xs, ts)
        ts = tuple(t.double() for t in ts)
        for x, t, prediction in zip(xs, ts, predictions, strict=True):
            assert torch.equal(prediction, x * t[:, None, None, None])
        seen_xs, seen_ts = recorder.asked[-1]
        for tensor, seen in zip((*xs, *ts), (*seen_xs, *seen_ts), strict=True):
            assert len(seen) == max(count, 4) and seen.is_contiguous()
            assert torch.equal(seen[:count], tensor) and (seen[count:] == tensor[-1]).all()


@pytest.mark.parametrize("model_class", MODELS)
def test_compiled_once_for_every_batch_and_for_further_models(model_class):
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph

    torch._dynamo.reset()
    path, seeds = MODELS[model_class], list(image_seeds(42, 5))
    for prediction_type in ("epsilon", "x0"):
        model = model_class(hidden_dims=(8, 16)).eval().requires_grad_(False)
        model = model.to(memory_format=torch.channels_last)
        shapes, scheduler = scale_shapes(model.num_scales, 3, 16), DDIMScheduler(prediction_type=prediction_type)
        feed = coarse_feed(model, "x0")
        with mock.patch.object(torch, "compile", functools.partial(torch.compile, backend=backend)):
            denoise, note = compile_denoiser(model.denoise, shapes, 2, torch.device("cpu"), "fp32")
        assert note == ""
        first = len(graphs)
        eager, compiled = (
            [s.images for _, s in sample_seeds(d, scheduler, path, seeds, shapes, 2, coarse_from=feed)]
            for d in (model.denoise, denoise)
        )
        if feed is None:  # Its times are real ones.
            list(sample_seeds(denoise, scheduler, path, seeds, shapes, 2, solver=make_solver("ode", tolerance=100.0)))
        assert len(graphs) == first > 0
        for one, other in zip(eager, compiled, strict=True):
            for x, y in zip(one, other, strict=True):
                assert x.shape == y.shape
                torch.testing.assert_close(x, y, rtol=0, atol=1e-4)
    # The second model found what the first had made.
    assert len(graphs) == 1


def failing_compiler(call, **_):
    def fail(*_):
        raise RuntimeError("no compiler\nand much more")

    return fail


def test_a_compiler_that_fails_leaves_the_network_as_it_was():
    with mock.patch.object(torch, "compile", failing_compiler):
        denoise, note = compile_denoiser(fading, scale_shapes(2, 3, 8), 2, torch.device("cpu"))
    assert denoise is fading
    assert note == "note: compiling failed (RuntimeError: no compiler); going on without"


def test_a_lack_of_memory_is_no_fault_of_the_compiler():
    def rehearse(_):
        raise torch.OutOfMemoryError("CUDA out of memory")

    with pytest.raises(torch.OutOfMemoryError):
        compile_or_not(fading, rehearse)


@pytest.mark.parametrize(
    ("device", "choice", "calls", "expected"),
    [
        ("cpu", None, math.inf, False),
        ("cpu", True, 1, True),
        ("cuda", None, math.inf, True),
        ("cuda", None, MIN_COMPILED_CALLS, True),
        ("cuda", None, MIN_COMPILED_CALLS - 1, False),
        ("cuda", True, 1, True),
        ("cuda", False, math.inf, False),
    ],
)
def test_networks_are_compiled_where_it_pays(device, choice, calls, expected):
    assert resolve_compile(torch.device(device), choice, calls) is expected


def test_generating_with_and_without_a_compiler_gives_the_same_images(stage, tiny, cache, tmp_path):
    stage(train_lift, *tiny(tmp_path), "--cache_dir", cache, "--epochs", 1)
    flags = ["--checkpoint", tmp_path / "checkpoints/lift_dual_timestep_1ep.pth", "--num_images", 3, "--batch_size", 2]
    flags += ["--num_steps", 2, "--device", "cpu", "--precision", "fp32", "--trajectory"]
    compilers = {
        "eager": (None, mock.Mock(side_effect=AssertionError("nobody asked for it"))),
        "graphs": ("--compile", functools.partial(torch.compile, backend="aot_eager")),
        "failing": ("--compile", failing_compiler),
    }
    pixels = {}
    for name, (flag, compiler) in compilers.items():
        with mock.patch.object(torch, "compile", compiler):
            chosen = [*flags, "--output", tmp_path / name, *([flag] if flag else [])]
            output = stage(generate_with_path_30, *chosen).output
        assert ("note: compiling failed (RuntimeError: no compiler); going on without\n" in output) == (
            name == "failing"
        )
        files = sorted((tmp_path / name).glob("[0-9]*.png"))
        pixels[name] = torch.stack([read_png(file) for file in files]).int()
        assert len(files) == 3 and (tmp_path / name / "figures/trajectory.png").exists()
    assert (pixels["eager"] - pixels["graphs"]).abs().max() <= 1
    assert torch.equal(pixels["eager"], pixels["failing"])


RUNGS = (999, 850, 600, 300, 80, 0)


def uneven(xs, ts):
    """Two clocks that matter differently from image to image."""
    strength = (40 * xs[0].flatten(1).mean(1)).sigmoid()[:, None, None, None]
    levels = [torch.sin(t.double() / 150)[:, None, None, None] for t in ts]
    fine = 0.6 * xs[0] + 0.3 * strength * levels[1] * torch.tanh(3 * xs[0])
    return fine, 0.5 * xs[1] + (1 - strength) * levels[0] * torch.sin(4 * xs[1])


def greedy_reference(denoise, scheduler, noise):
    """One image, by trying every move with `sample`-like plain steps; returns its points and calls."""
    sigma = scheduler.snr.pow(-0.5)
    at, xs, calls, points = (0, 0), tuple(noise), 1, []
    last = len(RUNGS) - 2

    def epsilons(xs, at):
        return denoise(xs, tuple(torch.tensor([RUNGS[k]]) for k in at))

    while True:
        points.append(tuple(RUNGS[k] for k in at))
        if at == (last, last):
            return [*points, (0, 0)], calls
        now, options = epsilons(xs, at), []
        for move in ((1, 0), (0, 1), (1, 1)):
            to = tuple(a + m for a, m in zip(at, move, strict=True))
            if max(to) > last:
                continue
            moved = tuple(
                scheduler.step(e, RUNGS[a], RUNGS[b], x) if b > a else x
                for e, a, b, x in zip(now, at, to, xs, strict=True)
            )
            calls += 1
            parts = zip(epsilons(moved, to), now, at, to, strict=True)
            errors = [(sigma[RUNGS[b]] - sigma[RUNGS[a]]).item() * (f - e).norm().item() / 2 for f, e, a, b in parts]
            options.append((math.hypot(*errors) / sum(move), to, moved))
        _, at, xs = min(options, key=lambda option: option[0])


def test_greedy_images_choose_as_a_plain_loop_does():
    scheduler, noise = DDIMScheduler(), start_noise(PATHS["diagonal"], batch=6, dtype=torch.float64)
    result = sample_greedy(uneven, scheduler, RUNGS, noise)
    for k in range(6):
        points, calls = greedy_reference(uneven, scheduler, [x[k : k + 1] for x in noise])
        found = [tuple(p) for p in result.points[k].tolist()]
        assert found[: len(points)] == points
        assert set(found[len(points) :]) <= {(0, 0)}
        assert result.nfe[k] == calls
    assert len({tuple(map(tuple, p)) for p in result.points.tolist()}) > 1  # Images differ, or nothing was chosen.


def test_greedy_images_are_those_of_the_paths_they_took():
    scheduler, noise = DDIMScheduler(), start_noise(PATHS["diagonal"], batch=5, dtype=torch.float64)
    result = sample_greedy(uneven, scheduler, RUNGS, noise)
    for k, points in enumerate(result.points.tolist()):
        path = two_scale(*dict.fromkeys(map(tuple, points)))
        alone = sample(uneven, scheduler, path, [x[k : k + 1] for x in noise])
        for x, y in zip(result.images, alone.images, strict=True):
            torch.testing.assert_close(x[k : k + 1], y, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("prediction_type", ["x0", "v"])
def test_greedy_images_are_the_same_whatever_is_predicted(prediction_type):
    noise = start_noise(PATHS["diagonal"], batch=4, dtype=torch.float64)
    abar = DDIMScheduler().alphas_cumprod

    def converted(xs, ts):
        predictions = []
        for x, epsilon, t in zip(xs, uneven(xs, ts), ts, strict=True):
            a = abar[t][:, None, None, None]
            x0 = (x - (1 - a).sqrt() * epsilon) / a.sqrt()
            predictions.append(x0 if prediction_type == "x0" else a.sqrt() * epsilon - (1 - a).sqrt() * x0)
        return tuple(predictions)

    expected = sample_greedy(uneven, DDIMScheduler(), RUNGS, noise)
    found = sample_greedy(converted, DDIMScheduler(prediction_type=prediction_type), RUNGS, noise)
    assert torch.equal(found.points, expected.points) and torch.equal(found.nfe, expected.nfe)
    for x, y in zip(found.images, expected.images, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-8, atol=1e-8)


def test_greedy_counts_every_call_of_every_image():
    rows = []

    def count(xs, ts):
        rows.append(len(xs[0]))
        return uneven(xs, ts)

    result = sample_greedy(count, DDIMScheduler(), RUNGS, start_noise(PATHS["diagonal"], batch=4, dtype=torch.float64))
    assert result.nfe.sum() == sum(rows)
    assert (result.nfe > len(RUNGS) - 1).all()


def test_of_moves_as_good_as_each_other_the_fine_one_is_taken():
    # A prediction that never changes makes no error, wherever it goes.
    noise = start_noise(PATHS["diagonal"])
    result = sample_greedy(lambda xs, ts: tuple(map(torch.zeros_like, xs)), DDIMScheduler(), RUNGS, noise)
    expected = [*((t, 999) for t in RUNGS[:-1]), *((RUNGS[-2], t) for t in RUNGS[1:-1]), (0, 0)]
    assert [list(map(tuple, points)) for points in result.points.tolist()] == [expected] * 2


def test_greedy_with_one_step_is_one_call():
    noise = start_noise(PATHS["diagonal"])
    result = sample_greedy(fading, DDIMScheduler(), (999, 0), noise)
    assert result.nfe.tolist() == [1, 1]
    expected = sample(fading, DDIMScheduler(), diagonal(1), noise).images
    for x, y in zip(result.images, expected, strict=True):
        torch.testing.assert_close(x, y)


@pytest.mark.parametrize("rungs", [(999,), (999, 400), (999, 999, 0), (0,), (500, 900, 0)])
def test_greedy_refuses_rungs_that_do_not_fall_to_clean(rungs):
    with pytest.raises(ValueError, match="rungs falling to 0"):
        sample_greedy(fading, DDIMScheduler(), rungs, start_noise(PATHS["diagonal"]))


def test_greedy_refuses_one_scale_and_zero_snr():
    with pytest.raises(ValueError, match="2 scales"):
        sample_greedy(fading, DDIMScheduler(), RUNGS, start_noise(PATHS["one scale"]))
    scheduler = DDIMScheduler(beta_schedule="cosine_zero_terminal", prediction_type="v")
    with pytest.raises(ValueError, match="SNR at timestep 999 is 0"):
        sample_greedy(fading, scheduler, RUNGS, start_noise(PATHS["diagonal"]))
