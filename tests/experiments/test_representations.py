"""The benchmark of representations: its paths, distances and table against the product of cosines."""

import csv
import math
import re
from pathlib import Path

import numpy as np
import pytest

import representations
from truth.gaussian import Spectrum

LOG_4 = math.log(4)
START = -9.0
NFES = (1, 3)


@pytest.fixture(scope="module")
def run(stage, tmp_path_factory):
    """Rows, table and end of a small run."""
    name = tmp_path_factory.mktemp("run") / "folder" / "table"
    flags = ["--resolution", 8, "--nfe", *NFES, "--start", START, "--output", name]
    ended = stage(representations, "gaussian", *flags)
    with open(f"{name}.csv", newline="", encoding="utf-8") as stream:
        rows = {(row["path"], int(row["nfe"])): row for row in csv.DictReader(stream)}
    return rows, Path(f"{name}.md").read_text(encoding="utf-8"), ended


def points_of(row):
    return np.array([[float(v) for v in point.split("/")] for point in row["points"].split()])


def lost(variances, line):
    """W2² of DDIM with one clock on modes: Π cos(θ_k - θ_{k+1}) of the standard deviation stays (docs/theory.md)."""
    s = variances.numpy()[:, None]
    angles = np.arctan2(np.exp(-line / 2), np.sqrt(s))  # [m, N + 1]
    first = 1 / (1 + math.exp(-line[0]))
    wrong_start = 1 / np.sqrt(first * s[:, 0] + 1 - first)
    return (s[:, 0] * (1 - wrong_start * np.cos(np.diff(angles)).prod(1)) ** 2).sum()


@pytest.mark.parametrize("nfe", NFES)
@pytest.mark.parametrize("kind", [representations.ONE_CLOCK, "residual, diagonal", "residual, 2-D"])
def test_distances_are_the_products_of_cosines(run, kind, nfe):
    spectrum, row = Spectrum.power_law(8), run[0][kind, nfe]
    points = points_of(row)
    assert points[0].tolist() == pytest.approx([START, START + LOG_4][: points.shape[1]], abs=1e-4)
    assert len(points) == nfe + 1 and np.isinf(points[-1]).all()
    # A mode of c has a quarter of the variance.
    low = lost(spectrum.low, points[:, 0]) if points.shape[1] == 1 else 4 * lost(spectrum.low / 4, points[:, 1])
    detail = lost(spectrum.high, points[:, 0])
    assert [float(row[key]) for key in ("low", "detail", "w2")] == pytest.approx([low, detail, low + detail], rel=1e-3)


def test_best_paths_are_in_order(run):
    rows = {key: float(row["w2"]) for key, row in run[0].items()}
    assert set(rows) == {(kind, nfe) for kind in representations.KINDS for nfe in NFES}
    for nfe in NFES[1:]:
        assert rows["overcomplete, 2-D", nfe] < rows["overcomplete, diagonal", nfe]
        assert rows["residual, 2-D", nfe] < 0.9 * rows["residual, diagonal", nfe]
        # Tied clocks are the baseline, but for the scale of the start.
        assert rows["residual, diagonal", nfe] == pytest.approx(rows[representations.ONE_CLOCK, nfe], rel=1e-2)


def test_leads_are_those_of_the_points(run):
    for (kind, nfe), row in run[0].items():
        if kind == representations.ONE_CLOCK or nfe == 1:
            assert row["lead_mean"] == row["lead_min"] == row["lead_max"] == ""
            continue
        inner = points_of(row)[1:-1]
        lead = inner[:, 1] - inner[:, 0] - (LOG_4 if kind.startswith("residual") else 0)
        expected = [lead.mean(), lead.min(), lead.max()]
        assert [float(row[f"lead_{name}"]) for name in ("mean", "min", "max")] == pytest.approx(expected, abs=2e-4)
        if kind.endswith("diagonal"):
            assert expected == pytest.approx([0, 0, 0], abs=2e-4)


def test_the_table_shows_the_rows(run):
    rows, text, ended = run
    assert ended.output == text
    assert text.startswith("# Best paths of DDIM on Gaussian images, a power law, from λ = -9\n")
    tables = re.findall(r"((?:^\|.*\n)+)", text, re.MULTILINE)
    distances, leads = ([[c.strip() for c in line.strip("| \n").split("|")] for line in t.splitlines()] for t in tables)
    kinds = list(representations.KINDS)
    assert distances[0][: len(kinds) + 1] == ["NFE", *kinds]
    for nfe, cells, lead in zip(NFES, distances[2:], leads[2:], strict=True):
        assert cells[0] == lead[0] == str(nfe)
        for kind, cell in zip(kinds, cells[1:], strict=False):
            numbers = [float(v) for v in re.findall(r"[\d.e+-]*\d", cell)]
            assert numbers == pytest.approx([float(rows[kind, nfe][k]) for k in ("w2", "low", "detail")], rel=1e-3)
        level, own = rows["residual, diagonal", nfe], rows["residual, 2-D", nfe]
        ratios = [float(level[band]) / float(own[band]) for band in ("low", "detail")]
        assert [float(v) for v in cells[len(kinds) + 1 :]] == pytest.approx(ratios, abs=0.0051)
        expected = rows["residual, 2-D", nfe]["lead_mean"]
        assert lead[2] == "–" if nfe == 1 else float(lead[2].split()[0]) == pytest.approx(float(expected), abs=0.0051)


def test_a_start_at_pure_noise_or_a_missing_file_is_refused(refused, tmp_path):
    flags = ["gaussian", "--resolution", 8, "--output", tmp_path / "table"]
    refused(representations, *flags, "--start=-inf", says=("--start", "finite log SNR"))
    refused(representations, *flags, "--spectrum", "missing.npz", says=("missing.npz", "does not exist"))
