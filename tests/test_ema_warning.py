"""Stages that take EMA weights of a run too short for them say so, once for each checkpoint."""

import shutil

import pytest

import compute_heatmap_30
import eval_fid_batch
import export
import generate_sr
import generate_with_path_30
import interpolate
from checkpoint import read_checkpoint, save_checkpoint
from conftest import HARDWARE, STEPS


@pytest.fixture
def short(run, tmp_path):
    """Both models with a decay that their six steps do not live up to."""
    folder = tmp_path / "short"
    for file in (run.baseline, run.lift):
        content = read_checkpoint(file)
        content["config"]["ema_decay"] = 0.9
        save_checkpoint(folder / file.name, content)
    return folder


def warnings(ended):
    return [line for line in ended.notes.splitlines() if "initial weights" in line]


def line_of(file):
    return (
        f"warning: {file}: the EMA weights still hold 53% of the initial weights after 6 steps at decay 0.9; use the "
        "raw weights, train longer, or train with --ema_rampup_ratio 0.05"
    )


@pytest.mark.parametrize("module", [generate_with_path_30, interpolate, compute_heatmap_30, export, generate_sr])
def test_a_stage_says_it_of_ema_weights_alone(stage, run, short, tmp_path, module):
    file = short / run.lift.name
    common = ["--checkpoint", file, *HARDWARE]
    flags = {
        "generate_with_path_30": [*common, *STEPS, "--num_images", 1, "--output"],
        "interpolate": [*common, *STEPS, "--seeds", 1, 2, "--frames", 3, "--output"],
        "compute_heatmap_30": [*run.heatmap_flags("unused.pth"), "--maps", "mse", *common, "--output"],
        "generate_sr": [*common, *STEPS, "--on", "train", "--num_images", 1, "--cache_dir", run.cache, "--output"],
        "export": [file],
    }[module.__name__]
    assert warnings(stage(module, *flags, tmp_path / "raw.pth")) == []
    assert warnings(stage(module, *flags, tmp_path / "ema.pth", "--ema")) == [line_of(file)]


def test_an_evaluation_says_it_once_for_each_checkpoint(stage, run, short, tmp_path):
    flags = [*run.eval_flags(tmp_path / "scores.csv"), "--checkpoint_dir", short, "--num_images", 4]
    flags += ["--path_type", "diagonal", "lead:1", "--seeds", 42, 43, "--weights", "raw", "ema"]
    shutil.copy(run.baseline, short / "baseline_3ep.pth")  # Whose decay of 0.5 is no matter.
    ended = stage(eval_fid_batch, *flags)
    assert warnings(ended) == [line_of(short / run.baseline.name), line_of(short / run.lift.name)]
