"""Cold diffusion on restorers that are known: exact where it must be, through the walk that every sampler takes."""

import math
import sys

import numpy as np
import pytest
import torch

from data import ImageSet
from diffusion import cold_starts
from diffusion.cold import SEVERITY_SCHEDULES, ColdScheduler
from diffusion.cold_starts import DegradedStarts, Mixture, MixtureStarts, draw, fit_mixture, fully_degraded, mixture_of
from diffusion.degradations import DEGRADATIONS, make_degradation
from diffusion.sampler import SeededNoise, sample, sample_seeds
from diffusion.solvers import COLD_SOLVERS, SOLVERS, make_solver
from paths.families import diagonal
from paths.path import Path
from scheduler import CLEAN, COLD, split_schedule_name

PATHS = {
    "even": diagonal(7, "uniform_t", 1),
    "one step": diagonal(1, "uniform_t", 1),
    "uneven": Path(((999,), (998,), (640,), (31,), (3,), (0,)), "by hand", {}),
    "from the middle": diagonal(4, "uniform_t", 1, start=500),
}


def process(degradation="blur", schedule="linear", side=16, **more):
    made = make_degradation(degradation, side) if isinstance(degradation, str) else degradation
    return ColdScheduler(made, schedule, **more)


def images(count=3, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(count, 3, 16, 16, generator=generator, dtype=dtype) * 2 - 1


def walk(scheduler, path, x, restorer, solver):
    degraded = scheduler.degrade(x, path.points[0][0])
    return sample(restorer, scheduler, path, [degraded], solver=make_solver(solver))


@pytest.mark.parametrize("name", SEVERITY_SCHEDULES)
def test_severities_rise_from_0_to_1(name):
    scheduler = process(schedule=name)
    table = scheduler.severities
    assert table[0] == 0 and table[-1] == pytest.approx(1, abs=1e-12) and (table.diff() > 0).all()
    tau = 300 / 999
    expected = {
        "linear": tau,
        "cosine": math.sin(math.pi * tau / 2) ** 2,
        "exponential": (100**tau - 1) / 99,
    }[name]
    assert scheduler.severity(300) == pytest.approx(expected, rel=1e-12)
    assert scheduler.severity(CLEAN) == 0
    whole, real = torch.tensor([0, 300, 999, CLEAN]), torch.tensor([0.0, 300.0, 999.0], dtype=torch.float64)
    assert scheduler.severity(whole).tolist() == [table[0], table[300], table[999], 0]
    torch.testing.assert_close(scheduler.severity(real), table[[0, 300, 999]])
    for severity in (0.001, 0.3, 0.77, 1.0):
        t = scheduler.timestep_of(severity)
        nearest = min(range(1000), key=lambda k: abs(table[k].item() - severity))
        assert t == max(1, nearest)
    for outside in (-0.01, 1.01, math.nan):
        with pytest.raises(ValueError, match=r"lies outside \[0, 1\]"):
            scheduler.timestep_of(outside)


@pytest.mark.parametrize("solver", COLD_SOLVERS)
@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("name", DEGRADATIONS)
def test_a_perfect_restorer_is_exact(name, path, solver):
    x, scheduler = images(), process(name, "cosine")
    found = walk(scheduler, PATHS[path], x, lambda xs, ts: (x,), solver)
    assert found.nfe == PATHS[path].nfe
    torch.testing.assert_close(found.images[0], x, rtol=0, atol=1e-12 if solver == "cold" else 0)


class Straight:
    """D(x, s) = x + s e."""

    def __init__(self, e):
        self.e = e

    def __call__(self, x, severity):
        severity = torch.as_tensor(severity, dtype=x.dtype)
        return x + severity.view(-1, 1, 1, 1) * self.e


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("schedule", SEVERITY_SCHEDULES)
def test_algorithm_2_is_exact_for_any_restorer_on_a_straight_line(schedule, path):
    x, e = images(), images(1, seed=1)
    scheduler = process(Straight(e), schedule, clip_sample=False)

    def nonsense(xs, ts):
        return (torch.sin(7 * xs[0]) + ts[0].view(-1, 1, 1, 1) / 100,)

    exact = walk(scheduler, PATHS[path], x, nonsense, "cold").images[0]
    if PATHS[path].nfe == 1:
        naive = nonsense((scheduler.degrade(x, PATHS[path].points[0][0]),), (torch.tensor([999.0]),))[0]
        torch.testing.assert_close(walk(scheduler, PATHS[path], x, nonsense, "cold_naive").images[0], naive)
    torch.testing.assert_close(exact, x, rtol=0, atol=1e-12)
    assert (walk(scheduler, PATHS[path], x, nonsense, "cold_naive").images[0] - x).abs().max() > 0.5


def test_what_is_left_of_an_error_of_the_restorer():
    """Of a linear D and an error d at every point, d - D(d, s) of the start by algorithm 2, and d by algorithm 1."""
    x, error = images(), 0.1 * images(seed=2)
    for name in ("grey", "blur", "means"):
        scheduler = process(name, clip_sample=False)
        left = {
            s: walk(scheduler, PATHS["even"], x, lambda xs, ts: (x + error,), s).images[0] - x for s in COLD_SOLVERS
        }
        torch.testing.assert_close(left["cold"], error - scheduler.degrade(error, 999), rtol=0, atol=1e-12)
        torch.testing.assert_close(left["cold_naive"], error, rtol=0, atol=1e-12)
    # What D leaves as it is, such as a colour, is made good.
    cast = error.mean((2, 3), keepdim=True).expand_as(x)
    made = walk(scheduler, PATHS["even"], x, lambda xs, ts: (x + cast,), "cold").images[0]
    torch.testing.assert_close(made, x, rtol=0, atol=1e-12)


def test_what_a_network_is_shown():
    scheduler = process("blur:4", input_noise=0.3)
    x, noise = images(dtype=torch.float32), torch.randn(3, 3, 16, 16)
    t = torch.tensor([0, 400, 999])
    expected = make_degradation("blur:4", 16)(x, t.double() / 999) + 0.3 * noise
    torch.testing.assert_close(scheduler.add_noise(x, noise, t), expected)
    assert torch.equal(process("blur:4").add_noise(x, noise, t)[0], x[0])
    assert scheduler.shown(x, t) is x and scheduler.target(x, noise, t) is x and scheduler.prior(x, 999) is x
    assert scheduler.predict_x0(x, t, noise) is x


def test_it_has_no_noise_level():
    scheduler = process()
    assert not scheduler.noise_levels and scheduler.log_snr.isnan().all()
    assert scheduler.process_name == COLD and split_schedule_name(COLD) == (COLD, None)
    x, t = images(), torch.tensor([3.0], dtype=torch.float64)
    for ask in (
        lambda: scheduler.scales(3, x),
        lambda: scheduler.curves(t),
        lambda: scheduler.log_snr_at(t),
        lambda: scheduler.epsilon_of(x, 3, x),
        lambda: scheduler.step(x, 30, 3, x),
    ):
        with pytest.raises(ValueError, match="has no noise level to be asked for"):
            ask()
    moved = scheduler.to("cpu")
    assert moved is not scheduler and torch.equal(moved.severities, scheduler.severities)
    with pytest.raises(ValueError, match="Unknown severity schedule 'steep'"):
        process(schedule="steep")
    assert not set(SOLVERS) & set(COLD_SOLVERS)


# Starts


KNOWN = Mixture(
    centre=np.zeros(48),
    basis=np.linalg.qr(np.random.default_rng(0).standard_normal((48, 2)))[0].T,
    weights=np.array([0.2, 0.5, 0.3]),
    means=np.array([[-6.0, 0.0], [0.0, 4.0], [5.0, -3.0]]),
    roots=np.array([[[0.5, 0], [0.2, 0.3]], [[0.7, 0], [-0.3, 0.4]], [[0.4, 0], [0, 0.8]]]),
)


def covariances(mixture):
    return np.einsum("kij,klj->kil", mixture.roots, mixture.roots)


def test_a_known_mixture_is_drawn_and_found_again():
    points = draw(KNOWN, SeededNoise(range(20_000))).double().numpy()  # [N, P]
    mean = KNOWN.weights @ KNOWN.means
    spread = np.einsum("k,kij->ij", KNOWN.weights, covariances(KNOWN))
    spread += np.einsum("k,ki,kj->ij", KNOWN.weights, KNOWN.means - mean, KNOWN.means - mean)
    np.testing.assert_allclose(points.mean(0), mean @ KNOWN.basis, atol=0.1)
    np.testing.assert_allclose(np.cov(points.T), KNOWN.basis.T @ spread @ KNOWN.basis, atol=0.15)
    # Back from points to the mixture, whose coordinates are turned and moved, and whose Gaussians have another order.
    found = fit_mixture(points, 3)
    assert found.basis.shape == (2, 48)
    np.testing.assert_allclose(found.basis @ found.basis.T, np.eye(2), atol=1e-6)
    means, expected = found.centre + found.means @ found.basis, KNOWN.means @ KNOWN.basis
    place = [int(np.linalg.norm(means - each, axis=1).argmin()) for each in expected]
    assert sorted(place) == [0, 1, 2]
    np.testing.assert_allclose(means[place], expected, atol=0.06)
    np.testing.assert_allclose(found.weights[place], KNOWN.weights, atol=0.01)
    full = [found.basis.T @ each @ found.basis for each in covariances(found)[place]]
    true = [KNOWN.basis.T @ each @ KNOWN.basis for each in covariances(KNOWN)]
    np.testing.assert_allclose(full, true, atol=0.03)


def test_the_coordinates_hold_the_variance():
    rng = np.random.default_rng(1)
    points = rng.standard_normal((400, 3)) * [3, 1, 0.01] @ np.linalg.qr(rng.standard_normal((30, 3)))[0].T
    assert fit_mixture(points, 2).basis.shape == (2, 30)
    # Of what is the same in all images nothing is fitted.
    same = fit_mixture(np.full((5, 30), 0.25), 2)
    assert same.basis.shape == (0, 30) and torch.equal(draw(same, SeededNoise([1, 2])), torch.full((2, 30), 0.25))
    with pytest.raises(ValueError, match="--start_components 9 are more than the 5 images"):
        fit_mixture(points[:5], 9)


def test_a_missing_package_is_said(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.mixture", None)
    with pytest.raises(RuntimeError, match="pip install scikit-learn"):
        fit_mixture(np.zeros((5, 3)), 2)


def test_a_start_is_a_function_of_its_seed():
    starts = MixtureStarts(KNOWN, (3, 4, 4), 0.1)
    [together] = starts.of_seeds([5, 42, 7, 1_000_003], 1, "cpu")
    assert together.shape == (4, 3, 4, 4) and together.dtype == torch.float32
    for k, seed in enumerate([5, 42, 7, 1_000_003]):
        assert torch.equal(starts.of_seeds([seed], 1, "cpu")[0][0], together[k])
    still = MixtureStarts(KNOWN, (3, 4, 4), 0.0).of_seeds([5, 42, 7, 1_000_003], 1, "cpu")[0]
    added = (MixtureStarts(KNOWN, (3, 4, 4), 0.1).of_seeds(range(2000), 1, "cpu")[0]).double()
    added -= MixtureStarts(KNOWN, (3, 4, 4), 0.0).of_seeds(range(2000), 1, "cpu")[0]
    assert added.std().item() == pytest.approx(0.1, rel=0.01) and abs(added.mean().item()) < 0.002
    assert not torch.equal(still, together)


def test_an_image_depends_on_its_seed_alone():
    scheduler, path = process("means", clip_sample=False), PATHS["even"]
    mixture = fit_mixture(fully_degraded(pixels(40), scheduler), 3)
    starts = MixtureStarts(mixture, (3, 16, 16))

    def restorer(xs, ts):
        return (xs[0] * 1.5 - xs[0].roll(1, -1) * 0.5,)

    def made(seeds, batch_size):
        walks = sample_seeds(
            restorer, scheduler, path, seeds, [(3, 16, 16)], batch_size, solver=make_solver("cold"),
            starts=lambda chosen: starts.of_seeds(chosen, 1, "cpu"),
        )  # fmt: skip
        return torch.cat([samples.images[0] for _, samples in walks])

    assert torch.equal(made([3, 1, 4, 15, 9], 5), made([3, 1, 4, 15, 9], 2))
    assert torch.equal(made([9], 1)[0], made([3, 1, 4, 15, 9], 3)[4])


def pixels(count, side=16, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (count, 3, side, side), dtype=np.uint8)


def test_fully_degraded_images_and_walks_from_them():
    scheduler = process("means")
    found = fully_degraded(pixels(10), scheduler)
    colours = pixels(10).astype(np.float64).mean((2, 3)) / 127.5 - 1
    np.testing.assert_allclose(found.reshape(10, 3, -1), np.repeat(colours[..., None], 256, 2), atol=1e-6)
    [x] = DegradedStarts(pixels(10), scheduler).scales([4, 7], 1, "cpu")
    np.testing.assert_allclose(x.flatten(1), found[[4, 7]], atol=1e-6)
    # Three colours are all that there is.
    assert fit_mixture(found, 2).basis.shape == (3, 768)


def test_few_of_many_images_are_fitted_evenly(monkeypatch):
    monkeypatch.setattr(cold_starts, "FIT_IMAGES", 4)
    monkeypatch.setattr(cold_starts, "CALL_IMAGES", 3)
    scheduler = process("grey")
    np.testing.assert_array_equal(fully_degraded(pixels(16), scheduler), fully_degraded(pixels(16)[2::4], scheduler))


def test_a_mixture_is_fitted_once(tmp_path):
    scheduler, images_, asked = process("blur:4"), ImageSet(pixels(30), "set", "feed"), []

    def ask():
        asked.append(1)
        return images_

    def mixture(fingerprint="feed", scheduler=scheduler, components=2):
        return mixture_of(fingerprint, ask, scheduler, components, tmp_path)

    first = mixture()
    assert all(map(np.array_equal, first, mixture())) and len(asked) == 1
    [file] = tmp_path.glob("cold_start_*.npz")
    with np.load(file, allow_pickle=False) as content:
        assert set(content) == set(Mixture._fields)
    # Another number, another degradation, a damaged file.
    for more in ({"components": 3}, {"scheduler": process("blur:5")}):
        assert not np.array_equal(mixture(**more).means, first.means)
    assert len(asked) == 3 and len(list(tmp_path.glob("*.npz"))) == 3
    file.write_bytes(file.read_bytes()[:200])
    assert all(map(np.array_equal, first, mixture())) and len(asked) == 4
    with pytest.raises(ValueError, match="The images of 'set' are not those that the model was trained on"):
        mixture("cafe")
