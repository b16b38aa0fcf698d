"""Runs of cold diffusion: what they minimise, that they learn and resume to the bit, and who takes what they made."""

import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import compute_heatmap_30
import compute_trajectories
import distill
import encode
import eval_fid_batch
import evaluate_likelihood
import export
import generate_with_path_30
import inpaint
import interpolate
import train_baseline
import train_classifier
import train_lift
from checkpoint import DEGRADED_IMAGES, build_scheduler, load_model, read_checkpoint
from conftest import assert_same
from data import coarse, read_png
from diffusion.cold import ColdScheduler
from diffusion.degradations import make_degradation
from diffusion.solvers import make_solver
from evaluation.results_table import read_rows
from evaluation.training_columns import describe_training
from training.cold import Cold
from training.objective import step_generator
from training.settings import TrainingSettings

COLD = ("--preset", "cold", "--ema_decay", 0.9, "--lr", 0.003)
CPU = ("--device", "cpu", "--precision", "fp32")


def objective(**more):
    scheduler = ColdScheduler(make_degradation("blur:3", 16), **more)
    config = {"t_pairs": None, "t_pairs_points": None, "loss_weights": [1.0], "model_type": "baseline"}
    return Cold(config, scheduler), scheduler


@pytest.mark.parametrize("input_noise", [0.0, 0.2])
def test_a_step_minimises_absolute_errors_of_degraded_images(input_noise):
    minimised, scheduler = objective(input_noise=input_noise)
    x = torch.rand(6, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1
    batch = minimised.draw(x, coarse(x), step_generator(1, 1, torch.device("cpu")))
    seen = []

    def denoise(xs, ts):
        seen.append((xs, ts))
        return (xs[0] * 0.9,)

    losses = minimised.losses(denoise, batch)
    [([shown], ts)] = seen
    severities = batch.t_64.double() / 999
    expected = torch.cat([scheduler.degradation(x[k : k + 1], s) for k, s in enumerate(severities.tolist())])
    torch.testing.assert_close(shown, expected + input_noise * batch.noise_64, rtol=0, atol=1e-6)
    assert torch.equal(ts[0], batch.t_64) and list(losses) == ["loss_64"]
    torch.testing.assert_close(losses["loss_64"], (0.9 * shown - x).abs().mean((1, 2, 3)))
    assert minimised.minimised(losses, batch) == pytest.approx(F.l1_loss(0.9 * shown, x).item())


def test_what_is_not_given_follows():
    chosen = TrainingSettings(model_type="baseline", preset="cold", resolution=32)
    assert (chosen.process, chosen.beta_schedule, chosen.objective, chosen.prediction_type) == (
        "cold",
        "cold",
        "cold",
        "x0",
    )
    assert (chosen.degradation, chosen.severity_schedule, chosen.input_noise) == ("blur:8", "linear", 0.0)
    assert TrainingSettings(**chosen.given()) == chosen
    assert chosen.but(resolution=16).degradation == "blur:4"
    assert chosen.but(degradation="means").degradation == "means:5"
    spelt = {"preset": "improved", "process": "cold", "objective": "cold", "prediction_type": "x0"}
    assert TrainingSettings(model_type="baseline", **spelt).degradation == "blur:16"
    ordinary = TrainingSettings(model_type="baseline")
    assert (ordinary.degradation, ordinary.severity_schedule, ordinary.input_noise) == (None, None, None)


@pytest.mark.parametrize(
    "values, says",
    [
        ({"model_type": "dual"}, "a 'dual' model has two; train a baseline"),
        ({"prediction_type": "v"}, "no --prediction_type but x0"),
        ({"timestep_weights": "sigma2"}, "no --timestep_weights but published"),
        ({"min_snr_gamma": 5}, "no --min_snr_gamma but none"),
        ({"t_law": "log_normal"}, "no --t_law but one by t"),
        ({"perceptual_weight": 0.1}, "no --perceptual_weight but 0"),
        ({"feature_weight": 0.1}, "no --feature_weight but 0"),
        ({"classes": "label"}, "no --classes but none"),
        ({"latents": "some/vae"}, "no --latents but none"),
        ({"coupling": "ot"}, "which only the process flow has, not cold"),
        ({"target_dataset": "dogs"}, "only the process flow has, not cold"),
        ({"process": "vp"}, "the process vp makes noisy ones"),
        ({"beta_schedule": "linear"}, "--beta_schedule linear is no noise schedule of the process 'cold'"),
        ({"objective": "denoising"}, "--process cold has no noise, which the objective denoising would need"),
        ({"degradation": "pixelate:40", "resolution": 32}, "larger than an image of 32x32 pixels"),
        ({"degradation": "smear"}, "degradation: 'smear' is no degradation"),
        ({"preset": "improved", "degradation": "blur"}, "--degradation belongs to --objective cold, not to denoising"),
        ({"preset": "improved", "input_noise": 0}, "--input_noise belongs to --objective cold"),
    ],
)
def test_settings_that_make_no_sense_are_refused(values, says):
    with pytest.raises(ValueError, match=says):
        TrainingSettings(**{"model_type": "baseline", "preset": "cold"} | values)


def test_a_classifier_of_degraded_images_is_refused(refused, tiny, tmp_path):
    says = ("--process cold has no noise",)
    refused(train_classifier, *tiny(tmp_path), "--classes", "--process", "cold", says=says, status=2)
    refused(train_lift, *tiny(tmp_path), "--preset", "cold", says=("has two; train a baseline",), status=2)


class Trained:
    """A run of cold diffusion on 12 of 14 images, where it lies, and flags for stages after it."""

    def __init__(self, folder, flags):
        self.folder, self.flags = folder, flags
        self.checkpoint = folder / "checkpoints/baseline_6ep.pth"
        self.stage = ["--checkpoint", self.checkpoint, "--cache_dir", folder / "cache", *CPU]


@pytest.fixture(scope="module")
def cold(stage, tiny, tmp_path_factory):
    folder = tmp_path_factory.mktemp("cold")
    flags = [*tiny(folder), *COLD, "--limit", 14, "--holdout", 2, "--degradation", "blur:3", "--epochs", 6]
    stage(train_baseline, *flags, "--save_every", 6)
    return Trained(folder, flags)


def test_the_loss_falls(cold):
    rows = (cold.folder / "logs/baseline/metrics.jsonl").read_text().splitlines()
    losses = [json.loads(row)["loss_64"] for row in rows]
    assert len(losses) == 18 and np.mean(losses[-4:]) < 0.75 * np.mean(losses[:2])
    assert (cold.folder / "logs/baseline/samples_6ep_fine.png").exists()


def test_checkpoints_say_how_images_were_degraded(cold):
    loaded = load_model(cold.checkpoint, given=(DEGRADED_IMAGES,))
    assert loaded.is_cold and str(loaded.scheduler.degradation) == "blur:3"
    config = loaded.config | {"severity_schedule": "cosine", "input_noise": 0.1, "degradation": "grey"}
    other = build_scheduler(config)
    assert other.severity(250) == pytest.approx((1 - np.cos(np.pi * 250 / 999)) / 2) and other.input_noise == 0.1
    said = describe_training(loaded, None)
    wanted = {"preset": "cold", "process": "cold", "prediction": "x0", "objective": "cold", "degradation": "blur:3"}
    wanted |= {"severity_schedule": "linear", "input_noise": "0", "start_data": "degraded images"}
    assert {name: said[name] for name in wanted} == wanted


def test_a_run_resumes_to_the_bit(cold, stage, refused, tmp_path, tiny):
    flags = [*tiny(tmp_path), "--cache_dir", cold.folder / "cache", *COLD, "--limit", 14, "--holdout", 2]
    stage(train_baseline, *flags, "--degradation", "blur:3.0", "--epochs", 3)
    refused(train_baseline, *flags, "--resume", "--degradation", "blur:2", says=("degradation = blur:3, not blur:2",))
    more = ["--degradation", "blur:3", "--epochs", 6, "--save_every", 6]
    stage(train_baseline, *flags, "--resume", *more)
    pairs = [place / "checkpoints/baseline_last.pth" for place in (tmp_path, cold.folder)]
    contents = [read_checkpoint(file) | {"execution": {}, "settings": {}} for file in pairs]
    for content in contents:
        content["config"]["save_every"] = None
    assert_same(*contents)


def test_images_are_made_of_draws(cold, stage, refused, tmp_path):
    words = [*cold.stage, "--num_images", 5, "--num_steps", 3, "--solver", "cold", "--start_components", 2]
    made = stage(generate_with_path_30, *words, "--output", tmp_path / "a")
    assert "5 new with 3 network calls each" in made.output
    assert not (tmp_path / "a/schedule.json").exists() and (tmp_path / "a/figures/grid.png").exists()
    stage(generate_with_path_30, *words, "--output", tmp_path / "b", "--batch_size", 2)
    names = sorted(file.name for file in (tmp_path / "a").glob("*.png"))
    assert len(names) == 5
    for name in names:
        assert torch.equal(read_png(tmp_path / "a" / name), read_png(tmp_path / "b" / name))
    assert len({read_png(tmp_path / "a" / name).numpy().tobytes() for name in names}) == 5
    # Another start is another folder of images.
    says = ("holds results with another start",)
    refused(generate_with_path_30, *words, "--output", tmp_path / "a", "--start_noise", 0.1, says=says)
    refused(generate_with_path_30, *words, "--start_components", 99, says=("99 are more than the 12 images",))


@pytest.mark.parametrize(
    "flags, says",
    [
        ((), ("only --solver cold_naive or cold samples such a model, not ddim; pass one of these",)),
        (("--solver", "heun"), ("only --solver cold_naive or cold samples such a model, not heun",)),
        (("--solver", "cold", "--path_type", "kl_diagonal"), ("--path_type kl_diagonal counts in log SNR",)),
        (("--solver", "cold", "--path_type", "through:1"), ("--path_type through:1 counts in log SNR",)),
        (("--solver", "cold", "--spacing", "karras"), ("--spacing karras counts in log SNR",)),
        (("--solver", "cold", "--spacing", "published"), ("images to start from belong at timestep 999",)),
        (("--solver", "cold", "--start", "x.png"), ("starts from what degraded images look like",)),
        (("--solver", "cold", "--guidance_scale", 2), ("was trained without classes",)),
    ],
)
def test_what_needs_noise_is_refused(cold, refused, flags, says):
    refused(generate_with_path_30, *cold.stage, *flags, says=says, keeps=(cold.folder / "checkpoints",))


def test_starts_belong_to_their_solvers(cold, run, refused):
    words = ["--checkpoint", run.baseline, "--device", "cpu"]
    for name in ("start_components", "start_noise"):
        says = (f"--{name} belongs to --solver cold_naive and cold, not to ddim",)
        refused(generate_with_path_30, *words, f"--{name}", 1, says=says, status=2)
    for solver in ("cold", "cold_naive"):
        says = (f"--solver {solver} samples models that were trained with --objective cold", "was not")
        refused(generate_with_path_30, *words, "--solver", solver, says=says)
        with pytest.raises(ValueError, match=says[0]):
            load_model(run.lift).check_solver(make_solver(solver))
    refused(generate_with_path_30, *words, "--dataset", "synthetic", says=("--dataset is for models of cold",))


def test_rows_say_what_walks_start_from(cold, stage):
    table = cold.folder / "scores.csv"
    words = [*cold.stage, "--metrics", "swd", "--num_images", 4, "--num_steps", 2, "--output", table]
    for more in (("cold",), ("cold", "--start_components", 2), ("cold_naive",), ("cold", "--start_noise", 0)):
        stage(eval_fid_batch, *words, "--solver", *more)
    again = stage(eval_fid_batch, *words, "--solver", "cold")
    assert "scored already" in again.output
    rows = read_rows(table)
    assert [row["solver"] for row in rows] == [
        "cold clean from 8 Gaussians with noise 0.002",
        "cold clean from 2 Gaussians with noise 0.002",
        "cold_naive clean from 8 Gaussians with noise 0.002",
        "cold clean from 8 Gaussians with noise 0",
    ]
    assert len({row["path_fingerprint"] for row in rows}) == 4 and len({row["swd"] for row in rows}) == 4
    assert {row["nfe"] for row in rows} == {"2"} and {row["degradation"] for row in rows} == {"blur:3"}


@pytest.mark.parametrize(
    "module, flags",
    [
        (compute_heatmap_30, ["--checkpoint", "FILE"]),
        (compute_trajectories, ["--checkpoint", "FILE"]),
        (encode, ["--checkpoint", "FILE", "--input", "mine"]),
        (evaluate_likelihood, ["--checkpoint", "FILE"]),
        (export, ["FILE", "out"]),
        (inpaint, ["--checkpoint", "FILE", "--mask", "center"]),
        (interpolate, ["--checkpoint", "FILE", "--seeds", "1", "2"]),
        (distill, ["--teacher", "FILE", "--method", "reflow"]),
    ],
)
def test_stages_of_noise_refuse(module, flags, cold, refused, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    words = [cold.checkpoint if word == "FILE" else word for word in flags]
    says = ("is a model of cold diffusion", "knows no noise level", "pass another checkpoint here")
    refused(module, *words, says=says, keeps=(cold.folder / "checkpoints",))
