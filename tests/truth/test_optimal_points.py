"""Optima off the grid against hand-made paths, their neighbours, scans, and the optima of single bands."""

import math

import pytest
import torch

from exact_models import INF, LOG_4, rng, small_spectrum, tied
from truth.gaussian import Spectrum
from truth.linear_sampler import ddim_output, kl, solver_output, w2_squared
from truth.optimal_points import OBJECTIVES, optimal_points

CASES = [("w2", INF), ("w2", 5.0), ("kl", 5.0), ("chain_kl", 5.0)]


def hand_made(num_steps, start, end, top=6.0):
    """Diagonals of several spacings, leads of either scale, and both cascades."""
    last = top if math.isinf(end) else end
    u = torch.linspace(0, 1, num_steps + 1, dtype=torch.float64)
    lines = [start + (last - start) * u**p for p in (0.5, 1, 2)]
    pairs = [(line, line) for line in lines] + [(lines[0], lines[1]), (lines[1], lines[0])]
    first = start + (last - start) * (2 * u).clamp(max=1)
    second = start + (last - start) * (2 * u - 1).clamp(min=0)
    points = [torch.stack(pair, 1) for pair in [*pairs, (first, second), (second, first)]]
    for p in points:
        p[-1] = end
    return points


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("objective, end", CASES)
def test_optimum_beats_hand_made_paths_and_its_neighbours(objective, end):
    spectrum, start, num_steps = Spectrum.power_law(8, 1), -6.0, 6
    value_of = OBJECTIVES[objective]
    paths = hand_made(num_steps, start, end)
    points, value = optimal_points(spectrum, num_steps, objective, start, end)
    level, level_value = optimal_points(spectrum, num_steps, objective, start, end, diagonal=True)
    line, line_value = optimal_points(spectrum, num_steps, objective, start, end, single_scale=True)
    assert value <= level_value <= min(value_of(spectrum, p).item() for p in paths[:3])
    assert line_value <= min(value_of(spectrum, p[:, 0]).item() for p in paths[:3])
    for path in paths:
        assert value <= value_of(spectrum, path).item()
    again = optimal_points(spectrum, num_steps, objective, start, end, initial=paths[-1])[1]
    assert again == pytest.approx(value, rel=1e-4)
    for p, v, shape in ((points, value, (7, 2)), (level, level_value, (7, 2)), (line, line_value, (7,))):
        assert p.shape == shape and p.dtype == torch.float64
        assert (p[0] == start).all() and (p[-1] == end).all() and (p[1:] >= p[:-1]).all()
        assert v == value_of(spectrum, p).item()
        for seed in range(40):
            noise = torch.randn(p.shape, generator=rng(seed), dtype=torch.float64) * 0.03
            moved = p + (noise[:, :1].expand_as(p) if p is level else noise)
            moved = moved.sort(0).values.clamp(start, end)
            moved[0], moved[-1] = start, end
            assert value_of(spectrum, moved).item() > v * (1 - 1e-9)
    assert torch.equal(level[:, 0], level[:, 1])


@pytest.mark.parametrize("objective, end", CASES)
def test_optimum_of_two_steps_is_that_of_a_scan(objective, end):
    spectrum = small_spectrum()
    start = -5.0
    points, value = optimal_points(spectrum, 2, objective, start, end)
    grid = torch.linspace(start, min(end, 9.0), 43, dtype=torch.float64)
    scan = torch.tensor(
        [
            [OBJECTIVES[objective](spectrum, torch.tensor([[start, start], [a, b], [end, end]])) for b in grid]
            for a in grid
        ]
    )
    assert value <= scan.min()
    assert value == pytest.approx(scan.min().item(), rel=0.02)
    i, j = divmod(int(scan.argmin()), len(grid))
    assert (points[1] - torch.stack([grid[i], grid[j]])).abs().max() < 0.5


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("objective, end", [("w2", INF), ("chain_kl", 5.0)])
def test_optimum_of_the_residual_pair_is_that_of_each_band_alone(objective, end):
    spectrum, start = Spectrum.power_law(8, 1), -14.0  # Here the start of c from N(0, I) is as good as that of x_64.
    case = (6, objective, start, end)
    points, value = optimal_points(spectrum, *case, representation="residual")
    # One clock on the image treats all modes alike, and so the modes of one band like an image of their own.
    bands = [Spectrum(modes[:1], modes[1:]) for modes in (spectrum.high, spectrum.low)]
    (details, detail_value), (low, low_value) = [optimal_points(band, *case, single_scale=True) for band in bands]
    assert value == pytest.approx(detail_value + low_value, rel=1e-4)
    assert (points - torch.stack([details, low + LOG_4], 1))[:-1].abs().max() < 0.02
    assert points[-1].tolist() == [end, end + LOG_4]

    options = dict(diagonal=True, representation="residual")
    level, level_value = optimal_points(spectrum, *case, **options)
    assert torch.equal(level, tied(level[:, 0])) and level[0, 0] == start
    assert value < level_value == OBJECTIVES[objective](spectrum, level, "residual").item()
    one_clock = optimal_points(spectrum, *case, single_scale=True)[1]
    assert level_value == pytest.approx(one_clock, rel=1e-4)
    again = optimal_points(spectrum, *case, initial=level[:, 0], **options)[1]
    assert again == pytest.approx(level_value, rel=1e-6)


def test_a_schedule_of_its_own_lowers_the_detail_error_several_fold_at_equal_low_error():
    spectrum, num_steps, start = Spectrum.power_law(64, channels=1), 18, -10.0
    options = dict(objective="w2", start=start, end=INF, representation="residual")
    level, _ = optimal_points(spectrum, num_steps, diagonal=True, **options)
    own, _ = optimal_points(spectrum, num_steps, **options)
    # The clock of the coarse scale stays that of the image: its error cannot change.
    mixed = torch.stack([own[:, 0], level[:, 1]], 1)
    errors = [
        [v.item() for v in w2_squared(spectrum, ddim_output(spectrum, points, "residual"), by_band=True)]
        for points in (level, own, mixed)
    ]
    (low, detail), (own_low, own_detail), (mixed_low, mixed_detail) = errors
    assert mixed_low == low and own_low <= low
    assert mixed_detail == own_detail < detail / 3


def test_optimum_holds_a_scale_still_exactly_where_that_is_best():
    # Started at far too much signal, the fine scale waits for the coarse one, which then waits at its end.
    points, _ = optimal_points(Spectrum.power_law(8, 1, variance=1.0), 6, "w2", -1.0, 5.0)
    assert (points[:3, 0] == -1.0).all() and (points[1:3, 1] > -1.0).all()
    assert (points[-2:, 1] == 5.0).all() and points[-2, 0] < 5.0
    fixed, value = optimal_points(small_spectrum(), 4, "w2", (-6.0, -6.0), (INF, -6.0))
    assert (fixed[:, 1] == -6.0).all() and value == w2_squared(small_spectrum(), ddim_output(small_spectrum(), fixed))


def test_optimum_of_one_step_has_no_freedom():
    spectrum = small_spectrum()
    for end in (INF, 3.0):
        points, value = optimal_points(spectrum, 1, "w2", -5.0, end)
        assert points.tolist() == [[-5.0, -5.0], [end, end]]
        assert value == w2_squared(spectrum, ddim_output(spectrum, points)).item()


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("start", [-14.0, -13.0, -12.0])
def test_optimum_survives_a_step_that_bounds_clip_to_zero(start):
    # From so far away the first point alone matters little, and the search tries increments that all vanish.
    spectrum = Spectrum.power_law(8, 1)
    value = optimal_points(spectrum, 6, "chain_kl", start, 5.0, single_scale=True)[1]
    nearer = optimal_points(spectrum, 6, "chain_kl", -10.0, 5.0, single_scale=True)[1]
    assert value == pytest.approx(nearer, rel=1e-3)


def test_optimum_says_when_it_is_not_converged(monkeypatch):
    monkeypatch.setattr("truth.optimal_points.GRADIENT_TOLERANCE", 1e-30)
    with pytest.warns(RuntimeWarning, match="not converged"):
        optimal_points(small_spectrum(), 3, "w2", -5.0, INF, diagonal=True)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(
    "objective, end, distance, solver",
    [("w2", INF, w2_squared, solver) for solver in ("dpmpp_2m", "dpmpp_3m", "unipc")] + [("kl", 4.0, kl, "dpmpp_2m")],
)
def test_optimum_of_a_solver_is_that_of_its_output(objective, end, distance, solver):
    """Below even steps and all that a random search finds, near it and anywhere; flat in every free direction."""
    spectrum, start, num_steps = Spectrum.power_law(8, 1), -5.0, 5

    def value_of(points):
        return distance(spectrum, solver_output(spectrum, points, solver)).item()

    points, value = optimal_points(spectrum, num_steps, objective, start, end, single_scale=True, solver=solver)
    assert value == value_of(points)
    last = 6.0 if math.isinf(end) else end
    even = torch.linspace(start, last, num_steps + 1, dtype=torch.float64)
    even[-1] = end
    assert value <= value_of(even)
    assert value < 0.9 * value_of(optimal_points(spectrum, num_steps, objective, start, end, single_scale=True)[0])
    inner = torch.rand(150, num_steps - 1, generator=rng(1), dtype=torch.float64).sort(1).values
    for row in start + (last - start) * inner:
        assert value < value_of(torch.cat([even[:1], row, even[-1:]]))
    for seed in range(40):
        moved = points.clone()
        moved[1:-1] += torch.randn(num_steps - 1, generator=rng(seed), dtype=torch.float64) * 0.02
        if (moved.diff() >= 0).all():
            assert value_of(moved) > value * (1 - 1e-9)
    free = [k for k in range(1, num_steps) if points[k - 1] < points[k] < points[k + 1]]
    assert len(free) >= num_steps - 3  # Two that coincide are a walk that forgets what it saw, which may be best.
    for k in free:
        nudge = torch.zeros_like(points)
        nudge[k] = 1e-4
        slope = (value_of(points + nudge) - value_of(points - nudge)) / 2e-4
        assert abs(slope) < 1e-3 * value


@pytest.mark.filterwarnings("ignore:The w2 optimum")
@pytest.mark.parametrize("representation", ["overcomplete", "residual"])
def test_two_clocks_of_a_solver_are_never_worse_than_one(representation):
    spectrum, case = small_spectrum(), (3, "w2", -5.0, INF)
    options = dict(solver="dpmpp_2m", representation=representation)
    level, level_value = optimal_points(spectrum, *case, diagonal=True, **options)
    points, value = optimal_points(spectrum, *case, **options)
    assert value <= level_value
    for found, expected in ((level, level_value), (points, value)):
        output = solver_output(spectrum, found, "dpmpp_2m", representation)
        assert w2_squared(spectrum, output).item() == expected


def test_the_loss_of_a_frozen_drift_is_that_of_ddim_alone():
    with pytest.raises(ValueError, match="frozen in every step, which 'dpmpp_2m' does not do"):
        optimal_points(small_spectrum(), 3, "chain_kl", -5.0, 5.0, solver="dpmpp_2m")
    with pytest.raises(ValueError, match="'heun' returns has no closed form"):
        optimal_points(small_spectrum(), 3, "w2", -5.0, 5.0, solver="heun")


def test_a_residual_pair_is_no_single_scale():
    with pytest.raises(ValueError, match="A single scale is no residual pair"):
        optimal_points(small_spectrum(), 3, "w2", -5.0, INF, single_scale=True, representation="residual")


@pytest.mark.parametrize(
    "arguments, message",
    [
        ((3, "fid", -5.0, 5.0), "Unknown objective"),
        ((0, "w2", -5.0, 5.0), "at least 1"),
        ((3, "w2", 5.0, -5.0), "not above"),
        ((3, "w2", -INF, 5.0), "finite"),
        ((3, "chain_kl", -5.0, INF), "clean end"),
        ((3, "w2", (-5.0, -6.0), INF, True), "equal ends"),
        ((3, "w2", -5.0, INF, True, True), "no diagonal"),
        ((2, "w2", -5.0, INF, False, False, [[-5.0, -5.0], [INF, INF]]), "3 points"),
        ((1, "w2", -5.0, INF, False, False, [[-4.0, -5.0], [INF, INF]]), "must go from"),
        ((2, "w2", -5.0, INF, False, False, [[-5.0, -5.0], [-6.0, 0.0], [INF, INF]]), "never fall"),
        ((2, "w2", -5.0, INF, False, False, [[-5.0, -5.0], [0.0, INF], [INF, INF]]), "Only the last point"),
        ((2, "w2", -5.0, INF, True, False, [[-5.0, -5.0], [0.0, 1.0], [INF, INF]]), "equal log SNRs"),
    ],
)
def test_bad_optimisations_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        optimal_points(small_spectrum(), *arguments)
