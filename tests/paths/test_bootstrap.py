"""The bootstrap of paths against what resampling must give where that is known."""

import numpy as np
import pytest

from paths.bootstrap import bootstrap_paths
from paths.optimal import kl_path

SNR = np.array([0.1, 0.4, 1.0, 3.0, 9.0])


def falling_maps(num_images=12, spread=0.0, seed=0):
    rng = np.random.default_rng(seed)
    i, j = np.mgrid[:5, :5]
    base = np.stack([10 * 0.6**i * 0.9**j, 4 * 0.5**j * 0.8**i])  # [2, 5, 5]
    return base[..., None] * np.exp(spread * rng.standard_normal((2, 5, 5, num_images)))


def solve(map_64, map_32):
    return kl_path(map_64, map_32, SNR, 3)


def test_equal_images_give_the_path_of_all_every_time():
    maps = falling_maps()
    cells, cost = solve(*maps[..., 0])
    result = bootstrap_paths(maps, solve, replicates=20)
    assert result.density[tuple(np.array(cells).T)] == pytest.approx(np.ones(4))
    assert result.density.sum() == pytest.approx(4)
    assert result.interval == pytest.approx((cost, cost))


def test_spread_of_a_linear_cost_is_its_standard_error():
    # One step has one path, so the cost is a mean over images, whose deviation over replicates is known.
    maps = falling_maps(num_images=40, spread=0.5)
    one_step = lambda a, b: kl_path(a, b, SNR, 1)  # noqa: E731
    per_image = np.array([one_step(*maps[..., b])[1] for b in range(40)])
    result = bootstrap_paths(maps, one_step, replicates=2000)
    expected = per_image.std() / np.sqrt(40)
    assert result.costs.std() == pytest.approx(expected, rel=0.06)
    assert result.costs.mean() == pytest.approx(per_image.mean(), abs=4 * expected / np.sqrt(2000))
    low, high = result.interval
    assert high - low == pytest.approx(3.92 * expected, rel=0.12)


def test_every_path_is_counted_and_two_maps_of_an_image_stay_together():
    maps = falling_maps(num_images=6, spread=0.8, seed=3)
    maps[1] = 2 * maps[0]

    def check(map_64, map_32):
        assert map_32 == pytest.approx(2 * map_64)
        return solve(map_64, map_32)

    result = bootstrap_paths(maps, check, replicates=50, seed=1)
    assert result.density.sum() == pytest.approx(4)
    assert result.density[0, 0] == result.density[4, 4] == pytest.approx(1)
    assert (result.density > 0).sum() > 4
    assert (bootstrap_paths(maps, solve, replicates=50, seed=1).costs == result.costs).all()
    assert (bootstrap_paths(maps, solve, replicates=50, seed=2).costs != result.costs).any()


def test_two_images_and_two_replicates_are_enough():
    maps = np.broadcast_to([1.0, 3.0], (1, 2, 2, 2))
    result = bootstrap_paths(maps, lambda mean: ([(0, 0), (1, 1)], float(mean[0, 0])), replicates=2, seed=1)
    assert set(result.costs) <= {1.0, 2.0, 3.0} and len(result.costs) == 2
    np.testing.assert_array_equal(result.density, np.eye(2))


def test_maps_may_be_lists_and_are_averaged_in_double_precision():
    maps = [[[[1.0, 3.0], [5.0, 7.0]], [[2.0, 2.0], [0.0, 4.0]]]]
    seen = []

    def keep(mean):
        seen.append(mean)
        return [(0, 0), (1, 1)], 1.0

    bootstrap_paths(maps, keep, replicates=30)
    bootstrap_paths(np.array(maps, np.float32), keep, replicates=30)
    assert all(mean.dtype == np.float64 for mean in seen)
    np.testing.assert_array_equal(seen[:30], seen[30:])
    # Of two images drawn twice: the first, the second, or both.
    possible = [np.array(maps)[0] @ share for share in ([1, 0], [0, 1], [0.5, 0.5])]
    assert {tuple(mean.ravel()) for mean in seen} == {tuple(mean.ravel()) for mean in possible}


@pytest.mark.parametrize("shape", [(2, 5, 5), (2, 5, 4, 4), (2, 5, 5, 1)])
def test_other_maps_are_refused(shape):
    with pytest.raises(ValueError, match="maps have shape"):
        bootstrap_paths(np.ones(shape), solve)


def test_one_replicate_is_refused():
    with pytest.raises(ValueError, match="replicates is 1"):
        bootstrap_paths(falling_maps(), solve, replicates=1)
