"""plan_path.py --criterion trajectory, on the exact trajectories of Gaussian images: costs, optima, files, refusals."""

import csv
import itertools
import json
import math

import numpy as np
import pytest
import torch

import plan_path
from diffusion.solvers import make_solver, with_rule
from paths.families import diagonal, log_snr_shift
from paths.schedule_file import load_schedule
from planning.deviation import deviation
from planning.plan import PlanCriterionSettings
from planning.replay import replay_for
from planning.trajectory_file import save_trajectories
from planning.trajectory_plan import TrajectoryPlanner
from rank_solvers import exact_trajectories
from scheduler import DDIMScheduler
from truth.gaussian import Spectrum

LINES, START = 14, 950
SPECTRUM = Spectrum.power_law(8)
LOG_4 = math.log(4)


def made(num_scales):
    """Trajectories of one clock or of the residual pair, and what a file says of them."""
    representation = "overcomplete" if num_scales == 1 else "residual"
    scheduler = DDIMScheduler(beta_schedule="cosine", prediction_type="v", representation=representation)
    log_snr = scheduler.log_snr.numpy()
    path = diagonal(LINES, "uniform_log_snr", num_scales, log_snr=log_snr, start=START)
    path = path if num_scales == 1 else log_snr_shift(path, LOG_4, log_snr)
    said = {
        "fingerprint": "f" * 16,
        "data_fingerprint": "d" * 16,
        "weights": "ema",
        "epoch": 7,
        "model_type": "baseline" if num_scales == 1 else "dual",
        "beta_schedule": "cosine",
        "num_train_timesteps": 1000,
        "representation": representation,
        "resolution": 8,
        "run": None,
    }
    return exact_trajectories(SPECTRUM, scheduler, path), said


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("trajectories")
    for num_scales in (1, 2):
        save_trajectories(folder / f"{num_scales}.pth", *made(num_scales))
    return folder


def settings_of(solver="dpmpp_2m"):
    return PlanCriterionSettings(criterion="trajectory", solver=solver)


def squared_distance(points, solver, variances):
    """Of the end of a run, started on the trajectory at unit noise, from the trajectory's: mode by mode, by hand."""
    rule, total = make_solver(solver).rule, 0.0
    log_snr = [*points, math.inf]
    for s in variances:
        size = [math.sqrt(s + math.exp(-value)) for value in log_snr]
        unit = math.sqrt(1 + math.exp(points[0])) / size[0] / math.exp(points[0] / 2)
        x, images, places = unit * size[0], [], []
        for k in range(len(points)):
            images = [s / (s + math.exp(-log_snr[k])) * x, *images][: rule.order]
            places = [log_snr[k] / 2, *places][: rule.order]
            if math.isinf(log_snr[k + 1]):
                x = images[0]
                break
            after = log_snr[k + 1] / 2
            weights = rule.predictor(places, after)
            x = math.exp(places[0] - after) * x + sum(w * image for w, image in zip(weights, images, strict=True))
        total += (x - unit * math.sqrt(s)) ** 2
    return total


@pytest.mark.parametrize("solver", ["ddim", "dpmpp_2m", "dpmpp_3m"])
def test_the_cost_is_the_distance_of_the_samples(solver):
    planner = TrajectoryPlanner(*made(1), settings_of(solver))
    lines = np.array([0, 4, 5, 8, 12])[:, None]
    points = planner.trajectories.log_snr[lines[:, 0], 0].tolist()
    expected = squared_distance(points, solver, torch.cat([SPECTRUM.low, SPECTRUM.high]).tolist())
    assert planner.cost(lines) == pytest.approx(expected, rel=1e-9)


def test_scales_of_the_pair_cost_what_each_costs_by_itself():
    planner = TrajectoryPlanner(*made(2), settings_of())
    lines = np.array([[0, 0], [3, 2], [6, 5], [9, 10]])
    fine, coarse = planner.trajectories.log_snr.numpy()[lines, [0, 1]].T
    # A mode of the coarse image has a quarter of the variance of the low mode, and so has its distance.
    expected = squared_distance(fine.tolist(), "dpmpp_2m", SPECTRUM.high.tolist())
    expected += 4 * squared_distance(coarse.tolist(), "dpmpp_2m", (SPECTRUM.low / 4).tolist())
    assert planner.cost(lines) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("solver", with_rule())
def test_one_clock_finds_the_best_of_all_paths(solver):
    planner = TrajectoryPlanner(*made(1), settings_of(solver))
    nfe = 4
    every = np.array([(0, *inner) for inner in itertools.combinations(range(1, LINES), nfe - 1)])[..., None]
    costs = deviation(planner.trajectories, make_solver(solver).rule)(every)
    plans = planner.families(nfe)
    assert plans[0].family == "optimal diagonal"
    assert plans[0].cost == pytest.approx(costs.min(), rel=1e-9)
    assert all(plan.cost >= plans[0].cost for plan in plans)


def test_two_clocks_are_never_worse_than_tied_ones():
    planner = TrajectoryPlanner(*made(2), settings_of())
    for nfe in (3, 5):
        plans = {plan.family: plan for plan in planner.families(nfe)}
        assert list(plans)[:2] == ["optimal", "optimal diagonal"]
        assert plans["optimal"].cost < plans["optimal diagonal"].cost  # The bands want schedules of their own.
        assert "image diagonal, uniform λ" in plans
        for plan in plans.values():
            assert plan.path.nfe == nfe and plan.cost >= plans["optimal"].cost
            assert planner.cost(planner.lines_of(plan.path)) == pytest.approx(plan.cost)


def test_what_is_measured_nowhere_is_no_path():
    planner = TrajectoryPlanner(*made(2), settings_of())
    paths = np.array([[[0, 0], [2, 2]], [[0, 0], [13, 2]], [[0, 0], [0, 0]], [[1, 1], [2, 2]], [[0, 0], [14, 14]]])
    assert planner.valid(paths).tolist() == [True, False, False, False, False]
    with pytest.raises(ValueError, match="nothing was measured"):
        planner.cost(paths[1])
    with pytest.raises(ValueError, match="begin at 0"):
        planner.cost(paths[3])


def test_schedules_say_which_solver_they_are_for(stage, files, tmp_path):
    flags = ["--trajectories", files / "1.pth", "--criterion", "trajectory", "--solver", "dpmpp_2m", "--nfe", 3, 5]
    ended = stage(plan_path, *flags, "--output", tmp_path / "plan")
    names = {file.name for file in (tmp_path / "plan").iterdir()}
    expected = {"schedule_diagonal_3.json", "schedule_diagonal_5.json", "costs.csv", "cost.png", "paths.png"}
    assert names == expected | {"settings.json"}
    path = load_schedule(tmp_path / "plan/schedule_diagonal_5.json")
    assert path.num_scales == 1 and path.nfe == 5
    assert path.provenance["solver"] == {"name": "dpmpp_2m", "end": "clean"}
    assert path.provenance["criterion"] == "trajectory, dpmpp_2m"
    with open(tmp_path / "plan/costs.csv", newline="", encoding="utf-8") as stream:
        rows = [row for row in csv.DictReader(stream) if row["family"] == "optimal diagonal"]
    assert path.provenance["cost"] == pytest.approx(float(rows[1]["cost"]))
    assert "3 calls" in ended.output and "5 calls" in ended.output


def test_the_default_folder_tells_the_solver(stage, files):
    file = files / "2.pth"
    ended = stage(plan_path, "--trajectories", file, "--criterion", "trajectory", "--solver", "unipc", "--nfe", 4)
    folder = files / "plan_7ep_ema_trajectory_unipc"
    assert {file.name for file in folder.glob("schedule_*")} == {"schedule_optimal_4.json", "schedule_diagonal_4.json"}
    assert "coarse ahead at" in ended.output


@pytest.mark.parametrize(
    ("flags", "status", "says"),
    [
        (["--criterion", "trajectory", "--solver", "heun"], 2, ("ddim, dpmpp_2m, dpmpp_3m, unipc", "not heun")),
        (["--criterion", "trajectory", "--solver", "dpmpp_3m", "--nfe", 3], 2, ("--nfe 3", "4 calls", "dpmpp_3m")),
        (["--criterion", "trajectory", "--solver", "unipc", "--nfe", 8, 2], 2, ("--nfe 2", "3 calls")),
        (["--criterion", "trajectory", "--nfe", 20], 1, ("--nfe 20", "14 lines", "more --lines")),
        (["--criterion", "trajectory", "--start", 900], 2, ("--start and --end",)),
        (["--criterion", "trajectory", "--heatmap", "a.pth"], 2, ("leave --heatmap out",)),
        (["--criterion", "trajectory", "--checkpoint", "a.pth"], 2, ("leave --checkpoint",)),
        (["--criterion", "kl"], 2, ("--criterion kl plans with --heatmap", "leave --trajectories out")),
        (["--solver", "dpmpp_2m"], 2, ("--criterion kl", "not dpmpp_2m", "--criterion trajectory")),
    ],
)
def test_planning_for_a_solver_refuses(refused, files, tmp_path, flags, status, says):
    common = ["--trajectories", files / "1.pth", "--output", tmp_path / "plan"]
    refused(plan_path, *common, *flags, says=says, status=status, keeps=(files,))


def test_following_it_with_another_solver_is_said(stage, files, tmp_path, capsys):
    flags = ["--trajectories", files / "1.pth", "--criterion", "trajectory", "--solver", "dpmpp_2m", "--nfe", 3]
    stage(plan_path, *flags, "--output", tmp_path / "plan")
    file = tmp_path / "plan/schedule_diagonal_3.json"

    class Loaded:
        scheduler = DDIMScheduler(beta_schedule="cosine", prediction_type="v")
        config, weights, fingerprint = json.loads('{"resolution": 8}'), "ema", "f" * 16

    capsys.readouterr()
    replay_for(str(file), Loaded, "dpmpp_2m")
    replay_for(str(file), Loaded)
    assert capsys.readouterr().err == ""
    replay_for(str(file), Loaded, "ddim")
    assert "planned for --solver dpmpp_2m, and is followed by ddim" in capsys.readouterr().err
