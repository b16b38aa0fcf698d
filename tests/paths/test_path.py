"""What a path, a grid of timesteps and a lead are, and what they refuse."""

import numpy as np
import pytest
import torch

from path_problems import cosine_clipped_log_snr
from paths.families import diagonal
from paths.path import GRID_SPACINGS, Path, leads, path_from_cells, timestep_grid

# Path


def test_path_counts_calls_and_takes_any_integers():
    path = Path([[np.int64(9), 9], [9, torch.tensor(4)], (0, 0)], "by_hand", {"a": (1, 2)})
    assert path.points == ((9, 9), (9, 4), (0, 0))
    assert all(type(t) is int for point in path.points for t in point)
    assert (path.nfe, path.num_scales) == (2, 2)
    assert path.provenance == {"a": [1, 2]}
    assert Path(((5,), (0,)), "one", {}).num_scales == 1


def test_fingerprint_depends_on_points_alone():
    path = Path(((9, 9), (0, 0)), "a", {})
    # sha256 of "[[9,9],[0,0]]", computed with coreutils.
    assert path.fingerprint() == "51ea774278cf4f9d"
    assert path.fingerprint() == Path(((9, 9), (0, 0)), "b", {"x": 1}).fingerprint()
    assert path.fingerprint() != Path(((9, 8), (0, 0)), "a", {}).fingerprint()
    assert path.fingerprint() != Path(((9,), (0,)), "a", {}).fingerprint()


@pytest.mark.parametrize(
    ("points", "message"),
    [
        ([], "at least 2 points"),
        ([(0, 0)], "at least 2 points"),
        ([(), ()], "no timestep"),
        ([(9, 9), (0,)], "point 1"),
        ([(9, 9), (-1, 0), (0, 0)], "0 or larger"),
        ([(9, 9), (4, 5), (5, 0), (0, 0)], "must not rise"),
        ([(9, 9), (4, 4), (4, 4), (0, 0)], "stays at"),
        ([(9, 9), (0, 1)], "last point"),
        ([(9.0, 9.0), (0, 0)], "integer"),
        ([(True, 9), (0, 0)], "integer"),
        (["99", "00"], "integer"),
        ([9, 0], "integer"),
        (None, "integer"),
    ],
)
def test_path_refuses_bad_points(points, message):
    with pytest.raises(ValueError, match=message):
        Path(points, "bad", {})


@pytest.mark.parametrize("kind", [None, 7, b"diagonal", ("a",)])
def test_path_refuses_a_kind_that_is_no_text(kind):
    with pytest.raises(ValueError, match="the kind of a path must be a string, not"):
        Path(((1,), (0,)), kind, {})


@pytest.mark.parametrize("provenance", [None, [1], {"x": {1, 2}}, {"x": float("nan")}])
def test_path_refuses_provenance_that_is_not_json(provenance):
    with pytest.raises(ValueError, match="provenance"):
        Path(((1,), (0,)), "bad", provenance)


def test_path_is_frozen_and_keeps_its_own_provenance():
    provenance = {"seed": 1}
    path = Path(((1,), (0,)), "a", provenance)
    provenance["seed"] = 2
    assert path.provenance == {"seed": 1}
    with pytest.raises(AttributeError):
        path.kind = "b"
    # A path may be in a set, whatever made it.
    assert hash(path) == hash(Path(((1,), (0,)), "a", {"other": [2]}))


# Grid


def test_published_grid_equals_torch():
    grid = timestep_grid()
    assert grid[:5].tolist() == [999, 964, 930, 895, 861] and grid[-3:].tolist() == [68, 34, 0]
    np.testing.assert_array_equal(grid, torch.linspace(999, 0, 30).long().numpy())


def test_grid_is_the_exact_floor_for_every_n():
    for n in range(2, 201):
        grid = timestep_grid(n)
        assert len(grid) == n and grid[0] == 999 and grid[-1] == 0 and (np.diff(grid) < 0).all()
        assert all(0 <= 999 * (n - 1 - k) - int(t) * (n - 1) < n - 1 for k, t in enumerate(grid))
        float32 = torch.linspace(999, 0, n).long().numpy()
        whole = 999 * np.arange(n - 1, -1, -1) % (n - 1) == 0
        np.testing.assert_array_equal(grid[~whole], float32[~whole])
        assert set(grid[whole] - float32[whole]) <= {0, 1}


def test_grid_refuses():
    for n in (1, 1001):
        with pytest.raises(ValueError, match="between 2 and 1000"):
            timestep_grid(n)
    assert timestep_grid(1000).tolist() == list(range(999, -1, -1))
    table = cosine_clipped_log_snr()
    with pytest.raises(ValueError, match="between 2 and 21"):
        timestep_grid(22, start=20)
    for start in (0, 1000):
        with pytest.raises(ValueError, match=f"starts at timestep {start} but .* 1 to 999"):
            timestep_grid(start=start)
    # These spacings of `diagonal` are none of a grid.
    for spacing in ("published", "karras", "quadratic"):
        with pytest.raises(ValueError, match=f"'{spacing}' is unknown; choose one of uniform_t, uniform_log_snr"):
            timestep_grid(spacing=spacing, log_snr=table)
    with pytest.raises(ValueError, match="needs the table"):
        timestep_grid(spacing="uniform_log_snr")
    with pytest.raises(ValueError, match=r"\[999\]"):
        timestep_grid(spacing="uniform_log_snr", log_snr=table[1:])
    table[999] = -np.inf
    with pytest.raises(ValueError, match="zero terminal SNR"):
        timestep_grid(spacing="uniform_log_snr", log_snr=table)
    assert timestep_grid(spacing="uniform_log_snr", log_snr=table, start=998)[0] == 998


@pytest.mark.parametrize("spacing", GRID_SPACINGS)
def test_a_grid_has_n_falling_lines_from_its_start(spacing):
    log_snr = cosine_clipped_log_snr()
    for start in (None, 998, 700, 60, 1):
        first = 999 if start is None else start
        for n in (2, min(30, first + 1), first + 1):
            grid = timestep_grid(n, spacing=spacing, start=start, log_snr=log_snr)
            assert grid.dtype == np.int64 and grid.shape == (n,)
            assert grid[0] == first and grid[-1] == 0 and (np.diff(grid) < 0).all()
            # The rest of the table does not matter.
            alone = timestep_grid(n, first + 1, spacing, log_snr=log_snr[: first + 1])
            np.testing.assert_array_equal(grid, alone)


def test_grid_even_in_t_is_truncated_from_any_start():
    assert timestep_grid(4, start=10).tolist() == [10, 6, 3, 0]
    assert timestep_grid(4, 11).tolist() == [10, 6, 3, 0]


def test_grid_even_in_log_snr_takes_the_nearest_timesteps():
    log_snr = cosine_clipped_log_snr()
    for n, start in [(2, None), (10, None), (18, 900), (30, 998)]:
        first = 999 if start is None else start
        targets = np.linspace(log_snr[first], log_snr[0], n)
        nearest = np.abs(log_snr[None, :] - targets[:, None]).argmin(axis=1)
        grid = timestep_grid(n, spacing="uniform_log_snr", start=start, log_snr=log_snr)
        assert (np.diff(nearest) < 0).all()
        np.testing.assert_array_equal(grid, nearest)


# Cells and leads


def test_path_from_cells_and_its_leads():
    grid = timestep_grid()
    path = path_from_cells([(0, 0), (0, 1), (2, 9), (12, 9), (29, 29)], grid, "dp_total", {"max_jump": 17})
    assert path.points == ((999, 999), (999, 964), (930, 688), (585, 688), (0, 0))
    assert (path.kind, path.provenance) == ("dp_total", {"max_jump": 17})
    counts = {"ahead": 2, "behind": 1, "equal": 2, "points": 5}
    assert leads(path, grid) == counts | {"largest_lead": 7, "unit": "cells"}
    assert leads(path) == counts | {"largest_lead": 242, "unit": "timesteps"}
    assert path_from_cells([(0,), (29,)], grid, "one", {}).points == ((999,), (0,))


def test_path_from_cells_and_leads_refuse():
    grid = timestep_grid()
    for cell in [(30, 29), (-1, 29)]:
        with pytest.raises(ValueError, match="cell 1 .* 0 to 29"):
            path_from_cells([(0, 0), cell], grid, "bad", {})
    with pytest.raises(ValueError, match="last point"):
        path_from_cells([(0, 0), (28, 29)], grid, "bad", {})
    with pytest.raises(ValueError, match="2 scales"):
        leads(diagonal(18, num_scales=1))
    with pytest.raises(ValueError, match="timestep 990 .* not on the grid"):
        leads(Path(((999, 990), (0, 0)), "off", {}), grid)


def test_a_diagonal_never_leads():
    assert leads(diagonal(18)) == {
        "ahead": 0,
        "behind": 0,
        "equal": 19,
        "points": 19,
        "largest_lead": 0,
        "unit": "timesteps",
    }
