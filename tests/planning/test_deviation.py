"""What is measured along trajectories against a recording by hand, and how far paths end against samples themselves."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from diffusion.multistep import Corrected, Line, Parabola, Rule
from diffusion.sampler import sample
from diffusion.solvers import make_solver
from images.representation import upsample_nearest
from paths.families import diagonal, log_snr_shift
from paths.path import Path
from planning.deviation import deviation
from planning.trajectories import Band, Trajectories, fine_trajectories
from scheduler import DDIMScheduler
from truth.gaussian import GaussianDenoiser

RULES = {"ddim": Rule(), "dpmpp_2m": Line(), "dpmpp_3m": Parabola(), "unipc": Corrected()}
KINDS = ("one clock", "residual", "overcomplete")
SIDE, LINES = 8, 12
# So far apart that few noises tell modes of one from those of another.
SPREAD = (0.7, 0.02, 2e-4)


def rng(seed):
    return torch.Generator().manual_seed(seed)


def scheduler_of(kind, **options):
    representation = "overcomplete" if kind == "one clock" else kind
    return DDIMScheduler(**{"clip_sample": False, "representation": representation} | options)


def lines_of(kind, scheduler, count=LINES):
    log_snr = scheduler.log_snr.numpy()
    path = diagonal(count, "uniform_log_snr", 1 if kind == "one clock" else 2, log_snr, start=950)
    return log_snr_shift(path, math.log(4), log_snr).points if kind == "residual" else path.points


def noise_of(kind, count, seed=0, dtype=torch.float64):
    sides = (SIDE,) if kind == "one clock" else (SIDE, SIDE // 2)
    return tuple(torch.randn(count, 1, side, side, generator=rng(seed + side), dtype=dtype) for side in sides)


def exact_denoiser(kind, scheduler, low, high, mean=None):
    """The best denoiser of images of one channel, whose modes have variances low `[h, w]` and high `[3, h, w]`."""
    gaussian = GaussianDenoiser(scheduler, low[None], high[:, None], mean=mean)
    if kind != "one clock":
        return gaussian.denoise

    def denoise(xs, ts):
        # A coarse image of next to no signal tells nothing of the fine one.
        last = torch.full_like(ts[0], 999)
        blind = gaussian.log_snr.clone()
        blind[999] = -math.inf
        kept, gaussian.log_snr = gaussian.log_snr, blind
        found = gaussian.denoise((xs[0], torch.zeros_like(F.avg_pool2d(xs[0], 2))), (ts[0], last))[:1]
        gaussian.log_snr = kept
        return found

    return denoise


def spectrum_of(values, seed=3):
    """Variances of all modes, each one of the values."""
    chosen = torch.randint(len(values), (4, SIDE // 2, SIDE // 2), generator=rng(seed))
    modes = torch.tensor(values, dtype=torch.float64)[chosen]
    return modes[0], modes[1:]


def measured(kind, scheduler, denoise, noise, reach=LINES, **options):
    """Trajectories with the cells within a reach of the diagonal."""
    lines = lines_of(kind, scheduler)
    places = np.arange(LINES)
    cells = torch.from_numpy(abs(places[:, None] - places) <= reach) if kind != "one clock" else None
    return fine_trajectories(denoise, scheduler, lines, noise, cells, progress=False, **options)


def with_exact_variances(trajectories, values):
    """Each variance that the noises gave replaced by the one of the values that is nearest in its logarithm."""
    values = torch.tensor(values, dtype=torch.float64)
    found = []
    for band in trajectories.bands:
        nearest = (band.variances.log()[:, None] - values.log()).abs().argmin(1)
        found.append(band._replace(variances=values[nearest]))
    return trajectories._replace(bands=tuple(found))


def path_of(trajectories, lines):
    """The path of timesteps through lines `[N, S]` and the clean end."""
    lines = [*lines, [-1] * trajectories.points.shape[1]]
    return Path([[trajectories.points[line, s].item() for s, line in enumerate(row)] for row in lines], "lines", {})


def distances(kind, scheduler, denoise, noise, trajectories, lines, solver):
    """Mean squared distance of samples along a path from the ends of the trajectories of their noise, by sampling."""
    fine = Path(trajectories.points.tolist(), "fine", {})
    ends = sample(denoise, scheduler, fine, noise, solver=make_solver("dpmpp_2m")).images[0]
    found = sample(denoise, scheduler, path_of(trajectories, lines), noise, solver=make_solver(solver)).images[0]
    return (found - ends).square().sum((1, 2, 3)).mean().item()


ONE_CLOCK = [[0], [0, 6], [0, 3, 5, 8], [0, 1, 2, 6, 9, 11], list(range(LINES))]
TWO_CLOCKS = [
    [(0, 0)],
    [(0, 0), (3, 3), (7, 7), (10, 10)],
    [(0, 0), (2, 4), (5, 8), (8, 9), (11, 10)],
    [(0, 0), (4, 1), (6, 5), (9, 6), (10, 11)],
    # Rests of both scales, at the start, in the middle long enough for a parabola after it, and at the end.
    [(0, 0), (0, 3), (2, 3), (4, 5), (5, 5), (6, 5), (7, 7), (8, 8), (9, 9), (10, 9), (10, 11)],
    [(0, 0), (3, 0), (5, 0), (7, 0), (8, 4), (8, 6), (8, 8), (8, 11), (11, 11)],
]


def paths_of(kind):
    return [[(line,) for line in path] for path in ONE_CLOCK] if kind == "one clock" else TWO_CLOCKS


@pytest.mark.parametrize("values", [(0.3,), SPREAD])
@pytest.mark.parametrize("kind", KINDS)
def test_a_deviation_is_the_distance_of_samples(kind, values):
    """Exact for Gaussian images whose bins have one variance each: all rules, off the diagonal, and where one rests."""
    scheduler = scheduler_of(kind)
    mean = 0.2 * torch.randn(1, SIDE, SIDE, generator=rng(1), dtype=torch.float64)
    denoise = exact_denoiser(kind, scheduler, *spectrum_of(values), mean=None if kind == "one clock" else mean)
    noise = noise_of(kind, 12)
    trajectories = with_exact_variances(measured(kind, scheduler, denoise, noise), values)
    for name, rule in RULES.items():
        measure = deviation(trajectories, rule)
        for lines in paths_of(kind):
            found = measure(np.array([lines]))[0]
            expected = distances(kind, scheduler, denoise, noise, trajectories, lines, name)
            # Images and inner products are of float32, and an end is a small difference of large numbers.
            assert found == pytest.approx(expected, rel=5e-6, abs=1e-8), (name, lines)
            if name != "dpmpp_2m" or len(lines) < LINES:
                assert found > 1e-4


@pytest.mark.parametrize("process", ["sub_vp", "ve"])
def test_a_process_that_does_not_preserve_variance_deviates_alike(process):
    """Trajectories are kept in variance-preserving scale, and distances are of clean images."""
    scheduler = scheduler_of("overcomplete", process=process, beta_schedule="linear", prediction_type="x0")
    values = (0.3,)
    denoise = exact_denoiser("overcomplete", scheduler, *spectrum_of(values))
    noise = noise_of("overcomplete", 6)
    trajectories = with_exact_variances(measured("overcomplete", scheduler, denoise, noise), values)
    for name in ("dpmpp_2m", "unipc"):
        for lines in TWO_CLOCKS[:4]:
            found = deviation(trajectories, RULES[name])(np.array([lines]))[0]
            expected = distances("overcomplete", scheduler, denoise, noise, trajectories, lines, name)
            assert found == pytest.approx(expected, rel=1e-4, abs=1e-8), (name, lines)


@pytest.mark.parametrize("kind", KINDS)
def test_many_noises_tell_the_variances_well_enough(kind):
    """A smooth spectrum, bins of unlike modes, variances of 200 noises."""
    scheduler = scheduler_of(kind)
    side = SIDE // 2
    frequency = torch.arange(side, dtype=torch.float64)
    falling = (1 + torch.hypot(frequency[:, None], frequency)) ** -2.0
    low, high = 3.0 * falling, torch.tensor([0.2, 0.15, 0.05], dtype=torch.float64)[:, None, None]
    denoise = exact_denoiser(kind, scheduler, low, high * falling)
    noise = noise_of(kind, 200)
    trajectories = measured(kind, scheduler, denoise, noise, batch_size=64)
    apart = []
    for name, rule in RULES.items():
        for lines in paths_of(kind):
            found = deviation(trajectories, rule)(np.array([lines]))[0]
            expected = distances(kind, scheduler, denoise, noise, trajectories, lines, name)
            apart.append(abs(found / expected - 1) if expected > 1e-6 else 0.0)
    assert max(apart) < 0.25 and np.median(apart) < 0.03  # Most where next to nothing is left.


# A trajectory by hand


def by_hand(variances, states, seen, log_snr=(-2.0, 0.0, 2.0)):
    """Trajectories of one clock, of one mode each; states `[n + 1]` and seen `[n]` by mode."""
    log_snr = torch.tensor([*log_snr, math.inf], dtype=torch.float64)[:, None]
    points = torch.arange(len(log_snr) - 1, -1, -1)[:, None]
    tables = [torch.tensor(each, dtype=torch.float64).T[None] for each in (states, seen)]
    band = Band((0,), 0, torch.tensor(variances, dtype=torch.float64), *tables)
    cells = torch.full((len(points) - 1,) * 2, -1)
    cells.fill_diagonal_(0)
    cells += torch.diag(torch.arange(len(points) - 1))
    return Trajectories(points, log_snr, cells, (band,), len(points) - 1)


def test_one_mode_by_hand():
    """log SNRs -2, 0, 2; v = 0.5; alpha and sigma are 0.34524 and 0.93851, 0.70711 twice, 0.93851 and 0.34524."""
    trajectories = by_hand([0.5], [[1.0, 0.6, 0.3, 0.2]], [[0.1, 0.4, 0.25]])
    ddim, line = (deviation(trajectories, rule) for rule in (Rule(), Line()))
    # One call: the clean image that is seen at the start is the end. 0.2 - 0.1.
    assert ddim([[[0]]])[0] == pytest.approx(0.01)
    # From 0 to 2: sigma falls to 0.36788 of itself, alpha' - alpha · 0.36788 = 0.81150, x' = 0.36788 + 0.08115.
    # Off the trajectory by 0.14903, over alpha' 0.15879; v a / (1 + v a) = 0.78698; seen 0.25 + 0.12496.
    assert ddim([[[0], [2]]])[0] == pytest.approx((0.37496 - 0.2) ** 2, abs=1e-5)
    assert line([[[0], [2]]])[0] == ddim([[[0], [2]]])[0]
    # To 1: x' = 0.75344 + 0.70711 (1 - e^-1) 0.1 = 0.79814; off by 0.19814, over alpha 0.28021; gain 1/3: sees 0.49340.
    # On to 2, by 2M with equal steps: 3/2 of 0.49340 less 1/2 of 0.1 is 0.69010; x' = 0.48825 · 0.79814 + 0.93851
    # (1 - e^-1) 0.69010 = 0.79910; off by 0.49910, over alpha' 0.53180; sees 0.25 + 0.78698 · 0.53180 = 0.66852.
    # The last step ends on that: lands on the clean image alone.
    assert line([[[0], [1], [2]]])[0] == pytest.approx((0.66852 - 0.2) ** 2, abs=2e-5)
    # DDIM holds 0.49340 instead: x' = 0.38969 + 0.29271 = 0.68240; off by 0.38240; sees 0.25 + 0.32066.
    assert ddim([[[0], [1], [2]]])[0] == pytest.approx((0.57066 - 0.2) ** 2, abs=2e-5)


def test_modes_add_up():
    one, two = ([0.5], [[1.0, 0.6, 0.3, 0.2]], [[0.1, 0.4, 0.25]]), ([0.02], [[-0.3, 0.9, 0.1, 0.5]], [[0.2, 0.1, 0.3]])
    both = by_hand(*(a + b for a, b in zip(one, two, strict=True)))
    paths = [[[0], [1], [2]], [[0], [0], [2]], [[0], [2], [2]]]
    for rule in RULES.values():
        alone = [deviation(by_hand(*each), rule)(paths) for each in (one, two)]
        np.testing.assert_allclose(deviation(both, rule)(paths), sum(alone), rtol=1e-12)


def test_two_scales_that_show_one_mode_by_hand():
    """The clean image is moved by what both states are off, the coarse one at a quarter of its SNR."""
    log_snr = torch.tensor([[-1.0, -0.5], [1.0, 1.5], [math.inf, math.inf]], dtype=torch.float64)
    states = torch.tensor([[[1.0], [0.6], [0.3]], [[0.8], [-0.2], [0.3]]], dtype=torch.float64)
    seen = torch.tensor([[[0.1], [0.4]], [[0.1], [0.4]]], dtype=torch.float64)
    band = Band((0, 1), 0, torch.tensor([0.7], dtype=torch.float64), states, seen)
    points, cells = torch.tensor([[2, 2], [1, 1], [0, 0]]), torch.tensor([[0, -1], [-1, 1]])
    trajectories = Trajectories(points, log_snr, cells, (band,), 2)
    off = []
    for scale in (0, 1):
        (alpha, sigma), (after, left) = (
            [math.sqrt(1 / (1 + math.exp(sign * log_snr[k, scale].item()))) for sign in (-1, 1)] for k in (0, 1)
        )
        x = left / sigma * (states[scale, 0, 0].item() - alpha * 0.1) + after * 0.1
        off.append((x - states[scale, 1, 0].item()) / after)
    snrs = [math.exp(1.0), math.exp(1.5) / 4]
    moved = sum(snr * d for snr, d in zip(snrs, off, strict=True)) / (1 / 0.7 + sum(snrs))
    found = deviation(trajectories, Rule())(np.array([[[0, 0], [1, 1]]]))
    assert found[0] == pytest.approx((0.4 + moved - 0.3) ** 2, rel=1e-12)


def test_one_path_of_many_is_measured_as_alone(monkeypatch):
    kind = "overcomplete"
    scheduler = scheduler_of(kind)
    trajectories = measured(kind, scheduler, exact_denoiser(kind, scheduler, *spectrum_of(SPREAD)), noise_of(kind, 5))
    generator = np.random.default_rng(0)
    paths = np.sort(generator.integers(0, LINES, (60, 6, 2)), axis=1)
    paths[:, 0] = 0
    for rule in RULES.values():
        measure = deviation(trajectories, rule)
        together = measure(paths)
        assert together.shape == (60,) and together.dtype == np.float64
        np.testing.assert_allclose(together, [measure(path[None])[0] for path in paths], rtol=1e-10)
        with monkeypatch.context() as patch:
            patch.setattr("planning.deviation.LARGEST_TABLE", 3 * trajectories.bands[0].states.shape[-1])
            np.testing.assert_allclose(measure(paths), together, rtol=1e-10)
    assert len(np.unique(together)) == 60


@pytest.mark.parametrize(
    "lines, message",
    [
        ([[[1, 0], [2, 2]]], "begin at 0"),
        ([[[0, 0], [3, 3], [4, 2]]], "never go back"),
        ([[[0], [3]]], r"lines \[P, N, 2\]"),
        ([[0, 0], [3, 3]], r"lines \[P, N, 2\]"),
        ([[[0, 0], [2, 2]], [[0, 0], [1, 5]]], "at which nothing was measured"),
        ([[[0, 0], [LINES, LINES]]], f"beyond the last, {LINES - 1}"),
    ],
)
def test_lines_that_are_no_path_are_refused(lines, message):
    scheduler = scheduler_of("overcomplete")
    denoise = exact_denoiser("overcomplete", scheduler, *spectrum_of((0.3,)))
    trajectories = measured("overcomplete", scheduler, denoise, noise_of("overcomplete", 2), reach=2)
    measure = deviation(trajectories, Rule())
    assert measure([[[0, 0], [2, 2], [3, 5]]]).shape == (1,)
    with pytest.raises(ValueError, match=message):
        measure(np.array(lines))


# What is measured


class Network:
    """Some denoiser, not linear, whose coarse and fine predictions hang on both images and both times."""

    def __init__(self, scheduler, size=1.0):
        self.scheduler, self.size, self.calls = scheduler, size, 0

    def __call__(self, xs, ts):
        self.calls += len(xs[0])
        shares = [(t.double() / 1000).view(-1, 1, 1, 1).to(x.dtype) for t, x in zip(ts, xs, strict=True)]
        found = [torch.tanh(x + 0.3 * x.flip(-1) - share) for x, share in zip(xs, shares, strict=True)]
        if len(xs) > 1:
            found[0] = found[0] + 0.4 * upsample_nearest(torch.sin(xs[1] * (1 + shares[1])))
            found[1] = found[1] + 0.3 * F.avg_pool2d(torch.cos(xs[0] + shares[0]), 2)
        return self.scheduler.representation.project(tuple(self.size * each for each in found))


def recorded(scheduler, denoise, noise, trajectories):
    """States `[n + 1]` and clean images `[K]` of every scale, each `[B, C, H, W]`, by calls of the sampler alone."""
    states = []
    path = Path(trajectories.points.tolist(), "fine", {})
    keep = lambda k, xs: states.append(xs)  # noqa: E731
    sample(denoise, scheduler, path, noise, callback=keep, solver=make_solver("dpmpp_2m"))
    seen = {}
    for i, j in (trajectories.cells >= 0).nonzero().tolist():
        xs = (states[i][0],) if len(noise) == 1 else (states[i][0], states[j][1])
        ts = [trajectories.points[i, 0].item(), trajectories.points[j, -1].item()][: len(noise)]
        predictions = denoise(xs, tuple(torch.full((len(x),), t) for x, t in zip(xs, ts, strict=True)))
        seen[trajectories.cells[i, j].item()] = scheduler.predict_clean(predictions, tuple(ts), xs)
    scaled = []
    for xs, point in zip(states, trajectories.points.tolist(), strict=True):
        sizes = [torch.hypot(scheduler.alphas[t], scheduler.sigmas[t]).item() for t in point]
        sizes = [1.0] * len(point) if xs is states[-1] else sizes
        scaled.append(tuple(x / size for x, size in zip(xs, sizes, strict=True)))
    return scaled, [seen[k] for k in range(len(seen))]


def low(images):
    return F.avg_pool2d(images, 2)


def vectors_of(kind, rows):
    """For each band, by scale and by row, its part of the images `[B, C, H, W]` in orthonormal coordinates."""
    if kind == "one clock":
        return [[[xs[0] for xs in rows]]]
    details = [[xs[0] - upsample_nearest(low(xs[0])) for xs in rows]]
    coarse = [2 * xs[1] for xs in rows]
    fine = [2 * low(xs[0]) for xs in rows]
    return [[fine, coarse] if kind == "overcomplete" else [coarse], details]


@pytest.mark.parametrize("clip, process", [(False, "vp"), (True, "vp"), (True, "ve")])
@pytest.mark.parametrize("kind", KINDS)
def test_coordinates_have_the_inner_products_of_the_images(kind, clip, process):
    """States and clean images, clamped where the sampler clamps them, at the lines and beside the diagonal."""
    scheduler = scheduler_of(kind, clip_sample=clip, process=process, prediction_type="x0")
    denoise = Network(scheduler, size=1.2)
    noise = tuple(torch.cat([x, x.flip(2), 0.5 * x.flip(3)], 1) for x in noise_of(kind, 7, dtype=torch.float32))
    trajectories = measured(kind, scheduler, denoise, noise, reach=2, batch_size=3)
    assert denoise.calls == 7 * trajectories.nfe
    states, seen = recorded(scheduler, denoise, noise, trajectories)
    assert (max(x.abs().max() for x in seen[3]) > 1.01) == (not clip or kind == "residual")
    parts = zip(trajectories.bands, vectors_of(kind, states), vectors_of(kind, seen), strict=True)
    for band, wide, clean in parts:
        assert len(band.scales) == len(wide) and band.variances.shape == band.states.shape[-1:]
        found = torch.cat([band.states.flatten(0, 1), band.seen.flatten(0, 1)])
        rows = torch.stack([row.flatten().double() for each in (wide, clean) for scale in each for row in scale])
        expected = rows @ rows.T / 7
        lengths = expected.diag().sqrt()
        assert ((found @ found.T - expected).abs() <= 2e-5 * torch.outer(lengths, lengths) + 1e-6).all()


@pytest.mark.parametrize("kind", KINDS)
def test_the_size_of_batches_makes_no_difference(kind):
    scheduler = scheduler_of(kind, clip_sample=True, prediction_type="x0")
    paths = np.array([paths_of(kind)[2]])
    noise = noise_of(kind, 7)
    found = []
    for size in (1, 3, 7, 16):
        trajectories = measured(kind, scheduler, Network(scheduler), noise, batch_size=size)
        found.append(deviation(trajectories, Parabola())(paths)[0])
    np.testing.assert_allclose(found, found[0], rtol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_what_takes_no_linearisation_is_exact_for_any_network(kind):
    """One call, and the trajectory itself; of clamped images, which the sampler goes by."""
    for clip in (True, False):
        scheduler = scheduler_of(kind, clip_sample=clip, prediction_type="x0")
        denoise, noise = Network(scheduler, size=2.0), noise_of(kind, 5)
        trajectories = measured(kind, scheduler, denoise, noise, reach=0)
        once = [[0] * len(noise)]
        expected = distances(kind, scheduler, denoise, noise, trajectories, once, "ddim")
        assert deviation(trajectories, Rule())(np.array([once]))[0] == pytest.approx(expected, rel=1e-5)
        # The trajectory of the coarse scale of a residual pair rests once it has come to the end of the schedule.
        all_lines = np.array([[[k] * len(noise) for k in range(LINES)]])
        assert deviation(trajectories, Line())(all_lines)[0] < 1e-8 * expected
        assert deviation(trajectories, Rule())(all_lines)[0] > 1e-3


def test_cells_and_points_are_those_asked_for():
    scheduler = scheduler_of("residual")
    lines = lines_of("residual", scheduler)
    denoise = Network(scheduler)
    cells = torch.zeros(LINES, LINES, dtype=torch.bool)
    cells[2, 5] = cells[7, 7] = cells[9, 1] = True
    noise = noise_of("residual", 2)
    trajectories = fine_trajectories(denoise, scheduler, lines, noise, cells, progress=False)
    order = [(0, 0), (1, 1), (2, 2), (2, 5), *((k, k) for k in range(3, 9)), (9, 1), (9, 9), (10, 10), (11, 11)]
    expected = torch.full((LINES, LINES), -1)
    for number, cell in enumerate(order):
        expected[cell] = number
    assert torch.equal(trajectories.cells, expected) and trajectories.nfe == LINES + 2
    assert trajectories.points.tolist() == [list(point) for point in lines]
    torch.testing.assert_close(trajectories.log_snr[:-1], scheduler.log_snr[trajectories.points[:-1]])
    assert trajectories.log_snr[-1].tolist() == [math.inf] * 2 and denoise.calls == 2 * (LINES + 2)
    assert [band.scales for band in trajectories.bands] == [(1,), (0,)]
    assert all(band.seen.shape[:2] == (1, LINES + 2) for band in trajectories.bands)
    alone = fine_trajectories(denoise, scheduler, lines, noise, progress=False)
    assert (
        alone.nfe == LINES and alone.cells.diag().tolist() == list(range(LINES)) and (alone.cells >= 0).sum() == LINES
    )


def test_variances_are_those_of_the_ends_about_their_mean():
    """Two flat images e and 3 e: of one mode, with variance (e² + e²) 64 / (2 - 1), and of no other but by rounding."""
    scheduler = scheduler_of("one clock", prediction_type="x0")
    denoise = lambda xs, ts: (0.7 * xs[0],)  # noqa: E731
    noise = (torch.tensor([1.0, 3.0]).view(2, 1, 1, 1).expand(2, 1, SIDE, SIDE).double().contiguous(),)
    trajectories = measured("one clock", scheduler, denoise, noise)
    [band] = trajectories.bands
    squares = band.states[0, 0].square()
    assert squares.sum().item() == pytest.approx(64 * (1 + 9) / 2) and squares.max() > (1 - 1e-6) * squares.sum()
    fine = Path(trajectories.points.tolist(), "fine", {})
    e = sample(denoise, scheduler, fine, noise, solver=make_solver("dpmpp_2m")).images[0][0, 0, 0, 0].item()
    assert band.variances[squares.argmax()].item() == pytest.approx(2 * 64 * e**2)
    assert (band.variances[squares < 1e-6] < 1e-6).all()


def test_what_gives_no_trajectories_is_refused():
    scheduler = scheduler_of("overcomplete")
    denoise, lines = Network(scheduler), lines_of("overcomplete", scheduler)
    with pytest.raises(ValueError, match="2 noises or more"):
        fine_trajectories(denoise, scheduler, lines, noise_of("overcomplete", 1), progress=False)
    wrong = torch.ones(LINES + 1, LINES + 1, dtype=torch.bool)
    with pytest.raises(ValueError, match=rf"cells must be bool \[{LINES}, {LINES}\] like the lines"):
        fine_trajectories(denoise, scheduler, lines, noise_of("overcomplete", 2), wrong, progress=False)
    one = lines_of("one clock", scheduler)
    with pytest.raises(ValueError, match="and of two scales"):
        fine_trajectories(denoise, scheduler, one, noise_of("one clock", 2), wrong[1:, 1:], progress=False)
    with pytest.raises(ValueError, match="must not rise"):
        fine_trajectories(denoise, scheduler, lines[::-1], noise_of("overcomplete", 2), progress=False)
    with pytest.raises(ValueError, match="makes an image NaN or infinite"):
        nothing = lambda xs, ts: tuple(x * math.nan for x in xs)  # noqa: E731
        fine_trajectories(nothing, scheduler, lines, noise_of("overcomplete", 2), progress=False)
