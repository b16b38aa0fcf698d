"""The search for the second noise level, on a tiny consistency model."""

import csv
import math

import numpy as np
import pytest

import generate_with_path_30
import second_level
import train_baseline
from conftest import HARDWARE
from paths.schedule_file import load_schedule


def test_the_schedule_is_the_best_of_the_table_and_is_replayed(stage, tiny, tmp_path):
    stage(train_baseline, *tiny(tmp_path), "--preset", "ict", "--lr", 0.003)
    file, output = tmp_path / "checkpoints/baseline_2ep.pth", tmp_path / "found/second"
    flags = ["trained", "--checkpoint", file, "--num_images", 6, "--grid", 4, "--rounds", 1, "--output", output]
    said = stage(second_level, *flags, "--seeds", 1, 2, "--cache_dir", tmp_path / "cache", *HARDWARE).output
    with open(f"{output}.csv", newline="") as stream:
        rows = list(csv.DictReader(stream))
    assert [row["calls"] for row in rows[:2]] == ["1", "1"] and {row["calls"] for row in rows[2:]} == {"2"}
    means = {}
    for row in rows[2:]:
        means.setdefault(float(row["log_snr"]), []).append(float(row["swd"]))
    assert min(means) == pytest.approx(-2 * math.log(80))
    best = min(means, key=lambda level: np.mean(means[level]))
    path = load_schedule(f"{output}.json")
    assert f"best: log SNR {best:+.2f} (timestep {path.points[1][0]})" in said
    assert path.nfe == 2 and path.provenance["cost"] == pytest.approx(np.mean(means[best]))
    walk = ["--checkpoint", file, "--solver", "consistency", "--schedule", f"{output}.json", "--num_images", 2]
    said = stage(generate_with_path_30, *walk, "--output", tmp_path / "samples", *HARDWARE).output
    assert "2 new with 2 network calls each" in said


def test_other_models_are_refused(refused, run, tmp_path):
    flags = ["trained", "--checkpoint", run.baseline, "--output", tmp_path / "x", *HARDWARE]
    refused(second_level, *flags, says=("--solver consistency samples models that were trained with",))
