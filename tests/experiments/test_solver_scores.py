"""The studies of a trained network: its scores by solver and plan, and its ranks, on the tiny models of the session."""

import csv
import statistics
from pathlib import Path

import numpy as np
import pytest

import compute_heatmap_30
import compute_trajectories
import rank_solvers
import solver_scores
from checkpoint import load_model
from data import to_uint8
from diffusion.sampler import SeededNoise, image_seeds, sample
from diffusion.solvers import make_solver
from evaluation.pixel_metrics import SlicedWasserstein
from planning.trajectory_file import load_trajectories
from solver_scores import KL, TIED, ScoreSettings, planned

NFES = (3, 4)


@pytest.fixture(scope="module")
def flags(stage, run, tmp_path_factory):
    """Flags that name a tiny baseline with its heatmap and trajectories, and its data."""
    folder = tmp_path_factory.mktemp("maps")
    data = ["--cache_dir", run.cache]
    model = ["--checkpoint", run.baseline, "--device", "cpu", "--precision", "fp32"]
    heatmap = ["--grid", 8, "--maps", "mse", "--num_images", 2, "--output", folder / "map.pth"]
    stage(compute_heatmap_30, *model, *data, *heatmap)
    stage(compute_trajectories, *model, "--lines", 12, "--num_images", 3, "--output", folder / "trajectories.pth")
    return [*model, *data, "--heatmap", folder / "map.pth", "--trajectories", folder / "trajectories.pth"]


def rows_of(name):
    with open(f"{name}.csv", newline="", encoding="utf-8") as stream:
        return list(csv.DictReader(stream))


def score_flags(flags, output, nfes=NFES):
    few = ["--name", "baseline", "--solvers", "ddim", "dpmpp_2m", "--num_images", 6, "--nfe", *nfes]
    return ["trained", *flags, *few, "--output", output]


def test_scores_are_those_of_the_images_and_a_study_goes_on(stage, run, flags, tmp_path):
    output = tmp_path / "scores"
    stage(solver_scores, *score_flags(flags, output, NFES[:1]))
    first = rows_of(output)
    assert {(row["solver"], row["plan"]) for row in first} == {
        (solver, plan) for solver in ("ddim", "dpmpp_2m") for plan in (KL, TIED)
    }
    before = Path(f"{output}.csv").read_text()
    stage(solver_scores, *score_flags(flags, output))
    rows = rows_of(output)
    assert Path(f"{output}.csv").read_text().startswith(before)
    assert len(rows) == 2 * len(first) == 16

    loaded = load_model(run.baseline)
    row = next(row for row in rows if (row["solver"], row["plan"], row["nfe"]) == ("dpmpp_2m", TIED, "4"))
    places = {name.removeprefix("--"): value for name, value in zip(flags[::2], flags[1::2], strict=True)}
    settings = ScoreSettings(name="a", output="a", nfe=(4,), solvers=("dpmpp_2m",), **places)
    path = planned(loaded, settings)["dpmpp_2m", TIED, 4]
    assert path.fingerprint() == row["path"]
    noise = SeededNoise(image_seeds(int(row["seed"]), 6)).draw((3, 16, 16))
    images = sample(loaded.denoise, loaded.scheduler, path, (noise,), solver=make_solver("dpmpp_2m")).images[0]
    levels = SlicedWasserstein(run.images(), 6).distance(to_uint8(images))
    assert float(row["swd"]) == pytest.approx(statistics.mean(levels.values()), abs=1e-3)
    text = Path(f"{output}.md").read_text(encoding="utf-8")
    values = [float(r["swd"]) for r in rows if (r["solver"], r["plan"], r["nfe"]) == ("dpmpp_2m", TIED, "4")]
    assert f"{statistics.mean(values):.2f} ± {statistics.stdev(values):.2f}" in text
    assert Path(f"{output}.png").exists()


def test_rows_of_other_weights_are_kept(stage, refused, run, flags, tmp_path):
    stage(solver_scores, *score_flags(flags, tmp_path / "scores", NFES[:1]))
    file = tmp_path / "scores.csv"
    other = file.read_text().replace(load_model(run.baseline).fingerprint, "0" * 16)
    file.write_text(other)
    says = ("other weights by the name baseline", "--name")
    refused(solver_scores, *score_flags(flags, tmp_path / "scores"), says=says)


def test_distances_are_to_the_ends_of_the_trajectories_of_the_same_noise(stage, run, flags, tmp_path):
    output = tmp_path / "ranks"
    few = ["--paths", 4, "--nfe", 4, "--solvers", "unipc", "--num_images", 3, "--score_images", 6]
    stage(rank_solvers, "trained", *flags, *few, "--output", output)
    rows, loaded = rows_of(output), load_model(run.baseline)
    assert len(rows) == 4 and {row["offset"] for row in rows} == {"diagonal"}
    trajectories, said = load_trajectories(flags[flags.index("--trajectories") + 1])
    planner = rank_solvers.TrajectoryPlanner(
        trajectories, said, rank_solvers.PlanCriterionSettings(criterion="trajectory")
    )
    lines = rank_solvers.random_paths(planner, 4, 4, np.random.default_rng(0))
    path = planner.path_of(lines[2], "random")
    assert rows[2]["path"] == path.fingerprint()
    noise = (SeededNoise(image_seeds(1, 3)).draw((3, 16, 16)),)
    fine = rank_solvers.Path(trajectories.points.tolist(), "lines", {})
    ends, images = (
        sample(loaded.denoise, loaded.scheduler, each, noise, solver=make_solver(solver)).images[0].double()
        for each, solver in ((fine, "dpmpp_2m"), (path, "unipc"))
    )
    distance = (images - ends).square().flatten(1).sum(1).mean().item()
    assert float(rows[2]["distance"]) == pytest.approx(distance, rel=1e-4)
    assert all(float(row["score"]) > 0 for row in rows)
    assert "Against the score:" in Path(f"{output}.md").read_text(encoding="utf-8")


def test_trajectories_of_other_weights_are_refused(refused, run, flags, tmp_path):
    other = [run.lift if word == run.baseline else word for word in flags]
    for module, more in ((rank_solvers, []), (solver_scores, ["--name", "a"])):
        says = ("of the same weights",)
        refused(module, "trained", *other, *more, "--output", tmp_path / "a", says=says)
