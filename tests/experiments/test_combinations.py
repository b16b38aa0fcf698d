"""Paths are taken apart into spacing and offset, and put together again."""

import numpy as np
import pytest

from combinations import OFFSETS, SPACINGS, all_combinations, combine, shifted_diagonal, to_path
from scheduler import DDIMScheduler

LOG_SNR = DDIMScheduler().log_snr.numpy()


def test_points_of_a_curve_by_hand():
    # Mean log SNR 0, 1, 3 and 4: the coarse scale goes first, then both, then the fine one.
    curve = np.array([[0, 0], [0, 2], [2, 4], [4, 4]], dtype=float)
    points = combine(np.array([0, 0.5, 1, 2, 3.5, 4]), curve)
    assert points.tolist() == [[0, 0], [0, 1], [0, 2], [1, 3], [3, 4], [4, 4]]


@pytest.mark.parametrize("shift", [0.0, 1.0, -1.0, 2.5])
def test_a_shifted_diagonal_by_hand(shift):
    curve = shifted_diagonal(-5.0, 9.0, shift)
    assert curve[0].tolist() == [-5, -5] and curve[-1].tolist() == [9, 9]
    assert (np.diff(curve, axis=0) >= 0).all() and (np.diff(curve.mean(1)) > 0).all()
    assert curve.min() == -5 and curve.max() == 9
    middle = combine(np.array([2.0]), curve)[0]
    assert middle == pytest.approx([2 - shift / 2, 2 + shift / 2])
    # Where one scale is at its end already, the other goes on alone.
    assert combine(np.array([8.9]), curve)[0] == pytest.approx(
        [8.9, 8.9] if shift == 0 else [8.8, 9][:: 1 if shift > 0 else -1], abs=0.02
    )


def test_spacing_and_offset_put_a_path_together_again():
    rng = np.random.default_rng(0)
    path = np.concatenate([[[-5, -5]], np.sort(rng.uniform(-5, 9, (6, 2)), axis=0), [[9, 9]]])
    np.testing.assert_allclose(combine(path.mean(1), path), path, atol=1e-12)


def test_timesteps_of_points():
    points = np.stack([LOG_SNR[[900, 500, 100, 0]], LOG_SNR[[900, 700, 0, 0]]], axis=1)
    points[1:-1] += 0.3 * np.diff(LOG_SNR).max()  # Less than half of any gap between timesteps.
    path = to_path(points, LOG_SNR, "name")
    assert path.points == ((900, 900), (500, 700), (100, 0), (0, 0)) and path.kind == "name"
    # Points that coincide move apart towards noise, and with them those they meet.
    equal = LOG_SNR[[900, 50, 50, 50, 51, 1, 0, 0]][:, None] + np.zeros(2)
    assert [t for t, _ in to_path(np.sort(equal, axis=0), LOG_SNR, "").points] == [900, 53, 52, 51, 50, 2, 1, 0]
    single = to_path(LOG_SNR[[900, 30, 30, 0]][:, None], LOG_SNR, "")
    assert single.points == ((900,), (31,), (30,), (0,))


@pytest.mark.parametrize("seed", range(20))
def test_any_rising_points_become_a_legal_path(seed):
    rng = np.random.default_rng(seed)
    inner = np.sort(rng.uniform(-5, LOG_SNR[0], (rng.integers(1, 40), 2)), axis=0)
    points = np.concatenate([np.full((1, 2), LOG_SNR[999]), inner, np.full((1, 2), LOG_SNR[0])])
    path = to_path(points, LOG_SNR, "random")  # `Path` refuses what is not monotone or stays in place.
    assert path.nfe == len(inner) + 1 and path.points[0] == (999, 999)
    timesteps = np.array(path.points)
    nearest = np.abs(LOG_SNR - points[..., None]).argmin(-1)
    # Points only move where timesteps are sparse, near the clean end.
    assert (timesteps >= nearest).all() and (timesteps == nearest)[nearest > 100].all()


def test_all_combinations_keep_the_optimal_path_whole():
    spacings = {name: np.linspace(0, 4, 3) ** (1 + 0.2 * k) * 4 ** (-0.2 * k) for k, name in enumerate(SPACINGS)}
    curves = {name: shifted_diagonal(0, 4, 0.3 * k) for k, name in enumerate(OFFSETS[:-1])}
    curves["optimal 2-D"] = np.array([[0, 0], [0.5, 2.5], [4, 4.0]])
    made = {(spacing, offset): points for spacing, offset, points in all_combinations(spacings, curves)}
    assert len(made) == len(SPACINGS) * len(OFFSETS) == 20
    for (spacing, offset), points in made.items():
        if (spacing, offset) == ("optimal", "optimal 2-D"):
            assert points is curves["optimal 2-D"]
            continue
        np.testing.assert_allclose(points.mean(1), spacings[spacing], atol=1e-12)
        np.testing.assert_allclose(points[[0, -1]], [[0, 0], [4, 4]], atol=1e-12)
        assert (np.diff(points, axis=0) >= 0).all() and (np.diff(points, axis=0).max(1) > 0).all()
