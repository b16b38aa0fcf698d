"""Runs of every process: what settings make of the flags, and that models learn, resume, and are mapped."""

import pytest
import torch

import compute_heatmap_30
import generate_with_path_30
import plan_path
import train_baseline
import train_lift
from checkpoint import load_model
from conftest import HARDWARE
from planning.presets import PRESETS
from training.run_log import read_metrics
from training.settings import TrainingSettings

FAMILIES = ("ddpm", "ncsn", "vp", "sub_vp", "ve", "flow")


def settings(**values):
    return TrainingSettings(**{"model_type": "dual", "dataset": "synthetic"} | values)


@pytest.mark.parametrize(
    "given, process, schedule",
    [
        ({}, "vp", "cosine_clipped"),
        ({"preset": "improved"}, "vp", "cosine"),
        ({"process": "flow", "prediction_type": "velocity"}, "flow", "flow"),
        ({"process": "sub_vp"}, "sub_vp", "sub_vp_cosine_clipped"),
        ({"process": "sub_vp", "beta_schedule": "linear"}, "sub_vp", "sub_vp_linear"),
        ({"beta_schedule": "ve"}, "ve", "ve"),
        ({"preset": "flow", "process": "vp"}, "vp", "cosine"),
        ({"preset": "flow", "beta_schedule": "linear", "process": "vp"}, "vp", "linear"),
    ],
)
def test_process_and_schedule_follow_from_what_is_given(given, process, schedule):
    made = settings(**given)
    assert (made.process, made.beta_schedule) == (process, schedule)
    # What is recorded makes the same settings again, and a change follows anew.
    assert settings(**given | {"process": process, "beta_schedule": schedule}).recorded() == made.recorded()
    assert made.but(seed=1).beta_schedule == schedule


@pytest.mark.parametrize(
    "given", [{"process": "flow", "beta_schedule": "linear"}, {"process": "vp", "beta_schedule": "ve"}]
)
def test_a_schedule_of_another_process_is_refused(given):
    with pytest.raises(ValueError, match="is no noise schedule of the process"):
        settings(**given)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_run_of_every_family_goes_all_the_way(stage, tiny, tmp_path, family):
    """Trained in one go or resumed, same weights; mapped, planned and sampled along the plan, with both clocks."""
    flags = ["--preset", family, "--ema_decay", 0.5, "--lr", 0.003]
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    stage(train_lift, *tiny(whole), *flags, "--epochs", 2)
    stage(train_lift, *tiny(parts), *flags, "--epochs", 1)
    stage(train_lift, *tiny(parts), *flags, "--epochs", 2, "--resume")
    one, two = (load_model(next(folder.rglob("lift_dual_timestep_2ep.pth"))) for folder in (whole, parts))
    assert one.fingerprint == two.fingerprint
    values = PRESETS[family]
    assert one.config["process"] == values["process"] == one.scheduler.process
    assert one.scheduler.prediction_type == values["prediction_type"]
    file = next(whole.rglob("lift_dual_timestep_2ep.pth"))
    map_file, plan, samples = tmp_path / "map.pth", tmp_path / "plan", tmp_path / "samples"
    flags = ["--grid", 8, "--K", 1, "--num_images", 2, "--maps", "mse", "--cache_dir", whole.parent / "cache"]
    stage(compute_heatmap_30, "--checkpoint", file, "--output", map_file, *flags, *HARDWARE)
    content = torch.load(map_file, weights_only=True)
    assert content["mse_64"].isfinite().all() and (content["mse_64"] > 0).all()
    stage(plan_path, "--heatmap", map_file, "--nfe", 4, "--output", plan)
    schedule = plan / "schedule_optimal_4.json"
    stage(generate_with_path_30, "--checkpoint", file, "--schedule", schedule, "--num_images", 2, "--output", samples)
    assert len(list(samples.glob("[0-9]*.png"))) == 2


@pytest.mark.parametrize("family", FAMILIES)
def test_a_baseline_learns(stage, tiny, tmp_path, family):
    """Its losses of the last steps are well below those of the first."""
    flags = ["--preset", family, "--lr", 0.003, "--epochs", 30, "--log_every", 1]
    stage(train_baseline, *tiny(tmp_path), *flags)
    losses = [row["loss_64"] for row in read_metrics(next(tmp_path.rglob("metrics.jsonl")))]
    assert sum(losses[-10:]) < 0.8 * sum(losses[:10])


@pytest.mark.parametrize("given", [{"preset": "ddpm"}, {"prediction_type": "score", "process": "ve"}])
def test_weights_of_clean_errors_are_refused_for_predictions_of_noise(given):
    with pytest.raises(ValueError, match="edm weighs errors of the clean image"):
        settings(**given, timestep_weights="edm")
    assert settings(preset="flow", timestep_weights="edm").timestep_weights == "edm"
