"""Images that are no longer where the training found them are asked for in one sentence, not looked for on the hub."""

import os
import shutil
import zipfile
from pathlib import Path

import datasets
import numpy as np
import pytest
from PIL import Image

import cli
import compute_heatmap_30
import generate_sr
import train_lift
from checkpoint import read_checkpoint, save_checkpoint
from conftest import HARDWARE, STEPS
from data import load_images
from images.sources import is_here, is_hub_id

NAMES = ["images", "./images", "data/images", "data/more/images", "../images", "my images", "bilder_ä", "images.zip"]
MAP = ["--grid", 4, "--K", 1, "--num_images", 2, "--output", "map.pth", *STEPS, *HARDWARE]


@pytest.fixture
def no_hub(monkeypatch):
    """Names that were looked for on the hub."""
    asked = []

    def load_dataset(name, *args, **kwargs):
        asked.append(name)
        raise ConnectionError(f"Couldn't reach '{name}' on the Hub")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    return asked


def write_images(place, count=12):
    folder = place.with_suffix("")
    folder.mkdir(parents=True)
    for k in range(count):
        pixels = np.random.default_rng(k).integers(0, 256, (16, 16, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{k:02d}.png")
    if place.suffix == ".zip":
        with zipfile.ZipFile(place, "w") as archive:
            for file in sorted(folder.iterdir()):
                archive.write(file, file.name)


@pytest.mark.parametrize("name", ["images", "../up/images", "images.zip"])
def test_a_checkpoint_may_be_used_from_elsewhere(stage, refused, tiny, tmp_path, monkeypatch, no_hub, name):
    home, elsewhere = tmp_path / "home", tmp_path / "else/where"
    home.mkdir()
    elsewhere.mkdir(parents=True)
    monkeypatch.chdir(home)
    write_images(home / name)
    stage(train_lift, *tiny(home), "--dataset", name, "--epochs", 1)
    assert read_checkpoint("checkpoints/lift_dual_timestep_1ep.pth")["config"]["dataset_is_here"] is True
    monkeypatch.chdir(elsewhere)
    checkpoint = ["--checkpoint", "../../home/checkpoints/lift_dual_timestep_1ep.pth"]
    says = (f"lay in '{name}', which is not there (seen from {elsewhere})", "as --dataset")
    refused(compute_heatmap_30, *checkpoint, *MAP, says=says)
    refused(generate_sr, *checkpoint, "--on", "train", *STEPS, *HARDWARE, says=says)
    stage(compute_heatmap_30, *checkpoint, *MAP, "--dataset", os.path.relpath(home / name))
    # The place of the data may change between a run and its resumption.
    shutil.move(home / name, tmp_path / Path(name).name)
    monkeypatch.chdir(tmp_path)
    stage(train_lift, *tiny(home), "--dataset", Path(name).name, "--epochs", 2, "--resume", "required")
    assert no_hub == []


@pytest.mark.parametrize("is_known", [True, False])
@pytest.mark.parametrize("name", [*NAMES, "/gone/images", "~/images", "images/", "mnist", "owner/set", "set:config"])
def test_only_what_may_be_on_the_hub_is_looked_for_there(tmp_path, monkeypatch, no_hub, name, is_known):
    monkeypatch.chdir(tmp_path)
    config = {"dataset": name, "resolution": 16, "resize_filter": "bilinear", "skip_bad_images": False}
    was_here = name not in ("mnist", "owner/set", "set:config")
    if is_known:
        config["dataset_is_here"] = was_here
    # Nothing tells the name of a folder from one of the hub, in a checkpoint that does not say.
    may_be_there = not was_here or (not is_known and name in ("images", "data/images"))
    with pytest.raises((FileNotFoundError, RuntimeError)) as refused:
        cli.load_training_images(cli.DataSettings(cache_dir="cache"), config)
    assert isinstance(refused.value, RuntimeError) == may_be_there and "--dataset" in str(refused.value)
    assert no_hub == [name.partition(":")[0]] * may_be_there


@pytest.mark.parametrize("name", [*NAMES, "images:2"])
def test_what_is_here_is_found(tmp_path, monkeypatch, no_hub, name):
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    assert not is_here(name)
    if not is_hub_id(name):
        with pytest.raises(FileNotFoundError, match=f"--dataset {name} is not a folder"):
            load_images(name, 16, "cache")
    write_images(Path(name), 3)
    assert is_here(name) and len(load_images(name, 16, "cache")) == 3 and no_hub == []


def test_built_in_images_are_everywhere(stage, run, tmp_path, monkeypatch):
    content = read_checkpoint(run.lift)
    assert content["config"]["dataset_is_here"] is False
    # As if there had been a folder of that name.
    save_checkpoint(tmp_path / "a_1ep.pth", content | {"config": content["config"] | {"dataset_is_here": True}})
    monkeypatch.chdir(tmp_path)
    stage(compute_heatmap_30, "--checkpoint", "a_1ep.pth", *MAP)
