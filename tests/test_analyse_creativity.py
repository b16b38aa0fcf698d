"""The stage that predicts what networks make: a network that is a machine is met exactly, and runs go on."""

import csv
import json

import numpy as np
import pytest
import torch

import analyse_creativity
import train_baseline
import train_lift
from checkpoint import load_model
from data import load_images, to_float
from truth.local import LocalDenoiser, WindowTable

FILES = ("likeness.csv", "summary.csv", "walks.npz", "windows.json", "pairs.png", "windows.png", "settings.json")
SIDES = (9, 5, 5, 3)  # Of a machine in place of the network, along the path.


def rows_of(file):
    with open(file) as stream:
        return list(csv.DictReader(stream))


@pytest.fixture(scope="module")
def trained(stage, tiny, tmp_path_factory):
    """A network of 16x16 images that has learnt hardly anything, and flags that walk it in four steps."""
    folder = tmp_path_factory.mktemp("creativity")
    stage(train_baseline, *tiny(folder), "--preset", "improved", "--epochs", 1)
    flags = ["--checkpoint", folder / "checkpoints/baseline_1ep.pth", "--cache_dir", folder / "cache"]
    flags += ["--num_steps", 4, "--num_images", 6, "--calibration_places", 24, "--windows", 3, 5, 9]
    return [*flags, "--device", "cpu", "--precision", "fp32", "--batch_size", 4]


def a_machine(loaded, folder, name):
    """The checkpoint with a machine of its training images in place of its network."""
    images = to_float(torch.from_numpy(np.array(load_images("synthetic", 16, folder / "cache", limit=12).pixels)))
    levels = loaded.scheduler.log_snr[torch.tensor([999, 749, 500, 250])].tolist()
    return loaded._replace(model=LocalDenoiser(loaded.scheduler, images, name, WindowTable(tuple(levels), SIDES)))


@pytest.mark.parametrize("name", ["ls", "els", "bbels"])
def test_a_network_that_is_a_machine_is_predicted_exactly(trained, stage, monkeypatch, tmp_path, name):
    """Its windows are found at every point of the path, and its images have r = 1; those of others have less."""
    cache = trained[3].parent

    def load(*arguments, **settings):
        return a_machine(load_model(*arguments, **settings), cache, name)

    monkeypatch.setattr(analyse_creativity, "load_model", load)
    ended = stage(analyse_creativity, *trained, "--output", tmp_path)
    found = json.loads((tmp_path / "windows.json").read_text())
    assert list(found) == ["ls", "els", "bbels"]
    # With noise alone every window says the same, but for rounding.
    assert found[name]["sides"][1:] == list(SIDES[1:])
    assert max(min(row) for row in found[name]["errors"]) < 1e-8
    rows = rows_of(tmp_path / "likeness.csv")
    assert len(rows) == 4 * 6 and [int(row["seed"]) for row in rows[:6]] == list(range(42_000_000, 42_000_006))
    by_machine = {each: [float(row["r"]) for row in rows if row["machine"] == each] for each in ("ideal", *found)}
    assert min(by_machine[name]) > 1 - 1e-6
    assert all(np.median(r) < 0.999 for each, r in by_machine.items() if each != name)
    assert all(float(row["r2"]) == pytest.approx(float(row["r"]) ** 2, rel=1e-12) for row in rows)
    summary = {row["machine"]: row for row in rows_of(tmp_path / "summary.csv")}
    for each, r in by_machine.items():
        assert float(summary[each]["r"]) == pytest.approx(np.median(r), rel=1e-12)
        assert float(summary[each]["r_low"]) == min(r) and float(summary[each]["r_high"]) == max(r)
    assert f"| {name} | 1.000 [1.000, 1.000] | 1.000 [1.000, 1.000] |" in ended.output


def test_ideal_images_are_those_of_the_training(trained, stage, tmp_path):
    stage(analyse_creativity, *trained, "--machines", "ideal", "--num_steps", 12, "--output", tmp_path)
    assert not (tmp_path / "windows.png").exists() and json.loads((tmp_path / "settings.json").read_text())
    made = torch.from_numpy(np.load(tmp_path / "walks.npz")["ideal"]).flatten(1)
    images = load_images("synthetic", 16, trained[3].parent / "cache", limit=12)
    training = to_float(torch.from_numpy(np.array(images.pixels))).flatten(1)
    assert torch.cdist(made, training).amin(1).max() < 0.05


def test_a_stopped_run_goes_on_where_it_was(trained, stage, refused, tmp_path):
    words = [*trained, "--machines", "ideal", "els", "--output", tmp_path / "out"]
    stage(analyse_creativity, *words)
    assert {file.name for file in (tmp_path / "out").iterdir()} == set(FILES)
    before = {name: (tmp_path / "out" / name).read_bytes() for name in FILES}
    saved = dict(np.load(tmp_path / "out/walks.npz"))
    # As if it had stopped in its walks.
    np.savez(tmp_path / "out/walks.npz", network=saved["network"], els=saved["els"][:4])
    stage(analyse_creativity, *words)
    again = dict(np.load(tmp_path / "out/walks.npz"))
    assert saved.keys() == again.keys() and all(np.array_equal(saved[name], again[name]) for name in saved)
    assert all((tmp_path / "out" / name).read_bytes() == before[name] for name in FILES if name != "walks.npz")
    # Further machines and images join those that are there.
    stage(analyse_creativity, *words, "--num_images", 7, "--machines", "els", "ls")
    joined = dict(np.load(tmp_path / "out/walks.npz"))
    assert len(joined["els"]) == len(joined["ls"]) == 7 and np.array_equal(joined["els"][:4], saved["els"][:4])
    refused(analyse_creativity, *words, "--num_steps", 5, says=("holds results with another", "--force"))


def test_mirror_images_count_where_the_network_saw_them(trained, stage, tiny, tmp_path):
    stage(train_baseline, *tiny(tmp_path), "--epochs", 1, "--flip")
    flags = ["--checkpoint", tmp_path / "checkpoints/baseline_1ep.pth", *trained[2:], "--machines", "ideal"]
    stage(analyse_creativity, *flags, "--output", tmp_path / "out")
    assert json.loads((tmp_path / "out/settings.json").read_text())["num_training_images"] == 24


def test_what_machines_know_nothing_of_is_refused(trained, stage, tiny, refused, tmp_path):
    refused(analyse_creativity, *trained, "--windows", 3, 4, says=("--windows 4 is even",), status=2)
    refused(analyse_creativity, *trained, "--solver", "ancestral", says=("draws noise",), status=2)
    stage(train_lift, *tiny(tmp_path), "--model", "single_t", "--epochs", 1)
    file = tmp_path / "checkpoints/single_t_1ep.pth"
    refused(analyse_creativity, "--checkpoint", file, *trained[2:], says=("'single_t' model", "train_baseline.py"))
