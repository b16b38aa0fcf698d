"""Local score machines against loops over pixels, the ideal denoiser, and the two images whose fixed points count."""

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

import truth.local
from diffusion.sampler import sample
from diffusion.solvers import make_solver
from exact_models import rng
from paths.path import Path
from scheduler import PREDICTION_TYPES, DDIMScheduler
from truth.ideal import EmpiricalDenoiser
from truth.local import LocalDenoiser, WindowTable

MACHINES = [("ls", "zeros"), ("ls", "circular"), ("els", "zeros"), ("els", "circular"), ("bbels", "zeros")]
EVERY_NOISE = torch.tensor([980, 700, 300, 20])
# Both ways to the same sums: by shifts of the images alone, or by products of windows wherever these can be used.
WAYS = {"shifts": 0, "products": 10**9}


@pytest.fixture(params=WAYS)
def way(request, monkeypatch):
    monkeypatch.setattr(truth.local, "PRODUCTS_UP_TO", WAYS[request.param])
    return request.param


def process(prediction_type="x0", **settings):
    return DDIMScheduler(prediction_type=prediction_type, clip_sample=False, **settings)


def images_of(count, *shape, seed=1):
    return torch.rand(count, *shape, generator=rng(seed), dtype=torch.float64) * 2 - 1


def noisy_of(scheduler, images, ts, seed=2):
    """Noisy versions of the first images, one for each time."""
    noise = torch.randn(len(ts), *images.shape[1:], generator=rng(seed), dtype=torch.float64)
    return scheduler.add_noise(images[: len(ts)], noise, ts)


def shapes(count, side):
    """Black and white images of a disc over stripes, -1 and 1: many share windows of 3 x 3 pixels."""
    g = rng(5)
    rows, columns = torch.meshgrid(*[torch.arange(side).double()] * 2, indexing="ij")
    made = []
    for _ in range(count):
        a, b, c, d = (torch.rand(4, generator=g, dtype=torch.float64) * side).tolist()
        stripes = torch.sin((rows * a + columns * b) / side) > 0
        made.append(stripes | ((rows - c).square() + (columns - d).square() < side))
    return torch.stack(made)[:, None].double() * 2 - 1


def by_loops(u, precision, images, machine, borders, side):
    """The mean over candidates of one image, pixel by pixel, from the definition."""
    channels, height, width = u.shape
    reach = side // 2
    u, images = u.tolist(), images.tolist()

    def offsets(size):
        return range(size) if borders == "circular" and side >= size else range(-reach, reach + 1)

    def pixel(image, c, a, b):
        if borders == "circular":
            return image[c][a % height][b % width]
        return image[c][a][b] if 0 <= a < height and 0 <= b < width else 0.0

    def cut(place, size):
        return max(0, reach - place), max(0, place + reach - (size - 1))

    result = torch.empty(channels, height, width, dtype=torch.float64)
    places = list(itertools.product(range(height), range(width)))
    for a, b in places:
        logits, values = [], []
        for image, (p, q) in itertools.product(images, places):
            if machine == "ls" and (p, q) != (a, b):
                continue
            if machine == "bbels" and (cut(p, height), cut(q, width)) != (cut(a, height), cut(b, width)):
                continue
            distance = 0.0
            for i, j, c in itertools.product(offsets(height), offsets(width), range(channels)):
                if borders == "circular" or (0 <= a + i < height and 0 <= b + j < width):
                    distance += (pixel(u, c, a + i, b + j) - pixel(image, c, p + i, q + j)) ** 2
            logits.append(-precision / 2 * distance)
            values.append([image[c][p][q] for c in range(channels)])
        weights = [math.exp(each - max(logits)) for each in logits]
        for c in range(channels):
            result[c, a, b] = sum(w * v[c] for w, v in zip(weights, values, strict=True)) / sum(weights)
    return result


@pytest.mark.parametrize("side", [1, 3, 5, 11])
@pytest.mark.parametrize("channels", [1, 2])
@pytest.mark.parametrize(("machine", "borders"), MACHINES)
def test_every_pixel_is_the_mean_over_its_candidates(machine, borders, channels, side, way):
    scheduler, images = process(), images_of(3, channels, 4, 5)
    ts = torch.tensor([700, 300])
    x = noisy_of(scheduler, images, ts)
    denoiser = LocalDenoiser(scheduler, images, machine, side, borders)
    [found] = denoiser.denoise((x,), (ts,))
    for k, t in enumerate(ts):
        u = x[k] / scheduler.alphas[t]
        expected = by_loops(u, scheduler.snr[t].item(), images, machine, borders, side)
        torch.testing.assert_close(found[k], expected, rtol=1e-10, atol=1e-10)


def ideal(scheduler, images, x, ts):
    """The posterior mean of whole images: a second scale at zero SNR says nothing."""
    coarse = torch.zeros(len(x), images.shape[1], images.shape[2] // 2, images.shape[3] // 2, dtype=x.dtype)
    return EmpiricalDenoiser(scheduler, images)(x, coarse, ts, torch.full_like(ts, 999))[0]


@pytest.mark.parametrize(
    ("machine", "borders", "side"), [("ls", "zeros", 11), ("ls", "circular", 7), ("bbels", "zeros", 13)]
)
def test_a_window_of_the_whole_image_makes_the_ideal_denoiser(machine, borders, side):
    scheduler, images = process(beta_schedule="cosine_zero_terminal"), images_of(5, 2, 4, 6)
    ts = torch.tensor([999, 900, 500, 100])
    x = noisy_of(scheduler, images, ts)
    found = LocalDenoiser(scheduler, images, machine, side, borders)(x, ts)
    torch.testing.assert_close(found, ideal(scheduler, images, x, ts), rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(found[0], images.mean(0))  # Of pure noise.


@pytest.mark.parametrize("side", [7, 9])
def test_a_window_of_the_whole_torus_makes_the_ideal_denoiser_of_all_shifts(side):
    scheduler, images = process(beta_schedule="cosine_zero_terminal"), images_of(3, 2, 4, 6)
    orbit = torch.cat([images.roll(shift, (2, 3)) for shift in itertools.product(range(4), range(6))])
    ts = torch.tensor([900, 500, 100])
    x = noisy_of(scheduler, images, ts)
    found = LocalDenoiser(scheduler, images, "els", side, "circular")(x, ts)
    torch.testing.assert_close(found, ideal(scheduler, orbit, x, ts), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("side", [3, 5, 9])
def test_els_on_the_torus_is_shifted_with_the_image(side, way):
    scheduler, images = process(), images_of(4, 1, 6, 8)
    x = noisy_of(scheduler, images, EVERY_NOISE)
    for machine, is_equivariant in (("els", True), ("ls", False)):
        denoiser = LocalDenoiser(scheduler, images, machine, side, "circular")
        shifted, plain = denoiser(x.roll((2, 5), (2, 3)), EVERY_NOISE), denoiser(x, EVERY_NOISE).roll((2, 5), (2, 3))
        error = (shifted - plain).abs().max()
        assert error < 1e-12 if is_equivariant else error > 0.1


@pytest.mark.parametrize(("machine", "borders"), MACHINES)
def test_a_row_does_not_depend_on_its_batch_to_the_bit(machine, borders, way):
    scheduler, images = process(), images_of(5, 2, 8, 8).float()
    x = noisy_of(scheduler, images.double(), EVERY_NOISE).float()
    denoiser = LocalDenoiser(scheduler, images, machine, lambda log_snr: 5 if log_snr < 0 else 3, borders)
    together = denoiser(x, EVERY_NOISE)
    for k in range(len(x)):
        assert torch.equal(together[k], denoiser(x[k : k + 1], EVERY_NOISE[k : k + 1])[0])
    # Windows are those of their noise levels.
    for side, rows in ((5, slice(0, 2)), (3, slice(2, 4))):
        alone = LocalDenoiser(scheduler, images, machine, side, borders)(x[rows], EVERY_NOISE[rows])
        assert torch.equal(together[rows], alone)


@pytest.mark.parametrize("side", [3, 7])
@pytest.mark.parametrize(("machine", "borders"), MACHINES)
def test_fp32_is_as_good_as_float64_at_every_noise_level(machine, borders, side):
    scheduler, images = process(), images_of(24, 1, 12, 12)
    ts = torch.tensor([999, 900, 700, 500, 300, 200, 100, 50, 20, 5, 0])
    x = noisy_of(scheduler, images, ts).float()
    exact = LocalDenoiser(scheduler, images.float().double(), machine, side, borders)(x.double(), ts)
    found = LocalDenoiser(scheduler, images.float(), machine, side, borders)(x, ts)
    assert (found - exact).abs().max() < 2e-4


class Largest(TorchDispatchMode):
    """The most bytes that any result has taken."""

    def __init__(self):
        super().__init__()
        self.bytes = self.results = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor):
            self.bytes = max(self.bytes, result.untyped_storage().nbytes())
            self.results += 1
        return result


@pytest.mark.parametrize(("machine", "borders"), MACHINES)
def test_memory_bounds_what_is_made_and_changes_nothing(machine, borders, way):
    scheduler, images = process(), images_of(12, 2, 5, 5)
    ts = torch.tensor([500])
    x = noisy_of(scheduler, images, ts)
    found = {}
    for mib in (0.01, 64):
        denoiser = LocalDenoiser(scheduler, images, machine, 3, borders, memory_mib=mib)
        with Largest() as made:
            found[mib] = denoiser(x, ts), made
    assert found[0.01][1].bytes <= 0.01 * 2**20
    assert found[0.01][1].results > found[64][1].results
    torch.testing.assert_close(found[0.01][0], found[64][0], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
@pytest.mark.parametrize("name", ["vp", "sub_vp", "ve", "flow"])
def test_the_clean_image_is_that_of_every_process(name, prediction_type):
    if name == "flow" and prediction_type in ("epsilon", "score"):
        pytest.skip("Refused at zero SNR.")
    scheduler, images = process(prediction_type, process=name), images_of(4, 1, 6, 6)
    for ts in (torch.tensor([980, 700, 300, 20]), torch.tensor([950.5, 600.25, 300.75, 20.5]).double()):
        x = noisy_of(scheduler, images, ts)
        [prediction] = LocalDenoiser(scheduler, images, "els", 3).denoise((x,), (ts,))
        alpha, sigma = scheduler.curves(ts.double())[:2]
        other = LocalDenoiser(process(), images, "els", 3)
        expected = other.posterior_mean(x / torch.hypot(alpha, sigma)[:, None, None, None], 2 * (alpha / sigma).log())
        found = scheduler.predict_x0(prediction, ts, x)
        torch.testing.assert_close(found, expected, rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("solver", ["ddim", "heun", "dpmpp_2m"])
@pytest.mark.parametrize(
    ("name", "prediction_type"), [("vp", "epsilon"), ("sub_vp", "v"), ("ve", "score"), ("flow", "velocity")]
)
def test_every_process_is_walked_to_pixels_of_the_images(name, prediction_type, solver):
    """With windows of one pixel at its place, which are those of a distribution of one dimension each."""
    scheduler, images = process(prediction_type, process=name, beta_schedule="cosine"), shapes(3, 6)
    denoiser = LocalDenoiser(scheduler, images, "ls", 1)
    path = Path(tuple((t,) for t in (999, 900, 800, 700, 600, 500, 400, 300, 200, 100, 50, 20, 0)), "test", {})
    noise = torch.randn(3, 1, 6, 6, generator=rng(3), dtype=torch.float64)
    [found] = sample(denoiser.denoise, scheduler, path, (noise,), solver=make_solver(solver)).images
    same = (images == images[0]).all(0)  # Pixels that have one value only.
    assert (found[:, same] - images[0][same]).abs().max() < 1e-9
    assert ((found - 1).abs().minimum((found + 1).abs()) < 1e-6).double().mean() > 0.95
    assert len(found.sign().unique(dim=0)) == 3


def binary_images(side):
    """All images of side x side black and white pixels, -1 and 1, float64 `[2^(side²), side, side]`."""
    numbers = torch.arange(2 ** (side * side))
    return ((numbers[:, None] >> torch.arange(side * side) & 1) * 2 - 1).view(-1, side, side).double()


@pytest.mark.parametrize(("side", "count"), [(3, 2), (4, 188)])
def test_black_and_white_have_the_fixed_points_of_the_majority(side, count):
    """A pixel of a fixed point has the colour of most pixels of its window (arXiv 2412.20292)."""
    images = binary_images(side)
    windows = sum(images.roll(shift, (1, 2)) for shift in itertools.product((-1, 0, 1), repeat=2))
    is_fixed = (windows.sign() == images).flatten(1).all(1)
    # One of each orbit of shifts, transposition and exchange of colours, the image of the least number.
    powers = (2 ** torch.arange(side * side)).double()
    variants = [sign * each for sign in (1, -1) for each in (images, images.mT)]
    shifts = itertools.product(range(side), repeat=2)
    alike = (each.roll(shift, (1, 2)) for shift, each in itertools.product(shifts, variants))
    numbers = [((each + 1) / 2).flatten(1) @ powers for each in alike]
    least = torch.stack(numbers).min(0).values.long()
    chosen = least.unique()
    orbit_sizes = torch.bincount(least, minlength=len(images))[chosen]
    scheduler = process()
    training = torch.tensor([-1.0, 1.0], dtype=torch.float64)[:, None, None, None].expand(2, 1, side, side)
    denoiser = LocalDenoiser(scheduler, training, "els", 3, "circular")
    x = images[chosen, None]
    found = denoiser(scheduler.alphas[0] * x, torch.zeros(len(x), dtype=torch.long))
    stays = (found - x).abs().flatten(1).max(1).values < 1e-9
    assert torch.equal(stays, is_fixed[chosen])
    assert (orbit_sizes * stays).sum() == is_fixed.sum() == count


@pytest.mark.parametrize(("machine", "borders"), [("els", "circular"), ("bbels", "zeros")])
def test_samples_are_locally_consistent(machine, borders):
    """Each pixel of a converged sample is the centre of a training window nearest to its own (arXiv 2412.20292)."""
    scheduler, images = process("epsilon", process="ve"), shapes(8, 8)
    path = Path(tuple((t,) for t in (*range(999, 0, -60), 0)), "test", {})
    noise = torch.randn(3, 1, 8, 8, generator=rng(9), dtype=torch.float64)
    denoiser = LocalDenoiser(scheduler, images, machine, 3, borders)
    [found] = sample(denoiser.denoise, scheduler, path, (noise,)).images

    def windows(x):
        # A value that no pixel has says where the border is.
        x = F.pad(x, [1] * 4, "circular") if borders == "circular" else F.pad(x, [1] * 4, value=9.0)
        return F.unfold(x, 3).transpose(1, 2).flatten(0, 1)

    candidates, own = windows(images), windows(found)
    distances = torch.cdist(own, candidates)
    has_centre = (own[:, None, 4] - candidates[:, 4]).abs() < 1e-6
    nearest = distances.masked_fill(~has_centre, math.inf).min(1).values
    torch.testing.assert_close(nearest, distances.min(1).values, rtol=0, atol=1e-6)
    # Many differ from all training windows, and no sample is a training image or a shift of one.
    assert (nearest > 1).sum() >= 3
    orbit = torch.cat([images.roll(shift, (2, 3)) for shift in itertools.product(range(8), repeat=2)])
    assert torch.cdist(found.flatten(1), orbit.flatten(1)).min() > 2


def test_a_table_gives_the_window_of_the_nearest_level():
    table = WindowTable(((-4.0,), (0.0,), (2.0,)), (9, 5, 3))
    assert [table(level) for level in (-math.inf, -2.1, -1.9, 0.9, 1.1, math.inf)] == [9, 9, 5, 5, 3, 3]
    scheduler, images = process(), images_of(3, 1, 4, 4)
    denoiser = LocalDenoiser(scheduler, images, "els", table)
    x = noisy_of(scheduler, images, EVERY_NOISE[:3])
    sides = [table(scheduler.log_snr[t].item()) for t in EVERY_NOISE[:3]]
    assert len(set(sides)) > 1
    for k, side in enumerate(sides):
        alone = LocalDenoiser(scheduler, images, "els", side)(x[k : k + 1], EVERY_NOISE[k : k + 1])
        torch.testing.assert_close(denoiser(x, EVERY_NOISE[:3])[k : k + 1], alone)
    both = WindowTable(((-60.0, 0.0), (-60.0, 4.0), (1.0, 5.0)), (9, 7, 3))
    assert [both(-math.inf, 1.0), both(-math.inf, 3.0), both(0.5, math.inf)] == [9, 7, 3]
    for levels, windows in (
        ((), ()),
        (((0.0,), (0.0,)), (3, 5)),
        (((0.0,), (1.0,)), (3,)),
        (((-math.inf,),), (3,)),
        (((0.0,), (0.0, 1.0)), (3, 5)),
    ):
        with pytest.raises(ValueError, match="different levels of finite log SNRs"):
            WindowTable(levels, windows)


def test_where_there_is_no_noise_and_where_there_is_nothing_else_it_is_finite():
    scheduler, images = process("x0", process="flow"), shapes(3, 6).float()
    x = images[:2] + torch.tensor([0.0, 5.0])[:, None, None, None]
    for machine, borders in MACHINES:
        denoiser = LocalDenoiser(scheduler, images, machine, 3, borders)
        for ts in (torch.tensor([0, 999]), torch.tensor([0.0, 999.0], dtype=torch.float64)):
            clean, mean = denoiser(x, ts)
            assert torch.equal(clean, images[0])
            assert mean.abs().max() <= 1
            if machine == "ls":
                torch.testing.assert_close(mean, images.mean(0))


def test_what_cannot_be_is_refused():
    scheduler, images = process(), images_of(3, 1, 4, 4)
    for message, settings in {
        "Unknown local score machine": {"machine": "none"},
        "Unknown borders": {"borders": "mirror"},
        "cut no window": {"machine": "bbels", "borders": "circular"},
        r"\[N, C, H, W\]": {"images": images[0]},
        "must be odd and positive": {"window": 4},
        "memory_mib": {"memory_mib": 0},
        "overcomplete": {"scheduler": process(representation="residual")},
    }.items():
        with pytest.raises(ValueError, match=message):
            LocalDenoiser(**{"scheduler": scheduler, "images": images, "machine": "els", "window": 3} | settings)
    denoiser = LocalDenoiser(scheduler, images, "els", lambda log_snr: 2)
    with pytest.raises(ValueError, match="at log SNR .* is 2"):
        denoiser(images, torch.tensor([3, 3, 3]))
    with pytest.raises(ValueError, match="those of training"):
        LocalDenoiser(scheduler, images, "els", 3)(images[:, :, :3], torch.tensor([3, 3, 3]))
