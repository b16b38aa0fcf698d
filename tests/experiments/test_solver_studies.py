"""The studies of solvers on Gaussian images: distances of their paths, and ranks by hand."""

import csv
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.stats import spearmanr

import rank_solvers
import solver_paths
from representations import KINDS, ONE_CLOCK
from truth.gaussian import Spectrum
from truth.linear_sampler import solver_output, w2_squared

NFES = (3, 5)


def rows_of(name):
    with open(f"{name}.csv", newline="", encoding="utf-8") as stream:
        return list(csv.DictReader(stream))


@pytest.fixture(scope="module")
def best(stage, tmp_path_factory):
    name = tmp_path_factory.mktemp("best") / "table"
    flags = ["--resolution", 8, "--nfe", *NFES, "--solvers", "ddim", "dpmpp_2m", "--output", name]
    stage(solver_paths, "gaussian", *flags)
    return rows_of(name), name


def test_every_solver_has_every_kind_of_path(best):
    rows, name = best
    keys = {(row["solver"], row["path"], int(row["nfe"])) for row in rows}
    assert keys == {
        (solver, kind, nfe) for solver in ("ddim", "dpmpp_2m") for kind in (solver_paths.EVEN, *KINDS) for nfe in NFES
    }
    assert Path(f"{name}.png").exists()


def test_distances_are_those_of_the_points(best):
    spectrum = Spectrum.power_law(8)
    for row in best[0]:
        points = torch.tensor([[float(v) for v in point.split("/")] for point in row["points"].split()])
        representation = "residual" if row["path"].startswith("residual") else "overcomplete"
        points = points.squeeze(1) if points.shape[1] == 1 else points
        law = solver_output(spectrum, points.double(), row["solver"], representation)
        assert float(row["w2"]) == pytest.approx(w2_squared(spectrum, law).item(), rel=2e-2)


def test_best_paths_are_better_and_the_table_shows_by_how_much(best):
    rows, name = best
    value = {(row["solver"], row["path"], int(row["nfe"])): float(row["w2"]) for row in rows}
    text = Path(f"{name}.md").read_text(encoding="utf-8")
    for solver in ("ddim", "dpmpp_2m"):
        for nfe in NFES:
            assert value[solver, ONE_CLOCK, nfe] < value[solver, solver_paths.EVEN, nfe]
            assert value[solver, "residual, 2-D", nfe] <= 1.001 * value[solver, "residual, diagonal", nfe]
            one, order = value[solver, ONE_CLOCK, nfe], value["ddim", ONE_CLOCK, nfe]
            assert f"| {order / one:.3g} |" in text
    assert value["dpmpp_2m", ONE_CLOCK, 5] < value["ddim", ONE_CLOCK, 5] / 3


@pytest.fixture(scope="module")
def ranked(stage, tmp_path_factory):
    name = tmp_path_factory.mktemp("ranked") / "table"
    flags = ["--resolution", 8, "--nfe", 6, "--paths", 30, "--solvers", "ddim", "dpmpp_2m", "--output", name]
    stage(rank_solvers, "gaussian", *flags)
    return rows_of(name), Path(f"{name}.md").read_text(encoding="utf-8")


def test_the_table_shows_ranks_and_regrets_of_the_rows(ranked):
    rows, text = ranked
    assert len(rows) == 2 * 2 * 30
    among = [row for row in rows if (row["model"], row["solver"]) == ("residual pair", "dpmpp_2m")]
    assert {row["offset"] for row in among} == {"diagonal", "2-D"}
    distances = np.array([float(row["distance"]) for row in among])
    for criterion in rank_solvers.CRITERIA:
        costs = np.array([float(row[criterion]) for row in among])
        rho, regret = spearmanr(costs, distances).statistic, distances[costs.argmin()] / distances.min()
        assert f"{rho:+.3f} [" in text and f"] ×{regret:.3g} |" in text


def test_the_deviation_ranks_exactly_known_images(ranked):
    for model in ("one clock", "residual pair"):
        for solver in ("ddim", "dpmpp_2m"):
            among = [row for row in ranked[0] if (row["model"], row["solver"]) == (model, solver)]
            cost, distance = (np.array([float(row[name]) for row in among]) for name in ("deviation", "distance"))
            assert spearmanr(cost, distance).statistic > 0.97
            # One is from the ends of trajectories, the other from the images: where the start is right they agree.
            assert np.median(np.abs(cost / distance - 1)) < 0.1


def test_intervals_hold_the_rank_and_narrow_with_paths():
    rng = np.random.default_rng(0)
    costs = rng.normal(size=400)
    distances = costs + rng.normal(size=400)
    wide, narrow = (
        rank_solvers.interval(costs[:count], distances[:count], np.random.default_rng(1)) for count in (40, 400)
    )
    for rho, low, high in (wide, narrow):
        assert low < rho < high
    assert narrow[2] - narrow[1] < (wide[2] - wide[1]) / 2
    # Bivariate normal numbers of correlation 1/√2.
    assert narrow[1] < 6 / math.pi * math.asin(1 / math.sqrt(2) / 2) < narrow[2]
