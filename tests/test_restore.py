"""Restoration: tables say what their parts say, folders are restored as images are measured, the rest is refused."""

import csv
from unittest import mock

import numpy as np
import pytest
import torch

import restore
import train_baseline
from checkpoint import DEGRADED_IMAGES, load_model
from data import load_images, read_png, save_png, split_holdout, to_float, to_uint8
from diffusion.degradations import make_degradation
from diffusion.super_resolution import image_quality
from model import ScaleModel

METHODS = ("degraded", "direct", "cold_naive", "cold")


class Trained:
    """A model of images blurred by up to 3 pixels, 2 of 14 images held out, and flags of the stage."""

    def __init__(self, folder):
        self.folder, self.checkpoint = folder, folder / "checkpoints/baseline_2ep.pth"
        self.flags = ["--checkpoint", self.checkpoint, "--cache_dir", folder / "cache", "--device", "cpu"]
        self.flags += ["--num_steps", 3, "--precision", "fp32"]

    @property
    def held_out(self):
        images = load_images("synthetic", 16, self.folder / "cache", limit=14)
        return torch.from_numpy(np.array(split_holdout(images, 2)[1].pixels))

    def blurred(self, severity):
        return to_uint8(make_degradation("blur:3", 16)(to_float(self.held_out), severity))


@pytest.fixture(scope="module")
def cold(stage, tiny, tmp_path_factory):
    folder = tmp_path_factory.mktemp("cold")
    flags = ["--preset", "cold", "--degradation", "blur:3", "--limit", 14, "--holdout", 2, "--ema_decay", 0.9]
    stage(train_baseline, *tiny(folder), *flags)
    return Trained(folder)


def rows_of(folder):
    with open(folder / "restoration.csv") as stream:
        return {(float(row["severity"]), row["method"]): row for row in csv.DictReader(stream)}


def write_images(folder, images):
    folder.mkdir()
    for k, image in enumerate(images):
        save_png(image, folder / f"i{k}.png", by_lift=False)


def test_held_out_images_are_measured(cold, stage, refused, tmp_path):
    words = [*cold.flags, "--severity", 0.4, 1, "--output", tmp_path / "out"]
    ended = stage(restore, *words)
    rows = rows_of(tmp_path / "out")
    assert list(rows) == [(severity, method) for severity in (0.4, 1.0) for method in METHODS]
    assert [row["nfe"] for row in rows.values()] == ["0", "1", "3", "3"] * 2
    assert {row["num_images"] for row in rows.values()} == {"2"} and {row["of"] for row in rows.values()} == {"holdout"}
    assert (tmp_path / "out/restoration.png").exists() and (tmp_path / "out/settings.json").exists()
    # By hand: the first walk of the stage is one call, at the timestep of the severity.
    loaded = load_model(cold.checkpoint, given=(DEGRADED_IMAGES,))
    for severity, t in ((0.4, 400), (1.0, 999)):
        given = cold.blurred(severity)
        seen = loaded.model.denoise((to_float(given),), (torch.full((2,), t),))[0]
        for name, made in (("degraded", given), ("direct", to_uint8(seen.clamp(-1, 1)))):
            quality, row = image_quality(made, cold.held_out), rows[severity, name]
            assert float(row["psnr"]) == pytest.approx(quality.psnr.mean().item(), abs=2e-4)
            assert float(row["psnr_sd"]) == pytest.approx(quality.psnr.std().item(), abs=2e-4)
            assert float(row["ssim"]) == pytest.approx(quality.ssim.mean().item(), abs=2e-6)
            assert f"{quality.psnr.mean():7.2f}" in ended.output
    again = stage(restore, *words)
    assert again.output == ended.output and rows_of(tmp_path / "out") == rows
    refused(restore, *words, "--num_steps", 2, says=("holds results with another num_steps", "--force"))


def test_a_perfect_restorer_is_exact(cold, stage, tmp_path):
    """Both walks end on the images themselves; only what is degraded differs from them."""
    originals = to_float(cold.held_out)
    with mock.patch.object(ScaleModel, "denoise", lambda self, xs, ts, *_: (originals[: len(xs[0])],)):
        stage(restore, *cold.flags, "--severity", 0.5, "--output", tmp_path / "out")
    rows = rows_of(tmp_path / "out")
    # What algorithm 2 starts from was rounded to grey levels, which stay.
    assert rows[0.5, "direct"]["psnr"] == rows[0.5, "cold_naive"]["psnr"] == "inf"
    assert float(rows[0.5, "cold"]["psnr"]) > 50 > 35 > float(rows[0.5, "degraded"]["psnr"])


@pytest.mark.parametrize("solver", ["direct", "cold_naive", "cold"])
def test_a_folder_is_restored_as_it_is_measured(cold, stage, tmp_path, solver):
    write_images(tmp_path / "blurred", cold.blurred(0.6))
    words = [*cold.flags, "--input", tmp_path / "blurred", "--severity", 0.6, "--degradation", "blur:3.0"]
    words += ["--solver", solver, "--output", tmp_path / "out"]
    made = stage(restore, *words, "--batch_size", 1)
    assert f"2 new with {1 if solver == 'direct' else 3} network calls each; undone: blur:3 to 0.6" in made.output
    stage(restore, *cold.flags, "--severity", 0.6, "--output", tmp_path / "table")
    pixels = torch.stack([read_png(tmp_path / f"out/i{k}.png") for k in range(2)])
    expected = float(rows_of(tmp_path / "table")[0.6, solver]["psnr"])
    assert image_quality(pixels, cold.held_out).psnr.mean().item() == pytest.approx(expected, abs=0.01)
    assert "all there already" in stage(restore, *words).output


@pytest.mark.parametrize(
    "flags, status, says",
    [
        (("--degradation", "mask"), 1, ("--degradation mask is not what", "which is blur:3", "leave it out")),
        (("--degradation", "blur:4"), 1, ("--degradation blur:4 is not what", "which is blur:3")),
        (("--degradation", "smear"), 2, ("'smear' is no degradation",)),
        (("--severity", 1.2), 2, ("'1.2' is not a number from 0 to 1",)),
        (("--severity", -0.2), 2, ()),
        (("--severity", 0), 2, ("--severity 0 leaves nothing to restore",)),
        (("--input", "blurred"), 2, ("--input needs the --severity",)),
        (("--input", "blurred", "--severity", 0.2, 0.4), 2, ("one number",)),
        (("--input", "blurred", "--severity", 0.2, "--on", "train"), 2, ("--input and --on exclude each other",)),
        (("--solver", "cold"), 2, ("--solver is for --input",)),
        (("--resize",), 2, ("--resize is for --input",)),
        (("--input", "blurred", "--severity", 0.2, "--output", "blurred"), 1, ("would be overwritten",)),
        (("--input", "nothing", "--severity", 0.2), 1, ("--input nothing is not a folder",)),
        (("--num_images", 3), 1, ("--num_images 3 asks for more than the 2 images",)),
    ],
)
def test_what_cannot_be_restored_is_refused(cold, refused, tmp_path, monkeypatch, flags, status, says):
    monkeypatch.chdir(tmp_path)
    write_images(tmp_path / "blurred", cold.blurred(0.5))
    refused(restore, *cold.flags, *flags, says=says, status=status, keeps=(cold.folder / "checkpoints",))


def test_models_of_noise_are_refused(run, refused):
    words = ["--checkpoint", run.baseline, "--device", "cpu"]
    refused(restore, *words, says=("was trained on noise, not on degraded images", "--preset cold"))
