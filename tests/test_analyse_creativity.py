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
from truth.local_pair import LocalPairDenoiser

TABLES = ("likeness.csv", "summary.csv", "receptive_field.csv")
FILES = (*TABLES, "walks.npz", "windows.json", "pairs.png", "windows.png", "receptive_field.png", "settings.json")
SIDES = (9, 5, 5, 3)  # Of a machine in place of the network, along the path.


def rows_of(file):
    with open(file) as stream:
        return list(csv.DictReader(stream))


class Machine(torch.nn.Module):
    """A local score machine as a network: gradients pass, and are 0 but for what conversions make of them."""

    def __init__(self, machine, scales):
        super().__init__()
        self.machine, self.num_scales, self.num_predictions = machine, scales, scales

    def denoise(self, xs, ts):
        return tuple(each + 0 * x for each, x in zip(self.machine.denoise(xs, ts), xs, strict=True))


class Trained:
    """A network of 16x16 images that has learnt hardly anything, and flags that walk it in four steps."""

    def __init__(self, folder, stage, tiny, module, stem):
        stage(module, *tiny(folder), "--preset", "improved", "--epochs", 1)
        self.folder = folder
        self.others = ["--cache_dir", folder / "cache", "--num_steps", 4, "--num_images", 6, "--windows", 3, 5, 9]
        self.others += ["--device", "cpu", "--precision", "fp32", "--calibration_places", 24]
        self.flags = ["--checkpoint", folder / f"checkpoints/{stem}_1ep.pth", *self.others]

    @property
    def images(self):
        images = load_images("synthetic", 16, self.folder / "cache", limit=12)
        return to_float(torch.from_numpy(np.array(images.pixels)))

    def with_a_machine(self, monkeypatch, name, scales):
        """From now on the stage loads a machine of the training images in place of the network."""

        def load(*arguments, **settings):
            loaded = load_model(*arguments, **settings)
            levels = loaded.scheduler.log_snr[torch.tensor([999, 749, 500, 250])].tolist()
            table = WindowTable(tuple((level,) * scales for level in levels), SIDES)
            kind = LocalDenoiser if scales == 1 else LocalPairDenoiser
            return loaded._replace(model=Machine(kind(loaded.scheduler, self.images, name, table), scales))

        monkeypatch.setattr(analyse_creativity, "load_model", load)


@pytest.fixture(scope="module")
def trained(stage, tiny, tmp_path_factory):
    return Trained(tmp_path_factory.mktemp("one"), stage, tiny, train_baseline, "baseline")


@pytest.fixture(scope="module")
def pair(stage, tiny, tmp_path_factory):
    return Trained(tmp_path_factory.mktemp("pair"), stage, tiny, train_lift, "lift_dual_timestep")


@pytest.mark.parametrize(("name", "scales"), [("ls", 1), ("els", 1), ("bbels", 1), ("els", 2)])
def test_a_network_that_is_a_machine_is_predicted_exactly(trained, pair, stage, monkeypatch, tmp_path, name, scales):
    """Its windows are found at every point of the path, and its images have r = 1; those of others have less."""
    network = trained if scales == 1 else pair
    network.with_a_machine(monkeypatch, name, scales)
    ended = stage(analyse_creativity, *network.flags, "--output", tmp_path)
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
    # What is left of its gradients is that of the noisy image in x0 = alpha x - sigma v, at the pixel itself.
    fields = rows_of(tmp_path / "receptive_field.csv")
    assert [(int(row["point"]), int(row["scale"])) for row in fields] == [
        (k, side) for k in range(4) for side in (16, 8)[:scales]
    ]
    fine = [row for row in fields if row["scale"] == "16"]
    assert [row["t_16"] for row in fine] == ["999", "749", "500", "250"]
    assert {row["side"] for row in fine} == {"1"} and {float(row["of_all_scales"]) for row in fine} == {1.0}
    assert all((row["side"], float(row["of_all_scales"])) == ("", 0.0) for row in fields if row["scale"] == "8")


def test_ideal_images_are_those_of_the_training(trained, stage, tmp_path):
    stage(analyse_creativity, *trained.flags, "--machines", "ideal", "--num_steps", 12, "--output", tmp_path)
    assert not (tmp_path / "windows.json").exists()
    made = torch.from_numpy(np.load(tmp_path / "walks.npz")["ideal"]).flatten(1)
    assert torch.cdist(made, trained.images.flatten(1)).amin(1).max() < 0.05


def test_a_stopped_run_goes_on_where_it_was(trained, stage, refused, tmp_path):
    words = [*trained.flags, "--machines", "ideal", "els", "--output", tmp_path / "out"]
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
    flags = ["--checkpoint", tmp_path / "checkpoints/baseline_1ep.pth", *trained.others, "--machines", "ideal"]
    stage(analyse_creativity, *flags, "--output", tmp_path / "out")
    assert json.loads((tmp_path / "out/settings.json").read_text())["num_training_images"] == 24


def test_what_machines_know_nothing_of_is_refused(trained, stage, tiny, refused, tmp_path):
    refused(analyse_creativity, *trained.flags, "--windows", 3, 4, says=("--windows 4 is even",), status=2)
    refused(analyse_creativity, *trained.flags, "--windows", 33, says=("--windows 33 is wider", "16 pixels"))
    refused(analyse_creativity, *trained.flags, "--solver", "ancestral", says=("draws noise",), status=2)
    stage(train_lift, *tiny(tmp_path), "--model", "single_t", "--epochs", 1)
    file = tmp_path / "checkpoints/single_t_1ep.pth"
    refused(
        analyse_creativity, "--checkpoint", file, *trained.others, says=("'single_t' model", "predicts both scales")
    )
